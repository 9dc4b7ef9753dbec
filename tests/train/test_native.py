"""A native model through every stage by its path alone, with the command line and config files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmemo import checkpoint, content
from mmemo.cli import app
from mmemo.config import parse
from mmemo.errors import DataError
from mmemo.evaluation.generate import model_fingerprint
from mmemo.evaluation.results import read_results
from mmemo.models.adapters.lora import is_quantized, unwrap
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord
from tests.evaluation.world import row_of
from tests.media_files import write_clip
from tests.models.native_files import FED, save_omni
from tests.rewards.stub_judge import judge_server, truthful
from tests.train.grpo.tiny import reward

CLIPS = 3


def write_rows(folder: Path) -> Path:
    """Clips of several lengths; questions about both streams, the sound alone and none."""
    (folder / "clips").mkdir(parents=True)
    for number in range(CLIPS):
        size, seconds = ((32, 32), (64, 32))[number % 2], 0.5 + 0.25 * number
        write_clip(folder / f"clips/{number}.mp4", seconds=seconds, size=size, tone=200.0 + number)
    lines: list[str] = []
    for number in range(6):
        row: dict[str, Any] = row_of(number)
        asked = ("video", "audio") if number % 3 == 0 else ("audio",) if number % 3 == 1 else ()
        for name in ("video", "audio", "face"):
            if name not in asked:
                del row[f"{name}s"]
        row["cues"] = {"present": ["low brows", "a loud voice"], "absent": ["tears"]}
        question, answer = row["messages"]
        question["content"] = "".join(f"<{name}>" for name in asked) + f"Which emotion ({number})?"
        answer["content"] = f"<think>It is so.</think>{answer['content']}"
        lines.append(json.dumps(row) + "\n")
    (folder / "test_conflict.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def run(folder: Path, stage: str, name: str, **values: Any) -> Path:
    """``mmemo STAGE file.yaml``; returns the output folder."""
    values = {"output_dir": str(folder / name), **values}
    file = folder / f"{name}.{stage}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    call(stage, str(file))
    return folder / name


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def stage(folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {
            "manifests": [str(folder / "rows/test_conflict.jsonl")],
            "media_root": str(folder / "rows"),
        },
        "store": {"path": str(folder / "store")},
        "decode": {"workers": 1},
    }
    return {**found, **changes}


def train(folder: Path, path: Path, **changes: Any) -> dict[str, Any]:
    steps = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    found = stage(
        folder,
        model={"path": str(path), "lora": {"r": 4, "lora_dropout": 0.0}},
        trainable=["lm"],
        train=steps,
        run={"logging_steps": 1, "save_steps": 1, "threads": 1},
    )
    for key, change in changes.items():
        found[key] = {**found[key], **change} if key in ("model", "train", "run") else change
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rows``, the released model ``omni``, and ``sft``: two steps of it."""
    found = tmp_path_factory.mktemp("native")
    write_rows(found / "rows")
    save_omni(found / "omni")
    run(found, "sft", "sft", **sft(found))
    return found


def sft(folder: Path, **changes: Any) -> dict[str, Any]:
    fed = {"native": FED, "sampling": {"frames": 4}}
    return train(folder, folder / "omni", **{"model": fed, **changes})


def adapter(final: Path) -> dict[str, torch.Tensor]:
    checkpoint.verify(final)
    return load_file(final / "adapter_model.safetensors")


def new_features(out: Path) -> list[int]:
    return [event["new"] for event in RunRecord(out).events("ingest")]


def test_sft_learns_and_goes_on_where_it_stopped(folder: Path) -> None:
    final = adapter(folder / "sft/final")
    assert any("lora_B" in name and weight.any() for name, weight in final.items())
    run(folder, "sft", "half", **sft(folder, train={"max_steps": 1}))
    half = adapter(folder / "half/final")
    assert any(not torch.equal(weight, final[name]) for name, weight in half.items())
    # As a stop after the first step leaves it.
    whole = run(folder, "sft", "resumed", **sft(folder))
    for left in ("checkpoint-2", "final"):
        remove(whole / left)
    run(folder, "sft", "resumed", **sft(folder))
    assert RunRecord(whole).events("resume")[-1]["step"] == 1
    again = adapter(whole / "final")
    assert all(torch.equal(weight, final[name]) for name, weight in again.items())


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_grpo_evaluation_and_export_of_what_sft_made(folder: Path) -> None:
    """A clip is encoded once, by the first stage; each next one takes the last one's folder."""
    made = train(
        folder,
        folder / "sft/final",
        model={"adapter": "merge"},
        rewards=[reward("even")],
        rollout={"num_generations": 3, "max_completion_length": 6},
        grpo={"beta": 0.04},
    )
    grpo = run(folder, "grpo", "grpo", **made)
    lines = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[1]["kl"] > 0
    weights = adapter(grpo / "final")
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())
    assert new_features(folder / "sft")[0] == 3
    assert new_features(grpo) == [0]

    asked = stage(
        folder,
        model={"path": str(grpo / "final")},
        generation={"max_new_tokens": 6},
        per_device_eval_batch_size=3,
        bootstrap={"resamples": 100},
    )
    rows = read_results(run(folder, "eval", "eval", **asked)).rows()
    assert len(rows) == 6
    assert len({row["raw"] for row in rows}) > 1
    assert new_features(folder / "eval") == [0]

    export = folder / "export"
    call("export", str(grpo), *("--adapter", f"{export}/adapter", "--merged", f"{export}/merged"))
    for kind in ("adapter", "merged"):
        card = (export / kind / "README.md").read_text()
        assert "qwen2_5_omni_thinker" in card
        assert "max_pixels: 2352" in card
        asked["model"] = {"path": str(export / kind)}
        again = read_results(run(folder, "eval", f"eval-{kind}", **asked)).rows()
        assert [row["raw"] for row in again] == [row["raw"] for row in rows]


def test_experts_on_4_bit_weights_resume_and_are_exported(folder: Path) -> None:
    save_omni(folder / "wide", inner=128)
    lora = {"r": 4, "lora_dropout": 0.0, "experts": {}}
    model = {"path": str(folder / "wide"), "quantization": "nf4", "lora": lora}
    common = {"native": FED, "sampling": {"frames": 4}}
    values = sft(folder, model={**common, **model})
    final = adapter(run(folder, "sft", "experts", **values) / "final")
    out = folder / "experts"
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all("experts/weight/text" in line for line in logged)
    for left in ("checkpoint-2", "final"):
        remove(out / left)
    run(folder, "sft", "experts", **values)
    assert RunRecord(out).events("resume")[-1]["step"] == 1
    again = adapter(out / "final")
    assert all(torch.equal(weight, final[name]) for name, weight in again.items())

    export = folder / "experts-export"
    call("export", str(out), "--adapter", str(export))
    found = [load_model(parse(ModelConfig, {"path": str(x)})) for x in (out / "final", export)]
    assert all(is_quantized(one.model) for one in found)
    assert len({model_fingerprint(one.model) for one in found}) == 1


def test_a_row_that_its_clip_makes_too_long_is_named(folder: Path) -> None:
    values = sft(folder)
    values["data"] = {**values["data"], "max_length": 40}
    with pytest.raises(DataError, match=r"rows do not fit; the longest: .*row 'test-00\d' has"):
        run(folder, "sft", "long", **values)


def test_the_shipped_config_runs_with_paths_and_sizes_changed(folder: Path) -> None:
    """``train_configs/qwen2_5_omni``: SFT of the released model, then GRPO-PTR with a judge."""
    manifest = folder / "rows/test_conflict.jsonl"
    data = [
        f"--data.manifests={[str(manifest)]}",
        f"--data.media_root={folder / 'rows'}",
    ]
    sizes = [
        *("--train.max_steps=2", "--model.lora.r=4", "--run.use_cpu=true", "--run.threads=1"),
        *("--train.gradient_accumulation_steps=1", "--decode.workers=1", "--run.logging_steps=1"),
    ]
    home = ["--run", str(folder / "ptr")]
    fed = [
        f"--model.path={folder / 'omni'}",
        *(f"--model.native.{name}={value}" for name, value in FED.items()),
        "--model.sampling.frames=4",
    ]
    config = str(content.find("train_configs/qwen2_5_omni/sft.yaml"))
    call("check", config, *home, *data, *sizes, *fed)
    call("sft", config, *home, *data, *sizes, *fed)
    with judge_server(truthful) as judge:
        config = str(content.find("train_configs/qwen2_5_omni/grpo_ptr.yaml"))
        small = [
            *("--rollout.num_generations=4", "--rollout.max_completion_length=12"),
            f"--rewards.2.params.judge.base_url={judge.url}",
        ]
        said = call("check", config, *home, *data, *sizes, *small)
        assert "Everything checked fits together." in said
        call("grpo", config, *home, *data, *sizes, *small)
    assert checkpoint.verify(folder / "ptr/grpo/final").meta["step"] == 2
    logged = (folder / "ptr/grpo/completions.jsonl").read_text().splitlines()
    assert {*json.loads(logged[0])["rewards"]} == {"format", "outcome", "reasoning"}
    loaded = load_model(parse(ModelConfig, {"path": str(folder / "ptr/grpo/final")}))
    assert unwrap(loaded.model).config.model_type == "qwen2_5_omni_thinker"


def write_pairs(rows: Path) -> Path:
    """A question about the picture and one about the sound of each clip, the other clip worse."""
    lines: list[str] = []
    for number in range(2 * CLIPS):
        clip, other = f"clips/{number // 2}.mp4", f"clips/{(number // 2 + 1) % CLIPS}.mp4"
        query, rest = (("video", "audio"), ("audio", "video"))[number % 2]
        row = {
            "sample_id": f"pair-{number}",
            "prompt": f"<video><audio>What does the {query} tell?",
            "query_modality": query,
            "video": clip,
            "audio": clip,
            "chosen": "<think>It is so.</think><answer>sad</answer>",
            "rejected_spurious": "<think>Snow.</think><answer>sad</answer>",
            "rejected_hallucinated": "<think>Tears are seen.</think><answer>sad</answer>",
            f"{query}_negative": other,
            "negative_kind": "different_label",
            f"{rest}_irrelevant": other,
            "irrelevant_kind": "different_label",
        }
        lines.append(json.dumps(row) + "\n")
    (rows / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return rows / "pairs.jsonl"


@pytest.mark.parametrize("method", ["avem_dpo", "mod_dpo", "mod_dpo_plus_plus"])
def test_the_shipped_preference_configs_run(folder: Path, method: str) -> None:
    """On SFT's result; the clips differ in length, so a pair is measured by its features. AVEm-DPO
    trains the whole language model, as the authors' script does."""
    whole = method == "avem_dpo"
    changes = [
        *("--run", str(folder / method), f"--model.path={folder / 'sft/final'}"),
        f"--data.manifests={[str(write_pairs(folder / 'rows'))]}",
        f"--data.media_root={folder / 'rows'}",
        *("--train.max_steps=2", "--run.use_cpu=true", "--run.threads=1"),
        *("--train.gradient_accumulation_steps=1", "--decode.workers=1", "--run.logging_steps=1"),
        "--run.deepspeed=null" if whole else "--model.lora.r=4",
        f"--store.path={folder / 'store'}",
    ]
    config = str(content.find(f"train_configs/qwen2_5_omni/{method}.yaml"))
    assert "Everything checked fits together." in call("check", config, *changes)
    call("dpo", config, *changes)
    final = folder / method / method / "final"
    if whole:
        assert (final / "model.safetensors").exists()
    else:
        assert any("lora_B" in name and weight.any() for name, weight in adapter(final).items())
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(DataError, match=r"has \d+ tokens but at most 30 fit"):
        call(
            "dpo",
            config,
            *changes,
            "--data.max_length=30",
            f"--output_dir={folder / method / 'long'}",
        )
