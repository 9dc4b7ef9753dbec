"""Rows of other data sets give the pairs that rows with this package's names give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.data.pair_names import NAMES, reading
from mmemo.errors import DataError
from tests.data.test_preference import load

OURS: dict[str, Any] = {
    "sample_id": "one",
    "prompt": "<video>\n<audio>\nWhat does the person feel, and why?",
    "video": "a.mp4",
    "audio": "a.wav",
    "chosen": "sad, for the lips are parted",
    "rejected_spurious": "sad, for the cap is red",
    "rejected_hallucinated": "sad, for there are tears",
    "video_negative": "b.mp4",
    "audio_negative": "b.wav",
}


def named(**changes: str) -> dict[str, Any]:
    """Our row with keys renamed: our key -> the other one."""
    return {changes.get(key, key): value for key, value in OURS.items()}


AVERE = named(
    rejected_spurious="rejected",
    rejected_hallucinated="rejected_2",
    video_negative="video_l",
    audio_negative="audio_l",
    sample_id="id",
)
VISTA = {**AVERE, "bbox": [[1, 2, 3, 4]], "clip_w": [0, 2], "clip_l": [2, 3], "frame": 7}
SHORT = {
    **named(
        rejected_hallucinated="rejected_halluc",
        video_negative="video_neg",
        audio_negative="audio_neg",
    ),
    "query_modality": "audiovisual",
    "neg_type": "given",
}
OMNI = named(
    video="video_w",
    audio="audio_w",
    video_negative="rejected_video",
    audio_negative="audio_rejected",
)
TRL = {
    **OURS,
    "prompt": [{"role": "user", "content": OURS["prompt"]}],
    "chosen": [{"role": "assistant", "content": OURS["chosen"]}],
    "rejected_spurious": [{"role": "assistant", "content": OURS["rejected_spurious"]}],
}
KIND = {**named(rejected_spurious="rejected_2", rejected_hallucinated="rejected")}
KIND["rejected_kind"] = "hallucinated"


@pytest.mark.parametrize("row", [AVERE, VISTA, SHORT, OMNI, TRL, KIND])
def test_the_same_content_gives_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load(tmp_path, row) == load(tmp_path, OURS)


def test_a_row_without_an_id_has_the_same_id_under_either_name(tmp_path: Path) -> None:
    ours = {key: value for key, value in OURS.items() if key != "sample_id"}
    theirs = {key: value for key, value in AVERE.items() if key != "id"}
    assert load(tmp_path, theirs) == load(tmp_path, ours)


def test_each_other_name_is_read_as_ours(tmp_path: Path) -> None:
    """Every name of the table, in a row of its own."""
    face = {
        **OURS,
        "prompt": "<face>" + OURS["prompt"],
        "face": "a.mp4",
        "face_negative": "b.mp4",
        "negative_kind": "given",
    }
    (expected,) = load(tmp_path, face)
    for other, own in NAMES.items():
        (found,) = load(tmp_path, {other if k == own else k: value for k, value in face.items()})
        assert found == expected, other
        assert found.names == {other: own}


def test_a_conversation_of_trl_names_the_pair_too(tmp_path: Path) -> None:
    """TRL's implicit prompt: both answers are whole conversations."""
    asked = {"role": "user", "content": OURS["prompt"]}
    row = {
        "sample_id": "one",
        "video": "a.mp4",
        "audio": "a.wav",
        "chosen": [asked, {"role": "assistant", "content": "sad"}],
        "rejected": [asked, {"role": "assistant", "content": "happy"}],
    }
    plain = {**row, "prompt": OURS["prompt"], "chosen": "sad", "rejected": "happy"}
    assert load(tmp_path, row) == load(tmp_path, plain)


def test_the_reading_is_stated(tmp_path: Path) -> None:
    found = load(tmp_path, VISTA, {**OURS, "sample_id": "two"}, {**AVERE, "id": "three"})
    assert reading(pair.names for pair in found) == [
        "'audio_l' is read as 'audio_negative' (2 pairs)",
        "'bbox' is not read (1 pairs)",
        "'clip_l' is not read (1 pairs)",
        "'clip_w' is not read (1 pairs)",
        "'frame' is not read (1 pairs)",
        "'rejected' is read as 'rejected_spurious' (2 pairs)",
        "'rejected_2' is read as 'rejected_hallucinated' (2 pairs)",
        "'video_l' is read as 'video_negative' (2 pairs)",
    ]


def test_a_listed_column_keeps_its_name(tmp_path: Path) -> None:
    row = {**OURS, "frame": 7, "neg_type": "mine", "rejected_2": "x"}
    (found,) = load(tmp_path, row, columns=["frame", "neg_type", "rejected_2"])
    assert found.sample.columns == {"frame": 7, "neg_type": "mine", "rejected_2": "x"}
    assert found.names == {}


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({**OURS, "video_l": "c.mp4"}, "video_l", "cannot be combined with 'video_negative'"),
        ({**AVERE, "video_neg": "b.mp4"}, "video_neg", "cannot be combined with 'video_l'"),
        ({**OURS, "rejected_2": "x"}, "rejected_2", "combined with 'rejected_spurious'"),
        ({**OURS, "rejected_halluc": "x"}, "rejected_halluc", "with 'rejected_hallucinated'"),
        (
            {key: value for key, value in AVERE.items() if key != "rejected"},
            "rejected_2",
            "needs 'rejected'",
        ),
        ({**AVERE, "rejected_2": AVERE["rejected"]}, "rejected_2", "equals 'rejected'"),
        ({**AVERE, "rejected_2": 3}, "rejected_2", "must be a text"),
        ({**AVERE, "rejected_3": "x"}, "rejected_3", "did you mean 'rejected_2'"),
        ({**AVERE, "vidoe_l": "x"}, "vidoe_l", "did you mean 'video_l'"),
        ({**OURS, "video_negatve": "x"}, "video_negatve", "did you mean 'video_negative'"),
        ({**OURS, "rejected_hallucinatd": "x"}, "rejected_hallucinatd", "'rejected_hallucinated'"),
        ({**SHORT, "neg_type": "nois"}, "neg_type", "did you mean 'noise'"),
        ({**SHORT, "query_modality": "vison"}, "query_modality", "did you mean"),
        ({**AVERE, "video_l": 4}, "video_l", "must be a path"),
        ({**AVERE, "video_l": "a.mp4"}, "video_l", "is the row's own clip"),
        ({**AVERE, "face_l": "b.mp4"}, "face_l", "the row shows video, audio"),
    ],
)
def test_unknown_and_contradicting_names_are_one_sentence(
    tmp_path: Path, row: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(DataError) as error:
        load(tmp_path, row)
    assert error.value.field == field
    assert message in str(error.value)
    assert "\n" not in str(error.value)
