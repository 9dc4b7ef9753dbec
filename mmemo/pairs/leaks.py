"""Pairs that should not be there: twice the same, nearly the same, or of an evaluation set."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from mmemo import content
from mmemo.console import progress
from mmemo.data.manifest import DataConfig, load_samples, read_rows
from mmemo.data.preference import Preference
from mmemo.data.sample import MediaRef, Sample
from mmemo.errors import MediaError
from mmemo.media.paths import resolve
from mmemo.pairs.config import PairsConfig

_EXAMPLES = 5


def digests(names: Iterable[str], root: Path) -> dict[str, str | None]:
    """Path -> SHA-256 of the file under ``root``; None where it cannot be read."""
    listed = sorted(set(names))
    found: dict[str, str | None] = {}
    with progress("digests", len(listed), unit="files") as bar:
        for name in listed:
            try:
                found[name] = content.sha256(resolve(root, name))
            except (MediaError, OSError):
                found[name] = None
            bar.advance()
    return found


def media_of(pair: Preference) -> list[MediaRef]:
    """Every file that training on the pair would show."""
    sides = [side for side in (pair.negative, pair.irrelevant) if side is not None]
    return [*pair.sample.media.values(), *(ref for side in sides for ref in side.media.values())]


def clip_of(sample: Sample) -> str:
    """What names the clip of a row: file and span."""
    ref = next(iter(sample.media.values()), None)
    return "" if ref is None else f"{ref.path}#{ref.start}#{ref.end}"


def duplicates(
    pairs: Sequence[Preference], contents: Mapping[str, str | None], near: float
) -> dict[str, Any]:
    """``exact``: pairs that repeat an earlier one, a copy of its clip under another name counted
    as that clip; ``near``: pairs of one clip whose words overlap by ``near`` or more."""
    by_clip: dict[str, list[Preference]] = defaultdict(list)
    for pair in pairs:
        ref = next(iter(pair.sample.media.values()), None)
        name = "" if ref is None else contents.get(ref.path) or ref.path
        by_clip[f"{name}#{ref and ref.start}#{ref and ref.end}"].append(pair)
    exact: list[list[str]] = []
    close: list[list[str]] = []
    for listed in by_clip.values():
        texts = [_text(pair) for pair in listed]
        words = [set(re.findall(r"\w+", text.lower())) for text in texts]
        for one, other in combinations(range(len(listed)), 2):
            ids = [listed[one].sample.sample_id, listed[other].sample.sample_id]
            if texts[one] == texts[other]:
                exact.append(ids)
            elif len(words[one] & words[other]) >= near * len(words[one] | words[other]):
                close.append(ids)
    repeated = {other for _, other in exact}
    return {
        "exact": len(repeated),
        "near": len({other for _, other in close} - repeated),
        "examples": [*exact[:_EXAMPLES], *close[:_EXAMPLES]],
    }


def _text(pair: Preference) -> str:
    turns = " ".join(turn.text for turn in pair.sample.turns)
    answers = " | ".join(f"{name}: {pair.answers[name]}" for name in sorted(pair.answers))
    return " ".join(f"{turns} | {answers}".split())


def leaks(
    config: PairsConfig, pairs: Sequence[Preference], contents: Mapping[str, str | None]
) -> dict[str, Any]:
    """Pairs that share a clip, a speaker or the content of a file with an evaluation manifest."""
    samples = [row for name in config.report.against for row in _evaluated(name)]
    root = Path(config.report.against_root or config.data.media_root)
    theirs = {ref.path for sample in samples for ref in sample.media.values()}
    same_root = root.resolve() == Path(config.data.media_root).resolve()
    clips = theirs if same_root else set[str]()
    speakers = {speaker for sample in samples if (speaker := sample.group.get("speaker"))}
    seen = set(digests(theirs, root).values()) - {None} if config.report.digests else set[str]()
    found: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        paths = {ref.path for ref in media_of(pair)}
        hits = {
            "clip": bool(paths & clips),
            "speaker": pair.sample.group.get("speaker") in speakers,
            "digest": bool({contents.get(path) for path in paths} & seen),
        }
        for name, hit in hits.items():
            found[name] += hit
            if hit and len(examples[name]) < _EXAMPLES:
                examples[name].append(pair.sample.sample_id)
    return {
        "against": list(config.report.against),
        "rows": len(samples),
        **{name: found[name] for name in ("clip", "speaker", "digest")},
        "unread": sum(value is None for value in contents.values()),
        "examples": dict(examples),
    }


def _evaluated(name: str) -> list[Sample]:
    """The rows of an evaluation manifest, with whatever columns it has."""
    columns = sorted({key for row in read_rows(Path(name)) for key in row.values})
    return load_samples(DataConfig(manifests=[name], columns=columns))


# Can the right answer be told without the clip? A classifier of words, and one of length, try.
#
# What they find, a policy finds too: it learns the wording and not the clip. A pair counts as told
# when the chosen answer gets the higher score (a tie counts half). Every pair is judged by a
# classifier that has seen no pair of its clip.
#
# ``words``: the answers as they are. ``style``: with every known cue replaced by one mark, so that
# form, length and named emotion are left. An answer that argues from what is beside the point can
# be told by its words whatever the clip, which is what such a pair teaches; so ``spurious`` answers
# are held to ``style``, and all others to both.

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
