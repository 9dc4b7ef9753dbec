"""EmoVoice-DB on a miniature: buckets, missing speech, and likeness by a model's own encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.copy_check import check_copy
from mmemo.evaluation.results import read_results
from tests.content.miniature import ask
from tests.evaluation.world import save_model
from tests.media_files import write_wav

FILE = "eval/spoken/emovoice_tts.py"
ADAPTER = "data/spoken/emovoice.py"
EMOTIONS = ("angry", "happy", "Sad", "surprised", "fearful", "neutral")


def key(place: int) -> str:
    return f"gpt4o_{place}_{EMOTIONS[place].lower()}_ash"


def release(root: Path) -> Path:
    """Six lines and two bad ones; a system that read all but one line, its first just like the
    release."""
    root.mkdir()
    lines = [
        {
            "key": key(place),
            "source_text": f"Line {place}.",
            "emotion": emotion,
            "emotion_text_prompt": "" if place == 5 else f"Sounding {emotion.lower()}.",
            "target_wav": f"/some/where/audio/{emotion.lower()}/{key(place)}.wav",
            "answer_cosyvoice_speech_token": [1, 2],
        }
        for place, emotion in enumerate(EMOTIONS)
    ]
    lines += [{**lines[0], "key": "x_9_bored_ash", "emotion": "bored"}, {**lines[0], "key": ""}]
    (root / "test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    for place, emotion in enumerate(EMOTIONS):
        name = f"audio/{emotion.lower()}/{key(place)}.wav"
        write_wav(root / name, 0.4, tone=200.0 + 150 * place)
        if place != 4:
            tone = 200.0 if place == 0 else 2000.0
            write_wav(root / f"generated/A/{key(place)}.wav", 0.4, tone=tone)
    return root


def test_lines_and_buckets(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "db"), split="test", generated="generated/A")
    assert [one.truth for one in asked.questions] == ["angry", "happy", "sad", "other", "neutral"]
    first = asked.questions[0].sample
    assert first.media["audio"].path == f"generated/A/{key(0)}.wav"
    assert first.columns["target"] == f"audio/angry/{key(0)}.wav"
    assert first.columns["other"] == f"audio/happy/{key(1)}.wav"
    assert asked.questions[-1].sample.columns["other"] == f"audio/angry/{key(0)}.wav"
    assert first.group == {"emotion": "angry", "voice": "ash"}
    assert asked.made.missing == (f"generated/A/{key(4)}.wav",)
    assert [(one.row, one.reason) for one in asked.made.excluded] == [
        ("emovoice-x_9_bored_ash", "label outside the set"),
        ("line 8", "no key"),
    ]
    whole = ask(FILE, tmp_path / "db", split="test", generated="target")
    assert [one.sample.media["audio"].path for one in whole.questions][4].startswith(
        "audio/fearful"
    )
    with pytest.raises(DataError, match="put the generated speech there"):
        ask(FILE, tmp_path / "db", split="test", generated="generated/B")
    with pytest.raises(ConfigError, match="a folder inside"):
        ask(FILE, tmp_path / "db", split="test", generated="../A")


def test_recall_over_five_buckets(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "db"), split="test", generated="target")
    texts = ("Angry.", "neutral", "sadness", "fearful", "surprised", "I have no idea what to say")
    rows = asked.rows(dict(zip(asked.by_id(), texts, strict=True)))
    assert [row["answer"] for row in rows[3:5]] == ["other", "other"]
    block = asked.scores(rows)["emotion"]
    # Recalls: angry 1, happy 0, sad 1, other 2/2, neutral 0.
    assert block["metrics"]["uar"]["value"] == pytest.approx(3 / 5)
    assert block["official"] == {"recall": pytest.approx(3 / 5)}
    assert block["slices"]["emotion"]["surprised"]["metrics"]["war"]["value"] == 1
    lost = [{**row, "status": "malformed", "answer": None} for row in rows]
    # A classifier always says something: other is right then.
    assert asked.scores(lost)["emotion"]["official"] == {"recall": pytest.approx(1 / 5)}


def test_descriptions_are_for_captioning(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "db"), split="test", generated="target", ask="description")
    assert asked.questions[0].sample.answer is None or len(asked.questions) == 5
    assert "no description" in {one.reason for one in asked.made.excluded}
    assert asked.made.samples[0].answer == "Sounding angry."


def test_a_model_listens(tmp_path: Path) -> None:
    root = release(tmp_path / "db")
    model = save_model(tmp_path / "model")
    out = tmp_path / "out"
    arguments = [
        *(FILE, "--data", str(root), "--model", str(model), "--output-dir", str(out)),
        *("--option", "generated=generated/A", "--generation.max_new_tokens=3"),
        *("--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    result = read_results(out)
    rows = result.rows()
    own = [row["measured"] for row in rows]
    assert own[0]["similarity"] == pytest.approx(1, abs=1e-6)  # the same sound
    assert own[0]["similarity_to_other"] < 1
    assert all(one["similarity"] < own[0]["similarity"] for one in own[1:])
    scored = result.tasks["emotion"]["scored"]
    mean = sum(one["similarity"] for one in own) / 5
    assert scored["similarity"]["value"] == pytest.approx(mean, abs=1e-6)
    assert result.values["excluded"]["rows"]["missing file"] == 1
    # A second run answers and measures the same.
    before = (out / "predictions.jsonl").read_bytes()
    done = CliRunner().invoke(app, ["eval", str(out / "config.yaml")])
    assert done.exit_code == 0, done.output
    assert (out / "predictions.jsonl").read_bytes() == before


def test_a_dry_run(tmp_path: Path) -> None:
    options = {"generated": "generated/A"}
    report = check_copy(FILE, [str(release(tmp_path / "db"))], options)
    assert (report.questions, len(report.missing), len(report.excluded)) == (5, 1, 2)
