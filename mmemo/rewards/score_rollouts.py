"""Scores one step's rollouts: rewards, trust and hacking metrics, from completions to advantages.

Every rank scores its own completions and sends a report to all others. Groups, the trust gate and
the metrics are computed from all reports in one order, so they are the same on every rank, however
the completions were distributed.

N completions of this rank, prompt by prompt, G of each prompt; K rewards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from mmemo.answers.parsing import EMOTIONS, labels_for, read_label
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError
from mmemo.rewards.advantages import (
    Combined,
    ScaleRewards,
    advantage_shares,
    combine,
    group_std,
    zero_variance,
)
from mmemo.rewards.hacking import HackingMetrics
from mmemo.rewards.rewards import (
    FailureWatch,
    RewardConfig,
    RewardScores,
    RewardSet,
    UnscoredWatch,
    columns_of,
    prompt_of,
)
from mmemo.rewards.trust import ProgressiveTrust, TrustConfig, Trusted, trust_statistics
from mmemo.run_log import RunRecord


class Gathering(Protocol):
    """The part of :class:`mmemo.train.distributed.Ranks` that is needed here."""

    @property
    def rank(self) -> int: ...
    def all_gather_text(self, text: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class GroupRollouts:
    """The completions of one micro-batch: B samples, N = B * G texts with their token ids.

    ``place``: index of the micro-batch among those of the step over all ranks. ``ended``: N flags,
    False where the length limit cut the completion.
    """

    place: int
    samples: list[Sample]
    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]


@dataclass(frozen=True, slots=True)
class Scored:
    """Advantages and rewards of one step.

    For this rank's micro-batches, by their ``place``: ``advantages`` (N,), ``totals`` (N,) of the
    weighted rewards and ``values`` (N, K) of the single ones, NaN where unscored. ``statistics``:
    metrics of all ranks, the same on each.
    """

    names: tuple[str, ...]
    advantages: dict[int, Tensor]
    totals: dict[int, Tensor]
    values: dict[int, Tensor]
    statistics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _CompletionReport:
    """One completion: its K scores, length in tokens, label, and whether it ended by itself."""

    values: list[float]
    length: int
    label: str | None
    ended: bool


@dataclass(frozen=True, slots=True)
class _MicroBatchReport:
    """The completions of one micro-batch, prompt by prompt."""

    place: int
    completions: list[_CompletionReport]


@dataclass(slots=True)
class _RankReport:
    """What a rank sends to the others about its completions of one step.

    ``failed``: number of completions on which each of the K rewards failed. ``metrics``: what
    rewards logged, a value for each time that they were called.
    """

    failed: list[int]
    micro_batches: list[_MicroBatchReport] = field(default_factory=list[_MicroBatchReport])
    failures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def to_json(self) -> str:
        # Python's JSON keeps NaN and every bit of a float, and needs no pickle as all_gather_object
        # does.
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> _RankReport:
        values: dict[str, Any] = json.loads(text)
        micro_batches = [
            _MicroBatchReport(one["place"], [_CompletionReport(**c) for c in one["completions"]])
            for one in values.pop("micro_batches")
        ]
        return cls(micro_batches=micro_batches, **values)


Reports = Sequence[_RankReport]
"""What all ranks reported of a step, in the order of the ranks."""


class GroupRewards:
    """The rewards of a run, with the state that trust and metrics keep between steps.

    Args:
        configs: the rewards.
        trust: progressive trust; None combines the rewards by their weights alone.
        group_size: G, completions per prompt.
        scale_rewards: what advantages are divided by.
        record: run record for the events of failed rewards.
        outcome: the reward that metrics take for the truth. None uses the trust's outcome, else
            a reward called ``outcome``, else the first.
        reference_steps: see :class:`~mmemo.rewards.hacking.HackingMetrics`.

    Raises:
        ConfigError: a reward cannot be loaded, or a name is none of the rewards.
    """

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        trust: TrustConfig | None,
        group_size: int,
        scale_rewards: ScaleRewards,
        record: RunRecord,
        outcome: str | None = None,
        reference_steps: int = 20,
    ) -> None:
        self.rewards = RewardSet(configs)
        self.names = self.rewards.names
        self.group_size, self.record = group_size, record
        self.scale_rewards: ScaleRewards = scale_rewards
        weights = self.rewards.weights
        self.trust = None if trust is None else ProgressiveTrust(trust, self.names, weights)
        self.outcome = outcome_reward(self.names, trust, outcome)
        self._failures = FailureWatch(configs)
        self._unscored = UnscoredWatch()
        self._hacking = HackingMetrics(self.names, self.outcome, reference_steps)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set of the data; empty until :meth:`use_labels`."""
        return self.rewards.labels

    def use_labels(self, labels: Sequence[str]) -> None:
        """Read answers with the label set of the data (:func:`~mmemo.rewards.rewards.label_set`),
        which is known only once the rows are."""
        self.rewards.labels = tuple(labels)

    def score(
        self, rollouts: Sequence[GroupRollouts], step: int, total: int, ranks: Gathering
    ) -> Scored:
        """Score this rank's completions and compare groups over all ranks.

        Args:
            rollouts: this rank's micro-batches.
            step: optimiser steps taken so far.
            total: optimiser steps of the whole run.
            ranks: gathers the reports of all ranks.

        Raises:
            TrainingError: a reward failed too often, or nothing is scored any more.
        """
        return self.conclude(self.gather(rollouts, step, total, ranks), step, total, ranks)

    def gather(
        self,
        rollouts: Sequence[GroupRollouts],
        step: int,
        total: int,
        ranks: Gathering,
        before: Reports = (),
    ) -> Reports:
        """The first half of :meth:`score`: call the rewards, without a change of any state.

        Args:
            before: what earlier calls of the same step returned; the new reports are added to it.

        Returns:
            The reports of each rank, in the order of the ranks.
        """
        report = self._report(rollouts, step, total)
        reports = [_RankReport.from_json(text) for text in ranks.all_gather_text(report.to_json())]
        return [_merged(*both) for both in zip(before, reports, strict=True)] if before else reports

    def flat_groups(self, reports: Reports) -> dict[int, list[bool]]:
        """For each micro-batch of all ranks, by its place: which of its groups have no learning
        signal (:func:`~mmemo.rewards.advantages.zero_variance`), as far as rewards are trusted
        now. The same on every rank, and without a change of any state."""
        batches = [batch for _, batch in _by_place(reports)]
        # Trust learns from what it is applied to.
        _, combined = self._combine(self._scores(batches), deepcopy(self.trust))
        sizes = [len(batch.completions) // self.group_size for batch in batches]
        flat = zero_variance(combined.total, self.group_size).split(sizes)
        return {batch.place: part.tolist() for batch, part in zip(batches, flat, strict=True)}

    def conclude(self, reports: Reports, step: int, total: int, ranks: Gathering) -> Scored:
        """The second half of :meth:`score`: advantages and metrics of what was gathered, and the
        new state of trust, failures and metrics."""
        # Every rank comes here, but only the main rank's record writes.
        for rank, one in enumerate(reports):
            for failure in one.failures:
                self.record.event("reward_failed", step=step, rank=rank, **failure)
        batches = _by_place(reports)
        completions = [one for _, batch in batches for one in batch.completions]
        scores = self._scores([batch for _, batch in batches])
        failed = [sum(counts) for counts in zip(*(one.failed for one in reports), strict=True)]
        # Every rank counts the failures of all, so that all stop in one step. A rank that stopped
        # alone would leave the others waiting for it.
        self._failures.update(failed, len(scores))
        trusted, combined = self._combine(scores, self.trust)
        self._unscored.update(combined.total, step, total)
        plain = Trusted(combined, scores.new_zeros(0), 1.0)
        advantages, parts = (trusted or plain).advantages(self.group_size, self.scale_rewards)
        lengths = [one.length for one in completions]
        labels = [one.label for one in completions]
        statistics = {
            **_logged_by_rewards(reports),
            **self._statistics(scores, combined, trusted, advantages, parts),
            **self._hacking.step(scores, combined.total, lengths, labels, self.group_size),
            **_length_statistics(lengths, [one.ended for one in completions]),
        }
        sizes = [len(batch.completions) for _, batch in batches]

        def own(values: Tensor) -> dict[int, Tensor]:
            """This rank's share of (W, ...) values of all ranks, by place."""
            pairs = zip(batches, values.split(sizes), strict=True)
            return {batch.place: part for (rank, batch), part in pairs if rank == ranks.rank}

        return Scored(self.names, own(advantages), own(combined.total), own(scores), statistics)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which a run resumes exactly."""
        return {
            "trust": None if self.trust is None else self.trust.state_dict(),
            "failures": self._failures.state_dict(),
            "unscored": self._unscored.state_dict(),
            "hacks": self._hacking.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        if self.trust is not None and state["trust"] is not None:
            self.trust.load_state_dict(state["trust"])
        self._failures.load_state_dict(state["failures"])
        if "unscored" in state:  # older checkpoints have none
            self._unscored.load_state_dict(state["unscored"])
        self._hacking.load_state_dict(state["hacks"])

    def _report(self, rollouts: Sequence[GroupRollouts], step: int, total: int) -> _RankReport:
        # A rank without completions reports too, because gathering waits for every rank.
        if not rollouts:
            return _RankReport(failed=[0] * len(self.names))
        idle = [] if self.trust is None else self.trust.idle()
        state = SimpleNamespace(global_step=step, max_steps=total)
        scores = score_completions(self.rewards, rollouts, state, idle)
        values = iter(scores.values.tolist())  # a row for each completion, in their order
        return _RankReport(
            failed=scores.failed().tolist(),
            micro_batches=[
                _MicroBatchReport(
                    batch.place,
                    [
                        _CompletionReport(next(values), len(ids), self._label(sample, text), ended)
                        for sample, text, ids, ended in zip(
                            _repeat(batch.samples, self.group_size),
                            batch.texts,
                            batch.ids,
                            batch.ended,
                            strict=True,
                        )
                    ],
                )
                for batch in rollouts
            ],
            failures=[failure.event() for failure in scores.failures],
            metrics={name: [value] for name, value in scores.metrics.items()},
            seconds=scores.seconds,
        )

    def _label(self, sample: Sample, text: str) -> str | None:
        """The label that an answer names."""
        # Any known emotion stands for all of them, where a row has no label.
        truth = sample.truth.label or next(iter(self.labels), EMOTIONS[0])
        labels, _ = labels_for(truth, self.labels or None)
        return read_label(text, labels)

    def _scores(self, batches: Sequence[_MicroBatchReport]) -> Tensor:
        """(W, K) for the W completions of all ranks."""
        completions = [one for batch in batches for one in batch.completions]
        scores = torch.tensor([one.values for one in completions], dtype=torch.float32)
        return scores.view(-1, len(self.names))

    def _combine(
        self, scores: Tensor, trust: ProgressiveTrust | None
    ) -> tuple[Trusted | None, Combined]:
        if trust is None:
            return None, combine(scores, self.rewards.weights, self.group_size)
        trusted = trust.apply(scores, self.group_size)
        return trusted, trusted.combined

    def _statistics(
        self,
        scores: Tensor,
        combined: Combined,
        trusted: Trusted | None,
        advantages: Tensor,
        parts: Tensor,
    ) -> dict[str, float]:
        """Metrics of one step, under TRL's names where it has them. ``within_std`` is the mean
        standard deviation inside groups, ``advantage_share`` a reward's share of the squared
        advantages."""
        total = combined.total
        found = {
            "reward": float(total.nanmean()),
            "reward_std": _spread(total),
            "frac_reward_zero_std": float(zero_variance(total, self.group_size).float().mean()),
            "advantage_size": float(advantages.abs().mean()),
        }
        shares = advantage_shares(parts, advantages)
        for k, name in enumerate(self.names):
            within = group_std(scores[:, k], self.group_size)
            found[f"rewards/{name}/mean"] = float(scores[:, k].nanmean())
            found[f"rewards/{name}/std"] = _spread(scores[:, k])
            found[f"rewards/{name}/within_std"] = float(within.nanmean())
            found[f"rewards/{name}/advantage_share"] = float(shares[k])
        if trusted is not None and self.trust is not None:
            found |= trust_statistics(trusted, self.trust)
        return {name: value for name, value in found.items() if not math.isnan(value)}


def outcome_reward(names: Sequence[str], trust: TrustConfig | None, given: str | None) -> str:
    """Name of the reward that decides which answers are correct.

    Args:
        given: the name that the config gives, if any.

    Raises:
        ConfigError: ``given`` is none of the rewards.
    """
    if given is not None and given not in names:
        raise ConfigError(f"watch.outcome: no reward is called '{given}'; use {', '.join(names)}")
    guess = "outcome" if "outcome" in names else names[0]
    return given or (guess if trust is None else trust.outcome)


def score_completions(
    rewards: RewardSet, rollouts: Sequence[GroupRollouts], state: Any, skip: Sequence[str] = ()
) -> RewardScores:
    """Score all completions, prompt by prompt, in the order of ``rollouts``.

    Args:
        state: passed to rewards as ``trainer_state``.
        skip: names of rewards that are not called.
    """
    samples = [
        sample
        for one in rollouts
        for sample in _repeat(one.samples, len(one.texts) // max(1, len(one.samples)))
    ]
    columns = [columns_of(sample) for sample in samples]
    # Rows may have different columns. A set of their names would have another order in each
    # process.
    names = dict.fromkeys(name for column in columns for name in column)
    return rewards.score(
        [prompt_of(sample) for sample in samples],
        [[{"role": "assistant", "content": text}] for one in rollouts for text in one.texts],
        [ids for one in rollouts for ids in one.ids],
        {name: [column.get(name) for column in columns] for name in names},
        trainer_state=state,
        skip=skip,
    )


def _repeat(samples: Sequence[Sample], group: int) -> list[Sample]:
    return [sample for sample in samples for _ in range(group)]


def _spread(values: Tensor) -> float:
    kept = values[~values.isnan()]
    # torch warns where fewer than two values are left.
    return float(kept.std()) if len(kept) > 1 else math.nan


def _by_place(reports: Reports) -> list[tuple[int, _MicroBatchReport]]:
    """The micro-batches of all ranks, each with its rank, in the order of their places: the sums
    must not depend on who scored what."""
    found = [(rank, batch) for rank, one in enumerate(reports) for batch in one.micro_batches]
    return sorted(found, key=lambda item: item[1].place)


def _merged(one: _RankReport, other: _RankReport) -> _RankReport:
    """Two reports of a rank as one."""
    return _RankReport(
        failed=[a + b for a, b in zip(one.failed, other.failed, strict=True)],
        micro_batches=[*one.micro_batches, *other.micro_batches],
        failures=[*one.failures, *other.failures],
        metrics={
            name: one.metrics.get(name, []) + other.metrics.get(name, [])
            for name in {**one.metrics, **other.metrics}
        },
        seconds={
            name: one.seconds.get(name, 0.0) + other.seconds.get(name, 0.0)
            for name in {**one.seconds, **other.seconds}
        },
    )


def _logged_by_rewards(reports: Sequence[_RankReport]) -> dict[str, float]:
    """Metrics that rewards logged, averaged over calls and ranks, and the seconds of the slowest
    rank."""
    found: dict[str, float] = {}
    for name in sorted({name for one in reports for name in one.metrics}):
        logged = [value for one in reports for value in one.metrics.get(name, [])]
        found[f"rewards/{name}"] = sum(logged) / len(logged)
    for name in sorted({name for one in reports for name in one.seconds}):
        # The ranks wait for each other, so the slowest one is what a reward costs.
        found[f"rewards/{name}/seconds"] = max(one.seconds.get(name, 0.0) for one in reports)
    return found


def _length_statistics(lengths: Sequence[int], ended: Sequence[bool]) -> dict[str, float]:
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - sum(ended) / len(ended),
    }
