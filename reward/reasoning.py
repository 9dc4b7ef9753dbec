"""Reasoning: pays for the quality of the reasoning, graded by a judge that knows the clip's facts.

Range: 0 to 1 (0.2 to 1 for what the judge grades). None: the judge gave no grade.
Source: EmotionThinker's R_t (arXiv 2601.15668): four grades from 1 to 5, each divided by 5, in a
weighted sum. The paper does not give the weights; equal ones are our reconstruction.

In the paper's sum, fluent and consistent reasoning about another clip earns 0.6, whoever grades it,
since two of the four dimensions ask for no fact. Here no dimension counts for more than factual
alignment does. ``capped: false`` gives the paper's sum.

The judge gets the question, the known facts of the clip, and the completion's first reasoning with
its answer; with ``judge.media`` it sees and hears the clip too. It is a model behind an endpoint,
or the reward model that ``mmemo reward-model`` trains, which may read the clip's stored features.
Text that cannot be reasoning is not sent to it: too few words besides emotion names, a copy of the
question, or text that mentions the rubric. It scores 0, below the 0.2 of the
four lowest grades ("One Token to Fool LLM-as-a-Judge", arXiv 2507.08794: even ":" alone earns
reward).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mmemo.answers.messages import Chat, completion_text, prompt_text, think_text
from mmemo.answers.parsing import EMOTIONS, emotion_labels, labels_removed, normalise
from mmemo.rewards.judge.open import open_judge
from mmemo.rewards.judge.rubric import (
    FACTS,
    HIGHEST,
    Grades,
    Judge,
    JudgeItem,
    candidate_of,
    clip_media,
    facts,
    mentions_rubric,
)

PROOF_TOLERANCE = 0.4
"""Judges are not exact: a gold answer must reach 0.6, and an attack must stay at or below 0.4."""

_LABELS = emotion_labels(EMOTIONS)
# Chinese, Japanese and Thai.
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e01-\u0e3a\u0e40-\u0e46]")


async def reasoning(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    judge: Mapping[str, Any] | Judge,
    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
    min_words: int = 8,
    capped: bool = True,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the judge gave no grade.

    Args:
        judge: the fields of ``mmemo.rewards.judge.endpoint.JudgeConfig`` (with ``base_url``) or of
            ``mmemo.rewards.judge.reward_model.LocalJudgeConfig`` (without), or a judge.
        weights: weights of the four dimensions, in their order; they should sum to 1.
        min_words: minimum number of words besides emotion names in a reasoning.
        capped: count no grade for more than factual alignment.
        log_metric: receives the share of completions sent to the judge, and of those not graded.
        columns: the row's truth, from which the judge's facts are made, and its ``media``.

    Raises:
        ConfigError: the judge is a reward model that was not shown to read the facts.
        RuntimeError: an endpoint graded nothing in several calls in a row.
    """
    backend = _open(json.dumps(dict(judge))) if isinstance(judge, Mapping) else judge
    scores: list[float | None] = [0.0] * len(completions)
    asked: dict[int, JudgeItem] = {}
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        question, text = prompt_text(prompt), completion_text(completion)
        if is_reasoning(text, question, min_words):
            row = {name: columns[name][index] for name in FACTS if name in columns}
            clip = clip_media(columns["media"][index]) if "media" in columns else None
            asked[index] = JudgeItem(question, text, facts(row), clip)
    grades = await backend.score(list(asked.values()))
    for index, found in zip(asked, grades, strict=True):
        scores[index] = None if found is None else _value(found, weights, capped)
    if log_metric is not None and asked:
        log_metric("judge_share", len(asked) / len(completions))
        log_metric("judge_failed", sum(found is None for found in grades) / len(asked))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """A plain reasoning from all known facts; None where too few are known."""
    present = (row.get("cues") or {}).get("present", ())
    if row.get("label") is None or len(present) < 2:
        return None
    channels = row.get("modality_labels") or {}
    parts = [
        f"The {name} expresses {channels[key]}."
        for key, name in (("video", "face"), ("audio", "voice"), ("text", "wording"))
        if key in channels
    ]
    weighed = (
        ""
        if row.get("conflict") in (None, "consistent")
        else (" Where face and voice disagree, the stronger channel decides.")
    )
    return (
        f"<think>The clip shows these cues: {', '.join(present)}. {' '.join(parts)}{weighed} "
        f"Taken together, the cues speak for {row['label']}.</think>"
        f"<answer>{row['label']}</answer>"
    )


def is_reasoning(text: str, question: str, min_words: int) -> bool:
    """Whether a completion contains reasoning that is worth sending to a judge."""
    if not think_text(text) and "</think>" not in text.casefold():
        return False
    thought = normalise(candidate_of(text).reasoning)
    if _words(labels_removed(thought, _LABELS)) < min_words:
        return False
    return thought not in normalise(question) and not mentions_rubric(text)


def _words(text: str) -> int:
    """The number of words. Scripts without spaces have about two characters in a word."""
    unspaced = len(_UNSPACED.findall(text))
    spaced = _UNSPACED.sub(" ", text).split()
    return unspaced // 2 + sum(any(char.isalnum() for char in word) for word in spaced)


def _value(grades: Grades, weights: Sequence[float], capped: bool) -> float:
    most = grades.factual_alignment if capped else HIGHEST
    return sum(w * min(grade, most) / HIGHEST for w, grade in zip(weights, grades, strict=True))


@lru_cache(maxsize=8)
def _open(config: str) -> Judge:
    return open_judge(json.loads(config), where="reasoning: judge")
