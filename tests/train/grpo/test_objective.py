"""Generations that serve several steps, and groups that are replaced by others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import save_resolved
from mmemo.generation import rollout
from mmemo.run_log import RunRecord
from mmemo.train.distributed import run_ranks
from mmemo.train.grpo.train import run_grpo
from tests.models.parts import values
from tests.train.grpo.tiny import (
    grpo_config,
    grpo_values,
    kill_after,
    largest_difference,
    metrics,
    reward,
    said,
    sha256,
    weights,
)

IN_ORDER = {"group_by_length": False, "longest_first": False}
STILL = {"learning_rate": 1e-15, "weight_decay": 0.0}
"""No weight moves, so that every step has the same policy."""

KINDS: dict[str, dict[str, Any]] = {
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "delta": {"loss_type": "dr_grpo", "delta": 2.0},
}


@pytest.mark.parametrize("acts_on", ["advantage", "reward"])
@pytest.mark.parametrize("kind", KINDS)
def test_trust_kl_and_experts_work_with_every_loss(
    rows: Path, tmp_path: Path, kind: str, acts_on: str
) -> None:
    """Two steps on one generation: the first is on the policy itself, the second is not."""
    config = grpo_config(
        rows,
        tmp_path / "run",
        model={**values(), "lora": {"r": 4, "lora_dropout": 0.0, "experts": {}}},
        rewards=[reward("right"), reward("short")],
        trust={"outcome": "right", "trusted": ["short"], "gate": None, "acts_on": acts_on},
        grpo={"beta": 0.04, "num_iterations": 2, **KINDS[kind]},
        train={"max_steps": 2, "per_device_train_batch_size": 2},
    )
    run_grpo(config)
    first, second = metrics(tmp_path / "run")
    assert "trust/mean_tau" in first
    assert {"rewards/right/advantage_share", "rewards/short/advantage_share"} <= first.keys()
    assert min(first["grad_norm"], second["grad_norm"]) > 0
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert second["kl"] > 0
    assert "experts/weight/audio" in second
    assert ("cispo_clip_ratio" in second) == (kind == "cispo")


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_steps_of_a_generation_share_one_step_of_all_their_prompts(
    rows: Path, tmp_path: Path, loss_type: str
) -> None:
    """With weights that do not move, two steps on four prompts each have, as their mean, the loss
    of one step on all eight, which draws the same completions."""
    common: dict[str, Any] = {"curriculum": IN_ORDER, "watch": {"groups": 8}}
    split = {"max_steps": 2, "per_device_train_batch_size": 4, **STILL}
    grpo = {"loss_type": loss_type, "steps_per_generation": 2, "scale_rewards": "batch"}
    run_grpo(grpo_config(rows, tmp_path / "split", **common, grpo=grpo, train=split))
    whole = {"max_steps": 1, "per_device_train_batch_size": 8, **STILL}
    grpo = {"loss_type": loss_type, "scale_rewards": "batch"}
    run_grpo(grpo_config(rows, tmp_path / "whole", **common, grpo=grpo, train=whole))
    first, second = metrics(tmp_path / "split")
    (both,) = metrics(tmp_path / "whole")
    mean = (first["loss"] + second["loss"]) / 2
    assert mean == pytest.approx(both["loss"], rel=1e-4, abs=1e-6)
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-2)
    assert (first["reward"], first["rows_per_step"]) == (both["reward"], 16)
    assert "reward" not in second  # it drew none
    one, other = said(tmp_path / "split"), said(tmp_path / "whole")
    assert one == other
    assert {line["step"] for line in one} == {1}


def test_a_step_is_drawn_at_once(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts of all micro-batches say together what they say one after the other."""
    batches: list[int] = []

    class Counted(rollout.Decoder):
        def __init__(self, backbone: Any, prompts: Any, *args: Any, **kwargs: Any) -> None:
            batches.append(len(prompts))
            super().__init__(backbone, prompts, *args, **kwargs)

    monkeypatch.setattr(rollout, "Decoder", Counted)
    train = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for name, whole, drawn in (("together", True, [2, 2]), ("apart", False, [1] * 4)):
        batches.clear()
        run_grpo(
            grpo_config(
                rows,
                tmp_path / name,
                rollout={"num_generations": 2, "max_completion_length": 6, "whole_steps": whole},
                watch={"groups": 4, "samples": 0},
                train={**train, **STILL},
            )
        )
        assert batches == drawn
    one, other = said(tmp_path / "together"), said(tmp_path / "apart")
    assert [line["completions"] for line in one] == [line["completions"] for line in other]


def drawing(rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Two completions a prompt, right or wrong: half of the groups are flat."""
    grpo = {"filter_zero_variance": True, "max_resample_times": 20, **changes.pop("grpo", {})}
    return grpo_values(
        rows,
        out,
        rewards=[reward("right")],
        rollout={"num_generations": 2, "max_completion_length": 4},
        grpo=grpo,
        watch={"groups": 24},
        **changes,
    )


def test_flat_groups_are_replaced_until_the_batch_is_full(rows: Path, tmp_path: Path) -> None:
    run_grpo(grpo_config(rows, tmp_path / "run", **drawing(rows, tmp_path / "run")))
    lines = metrics(tmp_path / "run")
    assert [line["rows_per_step"] for line in lines] == [8] * 6
    assert [line["resampling/groups_missing"] for line in lines] == [0] * 6
    assert any(line["resampling/rounds"] > 1 for line in lines)
    for line in lines:
        drawn = [one for one in said(tmp_path / "run") if one["step"] == line["step"]]
        # No prompt is drawn twice; all that was drawn is in the metrics of the rewards.
        assert len({one["sample_id"] for one in drawn}) == len(drawn)
        assert len(drawn) == 4 + line["resampling/prompts"]
        flat = [one for one in drawn if len(set(one["rewards"]["right"])) == 1]
        assert len(flat) == line["resampling/prompts"]
        assert line["frac_reward_zero_std"] == pytest.approx(len(flat) / len(drawn), rel=1e-4)


def test_prompts_keep_their_turn_and_a_full_batch_draws_no_more(rows: Path, tmp_path: Path) -> None:
    """Where no group is flat, resampling changes no bit."""
    for name, grpo in (
        ("on", {"filter_zero_variance": True, "max_resample_times": 3}),
        ("off", {}),
    ):
        run_grpo(grpo_config(rows, tmp_path / name, grpo=grpo, train={"max_steps": 3}))
    assert said(tmp_path / "on") == said(tmp_path / "off")
    found = [sha256(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("on", "off")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("most", "prompts", "drawn"),
    [(1, 4, 1), (3, 12, 3), (9, 20, 5)],
    ids=["once", "three times", "all 24 prompts"],
)
def test_resampling_has_an_end(
    rows: Path, tmp_path: Path, most: int, prompts: int, drawn: int
) -> None:
    """A reward that is the same for all makes every group flat."""
    config = grpo_config(
        rows,
        tmp_path / "run",
        rewards=[reward("constant")],
        rollout={"num_generations": 2, "max_completion_length": 2},
        grpo={"filter_zero_variance": True, "max_resample_times": most},
        train={"max_steps": 1},
    )
    run_grpo(config)
    (line,) = metrics(tmp_path / "run")
    assert line["resampling/rounds"] == drawn
    assert line["resampling/prompts"] == prompts
    assert line["resampling/groups_missing"] == 4
    assert (line["rows_per_step"], line["grad_norm"]) == (0, 0)


def test_sigkill_within_a_generation_changes_no_bit(rows: Path, tmp_path: Path) -> None:
    """Generations of two steps, each taken twice, with groups that are replaced; the last of an
    epoch has one step. The run is killed between two boundaries."""
    changes: dict[str, Any] = {
        "grpo": {"steps_per_generation": 2, "num_iterations": 2, "loss_type": "sapo"},
        "train": {"max_steps": 14, "per_device_train_batch_size": 5},
        "run": {"save_steps": 3, "save_total_limit": None},
    }
    whole, cut = (drawing(rows, tmp_path / name, **changes) for name in ("whole", "cut"))
    run_grpo(grpo_config(rows, tmp_path / "whole", **whole))
    assert kill_after(cut, 7)
    run_grpo(grpo_config(rows, tmp_path / "cut", **cut))
    (resumed,) = RunRecord(tmp_path / "cut").events("resume")
    assert resumed["step"] == 4  # the saves of 3 and 6 wait for 4 and 8
    assert weights(tmp_path / "cut").keys() == weights(tmp_path / "whole").keys()
    assert largest_difference(weights(tmp_path / "cut"), weights(tmp_path / "whole")) == 0
    assert said(tmp_path / "cut") == said(tmp_path / "whole")
    # Five steps an epoch, of 5, 5, 5, 5 and 4 prompts: 4 + 4 + 2 with the iterations.
    saved = sorted(int(p.name.split("-")[1]) for p in (tmp_path / "whole").glob("checkpoint-*"))
    assert saved == [4, 8, 10, 14]


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_replace_the_same_groups_as_one(rows: Path, tmp_path: Path) -> None:
    """And agree on when to end, also where one rank has no prompt and where prompts run out."""
    common = {
        "data": {"limit": 9},
        "grpo": {"num_iterations": 2, "beta": 0.04, "max_resample_times": 3},
    }
    train = {"max_steps": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    for name, accumulation, together in (("alone", 2, 4), ("two", 1, 2)):
        found = drawing(
            rows,
            tmp_path / name,
            data=common["data"],
            grpo={**common["grpo"], "steps_per_generation": together},
            train={**train, "gradient_accumulation_steps": accumulation},
        )
        config = grpo_config(rows, tmp_path / name, **found)
        if name == "alone":
            run_grpo(config)
            continue
        path = tmp_path / "two.yaml"
        save_resolved(config, path)
        command = [sys.executable, "-m", "tests.train.grpo.tiny", str(path)]
        assert run_ranks(command, 2, cpu=True) == 0
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    assert sum(line.get("resampling/prompts", 0) for line in one) > 0
    assert any(line.get("resampling/groups_missing", 0) > 0 for line in one)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        names = {"loss", "grad_norm", "reward", "kl", "rows_per_step", "resampling/prompts"}
        for key in names & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-6), key
    assert largest_difference(weights(tmp_path / "alone"), weights(tmp_path / "two")) < 1e-4
