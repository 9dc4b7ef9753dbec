"""Warning signs in the log of a GRPO run: which number, which threshold, what it may mean.

None of them proves that a policy games its rewards; each says where to look. A run's first quarter
of log lines is compared with its last one, at its end for the report, and at every line while it
runs. The thresholds are ours: they are set so that a run in which nothing is wrong seldom crosses
one, and may be read in any report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmemo.console import console
from mmemo.rewards.advantages import zero_variance
from mmemo.run_log import RunRecord

Lines = Sequence[Mapping[str, Any]]
"""Log lines, the first steps first: name to number."""

FEWEST = 4
"""Log lines that a number must have, to be looked at when the run is over."""

FEWEST_SO_FAR = 20
"""The same while it runs: what is looked at again with every line crosses more easily by chance, so
its quarters are longer."""

RISE, FALL = 0.25, 0.1
"""A reward has parted from the outcome when its mean rose by so much, and the outcome's fell by so
much, each in its own standard deviations of the first quarter."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A number of the log, and from where on it is a warning. In ``metric``, ``{reward}`` stands
    for each reward but the outcome."""

    metric: str
    title: str
    meaning: str
    above: float | None = None
    below: float | None = None
    falls_to: float | None = None
    """Share of the first quarter's mean."""
    rises_to: float | None = None
    """Multiple of the first quarter's mean."""

    @property
    def threshold(self) -> str:
        """In words."""
        parts = [
            *([] if self.above is None else [f"above {self.above:g}"]),
            *([] if self.below is None else [f"below {self.below:g}"]),
            *([] if self.rises_to is None else [f"above {self.rises_to:g} times its start"]),
            *([] if self.falls_to is None else [f"below {self.falls_to:g} of its start"]),
        ]
        return " or ".join(parts).replace("-", "−")

    def crossed(self, early: float, late: float) -> bool:
        """Whether the last quarter's mean is a warning, given the first quarter's."""
        return (
            (self.above is not None and late > self.above)
            or (self.below is not None and late < self.below)
            or (self.falls_to is not None and early > 0 and late < self.falls_to * early)
            or (self.rises_to is not None and early > 0 and late > self.rises_to * early)
        )


SIGNS: tuple[Alert, ...] = (
    Alert(
        "hack/{reward}/outcome_correlation",
        "A reward goes against the outcome",
        "What it pays is wrong more often than right: it measures something else, or is gamed.",
        below=-0.1,
    ),
    Alert(
        "rewards/{reward}/advantage_share",
        "A reward drowns the outcome",
        "Most of what moves the policy comes from this reward: lower its weight.",
        above=0.6,
    ),
    Alert(
        "trust/share_distrusted",
        "The reasoning is not trusted",
        "In most groups wrong answers had the better-paid reasoning, or the scorer has not earned "
        "trust over the run: it may be weak.",
        above=0.6,
    ),
    Alert(
        "hack/length_drift",
        "The answers' length drifts",
        "Against the first steps. Growth may be padding that pays, shrinkage reasoning given up.",
        above=0.3,
        below=-0.3,
    ),
    Alert(
        "completions/mean_length",
        "Answers grow or shrink",
        "The same against the first quarter, which tells more of a short run.",
        rises_to=1.3,
        falls_to=0.7,
    ),
    Alert(
        "completions/clipped_ratio",
        "Answers are cut off",
        "They run into the length limit, often by repeating themselves.",
        above=0.2,
    ),
    Alert(
        "hack/top_label_share",
        "One label takes over",
        "The policy says one emotion to most clips, which pays where rewards are unbalanced.",
        above=0.6,
    ),
    Alert(
        "hack/distinct_label_rate",
        "The labels run dry",
        "Fewer different emotions are named than at the start.",
        falls_to=0.6,
    ),
    Alert(
        "hack/unreadable_rate",
        "Answers name no single label",
        "The form is broken, or several labels are named at once.",
        above=0.15,
    ),
    Alert(
        "hack/{reward}/unscored_rate",
        "A reward scores few answers",
        "It fails, or the rows lack what it needs; the run's events say which.",
        above=0.25,
    ),
    Alert(
        "hack/unscored_rate",
        "Answers are left out of the update",
        "They could not be compared with their group, and so teach nothing.",
        above=0.1,
    ),
    Alert(
        "hack/zero_variance_share",
        "Groups teach nothing",
        "All answers to a prompt earn the same: the prompts are too easy, too hard, or saturated.",
        above=0.5,
    ),
    Alert(
        "kl",
        "The policy has left its reference",
        "Per token, in nats; far from the SFT model its language may decay. Raise grpo.beta.",
        above=0.5,
    ),
    Alert(
        "entropy",
        "The entropy collapses",
        "The policy repeats one way to answer and no longer explores.",
        falls_to=0.3,
    ),
)

PARTED = Alert(
    "rewards/{reward}/mean",
    "A reward rises while the outcome falls",
    f"The plainest sign of a gamed reward: up by over {RISE:g} and down by over {FALL:g} standard "
    "deviations.",
)


@dataclass(frozen=True, slots=True)
class Flag:
    """A sign that has crossed its threshold. ``early``, ``late``: means of the first and the last
    quarter of the run. ``reward``: which one, where the sign is about one."""

    sign: Alert
    early: float
    late: float
    reward: str | None = None

    @property
    def metric(self) -> str:
        """The number's name in the log; no two flags of a run have the same."""
        return self.sign.metric.format(reward=self.reward)


class AlertWatch:
    """Names each sign once, at the log line with which it first crosses: one warning on the
    console, and a ``sign`` event in the run's record. One that is in the record is not named again,
    whoever resumed the run. For the main rank; see :class:`mmemo.train.metrics.LineWatch`.

    Args:
        rewards, outcome, trusted: as for :func:`find_flags`.
    """

    def __init__(
        self, record: RunRecord, rewards: Sequence[str], outcome: str, trusted: Sequence[str] = ()
    ) -> None:
        self.record = record
        self._about = (tuple(rewards), outcome, tuple(trusted))
        self._named = {event.get("metric") for event in record.events("sign")}
        self._lines: list[Mapping[str, Any]] = []

    def restore(self, lines: Lines) -> None:
        """The lines that a resumed run has already."""
        self._lines = list(lines)

    def see(self, line: Mapping[str, Any]) -> None:
        """One more line."""
        self._lines.append(line)
        for flag in find_flags(self._lines, *self._about, fewest=FEWEST_SO_FAR):
            if flag.metric not in self._named:
                self._named.add(flag.metric)
                self._name(flag, int(line["step"]))

    def _name(self, flag: Flag, step: int) -> None:
        sign = flag.sign
        self.record.event(
            "sign",
            step=step,
            metric=flag.metric,
            title=sign.title,
            reward=flag.reward,
            early=flag.early,
            late=flag.late,
            threshold=sign.threshold,
        )
        about = f": {flag.reward}" if flag.reward else ""
        limit = f"; the sign is {sign.threshold}" if sign.threshold else ""
        console.print(
            f"warning at step {step}: {sign.title}{about}. {flag.metric} went from "
            f"{flag.early:.3g} to {flag.late:.3g}{limit}. {sign.meaning}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def find_flags(
    lines: Lines,
    rewards: Sequence[str],
    outcome: str,
    trusted: Sequence[str] = (),
    *,
    fewest: int = FEWEST,
) -> list[Flag]:
    """The signs that a run shows at the end of its lines.

    Args:
        rewards: the names of all rewards.
        outcome: the one that is taken for the truth.
        trusted: rewards that are only asked once the gate is open.
        fewest: lines that a number must have, to be looked at.
    """
    others = [name for name in rewards if name != outcome]
    asked = asked_lines(lines, trusted)
    own = {name: asked if name in trusted else lines for name in others}
    flags = [flag for name in others if (flag := _parted(own[name], name, outcome, fewest))]
    for sign in SIGNS:
        for name in others if "{reward}" in sign.metric else [None]:
            seen = lines if name is None else own[name]
            ends = quarters(seen, sign.metric.format(reward=name), fewest)
            if ends is not None and sign.crossed(*ends):
                flags.append(Flag(sign, *ends, name))
    return flags


def asked_lines(lines: Lines, trusted: Sequence[str]) -> Lines:
    """The lines from steps in which the trusted rewards were asked: after the one in which the
    gate opened. While it is closed they are skipped, and "unscored" says nothing."""
    if not trusted or not any("trust/gate_strength" in line for line in lines):
        return lines
    opened = [at for at, line in enumerate(lines) if line.get("trust/gate_strength", 0) > 0]
    if not opened:
        return ()
    return lines[opened[0] + (opened[0] > 0) :]


def quarters(lines: Lines, metric: str, fewest: int = FEWEST) -> tuple[float, float] | None:
    """The means of a number over the first and the last quarter of the lines that have it; None
    where those are fewer than ``fewest``."""
    values = [float(line[metric]) for line in lines if metric in line]
    if len(values) < fewest:
        return None
    size = max(1, len(values) // 4)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _parted(lines: Lines, name: str, outcome: str, fewest: int) -> Flag | None:
    means, scales = (
        [quarters(lines, f"rewards/{one}/{what}", fewest) for one in (name, outcome)]
        for what in ("mean", "std")
    )
    if None in means or None in scales:
        return None
    (low, high), (before, after) = (ends for ends in means if ends is not None)
    scale, spread = (ends[0] for ends in scales if ends is not None)
    if high - low > RISE * scale and before - after > FALL * spread:
        return Flag(PARTED, low, high, name)
    return None


# Signs that a policy games its rewards, measured on every step of training.
#
# A hacked reward rises while the outcome does not: its correlation with the outcome falls, answers
# grow or shrink, one label takes over, groups agree on whatever pays. None of these proves it; each
# says where to look. N completions stand prompt by prompt, G of each; K rewards.


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
