"""MME-Emotion and EMER: what a judge is asked about their answers, and what its replies make."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.evaluation.results import compare, read_results
from mmemo.evaluation.scorers.judging import judged
from mmemo.evaluation.scoring import score_rows
from mmemo.rewards.judge.openai_client import EndpointConfig
from mmemo.statistics import BootstrapConfig
from tests.content import suite_releases as releases
from tests.content.suite_releases import answered, asked
from tests.evaluation.world import save_model
from tests.media_files import write_clip
from tests.rewards.stub_judge import Reply, judge_server

QUICK = BootstrapConfig(resamples=100)


def test_mme_emotion(tmp_path: Path) -> None:
    releases.mme_emotion(tmp_path / "data")
    benchmark, questions, excluded, missing = asked(
        "eval/judged/mme_emotion.py", tmp_path / "data", tmp_path
    )
    assert excluded == {"label outside the set": 1, "no clip or label": 1}
    assert missing == ("IEMOCAP/video/c.mp4",)
    assert [(one.task, one.truth) for one in questions] == [
        ("ER-Lab", "Anger"),
        ("ML-ER", "anger,surprise"),
    ]
    text = questions[0].turns[-1].text
    assert text.startswith("<video><audio>What emotion does the person")
    assert text.endswith("Choose from: Neutral, Anger, Surprise.")
    rows = answered(questions, lambda question: "<think>She shouts.</think>anger")

    def script(request: dict[str, Any], number: int) -> Reply:
        user = request["messages"][1]["content"]
        assert "She shouts." in user.splitlines()[-2]  # the judge sees the reasoning
        steps = "<score>Step 1: right</score>"
        if "what can be heard: She shouts." in user:
            steps = '{"steps": [{"step": "shouts", "right": 1}, {"step": "anger", "right": 0}]}'
        return Reply(steps)

    with judge_server(script) as server:
        config = EndpointConfig(base_url=server.url, model="m", max_retries=0)
        rows, specs = judged(rows, benchmark.specs(), tmp_path, config)
    found = score_rows(rows, QUICK, specs)
    lab = {name: one["value"] for name, one in found["ER-Lab"]["scored"].items()}
    assert (lab["mme_recognition"], lab["mme_reasoning"], lab["mme_cot"]) == (0, 1, 0.5)
    assert lab["mme_failed"] == 0
    assert found["ML-ER"]["scored"]["mme_failed"]["value"] == 1
    official = benchmark.tasks["ML-ER"].official
    assert official is not None
    assert official([row for row in rows if row["task"] == "ML-ER"]) == {"mme_dropped": 1}


def test_emer(tmp_path: Path) -> None:
    releases.emer(tmp_path / "data")
    file = "eval/judged/emer.py"
    benchmark, questions, excluded, missing = asked(
        file, tmp_path / "data", tmp_path, table="EMER.csv"
    )
    assert excluded == {"no clip or description": 1}
    assert missing == ("video/sample_4.mp4",)
    assert [one.sample.media["video"].path for one in questions] == [
        "video/sample_1.mp4",
        "video/sample_2.avi",
    ]
    assert questions[0].truth == "She frowns, and shouts.\nShe is angry."
    rows = answered(questions, lambda question: "She frowns. She is angry.")

    def script(request: dict[str, Any], number: int) -> Reply:
        clues = "clues" in request["messages"][0]["content"]
        angry = "the emotions: ['angry']" in request["messages"][1]["content"]
        rating = f'{{"score": {8 if clues else 6}, "reason": ""}}'
        return Reply(rating if angry else "3 of 10")

    with judge_server(script) as server:
        config = EndpointConfig(base_url=server.url, model="m", max_retries=0)
        rows, specs = judged(rows, benchmark.specs(), tmp_path, config)
        assert len(server.seen) == 4
    found = score_rows(rows, QUICK, specs)["emer"]["scored"]
    assert found["clue_overlap"]["value"] == pytest.approx((8 + 1) / 2)
    assert found["label_overlap"]["value"] == pytest.approx((6 + 1) / 2)
    official = benchmark.tasks["emer"].official
    assert official is not None
    assert official(rows) == {
        "clue_overlap": 5.5,
        "clue_overlap_dropped": 0,
        "label_overlap": 4.5,
        "label_overlap_dropped": 0,
    }
    _, second, _, _ = asked(file, tmp_path / "data", tmp_path, table="EMER-v2.csv")
    assert [one.truth for one in second] == ["She is angry."]


def test_a_run_without_a_judge_and_then_with_one(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    releases.emer(root)
    (root / "EMER-v2.csv").unlink()
    clip = write_clip(root / "video/sample_1.mp4", 0.5, size=(32, 32))
    shutil.copy(clip, root / "video/sample_2.avi")
    model = save_model(tmp_path / "model")
    arguments = [
        *("eval/judged/emer.py", "--data", str(root), "--model", str(model)),
        *("--output-dir", str(out), "--generation.max_new_tokens=4", "--decode.workers=1"),
        "--bootstrap.resamples=100",
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "No judge is given, so clue_overlap, label_overlap are left out" in told
    assert "scored" not in read_results(out).main
    with judge_server(lambda request, number: Reply('{"score": 4, "reason": ""}')) as server:
        judge = [f"--benchmark.judge.base_url={server.url}", "--benchmark.judge.model=m"]
        done = CliRunner().invoke(app, ["eval", *arguments, *judge])
        assert done.exit_code == 0, done.output
        asked_before = len(server.seen)
        assert "clue_overlap (official)" in done.output
        done = CliRunner().invoke(app, ["eval", str(out / "config.yaml")])
        assert done.exit_code == 0, done.output
        assert len(server.seen) == asked_before > 0
    result = read_results(out)
    assert result.main["headline"] == "clue_overlap"
    assert result.main["scored"]["clue_overlap"]["value"] == 4
    assert result.main["official"]["label_overlap"] == 4
    assert result.main["scorers"][0]["params"]["endpoint"]["model"] == "m"
    other = tmp_path / "other"
    shutil.copytree(out, other)
    (found,) = compare(out, other)  # nothing is asked: the judge is gone
    assert found.tasks["emer"]["scored"]["clue_overlap"]["value"] == 0
