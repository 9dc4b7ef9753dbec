"""GRPO whose completions a server draws: what is logged, and what happens when the server dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo import checkpoint
from mmemo.config import parse
from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.vllm import engine as engines
from mmemo.run_log import RunRecord
from mmemo.train.grpo.train import GrpoConfig, run_grpo
from tests.evaluation.world import row_of
from tests.generation.vllm.fake import BASE, Fake, fake_vllm
from tests.models.native_files import FED, save_omni
from tests.train.grpo.tiny import metrics, reward, said, sha256


def text_rows(folder: Path, count: int = 12) -> Path:
    """Questions without clips."""
    lines: list[str] = []
    for number in range(count):
        row = row_of(number)
        for name in ("videos", "audios", "faces"):
            del row[name]
        row["messages"][0]["content"] = f"Which emotion ({number})?"
        lines.append(json.dumps(row) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def text_values(path: Path, rows: Path, out: Path, url: str | None, **changes: Any) -> Any:
    rollout: dict[str, Any] = {"num_generations": 4, "max_completion_length": 6}
    if url is not None:
        rollout |= {"engine": "vllm", "vllm": {"url": url, "patience_s": 1.0, "timeout_s": 5.0}}
    return {
        "output_dir": str(out),
        "model": {"path": str(path), "lora": {"r": 4, "lora_dropout": 0.0}, "native": FED},
        "data": {"manifests": [str(rows / "rows.jsonl")], "media_root": str(rows)},
        "rewards": [reward("even")],
        "rollout": rollout,
        "trainable": ["lm"],
        "train": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
        },
        "run": {"logging_steps": 1, "save_steps": 100, "threads": 1},
        "decode": {"workers": 1},
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("vllm")
    save_omni(found / "omni")
    text_rows(found / "rows")
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PAUSE", 0.01)


def config(folder: Path, out: Path, fake: Fake | None, **changes: Any) -> GrpoConfig:
    url = None if fake is None else fake.url
    return parse(GrpoConfig, text_values(folder / "omni", folder / "rows", out, url, **changes))


def test_a_run_whose_server_dies_goes_on_from_where_it_was(folder: Path, tmp_path: Path) -> None:
    with fake_vllm() as fake:
        whole = run_grpo(config(folder, tmp_path / "whole", fake))
        # Each step has weights of its own, and each completion says which drew it.
        named = {line["step"]: line["version"] for line in said(tmp_path / "whole")}
        assert len(set(named.values())) == 4
        assert list(dict.fromkeys(body["model"] for body in fake.asked())) == list(named.values())
        assert not fake.adapters  # the run has ended, and left nothing
        port = int(fake.url.rpartition(":")[2])

        dies = named[3]
        out = tmp_path / "broken"
        again = config(folder, out, fake)
        steps = 0

        def fault(path: str, body: dict[str, Any], reply: dict[str, Any], number: int) -> Any:
            nonlocal steps
            steps += path == "/v1/load_lora_adapter"
            return 0 if steps > 2 else None

        fake.fault = fault
        with pytest.raises(RolloutError, match=r"gave no completions within 1 s"):
            run_grpo(again)
    assert checkpoint.verify(out / "checkpoint-2").meta["state"]["step"] == 2
    assert len(metrics(out)) == 2
    assert dies not in {line.get("version") for line in said(out)}
    with fake_vllm(port) as fake:
        final = run_grpo(again)
    assert RunRecord(out).events("resume")[-1]["step"] == 2
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    name = "adapter_model.safetensors"
    assert sha256(final / name) == sha256(whole / name)


def test_the_address_may_change_and_the_engine_may_not(folder: Path, tmp_path: Path) -> None:
    once = {"max_steps": 1, "per_device_train_batch_size": 4}
    with fake_vllm() as fake:
        run_grpo(config(folder, tmp_path, fake, train=once))
    with fake_vllm() as fake:
        run_grpo(config(folder, tmp_path, fake, train=once))  # has nothing left to do
    with pytest.raises(ConfigError, match=r'rollout\.engine: "vllm" -> null'):
        run_grpo(config(folder, tmp_path, None, train=once))


def test_a_server_that_does_not_fit_is_refused_before_anything_is_drawn(
    folder: Path, tmp_path: Path
) -> None:
    with fake_vllm(lora=False) as fake, pytest.raises(ConfigError, match="--enable-lora"):
        run_grpo(config(folder, tmp_path / "a", fake))
    assert {body["model"] for body in fake.asked(named=False)} == {BASE}
    changes = {"model": {"path": str(folder / "omni"), "native": FED}}
    with fake_vllm() as fake, pytest.raises(ConfigError, match=r"set model\.lora"):
        run_grpo(config(folder, tmp_path / "b", fake, **changes))
    assert not fake.seen


def test_the_sections_of_a_config_say_what_is_missing(folder: Path, tmp_path: Path) -> None:
    for rollout, told in (
        ({"engine": "vllm"}, "needs a server"),
        ({"vllm": {"url": "http://host:1"}}, "set rollout.engine to vllm"),
        ({"engine": "vllm", "vllm": {"url": "host:1"}}, "must be an http or https address"),
        ({"engine": "vllm", "vllm": {"url": "http://h:1/v1"}}, "without a path"),
        ({"engine": "vllm", "vllm": {"url": []}}, "at least one server"),
        ({"engine": "vllm", "vllm": {"url": "http://h:1", "gpus": [0]}}, "one of url, gpus and"),
        ({"engine": "vllm", "temperature": 0.001, "vllm": {"gpus": []}}, "from 0.01 to 2"),
    ):
        values = text_values(folder / "omni", folder / "rows", tmp_path, None)
        values["rollout"] |= rollout
        with pytest.raises(ConfigError, match=told):
            parse(GrpoConfig, values)
