"""Generated texts against references: BLEU-4, ROUGE-L, METEOR, token F1 and exact match.

BLEU (Papineni et al., ACL 2002) is of the corpus and not a mean over answers. It is a function of
summed n-gram counts, so it has intervals as all metrics of sums have. The counts are sacrebleu's,
and so is the score (exponential smoothing). ROUGE-L (Lin, 2004) is rouge-score's F-measure, METEOR
(Banerjee and Lavie, 2005) is nltk's. Several references: BLEU clips by the most frequent and takes
the closest length, the others take the best reference.

METEOR matches words and stems. Its third stage, WordNet synonyms, needs ``synonyms: true`` and
WordNet's files, which ``python -m nltk.downloader wordnet`` fetches; the metric is then ``meteor``,
and else ``meteor_stems``, because the two may not be compared.

Token F1 and exact match normalise as SQuAD's script does (Rajpurkar et al., EMNLP 2016): lower
case, no punctuation, no articles. Scripts without spaces are taken apart by character.

An answer that cannot be read counts as an empty text, or is ``left_out`` and counted.

Shapes: n answers; sums (..., C) over the columns of :data:`COLUMNS`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from mmemo.errors import EvaluationError
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats

ORDER = 4
"""The longest n-grams of BLEU."""
COLUMNS = (
    *(f"matched_{n}" for n in range(1, ORDER + 1)),
    *(f"ngrams_{n}" for n in range(1, ORDER + 1)),
    *("length", "reference_length", "answers", "rouge_l", "meteor", "token_f1", "exact"),
)
"""What each answer adds: BLEU's counts, and the value of each mean."""
MEANS = ("rouge_l", "meteor", "token_f1", "exact")
NAMES = ("bleu", *MEANS)
Columns = Callable[[str, Sequence[str]], Sequence[float]]
"""Some of the columns, of an answer and its references."""
_N = COLUMNS.index("answers")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Scripts without spaces between words: kana, CJK ideographs, Thai, Lao, Burmese, Khmer.
_UNSPACED = re.compile(
    r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


def text(
    *,
    metrics: Sequence[str] = NAMES,
    unreadable: Literal["empty", "left_out"] = "empty",
    tokenize: str = "13a",
    lowercase: bool = False,
    stems: bool = False,
    synonyms: bool = False,
) -> Scorer:
    """The scorer of generated texts.

    Args:
        metrics: some of :data:`NAMES`; the first one is the headline. Only ``bleu``, ``rouge_l``
            and ``meteor`` need libraries.
        unreadable: how an answer without a text counts.
        tokenize: sacrebleu's tokeniser for BLEU; ``zh`` or ``char`` for scripts without spaces.
        lowercase: whether BLEU ignores case.
        stems: whether ROUGE-L compares stems (English).
        synonyms: whether METEOR matches WordNet synonyms (English).

    Raises:
        TypeError: a metric or ``unreadable`` is unknown.
        EvaluationError: a library or WordNet is missing.
    """
    if not metrics or set(metrics) - set(NAMES):
        raise TypeError(f"metrics must be some of {', '.join(NAMES)}")
    if unreadable not in ("empty", "left_out"):
        raise TypeError("unreadable must be 'empty' or 'left_out'")
    makers: Mapping[str, Callable[[], Columns]] = {
        "bleu": lambda: _bleu_counts(tokenize, lowercase),
        "rouge_l": lambda: _rouge(stems),
        "meteor": lambda: _meteor(synonyms),
        "token_f1": lambda: lambda answer, texts: [max(token_f1(answer, one) for one in texts)],
        "exact": lambda: lambda answer, texts: [float(any(same(answer, one) for one in texts))],
    }
    # Made here, so that a missing library is told before a model is asked.
    columns = {name: makers[name]() for name in metrics}

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        sums = np.zeros((len(rows), len(COLUMNS)))
        scored = np.zeros(len(rows), dtype=np.bool_)
        for place, row in enumerate(rows):
            readable = row["status"] == "ok" and isinstance(row["answer"], str)
            if not readable and unreadable == "left_out":
                continue
            answer, references = row["answer"] if readable else "", references_of(row)
            sums[place, _N], scored[place] = 1.0, True
            for name in metrics:
                start = 0 if name == "bleu" else COLUMNS.index(name)
                found = columns[name](answer, references)
                sums[place, start : start + len(found)] = found
        return sums, scored

    called = {"meteor": "meteor" if synonyms else "meteor_stems", "exact": "exact_match"}
    return Scorer(values, {called.get(name, name): _metric(name) for name in metrics})


def _metric(name: str) -> Metric:
    if name == "bleu":
        return Metric(bleu, limits=(0, 100))
    at = COLUMNS.index(name)
    return Metric(
        lambda sums: ratio(sums[..., at], sums[..., _N], np.nan),
        share=name == "exact",
        limits=(0, 1),
    )


def references_of(row: Row) -> list[str]:
    """The reference texts of an answer: its truth, one text or a list of texts.

    Raises:
        EvaluationError: it has none.
    """
    truth = row["truth"]
    listed: list[Any] = list(truth) if isinstance(truth, list | tuple) else [truth]  # pyright: ignore[reportUnknownArgumentType]
    found = [one for one in listed if isinstance(one, str) and one.strip()]
    if not found:
        raise EvaluationError(
            f"{row['sample_id']} has no reference text; give 'gold' a text or a list of texts"
        )
    return found


def bleu(sums: Floats) -> Floats:
    """Corpus BLEU-4 from 0 to 100, (..., C) to (...), smoothed as sacrebleu's ``exp``: the k-th
    order without a match counts 1 / 2^k matches. 0 without any match."""
    matched, total = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    length, reference = sums[..., 2 * ORDER], sums[..., 2 * ORDER + 1]
    missed = (matched == 0) & (total > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matched)
    precision = ratio(smoothed, total, 0.0)
    defined = (precision > 0).all(-1) & (matched > 0).any(-1)
    mean = np.exp(np.log(np.where(precision > 0, precision, 1.0)).mean(-1))
    penalty = np.exp(np.minimum(0.0, 1.0 - ratio(reference, length, np.inf)))
    value = np.where(defined, 100.0 * mean * penalty, 0.0)
    return np.where(sums[..., _N] > 0, value, np.nan)


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that two normalised texts share, as SQuAD's script computes it. Two texts
    without words are equal, and one without words shares nothing."""
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def same(answer: str, reference: str) -> bool:
    """Whether two texts are equal once they are normalised."""
    return words(answer) == words(reference)


def words(text: str) -> list[str]:
    """The words of a text, normalised as by SQuAD: in lower case, without punctuation and English
    articles. Punctuation of other scripts is removed as well."""
    plain = unicodedata.normalize("NFC", text).lower()
    plain = "".join(char for char in plain if not _punctuation(char))
    return _UNSPACED.sub(r" \1 ", _ARTICLES.sub(" ", plain)).split()


@lru_cache(maxsize=4096)
def _punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


class Words:
    """Tokeniser of ROUGE: words in lower case, scripts without spaces by character. On ASCII text
    it equals rouge-score's own, which throws all other letters away."""

    def __init__(self, stems: bool) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem: Callable[[str], str] | None = PorterStemmer().stem if stems else None

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        kept = "".join(
            char if unicodedata.category(char)[0] in "LMN" else " "
            for char in unicodedata.normalize("NFC", text).lower()
        )
        found = _UNSPACED.sub(r" \1 ", kept).split()
        # Words of up to three letters are not stemmed, as in rouge-score.
        stem = self._stem
        return found if stem is None else [stem(w) if len(w) > 3 else w for w in found]


def _bleu_counts(tokenize: str, lowercase: bool) -> Callable[[str, Sequence[str]], Sequence[float]]:
    """Counts (10,) of one answer: matched n-grams, n-grams, length, reference length."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise _missing("sacrebleu") from error
    try:
        # Orders longer than an answer have no n-grams; effective_order only silences a warning.
        scorer: Any = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    except (KeyError, ValueError, ImportError, RuntimeError) as error:
        raise EvaluationError(
            f"BLEU's tokeniser '{tokenize}' cannot be used ({error}); use 13a, zh, char or none"
        ) from error

    def count(answer: str, references: Sequence[str]) -> Sequence[float]:
        found = scorer.sentence_score(answer, list(references))
        # sacrebleu counts no n-grams of an empty answer, whose references still have a length.
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    return count


def _rouge(stems: bool) -> Columns:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score") from error
    scorer: Any = RougeScorer(["rougeL"], tokenizer=Words(stems))

    def score(answer: str, references: Sequence[str]) -> Sequence[float]:
        return [scorer.score_multi(references, answer)["rougeL"].fmeasure]

    return score


class _NoSynonyms:
    """Stands for WordNet where synonyms are not matched."""

    def synsets(self, word: str) -> list[Any]:
        """No synonyms of any word."""
        return []


def _meteor(synonyms: bool) -> Columns:
    try:
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise _missing("nltk") from error
    wordnet: Any = _NoSynonyms()
    if synonyms:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise EvaluationError(
                "METEOR's synonyms need WordNet; run `python -m nltk.downloader wordnet`, or "
                "leave 'synonyms' out"
            ) from error
    split = Words(stems=False).tokenize

    def score(answer: str, references: Sequence[str]) -> Sequence[float]:
        texts = [split(one) for one in references]
        return [float(meteor_score(texts, split(answer), wordnet=wordnet))]

    return score


def _missing(library: str) -> EvaluationError:
    return EvaluationError(f"this metric needs {library}; run `pip install {library}`")
