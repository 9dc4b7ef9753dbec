"""Clips with some of their streams blanked or swapped, to see what an answer hangs on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mmemo.data.collate import Source
from mmemo.data.negatives import StreamFeatures, corrupt
from mmemo.data.preference import Negative
from mmemo.data.sample import Modality, Sample
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.predictions import Row

BLANKS: Mapping[Modality, str] = {"audio": "muted", "video": "blank_face", "face": "blank_face"}
"""The kind of negative that empties a stream; see :mod:`mmemo.data.negatives`."""


@dataclass(frozen=True, slots=True)
class Change:
    """``streams`` are blanked, or all swapped for those of one other clip."""

    kind: Literal["blanked", "swapped"]
    streams: tuple[Modality, ...]

    @property
    def name(self) -> str:
        """``blanked_audio``, ``swapped_video_face``."""
        return "_".join([self.kind, *self.streams])


@dataclass(frozen=True, slots=True)
class Changed:
    """The questions that a change can be made to, and for each what its row says of the change.
    ``left_out``: how many others there are."""

    questions: list[Question]
    noted: list[Row]
    left_out: int


def changes_of(groups: Sequence[Sequence[Modality]], questions: Sequence[Question]) -> list[Change]:
    """Each group blanked and swapped, as far as some question has its streams; those that no
    question has leave their groups, and a group that is there twice then is made once."""
    there = {name for question in questions for name in question.sample.media}
    found: list[Change] = []
    for group in groups:
        streams: tuple[Modality, ...] = tuple(name for name in group if name in there)
        if streams and streams not in [one.streams for one in found]:
            found += [Change("blanked", streams), Change("swapped", streams)]
    return found


def blanked(features: StreamFeatures, streams: Sequence[Modality]) -> StreamFeatures:
    """The features with ``streams`` empty, as far as they are there."""
    for name in streams:
        if name in features:
            features = corrupt(features, Negative(BLANKS[name], True, {}, (name,), 0))
    return features


class BlankedSource:
    """Where features come from, with some streams empty."""

    def __init__(self, source: Source, streams: Sequence[Modality]) -> None:
        self._source, self._streams = source, streams

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, Tensor]]:
        """As the source, with the streams blanked."""
        return blanked(self._source.get(sample), self._streams)


def changed(
    change: Change, asked: Sequence[Question], pool: Sequence[Question], seed: int
) -> Changed:
    """The questions of ``asked`` that have all streams of the change.

    A swap takes all streams of one other clip of ``pool``, of another file, in which none of them
    shows what the clip's own one shows, or the right answer: a right answer then has to come from
    elsewhere. Another clip of the same person is taken where there is one, so that no more than the
    emotion changes. Blanked questions are the same ones; it is the features that change.
    """
    questions: list[Question] = []
    noted: list[Row] = []
    streams = change.streams
    donors = [question for question in pool if set(streams) <= set(question.sample.media)]
    donors.sort(key=lambda question: question.sample.sample_id)
    for question in asked:
        if not set(streams) <= set(question.sample.media):
            continue
        one = question
        note: Row = {"change": change.kind, "streams": list(streams)}
        if change.kind == "swapped":
            donor = _donor(question, streams, donors, seed)
            if donor is None:
                continue
            shown = sorted(set(_shown(donor, streams)))
            note |= {"donor": donor.sample.sample_id, "shown": shown}
            taken = {name: donor.sample.media[name] for name in streams}
            media = {**question.sample.media, **taken}
            one = replace(question, sample=replace(question.sample, media=media))
        questions.append(one)
        noted.append(note)
    return Changed(questions, noted, len(asked) - len(questions))


def _donor(
    question: Question, streams: Sequence[Modality], donors: Sequence[Question], seed: int
) -> Question | None:
    own = question.sample
    taken = {question.truth, *_shown(question, streams)}
    files = {ref.path for ref in own.media.values()}
    fitting = [
        one
        for one in donors
        if taken.isdisjoint(_shown(one, streams))
        and files.isdisjoint(one.sample.media[name].path for name in streams)
    ]
    speaker = own.group.get("speaker")
    same = [one for one in fitting if speaker and one.sample.group.get("speaker") == speaker]
    found = same or fitting
    draw = random.Random(f"{seed}/{own.sample_id}/{'/'.join(streams)}")
    return draw.choice(found) if found else None


def _shown(question: Question, streams: Sequence[Modality]) -> list[str]:
    """The label of each stream: the voice's or the face's own, else the clip's."""
    known = question.modality_labels
    channel = {"audio": "audio", "video": "video", "face": "video"}
    return [known.get(channel[name], question.truth) for name in streams]
