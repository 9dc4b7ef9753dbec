"""A term from a file that would spoil a run is refused before the run, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.losses.objective import ObjectiveConfig, build_terms
from mmemo.losses.validate import validate_term
from tests.losses.pairs import KINDS, term

FILE = """
import torch
from mmemo.losses.base import log_ratio, preference_loss, rejected_weights, token_sum, usable
from mmemo.losses.base import LogpRequest, PreferenceTerm, TermLoss

class Mine(PreferenceTerm):
    def needs(self):
        return {needs}

    def __call__(self, logps):
        chosen = log_ratio(logps, ("input", "chosen"))
        rejected = log_ratio(logps, ("input", "spurious"))
        counted = usable(logps, self.needs(), "chosen") & usable(logps, self.needs(), "spurious")
        rows = preference_loss(chosen - rejected).masked_fill(~counted, 0.0)
        {change}
        return {result}
"""
NEEDS = '(LogpRequest("input", "chosen"), LogpRequest("input", "spurious"))'
RESULT = "TermLoss(rows, counted, {})"


def build(folder: Path, change: str = "", needs: str = NEEDS, result: str = RESULT) -> None:
    file = folder / "mine.py"
    file.write_text(FILE.format(needs=needs, change=change or "pass", result=result))
    build_terms(parse(ObjectiveConfig, {"terms": [{"kind": f"{file}:Mine"}]}).terms)


def test_a_sound_term_is_built(tmp_path: Path) -> None:
    build(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows = rows.mean()", r"rows of shape \(\) for 4 pairs"),
        ("rows = rows[:2]", r"rows of shape \(2,\) for 4 pairs"),
        ("rows = 1.0", "rows of shape float"),
        ("counted = counted.float()", "counted as torch.float32"),
        ("counted = counted | True", "counts 4 of 4 pairs, 3 of which"),
        ("counted = counted & False", "counts 0 of 4 pairs, 3 of which"),
        ("rows = rows + 1", "not counted; set those rows to 0"),
        ("rows = rows.detach()", "without a gradient"),
        ("rows = rows + logps.policy['input', 'chosen'].sum(1)", "reads padding"),
        ("rows = rows - rows.mean() * counted", "alone, so the result would depend on the batch"),
        ("logps.policy['input', 'hallucinated']", r"reads \('input', 'hallucinated'\)"),
        ("raise RuntimeError('no\\nidea')", r"fails on 4 pairs \(RuntimeError: no\)"),
        (
            "rows = rows + (logps.policy['input', 'chosen'].nan_to_num() * 0).sqrt().sum(1) * 0",
            "a gradient that is not finite",
        ),
    ],
)
def test_what_a_term_returns_is_checked(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(tmp_path, change)
    assert "mine.py:Mine" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("rows", "returns Tensor; it must return a TermLoss"),
        ("TermLoss(rows, counted, [])", "metrics as a mapping"),
        ("TermLoss(rows, counted, {'x': 1.0})", r"metric 'x' in another form than \(sum, count\)"),
    ],
)
def test_the_form_of_the_result_is_checked(tmp_path: Path, result: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, result=result)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("()", "must return a tuple of LogpRequest"),
        ('[("input", "chosen")]', "must return a tuple of LogpRequest"),
        (f"{NEEDS} * 2", "the same branch and answer twice"),
        ("1 / 0", r"fails in needs\(\) \(ZeroDivisionError"),
        (f"{NEEDS}[:1]", r"reads \('input', 'spurious'\), which its needs\(\) does not ask for"),
        (
            '(LogpRequest("input", "chosen"), LogpRequest("input", "spurious", reference=False))',
            r"reads \('input', 'spurious'\)",
        ),
    ],
)
def test_what_a_term_asks_for_is_checked(tmp_path: Path, needs: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, needs=needs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_built_in_terms_pass_and_no_random_number_is_drawn(kind: str) -> None:
    before = torch.random.get_rng_state()
    one = term(kind)
    validate_term(one)  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.random.get_rng_state(), before)
