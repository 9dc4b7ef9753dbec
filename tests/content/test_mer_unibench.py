"""``eval/mer_unibench.py`` on miniatures of the nine sets, with the traps of their releases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemo.content import load_module
from mmemo.data.adapter import Excluded, write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.data.merbench import SETS, read_gold, read_set, set_named
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.benchmark import load_benchmark, validate
from mmemo.evaluation.mer_unibench import official_score
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import run_zero_shot
from mmemo.evaluation.summary import print_summary, summary_of
from mmemo.statistics import BootstrapConfig
from tests.answers.test_emotion_wheels import write_wheels
from tests.media_files import write_clip

FILE = "eval/mer_unibench.py"
Corpus = dict[str, dict[str, Any]]

# Labels as the released files have them: numbers for MELD and IEMOCAP, words for MER.
CORPORA: dict[str, dict[str, Corpus]] = {
    "mer2023": {
        "train_corpus": {"sample_9": {"emo": "sad", "val": -1.0}},
        "test1_corpus": {"sample_1": {"emo": "worried", "val": -2.5}},
    },
    "mer2024": {"test1_corpus": {"samplenew_1": {"emo": "happy", "val": -10}}},
    "meld": {
        "test_corpus": {
            "test_dia0_utt0": {"emo": np.int64(1), "val": -10},
            "test_dia0_utt1": {"emo": 3, "val": -10},
            "test_dia0_utt2": {"emo": 7, "val": -10},  # outside the set
            "test_dia0_utt3": {"emo": -1, "val": -10},
            "test_dia0_utt4": {"emo": 5, "val": -10},  # its clip is missing
        }
    },
    "iemocap": {
        "whole_corpus": {
            "Ses01F_impro01_F000": {"emo": 0, "val": -10},  # of another session
            "Ses05F_impro01_M000": {"emo": 3, "val": -10},
            "Ses05F_impro01_F001": {"emo": 2, "val": -10},
        }
    },
    "mosi": {
        "test_corpus": {
            "vid-1$_1_4": {"emo": 0, "val": np.float32(1.5)},
            "vid-1$_1_5": {"emo": 0, "val": 0.0},
            "vid-1$_1_6": {"emo": 0, "val": -10},  # no valence
            "vid-1$_1_7": {"emo": 0, "val": None},
        }
    },
    "mosei": {"test_corpus": {"a_1": {"emo": 0, "val": -2}}},
    "sims": {"test_corpus": {"video_0001_0001": {"emo": 0, "val": -0.8}}},
    "simsv2": {"test_corpus": {"aqgy3_0001_00003": {"emo": 0, "val": 0.2}}},
}
OPENSET = "\ufeffname,openset\nov_1,\"['happy', 'moved']\"\nov_2,\nov_3,\"[relaxed, fear]\"\n"


def write_release(root: Path) -> Path:
    """The nine folders. MELD's subtitles begin with a byte order mark and are in another order;
    MER2023's clips are .avi, and have sound of their own; the other sets' tables are missing."""
    clip = write_clip(root / "clip.mp4", 0.2)
    for name, corpora in CORPORA.items():
        one = SETS[name]
        folder = root / one.folder
        (folder / one.video).mkdir(parents=True)
        arrays: dict[str, Any] = {part: np.array(corpus) for part, corpus in corpora.items()}
        np.savez_compressed(folder / one.labels, **arrays)
        for item in corpora[one.part]:
            if item != "test_dia0_utt4":
                suffix = ".avi" if name in ("mer2023", "iemocap") else ".mp4"
                shutil.copy(clip, folder / one.video / f"{item}{suffix}")
    meld = root / SETS["meld"].folder
    (meld / SETS["meld"].subtitles).write_text(
        '\ufeffname,chinese,english\ntest_dia0_utt1,b,\ntest_dia0_utt0,a,"Oh, ""great""."\n',
        encoding="utf-8",
    )
    (meld / "subaudio").mkdir()
    shutil.copy(clip, meld / "subaudio" / "test_dia0_utt0.wav")
    words = root / SETS["ovmerdplus"].folder
    (words / "video").mkdir(parents=True)
    (words / "ovlabel.csv").write_text(OPENSET, encoding="utf-8")
    for place in (1, 2, 3):
        shutil.copy(clip, words / "video" / f"ov_{place}.mp4")
    clip.unlink()
    return root


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("mer") / "release")


@pytest.fixture(autouse=True)
def wheels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_wheels(tmp_path_factory.getbasetemp() / "emotion_wheel")
    monkeypatch.setenv("MMEMO_EMOTION_WHEEL", str(folder))
    return folder


def test_gold_as_the_release_means_it(release: Path) -> None:
    def gold(name: str) -> dict[str, Any]:
        one = set_named(name)
        found = read_gold(release / one.folder / one.labels, one)
        return {
            key: value.reason if isinstance(value, Excluded) else value
            for key, value in found.items()
        }

    assert gold("mer2023") == {"sample_1": "worried"}
    outside = "label outside the set"
    assert gold("meld") == {
        "test_dia0_utt0": "joy",
        "test_dia0_utt1": "neutral",
        "test_dia0_utt2": outside,
        "test_dia0_utt3": outside,
        "test_dia0_utt4": "fear",
    }
    assert gold("iemocap") == {"Ses05F_impro01_M000": "anger", "Ses05F_impro01_F001": "neutral"}
    assert gold("mosi") == {
        "vid-1$_1_4": 1.5,
        "vid-1$_1_5": 0.0,
        "vid-1$_1_6": "no label",
        "vid-1$_1_7": outside,
    }
    assert gold("ovmerdplus") == {
        "ov_1": ["happy", "moved"],
        "ov_2": ["neutral"],  # as the released loader has it
        "ov_3": ["relaxed", "fear"],
    }


def test_clips_sound_subtitles_and_speakers(release: Path) -> None:
    found = {
        item.name: item
        for name in ("meld", "mer2023", "iemocap", "mosi")
        for item in read_set(release, SETS[name])
        if not isinstance(item, Excluded)
    }
    first = found["test_dia0_utt0"]
    assert first.subtitle == 'Oh, "great".'
    assert first.video == "meld-process/subvideo/test_dia0_utt0.mp4"
    assert first.audio == "meld-process/subaudio/test_dia0_utt0.wav"
    assert found["test_dia0_utt1"].audio == found["test_dia0_utt1"].video
    assert found["sample_1"].video == "mer2023-dataset-process/video/sample_1.avi"
    assert found["Ses05F_impro01_M000"].speaker == "Ses05M"
    assert found["vid-1$_1_4"].speaker == "vid-1$_1"
    # The set's own folder will do as well.
    inside = [*read_set(release / SETS["meld"].folder, SETS["meld"])]
    assert not isinstance(inside[0], Excluded)
    assert inside[0].video == "subvideo/test_dia0_utt0.mp4"


def manifest_of(release: Path, tmp_path: Path, **options: str) -> Any:
    return write_manifest(FILE, release, tmp_path / "m.jsonl", options)


def test_rows_and_questions(release: Path, tmp_path: Path) -> None:
    made = manifest_of(release, tmp_path)
    assert made.missing == ("meld-process/subvideo/test_dia0_utt4.mp4",)
    assert [one.row for one in made.excluded] == [
        *("meld/test_dia0_utt2", "meld/test_dia0_utt3", "mosi/vid-1$_1_6", "mosi/vid-1$_1_7"),
    ]
    assert len(made.samples) == 14
    benchmark = load_benchmark(FILE)
    data = DataConfig(manifests=[str(tmp_path / "m.jsonl")], media_root=str(release))
    asked = benchmark.questions(data)
    validate(benchmark, asked)
    assert list(dict.fromkeys(one.task for one in asked)) == list(SETS)
    by_id = {one.sample.sample_id: one for one in asked}
    meld = by_id["meld/test_dia0_utt0"]
    assert meld.truth == "joy"
    assert 'The person says: "Oh, "great"."' in meld.turns[-1].text
    assert by_id["ovmerdplus/ov_1"].truth == ["happy", "moved"]
    assert by_id["mosi/vid-1$_1_5"].truth == 0.0
    made = manifest_of(release, tmp_path, set="MELD", subtitle="no")
    assert len(made.samples) == 2
    assert "great" not in (tmp_path / "m.jsonl").read_text()
    with pytest.raises(ConfigError, match="no set 'mled'"):
        manifest_of(release, tmp_path, set="mled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds none of the nine sets"):
        manifest_of(tmp_path / "empty", tmp_path)


def test_answers_are_scored_in_both_modes(
    release: Path, tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest_of(release, tmp_path)
    benchmark = load_benchmark(FILE)
    data = DataConfig(manifests=[str(tmp_path / "m.jsonl")], media_root=str(release))
    said = {"meld": "[happy]", "mosi": "positive", "ovmerdplus": "[happy, fear]"}
    rows: list[dict[str, Any]] = []
    for question in benchmark.questions(data):
        raw = said.get(question.task, "")
        assert question.kind is not None
        read = question.kind.read(raw)
        rows.append(
            {**question.row(), "raw": raw, "answer": read.answer, "status": read.status}
            | {"key": question.sample.sample_id}
        )
    tasks = score_rows(rows, BootstrapConfig(resamples=100), benchmark.specs())
    words = tasks["ovmerdplus"]["scored"]
    # ov_2 is neutral and left out; ov_1: P 1/2, R 1 ("moved" is unknown); ov_3: P 1, R 1.
    assert words["official_precision"]["value"] == pytest.approx(0.75)
    assert words["official_recall"]["value"] == 1
    assert tasks["mosi"]["scored"]["official_waf"]["value"] == 1
    assert tasks["mosei"]["scored"]["official_waf"]["value"] == 1  # empty counts as negative
    assert tasks["mosei"]["scored"]["corrected_waf"]["value"] == 0
    for name, task in benchmark.tasks.items():
        own = [row for row in rows if row["task"] == name]
        assert task.official is not None
        numbers = task.official(own)
        json.dumps(numbers, allow_nan=False)
        if name not in ("mosi", "mosei", "sims", "simsv2"):
            again = official_score(
                name, [row["truth"] for row in own], [row["raw"] for row in own], wheels
            )
            assert numbers == again
    table = summary_of(benchmark, tasks)
    assert set(table) == {"official", "corrected"}
    assert list(table["official"])[:2] == ["mer2023", "mer2024"]
    print_summary(table)
    told = " ".join(capsys.readouterr().out.split())
    assert "All tasks" in told
    assert "100.00" in told
    # On these made-up wheels some sets have no label that counts, so there is no mean.
    assert table["official"]["mean"] is None


def test_a_dry_run_names_what_is_missing(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_zero_shot(FILE, ["--data", str(release), "--dry-run", "--option", "set=meld"])
    told = " ".join(capsys.readouterr().out.split())
    assert "2 rows here, 2610 published" in told
    assert "label outside the set" in told
    assert "test_dia0_utt4.mp4" in told
    assert "This copy is not whole" in told


def test_recorded_predictions_do_for_scoring(tmp_path: Path) -> None:
    items = {
        "meld": [{"id": "a", "gt": "joy"}, {"id": "b", "gt": 9}],
        "CMU-MOSI": [{"id": "c", "gt": -1.5}],
        "ovmerdplus": [
            {"id": "d", "gt": "[happy, moved]"},
            {"id": "e", "gt": ["sad"]},
            {"id": "f", "gt": None},
        ],
        "notes": [],
    }
    for name, listed in items.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"items": listed}))
    found = {
        item.name: item.gold
        for name in ("meld", "mosi", "ovmerdplus")
        for item in read_set(tmp_path, SETS[name])
        if not isinstance(item, Excluded)
    }
    assert found == {"a": "joy", "c": -1.5, "d": ["happy", "moved"], "e": ["sad"]}
    rows = [row for row in load_module(FILE).rows(tmp_path) if not isinstance(row, Excluded)]
    assert [row["task"] for row in rows] == ["meld", "mosi", "ovmerdplus", "ovmerdplus"]
    (tmp_path / "meld.json").write_text("{}")
    with pytest.raises(DataError, match="holds no labels"):
        list(read_set(tmp_path, SETS["meld"]))


def test_label_files_that_are_none_are_refused(tmp_path: Path) -> None:
    one = SETS["meld"]
    path = tmp_path / one.labels
    with pytest.raises(DataError, match="cannot be read"):
        read_gold(path, one)
    np.savez(path, other=np.array({"a": 1}))
    with pytest.raises(DataError, match="has no dictionary 'test_corpus'"):
        read_gold(path, one)
    words = tmp_path / "ovlabel.csv"
    words.write_text("name,labels\na,happy\n")
    with pytest.raises(DataError, match="has no columns 'name' and 'openset'"):
        read_gold(words, SETS["ovmerdplus"])
