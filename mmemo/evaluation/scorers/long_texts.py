"""How LongEmotion (arXiv 2509.07403) scores: its released scorers, with their defects, over rows
of ``predictions.jsonl``, and the criteria of its judged tasks, by the release's names for them.

The scorers look for a JSON object in the answer and compare its value as it is written, so that the
right label in another case, or in plain words, is wrong. An answer without one counts as wrong; the
release asks up to five times first, and we ask once.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmemo.answers.label_set import LabelSet
from mmemo.data.sample import Sample
from mmemo.evaluation.scorer import Spec, use

REPLY = "The counsellor's reply in this conversation"
STAGES = (
    (
        "Establishing the Therapeutic Alliance",
        "Emotional Acceptance and Exploration Guidance",
        "Systematic Assessment",
    ),
    (
        "Recognizing Surface-Level Reaction Patterns",
        "Deep Needs Exploration",
        "Pattern Interconnection Analysis",
    ),
    (
        "Adaptive Cognitive Restructuring",
        "Emotional Acceptance and Transformation",
        "Value-Oriented Integration",
    ),
    (
        "Consolidating Change Outcomes and Growth Narrative",
        "Meaning Integration and Future Guidance",
        "Autonomy and Resource Internalization",
    ),
)
"""What is rated of a reply in each stage of a conversation."""
SUMMARY = "What the summary says, compared with what is known to be right"
PARTS = tuple(
    f"{what} of {part}"
    for part in (
        *("causes", "symptoms", "treatment process", "characteristics of illness"),
        "treatment effect",
    )
    for what in ("Consistency", "Completeness", "Clarity")
)
FEELINGS = "The text about one's own feelings"
EXPRESSION = (
    "Consistency Between Emotional Ratings and Generated Text",
    "Repetition of Content",
    "Richness and Depth of Content",
    "Interaction Between Emotion and Cognition",
    "Emotional Reflection and Self-awareness",
    "Overall Quality and Flow of the Text",
)

_FENCED = re.compile(r"```json\s*(\{.*?\})\s*```", re.DOTALL)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_SPACES = str.maketrans(dict.fromkeys(string.punctuation, " "))


def options(sample: Sample) -> LabelSet:
    """The options of a row, by their texts, which its prompt lists."""
    return LabelSet(tuple(map(str, sample.columns["choices"])))


def judges(what: str, titles: Sequence[str], low: float, high: float) -> tuple[Spec, ...]:
    """One judge for each title, whose ratings are named by it, in lower case with underscores."""
    return tuple(
        use(
            "judge",
            name=re.sub(r"\W+", "_", title.lower()),
            criterion=f"{what}: {title}.",
            low=low,
            high=high,
        )
        for title in titles
    )


def json_accuracy(key: str) -> Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float]]:
    """The share of answers whose JSON object has exactly the truth under ``key``. A truth of digits
    is a number there, and a text of the same digits is wrong."""

    def score(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        right = [_exact(json_value(str(row["raw"]), key), str(row["truth"])) for row in rows]
        return {"accuracy": sum(right) / len(right) if right else float("nan")}

    return score


def question_f1(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    """Mean token F1 of all that follows the reasoning."""
    values = [_f1(str(row["raw"]).split("</think>")[-1], str(row["truth"])) for row in rows]
    return {"f1": sum(values) / len(values) if values else float("nan")}


def json_value(text: str, key: str) -> Any:
    """The value in the JSON object that the whole text is, or else in its last ```json block; None
    if there is neither."""
    text = text.split("</think>")[-1].strip()
    for candidate in (text, *reversed(_FENCED.findall(text)[-1:])):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value.get(key)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return None


def _exact(value: Any, truth: str) -> bool:
    if truth.isdecimal():
        return isinstance(value, int | float) and value == int(truth)
    return value == truth


def _f1(answer: str, reference: str) -> float:
    ours, theirs = _words(answer), _words(reference)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_SPACES)).split()
