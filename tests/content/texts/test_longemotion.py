"""LongEmotion's six tasks on a folder in the layout of its release, with and without retrieval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.errors import ConfigError
from mmemo.evaluation.results import read_results
from mmemo.evaluation.scorers.long_texts import json_value
from mmemo.evaluation.script import run_zero_shot
from tests.content.texts.asking import Asked
from tests.evaluation.world import save_model

FILLER = " ".join(f"word{i}" for i in range(400))


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "long"
    choice = {"content": f"{FILLER} Ann was glad. {FILLER}", "subject": "Ann", "source": "x"}
    lines(
        root / "Emotion Classification/Emotion_Classification_Emobench.jsonl",
        [
            {
                **choice,
                "id": 0,
                "label": "Joy & Pride",
                "length": 9,
                "choices": ["Joy", "Joy & Pride", "Anger"],
            },
            {**choice, "id": 1, "label": "joy", "choices": '["Joy", "Sadness", "Sadness"]'},
            {**choice, "id": 2, "label": "Fear", "choices": ["Joy", "Sadness"]},
        ],
    )
    lines(
        root / "Emotion Classification/Emotion_Classification_Finentity.jsonl",
        [
            {
                **choice,
                "id": 0,
                "label": "Negative",
                "token_length": 9,
                "choices": ["Positive", "Neutral", "Negative"],
            }
        ],
    )
    texts = [{"index": index, "context": f"text {index}"} for index in range(30)]
    detection = {"text": texts, "label": ["joy", "fear"], "length": 30}
    lines(
        root / "Emotion Detection/Emotion_Detection.jsonl",
        [
            {**detection, "ground_truth": 12},
            {**detection, "ground_truth": 1},
            {**detection, "ground_truth": 30},
        ],
    )
    question = {"problem": "What helped Ann?", "source": "paper", "context": FILLER}
    lines(
        root / "Emotion QA/Emotion_QA.jsonl",
        [
            {**question, "number": "File1-1", "answer": "The well-known therapy, a pill"},
            {**question, "number": 2, "answer": ""},
        ],
    )
    said = [
        {"role": role, "context": f"{role} {i}"}
        for i in range(5)
        for role in ("Client", "Counselor")
    ]
    stages = [{"stage": f"s{i}", "conversations": said} for i in range(3)]
    stages.append({"stage": "s3", "conversations": said[:1]})
    lines(
        root / "Emotion Conversation/Emotion_Conversations.jsonl",
        [{"id": 1, "description": "d", "stages": stages}],
    )
    report = {
        "id": 1,
        "case_description": ["A man.", "He slept badly."],
        "consultation_process": "Four talks.",
        "experience_and_reflection": "",
    }
    summary = {
        "causes": ["Work", "grief"],
        "symptoms": "Bad sleep",
        "treatment_process": "Talks",
        "characteristics_of_illness": "Mild",
        "treatment_effect": "Good",
    }
    lines(root / "Emotion Summary/Emotion_Summary.jsonl", [{**report, **summary}, report])
    lines(root / "Emotion Summary/Emotion_Summary_origin.jsonl", [report])
    situations = {
        "emotions": [
            {"name": "Anger", "factors": [{"name": "f", "scenarios": ["Someone is late.", ""]}]}
        ]
    }
    folder = root / "Emotion Expression"
    folder.mkdir()
    (folder / "Emotion_Expression_Situations.json").write_text(json.dumps(situations))
    panas = [{"name": "PANAS", "questions": {"1": "Interested", "2": "Distressed"}}]
    (folder / "Emotion_Expression_Questionnaires.json").write_text(json.dumps(panas))
    return root


def test_the_six_tasks(root: Path) -> None:
    asked = Asked("longemotion", root)
    counts = {name: len(asked.of(name)) for name in asked.benchmark.tasks}
    assert counts == {
        "classification": 3,
        "detection": 2,
        "qa": 1,
        **{f"conversation{n}": 3 for n in (1, 2, 3)},
        "conversation4": 0,
        "summary": 1,
        "expression": 1,
    }
    assert [one.truth for one in asked.of("classification")] == ["Joy & Pride", "Joy", "Negative"]
    reasons = [reason for reason, _ in asked.left_out]
    assert reasons == [
        *("label outside its choices", "no text of the right index"),
        *("no question or no answer", "no reply follows", "no reply follows", "no reply follows"),
        *("no report or no summary", "no situation"),
    ]
    second = asked.of("conversation2")
    # Of five turns of the client, those after 1/4, 1/2 and 3/4 are the 2nd, 3rd and 4th.
    assert [one.truth for one in second] == ["Counselor 1", "Counselor 2", "Counselor 3"]
    text = second[0].turns[-1].text
    assert text.count("Client 4") == 1
    assert "Client: Client 1\n\nWrite your next reply" in text
    assert asked.of("summary")[0].truth.startswith("Causes: Work grief\nSymptoms: Bad sleep\n")
    assert "Interested, Distressed" in asked.of("expression")[0].turns[-1].text
    one = Asked("longemotion", root, task="qa")
    assert one.made.unlike_published() == ["1 rows here, 120 published"]


def test_passages_replace_the_long_text(root: Path) -> None:
    full = Asked("longemotion", root, task="classification").questions[0].turns[-1].text
    short = Asked("longemotion", root, task="classification", rag="true", top="1", size="32")
    text = short.questions[0].turns[-1].text
    assert len(text.split()) < 80 < len(full.split())
    assert "Ann was glad" in text
    assert "Joy, Joy & Pride, Anger" in text
    talk = Asked("longemotion", root, task="conversations", rag="true", top="1", size="8")
    last = talk.of("conversation3")[0].turns[-1].text
    assert "Client: Client 1\n\nWrite" in last
    with pytest.raises(ConfigError, match="top is '0'"):
        Asked("longemotion", root, top="0")


def test_readings_of_choices_and_indices(root: Path) -> None:
    asked = Asked("longemotion", root)
    answers = (
        '```json\n{"Emotion": "Joy & Pride"}\n```',
        "joy",
        '{"Emotion": "negative"}',
    )
    assert asked.score("classification", answers)["metrics"]["war"]["value"] == 1
    # Only the first one is an exact label in a JSON object.
    assert asked.official("classification", answers) == {"accuracy": pytest.approx(1 / 3)}
    answers = ('Text 12 it is:\n```json\n{"index": 12}\n```', '{"index": "1"}')
    assert asked.score("detection", answers)["metrics"]["war"]["value"] == 1
    # The release compares the text "1" with the number 1.
    assert asked.official("detection", answers) == {"accuracy": 1 / 2}
    rows = asked.rows("detection", ("12 or 13", "I do not know"))
    assert [row["status"] for row in rows] == ["malformed", "refused"]


def test_questions_by_token_f1(root: Path) -> None:
    asked = Asked("longemotion", root)
    answer = ("<think>Hm.</think>well-known pill",)
    # SQuAD joins both parts of "well-known", the release parts them.
    assert asked.score("qa", answer)["average"]["value"] == pytest.approx(2 * 2 / (2 + 3), abs=1e-6)
    assert asked.official("qa", answer) == {"f1": pytest.approx(2 * 3 / (3 + 4))}
    assert asked.score("qa", ("I do not know",))["statuses"]["ok"] == 1


def test_judged_tasks_have_an_overlap_and_their_judges(root: Path) -> None:
    asked = Asked("longemotion", root)
    specs = asked.benchmark.specs()
    assert [len(specs[name]) for name in ("conversation1", "summary", "expression")] == [4, 16, 6]
    assert specs["conversation2"][1].params["name"] == "deep_needs_exploration"
    assert (specs["summary"][0].params["low"], specs["summary"][0].params["high"]) == (1, 5)
    pytest.importorskip("rouge_score")
    block = asked.score("conversation1", ("Counselor 1", "x", "I understand."))
    assert block["scored"]["token_f1"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert block["scored"]["systematic_assessment"]["unscored"] == 3


def test_a_dry_run_and_a_run_without_clips(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_zero_shot("eval/texts/longemotion.py", ["--data", str(root), "--dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "1 row left out (no situation)" in told
    assert "conversation3: 3 questions" in told
    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    arguments = [
        *("eval/texts/longemotion.py", "--data", str(root), "--model", str(model)),
        *("--output-dir", str(out), "--option", "task=classification", "--option", "rag=true"),
        *("--option", "top=1", "--option", "size=8", "--generation.max_new_tokens=4"),
        *("--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    assert read_results(out).tasks["classification"]["n"] == 3


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.from_regex(r"```json\s*\{.{0,20}\}\s*```")))
def test_any_answer_has_a_json_value_or_none(text: str) -> None:
    json_value(text, "Emotion")


def test_deep_json_is_no_answer() -> None:
    assert json_value("[" * 100_000, "Emotion") is None
