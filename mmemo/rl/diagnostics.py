"""Signs that a policy games its rewards, measured on every step of training.

A hacked reward rises while the outcome does not: its correlation with the outcome falls, answers
grow or shrink, one label takes over, groups agree on whatever pays. None of these proves it; each
says where to look. N completions stand prompt by prompt, G of each; K rewards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmemo.rl.advantages import zero_variance


class HackWatch:
    """Diagnostics of a run; the first steps set the length that later ones are measured by.

    Args:
        names: the rewards, in the order of the scores.
        outcome: the reward that is taken for the truth.
        reference_steps: steps at the start that set the length.
    """

    def __init__(self, names: Sequence[str], outcome: str, reference_steps: int = 20) -> None:
        self.names = tuple(names)
        self.outcome = outcome
        self.reference_steps = reference_steps
        self._lengths: list[float] = []

    def step(
        self,
        scores: Tensor,
        totals: Tensor,
        lengths: Sequence[int],
        labels: Sequence[str | None],
        group_size: int,
    ) -> dict[str, float]:
        """What one step shows. What cannot be said (a correlation of constants) is left out.

        Args:
            scores: (N, K) of all ranks; NaN where unscored.
            totals: (N,) the combined rewards; NaN where unscored.
            lengths: N lengths of the completions in tokens.
            labels: N labels that the answers name, None where they name none.
        """
        sizes = torch.tensor(lengths, dtype=torch.float64)
        mean = float(sizes.mean())
        if len(self._lengths) < self.reference_steps:
            self._lengths.append(mean)
        reference = sum(self._lengths) / len(self._lengths)
        found = {
            "hack/length_mean": mean,
            "hack/length_drift": mean / reference - 1 if reference else math.nan,
            "hack/length_correlation": correlation(sizes, totals.double().cpu()),
            "hack/unscored_rate": float(totals.isnan().double().mean()),
            "hack/zero_variance_share": float(zero_variance(totals, group_size).double().mean()),
            **label_statistics(labels),
        }
        outcome = scores[:, self.names.index(self.outcome)].double().cpu()
        for k, name in enumerate(self.names):
            column = scores[:, k].double().cpu()
            found[f"hack/{name}/unscored_rate"] = float(column.isnan().double().mean())
            if name != self.outcome:
                found[f"hack/{name}/outcome_correlation"] = correlation(column, outcome)
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"lengths": list(self._lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._lengths = [float(value) for value in state["lengths"]]


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation over the entries that are NaN in neither of two (N,) tensors; NaN
    below three of them or where one side is constant."""
    both = ~(one.isnan() | other.isnan())
    x, y = one[both], other[both]
    if len(x) < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt()))


def label_statistics(labels: Sequence[str | None]) -> dict[str, float]:
    """How varied the answers of a step are: the number of distinct labels per readable answer, the
    share of the commonest label, and the share of answers that name no single label."""
    counts = Counter(label for label in labels if label is not None)
    readable = counts.total()
    return {
        "hack/distinct_label_rate": len(counts) / readable if readable else math.nan,
        "hack/top_label_share": max(counts.values()) / readable if readable else math.nan,
        "hack/unreadable_rate": 1 - readable / len(labels) if labels else math.nan,
    }
