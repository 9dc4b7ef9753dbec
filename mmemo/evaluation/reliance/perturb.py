"""Clips with some of their streams blanked or swapped, to see which ones an answer relies on."""

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
"""The kind of negative that blanks each stream; see :mod:`mmemo.data.negatives`."""


@dataclass(frozen=True, slots=True)
class Perturbation:
    """Blanks ``streams``, or swaps them for the same streams of one other clip."""

    kind: Literal["blanked", "swapped"]
    streams: tuple[Modality, ...]

    @property
    def name(self) -> str:
        """``blanked_audio``, ``swapped_video_face``."""
        return "_".join([self.kind, *self.streams])


@dataclass(frozen=True, slots=True)
class PerturbedQuestions:
    """The questions that a perturbation applies to, and for each one (``noted``) what its row
    records of the perturbation. ``left_out`` counts the questions that it does not apply to."""

    questions: list[Question]
    noted: list[Row]
    left_out: int


def perturbations_of(
    groups: Sequence[Sequence[Modality]], questions: Sequence[Question]
) -> list[Perturbation]:
    """The perturbations that blank and that swap each group of streams.

    Streams that no question has are dropped from their groups; empty and repeated groups are left
    out.
    """
    there = {name for question in questions for name in question.sample.media}
    found: list[Perturbation] = []
    for group in groups:
        streams: tuple[Modality, ...] = tuple(name for name in group if name in there)
        if streams and streams not in [one.streams for one in found]:
            found += [Perturbation("blanked", streams), Perturbation("swapped", streams)]
    return found


def blanked(features: StreamFeatures, streams: Sequence[Modality]) -> StreamFeatures:
    """The features with ``streams`` blanked, where they are present."""
    for name in streams:
        if name in features:
            features = corrupt(features, Negative(BLANKS[name], True, {}, (name,), 0))
    return features


class BlankedSource:
    """A feature source that blanks some streams of every clip."""

    def __init__(self, source: Source, streams: Sequence[Modality]) -> None:
        self._source, self._streams = source, streams

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, Tensor]]:
        """The features of the underlying source, with the streams blanked."""
        return blanked(self._source.get(sample), self._streams)


def perturb(
    change: Perturbation, asked: Sequence[Question], pool: Sequence[Question], seed: int
) -> PerturbedQuestions:
    """Apply a perturbation to the questions of ``asked`` that have all of its streams.

    Swapping takes the streams from one clip of ``pool`` in another file, none of whose streams
    shows what the clip's own stream shows or the right answer: a right answer then has to come from
    elsewhere. A clip of the same person is preferred, so that little but the emotion changes.
    Blanking leaves the questions as they are; the features are blanked when they are read.
    """
    questions: list[Question] = []
    noted: list[Row] = []
    streams = change.streams
    donors = [question for question in pool if set(streams) <= set(question.sample.media)]
    # Sorted, so that the choice does not depend on the order of the manifest.
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
    return PerturbedQuestions(questions, noted, len(asked) - len(questions))


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
    # A generator per question: its donor does not depend on which other questions are asked.
    draw = random.Random(f"{seed}/{own.sample_id}/{'/'.join(streams)}")
    return draw.choice(found) if found else None


def _shown(question: Question, streams: Sequence[Modality]) -> list[str]:
    """The label of each stream: that of the voice or the face, else that of the clip."""
    known = question.modality_labels
    channel = {"audio": "audio", "video": "video", "face": "video"}
    return [str(known.get(channel[name], question.truth)) for name in streams]
