"""The four row shapes mean the same, and every wrong row is named."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.rows import restrict
from mmemo.data.sample import Sample, Turn
from mmemo.errors import DataError
from tests.data.rows import WRITERS, row, samples, write

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load(folder: Path, *rows: dict[str, Any], kind: str = "jsonl", **config: Any) -> list[Sample]:
    path = write(folder / f"rows.{kind}", list(rows))
    return load_samples(DataConfig(manifests=[str(path)], **config))


def problem(folder: Path, bad: dict[str, Any], **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, bad, **config)
    assert caught.value.line == 1
    assert caught.value.file.endswith("rows.jsonl")
    return str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("shape", list(WRITERS))
@quick
@given(st.data(), st.booleans())
def test_every_shape_reads_back_as_the_sample_it_was_written_from(
    tmp_path: Path, shape: str, kind: str, data: st.DataObject, preference: bool
) -> None:
    sample = data.draw(samples(preference=preference))
    (read,) = load(tmp_path, WRITERS[shape](sample), kind=kind, video_key_means=["video"])
    assert replace(read, source=("", 0)) == sample


def test_rejected_media_stand_in_for_the_rows_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<video><audio>?"}, *row()["messages"][1:]]
    given = row(
        messages=messages, rejected_response="happy", rejected_videos=["b.mp4"], start=1, end=2
    )
    (sample,) = load(tmp_path, given)
    assert sample.media["video"].path == sample.media["audio"].path == "a.mp4"
    assert sample.rejected_media == {"video": replace(sample.media["video"], path="b.mp4")}
    assert sample.rejected_media["video"].end == 2
    # mDPO's pair: one answer, two clips.
    (sample,) = load(tmp_path, given | {"rejected_response": "<answer>sad</answer>"})
    assert sample.chosen == sample.rejected
    assert load(tmp_path, given, modalities=["audio"])[0].rejected_media == {}
    assert load(tmp_path, given | {"rejected_videos": []})[0].rejected_media == {}


def test_an_id_of_another_meaning_may_be_passed_through(tmp_path: Path) -> None:
    (sample,) = load(tmp_path, row(id="7"), columns=["id"])
    assert (sample.sample_id, sample.columns) == ("one", {"id": "7"})


@quick
@given(samples(), st.sets(st.sampled_from(["video", "audio", "face"])))
def test_restricting_keeps_exactly_the_named_streams(sample: Sample, keep: set[Any]) -> None:
    left = restrict(sample, sorted(keep))
    assert left.media == {key: ref for key, ref in sample.media.items() if key in keep}
    text = "".join(turn.text for turn in left.turns)
    assert {key for key, mark in PLACEHOLDERS.items() if mark in text} == set(left.media)
    assert [turn.role for turn in left.turns] == [turn.role for turn in sample.turns]


def test_text_only_rows_lose_the_line_of_a_placeholder(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<video>\n<audio> What?"}]
    (left,) = load(tmp_path, row(messages=messages), modalities=[])
    assert left.turns == (Turn("user", "What?"),)
    with pytest.raises(DataError, match="no text left"):
        load(tmp_path, row(messages=[{"role": "user", "content": "<video><audio>"}]), modalities=[])


def sharegpt(text: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "sad"}]
    return {"video": "MAFW/1.mp4", "conversations": turns, **more}


@pytest.mark.parametrize("text", ["<video>\n<audio>\nWhy?", "<video>\nWhy?"])
def test_a_lone_sharegpt_video_means_picture_and_sound(tmp_path: Path, text: str) -> None:
    (sample,) = load(tmp_path, sharegpt(text))
    assert {key: ref.path for key, ref in sample.media.items()} == {
        "video": "MAFW/1.mp4",
        "audio": "MAFW/1.mp4",
    }
    assert "<video>" in sample.turns[0].text
    assert sample.turns[0].text.count("<audio>") == 1


def test_what_a_lone_video_means_is_a_field(tmp_path: Path) -> None:
    (sample,) = load(tmp_path, sharegpt("<video>Why?"), video_key_means=["video"])
    assert list(sample.media) == ["video"]
    (sample,) = load(tmp_path, sharegpt("<video>Why?"), video_key_means=["video", "face"])
    assert sample.turns[0].text == "<video><face>Why?"
    assert "<audio>" in problem(tmp_path, sharegpt("<video><audio>Why?"), video_key_means=["video"])
    (sample,) = load(tmp_path, sharegpt("<video><audio>Why?", audio="b.wav"))
    assert sample.media["audio"].path == "b.wav"


def test_prompt_only_rows_pass_reward_columns_through(tmp_path: Path) -> None:
    given = {"prompt": "<face>Which units?", "face": "a.mp4", "solution": {"AU": [4]}}
    (sample,) = load(tmp_path, given, columns=["solution"])
    assert sample.answer is None
    assert sample.columns == {"solution": {"AU": [4]}}


def test_a_pair_of_whole_conversations_with_media_parts_names_its_clip_once(tmp_path: Path) -> None:
    def talk(answer: str) -> list[dict[str, Any]]:
        parts = [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What?"}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]

    (sample,) = load(tmp_path, {"chosen": talk("sad"), "rejected": talk("happy")})
    assert sample.turns == (Turn("user", "<video>What?"),)
    assert (sample.chosen, sample.rejected) == ("sad", "happy")
    assert sample.media["video"].path == "a.mp4"


def test_a_part_s_null_path_leaves_the_other(tmp_path: Path) -> None:
    """Tables of parts, such as Arrow's, hold null under the keys of the other kinds of part."""
    part = {"type": "video", "video": None, "path": "a.mp4"}
    text = {"type": "text", "text": "What?", "video": None, "path": None}
    (sample,) = load(tmp_path, {"messages": user([part, text])})
    assert sample.media["video"].path == "a.mp4"


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    (row(lable="x"), "lable", "did you mean 'label'?"),
    (row(images=["a.png"]), "images", "images are not supported"),
    (row(id="two"), "id", "cannot be combined with 'sample_id'"),
    (row(rejected_images=["a.png"]), "rejected_images", "images are not supported"),
    (row(rejected_videos=["b.mp4"]), "rejected_videos", "no rejected answer"),
    (row(rejected="x", rejected_videos=["b.mp4", "c.mp4"]), "rejected_videos", "at most one video"),
    (row(rejected="x", rejected_videos=[3]), "rejected_videos", "list of paths"),
    (row(rejected="x", rejected_faces=["b.mp4"]), "rejected_faces", "add faces, or remove it"),
    (row(rejected="a <video> b"), "rejected", "placeholder in an answer"),
    (row(rejected_response="a <image>"), "rejected_response", "placeholder in an answer"),
    (
        row(messages=user("<video><audio>?"), chosen="<audio>", rejected="x"),
        "chosen",
        "in an answer",
    ),
    (row(start=10**400), "start", "not 10000000000000000000..."),
    (row(aus={"AU4": 10**400}), "aus.AU4", "finite number"),
    (row(aus={"AU²": 0.5}), "aus.AU²", "is not a FACS action unit"),
    (row(messages=user("<image><video><audio>?")), "messages", "<image>"),
    (row(messages=user([{"type": "image", "image": "x"}])), "messages.0.content.0.type", "images"),
    (row(messages=user([{"type": "vidoe"}])), "messages.0.content.0.type", "'video'"),
    (row(messages=user([{"type": "video", "url": "x"}])), "messages.0.content.0.url", "unknown"),
    (
        row(messages=user([{"type": "video", "audio": "x"}])),
        "messages.0.content.0.audio",
        "unknown",
    ),
    (row(messages=user([{"type": "text", "path": 3}])), "messages.0.content.0.path", "a string"),
    (row(messages=user([{"type": "text"}])), "messages.0.content.0.text", "must be a string"),
    (row(messages=user(3)), "messages.0.content", "a string or a list of parts, not a number"),
    (row(messages=None), "messages", "needs messages, conversations or prompt"),
    (row(prompt="x"), "prompt", "cannot be combined with 'messages'"),
    (row(messages="hi"), "messages", "must be a list of turns"),
    (row(messages=[{"role": "usr", "content": "x"}]), "messages.0.role", "did you mean 'user'?"),
    (row(messages=[{"role": "user", "contnet": "x"}]), "messages.0.contnet", "'content'"),
    (row(messages=[*user("<video><audio>a"), *user("b")]), "messages", "must alternate user"),
    (row(messages=[*user("<video><audio>a"), {"role": "assistant", "content": " "}]), "", "empty"),
    (row(messages=user("<audio>What?")), "messages", "write <video> where"),
    (row(messages=user("<video><video><audio>What?")), "messages", "2 x <video>"),
    (row(messages=user("<video><audio><face>What?")), "messages", "names no file"),
    (row(videos=["a.mp4", "b.mp4"]), "videos", "at most one video"),
    (row(videos=[3]), "videos", "list of paths"),
    (row(video="a.mp4"), "video", "cannot be combined with 'videos'"),
    (row(label=3), "label", "must be a string, not a number"),
    (row(label=" "), "label", "is empty"),
    (row(labels="sad"), "labels", "list of strings"),
    (row(labels=["sad", 1]), "labels", "strings that are not empty"),
    (row(aus={"AU04": True}), "aus.AU04", "did you mean 'AU4'?"),
    (row(aus={"brow": 0.5}), "aus.brow", "AU4 or AU12"),
    (row(aus={"AU4": 5.5}), "aus.AU4", "between 0 and 5"),
    (row(aus={"AU4": -1}), "aus.AU4", "between 0 and 1"),
    (row(aus={"AU4": True}), "aus.AU4", "finite number"),
    (row(aus=["AU99"]), "aus.AU99", "is not a FACS action unit"),
    (row(aus=["brow"]), "aus", "must be an object, not a list"),
    (row(cues={"presnt": ["x"]}), "cues.presnt", "did you mean 'present'?"),
    (row(cues={"present": "x"}), "cues.present", "list of strings"),
    (row(modality_labels={"vidoe": "sad"}), "modality_labels.vidoe", "'video'"),
    (row(modality_labels={"video": None}), "modality_labels.video", "must be a string"),
    (row(attributes={"face": {"x": float("nan")}}), "attributes.face.x", "finite"),
    (row(attributes={"faec": {}}), "attributes.faec", "'face'"),
    (row(conflict="video_algned"), "conflict", "did you mean 'video_aligned'?"),
    (row(start=3, end=2), "end", "must be after the start"),
    (row(start=2, end=2.0), "end", "must be after the start"),
    (row(start=-1), "start", "0 or more"),
    (row(end=float("inf")), "end", "finite"),
    (row(start="1"), "start", "finite number of seconds, 0 or more, not '1'"),
    (row(difficulty=2), "difficulty", "between 0 and 1"),
    (row(group={"speaker": 3}), "group.speaker", "must be a string"),
    (row(group=["s1"]), "group", "must be an object"),
    (row(face_boxes=[{"time": 0, "box": [0, 0, 1, 1]}]), "face_boxes", "no face to go with"),
    (row(face_boxes=[{"time": 0, "box": [2, 0, 1, 1]}]), "face_boxes.0.box", "x0 < x1"),
    (row(face_boxes=[{"box": [0, 0, 1, 1]}]), "face_boxes.0.time", "missing"),
    (row(face_boxes=[{"time": 0, "box": [0, 0, 1]}]), "face_boxes.0.box", "list of 4"),
    (row(face_boxes=[{"time": 0, "box": [0, None, 1, 1]}]), "face_boxes.0.box", "list of 4"),
    (row(face_boxes=[{"time": 0, "box": [0, True, 1, 1]}]), "face_boxes.0.box", "list of 4"),
    (row(face_boxes=[{"time": 0, "bxo": []}]), "face_boxes.0.bxo", "'box'"),
    (row(rejected="x", rejected_response="y"), "rejected_response", "cannot be combined with"),
    (row(chosen="x"), "rejected", "is missing; 'chosen' needs one"),
    (row(messages=None, videos=None, audios=None, prompt="p", rejected="x"), "chosen", "missing"),
    (row(rejected_response="<answer>sad</answer>"), "rejected_response", "two different"),
    (
        row(system="a", messages=[{"role": "system", "content": "b"}]),
        "system",
        "cannot be combined with",
    ),
    (row(chosen="a", rejected="b"), "messages", "must end with the user's question"),
]


@pytest.mark.parametrize(("bad", "field", "advice"), WRONG, ids=[f"{f}-{a}" for _, f, a in WRONG])
def test_a_wrong_row_names_file_line_field_and_what_to_do(
    tmp_path: Path, bad: dict[str, Any], field: str, advice: str
) -> None:
    message = problem(tmp_path, bad)
    assert "rows.jsonl:1" in message
    assert f"field '{field}" in message
    assert advice in message


def test_a_placeholder_in_an_answer_is_refused(tmp_path: Path) -> None:
    messages = [*user("<video><audio>What?"), {"role": "assistant", "content": "<audio> says"}]
    assert "assistant turn" in problem(tmp_path, row(messages=messages))


def test_answers_to_different_prompts_are_no_pair(tmp_path: Path) -> None:
    chosen = [*user("a"), {"role": "assistant", "content": "x"}]
    rejected = [*user("b"), {"role": "assistant", "content": "y"}]
    assert "one prompt" in problem(tmp_path, {"chosen": chosen, "rejected": rejected})


@quick
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("messages", "prompt", "videos", "aus", "start", "group", "face_boxes", "x"),
                *("chosen", "rejected", "rejected_videos", "difficulty", "sample_id", "label"),
            ]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.floats()
            | st.sampled_from([1, -(10**400)])
            | st.text(st.characters(), max_size=3)
            | st.text("<video>\ud800", max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["role", "content", "type", "AU4"]), inner)
            ),
            max_leaves=8,
        ),
    )
)
def test_arbitrary_json_is_a_sample_or_a_data_error(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_text(json.dumps(values) + "\n")
    # Any other exception fails the test.
    with contextlib.suppress(DataError):
        (sample,) = load_samples(DataConfig(manifests=[str(path)]))
        assert sample.turns
        repr(sample).encode()
