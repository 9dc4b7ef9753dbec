"""What a generation prompt opens, and answers that continue it."""

from __future__ import annotations

import pytest

from mmemo.answers.messages import think_text
from mmemo.answers.prefill import behind, continuation, opened_part, opened_tag, says_all


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|Assistant|><think>", "<think>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),  # Qwen3, enable_thinking=False
        ("assistant\n<think>\n\n</think>\n\n<answer>", "<think>\n\n</think>\n\n<answer>"),
        ("assistant\n<THINK>\nOkay, ", "<THINK>\nOkay, "),
        ("<start_of_turn>model\n", ""),  # Gemma's own tokens are no reasoning
        ("model\n<reasoning>", "<reasoning>"),
    ],
)
def test_only_what_is_left_open_counts(prompt: str, opened: str) -> None:
    assert opened_part(prompt) == opened


def test_the_innermost_open_tag_is_named() -> None:
    assert opened_tag("<think>a</think><answer>") == "<answer>"
    assert opened_tag("</think>a") is None
    assert opened_tag("<think><answer>b</answer>") == "<think>"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("<think>A</think>b", "A</think>b"),
        ("  <think>\nA\n</think>\n\nb", "A\n</think>\n\nb"),
        ("A</think>b", "A</think>b"),
        ("b", "\n</think>\n\nb"),  # closed at once, as Qwen3's template writes it
        ("<answer>b</answer>", "\n</think>\n\n<answer>b</answer>"),
    ],
)
def test_an_answer_continues_what_is_open(content: str, written: str) -> None:
    assert continuation(content, "<think>\n") == written
    whole = "<think>\n" + written
    assert whole.lower().count("<think>") == whole.lower().count("</think>") == 1


def test_an_answer_continues_an_opened_answer() -> None:
    opened = "<think>\n\n</think>\n\n<answer>"
    assert continuation("<answer>sad</answer>", opened) == "sad</answer>"
    assert continuation("sad", opened) == "sad</answer>"
    assert continuation("<think></think><answer>sad</answer>", opened) == "sad</answer>"


def test_nothing_open_changes_nothing() -> None:
    assert continuation("<think>A</think>b", "") == "<think>A</think>b"


def test_whitespace_around_tags_is_no_loss_but_a_lost_word_is() -> None:
    assert says_all("<think>\nA b\n</think>\n\nc<|im_end|>", "<think>A b</think>c")
    assert not says_all("c<|im_end|>", "<think>A b</think>c")
    assert not says_all("<think>\nA  b\n</think>\n\nc", "<think>A b</think>c")


def test_a_prompt_that_ends_with_a_tag_opens_it_for_the_completion() -> None:
    assert behind("Which?<think>\n", "A</think>b") == "<think>\nA</think>b"
    assert behind("Which?<think>\n", "<think>A</think>b") == "<think>A</think>b"
    assert behind("Write <think> and </think>.", "A</think>b") == "A</think>b"
    assert behind("Reason after <think>, then answer.", "b") == "b"


def test_text_before_a_tag_that_only_closes_is_reasoning() -> None:
    assert think_text("It is low.</think>sad") == "It is low."
    assert think_text("<think>It is low.</think>sad") == "It is low."
    assert think_text("sad") == ""
