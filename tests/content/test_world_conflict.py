"""``eval/world_conflict.py`` against the manifests that the world writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.benchmark import Question, load_benchmark, validate
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans

FILE = "eval/world_conflict.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests without their clips."""
    folder = tmp_path_factory.mktemp("world")
    size = {"train_clips": 6, "val_clips": 6, "test_clips": 60, "train_speakers": 2}
    config = parse(WorldConfig, {"output_dir": str(folder), "size": size})
    for name, rows in manifests(config, make_plans(config)).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def questions_of(*files: Path) -> list[Question]:
    return load_benchmark(FILE).questions(DataConfig(manifests=[str(file) for file in files]))


def test_conflict_set_first_then_each_kind_of_probe(world: Path) -> None:
    questions = questions_of(world / "test_probes.jsonl", world / "test_conflict.jsonl")
    tasks = list(dict.fromkeys(question.task for question in questions))
    assert tasks[0] == "emotion"
    assert tasks[1:] == [
        "basic_video",
        "basic_audio",
        "modality_agreement",
        "stress_video",
        "stress_audio",
    ]
    emotion = [question for question in questions if question.task == "emotion"]
    subsets = Counter(question.sample.truth.conflict for question in emotion)
    assert subsets == {"video_aligned": 20, "audio_aligned": 20, "consistent": 20}
    validate(load_benchmark(FILE), questions)


def test_the_truth_of_a_conflict_clip_is_its_subset_channel_s_label(world: Path) -> None:
    for question in questions_of(world / "test_conflict.jsonl"):
        known = question.sample.truth.modality_labels
        if question.sample.truth.conflict == "video_aligned":
            assert question.truth == known["video"] != known["audio"]
        elif question.sample.truth.conflict == "audio_aligned":
            assert question.truth == known["audio"] != known["video"]
        else:
            assert question.truth == known["audio"] == known["video"]


def test_the_question_does_not_hold_the_answer(world: Path) -> None:
    for question in questions_of(world / "test_conflict.jsonl", world / "test_probes.jsonl"):
        assert question.turns
        assert question.turns[-1].role == "user"


def test_a_benchmark_whose_gold_answer_does_not_score_is_refused(
    world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        Path(FILE).read_text().split("def main")[0]
        + "\n\ndef score(sample, parsed):\n    return 0.5\n"
    )
    benchmark = load_benchmark(str(file))
    questions = benchmark.questions(DataConfig(manifests=[str(world / "test_conflict.jsonl")]))
    with pytest.raises(EvaluationError, match=r"scores 0\.5, not ok and 1"):
        validate(benchmark, questions)


def test_a_truth_outside_the_labels_is_refused(world: Path, tmp_path: Path) -> None:
    row = json.loads((world / "test_conflict.jsonl").read_text().splitlines()[0])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({**row, "label": "bored"}) + "\n")
    with pytest.raises(EvaluationError, match=r"'bored'.*is not one of its labels"):
        questions_of(bad)
    del row["label"]
    bad.write_text(json.dumps(row) + "\n")
    with pytest.raises(EvaluationError, match="no 'label'"):
        questions_of(bad)


def test_a_file_without_the_functions_is_no_benchmark(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(EvaluationError, match="no function 'samples'"):
        load_benchmark(str(tmp_path / "empty.py"))


def test_an_edited_file_is_another_benchmark(world: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "mine.py", DataConfig(manifests=[str(world / "test_conflict.jsonl")])
    file.write_text(Path(FILE).read_text())
    before = load_benchmark(str(file))
    assert load_benchmark(str(file)).sha256 == before.sha256
    file.write_text(Path(FILE).read_text() + "\n\ndef task(sample):\n    return 'feeling'\n")
    after = load_benchmark(str(file))
    assert after.sha256 != before.sha256
    assert {question.task for question in before.questions(data)} == {"emotion"}
    assert {after.task(question.sample) for question in before.questions(data)} == {"feeling"}


def test_an_open_question_cannot_be_the_headline(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "open.py"
    file.write_text(Path(FILE).read_text() + "\n\ndef labels(sample):\n    return None\n")
    with pytest.raises(EvaluationError, match="the first question is open"):
        load_benchmark(str(file)).questions(
            DataConfig(manifests=[str(world / "test_conflict.jsonl")])
        )


def test_parameters_reach_samples_and_unknown_ones_are_refused(world: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "few.py", DataConfig(manifests=[str(world / "test_conflict.jsonl")])
    text = Path(FILE).read_text().replace("(data: DataConfig)", "(data, most=None)")
    file.write_text(text.replace("    return sorted(rows,", "    return sorted(rows[:most],"))
    assert len(load_benchmark(str(file)).questions(data)) == 60
    assert len(load_benchmark(str(file), {"most": 7}).questions(data)) == 7
    with pytest.raises(ConfigError, match=r"no parameter 'moist'; did you mean 'most'\?"):
        load_benchmark(str(file), {"moist": 7})
    with pytest.raises(ConfigError, match="no parameter 'most'; it has none, so remove it"):
        load_benchmark(FILE, {"most": 7})


def test_it_runs_as_a_script(world: Path) -> None:
    done = subprocess.run(
        [sys.executable, FILE, str(world / "test_conflict.jsonl")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "emotion: 60 questions" in done.stdout
    assert "Every right answer scores 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "error: no manifests given; use python eval/world_conflict.py MANIFEST..."),
        (["nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_as_a_script_without_its_manifests_it_says_what_to_do(
    arguments: list[str], sentence: str
) -> None:
    done = subprocess.run(
        [sys.executable, FILE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
