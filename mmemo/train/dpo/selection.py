"""Which pairs a preference run learns from: missing negatives, and pairs without a gradient.

A pair that no term can learn from would take a place in a batch, and in the worst case a whole
step, with a gradient of 0. Such pairs are left out, counted and named instead:

    same_tokens   a rejected answer has the tokens of the chosen one, because a chat template trims
                  the difference away; the answer is left out, and the pair if it has no other
    same_clip     a negative has the features of the clip itself, because its file is a copy; the
                  negative is left out
    no_term       no term with a weight counts the pair, such as a joint question under ``mod_dpo``
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mmemo.console import console
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import (
    REJECTED,
    Answer,
    Preference,
    Side,
    load_preferences,
    not_replaced,
    with_noise,
    with_noised_audio,
)
from mmemo.errors import DataError
from mmemo.losses.objective import Branch, BuiltTerm, LogpRequest
from mmemo.train.dpo.batch import PairLengths, counted_pairs, has_branch, negative_of, presence
from mmemo.train.dpo.config import DpoLossConfig

Reason = Literal["same_tokens", "same_clip", "no_term"]

_SIDES: tuple[Side, ...] = ("negative", "irrelevant")
_NAMED = 5  # ids in a printed line; the run record has all
_SAID: Mapping[Reason, str] = {
    "same_tokens": "have a rejected answer with the tokens of the chosen one, which is left out "
    "(the chat template or the tokenizer removes the difference)",
    "same_clip": "have a negative with the features of the clip itself, which is left out",
    "no_term": "are left out, because no term of the objective can learn from them",
}


def load_pairs(
    data: DataConfig, requests: Sequence[LogpRequest], config: DpoLossConfig
) -> list[Preference]:
    """The pairs of the manifests, with the negatives that the terms read as the config has them:
    missing ones filled in, and the sound of all replaced by noise.

    Raises:
        DataError: a row is wrong.
    """
    pairs = load_preferences(data)
    for side in _read(requests) if config.missing_negative == "noise" else ():
        pairs = [with_noise(pair, side) for pair in pairs]
    if config.negative_audio == "noise":
        pairs = [with_noised_audio(pair) for pair in pairs]
    return pairs


def _read(requests: Sequence[LogpRequest]) -> list[Side]:
    """The sides whose negatives the terms read."""
    branches = {one.branch for one in requests}
    return [side for side in _SIDES if side in branches]


def negative_counts(
    pairs: Sequence[Preference], requests: Sequence[LogpRequest]
) -> dict[str, dict[str, int]]:
    """How the negatives of the pairs are made, by side, for the sides that the terms read.

    Returns:
        side -> numbers of pairs: ``whole`` (the row's negative replaces every stream of its side),
        ``partly`` (only some of them, in a joint question), ``noise`` (uniform noise fills in what
        is missing), ``missing`` (no negative). A pair without streams on a side, such as a joint
        question on the irrelevant one, is in none of them.
    """
    found: dict[str, dict[str, int]] = {}
    for side in _read(requests):
        kinds = [_made(pair, side) for pair in pairs]
        found[side] = dict(Counter(kind for kind in kinds if kind is not None))
    return found


def _made(pair: Preference, side: Side) -> str | None:
    negative, left = negative_of(pair, side), not_replaced(pair, side)
    if negative is None:
        return "missing" if left else None
    if negative.noised or negative.kind == "uniform_noise":
        return "noise"
    return "partly" if left else "whole"


@dataclass(slots=True)
class Selection:
    """The pairs that are left, and those that were left out."""

    pairs: list[Preference]
    rows: list[int]
    """The place of each pair among those that the selection began with."""
    left_out: dict[Reason, list[str]] = field(default_factory=dict[Reason, list[str]])
    """reason -> ids of the pairs that it concerns, in file order."""
    unlearnable: Counter[str] = field(default_factory=Counter[str])
    """query -> number of pairs left out for ``no_term``."""

    @classmethod
    def of(cls, pairs: Sequence[Preference]) -> Selection:
        """The selection of all pairs."""
        return cls(list(pairs), list(range(len(pairs))))

    def keep(self, wanted: Callable[[Preference], bool]) -> None:
        """Keep the pairs for which ``wanted`` is true."""
        kept = [at for at, pair in enumerate(self.pairs) if wanted(pair)]
        self.pairs = [self.pairs[at] for at in kept]
        self.rows = [self.rows[at] for at in kept]

    def drop_unlearnable(self, terms: Sequence[BuiltTerm], requests: Sequence[LogpRequest]) -> None:
        """Leave out the pairs that no term with a weight above 0 counts."""
        present = presence(self.pairs, requests)
        counted = counted_pairs([term for term in terms if term.weight > 0], present)
        learnt = [any(each) for each in zip(*(x.tolist() for x in counted.values()), strict=True)]
        gone = [pair for pair, learns in zip(self.pairs, learnt, strict=True) if not learns]
        self._note("no_term", gone)
        self.unlearnable.update(pair.query for pair in gone)
        places = {id(pair) for pair in gone}
        self.keep(lambda pair: id(pair) not in places)

    def drop_same_tokens(self, measured: Sequence[PairLengths]) -> None:
        """Leave out rejected answers that have the tokens of the chosen one.

        Args:
            measured: the measures of the pairs, in their order.

        Raises:
            DataError: no pair has another rejected answer.
        """
        changed: list[Preference] = []
        for at, (pair, lengths) in enumerate(zip(self.pairs, measured, strict=True)):
            tokens = lengths.token_digests
            have: list[Answer] = [name for name in REJECTED if name in pair.answers]
            same = [name for name in have if tokens[False, name] == tokens[False, "chosen"]]
            if same:
                left = {name: text for name, text in pair.answers.items() if name not in same}
                self.pairs[at] = replace(pair, answers=left)
                changed.append(pair)
        self._note("same_tokens", changed)
        self.keep(lambda pair: len(pair.answers) > 1)
        if changed and not self.pairs:
            ids = _listed([pair.sample.sample_id for pair in changed])
            raise DataError(
                f"every pair ({ids}) has rejected answers with the tokens of the chosen one alone; "
                "the chat template or the tokenizer removes the difference, so write answers that "
                "differ in more"
            )

    def drop_same_clip(
        self, digest: Callable[[Preference, Branch], str], requests: Sequence[LogpRequest]
    ) -> None:
        """Leave out negatives that show the features of the clip itself, of those that the terms
        read: the files of the others need not exist.

        Args:
            digest: gives the digest of what a branch of a pair shows.
        """
        changed: list[Preference] = []
        for at, pair in enumerate(self.pairs):
            sides: list[Side] = [side for side in _read(requests) if has_branch(pair, side)]
            same = [side for side in sides if digest(pair, side) == digest(pair, "input")]
            if same:
                negative = None if "negative" in same else pair.negative
                irrelevant = None if "irrelevant" in same else pair.irrelevant
                self.pairs[at] = replace(pair, negative=negative, irrelevant=irrelevant)
                changed.append(pair)
        self._note("same_clip", changed)

    def check_any(self) -> None:
        """Check that pairs are left to learn from.

        Raises:
            DataError: none are.
        """
        if self.left_out and not self.pairs:
            why = "; ".join(f"{_listed(ids)} {_SAID[name]}" for name, ids in self.left_out.items())
            raise DataError(f"no pair is left to learn from: {why}; change the rows or the terms")

    def _note(self, reason: Reason, pairs: Sequence[Preference]) -> None:
        if pairs:
            ids = [pair.sample.sample_id for pair in pairs]
            self.left_out[reason] = [*self.left_out.get(reason, ()), *ids]

    def tell(self, requests: Sequence[LogpRequest]) -> None:
        """Print what was left out, and how negatives come about where rows do not give them."""
        for reason, ids in self.left_out.items():
            by_query = ", ".join(f"{n:,} {query}" for query, n in self.unlearnable.items())
            asked = f" ({by_query})" if reason == "no_term" else ""
            console.print(f"{len(ids):,} pairs{asked} {_SAID[reason]}: {_listed(ids)}")
        for side, counts in negative_counts(self.pairs, requests).items():
            if set(counts) - {"whole"}:
                made = ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items()))
                console.print(f"{side} of the pairs: {made}")


def _listed(ids: Sequence[str]) -> str:
    rest = len(ids) - _NAMED
    return ", ".join(ids[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
