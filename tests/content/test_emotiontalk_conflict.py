"""``eval/emotiontalk_conflict.py`` on made-up utterances in the two forms of the release."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmemo import content
from mmemo.config import read_yaml
from mmemo.data.manifest import DataConfig
from mmemo.errors import DataError, EvaluationError
from mmemo.evaluation.benchmark import Question, Selected, load_benchmark, validate
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.results import read_results
from mmemo.evaluation.script import run_zero_shot, zero_shot_config
from tests.evaluation.world import save_model
from tests.media_files import write_clip

FILE = "eval/emotiontalk_conflict.py"
# Utterance (session_scene_speaker_number): the labels of the whole, the voice and the picture.
LABELS = {
    "G00003_01_05_001": ("happy", "neutral", "happy"),
    "G00003_01_05_002": ("sad", "sad", "neutral"),
    "G00003_01_09_001": ("fearful", "fearful", "fearful"),
    "G00015_02_07_001": ("angry", "neutral", "disgusted"),
    "G00015_02_07_002": ("surprised", "neutral", "neutral"),
    "G00001_01_03_001": ("angry", "angry", "angry"),
    "G00009_01_03_001": ("neutral", "sad", "neutral"),
}
SLICES = {
    "G00003_01_05_001": "video_aligned",
    "G00003_01_05_002": "audio_aligned",
    "G00003_01_09_001": "consistent",
}


def path_of(name: str) -> str:
    session, scene, speaker, _ = name.split("_")
    return f"{session}/{session}_{scene}/{session}_{scene}_{speaker}/{name}"


def write_csv(root: Path, labels: dict[str, tuple[str, str, str]] = LABELS) -> list[str]:
    """``mm.csv``, ``audio.csv`` and ``video.csv`` as in the release's code."""
    root.mkdir(parents=True, exist_ok=True)
    for place, (kind, ending) in enumerate((("mm", "mp4"), ("audio", "wav"), ("video", "mp4"))):
        lines = [f"{path_of(name)}.{ending},{found[place]}" for name, found in labels.items()]
        (root / f"{kind}.csv").write_text("\n".join(["file_name,emotion", *lines]) + "\n")
    return [str(root / f"{kind}.csv") for kind in ("mm", "audio", "video")]


def write_json(root: Path, labels: dict[str, Any] = LABELS, **row: Any) -> list[str]:
    """``Multimodal/json``, ``Audio/json`` and ``Video/json`` as in the release's data."""
    kinds = (("Multimodal", "mp4"), ("Audio", "wav"), ("Video", "mp4"))
    for place, (kind, ending) in enumerate(kinds):
        for name, found in labels.items():
            file = root / kind / "json" / f"{path_of(name)}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            values = {"data": [], "emotion_result": found[place], "speaker_id": "0" + name[-5]}
            values |= {"file_name": f"{path_of(name)}.{ending}", **row}
            file.write_text(json.dumps(values))
    return [str(root / kind / "json") for kind, _ in kinds]


def select(
    files: list[str], root: Path, params: dict[str, Any] | None = None, **data: Any
) -> tuple[Selected, list[Question]]:
    benchmark = load_benchmark(FILE, params)
    config = DataConfig(manifests=files, media_root=str(root), **data)
    selected = benchmark.select(config)
    questions = benchmark.ask(selected, config)
    validate(benchmark, questions)
    return selected, questions


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_both_forms_give_the_test_split_s_slices(write: Any, tmp_path: Path) -> None:
    selected, questions = select(write(tmp_path), tmp_path)
    slices = {question.sample.sample_id: question.sample.truth.conflict for question in questions}
    assert slices == SLICES
    assert selected.reasons == {"all different": 1, "joint differs": 1}
    first = questions[0].sample
    assert questions[0].truth == "happy"
    assert first.truth.modality_labels == {"audio": "neutral", "video": "happy"}
    assert first.media["video"].path == f"{path_of(first.sample_id)}.mp4"
    assert first.group["session"] == "G00003"


@pytest.mark.parametrize(
    ("split", "expected"), [("val", 1), ("train", 1), ("all", len(SLICES) + 2)]
)
def test_splits_are_the_published_sessions(split: str, expected: int, tmp_path: Path) -> None:
    _, questions = select(write_csv(tmp_path), tmp_path, {"split": split})
    assert len(questions) == expected


@pytest.mark.parametrize(("place", "kind"), [(0, "joint"), (1, "audio"), (2, "video")])
def test_an_utterance_that_lacks_a_label_is_counted(place: int, kind: str, tmp_path: Path) -> None:
    """Also one that the whole clips' own labels do not hold."""
    files = write_csv(tmp_path)
    lines = Path(files[place]).read_text().splitlines(keepends=True)
    Path(files[place]).write_text("".join(line for line in lines if "_05_002" not in line))
    selected, questions = select(files, tmp_path)
    assert len(questions) == len(SLICES) - 1
    assert selected.reasons == {"all different": 1, "joint differs": 1, f"no {kind} label": 1}


def test_manifests_come_in_any_order_and_are_told_apart_by_name(tmp_path: Path) -> None:
    files = write_csv(tmp_path)
    assert select(files, tmp_path)[0] == select(files[::-1], tmp_path)[0]
    (tmp_path / "mm.csv").rename(tmp_path / "whole.csv")
    with pytest.raises(EvaluationError, match=r"whole\.csv: neither the file nor a folder"):
        select([str(tmp_path / "whole.csv"), *files[1:]], tmp_path)
    with pytest.raises(EvaluationError, match=r"no manifest has joint labels; give mm\.csv"):
        select(files[1:], tmp_path)


def test_a_clip_is_found_under_the_release_s_folders(tmp_path: Path) -> None:
    files = write_csv(tmp_path)
    name = "G00003_01_05_002"
    clip = tmp_path / "Multimodal/mp4" / f"{path_of(name)}.mp4"
    clip.parent.mkdir(parents=True)
    clip.touch()
    _, questions = select(files, tmp_path)
    paths = {
        question.sample.sample_id: question.sample.media["video"].path for question in questions
    }
    assert paths[name] == f"Multimodal/mp4/{path_of(name)}.mp4"
    assert paths["G00003_01_09_001"] == f"{path_of('G00003_01_09_001')}.mp4"  # is missing


def test_labels_that_are_missing_or_strange_are_counted(tmp_path: Path) -> None:
    labels = dict(LABELS)
    labels["G00003_01_05_001"] = ("happy", "bored", "happy")
    labels["G00003_01_05_002"] = ("", "sad", "neutral")
    files = write_csv(tmp_path, labels)
    lines = (tmp_path / "video.csv").read_text().splitlines()
    kept = [line for line in lines if "G00015_02_07_001" not in line]
    (tmp_path / "video.csv").write_text("\n".join(kept) + "\n")
    selected, questions = select(files, tmp_path)
    assert len(questions) == 1
    assert selected.reasons == {
        "unknown audio label": 1,
        "joint differs": 1,
        "no joint label": 1,
        "no video label": 1,
    }
    assert selected.excluded[0].detail == "bored"


def test_the_consensus_counts_and_without_one_the_annotators_majority(tmp_path: Path) -> None:
    name = "G00003_01_05_001"
    files = write_json(tmp_path, {name: ("happy", "sad", "happy")})
    voice = tmp_path / "Audio/json" / f"{path_of(name)}.json"
    row = json.loads(voice.read_text())

    def slices(**changes: Any) -> tuple[dict[str, int], Counter[Any]]:
        voice.write_text(json.dumps(row | changes))
        benchmark = load_benchmark(FILE)
        found = benchmark.select(DataConfig(manifests=files, media_root=str(tmp_path)))
        return found.reasons, Counter(sample.truth.conflict for sample in found.samples)

    votes = [{"emotion_result": word} for word in ("happy", "Happy", "sad")]
    assert slices(data=votes) == ({}, {"video_aligned": 1})  # the consensus says sad
    assert slices(data=votes, emotion_result="") == ({}, {"consistent": 1})
    tie = {"annotators split on the audio label": 1}
    assert slices(data=votes[1:], emotion_result=None) == (tie, {})
    assert slices(emotion_result=["sad", "happy"]) == (tie, {})
    assert slices(data=[], emotion_result="  ") == ({"no audio label": 1}, {})


def test_bad_files_are_errors(tmp_path: Path) -> None:
    files = write_csv(tmp_path)
    (tmp_path / "mm.npz").touch()
    with pytest.raises(DataError, match=r"mm\.npz: is a pickle, which is not read"):
        select([str(tmp_path / "mm.npz"), *files[1:]], tmp_path)
    text = (tmp_path / "mm.csv").read_text()
    (tmp_path / "mm.csv").write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(DataError, match="'G00003_01_05_001' is labelled twice"):
        select(files, tmp_path)
    (tmp_path / "mm.csv").write_text("name,emotion\na,sad\n")
    with pytest.raises(DataError, match="has no 'file_name', only name, emotion"):
        select(files, tmp_path)
    folders = write_json(tmp_path / "json")
    broken = next((tmp_path / "json/Audio").rglob("*.json"))
    broken.write_text("[]")
    with pytest.raises(DataError, match="must hold one object"):
        select(folders, tmp_path)
    broken.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        select(folders, tmp_path)
    with pytest.raises(EvaluationError, match="split is 'dev'; use test, val, train or all"):
        select(write_csv(tmp_path / "csv"), tmp_path, {"split": "dev"})


def test_the_script_finds_the_labels_in_a_folder(tmp_path: Path) -> None:
    module = content.load_module(FILE)
    with pytest.raises(EvaluationError, match=r"has neither mm\.csv, audio\.csv"):
        module.find_data([str(tmp_path)])
    folders = write_json(tmp_path)
    assert module.find_data([str(tmp_path)]) == {
        "manifests": folders,
        "media_root": str(tmp_path),
    }
    files = write_csv(tmp_path / "mm-process")
    assert module.find_data([str(tmp_path)])["manifests"] == files
    assert module.find_data(files) == {"manifests": files}
    config = zero_shot_config(
        FILE, ["--model", "m", "--data", str(tmp_path)], module.DEFAULTS, module.find_data
    )
    path = Path("train_configs/benchmarks/emotiontalk_conflict.yaml")
    shipped = EvalConfig.model_validate(read_yaml(path))
    assert (config.generation, config.data.modalities) == (
        shipped.generation,
        shipped.data.modalities,
    )


def test_a_whole_evaluation_on_real_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path)
    for tone, name in enumerate(list(SLICES)[:2]):  # the third clip is missing
        clip = tmp_path / "Multimodal/mp4" / f"{path_of(name)}.mp4"
        write_clip(clip, seconds=1, fps=4, tone=200 + 90 * tone)
    arguments = ["--model", str(save_model(tmp_path / "model")), "--data", str(tmp_path)]
    arguments += ["--output-dir", str(tmp_path / "out"), "--generation.max_new_tokens=4"]
    arguments += ["--bootstrap.resamples=100", "--decode.workers=1", "--decode.max_bad_share=0.5"]
    module = content.load_module(FILE)
    run_zero_shot(FILE, arguments, module.DEFAULTS, module.find_data)
    result = read_results(tmp_path / "out")
    assert set(result.main["subsets"]) == {"video_aligned", "audio_aligned"}
    assert result.main["labels"][0] == "neutral"
    assert result.values["excluded"] == {
        "questions": 1,
        "clips": 1,
        "kinds": {"missing": 1},
        "rows": {"all different": 1, "joint differs": 1},
    }
    assert len(result.made["data"]["sha256"]) == 3  # of the folders
    assert "1 row left out (all different)" in capsys.readouterr().out


def test_as_a_script_it_says_what_is_wrong_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FILE, "--model", "m", "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} has neither mm.csv")


def test_options_of_the_command_line_are_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path)
    arguments = ["--data", str(tmp_path), "--option", "split=val"]
    config = zero_shot_config(FILE, ["--model", "m", *arguments])
    assert config.benchmark.params == {"split": "val"}
    assert config.data.modalities == ["video", "audio"]  # of the file's own defaults
    run_zero_shot(FILE, [*arguments, "--dry-run", "--media-root", str(tmp_path / "clips")])
    assert "emotion: 1 question" in capsys.readouterr().out
