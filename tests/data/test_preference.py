from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, load_preferences, not_replaced, with_noise
from mmemo.data.sample import FaceBox, MediaRef
from mmemo.errors import DataError

PROMPT = [{"role": "user", "content": "<video><audio><face>What does the face show?"}]


def pair(**changes: Any) -> dict[str, Any]:
    """A good row with everything, with changes; None removes a key."""
    base: dict[str, Any] = {
        "sample_id": "one",
        "prompt": PROMPT,
        "query_modality": "video",
        "video": "a.mp4",
        "audio": "a.mp4",
        "face": "a.mp4",
        "chosen": "lips parted: sad",
        "rejected_spurious": "a cap: sad",
        "rejected_hallucinated": "jaw dropped: sad",
        "video_negative": "b.mp4",
        "negative_kind": "different_label",
        "feature_level": False,
        "irrelevant_kind": "muted",
        "irrelevant_seed": 7,
        "label": "sad",
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def load(folder: Path, *rows: dict[str, Any], **data: Any) -> list[Preference]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_preferences(parse(DataConfig, {"manifests": [str(path)], **data}))


def test_a_whole_row_is_read(tmp_path: Path) -> None:
    (found,) = load(tmp_path, pair(speaker="s1"), columns=["speaker"])
    assert found.query == "video"
    assert found.answers == {
        "chosen": "lips parted: sad",
        "spurious": "a cap: sad",
        "hallucinated": "jaw dropped: sad",
    }
    assert found.sample.answer is None
    assert (found.sample.chosen, found.sample.rejected) == (None, None)
    assert found.sample.truth.label == "sad"
    assert found.sample.columns == {"speaker": "s1"}
    assert found.sample.source == (str(tmp_path / "pairs.jsonl"), 1)
    negative, other = found.negative, found.irrelevant
    assert negative is not None
    assert (negative.kind, negative.feature_level) == ("different_label", False)
    # The face is cut from the file that replaces the picture.
    assert negative.media == {"video": MediaRef("b.mp4"), "face": MediaRef("b.mp4")}
    assert negative.modalities == ("video", "face")
    assert other is not None
    assert (other.kind, other.feature_level, other.modalities) == ("muted", True, ("audio",))
    assert other.seed == 7
    assert not found.plain


def test_one_rejected_answer_is_enough(tmp_path: Path) -> None:
    for lacking, left in (("spurious", "hallucinated"), ("hallucinated", "spurious")):
        (found,) = load(tmp_path, pair(**{f"rejected_{lacking}": None}))
        assert set(found.answers) == {"chosen", left}


def test_spans_and_boxes_of_the_other_clip(tmp_path: Path) -> None:
    box = {"time": 0.0, "box": [1, 2, 3, 4]}
    row = pair(
        video_negative={"path": "b.mp4", "start": 1, "end": 2},
        face_negative={"path": "b.mp4", "start": 1, "end": 2, "face_boxes": [box]},
    )
    (found,) = load(tmp_path, row)
    assert found.negative is not None
    assert found.negative.media["video"] == MediaRef("b.mp4", 1, 2)
    assert found.negative.media["face"].face_boxes == (FaceBox(0.0, (1, 2, 3, 4)),)
    # A plain path has the row's own span.
    (found,) = load(tmp_path, pair(start=1, end=3))
    assert found.negative is not None
    assert found.negative.media["video"] == MediaRef("b.mp4", 1, 3)


def test_what_the_world_wrote_before_is_read(tmp_path: Path) -> None:
    """TRL's names with a kind: the answer goes to its place."""
    one = {
        "sample_id": "one",
        "prompt": PROMPT,
        "videos": ["a.mp4"],
        "audios": ["a.mp4"],
        "faces": ["a.mp4"],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "rejected_kind": "hallucinated",
    }
    two = {**one, "sample_id": "two"}
    del two["rejected_kind"]
    first, second = load(tmp_path, one, two)
    assert first.answers == {"chosen": "yes", "hallucinated": "no"}
    assert second.answers == {"chosen": "yes", "spurious": "no"}
    assert (first.plain, second.plain) == (False, True)
    assert (first.query, first.negative, first.irrelevant) == ("joint", None, None)


def test_ms_swifts_names_are_read(tmp_path: Path) -> None:
    row = {
        "id": "one",
        "messages": [
            {"role": "user", "content": "<video><audio>What now?"},
            {"role": "assistant", "content": "sad"},
        ],
        "videos": ["a.mp4"],
        "audios": ["a.mp4"],
        "rejected_response": "happy",
        "rejected_videos": ["b.mp4"],
    }
    (found,) = load(tmp_path, row)
    assert found.answers == {"chosen": "sad", "spurious": "happy"}
    assert found.plain
    assert found.negative is not None
    assert (found.negative.kind, found.negative.media) == ("given", {"video": MediaRef("b.mp4")})
    assert found.sample.rejected_media == {}


def test_the_query_follows_from_the_streams(tmp_path: Path) -> None:
    def row(*streams: str) -> dict[str, Any]:
        marks = "".join(f"<{name}>" for name in streams)
        media = dict.fromkeys(streams, "a.mp4")
        return {"prompt": f"{marks}What?", "chosen": "a", "rejected": "b", **media}

    rows = [row("audio"), row("video"), row("face"), row("video", "audio"), row()]
    found = load(tmp_path, *rows)
    assert [one.query for one in found] == ["audio", "video", "video", "joint", "joint"]


def test_streams_that_are_left_out_take_their_negatives_with_them(tmp_path: Path) -> None:
    (found,) = load(tmp_path, pair(), modalities=["audio"])
    assert set(found.sample.media) == {"audio"}
    assert found.negative is None
    assert found.irrelevant is not None
    (found,) = load(tmp_path, pair(), modalities=[])
    assert (found.negative, found.irrelevant) == (None, None)
    assert found.sample.turns[0].text == "What does the face show?"


def test_seeds_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    noise = {"negative_kind": "noise", "video_negative": None, "feature_level": True}
    one, two = pair(**noise, snr_db=-3), pair(**noise, sample_id="two")
    first = {p.sample.sample_id: p.negative for p in load(tmp_path, one, two)}
    again = {p.sample.sample_id: p.negative for p in load(tmp_path, two, one)}
    assert first == again
    kept = first["one"], first["two"]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[0].seed != kept[1].seed
    assert (kept[0].snr_db, kept[1].snr_db) == (-3, 0)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"query_modality": "vidoe"}, "query_modality", "did you mean 'video'"),
    ({"query_modality": "audio"}, "video_negative", "about audio, so this side replaces audio"),
    ({"rejected_spurious": None, "rejected_hallucinated": None}, "rejected_spurious", "one of"),
    ({"rejected_spurious": "lips parted: sad"}, "rejected_spurious", "equals the chosen"),
    ({"rejected_hallucinated": "a cap: sad"}, "rejected_hallucinated", "equals 'rejected_spu"),
    ({"rejected_spurious": 3}, "rejected_spurious", "must be a text"),
    ({"rejected_spurious": " "}, "rejected_spurious", "must be a text"),
    ({"rejected_spurious": "a <video>"}, "rejected_spurious", "placeholder in an answer"),
    ({"rejected": "x"}, "rejected_spurious", "cannot be combined with 'rejected'"),
    ({"rejected_kind": "spurious"}, "rejected_kind", "needs 'rejected'"),
    ({"chosen": None}, "chosen", "is missing"),
    ({"negative_kind": "diferent_label"}, "negative_kind", "did you mean 'different_label'"),
    (
        {"negative_kind": "noise", "feature_level": None},
        "video_negative",
        "made of the clip itself",
    ),
    ({"video_negative": None}, "negative_kind", "needs video_negative"),
    ({"feature_level": True}, "feature_level", "'different_label' makes it False"),
    ({"video_negative": "a.mp4"}, "video_negative", "is the row's own clip"),
    ({"video_negative": 4}, "video_negative", "must be a path"),
    ({"video_negative": {"file": "b"}}, "video_negative.file", "is unknown"),
    ({"video_negative": {"path": "b", "start": -1}}, "video_negative.start", "0 or more"),
    ({"audio_negative": "b.mp4"}, "audio_negative", "remove it"),
    ({"irrelevant_kind": "frozen_frame"}, "irrelevant_kind", "cannot be made of audio"),
    ({"irrelevant_seed": 1.5}, "irrelevant_seed", "whole number"),
    ({"snr_db": 200}, "snr_db", "between -60 and 60"),
    ({"judge_agreement": 0.5}, "judge_agreement", "above 0.5, not 0.5"),
    ({"judge_agreement": 1.2}, "judge_agreement", "share of the judges"),
    ({"judge_agreement": "all"}, "judge_agreement", "share of the judges"),
    (
        {"query_modality": "joint", "video_negative": None, "negative_kind": None},
        "irrelevant_kind",
        "joint question",
    ),
    ({"video_negativ": "b.mp4"}, "video_negativ", "is unknown"),
]


@pytest.mark.parametrize(("changes", "field", "message"), BAD, ids=range(len(BAD)))
def test_a_wrong_row_is_named(
    tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(DataError) as error:
        load(tmp_path, pair(sample_id="fine"), pair(**changes))
    assert error.value.file == str(tmp_path / "pairs.jsonl")
    assert (error.value.line, error.value.field) == (2, field)
    assert message in str(error.value)


def test_a_question_about_a_stream_that_is_not_there(tmp_path: Path) -> None:
    row = pair(audio=None, prompt="<video><face>How does it sound?", query_modality="audio")
    row = {key: value for key, value in row.items() if "negative" not in key}
    with pytest.raises(DataError, match="is 'audio', but the row names no such stream"):
        load(tmp_path, row)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    rows = [pair(sample_id=str(n), query_modality="x", snr_db="loud") for n in range(3)]
    with pytest.raises(DataError, match=r"6 shown") as error:
        load(tmp_path, *rows)
    assert error.value.line == 1


OWN_FACE = {"face": "crops/a.mp4"}


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (OWN_FACE, "video_negative", "replaces the picture but not the face"),
        (
            {**OWN_FACE, "video_negative": None, "face_negative": "crops/b.mp4"},
            "face_negative",
            "add video_negative",
        ),
        (
            {
                **OWN_FACE,
                "query_modality": "joint",
                "irrelevant_kind": None,
                "irrelevant_seed": None,
            },
            "video_negative",
            "add face_negative",
        ),
        (
            {
                **OWN_FACE,
                **dict.fromkeys(["video_negative", "negative_kind", "feature_level"]),
                "query_modality": "audio",
                "irrelevant_kind": None,
                "video_irrelevant": "b.mp4",
            },
            "video_irrelevant",
            "add face_irrelevant",
        ),
    ],
    ids=["video", "face", "joint", "irrelevant"],
)
def test_a_picture_is_not_replaced_without_a_face_of_another_file(
    tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    """The face would still show the emotion that the negative hides."""
    with pytest.raises(DataError) as error:
        load(tmp_path, pair(**changes))
    assert error.value.field == field
    assert message in str(error.value)


def test_a_face_of_another_file_is_replaced_by_what_the_row_names(tmp_path: Path) -> None:
    (found,) = load(tmp_path, pair(**OWN_FACE, face_negative="crops/b.mp4"))
    assert found.negative is not None
    assert found.negative.media == {"video": MediaRef("b.mp4"), "face": MediaRef("crops/b.mp4")}
    (found,) = load(tmp_path, pair(**OWN_FACE), modalities=["video", "audio"])  # no face to leave
    assert found.negative is not None
    assert found.negative.media == {"video": MediaRef("b.mp4")}


def test_a_face_alone_brings_its_picture_if_they_are_of_one_file(tmp_path: Path) -> None:
    box = {"time": 0.0, "box": [1, 2, 3, 4]}
    other = {"path": "b.mp4", "face_boxes": [box]}
    (found,) = load(tmp_path, pair(video_negative=None, face_negative=other))
    assert found.negative is not None
    assert found.negative.media["video"] == MediaRef("b.mp4")
    assert found.negative.media["face"].face_boxes == (FaceBox(0.0, (1, 2, 3, 4)),)


def test_ms_swifts_rejected_files_are_held_to_it_too(tmp_path: Path) -> None:
    row = {
        "id": "one",
        "prompt": "<video><face>What now?",
        "video": "a.mp4",
        "face": "crops/a.mp4",
        "chosen": "sad",
        "rejected": "happy",
        "rejected_videos": ["b.mp4"],
    }
    with pytest.raises(DataError, match="add rejected_faces") as error:
        load(tmp_path, row)
    assert error.value.field == "rejected_videos"


def test_noise_takes_the_place_of_what_a_negative_lacks(tmp_path: Path) -> None:
    bare = pair(**dict.fromkeys(["video_negative", "negative_kind", "feature_level"]))
    joint = {**pair(), "query_modality": "joint"}
    joint = {key: value for key, value in joint.items() if "irrelevant" not in key}
    rows = [pair(), *({**row, "sample_id": f"{n}"} for n, row in enumerate((bare, joint, bare)))]
    whole, none, half, again = (with_noise(one, "negative") for one in load(tmp_path, *rows))
    assert whole.negative is not None
    assert (whole.negative.noised, whole.negative.of_features) == ((), None)
    assert none.negative is not None
    assert none.negative.kind == "uniform_noise"
    assert none.negative.modalities == ("video", "face")
    assert none.negative.of_features == none.negative
    # A joint question: the picture is that of the other clip, the sound is noise.
    assert half.negative is not None
    assert half.negative.media["video"] == MediaRef("b.mp4")
    assert half.negative.of_features is not None
    assert half.negative.of_features.modalities == ("audio",)
    assert [not_replaced(one, "negative") for one in (whole, none, half)] == [()] * 3
    # By the row's id: another row's noise is another.
    assert again.negative is not None
    assert again.negative.seed != none.negative.seed
    # A joint question has no irrelevant stream.
    assert with_noise(half, "irrelevant").irrelevant is None


def test_how_many_judges_agreed_is_read(tmp_path: Path) -> None:
    (found,) = load(tmp_path, pair(judge_agreement=0.8))
    assert found.judge_agreement == 0.8
    (found,) = load(tmp_path, pair())
    assert found.judge_agreement is None
