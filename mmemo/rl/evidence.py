"""Does a scorer of reasoning prefer what led to right answers? Asked over a run.

One group's difference between correct and incorrect answers is noise; the mean over many groups,
in units of its standard error, says how sure it is. Not from a paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

EVIDENCE_BETA = 0.95
"""What each step leaves of the evidence of the steps before it, for ``evidence: run``."""


@dataclass(slots=True)
class Evidence:
    """Differences between correct and incorrect answers over the run, the latest weighing most:
    sums of weights, of squared weights, of weighted differences and of their squares."""

    weight: float = 0.0
    weight2: float = 0.0
    total: float = 0.0
    total2: float = 0.0

    def add(self, differences: Tensor) -> None:
        """Take in one step's groups; (P,), NaN for those that cannot be judged."""
        known = differences[~differences.isnan()].double()
        self.weight = EVIDENCE_BETA * self.weight + len(known)
        self.weight2 = EVIDENCE_BETA**2 * self.weight2 + len(known)
        self.total = EVIDENCE_BETA * self.total + float(known.sum())
        self.total2 = EVIDENCE_BETA * self.total2 + float((known**2).sum())

    @property
    def t(self) -> float:
        """Mean difference over its standard error; 0 below two groups' worth, or without spread
        and difference."""
        number = self.weight**2 / self.weight2 if self.weight2 > 0 else 0.0
        if number < 2:
            return 0.0
        mean = self.total / self.weight
        spread = max(0.0, self.total2 / self.weight - mean**2) / (number - 1)
        return mean / max(math.sqrt(spread), 1e-6)
