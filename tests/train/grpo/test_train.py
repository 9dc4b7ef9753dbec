"""GRPO end to end on real clips: it learns what pays, and no kill or split changes the result."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmemo import checkpoint, content
from mmemo.check.run import run_check
from mmemo.config import load_config, parse, read_yaml, save_resolved
from mmemo.errors import ConfigError, RewardError, TrainingError
from mmemo.models.build import ModelConfig, load_model
from mmemo.report.grpo import side_by_side
from mmemo.run_log import RunRecord
from mmemo.stages import guess
from mmemo.train.distributed import run_ranks
from mmemo.train.grpo.train import GrpoConfig, run_grpo
from tests.models import chat_templates
from tests.models.parts import values
from tests.train.grpo.tiny import (
    finished,
    grpo_config,
    grpo_values,
    kill_after,
    largest_difference,
    last_step,
    lora_model,
    metrics,
    reward,
    said,
    sha256,
    start,
    weights,
)

TRUST = {
    "outcome": "right",
    "trusted": ["short"],
    "gate": {"threshold": 0.2, "patience": 2, "ramp_steps": 3},
}
TRUSTED: dict[str, Any] = {"rewards": [reward("right"), reward("short")], "trust": TRUST}


def test_what_pays_is_said_more_often(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = grpo_config(
        rows,
        tmp_path / "run",
        model=values(),
        train={"max_steps": 22},
        run={"save_steps": 100},
    )
    final = run_grpo(config)
    lines = metrics(tmp_path / "run")
    rewards = [line["rewards/even/mean"] for line in lines]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.25
    assert lines[-1]["entropy"] < lines[0]["entropy"]
    for name in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "clip_ratio/region_mean",
        "rewards/even/within_std",
        "rewards/even/advantage_share",
        "hack/length_drift",
        "hack/unscored_rate",
    ):
        assert name in lines[0], name
    shown = said(tmp_path / "run")
    assert sorted({line["step"] for line in shown}) == list(range(1, 23))
    first = shown[0]
    assert len(first["completions"]) == len(first["advantages"]) == 4
    assert abs(sum(first["advantages"])) < 1e-4
    assert len(first["rewards"]["even"]) == 4
    load_model(parse(ModelConfig, {"path": str(final)}))
    # Random words name no emotion; that is said while it trains, and once.
    signs = RunRecord(tmp_path / "run").events("sign")
    assert [s["step"] for s in signs if s["metric"] == "hack/unreadable_rate"] == [20]
    assert len({s["metric"] for s in signs}) == len(signs)
    assert capsys.readouterr().out.count("Answers name no single label. hack/unreadable_rate") == 1
    (event,) = RunRecord(tmp_path / "run").events("grpo")
    assert event["rewards"][0]["sha256"] == sha256(Path(event["rewards"][0]["file"]))


def test_the_same_prompts_are_followed_through_all_epochs(rows: Path, tmp_path: Path) -> None:
    """24 prompts, 8 a step: three steps an epoch, of which the log has every sixth."""
    train = {"max_steps": 9, "per_device_train_batch_size": 8}
    run_grpo(grpo_config(rows, tmp_path / "run", train=train, run={"logging_steps": 6}))
    shown = said(tmp_path / "run")
    assert len({(line["step"], line["sample_id"]) for line in shown}) == len(shown)
    steps: dict[str, list[int]] = {}
    for line in shown:
        steps.setdefault(line["sample_id"], []).append((line["step"] - 1) // 3)
    followed = [name for name, epochs in steps.items() if epochs == [0, 1, 2]]
    assert len(followed) >= 2
    at = {step: sum(line["step"] == step for line in shown) for step in range(1, 10)}
    assert min(at[1], at[6]) >= 2  # the first prompts of the steps that are logged
    assert all(
        {g["sample_id"] for g in row} <= {*followed} and len({g["sample_id"] for g in row}) == 1
        for row in side_by_side(shown)
    )
    off = tmp_path / "off"
    run_grpo(grpo_config(rows, off, train={"max_steps": 1}, watch={"groups": 0}))
    assert not (off / "completions.jsonl").exists()


def test_kl_pulls_towards_the_start(rows: Path, tmp_path: Path) -> None:
    grpo = {"beta": 0.04, "num_iterations": 2}
    run_grpo(grpo_config(rows, tmp_path / "run", grpo={**grpo, "beta_end": 0.01}))
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0  # the adapter starts as nothing
    assert lines[-1]["kl"] > 1e-6
    assert lines[0]["beta"] == 0.04
    assert lines[-1]["beta"] == pytest.approx(0.01)
    # Two steps learn from the same completions: only the first of them reports rewards.
    assert ["reward" in line for line in lines] == [True, False] * 3
    run_grpo(grpo_config(rows, tmp_path / "strong", grpo={**grpo, "beta": 100.0}))
    assert metrics(tmp_path / "strong")[-1]["kl"] < lines[-1]["kl"]


def test_the_reference_is_what_training_starts_from(rows: Path, tmp_path: Path) -> None:
    """A continued adapter and all weights have a copy; a new adapter is switched off."""
    start_from = run_grpo(grpo_config(rows, tmp_path / "first", train={"max_steps": 1}))
    off = {"beta": 0.04, "reference": "adapter_off"}
    on_adapter = {"path": str(start_from)}
    with pytest.raises(ConfigError, match=r"model\.adapter=merge"):
        run_grpo(grpo_config(rows, tmp_path / "a", model=on_adapter, grpo=off))
    with pytest.raises(ConfigError, match=r"set model\.lora"):
        run_grpo(grpo_config(rows, tmp_path / "b", model=values(), grpo=off))
    merged = {**on_adapter, "adapter": "merge", "lora": {"r": 2}}
    for name, model in (("c", merged), ("d", on_adapter), ("e", values())):
        train = {"max_steps": 2, "learning_rate": 1e-3}
        changes = {"model": model, "grpo": {"beta": 0.04}, "train": train, "trainable": ["lm"]}
        run_grpo(grpo_config(rows, tmp_path / name, **changes))
        first, second = (line["kl"] for line in metrics(tmp_path / name))
        assert first == 0
        assert second > 1e-7


def test_where_a_copy_is_kept_changes_no_bit_nor_does_a_resume(rows: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "model": values(),
        "trainable": ["lm"],
        "train": {"max_steps": 3, "learning_rate": 1e-3},
        "run": {"save_steps": 1, "save_total_limit": None},
    }
    wanted: bytes | None = None
    for kind in ("copy", "copy_cpu"):
        out = tmp_path / kind
        config = grpo_config(rows, out, **common, grpo={"beta": 0.5, "reference": kind})
        final = run_grpo(config)
        found = (final / "model.safetensors").read_bytes()
        assert found == (wanted or found)
        wanted = found
    # From the second step on, whose weights are no longer those of the reference.
    shutil.rmtree(final)
    shutil.rmtree(tmp_path / "copy_cpu" / "checkpoint-3")
    again = run_grpo(config)
    assert (again / "model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"grpo": {"shared_prefix": False}},
        {"grpo": {"max_tokens_per_batch": 60}},
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        {"rollout": {"shared_prefill": False, "drop_finished": False}},
        {"rollout": {"shared_cache": False, "merge_adapter": False}},
        {"rollout": {"fused_steps": False}},
    ],
    ids=["naive", "packs", "accumulation", "plain rollouts", "a cache for each", "modules"],
)
def test_how_a_step_is_computed_changes_nothing_but_rounding(
    rows: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    common: dict[str, Any] = {
        **TRUSTED,
        "train": {"max_steps": 2, "learning_rate": 1e-3},
        "grpo": {"beta": 0.04},
    }
    run_grpo(grpo_config(rows, tmp_path / "one", **common))
    merged = {
        name: {**common.get(name, {}), **change.get(name, {})}
        for name in {*common, *change}
        if isinstance(common.get(name, {}), dict)
    }
    run_grpo(grpo_config(rows, tmp_path / "other", **{**common, **merged}))
    one, other = metrics(tmp_path / "one"), metrics(tmp_path / "other")
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "other")) < 1e-4


def test_the_unscored_get_no_advantage_and_failures_are_recorded(
    rows: Path, tmp_path: Path
) -> None:
    rewards = [reward("picky"), reward("broken", max_failure_share=1.0)]
    run_grpo(grpo_config(rows, tmp_path / "run", rewards=rewards, train={"max_steps": 2}))
    for line in said(tmp_path / "run"):
        assert line["rewards"]["broken"] == [None] * 4
        for score, advantage in zip(line["rewards"]["picky"], line["advantages"], strict=True):
            assert score is not None or advantage == 0
        assert any(line["advantages"])
    failures = RunRecord(tmp_path / "run").events("reward_failed")
    assert {(f["reward"], f["reason"], f["completions"]) for f in failures} == {
        ("broken", "raised", 16)
    }
    assert "no scorer today" in failures[0]["detail"]
    assert metrics(tmp_path / "run")[0]["hack/unscored_rate"] == 0.5
    with pytest.raises(TrainingError, match="'broken' failed on 100%"):
        run_grpo(grpo_config(rows, tmp_path / "strict", rewards=[reward("broken")]))


def test_groups_that_teach_nothing_can_be_left_out(rows: Path, tmp_path: Path) -> None:
    config = grpo_config(
        rows,
        tmp_path / "run",
        rewards=[reward("right")],
        rollout={"num_generations": 2},
        grpo={"filter_zero_variance": True},
    )
    run_grpo(config)
    lines = metrics(tmp_path / "run")
    assert any(line["frac_reward_zero_std"] for line in lines)
    for line in lines:
        assert line["rows_per_step"] == 8 * (1 - line["frac_reward_zero_std"])


def test_leaving_groups_out_changes_no_statistic_of_the_rewards(rows: Path, tmp_path: Path) -> None:
    """With a learning rate of next to 0 both runs draw the same completions. The one group of a
    step is often flat, and then nothing of the step is trained on."""
    logged: list[list[dict[str, Any]]] = []
    for name, filtered in (("on", True), ("off", False)):
        config = grpo_config(
            rows,
            tmp_path / name,
            rewards=[reward("right")],
            rollout={"num_generations": 2},
            grpo={"filter_zero_variance": filtered},
            train={"per_device_train_batch_size": 1, "learning_rate": 1e-15, "max_steps": 8},
            run={"logging_steps": 2},
        )
        run_grpo(config)
        logged.append(metrics(tmp_path / name))
    names = ("reward", "hack/", "completions/", "frac_", "advantage_size")
    kept = [
        [
            {k: v for k, v in line.items() if k.startswith(names) and not k.endswith("seconds")}
            for line in lines
        ]
        for lines in logged
    ]
    assert kept[0] == kept[1]
    assert any(line["frac_reward_zero_std"] == 1 for line in kept[0])
    assert all("rewards/right/mean" in line for line in kept[0])


OUTCOME = {"path": "reward/outcome.py:outcome"}


def labelled(rows: Path, folder: Path, labels: Sequence[str]) -> Path:
    """The rows beside their clips, with labels."""
    found = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    for place, row in enumerate(found if labels else ()):
        row["label"] = labels[place % len(labels)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, found)))
    return folder / "rows.jsonl"


def test_rows_that_no_reward_can_score_are_refused(rows: Path, tmp_path: Path) -> None:
    manifest = str(labelled(rows, tmp_path, []))
    data = {"manifests": [manifest]}
    config = grpo_config(rows, tmp_path / "run", rewards=[OUTCOME], data=data)
    with pytest.raises(RewardError, match="'outcome' applies to none of the 24 rows"):
        run_grpo(config)
    assert not (tmp_path / "run" / "final").exists()
    careless = grpo_config(
        rows, tmp_path / "on", rewards=[OUTCOME], data=data, watch={"prove_rewards": False}
    )
    with pytest.raises(TrainingError, match="no reward scored any completion in the last 3 steps"):
        run_grpo(careless)
    assert not (tmp_path / "on" / "final").exists()
    assert RunRecord(tmp_path / "on").events("reward_proof")[0]["skipped"] is True


def test_a_reward_that_pays_for_lists_is_refused_before_the_model_is_loaded(
    rows: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lenient.py"
    file.write_text(
        "def gold(row):\n    return row['label']\n\n"
        "def lenient(prompts, completions, *, label, **_):\n"
        "    said = [c[0]['content'].split('<answer>')[-1] for c in completions]\n"
        "    return [float(s[:2] == t[:2] or s.endswith(t)) for s, t in zip(said, label)]\n"
    )
    data = {"manifests": [str(labelled(rows, tmp_path, ["高兴", "悲伤", "愤怒"]))]}
    config = grpo_config(
        rows,
        tmp_path / "run",
        rewards=[{"path": f"{file}:lenient"}],
        data=data,
        model={"path": str(tmp_path / "no model")},
    )
    with pytest.raises(RewardError, match=r"'lenient' .*(listing|all-labels) answer"):
        run_grpo(config)
    (event,) = RunRecord(tmp_path / "run").events("reward_proof")
    assert set(event["labels"]) == {"高兴", "悲伤", "愤怒"}
    assert "lenient" in event["refused"]


def test_cut_completions_can_be_kept_out_of_the_loss(rows: Path, tmp_path: Path) -> None:
    config = grpo_config(
        rows,
        tmp_path / "run",
        rollout={"max_completion_length": 2},
        grpo={"mask_truncated_completions": True},
        train={"max_steps": 2, "weight_decay": 0.0},
    )
    run_grpo(config)
    lines = metrics(tmp_path / "run")
    assert [line["completions/clipped_ratio"] for line in lines] == [1.0, 1.0]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]


def test_prompts_are_ordered_and_chosen_by_their_pass_rate(rows: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "rewards": [reward("right")],
        "pass_rate": {"rollouts": 4, "min_rate": 0.01, "max_rate": 0.99},
        "curriculum": {"order": "difficulty", "group_by_length": False},
        "train": {"max_steps": 1},
    }
    run_grpo(grpo_config(rows, tmp_path / "run", **changes))
    file = tmp_path / "run" / "pass_rate.jsonl"
    rates = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len(rates) == 24
    (event,) = RunRecord(tmp_path / "run").events("pass_rate")
    inside = [row for row in rates if 0 < row["pass_rate"] < 1]
    assert event["kept"] == len(inside) < 24
    # Cut by a kill, it is gone on with: to the same rates.
    whole, cut = file.read_text(), tmp_path / "cut"
    cut.mkdir()
    (cut / "pass_rate.jsonl").write_text("".join(whole.splitlines(keepends=True)[:9]) + '{"sam')
    run_grpo(grpo_config(rows, cut, **changes))
    again = [
        json.loads(line)
        for line in (cut / "pass_rate.jsonl").read_text().splitlines()
        if "pass_rate" in line
    ]
    assert sorted(again, key=str) == sorted(rates, key=str)
    never = {"pass_rate": {"min_rate": 0.999, "max_rate": 0.9995}}
    with pytest.raises(TrainingError, match="no prompt has a pass rate"):
        run_grpo(grpo_config(rows, tmp_path / "none", **{**changes, **never}))


def kill_values(rows: Path, out: Path) -> dict[str, Any]:
    """Two steps per rollout, trust that opens on the way, KL, and saves that wait for rollouts."""
    return grpo_values(
        rows,
        out,
        **TRUSTED,
        model={**values(), "lora": {"r": 4, "lora_dropout": 0.1, "trainable_tokens": "all"}},
        grpo={"beta": 0.04, "num_iterations": 2},
        train={"max_steps": 12, "per_device_train_batch_size": 3},
        run={"save_steps": 3, "save_total_limit": None},
    )


@pytest.fixture(scope="module")
def uninterrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a run that nobody stopped, and the hash of what it learnt."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, finished(kill_values(rows, folder))


def test_sigkill_changes_no_bit_and_trust_goes_on(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str]
) -> None:
    whole, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    assert kill_after(cut, 7)
    assert finished(cut) == want
    (resumed,) = RunRecord(tmp_path / "cut").events("resume")
    assert resumed["step"] % 2 == 0
    assert resumed["step"] >= 4
    saved = sorted(int(p.name.split("-")[1]) for p in whole.glob("checkpoint-*"))
    assert saved == [4, 6, 10, 12]  # 3 and 9 waited for their completions to be used up
    for name in ("trust/gate_strength", "trust/gate_accuracy", "hack/length_drift", "reward"):
        both = [[line.get(name) for line in metrics(run)] for run in (whole, tmp_path / "cut")]
        assert both[0] == both[1], name
    strengths = [line["trust/gate_strength"] for line in metrics(tmp_path / "cut")[::2]]
    assert strengths[0] == 0
    assert any(0 < strength < 1 for strength in strengths)
    assert said(tmp_path / "cut") == said(whole)
    saved_last = checkpoint.latest_valid(tmp_path / "cut").checkpoint
    assert saved_last is not None
    assert saved_last.meta["extra"]["trust"]["gate"]["updates"] == 6


def test_a_stop_waits_for_the_completions_to_be_used(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str]
) -> None:
    _, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    process = start(cut)
    while last_step(tmp_path / "cut") < 1:
        time.sleep(0.0005)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    (event,) = RunRecord(tmp_path / "cut").events("stopped")
    assert event["step"] % 2 == 0
    assert finished(cut) == want


@pytest.mark.fault
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_random_moments_changes_no_bit(
    rows: Path, tmp_path: Path, uninterrupted: tuple[Path, str], seed: int
) -> None:
    draw = random.Random(seed)
    _, want = uninterrupted
    cut = kill_values(rows, tmp_path / "cut")
    killed = 0
    for _ in range(4):
        reached = max(last_step(tmp_path / "cut"), 0)
        step = draw.randrange(reached + 1, 13) if reached < 12 else 12
        killed += kill_after(cut, step, draw.random() * 0.1)
    assert killed >= 1
    assert finished(cut) == want


def test_completions_begin_with_what_the_template_opens(rows: Path, tmp_path: Path) -> None:
    template = tmp_path / "prefilled.jinja"
    template.write_text(chat_templates.PREFILLED)
    model = {**lora_model(), "chat_template_path": str(template)}
    config = grpo_config(rows, tmp_path / "run", model=model, train={"max_steps": 1})
    run_grpo(config)
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    texts = [text for line in lines for text in json.loads(line)["completions"]]
    assert len(texts) >= 4
    assert all(text.startswith("<think>") for text in texts)


def test_check_proves_the_rewards_and_names_what_is_wrong(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = {"path": "reward/format.py:tags"}
    changes: dict[str, Any] = {"rewards": [form, reward("even")], "run": {"use_cpu": True}}
    report = run_check(grpo_config(rows, tmp_path, **changes))
    assert report.rows == 24
    shown = " ".join(capsys.readouterr().out.split())
    assert "reward format: proved on 24 of 24 rows" in shown
    assert "reward even: not proved" in shown
    easy = tmp_path / "easy.py"
    easy.write_text(
        "def gold(row):\n    return '<answer>sad</answer>'\n"
        "def easy(prompts, completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    config = grpo_config(rows, tmp_path, **{**changes, "rewards": [{"path": f"{easy}:easy"}]})
    with pytest.raises(RewardError, match=r"reward 'easy'.*empty answer"):
        run_check(config)
    trust = {"trust": {**TRUST, "outcome": "rihgt"}, "rewards": TRUSTED["rewards"]}
    with pytest.raises(ConfigError, match="did you mean 'right'"):
        run_check(grpo_config(rows, tmp_path, **{**changes, **trust}))


@pytest.mark.parametrize(
    ("name", "beta"), [("quickstart/grpo.yaml", 0.04), ("qwen2_5_omni/grpo_ptr.yaml", 0.04)]
)
def test_shipped_configs_are_valid_and_recognised(name: str, beta: float) -> None:
    variables = {"run": "runs/some", "seed": "0"}
    path = content.find(f"train_configs/{name}")
    assert guess(read_yaml(path, variables)) == "grpo"
    config = load_config(GrpoConfig, path, [], variables)
    assert [one.weight for one in config.rewards] == [0.3, 1.0, 0.5]
    assert (config.grpo.beta, config.rollout.num_generations) == (beta, 8)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_learn_what_one_with_accumulation_does(rows: Path, tmp_path: Path) -> None:
    """Also where a rank has no prompt left in the last step of an epoch."""
    common: dict[str, Any] = {
        **TRUSTED,
        "data": {"limit": 9},
        "grpo": {"beta": 0.04, "scale_rewards": "batch"},
        "pass_rate": {"rollouts": 2},
    }
    train = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    alone = {**train, "gradient_accumulation_steps": 2}
    run_grpo(grpo_config(rows, tmp_path / "alone", **common, train=alone))
    config = tmp_path / "two.yaml"
    save_resolved(grpo_config(rows, tmp_path / "two", **common, train=train), config)
    command = [sys.executable, "-m", "tests.train.grpo.tiny", str(config)]
    assert run_ranks(command, 2, cpu=True) == 0
    one, two = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "trust/gate_accuracy", "rows_per_step"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), name
    assert largest_difference(weights(tmp_path / "alone"), weights(tmp_path / "two")) < 1e-4


def test_settings_that_cannot_be_are_refused(rows: Path, tmp_path: Path) -> None:
    for change, sentence in (
        ({"grpo": {"beta": 0.1, "beta_end": 0.2}}, "beta_end must not be above"),
        ({"pass_rate": {"min_rate": 0.8, "max_rate": 0.2}}, "min_rate must not be above"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            grpo_config(rows, tmp_path, **change)
    sharded = {"run": {"deepspeed": "ds_configs/zero2.json"}, "store": {"enabled": False}}
    with pytest.raises(ConfigError, match=r"set store\.enabled=true"):
        run_grpo(grpo_config(rows, tmp_path, **sharded))
    with pytest.raises(ConfigError, match=r"watch\.outcome"):
        run_grpo(grpo_config(rows, tmp_path, watch={"outcome": "nothing"}))
    assert math.isclose(parse(GrpoConfig, grpo_values(rows, tmp_path)).rollout.temperature, 1.0)
