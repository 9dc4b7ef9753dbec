"""The judge that mmemo trains: grades reasoning in this process, without a server.

What holds for every judge holds here: a candidate that speaks the language of verdicts gets the
lowest grades unseen, and what cannot be graded has no grade.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field

from mmemo.config import Config
from mmemo.rl.judge import HIGHEST, LOWEST, WORST, Grades, JudgeItem, speaks_of_grades
from mmemo.rl.scorer import load_scorer, score_items


class LocalJudgeConfig(Config):
    """A reward model and how it is run."""

    model: str
    """The ``final`` folder of ``mmemo reward-model``."""
    batch_size: int = Field(default=32, ge=1)
    """Items of one forward pass."""
    use_cpu: bool = False
    """Score on the CPU although there is a GPU."""
    rounded: bool = True
    """Whole grades, as an endpoint gives them. False keeps the expected grades between them: a
    group then ties less often, and its advantages say more."""


class LocalJudge:
    """A :class:`~mmemo.rl.judge.Judge`. ``counts``: ``items``, ``flagged`` (graded lowest unseen)
    and ``too_long`` (question and facts alone fill the model).

    Raises:
        ConfigError: the folder holds no reward model.
        CheckpointError: its weights are damaged.
    """

    def __init__(self, config: LocalJudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        scorer, self.reader = load_scorer(Path(config.model))
        gpu = torch.cuda.is_available() and not config.use_cpu
        self.scorer = scorer.to(torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu")

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        """One result per item, in order. Runs in a thread, so that other rewards go on."""
        return await asyncio.to_thread(self.grade, items)

    def grade(
        self, items: Sequence[JudgeItem], advance: Callable[[int], None] = lambda _: None
    ) -> list[Grades | None]:
        """The same, here and now. ``advance`` is told how many items are done."""
        found: list[Grades | None] = []
        step = 16 * self.config.batch_size
        for start in range(0, len(items), step):
            found += self._grade(items[start : start + step])
            advance(len(items[start : start + step]))
        return found

    def _grade(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        self.counts["items"] += len(items)
        flagged = [speaks_of_grades(item.completion) for item in items]
        asked = [item for item, bad in zip(items, flagged, strict=True) if not bad]
        scores = iter(score_items(self.scorer, self.reader, asked, self.config.batch_size))
        found: list[Grades | None] = []
        for bad in flagged:
            if bad:
                self.counts["flagged"] += 1
                found.append(WORST)
                continue
            one = next(scores)
            self.counts["too_long"] += one is None
            found.append(None if one is None else self._grades(one))
        return found

    def _grades(self, expected: Sequence[float]) -> Grades:
        if self.config.rounded:  # half up: Python's round() goes to the even grade
            expected = [int(grade + 0.5) for grade in expected]
        return Grades(*(min(HIGHEST, max(LOWEST, grade)) for grade in expected))
