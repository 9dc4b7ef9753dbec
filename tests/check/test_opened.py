"""What ``mmemo check`` says about a template that opens reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemo.check.opened import show_opened
from mmemo.check.run import run_check
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError
from tests.check.test_run import clips, question, sft  # noqa: F401 - clips is a fixture
from tests.models import chat_templates
from tests.models.parts import values


def sample(name: str, answer: str) -> Sample:
    return Sample(name, (Turn("user", "Which?"), Turn("assistant", answer)), {}, source=("r", 1))


SAMPLES = [sample("[a] 1", "sad"), sample("b", "<think>It is low.</think>sad")]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_nothing_is_said_where_nothing_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    show_opened("", SAMPLES, answered=True)
    assert said(capsys) == ""


def test_answers_without_reasoning_are_counted_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_opened("<think>\n", SAMPLES, answered=True)
    printed = said(capsys)
    assert "The generation prompt opens <think>: completions are read with it" in printed
    assert "1 of 2 answers hold no </think>, such as that of '[a] 1'" in printed
    show_opened("<think>\n", SAMPLES, answered=False)
    assert "hold no" not in said(capsys)


def test_a_training_config_says_what_its_template_opens(
    clips: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prefilled.jinja").write_text(chat_templates.PREFILLED)
    model = {**values(face=None), "chat_template_path": str(tmp_path / "prefilled.jinja")}
    rows = [question("one", "a", "sad"), question("two", "b", "<think>It is low.</think>sad")]
    report = run_check(sft(clips, tmp_path, rows, model=model))
    assert "1 of 2 answers hold no </think>, such as that of 'one'" in said(capsys)
    shown = {preview.sample_id: preview.text for preview in report.previews}
    assert shown["one"].endswith("assistant\n<think>\n\n</think>\n\nsad<|im_end|>\n")
    assert shown["two"].endswith("assistant\n<think>\nIt is low.</think>sad<|im_end|>\n")


@pytest.mark.parametrize("template", ["{{ m }", "{{ raise_exception(1) }}"])
def test_a_template_that_cannot_render_is_one_sentence(
    clips: Path,  # noqa: F811
    tmp_path: Path,
    template: str,
) -> None:
    (tmp_path / "bad.jinja").write_text(template)
    model = {**values(face=None), "chat_template_path": str(tmp_path / "bad.jinja")}
    with pytest.raises(ConfigError, match="the chat template"):
        run_check(sft(clips, tmp_path, [question("one", "a", "sad")], model=model))
