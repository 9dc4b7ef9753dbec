"""Chooses a negative for each pair: its kind by weight, and clips of other people or emotions."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmemo.data.preference import (
    FEATURE_KINDS,
    KIND_STREAMS,
    WRITTEN_KINDS,
    Negative,
    Query,
    Side,
    queried,
    seed_of,
    unqueried,
)
from mmemo.data.sample import MediaRef, Modality, Sample
from mmemo.errors import ConfigError
from mmemo.pairs.config import NegativesConfig
from mmemo.pairs.leaks import clip_of
from mmemo.pairs.rows import PairDraft, emotion_of

_TRIES = 40  # random clips that are tried before all clips are searched
_CHANNELS: tuple[Query, ...] = ("video", "audio")


@dataclass(frozen=True, slots=True)
class _Clip:
    """A clip with every stream that any row names for it."""

    sample: Sample
    media: Mapping[Modality, MediaRef]

    def emotion(self, query: Query) -> str | None:
        return emotion_of(self.sample, query)


class Negatives:
    """Chooses negatives for pairs.

    The same config, seed and rows give the same negatives: those of a pair depend on its own id and
    on the set of clips.

    Attributes:
        without: side -> number of pairs that got no negative on that side.
        given_up: kind -> number of pairs for which the kind was drawn but could not be made.
    """

    def __init__(self, config: NegativesConfig, samples: Sequence[Sample], seed: int) -> None:
        self.config, self._seed = config, seed
        self._clips = _clips(samples)
        self._by_emotion: dict[tuple[Query, str], list[_Clip]] = defaultdict(list)
        for clip in self._clips:
            for channel in _CHANNELS:
                emotion = clip.emotion(channel)
                if emotion is not None:
                    self._by_emotion[channel, emotion].append(clip)
        self.without: Counter[str] = Counter()
        self.given_up: Counter[str] = Counter()

    def choose(self, draft: PairDraft) -> dict[Side, Negative]:
        """The negatives of a pair, by side; a side may have none.

        Raises:
            ConfigError: no kind of the config can replace all streams that the pair asks about.
        """
        media = draft.sample.media
        chosen: dict[Side, Negative] = {}
        sides: list[tuple[Side, Mapping[str, float], tuple[Modality, ...]]] = [
            ("negative", self.config.kinds, queried(draft.query, media)),
            ("irrelevant", self.config.irrelevant, unqueried(draft.query, media)),
        ]
        for side, weights, streams in sides:
            if not weights or (side == "irrelevant" and draft.query == "joint"):
                continue
            negative = self._one(draft, side, weights, streams) if streams else None
            if negative is None:
                self.without[side] += 1
            else:
                chosen[side] = negative
        return chosen

    def _one(
        self,
        draft: PairDraft,
        side: Side,
        weights: Mapping[str, float],
        streams: tuple[Modality, ...],
    ) -> Negative | None:
        name = f"{self._seed}/{draft.sample.sample_id}/{side}"
        rng = random.Random(name)
        remaining = {
            kind: weight
            for kind, weight in weights.items()
            if weight > 0 and set(streams) <= set(KIND_STREAMS[kind])
        }
        if side == "negative" and not remaining and any(weights.values()):
            # Not known before the rows are: such kinds suffice for clips with one modality.
            raise ConfigError(
                f"negatives.kinds: none of {', '.join(weights)} can replace "
                f"{' and '.join(streams)}, which '{draft.sample.sample_id}' asks about; add one "
                "such as different_label or noise"
            )
        while remaining:
            kind = rng.choices(list(remaining), list(remaining.values()))[0]
            snr_db = self.config.snr_db if kind == "noise" else 0.0
            # Files are shared by all pairs about the clip.
            shared = self.config.level == "media"
            seed = seed_of(f"{self._seed}/{clip_of(draft.sample)}" if shared else name, kind)
            if kind in (*FEATURE_KINDS, *WRITTEN_KINDS):
                return Negative(kind, True, {}, streams, seed, snr_db)
            media = self._media(draft, kind, streams, rng)
            if media is not None:
                return Negative(kind, False, media, streams, seed)
            self.given_up[kind] += 1
            del remaining[kind]
        return None

    def _media(
        self, draft: PairDraft, kind: str, streams: tuple[Modality, ...], rng: random.Random
    ) -> dict[Modality, MediaRef] | None:
        """Streams of other clips; picture and face come from the same clip."""
        sounds = "audio" in streams
        about: Query = "joint" if sounds and len(streams) > 1 else "audio" if sounds else "video"
        if kind == "swapped":
            return self._swapped(draft, streams, rng)
        own, speaker = emotion_of(draft.sample, about), draft.sample.group.get("speaker")
        cited = set(draft.cited)

        def differs(clip: _Clip) -> bool:
            # An unknown emotion may be the same one.
            return clip.emotion(about) not in (None, own)

        def is_other_person(clip: _Clip) -> bool:
            # A clip that shows every cited cue would make the chosen answer right there too.
            present = set(clip.sample.truth.cues.get("present", ()))
            fits = bool(cited) and cited <= present
            return (
                clip.emotion(about) == own
                and clip.sample.group.get("speaker") not in (None, speaker)
                and not fits
            )

        if own is None or (kind == "other_speaker" and speaker is None):
            return None
        condition = differs if kind == "different_label" else is_other_person
        clip = self._find(self._clips, condition, draft, streams, rng)
        return clip and {name: clip.media[name] for name in streams}

    def _swapped(
        self, draft: PairDraft, streams: tuple[Modality, ...], rng: random.Random
    ) -> dict[Modality, MediaRef] | None:
        """Streams in which each modality shows the emotion of the clip's other modality."""
        found: dict[Modality, MediaRef] = {}
        for channel in _CHANNELS:
            other: Query = "audio" if channel == "video" else "video"
            mine: tuple[Modality, ...] = tuple(
                name for name in streams if (name == "audio") == (channel == "audio")
            )
            if not mine:
                continue
            carried = emotion_of(draft.sample, other)
            # Where both modalities carry one emotion, the exchange would be no negative.
            if carried is None or carried == emotion_of(draft.sample, channel):
                return None
            clips = self._by_emotion[channel, carried]
            clip = self._find(clips, lambda _: True, draft, mine, rng)
            if clip is None:
                return None
            found |= {name: clip.media[name] for name in mine}
        return found

    @staticmethod
    def _find(
        clips: Sequence[_Clip],
        condition: Callable[[_Clip], bool],
        draft: PairDraft,
        streams: tuple[Modality, ...],
        rng: random.Random,
    ) -> _Clip | None:
        """A random clip that meets the condition, has all the streams, and is of other files."""
        own = {ref.path for ref in draft.sample.media.values()}

        def fits(clip: _Clip) -> bool:
            has = all(name in clip.media for name in streams)
            return has and not own & {clip.media[name].path for name in streams} and condition(clip)

        for _ in range(min(_TRIES, len(clips))):
            clip = rng.choice(clips)
            if fits(clip):
                return clip
        rest = [clip for clip in clips if fits(clip)]
        return rng.choice(rest) if rest else None


def _clips(samples: Sequence[Sample]) -> list[_Clip]:
    """The distinct clips of all rows, each with every stream that any row names for it."""
    found: dict[tuple[object, ...], tuple[Sample, dict[Modality, MediaRef]]] = {}
    for sample in samples:
        ref = next(iter(sample.media.values()), None)
        if ref is not None:
            _, media = found.setdefault((ref.path, ref.start, ref.end), (sample, {}))
            for name, one in sample.media.items():
                media.setdefault(name, one)
    return [_Clip(sample, media) for sample, media in found.values()]
