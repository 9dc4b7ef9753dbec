"""Drafts of pairs, which have no negatives yet, and the rows of ``pairs.jsonl``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmemo.answers.words import EDGES
from mmemo.data.cues import cue_lists
from mmemo.data.preference import (
    FEATURE_KINDS,
    QUERIES,
    Answer,
    Negative,
    Query,
    Side,
    queried,
    query_named,
)
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MediaRef, Modality, Sample

JsonRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PairDraft:
    """A pair without negatives."""

    sample: Sample
    query: Query
    answers: Mapping[Answer, str]
    cited: tuple[str, ...] = ()
    """Cues that the chosen answer names."""
    plain: bool = False
    """The kind of the rejected answer is unknown; it is stored as ``spurious``."""


@dataclass(slots=True)
class SkippedRows:
    """Rows that gave no pair: their number and the first few ids, by reason."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    missing: Counter[str] = field(default_factory=Counter[str])
    """Pairs without one of the rejected answers: ``kind: query`` -> their number."""
    channels: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where the cues of the rows are, and how that is known."""

    def add(self, reason: str, sample_id: str) -> None:
        """Count a row that is skipped for ``reason``."""
        self.counts[reason] += 1
        listed = self.examples.setdefault(reason, [])
        if len(listed) < 5:
            listed.append(sample_id)


def query_of(sample: Sample, asks: Mapping[Query, Sequence[str]]) -> Query:
    """The modality that a row's question is about, from its ``query_modality`` or from its words.

    Quoted words do not count, since they are the speaker's and not the question's. A joint question
    about a clip with one modality is one about that modality.

    Args:
        asks: words that make a question one about a modality.
    """
    only = one_channel(sample.media)
    given = query_named(sample.columns.get("query_modality"))
    if given is not None:
        return only or given if given == "joint" else given
    text = next((turn.text for turn in reversed(sample.prompt) if turn.role == "user"), "")
    for mark in PLACEHOLDERS.values():
        text = text.replace(mark, " ")
    text = re.sub(r'"[^"]*"', " ", text).lower()
    # The pattern has no boundary at its end, so that "sound" also finds "sounds".
    named: list[Query] = [
        query
        for query in QUERIES
        if query != "joint"
        and any(re.search(EDGES[0] + re.escape(word.lower()), text) for word in asks.get(query, ()))
    ]
    return named[0] if len(named) == 1 else only or "joint"


def one_channel(media: Collection[Modality]) -> Query | None:
    """The only modality of a clip: ``audio`` for sound alone, ``video`` for picture or face alone.
    None for a clip with both, and for one without media."""
    if not media or ("audio" in media and len(media) > 1):
        return None
    return "audio" if "audio" in media else "video"


def can_be_asked(sample: Sample, query: Query) -> bool:
    """Whether the clip has every modality that the question is about. Rows without media, whose
    questions are answered from the text, may ask anything."""
    if query == "joint":
        return one_channel(sample.media) is None
    return not sample.media or bool(queried(query, sample.media))


def prompt_only(sample: Sample, suffix: str = "") -> Sample:
    """The sample without its answer; ``suffix`` is appended to its id."""
    return replace(sample, sample_id=f"{sample.sample_id}{suffix}", turns=sample.prompt)


def emotion_of(sample: Sample, query: Query) -> str | None:
    """The emotion that is the answer to a question of this kind, if it is known.

    The label of a clip with one modality is also that modality's.
    """
    truth = sample.truth
    if query == "joint":
        return truth.label
    found = truth.modality_labels.get(query)
    return truth.label if found is None and one_channel(sample.media) == query else found


def row_of(draft: PairDraft, negatives: Mapping[Side, Negative]) -> JsonRow:
    """The row of ``pairs.jsonl``, as :func:`~mmemo.data.preference.load_preferences` reads it."""
    sample = draft.sample
    row: JsonRow = {
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
    rest: JsonRow = {
        "start": None if first is None else first.start,
        "end": None if first is None else first.end,
        "face_boxes": [] if face is None else _boxes(face),
        "label": truth.label,
        "labels": list(truth.labels),
        "aus": dict(truth.aus),
        "cues": cue_lists(truth),
        "modality_labels": dict(truth.modality_labels),
        "conflict": truth.conflict,
        "transcript": sample.transcript,
        "group": dict(sample.group),
        "tier": sample.tier,
        "difficulty": sample.difficulty,
        **{key: value for key, value in sample.columns.items() if key != "query_modality"},
    }
    return {**row, **{key: value for key, value in rest.items() if value not in (None, [], {})}}


def _negative(side: Side, negative: Negative) -> JsonRow:
    row: JsonRow = {f"{side}_kind": negative.kind, f"{side}_seed": negative.seed}
    # A file of a kind that can also be made of features has to say that it is one.
    written = negative.kind in FEATURE_KINDS and not negative.feature_level
    if side == "negative" or written:
        row["feature_level"] = negative.feature_level
    if negative.kind == "noise":
        row["snr_db"] = negative.snr_db
    row.update({f"{name}_{side}": _media(ref) for name, ref in negative.media.items()})
    return row


def _media(ref: MediaRef) -> JsonRow:
    """A media reference with its own span, without which the row's span would be read for it."""
    values: JsonRow = {
        "path": ref.path,
        "start": ref.start,
        "end": ref.end,
        "face_boxes": _boxes(ref),
    }
    return {key: value for key, value in values.items() if value not in (None, [])}


def _boxes(ref: MediaRef) -> list[JsonRow]:
    found: list[JsonRow] = []
    for one in ref.face_boxes:
        box: JsonRow = {"time": one.time, "box": list(one.box)}
        for name, eye in (("left_eye", one.left_eye), ("right_eye", one.right_eye)):
            if eye is not None:
                box[name] = list(eye)
        found.append(box)
    return found
