"""In which channel each cue of the rows is: what the rows say, and else what its words suggest.

A row's own statement counts first, then that of the other rows if they agree, then the config's
``heard`` and ``seen``, and last the lexicon of :mod:`mmemo.answers.cue_channels`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from mmemo.answers.cue_channels import guess_channel
from mmemo.answers.words import EDGES
from mmemo.data.cues import cue_key
from mmemo.data.sample import CueChannel, Sample
from mmemo.pairs.config import TruthSource

Origin = Literal["stated", "config", "guessed", "unknown"]


class CueChannels:
    """The channel of each cue of the rows."""

    def __init__(self, samples: Sequence[Sample], source: TruthSource) -> None:
        self._samples = samples
        stated: dict[str, set[CueChannel]] = defaultdict(set)
        for sample in samples:
            for cue, channel in sample.truth.cue_channels.items():
                stated[cue_key(cue)].add(channel)
        self._stated: dict[str, CueChannel] = {
            cue: next(iter(channels)) for cue, channels in stated.items() if len(channels) == 1
        }
        self._heard, self._seen = _words(source.heard), _words(source.seen)

    def of(self, sample: Sample, cue: str) -> CueChannel | None:
        """The cue's channel in a row; None if it is unknown."""
        return self._find(sample, cue)[0]

    def _find(self, sample: Sample, cue: str) -> tuple[CueChannel | None, Origin]:
        own = sample.truth.cue_channels.get(cue) or self._stated.get(cue_key(cue))
        if own is not None:
            return own, "stated"
        heard, seen = self._heard.search(cue), self._seen.search(cue)
        if bool(heard) != bool(seen):
            return "audio" if heard else "video", "config"
        guess = guess_channel(cue)
        return guess, "unknown" if guess is None else "guessed"

    def report(self) -> dict[str, Any]:
        """The number of distinct cues by origin of their channel, and the names of those whose
        channel is a guess or unknown, with the number of rows that list them."""
        found: dict[Origin, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        for sample in self._samples:
            for kind in ("present", "absent", "spurious"):
                for cue in sample.truth.cues.get(kind, ()):
                    channel, origin = self._find(sample, cue)
                    found[origin][channel or "unknown"][cue_key(cue)] += 1

        def counts(origin: Origin) -> dict[str, int]:
            return {name: len(cues) for name, cues in sorted(found[origin].items())}

        return {
            "stated": counts("stated"),
            "config": counts("config"),
            "guessed": {name: _ranked(cues) for name, cues in sorted(found["guessed"].items())},
            "unknown": _ranked(found["unknown"]["unknown"]),
        }


def _ranked(cues: Counter[str]) -> dict[str, int]:
    """The cues and their rows, the most frequent first."""
    return dict(sorted(cues.items(), key=lambda one: (-one[1], one[0])))


def _words(listed: Sequence[str]) -> re.Pattern[str]:
    # Without any words the pattern must match nothing; an empty alternative would match everywhere.
    joined = "|".join(map(re.escape, listed)) or "(?!)"
    # Scripts without spaces between words have no word boundaries to match.
    return re.compile(f"{EDGES[0]}(?:{joined}){EDGES[1]}", re.IGNORECASE)
