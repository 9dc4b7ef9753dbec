"""EmoS on a miniature: workbooks of raters, their votes, and what they agree on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from openpyxl import Workbook

from mmemo.errors import DataError
from mmemo.evaluation.copy_check import check_copy
from tests.content.miniature import ask
from tests.media_files import write_clip

FILE = "eval/graded/emos.py"
BASE = Path("datasets/data-final")
EN = ("Sr No.", "Utterance", "Speaker", "Dialogue_ID", "Utterance_ID", "Basic7", "GoEmotions")
ZH = ("video_id", "clip_id", "text", "label", "basic 7 label", "goemotion")


def book(path: Path, header: tuple[str, ...], *lines: tuple[object, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Workbook()
    sheet = made.active
    assert sheet is not None
    for line in (header, *lines):
        sheet.append(list(line))
    made.save(path)


def release(root: Path) -> Path:
    """One part of each set, with the clips of two utterances each."""
    meld = root / BASE / "datasets/newdataset-MELD/Annotations-3000"
    votes = (("Joy", "joy, excitement"), ("Neutral", "joy"), ("joy", "['joy', 'love']"))
    ties = (("Anger", "anger"), ("Sadness", "unsure"), (None, "anger/annoyance"))
    odd = (("Bored", None), (None, None), (None, "unsure"))
    for number, rater in enumerate("abc"):
        book(
            meld / f"{rater}train_sent_emo.xlsx",
            EN,
            (1, "Oh!", "Joey", 0, 0.0, *votes[number]),
            (2, "Hm.", "Ross", 0, 1, *ties[number]),
            (3, "Ah.", "Ross", 0, 2, *odd[number]),
        )
    book(meld / "combined_all.xlsx", ("nothing",), (1,))
    book(meld / "analysis_outputs/goemotion/goemotion_combined.xlsx", ("nothing",), (1,))
    sims = root / BASE / "datasets/ch-simsv2s/First-2500"
    for rater in ("a1", "a2", "a3"):
        book(sims / f"{rater}.xlsx", ZH, ("video_0001", 1, "好", 0.6, "Joy", "joy"))
    for name in ("dia0_utt0", "dia0_utt1"):
        write_clip(root / BASE / f"English/train_splits/{name}.mp4", 0.5, fps=4, size=(32, 32))
    write_clip(root / BASE / "Chinese/Raw/video_0001/0001.mp4", 0.5, fps=4, size=(32, 32))
    return root


def test_votes_are_counted(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "emos"))
    found = asked.by_id()
    assert set(found) == {
        *(f"emos-en-dia0_utt{n}{end}" for n in (0, 1) for end in ("", "-fine")),
        *("emos-zh-video_0001-1", "emos-zh-video_0001-1-fine"),
    }
    first, tie = found["emos-en-dia0_utt0"], found["emos-en-dia0_utt1"]
    assert (first.truth, first.extra["votes"]) == ("Joy", {"Joy": 2, "Neutral": 1})
    assert [one.sample.group["agreement"] for one in (first, tie)] == ["most", "tie"]
    assert (tie.truth, tie.extra["votes"]) == ("Anger", {"Anger": 1, "Sadness": 1})
    assert first.turns[-1].text.startswith("<video><audio><face>")
    fine = found["emos-en-dia0_utt0-fine"]
    assert (fine.truth, fine.extra["votes"]) == (["joy"], {"joy": 3, "excitement": 1, "love": 1})
    assert found["emos-en-dia0_utt1-fine"].truth == ["anger"]
    chinese = found["emos-zh-video_0001-1"]
    assert chinese.sample.group["agreement"] == "all"
    assert chinese.sample.media["video"].path == f"{BASE}/Chinese/Raw/video_0001/0001.mp4"
    reasons = [(one.row, one.reason, one.detail) for one in asked.made.excluded]
    assert reasons == [
        ("dia0_utt2 of atrain_sent_emo.xlsx", "vote outside the set", "Bored"),
        ("emos-en-dia0_utt2", "no basic votes", ""),
        ("emos-en-dia0_utt2-fine", "no fine votes", ""),
    ]


def test_scores(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "emos"), language="en")
    texts = {
        "emos-en-dia0_utt0": "Joy",
        "emos-en-dia0_utt1": "Sadness",
        "emos-en-dia0_utt0-fine": "joy and excitement",
        "emos-en-dia0_utt1-fine": "a bit of everything",
    }
    blocks = asked.scores(asked.rows(texts))
    assert blocks["basic7"]["metrics"]["war"]["value"] == 0.5
    assert blocks["basic7"]["slices"]["agreement"]["most"]["metrics"]["war"]["value"] == 1
    # Votes (Joy 2, Neutral 1) and (Anger 1, Sadness 1): the tie has no plurality.
    votes = {name: one["value"] for name, one in blocks["basic7"]["scored"].items()}
    assert (votes["plurality_accuracy"], votes["plurality_kept"]) == (1, 0.5)
    # Above 1/7: Joy and Sadness are named, Neutral and Anger are not.
    assert votes["macro_f1"] == 0.5
    said, rest = 0.95 + 0.05 / 7, 0.05 / 7
    first_kl = 2 / 3 * math.log(2 / 3 / said) + 1 / 3 * math.log(1 / 3 / rest)
    tie_kl = 0.5 * math.log(0.5 / rest) + 0.5 * math.log(0.5 / said)
    assert votes["kl"] == pytest.approx((first_kl + tie_kl) / 2, abs=1e-5)
    # joy: 1 hit; excitement: 1 too many; anger: 1 missed.
    assert blocks["goemotions"]["scored"]["micro_f1"]["value"] == 0.5
    assert blocks["goemotions"]["statuses"]["malformed"] == 1


def test_columns_of_other_names(tmp_path: Path) -> None:
    root = release(tmp_path / "emos")
    with pytest.raises(DataError, match=r"no column named like 'feeling'.*--option basic="):
        ask(FILE, root, basic="feeling")
    assert len(ask(FILE, root, language="zh", basic="basic 7 label").questions) == 2
    (root / BASE / "datasets/ch-simsv2s/First-2500/a1.xlsx").write_bytes(b"PK")
    with pytest.raises(Exception, match="cannot be read as a table"):
        ask(FILE, root, language="zh")


def test_a_dry_run(tmp_path: Path) -> None:
    report = check_copy(FILE, [str(release(tmp_path / "emos"))], {})
    assert (report.questions, len(report.excluded), report.blind, report.silent) == (6, 3, (), ())
