"""Signs of reward hacking: metrics of every training step, and alerts on the log of a run.

A hacked reward rises while the outcome does not: its correlation with the outcome falls, answers
grow or shrink, one label takes over, groups agree on whatever pays. :class:`HackingMetrics`
measures this in each step. An :class:`AlertRule` is a metric of the log and a threshold, and an
:class:`Alert` a rule that a run has triggered. No alert proves that a policy games its rewards;
each says where to look.

Rules compare the first quarter of a run's log lines with the last one: at its end for the report
(:func:`find_alerts`), and at every line while it runs (:class:`AlertMonitor`). The thresholds are
ours. They are set so that a run in which nothing is wrong seldom crosses one, and may be read in
any report.

N completions stand prompt by prompt, G of each prompt; K rewards.
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


class HackingMetrics:
    """Measures signs of reward hacking in each step of a run.

    Args:
        names: names of the rewards, in the order of the scores.
        outcome: the reward that is taken for the truth.
        reference_steps: number of first steps whose mean length later lengths are compared with.
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
        """Metrics of one step; a metric that is undefined (a correlation of constants) is left out.

        Args:
            scores: (N, K) scores of all ranks; NaN where unscored.
            totals: (N,) combined rewards; NaN where unscored.
            lengths: N lengths of the completions in tokens.
            labels: N labels that the answers name; None where an answer names no single one.
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
        """Continue from :meth:`state_dict`."""
        self._lengths = [float(value) for value in state["lengths"]]


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two (N,) tensors over the entries that are NaN in neither; NaN with
    fewer than three such entries, or where one side is constant."""
    both = ~(one.isnan() | other.isnan())
    x, y = one[both], other[both]
    # Values are compared, because rounding may give a constant column a variance just above 0.
    if len(x) < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt()))


def label_statistics(labels: Sequence[str | None]) -> dict[str, float]:
    """Diversity of a step's answers: distinct labels per readable answer, share of the most common
    label, and share of answers that name no single label."""
    counts = Counter(label for label in labels if label is not None)
    readable = counts.total()
    return {
        "hack/distinct_label_rate": len(counts) / readable if readable else math.nan,
        "hack/top_label_share": max(counts.values()) / readable if readable else math.nan,
        "hack/unreadable_rate": 1 - readable / len(labels) if labels else math.nan,
    }


Lines = Sequence[Mapping[str, Any]]
"""Log lines in the order of their steps; each maps a metric's name to its value."""

# Four lines are the fewest of which each quarter is a whole line.
MIN_LINES = 4
"""Log lines that must hold a metric before its rules are checked at the end of a run."""

MIN_LINES_LIVE = 20
"""The same while a run is under way. Rules that are checked at every line are crossed more easily
by chance, so their quarters are longer."""

RISE, FALL = 0.25, 0.1
"""A reward diverges from the outcome when its mean has risen by more than ``RISE`` and the
outcome's has fallen by more than ``FALL``, each in its own standard deviations of the first
quarter."""


MAX_SAMPLING_KL, MAX_CLIPPED = 0.01, 0.05
"""How far the engine that draws may be from the trainer, as KL divergence in nats per token, and
which share of its importance ratios may be truncated or masked.

Where a token's log-probability is off by a normal error of variance v, the KL is v / 2, and the
ratios of completions of T tokens leave exp(-v T) of them as effective samples: at 0.01 nats and 100
tokens, 14%. Rounding logits between 8 and 16 to bfloat16, in steps of 0.0625, gives 0.0003. With
normal errors at most 6.9% of completions pass a ``clip_max`` of 3, however large v is."""


@dataclass(frozen=True, slots=True)
class AlertRule:
    """A metric of the log, and the values of it that are alarming. In ``metric``, ``{reward}``
    stands for each reward but the outcome."""

    metric: str
    title: str
    meaning: str
    above: float | None = None
    below: float | None = None
    falls_to: float | None = None
    """Alarming below this share of the first quarter's mean."""
    rises_to: float | None = None
    """Alarming above this multiple of the first quarter's mean."""
    at_once: bool = False
    """Checked on each line alone, from the first one on: it shows a fault of the set-up, and not
    what a policy has come to."""

    @property
    def threshold(self) -> str:
        """The alarming values in words; empty where the rule is not one of thresholds."""
        parts = [
            *([] if self.above is None else [f"above {self.above:g}"]),
            *([] if self.below is None else [f"below {self.below:g}"]),
            *([] if self.rises_to is None else [f"above {self.rises_to:g} times its start"]),
            *([] if self.falls_to is None else [f"below {self.falls_to:g} of its start"]),
        ]
        return " or ".join(parts).replace("-", "−")

    def is_crossed(self, early: float, late: float) -> bool:
        """Whether the last quarter's mean is alarming, given the first quarter's."""
        # A share or multiple of a start at or below 0 would turn the comparison around.
        return (
            (self.above is not None and late > self.above)
            or (self.below is not None and late < self.below)
            or (self.falls_to is not None and early > 0 and late < self.falls_to * early)
            or (self.rises_to is not None and early > 0 and late > self.rises_to * early)
        )


ALERT_RULES: tuple[AlertRule, ...] = (
    AlertRule(
        "hack/{reward}/outcome_correlation",
        "A reward goes against the outcome",
        "What it pays is wrong more often than right: it measures something else, or is gamed.",
        below=-0.1,
    ),
    AlertRule(
        "rewards/{reward}/advantage_share",
        "A reward drowns the outcome",
        "Most of what moves the policy comes from this reward: lower its weight.",
        above=0.6,
    ),
    AlertRule(
        "trust/share_distrusted",
        "The reasoning is not trusted",
        "In most groups wrong answers had the better-paid reasoning, or the scorer has not earned "
        "trust over the run: it may be weak.",
        above=0.6,
    ),
    AlertRule(
        "hack/length_drift",
        "The answers' length drifts",
        "Against the first steps. Growth may be padding that pays, shrinkage reasoning given up.",
        above=0.3,
        below=-0.3,
    ),
    AlertRule(
        "completions/mean_length",
        "Answers grow or shrink",
        "The same against the first quarter, which tells more about a short run.",
        rises_to=1.3,
        falls_to=0.7,
    ),
    AlertRule(
        "completions/clipped_ratio",
        "Answers are cut off",
        "They run into the length limit, often by repeating themselves.",
        above=0.2,
    ),
    AlertRule(
        "hack/top_label_share",
        "One label takes over",
        "The policy says one emotion to most clips, which pays where rewards are unbalanced.",
        above=0.6,
    ),
    AlertRule(
        "hack/distinct_label_rate",
        "The labels run dry",
        "Fewer different emotions are named than at the start.",
        falls_to=0.6,
    ),
    AlertRule(
        "hack/unreadable_rate",
        "Answers name no single label",
        "The form is broken, or several labels are named at once.",
        above=0.15,
    ),
    AlertRule(
        "readable",
        "The answers are no language",
        "They hold bytes that are no text, words that the data lack, or tokens that the reference "
        "hardly knows; the run's events name them.",
        below=0.95,
    ),
    AlertRule(
        "hack/{reward}/unscored_rate",
        "A reward scores few answers",
        "It fails, or the rows lack what it needs; the run's events say which.",
        above=0.25,
    ),
    AlertRule(
        "hack/unscored_rate",
        "Answers are left out of the update",
        "They could not be compared with their group, and so teach nothing.",
        above=0.1,
    ),
    AlertRule(
        "hack/zero_variance_share",
        "Groups teach nothing",
        "All answers to a prompt earn the same: the prompts are too easy, too hard, or saturated.",
        above=0.5,
    ),
    AlertRule(
        "kl",
        "The policy has left its reference",
        "Per token, in nats; far from the SFT model its language may decay. Raise grpo.beta.",
        above=0.5,
    ),
    AlertRule(
        "sampling/kl",
        "The engine draws from another policy than the one that learns",
        "Nats per token. Does it have the newest adapter, the run's temperature, and "
        "log-probabilities at that temperature before top_k, top_p and min_p?",
        above=MAX_SAMPLING_KL,
        at_once=True,
    ),
    AlertRule(
        "sampling/importance_sampling_ratio/clipped",
        "Many importance ratios are outside of their limits",
        "What is truncated biases the update, and what is masked teaches nothing: see sampling/kl "
        "for a fault of the engine, or use ratios of tokens for long completions.",
        above=MAX_CLIPPED,
    ),
    AlertRule(
        "entropy",
        "The entropy collapses",
        "The policy repeats one way to answer and no longer explores.",
        falls_to=0.3,
    ),
)

DIVERGENCE = AlertRule(
    "rewards/{reward}/mean",
    "A reward rises while the outcome falls",
    f"The plainest sign of a gamed reward: up by over {RISE:g} and down by over {FALL:g} standard "
    "deviations.",
)


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that a run has triggered. ``early``, ``late``: means of the metric over the first and
    the last quarter of the log lines; ``late`` is the last value where the rule is ``at_once``.
    ``reward``: the reward concerned, None for rules about the whole run."""

    rule: AlertRule
    early: float
    late: float
    reward: str | None = None

    @property
    def metric(self) -> str:
        """The metric's name in the log; no two alerts of a run share one."""
        return self.rule.metric.format(reward=self.reward)


class AlertMonitor:
    """Raises each alert of a running run once, at the log line that first triggers it.

    An alert is a warning on the console and a ``sign`` event in the run's record. One that stands
    in the record already, from before a resume, is not raised again. It runs on the main rank and
    receives log lines as a :class:`mmemo.train.metrics.LineWatch`.

    Args:
        record: the run's record.
        rewards, outcome, trusted: as for :func:`find_alerts`.
    """

    def __init__(
        self, record: RunRecord, rewards: Sequence[str], outcome: str, trusted: Sequence[str] = ()
    ) -> None:
        self.record = record
        self._rewards = (tuple(rewards), outcome, tuple(trusted))
        self._raised = {event.get("metric") for event in record.events("sign")}
        self._lines: list[Mapping[str, Any]] = []

    def restore(self, lines: Lines) -> None:
        """Take over the lines that a resumed run has already logged."""
        self._lines = list(lines)

    def see(self, line: Mapping[str, Any]) -> None:
        """Check the rules with one more line."""
        self._lines.append(line)
        for alert in find_alerts(self._lines, *self._rewards, min_lines=MIN_LINES_LIVE):
            if alert.metric not in self._raised:
                self._raised.add(alert.metric)
                self._raise(alert, int(line["step"]))

    def _raise(self, alert: Alert, step: int) -> None:
        rule = alert.rule
        self.record.event(
            "sign",
            step=step,
            metric=alert.metric,
            title=rule.title,
            reward=alert.reward,
            early=alert.early,
            late=alert.late,
            threshold=rule.threshold,
        )
        subject = f": {alert.reward}" if alert.reward else ""
        limit = f"; the threshold is {rule.threshold}" if rule.threshold else ""
        moved = f"went from {alert.early:.3g} to {alert.late:.3g}"
        if alert.early == alert.late:  # there is one line only
            moved = f"is {alert.late:.3g}"
        console.print(
            f"warning at step {step}: {rule.title}{subject}. {alert.metric} {moved}{limit}. "
            f"{rule.meaning}",
            style="yellow",
            soft_wrap=True,
        )


def find_alerts(
    lines: Lines,
    rewards: Sequence[str],
    outcome: str,
    trusted: Sequence[str] = (),
    *,
    min_lines: int = MIN_LINES,
) -> list[Alert]:
    """The alerts that a run triggers at the end of its log lines.

    Args:
        lines: the run's log.
        rewards: names of all rewards.
        outcome: the reward that is taken for the truth.
        trusted: rewards that are only asked once the trust gate is open.
        min_lines: log lines that must hold a metric before its rules are checked, but for those
            that are checked at once.
    """
    others = [name for name in rewards if name != outcome]
    gate_open = gate_open_lines(lines, trusted)
    lines_of = {name: gate_open if name in trusted else lines for name in others}
    alerts = [
        alert
        for name in others
        if (alert := _divergence(lines_of[name], name, outcome, min_lines)) is not None
    ]
    for rule in ALERT_RULES:
        for name in others if "{reward}" in rule.metric else [None]:
            concerned = lines if name is None else lines_of[name]
            metric = rule.metric.format(reward=name)
            means = quarter_means(concerned, metric, 1 if rule.at_once else min_lines)
            if means is not None and rule.at_once:
                means = means[0], next(x[metric] for x in reversed(concerned) if metric in x)
            if means is not None and rule.is_crossed(*means):
                alerts.append(Alert(rule, *means, name))
    return alerts


def gate_open_lines(lines: Lines, trusted: Sequence[str]) -> Lines:
    """The lines of the steps that asked the trusted rewards, which begin after the line in which
    the gate opened. While it is closed these rewards are skipped, and being unscored says nothing
    about them. All lines where no reward is trusted or the run has no gate."""
    if not trusted or not any("trust/gate_strength" in line for line in lines):
        return lines
    opened = [at for at, line in enumerate(lines) if line.get("trust/gate_strength", 0) > 0]
    if not opened:
        return ()
    # The gate may open between two lines, and the line after it then also covers closed steps.
    return lines[opened[0] + (opened[0] > 0) :]


def quarter_means(
    lines: Lines, metric: str, min_lines: int = MIN_LINES
) -> tuple[float, float] | None:
    """Means of a metric over the first and the last quarter of the lines that hold it; None where
    fewer than ``min_lines`` do."""
    values = [float(line[metric]) for line in lines if metric in line]
    if len(values) < min_lines:
        return None
    size = max(1, len(values) // 4)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _divergence(lines: Lines, name: str, outcome: str, min_lines: int) -> Alert | None:
    """An alert where the reward's mean has risen while the outcome's has fallen."""
    reward_mean, outcome_mean, reward_std, outcome_std = (
        quarter_means(lines, f"rewards/{one}/{statistic}", min_lines)
        for statistic in ("mean", "std")
        for one in (name, outcome)
    )
    if reward_mean is None or outcome_mean is None or reward_std is None or outcome_std is None:
        return None
    rise, fall = reward_mean[1] - reward_mean[0], outcome_mean[0] - outcome_mean[1]
    if rise > RISE * reward_std[0] and fall > FALL * outcome_std[0]:
        return Alert(DIVERGENCE, *reward_mean, name)
    return None
