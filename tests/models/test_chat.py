"""Chat templates that open, move or remove reasoning, and those that cannot render a row."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.data.collate import IGNORE_INDEX
from mmemo.data.sample import Turn
from mmemo.errors import ConfigError, DataError
from mmemo.models.composed.processing import MmemoProcessor
from tests.models import chat_templates
from tests.models.composed.test_processing import turns, with_template

ANSWER = "<think>The voice is low.</think><answer>sad</answer>"


def learnt(processor: MmemoProcessor, answer: str) -> str:
    """What is trained on. The row begins with the very tokens of the prompt in generation."""
    row = processor.render(turns("Which?", answer), generation=False, modalities=())
    prompt = processor.render(turns("Which?", answer), generation=True, modalities=())
    size = len(prompt.input_ids)
    assert row.input_ids[:size] == prompt.input_ids
    assert row.labels[:size] == [IGNORE_INDEX] * size
    tokenizer: Any = processor.tokenizer
    return tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("PLAIN", ""),
        ("QWEN3", ""),
        ("QWEN3_NOT_THINKING", ""),
        ("QWEN3_THINKING", "<think>\n"),
        ("R1", "<think>\n"),
        ("DOUBLED", "<think>\n"),
        ("PREFILLED", "<think>\n"),
    ],
)
def test_what_the_generation_prompt_opens_is_known(name: str, opened: str) -> None:
    assert with_template(getattr(chat_templates, name)).opened == opened


def test_a_template_that_asks_for_a_system_turn_is_looked_at_too() -> None:
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system!') }}{% endif %}"
    assert with_template(needs + chat_templates.PREFILLED).opened == "<think>\n"


@pytest.mark.parametrize("name", ["QWEN3_THINKING", "R1", "DOUBLED", "PREFILLED"])
@pytest.mark.parametrize("answer", [ANSWER, ANSWER.removeprefix("<think>")])
def test_training_continues_the_reasoning_that_the_prompt_opened(name: str, answer: str) -> None:
    processor = with_template(getattr(chat_templates, name))
    text = "".join(learnt(processor, answer).split())
    assert text == "Thevoiceislow.</think><answer>sad</answer><|im_end|>"


@pytest.mark.parametrize("name", ["QWEN3_THINKING", "R1", "DOUBLED", "PREFILLED"])
def test_an_answer_without_reasoning_closes_it_at_once(name: str) -> None:
    found = learnt(with_template(getattr(chat_templates, name)), "sad")
    assert found == "\n</think>\n\nsad<|im_end|>"


@pytest.mark.parametrize("name", ["PLAIN", "QWEN3", "QWEN3_NOT_THINKING"])
def test_reasoning_is_trained_on_where_nothing_is_open(name: str) -> None:
    text = "".join(learnt(with_template(getattr(chat_templates, name)), ANSWER).split())
    assert text == "<think>Thevoiceislow.</think><answer>sad</answer><|im_end|>"


def test_reasoning_that_a_template_strips_is_trained_on_all_the_same() -> None:
    strips = chat_templates.R1.replace("<think>\\n' }}{% endif %}", "' }}{% endif %}")
    assert with_template(strips).opened == ""
    text = "".join(learnt(with_template(strips), ANSWER).split())
    assert text == "<think>Thevoiceislow.</think><answer>sad</answer><|im_end|>"


def test_history_is_rendered_alike_for_training_and_generation() -> None:
    processor = with_template(chat_templates.R1)
    talk = [Turn("user", "Which?"), Turn("assistant", ANSWER), Turn("user", "Sure?")]
    prompt = processor.render(talk, generation=True, modalities=())
    row = processor.render([*talk, Turn("assistant", ANSWER)], generation=False, modalities=())
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert prompt.text.count("The voice is low.") == 0
    assert row.text.count("The voice is low.") == 1


def test_a_tag_that_is_a_special_token_may_stand_in_turns() -> None:
    processor = with_template(chat_templates.PLAIN)
    tokenizer: Any = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    again = MmemoProcessor(tokenizer, chat_template=chat_templates.PLAIN)
    row = again.render(turns("Which?", ANSWER), generation=False, modalities=())
    assert tokenizer.convert_tokens_to_ids("<think>") in row.labels


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m['content'] }", "is not valid Jinja"),
        ("{% for m in messages %}{{ m.content }}", "is not valid Jinja"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses a row .*Roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "refuses a row"),
        ("{{ messages[0].content | nofilter }}", "is not valid Jinja.*nofilter"),
        ("{{ messages[0].content + 1 }}", r"cannot render the row \(TypeError"),
        ("{{ 1 / 0 }}", r"cannot render the row \(ZeroDivisionError"),
    ],
)
def test_a_template_that_cannot_render_is_one_sentence(template: str, says: str) -> None:
    processor = with_template(template)
    for generation in (True, False):
        with pytest.raises(ConfigError, match=says) as caught:
            processor.render(turns("Which?", "sad"), generation=generation, modalities=())
        assert "chat template" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_refused_system_turn_says_to_remove_it() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    talk = [Turn("system", "Be kind."), *turns("Which?", "sad")]
    with pytest.raises(ConfigError, match=r"no system.*; remove the system turn, or set model"):
        with_template(refuses + chat_templates.PLAIN).render(talk, generation=True, modalities=())


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(DataError, match="answer is empty"):
        with_template(chat_templates.R1).render(
            turns("Which?", " "), generation=False, modalities=()
        )
