"""Released scorers of labels and of generated texts: EmoBench-M's ``EmoBench-M-eval.py``.

Rows have ``raw`` and ``truth``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmemo.answers.parsing import answer_text

_SENTIMENT = ("neutral", "negative", "positive")
_SPOKEN = ("neutral", "calm", "happy", "sad", "angry", "fearful", "surprised", "disgust")
EMOBENCH_SETS: Mapping[str, tuple[str, ...]] = {
    "FGMSA": ("weak negative", "strong negative", "neutral", "strong positive", "weak positive"),
    "ch-simsv2s": _SENTIMENT,
    "MOSI": _SENTIMENT,
    "SIMS": _SENTIMENT,
    "funny": ("true", "false"),
    "MUSTARD": ("true", "false"),
    "MELD": ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger"),
    "mer2023": ("happy", "sad", "neutral", "angry", "worried", "surprise"),
    "RAVDSS-song": _SPOKEN[:6],
    "RAVDSS-speech": _SPOKEN,
    "MOSEI": _SENTIMENT,
}
"""EmoBench-M's sets with one label, as the script names them and orders their labels."""
EMOBENCH_JOINT: Mapping[str, tuple[str, ...]] = {
    "emotion": ("happy", "surprise", "sad", "disgust", "anger", "fear", "neutral"),
    "intent": (
        *("questioning", "agreeing", "acknowledging", "encouraging"),
        *("consoling", "suggesting", "wishing", "neutral"),
    ),
}
"""The labels of its set MC-EIU, in the script's order."""

Rows = Sequence[Mapping[str, Any]]
Numbers = Mapping[str, float]


def emobench_labels(*labels: str) -> Callable[[Rows], Numbers]:
    """The mode ``classification``: an answer counts only if it is a label and nothing else, but for
    case; all others are dropped. Precision, recall and F1 are weighted by the labels' counts."""

    def official(rows: Rows) -> Numbers:
        pairs = [(str(row["truth"]).strip().lower(), _text(row)) for row in rows]
        kept = [(truth, answer) for truth, answer in pairs if {truth, answer} <= set(labels)]
        return {**weighted(kept), "dropped": float(len(rows) - len(kept))}

    return official


def emobench_joint(rows: Rows) -> Numbers:
    """The mode ``joint``, after ``MC-EIU.py``'s extraction: the first emotion of the list, in the
    list's order, that occurs anywhere in the answer, and the first such intent; "neutral" is both.
    An answer without one of the two is dropped. ``truth`` has ``emotion`` and ``intent``."""
    emotions, intents = EMOBENCH_JOINT.values()
    texts = [(row["truth"], _text(row)) for row in rows]
    read = [(truth, _first(text, emotions), _first(text, intents)) for truth, text in texts]
    kept = [(truth, one, other) for truth, one, other in read if one and other]
    sides = {
        "emotion": [(str(truth["emotion"]), str(one)) for truth, one, _ in kept],
        "intent": [(str(truth["intent"]), str(other)) for truth, _, other in kept],
        "joint": [
            (f"{truth['emotion']}_{truth['intent']}", f"{one}_{other}")
            for truth, one, other in kept
        ],
    }
    found: dict[str, float] = {}
    for side, pairs in sides.items():
        found |= {f"{side}_{name}": value for name, value in weighted(pairs).items()}
    return {**found, "dropped": float(len(rows) - len(kept))}


def emobench_texts(rows: Rows) -> Numbers:
    """The mode ``generation`` without BERTScore, which needs a model's weights: the mean of nltk's
    sentence BLEU without smoothing, which is near 0 without a common run of four words, and of
    ROUGE-L with stems. Empty answers are dropped.

    Raises:
        EvaluationError: nltk or rouge-score is not installed.
    """
    try:
        from nltk.translate.bleu_score import sentence_bleu  # pyright: ignore
        from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore
    except ImportError as error:
        from mmemo.errors import EvaluationError

        raise EvaluationError(f"generated texts need nltk and rouge-score: {error}") from error
    import warnings

    scorer: Any = RougeScorer(["rougeL"], use_stemmer=True)
    bleu: list[float] = []
    rouge: list[float] = []
    for row in rows:
        answer, truth = answer_text(str(row.get("raw") or "")).strip(), row["truth"]
        reference = str(truth[0] if isinstance(truth, list) else truth).strip()
        if answer and reference:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no four words are in common
                bleu.append(float(sentence_bleu([reference.split()], answer.split())))  # pyright: ignore
            rouge.append(float(scorer.score(reference, answer)["rougeL"].fmeasure))
    found = {"bleu": sum(bleu) / len(bleu), "rouge_l": sum(rouge) / len(rouge)} if bleu else {}
    return {**found, "dropped": float(len(rows) - len(bleu))}


def weighted(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 weighted by how often each label is true, 0 where a
    label is never answered, as scikit-learn's with ``zero_division=0``; of pairs of truth and
    answer."""
    if not pairs:
        return {}
    true, said = Counter(truth for truth, _ in pairs), Counter(answer for _, answer in pairs)
    hit = Counter(truth for truth, answer in pairs if truth == answer)
    n = len(pairs)
    precision = {label: hit[label] / said[label] if said[label] else 0.0 for label in true}
    return {
        "accuracy": hit.total() / n,
        "precision": sum(true[label] * precision[label] for label in true) / n,
        "recall": hit.total() / n,
        "f1": sum(true[label] * 2 * hit[label] / (true[label] + said[label]) for label in true) / n,
    }


def _first(text: str, labels: Sequence[str]) -> str | None:
    return next((label for label in labels if label in text), None)


def _text(row: Mapping[str, Any]) -> str:
    return answer_text(str(row.get("raw") or "")).strip().lower()
