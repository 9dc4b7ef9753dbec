"""The benchmarks compare the same work: on the tiniest models, both sides of a step agree."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path

import dpo_passes
import dpo_step
import logprob_memory
import pytest
import sft_packing
import sft_step
import tiny_vlm
from grpo_update import build
from timing import Found, Watch, check_same_work, compare

STEPS = 2


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small images and a tower of one layer. Each end of a TRL training collects garbage, which
    would take longer."""
    monkeypatch.setitem(tiny_vlm.TOWER, "depth", 1)
    monkeypatch.setattr(tiny_vlm, "HEIGHT", 56)
    monkeypatch.setattr(tiny_vlm, "WIDTH", 84)
    gc.freeze()
    yield
    gc.unfreeze()


def arm(made: tuple[Watch, int]) -> list[dict[str, object]]:
    watch, tokens = made
    assert len(watch.marks) == STEPS + 1
    return [{"losses": watch.losses, "tokens": tokens}]


def test_a_preference_step_is_trls(tmp_path: Path) -> None:
    given = ("tiny", STEPS)
    found: Found = {
        "ours": arm(dpo_step.run_ours(*given, tmp_path / "ours", stored=False)),
        "stored": arm(dpo_step.run_ours(*given, tmp_path / "stored", stored=True)),
        "baseline": arm(dpo_step.run_baseline(*given, tmp_path / "trl")),
    }
    losses = check_same_work(found)
    assert abs(losses["ours"] - 0.6931) > 1e-3  # the adapters say something


def test_a_supervised_step_is_trls(tmp_path: Path) -> None:
    given = ("tiny", STEPS)
    found: Found = {
        "ours": arm(sft_step.run_ours(*given, tmp_path / "ours", cached=False)),
        "cached": arm(sft_step.run_ours(*given, tmp_path / "cached", cached=True)),
        "baseline": arm(sft_step.run_baseline(*given, tmp_path / "trl")),
    }
    check_same_work(found)


def test_packed_rows_learn_the_same(tmp_path: Path) -> None:
    sizes = {"width": 8, "layers": 1}
    found: Found = {
        name: arm(sft_packing.run("shuffled", STEPS, tmp_path / name, packed=packed, **sizes))
        for name, packed in (("ours", True), ("baseline", False))
    }
    check_same_work(found)
    assert sft_packing.limit("shuffled", STEPS) > sft_packing.limit("grouped", STEPS) > 1


@pytest.mark.parametrize("shape", [*logprob_memory.SHAPES])
def test_the_loss_in_chunks_is_the_same(shape: str) -> None:
    sizes = (32, 8, 64)
    found: Found = {
        "ours": arm(logprob_memory.run(shape, STEPS, 4 * 64, sizes)),
        "baseline": arm(logprob_memory.run(shape, STEPS, 0, sizes)),
    }
    check_same_work(found)


@pytest.mark.parametrize("rejected", [1, 2])
def test_passes_of_their_own_come_to_the_same(rejected: int) -> None:
    options = argparse.Namespace(width=64, layers=1, prompt=512, answer=16)
    loaded = build(options)
    tiny_vlm.shake(loaded.model)
    arms = dpo_passes.Arms(loaded, rejected, options)
    found = dpo_passes.compare(arms, 1)
    assert found["gradients_differ_by"] < 1e-3
    assert (arms.prompt, set(arms.answers)) == (512, {16})
    assert found["limit"] == round((1 + rejected) * 528 / (512 + 16 * (1 + rejected)), 2)


@pytest.mark.parametrize(
    "other", [{"losses": [0.5002], "tokens": 9}, {"losses": [0.5], "tokens": 8}]
)
def test_different_work_is_not_compared(other: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="different work"):
        check_same_work({"ours": [{"losses": [0.5], "tokens": 9}], "baseline": [other]})


def test_a_comparison_takes_medians() -> None:
    found: Found = {
        "ours": [
            {"times": [(1.0, 0.5), (9.0, 9.0)], "peak": 200.0, "idle": 100.0},
            {"times": [(1.0, 0.5)], "peak": 200.0, "idle": 100.0},
        ],
        "baseline": [{"times": [(3.0, 2.0)], "peak": 400.0, "idle": 200.0}],
    }
    made = compare(found, "ours", 4.0)
    assert (made["ratio"], made["share_of_limit"], made["cpu_ratio"]) == (3.0, 0.75, 4.0)
    assert (made["memory_share"], made["step_share"]) == (0.5, 0.5)
