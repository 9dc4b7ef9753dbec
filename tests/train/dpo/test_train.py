"""Preference optimisation end to end on real clips: margins rise, and no kill or split changes the
result."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo import content
from mmemo.check.run import run_check
from mmemo.config import dump, load_config, parse, read_yaml, save_resolved
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.preference import load_preferences
from mmemo.errors import ConfigError, DataError
from mmemo.features.store import FeatureStore
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord
from mmemo.stages import guess
from mmemo.train.distributed import run_ranks
from mmemo.train.dpo.batch import PairLengths
from mmemo.train.dpo.dataset import DpoData
from mmemo.train.dpo.train import DpoConfig, run_dpo
from tests.models.adapters.test_lora import WIDE
from tests.models.parts import values
from tests.train.dpo.tiny import dpo_config, dpo_values, start, write_pairs


@pytest.fixture(scope="module", autouse=True)
def pairs(rows: Path) -> Path:
    return write_pairs(rows)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_margins_rise_and_each_term_is_logged_alone(rows: Path, tmp_path: Path) -> None:
    config = dpo_config(
        rows,
        tmp_path / "run",
        "avem_dpo",
        {"kind": "sft", "weight": 0.1},
        train={"max_steps": 24, "learning_rate": 1e-2},
        dpo={"grad_share_steps": 8},
        eval_data={"manifests": [str(rows / "pairs.jsonl")], "media_root": str(rows), "limit": 6},
    )
    final = run_dpo(config)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    first, last = lines[0], lines[-1]
    for name in ("avem_dpo/rewards/margins", "avem_dpo/modality/margins"):
        assert first[name] == pytest.approx(0, abs=1e-6)
    assert last["avem_dpo/rewards/margins"] > 0.2
    assert last["avem_dpo/rewards/accuracies"] > first["avem_dpo/rewards/accuracies"]
    assert last["avem_dpo/rewards/spurious"] < last["avem_dpo/rewards/chosen"]
    assert last["avem_dpo/loss"] < first["avem_dpo/loss"] - 0.05
    assert last["sft/nll"] < first["sft/nll"]
    assert last["loss"] == pytest.approx(last["avem_dpo/loss"] + 0.1 * last["sft/loss"], rel=1e-4)
    shared = [n for n, line in enumerate(lines, 1) if "avem_dpo/grad_share" in line]
    assert shared == [8, 16, 24]
    assert last["avem_dpo/grad_share"] + last["sft/grad_share"] == pytest.approx(1, rel=1e-5)
    evaluated = [line for line in metrics(tmp_path / "run") if "eval_loss" in line][-1]
    assert evaluated["eval_avem_dpo/rewards/margins"] > 0.1
    again = load_model(parse(ModelConfig, {"path": str(final)}))
    assert again.processor.sampling.frames == 4
    counted = {e["of"]: e["counted"] for e in RunRecord(tmp_path / "run").events("pairs")}
    assert counted == {"train": {"avem_dpo": 16, "sft": 16}, "eval": {"avem_dpo": 6, "sft": 6}}


SHORT: dict[str, Any] = {"train": {"max_steps": 2, "learning_rate": 1e-3}}
TERMS = ("avem_dpo", {"kind": "mod_dpo_plus_plus", "weight": 0.5})


@pytest.fixture(scope="module")
def short(rows: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others are compared with."""
    folder = tmp_path_factory.mktemp("short")
    run_dpo(dpo_config(rows, folder, *TERMS, **SHORT))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"dpo": {"shared_prefix": False}},
        {"dpo": {"reference": "adapter_off"}},
        {"dpo": {"reference": "copy"}},
        {"dpo": {"reference": "copy_cpu"}},
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        {"store": {"enabled": False}},
    ],
    ids=["naive", "adapter off", "copy", "copy on the CPU", "accumulation", "no store"],
)
def test_how_a_step_is_computed_changes_nothing_but_rounding(
    rows: Path, short: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    merged = {n: {**SHORT.get(n, {}), **change.get(n, {})} for n in {*SHORT, *change}}
    run_dpo(dpo_config(rows, tmp_path / "other", *TERMS, **merged))
    one, other = metrics(short), metrics(tmp_path / "other")
    for a, b in zip(one, other, strict=True):
        for name in (
            "loss",
            "grad_norm",
            "avem_dpo/loss",
            "mod_dpo_plus_plus/loss",
            "mod_dpo_plus_plus/counted",
        ):
            assert b[name] == pytest.approx(a[name], rel=2e-5, abs=1e-6), name
    assert largest_difference(weights(short), weights(tmp_path / "other")) < 1e-4
    if "store" in change:
        assert (tmp_path / "other" / "reference" / "shards").is_dir()


def test_references_are_kept_for_other_runs(rows: Path, tmp_path: Path) -> None:
    def computed(out: str, **changes: Any) -> int:
        run_dpo(dpo_config(rows, tmp_path / out, "dpo", **changes, train={"max_steps": 1}))
        return RunRecord(tmp_path / out).events("reference")[-1]["computed"]

    store = {"store": {"path": str(tmp_path / "features")}}
    assert computed("a", **store) == 16
    assert computed("b", **store) == 0
    lora = {"model": {**values(), "lora": {"r": 2, "lora_dropout": 0.1}}}
    assert computed("c", **store, **lora) == 0
    assert computed("d", **store, dpo={"temperature": 0.7}) == 16
    other = {"model": {**values(seed=1), "lora": {"r": 4}}}
    assert computed("e", **store, **other) == 16


def test_all_weights_learn_against_those_they_started_from(rows: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model": values(),
        "trainable": ["lm"],
        "train": {"max_steps": 10, "learning_rate": 2e-3},
    }
    run_dpo(dpo_config(rows, tmp_path / "run", "avem_dpo", **changes))
    lines = metrics(tmp_path / "run")
    assert lines[0]["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["avem_dpo/rewards/margins"] > 0.1
    live = {**changes, "dpo": {"reference": "adapter_off"}}
    with pytest.raises(ConfigError, match=r"set model\.lora"):
        run_dpo(dpo_config(rows, tmp_path / "live", "avem_dpo", **live))
    # Without a reference there is nothing to refuse.
    run_dpo(dpo_config(rows, tmp_path / "sft", "sft", **live))


def test_an_adapter_goes_on_from_where_it_is(rows: Path, tmp_path: Path) -> None:
    """The reference is what training starts from: here with the adapter that SFT learnt."""
    first = run_dpo(dpo_config(rows, tmp_path / "first", "sft", train={"max_steps": 3}))
    goes_on = {"model": {"path": str(first)}, "train": {"max_steps": 2}}
    run_dpo(dpo_config(rows, tmp_path / "on", "avem_dpo", **goes_on))
    assert metrics(tmp_path / "on")[0]["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-6)
    live = {"dpo": {"reference": "adapter_off"}}
    with pytest.raises(ConfigError, match=r"model\.adapter=merge"):
        run_dpo(dpo_config(rows, tmp_path / "live", "avem_dpo", **goes_on, **live))


def test_nf4_weights_with_an_adapter_learn(rows: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "lora_dropout": 0.0}
    model = {**values(text=WIDE), "quantization": "nf4", "lora": lora}
    run_dpo(
        dpo_config(
            rows, tmp_path / "run", model=model, train={"max_steps": 10, "learning_rate": 1e-2}
        )
    )
    lines = metrics(tmp_path / "run")
    assert lines[0]["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["avem_dpo/rewards/margins"] > 0.05


def kill_values(rows: Path, out: Path, store: Path) -> dict[str, Any]:
    return dpo_values(
        rows,
        out,
        "avem_dpo",
        "mod_dpo",
        model={**values(), "lora": {"r": 4, "lora_dropout": 0.1}},
        train={"max_steps": 10, "per_device_train_batch_size": 3},
        dpo={"disable_dropout": False},
        run={"save_steps": 3, "save_total_limit": None, "per_device_eval_batch_size": 3},
        store={"path": str(store)},
    )


def finished(found: dict[str, Any]) -> str:
    process = start(found)
    process.join()
    assert process.exitcode == 0
    return sha256(Path(found["output_dir"]) / "final" / "adapter_model.safetensors")


def lines_of(path: Path) -> int:
    try:
        return len(path.read_bytes().splitlines())
    except OSError:
        return -1


def test_sigkill_changes_no_bit(rows: Path, tmp_path: Path) -> None:
    whole = finished(kill_values(rows, tmp_path / "whole", tmp_path / "one"))
    cut = kill_values(rows, tmp_path / "cut", tmp_path / "two")
    process = start(cut)
    while process.is_alive() and lines_of(tmp_path / "cut" / "metrics.jsonl") < 7:
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finished(cut) == whole
    events = RunRecord(tmp_path / "cut").events()
    assert next(e["step"] for e in events if e["kind"] == "resume") in (6, 9)
    assert [e["computed"] for e in events if e["kind"] == "reference"] == [16, 0]
    for name in ("loss", "avem_dpo/rewards/margins", "mod_dpo/margin"):
        both = [[line.get(name) for line in metrics(tmp_path / run)] for run in ("whole", "cut")]
        assert both[0] == both[1], name


def test_a_kill_while_references_are_computed_changes_no_bit(rows: Path, tmp_path: Path) -> None:
    """Which pairs are computed together is the same again, so what was lost comes out equal."""

    def stored(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for shard in (folder / "reference" / "shards").glob("*.safetensors"):
            found |= load_file(shard)
        return found

    config = dpo_config(
        rows,
        tmp_path / "run",
        "avem_dpo",
        store={"path": str(tmp_path / "features")},
        run={"per_device_eval_batch_size": 3},
        train={"max_steps": 1},
    )
    run_dpo(config)
    before = stored(tmp_path / "features")
    shards = tmp_path / "features" / "reference" / "shards"
    keys = sorted({name.partition(".")[0] for name in before})
    for shard in shards.iterdir():
        shard.unlink()
    half = FeatureStore(config.store.model_copy(update={"path": str(shards.parent)}))
    with half:
        for key in keys[::2]:
            half.put(key, {"logps": before[f"{key}.logps"]})
    run_dpo(config.model_copy(update={"output_dir": str(tmp_path / "again")}))
    after = stored(tmp_path / "features")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("change", ["negative", "answer", "term", "clip"])
def test_what_decides_the_weights_forbids_a_resume(rows: Path, tmp_path: Path, change: str) -> None:
    manifest = tmp_path / "pairs.jsonl"
    lines = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]

    def write() -> None:
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(*terms: Any) -> None:
        data = {"manifests": [str(manifest)]}
        given: Any = {"data": data, "train": {"max_steps": 2}, "run": {"save_steps": 1}}
        run_dpo(dpo_config(rows, tmp_path / "run", *terms, **given))

    write()
    run("avem_dpo")
    if change == "negative":
        lines[1]["negative_seed"] = 3
    elif change == "answer":
        lines[0]["chosen"] = "something else"
    elif change == "clip":
        lines[0]["video_negative"] = lines[0]["audio_negative"] = "clips/5.mp4"
    write()
    with pytest.raises(ConfigError, match="was made with other settings"):
        run({"kind": "avem_dpo", "gamma": 0.1} if change == "term" else "avem_dpo")


def test_batches_of_one_channel_alternate(rows: Path, tmp_path: Path) -> None:
    changes = {"dpo": {"alternate_queries": True}, "train": {"per_device_train_batch_size": 2}}
    config = dpo_config(rows, tmp_path / "run", "dpo", **changes)
    run_dpo(config)
    queries = {p.sample.sample_id: p.query for p in load_preferences(config.data)}
    found = load_preferences(config.data)
    measured = [PairLengths(9, {"chosen": 1 + at}, {}) for at in range(len(found))]
    nothing: Any = None
    data = DpoData(found, measured, nothing, CurriculumConfig(), 2, 0, alternate=True)
    plan = data.plan(0)
    kinds = [{queries[found[row].sample.sample_id] for row in batch} for batch in plan]
    assert all(len(kind) == 1 for kind in kinds)
    assert sorted(row for batch in plan for row in batch) == list(range(len(found)))
    order = [next(iter(kind)) for kind in kinds]
    assert order.count("joint") == 4
    assert all(len(set(order[at : at + 4])) == 3 for at in (0, 4))


def test_a_bad_negative_leaves_its_pair_out(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "clips").mkdir(parents=True)
    for file in (rows / "clips").iterdir():
        (folder / "clips" / file.name).write_bytes(file.read_bytes())
    (folder / "clips" / "broken.mp4").write_bytes(b"no video at all")
    lines = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]
    lines[0]["video_negative"] = lines[0]["audio_negative"] = "clips/broken.mp4"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"train": {"max_steps": 1}, "decode": {"max_bad_share": 0.5}}
    run_dpo(dpo_config(folder, tmp_path / "run", "avem_dpo", **changes))
    record = RunRecord(tmp_path / "run")
    assert record.events("pairs")[0]["pairs"] == 15
    (bad,) = record.events("bad_clip")
    assert (bad["path"], bad["sample_ids"]) == ("clips/broken.mp4", ["pair-000"])
    # Plain DPO never looks at a negative.
    run_dpo(dpo_config(folder, tmp_path / "plain", "dpo", **changes))
    assert RunRecord(tmp_path / "plain").events("pairs")[0]["pairs"] == 16


def test_check_says_what_a_run_would_meet(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_check(dpo_config(rows, tmp_path, "avem_dpo", "mod_dpo"))
    said = " ".join(capsys.readouterr().out.split())
    assert "avem_dpo: 16 of 16 pairs" in said
    assert "mod_dpo: 8 of 16 pairs" in said
    assert "negatives:" in said
    assert "stored before training" in said
    assert report.rows == 16
    assert report.packed is not None
    assert report.packed[0] > max(report.lengths)
    longest = max(report.lengths)
    with pytest.raises(DataError, match="nothing is truncated"):
        run_check(dpo_config(rows, tmp_path, "dpo", data={"max_length": longest - 1}))
    live = {"dpo": {"reference": "adapter_off"}, "model": values()}
    with pytest.raises(ConfigError, match=r"dpo\.reference"):
        run_check(dpo_config(rows, tmp_path, "dpo", **live))
    lines = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]
    joint = tmp_path / "joint.jsonl"
    chosen = [line for line in lines if line["query_modality"] == "joint"]
    joint.write_text("".join(json.dumps(line) + "\n" for line in chosen))
    with pytest.raises(ConfigError, match=r"'mod_dpo' reads .* none of the 8 pairs"):
        run_check(dpo_config(rows, tmp_path, "mod_dpo", data={"manifests": [str(joint)]}))


def test_settings_that_cannot_be_are_refused(rows: Path, tmp_path: Path) -> None:
    both = {"dpo": {"grad_share_steps": 5}, "run": {"deepspeed": "ds_configs/zero2.json"}}
    with pytest.raises(ConfigError, match="leave one of them out"):
        dpo_config(rows, tmp_path, **both)
    with pytest.raises(ConfigError, match="nothing is learnt"):
        dpo_config(rows, tmp_path, {"kind": "dpo", "weight": 0})


@pytest.mark.parametrize(
    "name",
    [
        "train_configs/quickstart/dpo.yaml",
        "train_configs/qwen2_5_omni/avem_dpo.yaml",
        "train_configs/qwen2_5_omni/mod_dpo.yaml",
        "train_configs/qwen2_5_omni/mod_dpo_plus_plus.yaml",
    ],
)
def test_shipped_configs_are_valid(name: str) -> None:
    path = content.find(name)
    assert guess(read_yaml(path, {"run": "x", "seed": "0"})) == "dpo"
    config = load_config(DpoConfig, path, [], {"run": "x", "seed": "0"})
    assert config.dpo.reference == "stored"


def test_avem_dpo_follows_the_authors_script() -> None:
    """What ``dpo_video_audio.sh`` of AVERE's release says, under our names."""
    path = content.find("train_configs/qwen2_5_omni/avem_dpo.yaml")
    config = load_config(DpoConfig, path, [], {"run": "x", "seed": "0"})
    train, (term,) = config.train, config.objective.terms
    assert dump(train) == {
        **dump(train),
        "learning_rate": 5e-7,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "bf16": True,
        "gradient_checkpointing": True,
    }
    assert dump(term) == {**dump(term), "beta": 0.1, "gamma": 0.2}
    assert (config.model.lora, config.trainable, config.data.max_length) == (None, ["lm"], 2048)
    assert config.run.deepspeed == "ds_configs/zero2.json"


@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
def test_two_ranks_learn_what_one_does(rows: Path, tmp_path: Path, stage: str) -> None:
    """The pairs of one rank may have branches that the other's lack: a third has no negative."""
    train = {"max_steps": 3, "learning_rate": 1e-3}
    terms = ("avem_dpo", "mod_dpo")
    lines = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]
    for line in lines[::3]:
        for key in [key for key in line if "_negative" in key or key == "negative_kind"]:
            del line[key]
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"manifests": [str(manifest)]}
    run_dpo(dpo_config(rows, tmp_path / "one", *terms, train=train, data=data))
    common: dict[str, Any] = {
        "train": {**train, "per_device_train_batch_size": 2},
        "data": data,
    }
    if stage != "plain":
        common["run"] = {"deepspeed": f"ds_configs/{stage}.json"}
    config = tmp_path / "two.yaml"
    save_resolved(dpo_config(rows, tmp_path / "two", *terms, **common), config)
    command = [sys.executable, "-m", "tests.train.dpo.tiny", str(config)]
    assert run_ranks(command, 2, cpu=True) == 0
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "mod_dpo/loss", "avem_dpo/rewards/margins"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
        for name in ("avem_dpo/modality/counted", "avem_dpo/modality/loss", "mod_dpo/counted"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    assert any(0 < line["avem_dpo/modality/counted"] < 1 for line in metrics(tmp_path / "two"))
    for name, weight in weights(tmp_path / "one").items():
        found = weights(tmp_path / "two")[name]
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=2e-5, msg=name)
