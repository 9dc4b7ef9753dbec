"""BERSt on a miniature: strata, the label set, and word errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mmemo import content
from mmemo.errors import DataError, EvaluationError
from mmemo.evaluation.copy_check import check_copy
from tests.content.miniature import ask
from tests.media_files import write_wav

FILE = "eval/spoken/berst.py"
HEADER = (
    "file_name,user_id,age,current_language,first_language,gender,phone_model,affect,last_modified,"
    "phone_position,script,shout_level"
)
LINES = (
    "audio/shout_data_1.wav,7,30,en,fr,Female,X,anger,d,Near the body,the cat waltzed,no shout",
    'audio/shout_data_2.wav,7,30,en,fr,Female,X,Joy ,d,"2 m away, in a bag",red lamps,raised voice',
    "audio/shout_data_3.wav,9,41,en,en,male,Y,HAPPINESS,d,On the other side of the room,,shout",
    "audio/shout_data_4.wav,9,41,en,en,male,Y,sadness,d,In a different room,odd socks,shout",
    "audio/shout_data_5.wav,9,41,en,en,male,Y,boredom,d,In a different room,odd socks,shout",
    "audio/shout_data_6.wav,9,41,en,en,male,Y,fear,d,Somewhere,odd socks,shout",
    "audio/shout_data_1.wav,7,30,en,fr,Female,X,anger,d,Near the body,the cat waltzed,no shout",
)


def release(root: Path) -> Path:
    """The folder of the release with two parts; one clip is missing, one label is unknown."""
    for part, lines in {"test": LINES, "train": LINES[:1]}.items():
        folder = root / "berst-data" / part
        folder.mkdir(parents=True)
        text = "\r\n".join([HEADER, *lines]) + "\r\n"
        (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")
    for number in (1, 2, 3, 4, 5):
        write_wav(root / f"berst-data/test/audio/shout_data_{number}.wav", 0.1)
    write_wav(root / "berst-data/train/audio/shout_data_1.wav", 0.1)
    return root


def test_labels_and_strata(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "berst"), split="test")
    found = {name[-1]: one for name, one in asked.by_id().items()}
    assert {name: one.truth for name, one in found.items()} == {
        "1": "anger",
        "2": "joy",
        "3": "joy",
        "4": "sadness",
    }
    strata = [
        [one.sample.group[key] for key in ("shout", "distance", "obstructed")]
        for one in found.values()
    ]
    assert strata == [
        ["none", "0", "no"],
        ["raised", "1", "yes"],
        ["shout", "2", "no"],
        ["shout", "3", "no"],
    ]
    assert found["1"].sample.group["speaker"] == "7"
    assert [(one.row, one.reason) for one in asked.made.excluded] == [
        ("berst-test-shout_data_5", "label outside the set"),
        ("berst-test-shout_data_1", "listed twice"),
    ]
    assert asked.made.missing == ("berst-data/test/audio/shout_data_6.wav",)


def test_recall_by_stratum(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "berst"), split="test")
    texts = ["Angry.", "The speaker is happy", "sad", "Sadness"]
    rows = asked.rows(dict(zip(asked.by_id(), texts, strict=True)))
    block = asked.scores(rows)["emotion"]
    # Recalls: anger 1, joy 1/2, sadness 1.
    assert block["metrics"]["uar"]["value"] == pytest.approx(2.5 / 3, abs=1e-6)
    assert block["metrics"]["war"]["value"] == 0.75
    shout = block["slices"]["shout"]["shout"]
    assert (shout["n"], shout["metrics"]["uar"]["value"]) == (2, 0.5)
    assert set(block["slices"]["distance"]) == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    ("position", "distance"),
    [
        ("In your pocket", "0"),
        ("Holding the phone next to your mouth", "0"),
        ("On a table beside you", "1"),
        ("2m away", "1"),
        ("5 metres away from you", "2"),
        ("Outside of the room with the door closed", "3"),
        ("in the next room, on a table", "3"),
        ("up a tree", "unknown"),
    ],
)
def test_positions_are_ordered(position: str, distance: str) -> None:
    assert content.load("data/spoken/berst.py:distance_of")(position) == distance


def test_a_file_may_order_the_positions(tmp_path: Path) -> None:
    root = release(tmp_path / "berst")
    (tmp_path / "own.json").write_text('{"Near the body": 2}')
    asked = ask(FILE, root, split="train", positions=str(tmp_path / "own.json"))
    assert asked.questions[0].sample.group["distance"] == "2"
    (tmp_path / "own.json").write_text("[]")
    with pytest.raises(DataError, match="must be a JSON object"):
        ask(FILE, root, split="train", positions=str(tmp_path / "own.json"))


def test_word_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(FILE, release(tmp_path / "berst"), split="test", ask="transcript")
    left = [(one.row[-7:], one.reason) for one in asked.made.excluded]
    assert ("3-words", "no script") in left
    rows = asked.rows(lambda one: {"1": "The bat, waltzed off!"}.get(one.sample.sample_id[-7], ""))
    if "jiwer" not in sys.modules:
        fake = ModuleType("jiwer")
        fake.process_words = _process  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "jiwer", fake)
    block = asked.scores(rows)["transcript"]
    # "the cat waltzed": one word wrong, one too many; 2 + 2 + 2 words are missing.
    assert block["scored"]["wer"]["value"] == pytest.approx(8 / 9, abs=1e-6)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(EvaluationError, match="pip install jiwer"):
        content.load("eval/spoken/wer.py:wer")()


def _process(reference: str, hypothesis: str) -> SimpleNamespace:
    assert (reference, hypothesis) == ("the cat waltzed", "the bat waltzed off")
    return SimpleNamespace(substitutions=1, deletions=0, insertions=1)


def test_a_dry_run(tmp_path: Path) -> None:
    report = check_copy(FILE, [str(release(tmp_path / "berst"))], {})
    assert (report.questions, len(report.excluded), report.silent) == (4, 2, ())
    assert any("532 published" in line for line in report.unlike)
