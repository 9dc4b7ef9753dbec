"""Pairs from labels and cues: the right answer, and copies of it with wrong reasoning.

``spurious``: the cues that the answer cites of one modality are replaced by cues of the same
modality that the row lists as spurious, or the answer rests on the modality that does not decide
in this clip. ``hallucinated``: the cues are replaced by those that another clip's answer cites for
the named emotion, at least one of which is absent from this clip; or a single one is replaced by an
absent cue (``hallucinated: one_cue``).

The number and the position of the cues stay the same, and each list of cues is used about as often
as right answers use it, so that neither length nor wording tells which answer is right. A share of
the rejected answers also names another emotion, and their cues are then cues of that emotion.

Source: AVEm-DPO, arXiv 2602.07054 (its rejected answers y_vr and y_er); making them by substitution
is ours.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmemo.answers.claims import read_claims, whole_word
from mmemo.data.cues import cue_key
from mmemo.data.preference import REJECTED, Answer, Query
from mmemo.data.row_models import CUE_KINDS, PLACEHOLDERS
from mmemo.data.sample import MODALITIES, Sample, Turn
from mmemo.pairs.channels import CueChannels
from mmemo.pairs.config import TruthSource
from mmemo.pairs.rows import (
    PairDraft,
    SkippedRows,
    can_be_asked,
    emotion_of,
    prompt_only,
    query_of,
)

_NAMES: Mapping[Query, tuple[str, ...]] = {
    "video": ("face", "facial", "picture", "video", "looks", "脸", "面部", "表情", "画面"),
    "audio": ("voice", "vocal", "sound", "sounds", "speech", "声音", "嗓音", "语音", "语气"),
}
"""Words that make a sentence without cues one about a modality."""
_CHANNELS: tuple[Query, ...] = ("video", "audio")
_WRITTEN: Mapping[Query, str] = {"video": "Face", "audio": "Voice"}
_MOST_CUES = 2  # cues of each modality in an answer that is written here
_MOST_OPTIONS = 8  # irrelevant cues among which a replacement of the right length is searched
_SHARED = 3  # right answers that must share a wording before it is used for another clip
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ARTICLE = re.compile(r"\b(an?|the) $", re.IGNORECASE)
_OWN_ARTICLE = re.compile(r"(?:an?|the) ", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.;!?。；！？\n<>]+")


@dataclass(frozen=True, slots=True)
class _CueSpan:
    """The characters of an answer that cite a cue."""

    start: int
    end: int
    cue: str


@dataclass(frozen=True, slots=True)
class _RightAnswer:
    """A right answer and the cues that it cites."""

    sample: Sample
    query: Query
    text: str
    channel: Query
    """The modality whose cues are to be made wrong."""
    emotion: str
    """The emotion that the answer names."""
    spans: tuple[_CueSpan, ...]
    """The cited cues of ``channel``."""
    kept: tuple[_CueSpan, ...]
    """The cited cues of the other modality, which stay."""

    def cited(self) -> tuple[str, ...]:
        """The distinct cues of the modality in the order of the text."""
        return tuple(dict.fromkeys(span.cue for span in self.spans))


PoolKey = tuple[Query, str, int]
"""Modality, emotion and number of the cited cues."""


class CueVocabulary:
    """All cues of the rows, and which of them are visible and which audible."""

    def __init__(self, samples: Sequence[Sample], source: TruthSource) -> None:
        self.channels = CueChannels(samples, source)
        self._closed = source.closed_vocabulary
        present = (cue for sample in samples for cue in sample.truth.cues.get("present", ()))
        self.all = tuple(dict.fromkeys(present))
        truths = [sample.truth for sample in samples]
        named = (one for t in truths for one in (t.label, *t.modality_labels.values()) if one)
        self.emotions = {one.casefold() for one in named}

    def of(self, sample: Sample, kind: str, channel: Query) -> list[str]:
        """The cues of a kind that a row has in a channel."""
        listed = dict.fromkeys(sample.truth.cues.get(kind, ()))
        return [cue for cue in listed if self.channels.of(sample, cue) == channel]

    def absent(self, sample: Sample, channel: Query) -> set[str]:
        """Keys of the cues of the modality that are known to be absent from the clip."""
        cues = sample.truth.cues
        here = {cue_key(cue) for kind in ("present", "spurious") for cue in cues.get(kind, ())}
        listed = {cue_key(cue) for cue in self.of(sample, "absent", channel)} - here
        if listed or not self._closed:
            return listed
        everything = (cue for cue in self.all if self.channels.of(sample, cue) == channel)
        # Where "loud sobbing" is present, "sobbing" is not absent.
        return {
            key
            for key in map(cue_key, everything)
            if not any(re.search(whole_word(key), one) for one in here)
        }


def from_truth(
    samples: Sequence[Sample],
    source: TruthSource,
    queries: Sequence[Query],
    seed: int,
    skipped: SkippedRows,
) -> list[PairDraft]:
    """One draft for each row or question whose answer cites a cue of the modality it is about."""
    cues = CueVocabulary(samples, source)
    skipped.channels = cues.channels.report()
    rights = list(_right_answers(samples, source, queries, cues, seed, skipped))
    # Rejected answers borrow their cues from all right ones, so these are collected first.
    pool: dict[PoolKey, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for right in rights:
        pool[right.channel, right.emotion, len(right.cited())][right.cited()] += 1
    maker = _RejectedMaker(cues, pool, _Outweighed(rights), source)
    drafts: list[PairDraft] = []
    for right in rights:
        answers = maker.answers(right, random.Random(f"{seed}/{right.sample.sample_id}"))
        if len(answers) == 1:
            skipped.add("no_wrong_cue", right.sample.sample_id)
            continue
        for name in REJECTED:
            if name not in answers:
                skipped.missing[f"{name}: {right.query}"] += 1
        named = tuple(dict.fromkeys(span.cue for span in (*right.spans, *right.kept)))
        drafts.append(PairDraft(prompt_only(right.sample, "-pair"), right.query, answers, named))
    return drafts


def _right_answers(
    samples: Sequence[Sample],
    source: TruthSource,
    queries: Sequence[Query],
    cues: CueVocabulary,
    seed: int,
    skipped: SkippedRows,
) -> Iterator[_RightAnswer]:
    for sample, query in _with_queries(samples, source, seed):
        if query not in queries:
            skipped.add("other_query", sample.sample_id)
        elif not sample.media:
            skipped.add("no_media", sample.sample_id)
        elif not can_be_asked(sample, query):
            skipped.add("no_such_stream", sample.sample_id)
        elif not sample.truth.cues.get("present") or emotion_of(sample, query) is None:
            skipped.add("no_truth", sample.sample_id)
        else:
            found = _right_answer(sample, query, cues, seed)
            if isinstance(found, str):
                skipped.add(found, sample.sample_id)
            else:
                yield found


def _with_queries(
    samples: Sequence[Sample], source: TruthSource, seed: int
) -> list[tuple[Sample, Query]]:
    """The rows with their queries, and the configured questions about each clip."""
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
        placeholders = "".join(PLACEHOLDERS[name] for name in MODALITIES if name in sample.media)
        for query, listed in source.questions.items():
            name = f"{sample.sample_id}-{query}"
            text = random.Random(f"{seed}/{name}/question").choice(listed)
            turns = (Turn("user", placeholders + text),)
            found.append((replace(sample, sample_id=name, turns=turns), query))
    return found


def _right_answer(
    sample: Sample, query: Query, cues: CueVocabulary, seed: int
) -> _RightAnswer | str:
    """The row's answer, or one written from its truth; the reason for which it cannot be used if it
    cites no cue of its modality."""
    text = sample.answer if sample.answer is not None else _write_answer(sample, query, cues)
    spans = _cue_spans(text, sample)
    by_channel: dict[Query, list[_CueSpan]] = {"video": [], "audio": []}
    unknown = False
    for span in spans:
        where = cues.channels.of(sample, span.cue)
        unknown |= where is None
        if where == "audio" or where == "video":
            by_channel[where].append(span)
    channel: Query = query
    if query == "joint":
        label, labels = sample.truth.label, sample.truth.modality_labels
        citing: list[Query] = [name for name in _CHANNELS if by_channel[name]]
        deciding: list[Query] = [name for name in citing if labels.get(name, label) == label]
        deciding = deciding or citing
        if deciding:
            channel = random.Random(f"{seed}/{sample.sample_id}/channel").choice(deciding)
    if channel == "joint" or not by_channel[channel]:
        return "unknown_channel" if unknown else "no_cue_cited"
    other: Query = "audio" if channel == "video" else "video"
    emotion = emotion_of(sample, query)
    assert emotion is not None
    if sample.answer is not None and _is_wrong(sample, emotion, cues):
        return "wrong_answer"
    here, kept = tuple(by_channel[channel]), tuple(by_channel[other])
    return _RightAnswer(sample, query, text, channel, emotion, here, kept)


def _is_wrong(sample: Sample, emotion: str, cues: CueVocabulary) -> bool:
    """Whether the row's own answer names another emotion, or asserts a cue that the row lists as
    absent or as spurious. Such an answer must not be chosen."""
    text, listed = sample.answer or "", sample.truth.cues
    right = {one.casefold() for one in (emotion, *_also_right(sample, emotion))}
    answered = _ANSWER.search(text)
    named = answered.group(1).strip().casefold() if answered else ""
    if named in cues.emotions - right:
        return True
    present = {cue_key(cue) for cue in listed["present"]}
    wrong = {cue for kind in ("absent", "spurious") for cue in listed.get(kind, ())}
    return any(cue_key(cue) not in present for cue in wrong & _asserted(text, sample))


def _also_right(sample: Sample, emotion: str) -> tuple[str, ...]:
    """The further emotions that the row accepts beside ``emotion``."""
    return sample.truth.labels if emotion == sample.truth.label else ()


def _write_answer(sample: Sample, query: Query, cues: CueVocabulary) -> str:
    """An answer in plain words, written from the row's labels and cues."""
    parts: list[str] = []
    for channel in _CHANNELS:
        if query not in ("joint", channel):
            continue
        emotion = sample.truth.modality_labels.get(channel)
        listed = cues.of(sample, "present", channel)
        words = [word for word in (emotion, *listed[:_MOST_CUES]) if word]
        parts.append(f"{_WRITTEN[channel]}: {', '.join(words)}." if words else "")
    reasons = " ".join(part for part in parts if part)
    return f"<think>{reasons}</think><answer>{emotion_of(sample, query)}</answer>"


def _asserted(text: str, sample: Sample) -> frozenset[str]:
    """The row's cues that the reasoning of an answer asserts."""
    # With all of its cues: in "laughter and no sobbing", the absent cue ends what is present.
    listed = sample.truth.cues
    cues: dict[str, str] = {}
    for cue in (cue for kind in CUE_KINDS for cue in listed.get(kind, ())):
        cues.setdefault(cue_key(cue), cue)  # a present one in other capitals is that cue
    body = text.partition("<answer>")[0]
    return read_claims(body, {cue: (cue,) for cue in cues.values()}).asserted


def _cue_spans(text: str, sample: Sample) -> list[_CueSpan]:
    """The spans in which the reasoning asserts a present cue; the longest matching cue wins."""
    body = text.partition("<answer>")[0]
    asserted = _asserted(text, sample).intersection(sample.truth.cues["present"])
    wordings = sorted(asserted, key=lambda cue: (-len(cue), cue))
    if not wordings:
        return []
    owner = {cue.lower(): cue for cue in wordings}
    pattern = "|".join(map(whole_word, wordings))
    return [
        _CueSpan(one.start(), one.end(), owner[one.group().lower()])
        for one in re.finditer(pattern, body, re.IGNORECASE)
        # Some letters match without regard to capitals and yet have other small letters: "İ".
        if one.group().lower() in owner
    ]


class _Outweighed:
    """Answers that decide by the wrong modality: every cue is in the clip, and those that the
    answer rests on are irrelevant to what the person feels.

    The wording is that of another clip's right answer, whose modalities express the same two
    emotions and where the other one of them decides. What is wrong about one clip is thus right
    about another, and no wording is rejected more often than right answers use it.

    Only wordings that several right answers share are used: any other may tell of its own clip.
    """

    def __init__(self, rights: Sequence[_RightAnswer]) -> None:
        emotions = {right.emotion for right in rights}
        emotions |= {one for r in rights for one in r.sample.truth.modality_labels.values()}
        names = sorted(filter(None, emotions), key=lambda name: (-len(name), name))
        named = re.compile("|".join(map(whole_word, names)) or "(?!)", re.IGNORECASE)
        self._right: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        self._used: Counter[tuple[tuple[str, ...], str]] = Counter()
        shapes: Counter[str] = Counter()
        wordings: list[tuple[tuple[str, ...], str, str]] = []
        for right in rights:
            key = self._key(right, right.emotion)
            if key is not None:
                wording = _with_cues(right, lambda channel, place: f"\0{channel}{place}\0")
                shape = named.sub("\0", wording)
                shapes[shape] += 1
                wordings.append((key, wording, shape))
        for key, wording, shape in wordings:
            if shapes[shape] >= _SHARED:
                self._right[key][wording] += 1

    def answer(self, right: _RightAnswer, rng: random.Random) -> str | None:
        """A wrong answer with the right one's cues; None if there is none."""
        labels = right.sample.truth.modality_labels
        other = labels.get("audio" if right.channel == "video" else "video")
        key = self._key(right, other)
        if key is None or other == right.emotion:
            return None
        options = [
            (self._used[key, wording] / count, rng.random(), wording)
            for wording, count in self._right.get(key, {}).items()
            if self._used[key, wording] < count
        ]
        if not options:
            return None
        wording = min(options)[-1]
        self._used[key, wording] += 1
        for (channel, place), cue in _placed(right).items():
            wording = wording.replace(f"\0{channel}{place}\0", cue)
        return wording

    def _key(self, right: _RightAnswer, decided: str | None) -> tuple[str, ...] | None:
        """The emotions of both modalities, the one that decides, and the number of their cues; None
        if the question or the answer is not about both, or the label is that of neither."""
        labels = right.sample.truth.modality_labels
        video, audio = labels.get("video"), labels.get("audio")
        if right.query != "joint" or not right.kept or None in (video, audio, decided):
            return None
        if right.emotion != labels[right.channel]:
            return None
        sizes = Counter(channel for channel, _ in _placed(right))
        return (str(video), str(audio), str(decided), str(sizes["video"]), str(sizes["audio"]))


def _placed(right: _RightAnswer) -> dict[tuple[Query, int], str]:
    """The cited cues by modality and number, in the order of the text."""
    other: Query = "audio" if right.channel == "video" else "video"
    found: dict[tuple[Query, int], str] = {}
    sides: tuple[tuple[Query, tuple[_CueSpan, ...]], ...] = (
        (right.channel, right.spans),
        (other, right.kept),
    )
    for channel, spans in sides:
        for place, cue in enumerate(dict.fromkeys(span.cue for span in spans)):
            found[channel, place] = cue
    return found


def _with_cues(right: _RightAnswer, cue_at: Callable[[Query, int], str]) -> str:
    """The right answer's text with its cues replaced by those of a modality and number."""
    where = {cue: name for name, cue in _placed(right).items()}
    text = right.text
    for span in sorted((*right.spans, *right.kept), key=lambda one: -one.start):
        text = text[: span.start] + cue_at(*where[span.cue]) + text[span.end :]
    return text


class _RejectedMaker:
    """Makes rejected answers out of right ones.

    Args:
        pool: how often right answers cite each list of cues, by modality, emotion and number.
        source: the share of wrong labels, and the kind of spurious answers.
    """

    def __init__(
        self,
        cues: CueVocabulary,
        pool: Mapping[PoolKey, Counter[tuple[str, ...]]],
        outweighed: _Outweighed,
        source: TruthSource,
    ) -> None:
        self._cues, self._pool, self._source = cues, pool, source
        self._outweighed = outweighed
        self._used: Counter[tuple[PoolKey, tuple[str, ...]]] = Counter()
        self._cited: dict[tuple[Query, str], Counter[str]] = defaultdict(Counter)
        self._used_once: Counter[tuple[Query, str, str]] = Counter()
        for (channel, emotion, _), lists in pool.items():
            for listed, count in lists.items():
                self._cited[channel, emotion].update(dict.fromkeys(listed, count))
        self._emotions: dict[tuple[Query, int], list[str]] = defaultdict(list)
        # Sorted, so that what is drawn from it does not depend on the order of the rows.
        for channel, emotion, count in sorted(pool):
            self._emotions[channel, count].append(emotion)

    def answers(self, right: _RightAnswer, rng: random.Random) -> dict[Answer, str]:
        """``chosen``, and the rejected answers that can be made from it."""
        found: dict[Answer, str] = {"chosen": right.text}
        spurious = None
        if self._source.spurious != "listed":
            spurious = self._outweighed.answer(right, rng)
        if spurious is None and self._source.spurious != "outweighed":
            spurious = self._listed(right, rng)
        if spurious is not None:
            found["spurious"] = spurious
        for emotion in self._named(right, rng):
            absent = None
            if self._source.hallucinated == "one_cue" and emotion == right.emotion:
                absent = self._one_absent(right, rng)
            absent = absent or self._hallucinated(right, emotion, rng)
            if absent is not None:
                found["hallucinated"] = _rewrite(right, absent, emotion)
                break
        return found

    def _named(self, right: _RightAnswer, rng: random.Random) -> list[str]:
        """The emotions that a rejected answer may name, in order of preference.

        The first is another emotion in ``wrong_share`` of the cases. In half of these, it is the
        emotion of the other modality if that differs.
        """
        listed = self._emotions[right.channel, len(right.cited())]
        right_too = {right.emotion, *_also_right(right.sample, right.emotion)}
        others = [emotion for emotion in listed if emotion not in right_too]
        rng.shuffle(others)
        other = right.sample.truth.modality_labels.get(
            "audio" if right.channel == "video" else "video"
        )
        if other in others and rng.random() < 0.5:
            others.insert(0, others.pop(others.index(other)))
        if rng.random() < self._source.wrong_label_share:
            return [*others, right.emotion]
        return [right.emotion, *others]

    def _listed(self, right: _RightAnswer, rng: random.Random) -> str | None:
        """The answer with cues that the row lists as spurious in the modality.

        Prefers replacements that keep the answer's length, then as many as possible.
        """
        present = {cue_key(cue) for cue in right.sample.truth.cues["present"]}
        options = self._cues.of(right.sample, "spurious", right.channel)
        options = [cue for cue in options if cue_key(cue) not in present]
        rng.shuffle(options)
        cited = list(right.cited())
        rng.shuffle(cited)
        best: tuple[tuple[int, int], dict[str, str]] | None = None
        for number in range(min(len(cited), len(options)), 0, -1):
            for listed in itertools.combinations(options[:_MOST_OPTIONS], number):
                # Not strict: with fewer irrelevant cues, the other cited cues stay as they are.
                swap = dict(zip(cited, listed, strict=False))
                gap = sum(len(new.split()) - len(old.split()) for old, new in swap.items())
                fit = (abs(gap), -number)
                if best is None or fit < best[0]:
                    best = (fit, swap)
        return None if best is None else _rewrite(right, best[1], self._named(right, rng)[0])

    def _hallucinated(
        self, right: _RightAnswer, emotion: str, rng: random.Random
    ) -> dict[str, str] | None:
        """Cited cue -> a cue that a right answer cites for the emotion; at least one is absent."""
        cited = right.cited()
        kind: PoolKey = (right.channel, emotion, len(cited))
        absent = self._cues.absent(right.sample, right.channel)
        present = self._cues.of(right.sample, "present", right.channel)
        known = absent | {cue_key(cue) for cue in present}
        options: list[tuple[float, int, float, tuple[str, ...]]] = []
        for listed, count in self._pool.get(kind, {}).items():
            keys = [cue_key(cue) for cue in listed]
            wrong = sum(key in absent for key in keys)
            if wrong and known.issuperset(keys):
                # Least used first, relative to how often right answers use it; the random number
                # decides ties.
                options.append((self._used[kind, listed] / count, -wrong, rng.random(), listed))
        if not options:
            return None
        listed = min(options)[-1]
        self._used[kind, listed] += 1
        return dict(zip(cited, listed, strict=True))

    def _one_absent(self, right: _RightAnswer, rng: random.Random) -> dict[str, str] | None:
        """One cited cue -> an absent cue that right answers cite for the same emotion.

        No cue is imagined more often than right answers cite it for the emotion, or the words would
        tell that it is imagined.
        """
        absent = self._cues.absent(right.sample, right.channel)
        cited = right.cited()
        options = [
            (self._used_once[right.channel, right.emotion, cue] / count, rng.random(), cue)
            for cue, count in self._cited[right.channel, right.emotion].items()
            if cue_key(cue) in absent and cue not in cited
        ]
        used, _, cue = min(options, default=(1.0, 0.0, ""))
        if used >= 1:
            return None
        self._used_once[right.channel, right.emotion, cue] += 1
        return {rng.choice(cited): cue}


def _rewrite(right: _RightAnswer, swap: Mapping[str, str], emotion: str) -> str:
    """The answer with cues swapped, and with ``emotion`` where it names the modality's emotion."""
    edits = [(span.start, span.end, swap[span.cue]) for span in right.spans if span.cue in swap]
    # A cue may name the emotion ("angry glare"), and stays what it is.
    cited = [(span.start, span.end) for span in (*right.spans, *right.kept)]
    if emotion != right.emotion:
        word = re.compile(whole_word(right.emotion), re.IGNORECASE)
        for sentence in _SENTENCE.finditer(right.text):
            if not _is_about_other(right, sentence.start(), sentence.end()):
                for one in word.finditer(right.text, sentence.start(), sentence.end()):
                    if all(one.end() <= start or one.start() >= end for start, end in cited):
                        edits.append((one.start(), one.end(), emotion))
    text = right.text
    # From the back, so that the positions of earlier edits stay valid.
    for start, end, new in sorted(edits, reverse=True):
        # A capital stays one, so that the form does not tell which answer is right.
        if text[start].isupper():
            new = new[0].upper() + new[1:]
        text = _after_article(text[:start], new) + text[end:]
    return text


def _after_article(before: str, new: str) -> str:
    """Both texts, with one article between them that fits, as the right answer has it."""
    found = _ARTICLE.search(before)
    if found is None:
        return before + new
    own = _OWN_ARTICLE.match(new)
    article, bare = found.group(1), new[own.end() :] if own else new
    if article.lower() != "the":
        article = article[0] + ("n" if bare[:1].lower() in "aeiou" else "")
    return f"{before[: found.start(1)]}{article} {bare}"


def _is_about_other(right: _RightAnswer, start: int, end: int) -> bool:
    """Whether a sentence is about the modality that stays right, and not the one made wrong."""

    def within(spans: Sequence[_CueSpan]) -> bool:
        return any(start <= span.start < end for span in spans)

    if within(right.spans):
        return False
    other: Query = "audio" if right.channel == "video" else "video"
    sentence = right.text[start:end].lower()
    names_other, names_own = (
        any(re.search(whole_word(name), sentence) for name in _NAMES[channel])
        for channel in (other, right.channel)
    )
    return within(right.kept) or bool(names_other and not names_own)
