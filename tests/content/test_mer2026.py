"""MER2026: its three tracks, the files to submit, and reward models on its preferences."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmemo import content, files
from mmemo.data.adapter import AdaptedManifest, write_manifest
from mmemo.evaluation.challenge.preferences import judged_rows, preference_numbers
from mmemo.evaluation.challenge.submission import write_submission
from mmemo.evaluation.scorers.released import preferences
from mmemo.evaluation.scoring import score_rows
from mmemo.rewards.judge.rubric import Grades, JudgeItem
from mmemo.statistics import BootstrapConfig
from tests.content import releases
from tests.content.releases import answered, asked, scored

TRACK3 = "eval/challenge/mer2026_track3.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return releases.mer2026(tmp_path / "mer2026")


def make(root: Path, **options: str) -> AdaptedManifest:
    return write_manifest("data/mer2026.py", root, root.parent / "out.jsonl", options)


def test_track_1_asks_for_the_person_and_among_candidates_for_the_listener(root: Path) -> None:
    made = make(root)
    assert {s.sample_id: s.truth.label for s in made.samples} == {
        "mer2026-1-s1": "happy",
        "mer2026-1-s2": "worried",
    }
    assert [(one.row, one.reason) for one in made.excluded] == [
        ("mer2026-1-s3", "label outside the set")
    ]
    first = made.samples[0]
    assert (first.media["video"].path, first.media["audio"].path) == (
        "video/s1.mp4",
        "audio/s1.wav",
    )
    assert first.transcript == "太好了"
    questions = asked("eval/challenge/mer2026_track1.py", root)
    assert questions[0].turns[-1].text.startswith('<video><audio><face>The person says: "太好了"\n')
    block = scored("eval/challenge/mer2026_track1.py", answered(questions, lambda _: "happy"))
    assert block["emotion"]["official"] == {"waf": pytest.approx(1 / 3), "acc": 0.5}
    candidates = make(root, split="candidates")
    assert [s.sample_id for s in candidates.samples] == ["mer2026-1-s2", "mer2026-1-s1"]
    assert "listener" in candidates.samples[0].turns[0].text
    assert candidates.published == {"": 20000}


def test_track_2_has_lists_of_words(root: Path) -> None:
    made = make(root, track="2")
    assert made.samples[0].columns["gold"] == ["happy", "very excited"]
    assert [one.reason for one in made.excluded] == ["no labels"]
    questions = asked("eval/challenge/mer2026_track2.py", root)
    assert questions[0].truth == ["happy", "very excited"]


def test_track_3_leaves_ties_and_broken_pairs_out(root: Path) -> None:
    made = make(root, track="3")
    assert [s.columns["gold"] for s in made.samples] == ["a1", "a2", "a1"]
    assert made.samples[0].columns["a1"] == "She smiles, and laughs."
    assert made.samples[2].columns["a1"] == "Calm ."  # no placeholder of a clip
    assert [(one.reason, one.expected) for one in made.excluded] == [
        ("people found both equal", True),
        ("people found both equal", True),
        ("an empty description", False),
        ("label outside the set", False),
        ("two equal descriptions", False),
    ]
    turned = make(root, track="3", ties="keep", order="reversed")
    assert [s.columns["gold"] for s in turned.samples] == ["a2", "a1", "same", "same", "a2"]
    assert turned.samples[0].columns["a2"] == "She smiles, and laughs."
    assert turned.published is None
    pairs = make(root, track="3", form="pairs")
    assert [(s.chosen, s.rejected) for s in pairs.samples][:2] == [
        ("She smiles, and laughs.", "She cries."),
        ("He is glad.", "He is sad."),
    ]


def test_the_official_numbers_of_track_3_count_same_as_the_first(root: Path) -> None:
    questions = asked(TRACK3, root, {"ties": "keep"})
    assert [one.truth for one in questions] == ["a1", "a2", "same", "same", "a1"]
    texts = iter(["Same.", "A2 fits.", "I cannot say.", "neither a2 nor a1", "the first"])
    rows = answered(questions, lambda _: next(texts))
    # Read there as same, a2, same, a2 and same; on two classes as a1, a2 and a1.
    assert preferences(rows) == {
        "two_class_waf": 1.0,
        "two_class_acc": 1.0,
        "three_class_acc": pytest.approx(2 / 5),
        "three_class_waf": pytest.approx((2 / 3 + 2 * 2 / 5) / 5),
    }
    block = scored(TRACK3, rows)["preference"]
    assert block["official"]["two_class_acc"] == 1
    assert block["metrics"]["war"]["value"] == pytest.approx(1 / 5)  # only "A2 fits."


class StubJudge:
    """Grades by the words of a description."""

    def __init__(self, grades: dict[str, int | None]) -> None:
        self.grades, self.seen = grades, list[JudgeItem]()

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        self.seen += items
        found = [self.grades[one.completion.rstrip(".").split()[-1]] for one in items]
        return [None if grade is None else (grade,) * 4 for grade in found]  # type: ignore[list-item]


def test_a_reward_model_is_tested_on_preferences(root: Path) -> None:
    questions = asked(TRACK3, root)
    assert [one.truth for one in questions] == ["a1", "a2", "a1"]
    judge = StubJudge({"laughs": 5, "cries": 2, "sad": 3, "glad": 3, "Calm": 1, "": None})
    questions = [*questions[:2]]
    rows = judged_rows(judge, questions)
    assert [(row["answer"], row["score"]) for row in rows] == [("a1", 1.0), ("same", 0.5)]
    # It is told what is said, and nothing of the answer.
    assert judge.seen[0].facts == "- spoken words: 太好了"
    assert judge.seen[0].clip is not None
    assert judge.seen[0].clip.root == str(root)
    block = score_rows(rows, BootstrapConfig(resamples=100))["preference"]
    found = preference_numbers(block, rows)
    assert (found["accuracy"]["value"], found["accuracy_ties_half"]["value"]) == (0.5, 0.75)
    assert found["waf"]["value"] == pytest.approx(0.5)
    assert (found["ties"], found["ungraded"]) == (1, 0)
    # The released scorer would take a tie for the first description.
    assert preferences(rows)["two_class_acc"] == 0.5
    judge.grades["cries"] = None
    rows = judged_rows(judge, questions)
    assert [(row["status"], row["score"]) for row in rows] == [("malformed", 0.0), ("ok", 0.5)]


def test_the_script_tests_a_judge_from_the_folder_of_the_release(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = content.load_module("eval/challenge/mer2026_reward.py")
    judge = StubJudge({"laughs": 5, "cries": 2, "sad": 3, "glad": 4, "Calm": 1, "": 1})
    given: dict[str, Any] = {}

    def opened(values: dict[str, Any], where: str) -> StubJudge:
        given.update(values)
        return judge

    monkeypatch.setattr(script, "open_judge", opened)
    out = tmp_path / "out"
    pair = (root / "track3_emoprefer.csv").read_text().splitlines()[:4]
    (root / "track3_emoprefer.csv").write_text("\n".join(pair))
    arguments = [
        "--data",
        str(root),
        "--output-dir",
        str(out),
        "--judge",
        "model=runs/j",
        "batch_size=2",
    ]
    script.main(arguments)
    assert given == {"model": "runs/j", "batch_size": 2}
    found = json.loads((out / "preferences.json").read_text())
    assert found["accuracy"]["value"] == 1
    assert found["official"]["two_class_waf"] == 1
    with pytest.raises(SystemExit, match="error: track is"):
        script.main([*arguments, "--option", "track=4"])
    # Its answers are a run like any other: the file to submit is made of them.
    submit = content.load_module("eval/challenge/mer2026_submit.py")
    submit.main(
        ["--track", "3", "--data", str(root), "--run", str(out), "--output", str(out / "s.csv")]
    )
    with (out / "s.csv").open(encoding="utf-8", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert lines[0] == {"name": "s1", "a1": "Glad.", "a2": "Sad.", "preference": "a1"}
    assert lines[1]["preference"] == "a2"


def test_a_submission_has_every_candidate_in_order(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "track1.csv"
    run.mkdir()
    rows = [
        {"sample_id": "mer2026-1-s1", "status": "malformed", "answer": None, "key": "a"},
        {"sample_id": "mer2026-1-s2", "status": "ok", "answer": "worried", "key": "b"},
    ]
    files.write_rows(run / "predictions.jsonl", rows)
    submit = content.load_module("eval/challenge/mer2026_submit.py")
    arguments = ["--data", str(root), "--run", str(run), "--output", str(output)]
    submit.main(["--track", "1", *arguments])
    assert output.read_text() == "name,discrete\ns2,worried\ns1,neutral\n"
    assert "2 rows" in capsys.readouterr().out
    submit.main(["--track", "1", *arguments, "--fallback", "sad"])
    assert output.read_text().endswith("s1,sad\n")
    with pytest.raises(SystemExit, match="the run has no answer for any candidate"):
        submit.main(["--track", "2", *arguments])
    files.write_rows(
        run / "predictions.jsonl",
        [{"sample_id": "mer2026-2-s2", "status": "ok", "answer": "calm,\nsad", "key": "b"}],
    )
    submit.main(["--track", "2", *arguments])
    with output.open(encoding="utf-8", newline="") as handle:
        assert list(csv.reader(handle)) == [
            ["name", "openset"],
            ["s2", "[calm, sad]"],
            ["s1", "[neutral]"],
        ]
    with pytest.raises(SystemExit, match=r"predictions\.jsonl: cannot be read"):
        submit.main(["--track", "1", *arguments, "--run", str(tmp_path / "none")])


def test_a_submission_counts_what_it_fills_in(tmp_path: Path) -> None:
    made = write_submission(
        tmp_path / "out.csv",
        [{"id": name, "name": name} for name in "abc"],
        {"a": {"status": "refused", "answer": None}, "b": {"status": "ok", "answer": "sad"}},
        column="discrete",
        fallback="neutral",
    )
    assert (made.rows, made.missing, made.unreadable) == (3, ("c",), ("a",))
