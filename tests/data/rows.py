"""Random samples, and the ways to write one as a manifest row."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mmemo.data.row_models import ACTION_UNITS, PLACEHOLDERS
from mmemo.data.sample import CONFLICTS, MODALITIES, FaceBox, MediaRef, Sample, Truth, Turn

# Blank text and what pandas makes of missing values and of integers beside them are refused.
texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1
).filter(lambda text: not re.fullmatch(r"(nan|NaN|NaT|[-+]?\d+\.0+)?", text.strip()))
names = st.text("abcdefgh_", min_size=1, max_size=6)
unit = st.floats(0, 1)
emotions = st.sampled_from(["angry", "sad", "happy", "neutral"])


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    return Truth(
        label=draw(st.none() | emotions),
        labels=tuple(draw(st.lists(texts, max_size=2))),
        aus=draw(st.dictionaries(st.sampled_from(ACTION_UNITS), unit, max_size=3)),
        cues={
            kind: tuple(found)
            for kind, found in draw(
                st.dictionaries(
                    st.sampled_from(["present", "absent", "spurious"]),
                    st.lists(texts, min_size=1, max_size=2),
                )
            ).items()
        },
        modality_labels=draw(
            st.dictionaries(st.sampled_from(["audio", "video", "text"]), emotions)
        ),
        attributes=draw(
            st.dictionaries(
                st.sampled_from(["video", "audio", "face"]),
                st.dictionaries(names, unit, min_size=1, max_size=2),
            )
        ),
        conflict=draw(st.none() | st.sampled_from(CONFLICTS)),
    )


@st.composite
def media(draw: st.DrawFn) -> dict[Any, MediaRef]:
    chosen = draw(st.sets(st.sampled_from(MODALITIES)))
    span = draw(st.none() | st.tuples(st.floats(0, 10), st.floats(11, 20))) or (None, None)
    point = st.tuples(st.floats(0, 50), st.floats(0, 50))
    box = st.builds(
        FaceBox,
        time=st.floats(0, 9),
        box=st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(10, 20), st.floats(10, 20)),
        left_eye=st.none() | point,
        right_eye=st.none() | point,
    )
    boxes = draw(st.lists(box, max_size=2))
    ordered = tuple(sorted(boxes, key=lambda item: item.time))
    return {
        modality: MediaRef(f"{draw(names)}.mp4", *span, ordered if modality == "face" else ())
        for modality in MODALITIES
        if modality in chosen
    }


@st.composite
def samples(draw: st.DrawFn, *, preference: bool = False) -> Sample:
    refs = draw(media())
    marks = draw(st.permutations([PLACEHOLDERS[modality] for modality in refs]))
    question = draw(texts)
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    turns.append(Turn("user", "".join(marks) + question))
    if draw(st.booleans()):
        turns += [Turn("assistant", draw(texts)), Turn("user", draw(texts))]
    if not preference and draw(st.booleans()):
        turns.append(Turn("assistant", draw(texts)))
    pair = draw(st.lists(texts, min_size=2, max_size=2, unique=True)) if preference else [None] * 2
    other = draw(st.sets(st.sampled_from(MODALITIES))) if preference else set()
    return Sample(
        sample_id=draw(texts),
        turns=tuple(turns),
        media=refs,
        truth=draw(truths()),
        transcript=draw(st.none() | texts),
        group=draw(st.dictionaries(names, texts, max_size=2)),
        tier=draw(st.none() | st.sampled_from(["attribute", "emotion"])),
        difficulty=draw(st.none() | unit),
        chosen=pair[0],
        rejected=pair[1],
        rejected_media={
            modality: replace(ref, path=f"other/{ref.path}", face_boxes=())
            for modality, ref in refs.items()
            if modality in other
        },
    )


def fields(sample: Sample) -> dict[str, Any]:
    """All of a row but the chat and the media."""
    truth = sample.truth
    row: dict[str, Any] = {
        "sample_id": sample.sample_id,
        "label": truth.label,
        "labels": list(truth.labels),
        "aus": dict(truth.aus),
        "cues": {key: list(found) for key, found in truth.cues.items()},
        "modality_labels": dict(truth.modality_labels),
        "attributes": {key: dict(values) for key, values in truth.attributes.items()},
        "conflict": truth.conflict,
        "transcript": sample.transcript,
        "group": dict(sample.group),
        "tier": sample.tier,
        "difficulty": sample.difficulty,
    }
    for modality, ref in sample.rejected_media.items():
        row[f"rejected_{modality}s"] = [ref.path]
    for ref in sample.media.values():
        row |= {"start": ref.start, "end": ref.end}
        if ref.face_boxes:
            row["face_boxes"] = [
                {
                    "time": box.time,
                    "box": list(box.box),
                    "left_eye": list(box.left_eye) if box.left_eye else None,
                    "right_eye": list(box.right_eye) if box.right_eye else None,
                }
                for box in ref.face_boxes
            ]
    return {key: value for key, value in row.items() if value not in (None, [], {})}


def pair(sample: Sample, rejected: str = "rejected") -> dict[str, Any]:
    if sample.rejected is None:
        return {}
    return {"chosen": sample.chosen, rejected: sample.rejected}


def lists(sample: Sample) -> dict[str, Any]:
    return {f"{modality}s": [ref.path] for modality, ref in sample.media.items()}


def as_messages(sample: Sample) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    if sample.rejected is None:
        return fields(sample) | lists(sample) | {"messages": messages}
    # ms-swift: the chosen answer ends the messages.
    messages.append({"role": "assistant", "content": sample.chosen})
    row = {"messages": messages, "rejected_response": sample.rejected}
    return fields(sample) | lists(sample) | row


def as_parts(sample: Sample) -> dict[str, Any]:
    messages = []
    for turn in sample.turns:
        parts: list[dict[str, Any]] = []
        text = turn.text
        while text.startswith("<"):
            mark, _, text = text.partition(">")
            modality: Any = mark[1:]
            parts.append({"type": modality, modality: sample.media[modality].path})
        parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts})
    key = "prompt" if sample.rejected is not None else "messages"
    return fields(sample) | {key: messages} | pair(sample)


def as_sharegpt(sample: Sample) -> dict[str, Any]:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[turn.role], "value": turn.text} for turn in sample.turns]
    paths = {modality: ref.path for modality, ref in sample.media.items()}
    return fields(sample) | {"conversations": turns} | paths | pair(sample)


def as_trl(sample: Sample) -> dict[str, Any]:
    turns = sample.prompt
    row = fields(sample) | lists(sample)
    if len(turns) == 1:
        row["prompt"] = turns[0].text
    else:
        row["prompt"] = [{"role": turn.role, "content": turn.text} for turn in turns]
    if sample.rejected is not None:
        prompt = [{"role": turn.role, "content": turn.text} for turn in turns]
        answers = {"chosen": sample.chosen, "rejected": sample.rejected}
        del row["prompt"]  # TRL's implicit prompt
        for key, answer in answers.items():
            row[key] = [*prompt, {"role": "assistant", "content": answer}]
    elif sample.answer is not None:
        row["completion"] = sample.answer
    return row


WRITERS: Mapping[str, Callable[[Sample], dict[str, Any]]] = {
    "messages": as_messages,
    "parts": as_parts,
    "sharegpt": as_sharegpt,
    "trl": as_trl,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a manifest of the kind that the path's ending names."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        header = sorted({key for row in rows for key in row})
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(header)
            for row in rows:
                writer.writerow([cell(row.get(key)) for key in header])
    return path


def cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def row(**changes: Any) -> dict[str, Any]:
    """A good training row, with changes; None removes a key."""
    base: dict[str, Any] = {
        "sample_id": "one",
        "messages": [
            {"role": "user", "content": "<video><audio>What does the person feel?"},
            {"role": "assistant", "content": "<answer>sad</answer>"},
        ],
        "videos": ["a.mp4"],
        "audios": ["a.mp4"],
        "label": "sad",
    }
    return {key: value for key, value in (base | changes).items() if value is not None}
