"""``eval/emorealm.py``: the release's format, the world's probes, both parsers, whole runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, recall_score

from mmemo import content
from mmemo.answers.parsing import parse as strictly
from mmemo.config import load_config, parse
from mmemo.data.manifest import DataConfig
from mmemo.errors import DataError
from mmemo.evaluation.benchmark import Question, load_benchmark, validate
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.results import EvalResult, read_results
from mmemo.evaluation.runner import run_eval
from mmemo.evaluation.script import run_zero_shot
from mmemo.report.page import build_report
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans
from tests.evaluation.world import save_model
from tests.media_files import write_clip

FILE = "eval/emorealm.py"
TASKS = [
    "reasoning_basic_audio",
    "reasoning_basic_video",
    "modality_agreement",
    "reasoning_stress_audio",
    "reasoning_stress_video",
]
CUES = ["(A) A raised voice", "(B) A whisper", "(C) Long pauses", "(D) Laughter"]
VIDEOS = ["part_1/1.mp4", "part_1/2.mp4", "part_2/3.mp4"]


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    """Question ``number`` of an invented release; tasks and right answers go round."""
    task = TASKS[number % 5]
    basic, flipped = task.startswith("reasoning_basic"), number % 2
    yes_no = ["(A) No", "(B) Yes"] if flipped else ["(A) Yes", "(B) No"]
    return {
        "id": f"q{number}",
        "video": VIDEOS[number % 3],
        "task": task,
        "question": f"Which cue is there ({number})?" if basic else f"Is it so ({number})?",
        "choices": CUES if basic else yes_no,
        "answer": ("ABCD" if basic else "AB")[number // 10 % 2],
        **changes,
    }


def write_release(folder: Path, rows: list[dict[str, Any]], name: str = "emorealm.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows, indent=1))
    return folder / name


def questions_of(*files: Path, data: dict[str, Any] | None = None, **params: Any) -> list[Question]:
    config = parse(DataConfig, {"manifests": [str(file) for file in files], **(data or {})})
    benchmark = load_benchmark(FILE, params)
    questions = benchmark.questions(config)
    validate(benchmark, questions)
    return questions


def test_the_release_is_asked_as_it_stands(tmp_path: Path) -> None:
    file = write_release(tmp_path, [row_of(number) for number in range(20)])
    questions = questions_of(file)
    assert [one.task for one in questions] == [task for task in TASKS for _ in range(4)]
    first = questions[0]
    assert first.sample.sample_id == "q0"
    assert first.turns[-1].text == f"<video><audio>Which cue is there (0)? {' '.join(CUES)}"
    assert {name: ref.path for name, ref in first.sample.media.items()} == {
        "video": "part_1/1.mp4",
        "audio": "part_1/1.mp4",
    }
    assert first.labels is not None
    assert first.labels.labels == ("A", "B", "C", "D")
    assert [one.truth for one in questions[:4]] == ["A", "A", "B", "B"]
    by_id = {one.sample.sample_id: one for one in questions}
    # 2: (A) Yes, right is A. 7: (A) No, right is A. 12: (A) Yes, right is B. 17: (A) No, B.
    truths = [by_id[f"q{number}"].truth for number in (2, 7, 12, 17)]
    assert truths == ["yes", "no", "no", "yes"]


def test_where_the_clips_lie_and_what_is_asked_can_be_said(tmp_path: Path) -> None:
    file = write_release(tmp_path, [row_of(0, id=17)])
    (one,) = questions_of(
        file,
        data={"modalities": ["video", "audio", "face"]},
        video_dir="24fps",
        audio_dir="16khz",
        instruction="Answer with the letter.",
    )
    assert one.sample.sample_id == "17"
    assert {name: ref.path for name, ref in one.sample.media.items()} == {
        "video": "24fps/part_1/1.mp4",
        "audio": "16khz/part_1/1.wav",
        "face": "24fps/part_1/1.mp4",
    }
    assert one.turns[-1].text.startswith("<video><audio><face>Which")
    assert one.turns[-1].text.endswith("(D) Laughter Answer with the letter.")
    (alone,) = questions_of(file, data={"modalities": []})
    assert not alone.sample.media
    assert alone.turns[-1].text.startswith("Which")


def test_rows_are_limited_and_keep_further_columns(tmp_path: Path) -> None:
    rows = [row_of(number, emotion="sad", further=1) for number in range(8)]
    questions = questions_of(
        write_release(tmp_path, rows), data={"limit": 3, "columns": ["emotion"]}
    )
    assert len(questions) == 3
    assert {one.sample.columns["emotion"] for one in questions} == {"sad"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "reasoning_basic_sound"}, "did you mean 'reasoning_basic_audio'"),
        ({"answer": "E"}, "is 'E'; it must be one of A, B, C, D"),
        ({"answer": None}, "field 'answer': is missing"),
        ({"video": ""}, "field 'video': is empty"),
        ({"id": None}, "field 'id': is missing"),
        ({"id": ["1"]}, "must be a string or a number"),
        ({"question": 3}, "field 'question': must be a string"),
        ({"choices": ["yes", "no"]}, "written as"),
        ({"choices": ["(B) yes", "(A) no"]}, "written as"),
        ({"choices": ["(A) alone"]}, "two or more"),
        ({"choices": ["(A) a cue", "(B) a cue"]}, "already means A"),
        ({"task": "modality_agreement"}, "'(A) A raised voice' is neither yes nor no"),
        ({"task": "modality_agreement", "choices": ["(A) Yes", "(B) Yes"]}, "one Yes and one No"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    file = write_release(tmp_path, [row_of(0), row_of(5, **changes)])
    with pytest.raises(DataError, match=re.escape(sentence)) as caught:
        questions_of(file)
    assert caught.value.line == 15  # where the second row begins


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = [row_of(0, answer="F"), row_of(1), row_of(2, task="x"), row_of(1)]
    with pytest.raises(DataError, match=r"(?s)'F'.*field 'task': is 'x'.*'q1' is the id of"):
        questions_of(write_release(tmp_path, rows))


def one_question(tmp_path: Path, task: str, answer: str, choices: list[str]) -> Question:
    row = row_of(0, task=task, answer=answer, choices=choices)
    return questions_of(write_release(tmp_path, [row]))[0]


def official(raw: str, question: Question) -> str | None:
    return content.load(f"{FILE}:official")(raw, question).label


@pytest.mark.parametrize(
    ("raw", "strict", "right"),
    [  # the right choice is A
        ("A", "A", True),
        ("(A)", "A", True),
        ("a.", "A", True),
        ("(A) A raised voice", "A", True),
        ("The answer is (A) A raised voice.", "A", True),
        ("<think>B or D?</think><answer>A</answer>", "A", True),
        ("B", "B", False),
        ("(D) Laughter", "D", False),
        # Where they part:
        ("There is a tremble in what she says", None, True),  # the article
        ("<think>Here is a whisper.</think><answer>B</answer>", "B", True),
        ("A, B, C, D", None, True),  # all letters
        ("It is not (A).", None, True),  # denied
        ("Raised voice", None, False),
        ("Laughter", "D", False),
        ("", None, False),
    ],
)
def test_the_two_parsers_on_choices(tmp_path: Path, raw: str, strict: str | None, right: bool):
    question = one_question(tmp_path, TASKS[0], "A", CUES)
    assert question.labels is not None
    assert strictly(raw, question.labels).label == strict
    assert (official(raw, question) == "A") == right


def test_the_article_is_no_wrong_answer_of_the_strict_parser_either(tmp_path: Path) -> None:
    question = one_question(tmp_path, TASKS[0], "B", CUES)
    assert question.labels is not None
    raw = "It is (B): a whisper"
    assert strictly(raw, question.labels).label == official(raw, question) == "B"


@pytest.mark.parametrize(
    ("raw", "strict", "read"),
    [  # the choices are (A) No, (B) Yes; the right answer is (B) Yes
        ("B", "yes", "yes"),
        ("(B) Yes", "yes", "yes"),
        ("(A) No", "no", "no"),
        ("A", "no", "no"),
        # Where they part:
        ("Yes", "yes", "no"),  # without its letter
        ("Yes, they do.", "yes", "no"),
        ("I cannot tell.", None, "no"),  # whatever is not right is the other answer
        ("", None, "no"),
        ("A or B", None, "yes"),
    ],
)
def test_the_two_parsers_on_yes_and_no(tmp_path: Path, raw: str, strict: str | None, read: str):
    question = one_question(tmp_path, TASKS[2], "B", ["(A) No", "(B) Yes"])
    assert question.labels is not None
    assert strictly(raw, question.labels).label == strict
    assert official(raw, question) == read


@pytest.fixture(scope="module")
def by_answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Question]:
    """One question for each right letter."""
    folder = tmp_path_factory.mktemp("official")
    return {letter: one_question(folder, TASKS[1], letter, CUES) for letter in "ABCD"}


@settings(deadline=None)
@given(raw=st.text("ABCDabcd ().:,_'é\n", max_size=12), answer=st.sampled_from("ABCD"))
def test_the_official_parser_finds_the_letter_among_the_words(
    by_answer: dict[str, Question], raw: str, answer: str
) -> None:
    words = re.split(r"\W+", raw.lower())
    assert (official(raw, by_answer[answer]) == answer) == (answer.lower() in words)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests without their clips."""
    folder = tmp_path_factory.mktemp("world")
    size = {"train_clips": 6, "val_clips": 6, "test_clips": 60, "train_speakers": 2}
    config = parse(WorldConfig, {"output_dir": str(folder), "size": size})
    for name, rows in manifests(config, make_plans(config)).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_world_s_probes_are_the_five_tasks(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "test_probes.jsonl").open()]
    questions = questions_of(world / "test_probes.jsonl")
    assert list(dict.fromkeys(one.task for one in questions)) == TASKS
    assert len(questions) == len(rows)
    gold = {row["sample_id"]: row["gold"] for row in rows}
    assert all(one.truth == gold[one.sample.sample_id] for one in questions)
    for one in questions:
        assert one.turns[-1].role == "user"
        assert one.task.endswith(one.sample.columns["task"].rpartition("_")[2])
        assert official(f"<answer>{one.truth}</answer>", one) == one.truth
    assert {one.sample.columns["probe_kind"] for one in questions if one.task == TASKS[4]} == {
        "supporting",
        "hallucinated",
        "spurious",
    }
    assert all("speaker" in one.sample.group for one in questions)


def test_other_manifests_of_the_world_are_refused(world: Path) -> None:
    with pytest.raises(DataError, match=r"field 'task': is missing \(give probes that"):
        questions_of(world / "test_conflict.jsonl")
    row = json.loads((world / "test_probes.jsonl").open().readline())
    for changes, sentence in (
        ({"task": "basic_sound"}, "did you mean 'basic_"),
        ({"gold": "maybe"}, "field 'gold': is 'maybe'"),
    ):
        (world / "bad.jsonl").write_text(json.dumps({**row, **changes}) + "\n")
        with pytest.raises(DataError, match=sentence):
            questions_of(world / "bad.jsonl")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release of 20 questions about three clips, and a tiny model; tests must not change them."""
    root = tmp_path_factory.mktemp("emorealm")
    for index, name in enumerate(VIDEOS):
        write_clip(root / "dfew" / name, seconds=1.0, fps=4, tone=200.0 + 90 * index)
    write_release(root / "dfew", [row_of(number) for number in range(20)])
    return root / "dfew", save_model(root / "model")


def values_of(folder: Path, model: Path, out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "benchmark": FILE,
        "model": {"path": str(model)},
        "data": {"manifests": [str(folder / "emorealm.json")], "media_root": str(folder)},
        "decode": {"workers": 1, "max_bad_share": 0.5},
        "generation": {"max_new_tokens": 8},
        "per_device_eval_batch_size": 5,
        "bootstrap": {"resamples": 100},
    }


def numbers(result: EvalResult, name: str) -> dict[str, Any]:
    """What a reading should give, from the answers, by scikit-learn."""
    expected: dict[str, Any] = {}
    config = DataConfig(manifests=result.made["data"]["manifests"])
    asked = {one.sample.sample_id: one for one in load_benchmark(FILE).questions(config)}
    for task in TASKS:
        truth, said = [], []
        answers = {row["sample_id"]: row for row in result.rows(task)}
        for one in (one for one in asked.values() if one.task == task):
            row = answers.get(one.sample.sample_id)
            if row is None and name == "official":
                continue
            read = row and row["strict_answer" if name == "strict" else "answer"]
            if row and name == "official":
                read = official(row["raw"], one)
            truth.append(one.truth)
            said.append(str(read))
        expected[task] = {"accuracy": accuracy_score(truth, said), "n": len(truth)}
        if "basic" not in task:
            recall = recall_score(truth, said, labels=["yes", "no"], average=None, zero_division=0)
            both = recall.sum()
            expected[task] |= {
                "harmonic_mean": 2 * recall.prod() / both if both else 0.0,
                "yes_rate": said.count("yes") / len(said),
                "f1": f1_score([t == "yes" for t in truth], [s == "yes" for s in said]),
            }
    return expected


def given_by(result: EvalResult, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, block in result.readings[name]["tasks"].items():
        found[task] = {"accuracy": block["accuracy"]["value"], "n": block["n"]}
        for key in ("harmonic_mean", "yes_rate", "f1") if "yes_no" in block else ():
            found[task][key] = block["yes_no"][key]["value"]
    return found


SAID = ["(A)", "B", "There is a pause.", "Yes", "no", "(B) Yes", "(A) No", "Laughter"]


def test_a_run_gives_all_readings_of_the_same_answers(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted answers; one clip is missing."""
    folder, model = shared
    rows = [row_of(number) for number in range(20)]
    rows += [row_of(number, id=f"gone-{number}", video="part_9/9.mp4") for number in range(20, 25)]
    file = write_release(tmp_path / "data", rows)

    def say(
        self: AnswerGenerator, questions: list[Question], draw: str
    ) -> list[tuple[str, int, bool]]:
        numbers = [int(one.sample.sample_id.lstrip("q")) for one in questions]
        return [(SAID[number * 7 % len(SAID)], 3, True) for number in numbers]

    monkeypatch.setattr(AnswerGenerator, "answer", say)
    values = values_of(folder, model, tmp_path / "out")
    values["data"]["manifests"] = [str(file)]
    result = run_eval(parse(EvalConfig, values))
    assert result.excluded == 5
    assert list(result.readings) == ["verdict", "strict", "official"]
    for name, missing in (("verdict", "wrong"), ("strict", "wrong"), ("official", "skipped")):
        block = result.readings[name]
        expected = numbers(result, name)
        for task, one in given_by(result, name).items():
            assert one == pytest.approx(expected[task], abs=1e-6), (name, task)
        means = [one["accuracy"] for one in expected.values()]
        assert block["mean"]["value"] == pytest.approx(sum(means) / 5, abs=1e-6)
        assert block["missing"] == missing
        assert [one["missing"] for one in block["tasks"].values()] == [1] * 5
        assert block["parser"]
    verdict, lenient = (result.readings[name] for name in ("verdict", "official"))
    assert verdict["parser"] != lenient["parser"]
    assert verdict["mean"]["value"] != lenient["mean"]["value"]
    assert (verdict["mean"]["n"], lenient["mean"]["n"]) == (25, 20)

    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert f"{100 * verdict['mean']['value']:.1f}<small>%" in page
    assert page.index("Parser: strict") < page.index("Parser: official")
    assert 'id="probes"' not in page


def test_as_a_script_it_is_the_same_evaluation_as_with_a_config(
    shared: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = shared
    by_config = run_eval(parse(EvalConfig, values_of(folder, model, tmp_path / "config")))
    capsys.readouterr()
    run_zero_shot(
        FILE,
        [
            *("--model", str(model), "--data", str(folder / "emorealm.json")),
            *("--media-root", str(folder), "--output-dir", str(tmp_path / "script")),
            *("--generation.max_new_tokens=8", "--per_device_eval_batch_size=5"),
            *("--bootstrap.resamples=100", "--decode.workers=1"),
        ],
    )
    by_script = read_results(tmp_path / "script")
    name = "predictions.jsonl"
    assert (tmp_path / "script" / name).read_bytes() == (tmp_path / "config" / name).read_bytes()
    assert by_script.readings == by_config.readings
    assert given_by(by_script, "strict").keys() == set(TASKS)
    for reading in ("strict", "official"):
        expected = numbers(by_script, reading)
        for task, one in given_by(by_script, reading).items():
            assert one == pytest.approx(expected[task], abs=1e-6)
    printed = capsys.readouterr().out
    assert printed.index("Parser: strict") < printed.index("Parser: official")
    assert all(task in printed for task in TASKS)


def test_the_file_is_a_program(tmp_path: Path) -> None:
    arguments = ["--model", "none", "--data", str(tmp_path / "nowhere.json")]
    done = subprocess.run(
        [sys.executable, FILE, *arguments, "--output-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "nowhere.json: cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_shipped_config_names_parameters_that_it_knows() -> None:
    config = load_config(EvalConfig, Path("train_configs/benchmarks/emorealm.yaml"))
    assert load_benchmark(config.benchmark.path, config.benchmark.params).readings
