"""A pair before it has negatives, and a pair as the row that is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmemo.data.preference import QUERIES, Answer, Negative, Query, Side
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MediaRef, Sample

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A pair without negatives. ``cited``: cues that the chosen answer names. ``plain``: what is
    wrong with the rejected answer is not known, and it stands in the place of ``spurious``."""

    sample: Sample
    query: Query
    answers: Mapping[Answer, str]
    cited: tuple[str, ...] = ()
    plain: bool = False


@dataclass(slots=True)
class Left:
    """Rows that gave no pair: reason -> how many, and the first few ids."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def out(self, reason: str, sample_id: str) -> None:
        self.counts[reason] += 1
        listed = self.examples.setdefault(reason, [])
        if len(listed) < 5:
            listed.append(sample_id)


def query_of(sample: Sample, asks: Mapping[Query, Sequence[str]]) -> Query:
    """What the row's question is about, by its column or by its words; what is quoted in it says
    nothing."""
    given = sample.columns.get("query_modality")
    if given in ("audio", "video", "joint"):
        return given
    text = next((turn.text for turn in reversed(sample.prompt) if turn.role == "user"), "")
    for mark in PLACEHOLDERS.values():
        text = text.replace(mark, " ")
    text = re.sub(r'"[^"]*"', " ", text).lower()
    named: list[Query] = [
        query
        for query in QUERIES
        if query != "joint"
        and any(re.search(rf"\b{re.escape(word.lower())}", text) for word in asks.get(query, ()))
    ]
    return named[0] if len(named) == 1 else "joint"


def prompt_only(sample: Sample, suffix: str = "") -> Sample:
    """The sample without an answer, under the name of its pair."""
    return replace(sample, sample_id=f"{sample.sample_id}{suffix}", turns=sample.prompt)


def emotion_of(sample: Sample, query: Query) -> str | None:
    """The emotion that a question about the clip asks for."""
    truth = sample.truth
    return truth.label if query == "joint" else truth.modality_labels.get(query)


def row_of(draft: Draft, negatives: Mapping[Side, Negative]) -> Row:
    """One row of ``pairs.jsonl``, as :func:`~mmemo.data.preference.load_preferences` reads it."""
    sample = draft.sample
    row: Row = {
        "sample_id": sample.sample_id,
        "prompt": [{"role": turn.role, "content": turn.text} for turn in sample.turns],
        "query_modality": draft.query,
    }
    row.update({name: ref.path for name, ref in sample.media.items()})
    row["chosen"] = draft.answers["chosen"]
    rejected = {f"rejected_{k}": text for k, text in draft.answers.items() if k != "chosen"}
    row |= {"rejected": draft.answers["spurious"]} if draft.plain else rejected
    for side, negative in negatives.items():
        row |= _negative(side, negative)
    first = next(iter(sample.media.values()), None)
    face = sample.media.get("face")
    truth = sample.truth
    rest: Row = {
        "start": None if first is None else first.start,
        "end": None if first is None else first.end,
        "face_boxes": [] if face is None else _boxes(face),
        "label": truth.label,
        "labels": list(truth.labels),
        "aus": dict(truth.aus),
        "cues": {kind: list(texts) for kind, texts in truth.cues.items()},
        "modality_labels": dict(truth.modality_labels),
        "conflict": truth.conflict,
        "transcript": sample.transcript,
        "group": dict(sample.group),
        "tier": sample.tier,
        "difficulty": sample.difficulty,
        **{key: value for key, value in sample.columns.items() if key != "query_modality"},
    }
    return {**row, **{key: value for key, value in rest.items() if value not in (None, [], {})}}


def _negative(side: Side, negative: Negative) -> Row:
    row: Row = {f"{side}_kind": negative.kind, f"{side}_seed": negative.seed}
    if side == "negative":
        row["feature_level"] = negative.feature_level
    if negative.kind == "noise":
        row["snr_db"] = negative.snr_db
    row.update({f"{name}_{side}": _media(ref) for name, ref in negative.media.items()})
    return row


def _media(ref: MediaRef) -> Row:
    """A file of its own span; the row's own would be taken for it otherwise."""
    values: Row = {"path": ref.path, "start": ref.start, "end": ref.end, "face_boxes": _boxes(ref)}
    return {key: value for key, value in values.items() if value not in (None, [])}


def _boxes(ref: MediaRef) -> list[Row]:
    found: list[Row] = []
    for one in ref.face_boxes:
        box: Row = {"time": one.time, "box": list(one.box)}
        for name, eye in (("left_eye", one.left_eye), ("right_eye", one.right_eye)):
            if eye is not None:
                box[name] = list(eye)
        found.append(box)
    return found
