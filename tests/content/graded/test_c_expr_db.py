"""C-EXPR-DB on a miniature: segments, compound labels and their parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from mmemo import content
from mmemo.errors import DataError
from mmemo.evaluation.copy_check import check_copy
from tests.content.miniature import ask
from tests.media_files import write_clip

FILE = "eval/graded/c_expr_db.py"
TIMES = "Begin Time - hh:mm:ss.ms,End Time - hh:mm:ss.ms,Duration - ss.msec"
HEADER = f"{TIMES},Fearfully Surprised,Happily Surprised,Sadly Angry,Other"
ONE = (
    "00:00:00.000,00:00:00.400,0.4,1,,,",
    "00:00:00.400,00:00:00.800,0.4,,Happily Surprised,,",
    "00:00:01.000,00:00:01.200,0.2,,,1,",
    "00:00:01.200,00:00:01.300,0.1,0,0,0,1",
    "00:00:01.300,00:00:01.400,0.1,1,1,,",
    "00:00:01.400,00:00:01.500,0.1,,,,",
    "00:00:01.600,00:00:01.500,0.1,1,,,",
    "soon,00:00:01.500,0.1,1,,,",
)


def release(root: Path) -> Path:
    """One video whose annotation has a byte order mark, one by tabs, and one that is missing."""
    (root / "annotations").mkdir(parents=True)
    (root / "fold.csv").write_text("path,label\nv1,0\n")
    text = "\r\n".join([HEADER, *ONE])
    (root / "annotations/v1.csv").write_text(text, encoding="utf-8-sig")
    tabs = "\n".join([HEADER.upper(), "00:00:00.000,00:00:00.500,0.5,,,1,"]).replace(",", "\t")
    (root / "annotations/v2.csv").write_text(tabs)
    (root / "annotations/v3.csv").write_text("\n".join([HEADER, ONE[0]]))
    for name in ("v1", "v2"):
        write_clip(root / f"videos/{name}.mp4", 2.0, fps=4, size=(32, 32), audio=False)
    return root


def test_segments(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "c"))
    found = [
        (one.truth, ref.path, ref.start, ref.end)
        for one in asked.questions
        for ref in [one.sample.media["face"]]
    ]
    assert found == [
        ("Fearfully Surprised", "videos/v1.mp4", 0.0, 0.4),
        ("Happily Surprised", "videos/v1.mp4", 0.4, 0.8),
        ("Sadly Angry", "videos/v1.mp4", 1.0, 1.2),
        ("Other", "videos/v1.mp4", 1.2, 1.3),
        ("Sadly Angry", "videos/v2.mp4", 0.0, 0.5),
    ]
    assert [one.reason for one in asked.made.excluded] == [
        *("several classes", "no class", "no span", "no span"),
    ]
    assert asked.made.missing == ("videos/v3.mp4",)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Fearfully surprised", "Fearfully Surprised"),
        ("surprise and fear", "Fearfully Surprised"),
        ("The face is happily surprised.", "Happily Surprised"),
        ("sad and angry", "Sadly Angry"),
        ("other", "Other"),
        ("surprised", None),
        ("fearfully surprised or sadly angry", None),
    ],
)
def test_compounds_are_named_in_several_forms(tmp_path: Path, text: str, label: str) -> None:
    asked = ask(FILE, release(tmp_path / "c"))
    assert asked.rows(lambda _: text)[0]["answer"] == label


def test_weighted_f1_by_hand(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "c"))
    texts = ("fearfully surprised", "sadly angry", "sadly angry", "other", "no clue at all, sorry")
    rows = asked.rows(dict(zip(asked.by_id(), texts, strict=True)))
    block = asked.scores(rows)["compound"]
    # F1: fearfully 1 (of 1), happily 0 (1), sadly angry 2*1/(2+2) (2), other 1 (1).
    assert block["metrics"]["weighted_f1"]["value"] == pytest.approx((1 + 0 + 2 * 0.5 + 1) / 5)
    # Without the answer that names no class: sadly angry 2*1/(1+2).
    assert block["official"] == pytest.approx({"answered": 0.8, "weighted_f1": (1 + 2 / 3 + 1) / 4})
    truth = [row["truth"] for row in rows[:4]]
    given = [row["answer"] for row in rows[:4]]
    assert block["official"]["weighted_f1"] == f1_score(truth, given, average="weighted")


def test_parts(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "c"), ask="parts")
    assert [one.truth for one in asked.questions] == [
        ["fear", "surprise"],
        ["happiness", "surprise"],
        *([["sadness", "anger"]] * 2),
    ]
    block = asked.scores(asked.rows(lambda _: "surprise, fear"))["parts"]
    assert block["scored"]["exact_match"]["value"] == 0.25
    pairs = content.load("data/graded/c_expr_db.py:PAIRS")
    assert len({frozenset(pair) for pair in pairs.values()}) == 7


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/fold.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="no CSV file with the column"):
        ask(FILE, tmp_path / "c")


def test_a_dry_run(tmp_path: Path) -> None:
    report = check_copy(FILE, [str(release(tmp_path / "c"))], {})
    assert (report.questions, len(report.excluded), report.broken) == (5, 4, ())
