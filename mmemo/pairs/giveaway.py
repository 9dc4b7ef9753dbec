"""Can the right answer be told without the clip? A classifier of words, and one of length, try.

What they find, a policy finds too: it learns the wording and not the clip. A pair counts as told
when the chosen answer gets the higher score (a tie counts half). Every pair is judged by a
classifier that has seen no pair of its clip.

``words``: the answers as they are. ``style``: with every known cue replaced by one mark, so that
form, length and named emotion are left. An answer that argues from what is beside the point can be
told by its words whatever the clip, which is what such a pair teaches; so ``spurious`` answers are
held to ``style``, and all others to both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

FOLDS = 5
FEWEST = 20
"""Clips below which nothing is said."""
_SHORT = 4  # words of an answer that only its question makes sense of
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"\w+|[^\w\s]")
_MARK = "cuemark"


@dataclass(frozen=True, slots=True)
class Told:
    """Share of ``pairs`` told, with Wilson's 95% interval; None where there are too few clips."""

    pairs: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None

    def above(self, bound: float) -> bool:
        """Whether the share is above ``bound`` by more than chance."""
        return self.low is not None and self.low > bound

    def plain(self) -> dict[str, float | int | None]:
        """For JSON."""
        rounded = {
            name: None if value is None else round(value, 4)
            for name, value in (("accuracy", self.accuracy), ("low", self.low), ("high", self.high))
        }
        return {"pairs": self.pairs, **rounded}


def told_by_words(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], clips: Sequence[str]
) -> Told:
    """By a logistic regression on one to three words in a row, cross-validated over clips."""

    def features(train: NDArray[np.int64]) -> Callable[[Sequence[int], bool], Any]:
        texts = [(prompts[i], answers[i]) for i in train for answers in (chosen, rejected)]
        analyzer: Any = _tokens
        vectors: Any = TfidfVectorizer(analyzer=analyzer, min_df=2, sublinear_tf=True)
        vectors.fit(texts)
        return lambda rows, right: vectors.transform(
            [(prompts[i], (chosen if right else rejected)[i]) for i in rows]
        )

    return _cross_validated(features, clips)


def told_by_length(chosen: Sequence[str], rejected: Sequence[str], clips: Sequence[str]) -> Told:
    """By the number of words alone."""

    def features(_: NDArray[np.int64]) -> Callable[[Sequence[int], bool], Any]:
        return lambda rows, right: np.array(
            [[float(words((chosen if right else rejected)[i]))] for i in rows]
        )

    return _cross_validated(features, clips)


def words(text: str) -> int:
    """Words of an answer without its tags."""
    return len(re.findall(r"\w+", _TAG.sub(" ", text)))


def masked(text: str, cues: Sequence[str]) -> str:
    """The text with each of the cues, the longest first, as one mark."""
    if not cues:
        return text
    listed = "|".join(re.escape(cue) for cue in sorted(cues, key=lambda cue: (-len(cue), cue)))
    return re.sub(rf"(?<!\w)(?:{listed})(?!\w)", _MARK, text, flags=re.IGNORECASE)


def _cross_validated(
    features: Callable[[NDArray[np.int64]], Callable[[Sequence[int], bool], Any]],
    clips: Sequence[str],
) -> Told:
    number = len(clips)
    if len(set(clips)) < FEWEST:
        return Told(number)
    right = 0.0
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(number), groups=np.array(clips, dtype=object)):
        make = features(train)
        # Differences of a pair's two answers, either way round: the classes are balanced.
        gap = make(train.tolist(), True) - make(train.tolist(), False)
        both: Any = _stacked(gap, -gap)
        labels = np.repeat([1, 0], len(train))
        model = LogisticRegression(fit_intercept=False, C=10.0, max_iter=1000).fit(both, labels)
        scores: NDArray[np.float64] = model.decision_function(
            make(test.tolist(), True) - make(test.tolist(), False)
        )
        right += float((scores > 1e-12).sum() + 0.5 * (np.abs(scores) <= 1e-12).sum())
    low, high = _wilson(right, number)
    return Told(number, right / number, low, high)


def _stacked(one: Any, other: Any) -> Any:
    if isinstance(one, np.ndarray):
        return np.vstack([one, other])
    from scipy.sparse import vstack

    return vstack([one, other])


def _wilson(right: float, number: int) -> tuple[float, float]:
    z, share = 1.959964, right / number
    middle = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    return (middle - spread) / scale, (middle + spread) / scale


def _tokens(text: tuple[str, str]) -> Iterator[str]:
    """One to three words in a row, punctuation and tags among them; a short answer such as "yes"
    also together with each word of its question."""
    prompt, answer = text
    found = re.findall(r"<[^>]*>|\w+|[^\w\s]", answer.lower())
    for size in (1, 2, 3):
        yield from (" ".join(found[at : at + size]) for at in range(len(found) - size + 1))
    spoken = _WORD.findall(_TAG.sub(" ", answer.lower()))
    if len(spoken) <= _SHORT:
        asked = set(_WORD.findall(_TAG.sub(" ", prompt.lower())))
        yield from (f"{' '.join(spoken)}|{word}" for word in sorted(asked))
