"""What makes pairs unfit for training: duplicates, leaks, and answers that give themselves away.

*Duplicates* repeat another pair. *Leaks* share a clip, a speaker or a file with an evaluation set.

*Give-aways* let the chosen answer be told from the rejected one without the clip. What a classifier
of words, or of length, finds in the text, a policy finds too: it learns the wording and not the
clip. The accuracy is the share of pairs whose chosen answer gets the higher score (a tie counts
half), and every pair is scored by a classifier that was fitted without the pairs of its clip. It is
measured on two versions of the text:

    words  the answers as they are
    style  every known cue replaced by one token, which leaves form, length and the named emotion

All answers are held to both, with one exception. A spurious answer with a cue that no chosen answer
names, such as the scene, can be recognised by its words whatever the clip: relevance that never
changes leaves nothing to look for. Such answers are counted apart, with their cues, and are held to
``style`` alone.
"""

from __future__ import annotations

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
from mmemo.answers.claims import whole_word
from mmemo.console import progress
from mmemo.data.manifest import DataConfig, load_samples, read_rows
from mmemo.data.preference import Preference
from mmemo.data.sample import MediaRef, Sample
from mmemo.errors import MediaError
from mmemo.media.paths import resolve
from mmemo.pairs.config import PairsConfig
from mmemo.statistics import BootstrapConfig, Clusters

FOLDS = 5
MIN_CLIPS = 20
"""Number of clips below which no accuracy is given."""
_EXAMPLES = 5  # pairs that are named for each finding
SHORT = 4
"""Number of words up to which an answer only makes sense together with its question."""
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"\w+|[^\w\s]")
_CUE_TOKEN = "cuemark"


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
    """Every media reference that training on the pair shows."""
    sides = [side for side in (pair.negative, pair.irrelevant) if side is not None]
    return [*pair.sample.media.values(), *(ref for side in sides for ref in side.media.values())]


def clip_of(sample: Sample) -> str:
    """The name of a row's clip: its file and span."""
    ref = next(iter(sample.media.values()), None)
    return "" if ref is None else f"{ref.path}#{ref.start}#{ref.end}"


def duplicates(
    pairs: Sequence[Preference], contents: Mapping[str, str | None], near: float
) -> dict[str, Any]:
    """Pairs that repeat another one.

    Args:
        contents: path -> SHA-256, which makes a copy of a clip under another name the same clip.
        near: Jaccard similarity of the words from which two pairs of a clip are near-duplicates.

    Returns:
        ``exact`` and ``near``, numbers of pairs that repeat an earlier one, and ``examples``.
    """
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
            # Below, Jaccard's ratio is multiplied out, because two texts without words would divide
            # by 0.
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
    config: PairsConfig,
    pairs: Sequence[Preference],
    contents: Mapping[str, str | None],
    sources: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Pairs that share a clip, a speaker or a file's content with an evaluation manifest.

    Args:
        contents: path -> SHA-256 of the pairs' files.
        sources: written file -> the files that it was made of.

    Returns:
        The number of pairs by kind of leak, and examples.
    """
    samples = [row for name in config.report.against for row in _evaluation_rows(name)]
    root = Path(config.report.against_root or config.data.media_root)
    eval_paths = {ref.path for sample in samples for ref in sample.media.values()}
    same_root = root.resolve() == Path(config.data.media_root).resolve()
    # Under another root, an equal path is another file.
    clips = eval_paths if same_root else set[str]()
    speakers = {speaker for sample in samples if (speaker := sample.group.get("speaker"))}
    eval_contents = set[str]()
    if config.report.digests:
        eval_contents = {one for one in digests(eval_paths, root).values() if one is not None}
    found: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        paths = {ref.path for ref in media_of(pair)}
        paths |= {path for made in paths for path in (sources or {}).get(made, ())}
        hits = {
            "clip": bool(paths & clips),
            "speaker": pair.sample.group.get("speaker") in speakers,
            "digest": bool({contents.get(path) for path in paths} & eval_contents),
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


def _evaluation_rows(name: str) -> list[Sample]:
    """The rows of an evaluation manifest, whatever columns it has."""
    columns = sorted({key for row in read_rows(Path(name)) for key in row.values})
    return load_samples(DataConfig(manifests=[name], columns=columns))


@dataclass(frozen=True, slots=True)
class BlindAccuracy:
    """How often a classifier that does not see the clip prefers the chosen answer."""

    pairs: int
    """Number of pairs that were scored."""
    accuracy: float | None = None
    """Share of pairs; None if there are too few clips."""
    low: float | None = None
    """Lower end of the 95% interval over clips (:mod:`mmemo.statistics`)."""
    high: float | None = None
    """Upper end of it."""

    def above(self, bound: float) -> bool:
        """Whether the accuracy is significantly above ``bound``: its whole interval is."""
        return self.low is not None and self.low > bound

    def to_json(self) -> dict[str, float | int | None]:
        """The values as JSON, rounded."""
        rounded = {
            name: None if value is None else round(value, 4)
            for name, value in (("accuracy", self.accuracy), ("low", self.low), ("high", self.high))
        }
        return {"pairs": self.pairs, **rounded}


def accuracy_from_words(
    prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], clips: Sequence[str]
) -> BlindAccuracy:
    """Accuracy of a logistic regression on word 1- to 3-grams, cross-validated over clips."""

    def features(train: NDArray[np.int64]) -> Callable[[Sequence[int], bool], Any]:
        texts = [(prompts[i], answers[i]) for i in train for answers in (chosen, rejected)]
        analyzer: Any = _tokens
        vectors: Any = TfidfVectorizer(analyzer=analyzer, min_df=2, sublinear_tf=True)
        vectors.fit(texts)
        return lambda rows, right: vectors.transform(
            [(prompts[i], (chosen if right else rejected)[i]) for i in rows]
        )

    return _cross_validated(features, clips)


def accuracy_from_length(
    chosen: Sequence[str], rejected: Sequence[str], clips: Sequence[str]
) -> BlindAccuracy:
    """Accuracy of a logistic regression on the number of words, cross-validated over clips."""

    def features(_: NDArray[np.int64]) -> Callable[[Sequence[int], bool], Any]:
        return lambda rows, right: np.array(
            [[float(words((chosen if right else rejected)[i]))] for i in rows]
        )

    return _cross_validated(features, clips)


def words(text: str) -> int:
    """The number of words of an answer, without its tags."""
    return len(re.findall(r"\w+", _TAG.sub(" ", text)))


def masked(text: str, cues: Sequence[str]) -> str:
    """The text with each cue replaced by the same token; the longest cue is matched first."""
    return mentions(cues).sub(_CUE_TOKEN, text)


def mentions(cues: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds these cues in a text; nothing if there are none."""
    ordered = sorted(filter(None, cues), key=lambda cue: (-len(cue), cue))
    return re.compile("|".join(map(whole_word, ordered)) or "(?!)", re.IGNORECASE)


def _cross_validated(
    features: Callable[[NDArray[np.int64]], Callable[[Sequence[int], bool], Any]],
    clips: Sequence[str],
) -> BlindAccuracy:
    """The accuracy over all folds.

    Args:
        features: fits on the rows of a fold and returns a function of (rows, whether of the chosen
            answers) that gives their features.
        clips: the clip of each pair; the pairs of a clip stay in one fold.
    """
    number = len(clips)
    if len(set(clips)) < MIN_CLIPS:
        return BlindAccuracy(number)
    right = np.zeros(number)
    # The seed is fixed, so that the same pairs always get the same report.
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(number), groups=np.array(clips, dtype=object)):
        make = features(train)
        # Differences between a pair's two answers in both orders, so that the classes are balanced.
        gap = make(train.tolist(), True) - make(train.tolist(), False)
        both: Any = _stacked(gap, -gap)
        labels = np.repeat([1, 0], len(train))
        # With both orders of each pair, the classes are symmetric and an intercept has nothing to
        # fit.
        model = LogisticRegression(fit_intercept=False, C=10.0, max_iter=1000).fit(both, labels)
        scores: NDArray[np.float64] = model.decision_function(
            make(test.tolist(), True) - make(test.tolist(), False)
        )
        # Rounding must not decide a tie.
        right[test] = (scores > 1e-12) + 0.5 * (np.abs(scores) <= 1e-12)
    # The pairs of a clip are alike, so they do not count as independent ones.
    sums = Clusters(clips, BootstrapConfig()).sums(np.stack([right, np.ones(number)], 1))
    found = sums.interval(lambda of: of[..., 0] / of[..., 1], number, share=True)
    return BlindAccuracy(number, found.value, found.low, found.high)


def _stacked(one: Any, other: Any) -> Any:
    if isinstance(one, np.ndarray):
        return np.vstack([one, other])
    from scipy.sparse import vstack

    return vstack([one, other])


def _tokens(text: tuple[str, str]) -> Iterator[str]:
    """Word 1- to 3-grams of an answer, with punctuation and tags.

    A short answer such as "yes" is also combined with each word of its question, since it gives
    nothing away alone.
    """
    prompt, answer = text
    tokens = re.findall(r"<[^>]*>|\w+|[^\w\s]", answer.lower())
    for size in (1, 2, 3):
        yield from (" ".join(tokens[at : at + size]) for at in range(len(tokens) - size + 1))
    spoken = _WORD.findall(_TAG.sub(" ", answer.lower()))
    if len(spoken) <= SHORT:
        question = set(_WORD.findall(_TAG.sub(" ", prompt.lower())))
        yield from (f"{' '.join(spoken)}|{word}" for word in sorted(question))
