"""What a model was trained on, and what of it the questions show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.controls.training import training_of, training_sentence
from mmemo.models.config import ModelConfig
from mmemo.run_log import RunRecord


def clip(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def manifest(path: Path, rows: list[dict[str, Any]], adapter: str | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [
        {"sample_id": f"{path.stem}{i}", "prompt": "<audio>?" if "audios" in row else "?", **row}
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    if adapter is not None:
        record = {"adapter": adapter, "sha256": "0", "options": {"split": "test"}}
        path.with_name(f"{path.stem}.adapter.json").write_text(json.dumps(record))
    return str(path)


def run(folder: Path, model: dict[str, Any], data: dict[str, Any], stage: str = "sft") -> str:
    """A training run's record; returns the path of its model."""
    config = {"model": model, "data": data, "eval_data": {"manifests": ["held_out.jsonl"]}}
    RunRecord(folder).event("stage", stage=stage, config=config)
    (folder / "final").mkdir(exist_ok=True)
    return str(folder / "final")


def found(model: str | None, file: str, root: Path) -> dict[str, Any]:
    data = DataConfig(manifests=[file], media_root=str(root), columns=["extra"])
    from mmemo.data.manifest import load_samples

    questions = [
        Question(one, one.prompt, "emotion", None, one.truth.label) for one in load_samples(data)
    ]
    text: Any = {"scratch": {}} if model is None else None
    config = EvalConfig.model_construct(
        data=data, model=ModelConfig(path=model) if model else ModelConfig(text=text)
    )
    return training_of(config, questions)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for index in range(4):
        clip(tmp_path / "ours", f"{index}.wav", bytes([index]) * 100)
        clip(tmp_path / "theirs", f"{index}.wav", bytes([index + 10]) * 100)
    return tmp_path


TEST = [{"audios": [f"{i}.wav"], "group": {"speaker": f"s{i}"}, "label": "sad"} for i in range(4)]


def test_a_foreign_model_is_unknown_and_says_so(place: Path) -> None:
    file = manifest(place / "test.jsonl", TEST)
    for name in ("Qwen/Qwen2.5-Omni-7B", str(place / "ours")):
        block = found(name, file, place / "ours")
        assert block["status"] == "unknown"
        assert block["base"] == [name]
        assert "unknown (no record of its training" in training_sentence(block)
    gone = found(str(place / "runs/sft/final"), file, place / "ours")
    assert (gone["status"], "is gone" in gone["why"]) == ("unknown", True)


def test_zero_shot_where_all_training_rows_are_known(place: Path) -> None:
    file = manifest(place / "test.jsonl", TEST)
    data = {"manifests": [manifest(place / "a.jsonl", TEST)], "media_root": str(place / "theirs")}
    first = run(place / "runs/sft", {"text": "owner/base"}, data)
    last = run(place / "runs/grpo", {"path": first}, data, "grpo")
    block = found(last, file, place / "ours")
    assert block["status"] == "zero-shot"
    assert block["manifests"] == data["manifests"]  # and not those of eval_data
    assert block["base"] == ["owner/base"]
    # The speakers have equal names in another data set, and are other people.
    assert block["overlap"]["speakers"] == 0
    assert training_sentence(block).startswith("Zero-shot: no training manifest is of this data")
    assert "what owner/base had seen before is unknown" in training_sentence(block)
    assert found(None, file, place / "ours")["status"] == "zero-shot"  # random weights


def test_overlap_is_counted_by_clip_file_and_speaker(place: Path) -> None:
    file = manifest(place / "test.jsonl", TEST)
    rows = [TEST[0], {**TEST[1], "audios": ["copy.wav"]}, {**TEST[2], "audios": ["new.wav"]}]
    clip(place / "ours", "copy.wav", bytes([1]) * 100)
    clip(place / "ours", "new.wav", b"n" * 100)
    data = {"manifests": [manifest(place / "train.jsonl", rows)], "media_root": str(place / "ours")}
    block = found(run(place / "runs/sft", {"text": {"scratch": {}}}, data), file, place / "ours")
    assert block["status"] == "in-distribution"
    assert block["same"] == data["manifests"]
    counts = {key: block["overlap"][key] for key in ("questions", "clips", "files", "speakers")}
    assert counts == {"questions": 4, "clips": 1, "files": 2, "speakers": 3}
    assert block["overlap"]["examples"]["files"] == ["test0", "test1"]
    told = training_sentence(block)
    assert "1 of 4 questions with a clip of training, 2 of 4 questions with a file" in told


def test_a_copied_file_of_another_data_set_is_found(place: Path) -> None:
    file = manifest(place / "test.jsonl", TEST)
    clip(place / "theirs", "renamed.wav", bytes([3]) * 100)
    rows = [{"audios": ["renamed.wav"], "label": "sad"}]
    data = {"manifests": [manifest(place / "b.jsonl", rows)], "media_root": str(place / "theirs")}
    block = found(run(place / "runs/sft", {"text": {"scratch": {}}}, data), file, place / "ours")
    assert (block["status"], block["overlap"]["files"]) == ("in-distribution", 1)
    assert (block["same"], block["overlap"]["clips"]) == ([], 0)


def test_the_adapter_tells_data_sets_of_one_root_apart(place: Path) -> None:
    root = str(place / "ours")
    for adapter, status in (("data/emodb.py", "in-distribution"), ("data/meld.py", "zero-shot")):
        file = manifest(place / "test.jsonl", TEST[:2], "eval/emodb.py")
        named = manifest(place / "train.jsonl", TEST[2:], adapter)
        data = {"manifests": [named], "media_root": root}
        folder = place / "runs" / Path(adapter).stem
        block = found(run(folder, {"text": {"scratch": {}}}, data), file, place / "ours")
        assert block["status"] == status


def test_texts_without_clips_are_compared_as_texts(place: Path) -> None:
    file = manifest(place / "test.jsonl", [{"prompt": "I won!"}, {"prompt": "I lost."}])
    rows = [{"prompt": "I  won!", "extra": 1}, {"prompt": "It rains."}]
    data = {"manifests": [manifest(place / "train.jsonl", rows)]}
    block = found(run(place / "runs/sft", {"text": {"scratch": {}}}, data), file, Path())
    assert (block["status"], block["overlap"]["texts"]) == ("in-distribution", 1)


def test_what_is_missing_makes_it_unknown(place: Path) -> None:
    file = manifest(place / "test.jsonl", TEST)
    data = {"manifests": [str(place / "gone.jsonl")]}
    block = found(run(place / "runs/a", {"text": {"scratch": {}}}, data), file, place / "ours")
    assert (block["status"], block["why"]) == ("unknown", f"{place}/gone.jsonl cannot be read")
    RunRecord(place / "runs/b").event("stage", stage="eval", config={"data": data})
    (place / "runs/b/final").mkdir()
    block = found(str(place / "runs/b/final"), file, place / "ours")
    assert (block["status"], "does not say" in block["why"]) == ("unknown", True)
