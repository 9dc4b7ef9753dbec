"""A reward model as the answerer of a benchmark of preferences: it grades both candidates of a
pair, and the one with the higher grade is its answer.

A pair with equal grades is answered ``same``, which is wrong and scores one half; a pair of which
one candidate could not be graded has no answer, and scores 0. So both stay in every denominator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.predictions import Row
from mmemo.rewards.judge.calibration import reward_of
from mmemo.rewards.judge.rubric import Grades, Judge, JudgeItem, clip_media, facts
from mmemo.rewards.rewards import columns_of

FIRST, SECOND, EQUAL = "a1", "a2", "same"
PROMPT = "Describe the person's emotional state and the cues for it in face, voice and words."


def judged_rows(judge: Judge, questions: Sequence[Question]) -> list[Row]:
    """The rows of ``predictions.jsonl`` of a judge, one for each question, whose candidates are in
    the columns ``a1`` and ``a2``. The judge is told the words of the clip, but nothing else that is
    true of it."""
    items = [item for question in questions for item in _items(question)]
    grades = asyncio.run(judge.score(items))
    pairs = zip(grades[::2], grades[1::2], strict=True)
    return [_row(question, *pair) for question, pair in zip(questions, pairs, strict=True)]


def _items(question: Question) -> tuple[JudgeItem, JudgeItem]:
    columns = columns_of(question.sample)
    known = facts({"transcript": columns["transcript"]})
    clip = clip_media(columns["media"])
    first, second = (str(columns[name]) for name in (FIRST, SECOND))
    return JudgeItem(PROMPT, first, known, clip), JudgeItem(PROMPT, second, known, clip)


def _row(question: Question, first: Grades | None, second: Grades | None) -> Row:
    rewards = [None if one is None else reward_of(one) for one in (first, second)]
    a, b = rewards
    row: dict[str, Any] = {**question.row(), "raw": "", "status": "malformed", "answer": None}
    if a is not None and b is not None:
        answer = EQUAL if a == b else FIRST if a > b else SECOND
        row |= {"raw": answer, "status": "ok", "answer": answer}
    right = row["answer"] == question.truth
    tied = row["answer"] == EQUAL and question.truth != EQUAL
    return {**row, "rewards": rewards, "score": 1.0 if right else 0.5 if tied else 0.0}


def preference_numbers(block: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The numbers of a judge from the block of its task: accuracy and WAF, where a tie is wrong,
    and ``accuracy_ties_half``, each with its interval; and how many pairs were equal, or not
    graded."""
    metrics = block["metrics"]
    return {
        "accuracy": metrics["war"],
        "waf": metrics["weighted_f1"],
        "accuracy_ties_half": block.get("score", metrics["war"]),
        "ties": sum(row["answer"] == EQUAL for row in rows),
        "ungraded": sum(row["status"] != "ok" for row in rows),
    }
