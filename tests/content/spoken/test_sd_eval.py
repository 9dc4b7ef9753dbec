"""SD-Eval on a miniature: references, what a judge is told, and lost ratings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.errors import DataError
from mmemo.evaluation.copy_check import check_copy
from mmemo.evaluation.scorer import score_with
from mmemo.statistics import BootstrapConfig
from tests.content.miniature import ask
from tests.media_files import write_wav

FILE = "eval/spoken/sd_eval.py"
REPLIES = ["That is great news!", "How lovely.", "Tell me more!", "I am glad.", "Congratulations!"]


def line(utt: str, info: str, **more: Any) -> dict[str, Any]:
    return {
        "wav_path": f"RAVDESS-Speech/Actor_01/{utt}.wav",
        "transcript": "I got the job",
        "utt_id": utt,
        "target": [{"reply": reply, "reply_emotion": "happy"} for reply in REPLIES],
        "info": info,
        "dataset_name": "RAVDESS",
        **more,
    }


def release(root: Path) -> Path:
    """The emotion part and the surroundings; others are not in every copy."""
    (root / "data").mkdir(parents=True)
    emo = [
        line("1", "happy"),
        line("2", "Sad"),
        line("3", "sad", target=[]),
        line("4", ""),
        line("1", "happy"),
        line("6", "fear"),
    ]
    (root / "data/test-emo.json").write_text(json.dumps(emo), encoding="utf-8-sig")
    env = [line("0_0", "driving", wav_path="test-env/0_0.wav", transcript="Where is it?")]
    (root / "data/test-env.json").write_text(json.dumps(env))
    for number in (1, 2):
        write_wav(root / f"audio_data/RAVDESS-Speech/Actor_01/{number}.wav", 0.1)
    write_wav(root / "test-env/0_0.wav", 0.1)
    return root


def test_what_is_asked_and_known(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "sd"))
    found = asked.by_id()
    assert list(found) == ["sd-eval-emo-1", "sd-eval-emo-2", "sd-eval-env-0_0"]
    first = found["sd-eval-emo-1"]
    assert first.truth == REPLIES
    # The words and the emotion are for the judge; the model must hear them.
    assert "job" not in first.turns[-1].text
    assert first.extra["facts"].endswith("The speaker's emotion: happy")
    assert found["sd-eval-emo-2"].sample.group == {"info": "sad", "source": "RAVDESS"}
    assert found["sd-eval-env-0_0"].sample.media["audio"].path == "test-env/0_0.wav"
    assert [(one.row, one.reason) for one in asked.made.excluded] == [
        ("sd-eval-emo-3", "incomplete"),
        ("sd-eval-emo-4", "incomplete"),
        ("sd-eval-emo-1", "listed twice"),
    ]
    assert asked.made.missing == ("audio_data/RAVDESS-Speech/Actor_01/6.wav",)
    with pytest.raises(DataError):
        ask(FILE, tmp_path / "sd" / "data")


def test_a_part_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test-acc\.json"):
        ask(FILE, release(tmp_path / "sd"), subset="acc")


def test_references_and_ratings(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "sd"), subset="emo")
    text, judge = asked.benchmark.tasks["emo"].scorers
    rows = asked.rows({"sd-eval-emo-1": "How lovely.", "sd-eval-emo-2": ""})
    replies = [json.dumps({"score": 9, "reason": ""}), "no rating"]
    judged = [{**row, "verdicts": {"judge": one}} for row, one in zip(rows, replies, strict=True)]
    rated = score_with([judge], judged, BootstrapConfig(resamples=100))
    assert (rated["judge"]["value"], rated["judge_read"]["value"]) == (5.0, 9.0)
    assert rated["judge_failed"]["value"] == 0.5
    for library in ("sacrebleu", "rouge_score", "nltk"):
        pytest.importorskip(library)
    found = score_with([text], rows, BootstrapConfig(resamples=100))
    # The best of five references is met once; an empty reply meets none.
    assert found["rouge_l"]["value"] == 0.5


def test_a_dry_run(tmp_path: Path) -> None:
    report = check_copy(FILE, [str(release(tmp_path / "sd"))], {"subset": "emo"})
    assert (report.questions, len(report.excluded), len(report.missing)) == (2, 3, 1)
    assert report.unlike == ("2 rows here, 1289 published",)
