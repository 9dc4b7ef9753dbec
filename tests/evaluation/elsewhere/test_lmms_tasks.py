"""What lmms-eval is given and what it gets back, without lmms-eval itself."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmemo import content
from mmemo.errors import ConfigError
from mmemo.evaluation.elsewhere import lmms_tasks
from tests.evaluation.elsewhere.test_score import FILE, GIVEN, listed, score

pytest.importorskip("datasets", reason="lmms-eval's data sets are those of the package datasets")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark with empty files for clips, which the environment names."""
    (tmp_path / "bench.py").write_text(FILE)
    (tmp_path / "data/test").mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in listed()]
    (tmp_path / "data/list.jsonl").write_text("".join(lines))
    for row in listed():
        (tmp_path / "data" / row["videos"][0]).touch()
    monkeypatch.setenv("MMEMO_DATA_BENCH", str(tmp_path / "data"))
    return tmp_path


def docs(bench: Path, task: str) -> list[dict[str, Any]]:
    return list(lmms_tasks.docs_of(str(bench / "bench.py"), task)(None))


def test_questions_become_documents(bench: Path) -> None:
    found = docs(bench, "emotion")
    assert [doc["sample_id"] for doc in found] == ["e0", "e1", "e2", "e3"]
    assert [doc["target"] for doc in found] == ["happy", "sad", "angry", "neutral"]
    assert lmms_tasks.doc_to_text(found[0]) == "Which? happy, sad, angry, neutral"
    around = {"pre_prompt": "Look. ", "post_prompt": " Briefly."}
    assert lmms_tasks.doc_to_text(found[0], around).startswith("Look. Which?")
    clip = str((bench / "data/test/dia0_utt0.mp4").resolve())
    assert lmms_tasks.doc_to_visual(found[0]) == [clip]
    (choice,) = docs(bench, "choice")
    assert choice["question"] == "?\nA. a man\nB. a woman"
    assert choice["target"] == "B"
    (several,) = docs(bench, "all")
    assert several["target"] == "happy, sad"


def test_sound_alone_of_a_video_file_says_so() -> None:
    doc = {"media": json.dumps({"/a.mp4": ["audio"], "/b.mp4": ["video", "audio"]})}
    assert lmms_tasks.doc_to_visual(doc) == [{"type": "audio", "url": "/a.mp4"}, "/b.mp4"]


def test_the_numbers_are_those_of_mmemo_score(bench: Path) -> None:
    said = {row["sample_id"]: str(row.get("raw", row.get("answer"))) for row in GIVEN}
    said |= {"e1": "happy", "e2": "I cannot tell.", "e3": "neutral"}
    result = score(bench, [{"sample_id": name, "raw": text} for name, text in said.items()])
    values = [
        lmms_tasks.process_closed(doc, [said[doc["sample_id"]]])["war"]
        for doc in docs(bench, "emotion")
    ]
    block = result.tasks["emotion"]
    assert lmms_tasks.average(values) == block["average"]["value"] == 0.5
    for name in ("war", "uar", "weighted_f1"):
        assert getattr(lmms_tasks, name)(values) == block["metrics"][name]["value"]
    assert lmms_tasks.invalid(values) == 0.25
    assert lmms_tasks.official(values) == block["official"]["hit"]
    values = [
        lmms_tasks.process_open(doc, [said[doc["sample_id"]]])["average"]
        for doc in docs(bench, "valence")
    ]
    assert lmms_tasks.average(values) == result.tasks["valence"]["scored"]["ccc"]["value"]


def test_what_cannot_be_asked_is_one_sentence(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="has no question of task 'x'"):
        docs(bench, "x")
    monkeypatch.setenv("MMEMO_OPTIONS_BENCH", "part=emotion")
    assert len(docs(bench, "emotion")) == 4
    with pytest.raises(ConfigError, match="has no question of task 'choice'"):
        docs(bench, "choice")
    monkeypatch.delenv("MMEMO_OPTIONS_BENCH")
    monkeypatch.delenv("MMEMO_DATA_BENCH")
    with pytest.raises(ConfigError, match="set MMEMO_DATA_BENCH to the folder"):
        docs(bench, "emotion")
    lines = (bench / "data/list.jsonl").read_text().splitlines()
    part = {**json.loads(lines[0]), "start": 1.0, "end": 2.0}
    (bench / "data2/test").mkdir(parents=True)
    (bench / "data2/test/dia0_utt0.mp4").touch()
    (bench / "data2/list.jsonl").write_text(json.dumps(part) + "\n")
    monkeypatch.setenv("MMEMO_DATA_BENCH", str(bench / "data2"))
    with pytest.raises(ConfigError, match=r"e0 is a part of .*cut the clips first"):
        docs(bench, "emotion")


def test_the_task_folder_names_what_exists() -> None:
    folder = content.find("integrations/lmms_eval")
    for path in [*folder.glob("*_yaml"), *folder.rglob("*.yaml")]:
        text = path.read_text()
        for name in re.findall(r"!function ([\w.]+)", text):
            module, _, function = name.rpartition(".")
            if module == "utils":
                own = (path.parent / "utils.py").read_text()
                assert re.search(rf"^{function} = docs_of\(", own, re.M)
            else:
                assert callable(getattr(importlib.import_module(module), function))
        for name in re.findall(r"^include: (\S+)", text, re.M):
            assert (path.parent / name).is_file()
    for path in folder.rglob("utils.py"):
        for file, task in re.findall(r'docs_of\("(.+)", "(.+)"\)', path.read_text()):
            assert task in content.load_module(file).TASKS
