"""GRPO with an engine whose log-probabilities are not the trainer's."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.config import save_resolved
from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.rollout import Rollouts
from mmemo.run_log import RunRecord
from mmemo.train.distributed import Ranks, run_ranks
from mmemo.train.grpo.off_policy import OffPolicyCorrection, needs_correction
from mmemo.train.grpo.train import run_grpo
from tests.train.grpo.served import Report, as_drawn, noisy, serve
from tests.train.grpo.tiny import (
    grpo_config,
    largest_difference,
    metrics,
    reward,
    sha256,
    weights,
)

NAMES = {
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
    "sampling/importance_sampling_ratio/clipped",
    "sampling/kl",
}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2}
ON = {"vllm_importance_sampling_correction": True}
OFF = {"vllm_importance_sampling_correction": False}
TOKENS = {"vllm_importance_sampling_mode": "token_truncate"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[Report], None]:
    return lambda report: serve(report, monkeypatch.setattr)


class Mute:
    """An engine that says nothing of its log-probabilities."""

    def generate(self, model: Any, prompts: Any, seeds: Any) -> Rollouts:
        raise NotImplementedError


def run(rows: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    changes = {"watch": {"samples": 0}, "train": SHORT, **changes}
    run_grpo(grpo_config(rows, out, **changes))
    return metrics(out)


def adapter(out: Path) -> str:
    return sha256(out / "final" / "adapter_model.safetensors")


def signs(out: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["metric"]) for event in RunRecord(out).events("sign")]


def test_the_engine_decides_and_the_config_overrules(
    rows: Path, tmp_path: Path, served: Callable[[Report], None]
) -> None:
    once = {"train": {**SHORT, "max_steps": 1}}
    plain = run(rows, tmp_path / "hf", **once)
    run(rows, tmp_path / "hf on", grpo=ON, **once)
    served(as_drawn)
    exact = run(rows, tmp_path / "served", **once)
    served(lambda drawn: None)
    run(rows, tmp_path / "served off", grpo=OFF, **once)
    assert not any(NAMES & line.keys() for line in plain)
    assert all(line.keys() >= NAMES for line in exact)
    assert adapter(tmp_path / "served off") == adapter(tmp_path / "hf")
    assert adapter(tmp_path / "served") == adapter(tmp_path / "hf on")
    # Ratios that are 1 but for rounding change the weights by no more than that.
    for line in exact:
        assert line["sampling/kl"] < 1e-9
        assert line["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-4)
        assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)
        assert line["sampling/importance_sampling_ratio/clipped"] == 0
    assert largest_difference(weights(tmp_path / "served"), weights(tmp_path / "hf")) < 1e-3
    assert signs(tmp_path / "served") == []


def test_a_mismatch_is_measured_and_named_once(
    rows: Path,
    tmp_path: Path,
    served: Callable[[Report], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every token is reported as less likely by 0.5 nats: completions of three tokens or more pass
    a ratio of 3."""
    served(lambda drawn: drawn.logps - 0.5)
    lines = run(rows, tmp_path / "run")
    for line in lines:
        for name in ("mean", "max"):
            assert line[f"sampling/sampling_logp_difference/{name}"] == pytest.approx(0.5, abs=1e-4)
        assert line["sampling/kl"] == pytest.approx(math.exp(0.5) - 1.5, rel=1e-3)
        assert line["sampling/importance_sampling_ratio/min"] == 0
        assert line["sampling/importance_sampling_ratio/clipped"] > 0.5
    assert signs(tmp_path / "run") == [(1, "sampling/kl")]
    said = capsys.readouterr().out
    assert said.count("draws from another policy") == 1
    assert "sampling/kl is 0.149; the threshold is above 0.01" in said


def spoilt(drawn: Rollouts, value: float) -> Tensor:
    found = drawn.logps.clone()
    found[-1, 0] = value
    return found


BAD: dict[str, tuple[Report, str]] = {
    "nan": (lambda drawn: spoilt(drawn, math.nan), "reported nan as log-probabilities of 1 of"),
    "none": (lambda drawn: spoilt(drawn, -math.inf), "reported -inf as"),
    "vLLM's none": (lambda drawn: spoilt(drawn, -9999.0), "reported -9999 as"),
    "probabilities": (lambda drawn: drawn.logps.exp(), "as log-probabilities of"),
    "too few tokens": (lambda drawn: drawn.logps[:, :-1], "of shape"),
    "too few rows": (lambda drawn: drawn.logps[1:], "of shape"),
    "nothing": (lambda drawn: None, "no log-probabilities"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_log_probability_is_refused(tmp_path: Path, kind: str) -> None:
    report, message = BAD[kind]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    logps = torch.tensor([[-1.0, -0.1, 1e-5], [-30.0, math.nan, math.inf]])  # junk in the padding
    drawn = Rollouts(mask, mask, logps, torch.tensor([True, True]), ["a", "b"])
    section = grpo_config(tmp_path, tmp_path / "run").grpo
    correction = OffPolicyCorrection(section, Mute(), Ranks(cpu=True))
    correction.check([drawn])
    with pytest.raises(RolloutError, match=message) as refused:
        correction.check([drawn, replace(drawn, logps=report(drawn))])
    assert str(refused.value).startswith("Mute reported ")
    assert "correction=false" in str(refused.value)


def test_such_a_step_is_not_taken(
    rows: Path, tmp_path: Path, served: Callable[[Report], None]
) -> None:
    drawn: list[Rollouts] = []

    def later(one: Rollouts) -> Tensor:
        drawn.append(one)
        return one.logps if len(drawn) == 1 else spoilt(one, math.nan)

    served(later)
    with pytest.raises(RolloutError, match="these completions are not trained on"):
        run(rows, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]


@pytest.mark.parametrize(
    ("grpo", "other", "train"),
    [
        ({}, {"max_tokens_per_batch": 40, "shared_prefix": False}, {}),
        (
            {"num_iterations": 2, "beta": 0.04, "mask_truncated_completions": True, **TOKENS},
            {},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        ),
    ],
    ids=["packs and prefix", "accumulation"],
)
def test_how_a_step_is_split_changes_nothing(
    rows: Path,
    tmp_path: Path,
    served: Callable[[Report], None],
    grpo: dict[str, Any],
    other: dict[str, Any],
    train: dict[str, Any],
) -> None:
    served(noisy)
    base = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    grpo = {"vllm_importance_sampling_clip_max": 1.1, **grpo}
    one = run(rows, tmp_path / "one", grpo=grpo, train=base)
    two = run(rows, tmp_path / "two", grpo={**grpo, **other}, train={**base, **train})
    assert one[0]["sampling/importance_sampling_ratio/clipped"] > 0.05
    assert ("sampling/kl" in one[1]) == ("num_iterations" not in grpo)  # it drew none
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "grad_norm", *NAMES} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4
    if not other:
        return
    off = run(rows, tmp_path / "off", grpo=OFF, train={**base, "max_steps": 1})
    assert off[0]["grad_norm"] != pytest.approx(one[0]["grad_norm"], rel=1e-2)


def test_a_resumed_run_ends_with_the_same_bits(
    rows: Path, tmp_path: Path, served: Callable[[Report], None]
) -> None:
    """Generations of two steps that are taken twice, with ratios of their own."""
    served(noisy)
    changes: dict[str, Any] = {
        "grpo": {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "sapo", **TOKENS},
        "train": {"max_steps": 8, "per_device_train_batch_size": 2},
        "run": {"save_steps": 4},
    }
    whole = run(rows, tmp_path / "whole", **changes)
    assert [("sampling/kl" in line) for line in whole] == [True, *[False] * 3] * 2
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-8", "final"):
        shutil.rmtree(tmp_path / "cut" / name)
    cut = run(rows, tmp_path / "cut", **changes)
    assert [event["step"] for event in RunRecord(tmp_path / "cut").events("resume")] == [4]
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    for a, b in zip(whole, cut, strict=True):
        assert {name: a[name] for name in a.keys() & NAMES} == {
            name: b[name] for name in b.keys() & NAMES
        }


def test_a_step_without_anything_to_learn_has_no_mismatch(
    rows: Path, tmp_path: Path, served: Callable[[Report], None]
) -> None:
    """The one token of an idle batch was drawn by nobody."""
    served(noisy)
    lines = run(
        rows,
        tmp_path / "run",
        rewards=[reward("constant")],
        grpo={"filter_zero_variance": True},
    )
    assert not any(NAMES & line.keys() for line in lines)
    assert [line["rows_per_step"] for line in lines] == [0, 0]


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_measure_and_correct_what_one_does(
    rows: Path, tmp_path: Path, served: Callable[[Report], None]
) -> None:
    """Also where one rank has no prompt: nine of them, two for each rank and step."""
    served(noisy)
    train = {"max_steps": 5, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    for name, accumulation in (("alone", 2), ("two", 1)):
        config = grpo_config(
            rows,
            tmp_path / name,
            data={"limit": 9},
            grpo={"beta": 0.04, "vllm_importance_sampling_clip_max": 1.1},
            watch={"samples": 0},
            train={**train, "gradient_accumulation_steps": accumulation},
        )
        if name == "alone":
            run_grpo(config)
            continue
        path = tmp_path / "two.yaml"
        save_resolved(config, path)
        command = [sys.executable, "-m", "tests.train.grpo.served", str(path)]
        assert run_ranks(command, 2, cpu=True) == 0
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= NAMES
        for name in {"loss", "grad_norm", *NAMES}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "alone"), weights(tmp_path / "two")) < 1e-4


class _TwoRanks:
    """Rank 0 of two, beside one that says ``other``."""

    def __init__(self, other: str) -> None:
        self.other = other

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self.other]


def test_every_rank_refuses_what_one_does(tmp_path: Path) -> None:
    section = grpo_config(tmp_path, tmp_path / "run").grpo
    fine: Any = _TwoRanks("")
    OffPolicyCorrection(section, Mute(), fine).check([])
    other: Any = _TwoRanks("nan as log-probabilities of 1 of 2 sampled tokens")
    with pytest.raises(RolloutError, match="reported nan"):
        OffPolicyCorrection(section, Mute(), other).check([])


@pytest.mark.parametrize(
    ("exact", "given", "corrected"),
    [
        (None, None, True),
        (False, None, True),
        (True, None, False),
        (True, True, True),
        (False, False, False),
    ],
)
def test_who_is_corrected(
    tmp_path: Path, exact: bool | None, given: bool | None, corrected: bool
) -> None:
    """An engine that says nothing is no trainer."""
    engine: Any = type("Engine", (), {} if exact is None else {"exact": exact})()
    grpo = {"vllm_importance_sampling_correction": given}
    section = grpo_config(tmp_path, tmp_path / "run", grpo=grpo).grpo
    assert needs_correction(section, engine) == corrected


@pytest.mark.parametrize(
    ("grpo", "sentence"),
    [
        (
            {"vllm_importance_sampling_clip_min": 3.0},
            r"clip_min \(3\) must be below vllm_importance_sampling_clip_max \(3\)",
        ),
        (
            {"vllm_importance_sampling_clip_max": None, **TOKENS},
            "mode=token_truncate needs vllm_importance_sampling_clip_max",
        ),
        ({**OFF, **TOKENS}, "vllm_importance_sampling_mode does nothing with"),
        ({**OFF, "vllm_importance_sampling_clip_max": None}, "clip_max does nothing with"),
        ({"vllm_importance_sampling_clip_max": 0}, "greater than 0"),
        ({"vllm_importance_sampling_mode": "token"}, "token_truncate"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, grpo: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        grpo_config(tmp_path, tmp_path / "run", grpo=grpo)


def test_a_masking_mode_needs_no_limit(tmp_path: Path) -> None:
    grpo = {"vllm_importance_sampling_clip_max": None}
    assert grpo_config(tmp_path, tmp_path / "run", grpo=grpo).grpo.vllm_importance_sampling_mode
