"""Pairs from what is known of a clip: the right answer with its reasons made wrong.

``spurious``: the cues that the answer cites of one channel give way to some that are there and say
nothing of the emotion. ``hallucinated``: they give way to the cues that another clip's answer cites
for the emotion named, of which at least one is not in this clip. Number and place of the cues stay,
and each list of cues is taken about as often as right answers have it, so that neither length nor
wording tells which answer is right. A share of the rejected answers names another emotion too, and
then the reasons are that emotion's (AVEm-DPO, arXiv 2602.07054: y_vr and y_er; making them by
substitution is ours).
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmemo.answers.claims import read_claims
from mmemo.data.preference import Answer, Query
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES, Sample, Turn
from mmemo.pairs.config import TruthSource
from mmemo.pairs.rows import Draft, Left, emotion_of, prompt_only, query_of

_NAMES: Mapping[Query, tuple[str, ...]] = {
    "video": ("face", "facial", "picture", "video", "looks"),
    "audio": ("voice", "vocal", "sound", "sounds", "speech"),
}
"""Words by which a sentence without cues is about a channel."""
_CHANNELS: tuple[Query, ...] = ("video", "audio")
_WRITTEN: Mapping[Query, str] = {"video": "Face", "audio": "Voice"}
_MOST_CUES = 2  # of each channel, in answers that are written here
_MOST_OPTIONS = 8  # cues beside the point among which those of the right length are looked for
_SENTENCE = re.compile(r"[^.;!?\n<>]+")


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where an answer cites a cue."""

    start: int
    end: int
    cue: str


@dataclass(frozen=True, slots=True)
class _Right:
    """A right answer. ``spots``: the cues of the ``channel`` that is to be made wrong; ``kept``:
    those of the other. ``emotion`` is what the answer names."""

    sample: Sample
    query: Query
    text: str
    channel: Query
    emotion: str
    spots: tuple[_Spot, ...]
    kept: tuple[_Spot, ...]

    def cited(self) -> tuple[str, ...]:
        """The channel's cues in the order of the text, each once."""
        return tuple(dict.fromkeys(spot.cue for spot in self.spots))


Kind = tuple[Query, str, int]
"""Channel, emotion and number of the cues cited."""


class Cues:
    """What the rows together know of cues: which are seen and which are heard, and all of them."""

    def __init__(self, samples: Sequence[Sample], source: TruthSource) -> None:
        self._heard = re.compile(
            rf"\b(?:{'|'.join(map(re.escape, source.heard)) or '(?!)'})\b", re.IGNORECASE
        )
        self._closed = source.closed_vocabulary
        present = (cue for sample in samples for cue in sample.truth.cues.get("present", ()))
        self.all = tuple(dict.fromkeys(present))

    def channel(self, cue: str) -> Query:
        """``audio`` for a cue that is heard, ``video`` for one that is seen."""
        return "audio" if self._heard.search(cue) else "video"

    def absent(self, sample: Sample, channel: Query) -> set[str]:
        """Cues of the channel that are known not to be in the clip."""
        cues = sample.truth.cues
        here = {*cues.get("present", ()), *cues.get("spurious", ())}
        listed = {cue for cue in cues.get("absent", ()) if self.channel(cue) == channel} - here
        if listed or not self._closed:
            return listed
        return {cue for cue in self.all if self.channel(cue) == channel} - here


def from_truth(
    samples: Sequence[Sample], source: TruthSource, queries: Sequence[Query], seed: int, left: Left
) -> list[Draft]:
    """One draft for each row or question whose answer cites a cue of the channel it is about."""
    cues = Cues(samples, source)
    rights = list(_rights(samples, source, queries, cues, seed, left))
    pool: dict[Kind, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for right in rights:
        pool[right.channel, right.emotion, len(right.cited())][right.cited()] += 1
    maker = _Maker(cues, pool, source.wrong_label_share)
    drafts: list[Draft] = []
    for right in rights:
        answers = maker.answers(right, random.Random(f"{seed}/{right.sample.sample_id}"))
        if len(answers) == 1:
            left.out("no_wrong_cue", right.sample.sample_id)
            continue
        named = tuple(dict.fromkeys(spot.cue for spot in (*right.spots, *right.kept)))
        drafts.append(Draft(prompt_only(right.sample, "-pair"), right.query, answers, named))
    return drafts


def _rights(
    samples: Sequence[Sample],
    source: TruthSource,
    queries: Sequence[Query],
    cues: Cues,
    seed: int,
    left: Left,
) -> Iterator[_Right]:
    for sample, query in _asked(samples, source, seed):
        if query not in queries:
            left.out("other_query", sample.sample_id)
        elif "audio" not in sample.media or len(sample.media) == 1:
            left.out("one_channel", sample.sample_id)
        elif not sample.truth.cues.get("present") or emotion_of(sample, query) is None:
            left.out("no_truth", sample.sample_id)
        else:
            found = _right(sample, query, cues, seed)
            if found is None:
                left.out("no_cue_cited", sample.sample_id)
            else:
                yield found


def _asked(samples: Sequence[Sample], source: TruthSource, seed: int) -> list[tuple[Sample, Query]]:
    """The rows with what they ask about, and the configured questions about each clip."""
    found: list[tuple[Sample, Query]] = [(one, query_of(one, source.asks)) for one in samples]
    if not source.questions:
        return found
    clips: dict[tuple[object, ...], Sample] = {}
    for sample in samples:
        ref = next(iter(sample.media.values()), None)
        if ref is not None:
            key = (ref.path, ref.start, ref.end)
            if key not in clips or len(clips[key].media) < len(sample.media):
                clips[key] = sample
    for sample in clips.values():
        marks = "".join(PLACEHOLDERS[name] for name in MODALITIES if name in sample.media)
        for query, listed in source.questions.items():
            name = f"{sample.sample_id}-{query}"
            text = random.Random(f"{seed}/{name}/question").choice(listed)
            turns = (Turn("user", marks + text),)
            found.append((replace(sample, sample_id=name, turns=turns), query))
    return found


def _right(sample: Sample, query: Query, cues: Cues, seed: int) -> _Right | None:
    """The row's answer, or one that is written; None where it cites no cue of its channel."""
    text = sample.answer if sample.answer is not None else _written(sample, query, cues)
    spots = _spots(text, sample.truth.cues["present"])
    by_channel: dict[Query, list[_Spot]] = {"video": [], "audio": []}
    for spot in spots:
        by_channel[cues.channel(spot.cue)].append(spot)
    channel: Query = query
    if query == "joint":
        label, labels = sample.truth.label, sample.truth.modality_labels
        citing: list[Query] = [name for name in _CHANNELS if by_channel[name]]
        deciding: list[Query] = [name for name in citing if labels.get(name, label) == label]
        deciding = deciding or citing
        if not deciding:
            return None
        channel = random.Random(f"{seed}/{sample.sample_id}/channel").choice(deciding)
    if not by_channel[channel]:
        return None
    other: Query = "audio" if channel == "video" else "video"
    emotion = emotion_of(sample, query)
    assert emotion is not None
    here, kept = tuple(by_channel[channel]), tuple(by_channel[other])
    return _Right(sample, query, text, channel, emotion, here, kept)


def _written(sample: Sample, query: Query, cues: Cues) -> str:
    """An answer of the truth alone, in plain words."""
    parts: list[str] = []
    for channel in _CHANNELS:
        if query not in ("joint", channel):
            continue
        emotion = sample.truth.modality_labels.get(channel)
        listed = [cue for cue in sample.truth.cues["present"] if cues.channel(cue) == channel]
        said = [word for word in (emotion, *listed[:_MOST_CUES]) if word]
        parts.append(f"{_WRITTEN[channel]}: {', '.join(said)}." if said else "")
    reasons = " ".join(part for part in parts if part)
    return f"<think>{reasons}</think><answer>{emotion_of(sample, query)}</answer>"


def _spots(text: str, present: Sequence[str]) -> list[_Spot]:
    """Where the reasoning says that a cue is there; the longest cue wins."""
    body = text.partition("<answer>")[0]
    said = read_claims(body, {cue: (cue,) for cue in present}).asserted
    wordings = sorted(said, key=lambda cue: (-len(cue), cue))
    if not wordings:
        return []
    owner = {cue.lower(): cue for cue in wordings}
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, wordings))})(?!\w)"
    return [
        _Spot(one.start(), one.end(), owner[one.group().lower()])
        for one in re.finditer(pattern, body, re.IGNORECASE)
    ]


class _Maker:
    """Makes right answers wrong. ``pool``: which cues right answers cite together, how often."""

    def __init__(
        self, cues: Cues, pool: Mapping[Kind, Counter[tuple[str, ...]]], wrong_share: float
    ) -> None:
        self._cues, self._pool, self._wrong_share = cues, pool, wrong_share
        self._used: Counter[tuple[Kind, tuple[str, ...]]] = Counter()
        self._emotions: dict[tuple[Query, int], list[str]] = defaultdict(list)
        for channel, emotion, count in sorted(pool):
            self._emotions[channel, count].append(emotion)

    def answers(self, right: _Right, rng: random.Random) -> dict[Answer, str]:
        """``chosen``, and the rejected answers that can be made."""
        found: dict[Answer, str] = {"chosen": right.text}
        beside = self._spurious(right, rng)
        if beside is not None:
            found["spurious"] = _rewritten(right, beside, self._named(right, rng)[0])
        for emotion in self._named(right, rng):
            imagined = self._imagined(right, emotion, rng)
            if imagined is not None:
                found["hallucinated"] = _rewritten(right, imagined, emotion)
                break
        return found

    def _named(self, right: _Right, rng: random.Random) -> list[str]:
        """Emotions to name, the first choice first: the right one or another, of which the other
        channel's comes first in half of the cases where it differs."""
        listed = self._emotions[right.channel, len(right.cited())]
        others = [emotion for emotion in listed if emotion != right.emotion]
        rng.shuffle(others)
        other = right.sample.truth.modality_labels.get(
            "audio" if right.channel == "video" else "video"
        )
        if other in others and rng.random() < 0.5:
            others.insert(0, others.pop(others.index(other)))
        if rng.random() < self._wrong_share:
            return [*others, right.emotion]
        return [right.emotion, *others]

    def _spurious(self, right: _Right, rng: random.Random) -> dict[str, str] | None:
        """Cited cue -> one beside the point: those that keep the answer's length, then as many as
        there are, then those of the question's channel."""
        truth = right.sample.truth.cues
        options = [cue for cue in truth.get("spurious", ()) if cue not in truth["present"]]
        rng.shuffle(options)
        cited = list(right.cited())
        rng.shuffle(cited)
        best: tuple[tuple[int, int, int], dict[str, str]] | None = None
        for number in range(min(len(cited), len(options)), 0, -1):
            for listed in itertools.combinations(options[:_MOST_OPTIONS], number):
                swap = dict(zip(cited, listed, strict=False))
                gap = sum(len(new.split()) - len(old.split()) for old, new in swap.items())
                elsewhere = sum(self._cues.channel(cue) != right.channel for cue in listed)
                fit = (abs(gap), -number, elsewhere)
                if best is None or fit < best[0]:
                    best = (fit, swap)
        return best and best[1]

    def _imagined(self, right: _Right, emotion: str, rng: random.Random) -> dict[str, str] | None:
        """Cited cue -> a cue that an answer cites for the emotion, at least one of them absent."""
        cited = right.cited()
        kind: Kind = (right.channel, emotion, len(cited))
        absent = self._cues.absent(right.sample, right.channel)
        known = absent | set(right.sample.truth.cues["present"])
        options: list[tuple[float, int, float, tuple[str, ...]]] = []
        for listed, count in self._pool.get(kind, {}).items():
            wrong = len(absent.intersection(listed))
            if wrong and known.issuperset(listed):
                options.append((self._used[kind, listed] / count, -wrong, rng.random(), listed))
        if not options:
            return None
        listed = min(options)[-1]
        self._used[kind, listed] += 1
        return dict(zip(cited, listed, strict=True))


def _rewritten(right: _Right, swap: Mapping[str, str], emotion: str) -> str:
    """The text with cues swapped, and with another emotion where it names that of the channel."""
    edits = [(spot.start, spot.end, swap[spot.cue]) for spot in right.spots if spot.cue in swap]
    if emotion != right.emotion:
        word = re.compile(rf"(?<!\w){re.escape(right.emotion)}(?!\w)", re.IGNORECASE)
        for sentence in _SENTENCE.finditer(right.text):
            if not _about_other(right, sentence.start(), sentence.end()):
                for one in word.finditer(right.text, sentence.start(), sentence.end()):
                    if all(one.end() <= start or one.start() >= end for start, end, _ in edits):
                        edits.append((one.start(), one.end(), emotion))
    text = right.text
    for start, end, new in sorted(edits, reverse=True):
        if text[start].isupper():
            new = new[0].upper() + new[1:]
        text = text[:start] + new + text[end:]
    return text


def _about_other(right: _Right, start: int, end: int) -> bool:
    """Whether a sentence speaks of the channel that stays true, and not of the one made wrong."""

    def within(spots: Sequence[_Spot]) -> bool:
        return any(start <= spot.start < end for spot in spots)

    if within(right.spots):
        return False
    other: Query = "audio" if right.channel == "video" else "video"
    words = set(re.findall(r"\w+", right.text[start:end].lower()))
    names_other, names_own = words & {*_NAMES[other]}, words & {*_NAMES[right.channel]}
    return within(right.kept) or bool(names_other and not names_own)
