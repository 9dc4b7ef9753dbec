"""From the completions of all ranks to advantages: rewards, trust, diagnostics of one step.

Every rank scores its own completions; the numbers are gathered so that groups, the gate and the
diagnostics are the same on every rank, whoever drew what. N completions of this rank, prompt by
prompt, G of each; K rewards; W completions of all ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
from mmemo.rewards.hacking import HackWatch
from mmemo.rewards.rewards import (
    FailureWatch,
    RewardConfig,
    RewardScores,
    RewardSet,
    columns_of,
    prompt_of,
)
from mmemo.rewards.trust import ProgressiveTrust, TrustConfig, Trusted, trust_statistics
from mmemo.run_log import RunRecord


class Gathering(Protocol):
    """What is needed of the ranks."""

    @property
    def rank(self) -> int: ...
    def all_gather_text(self, text: str) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class GroupRollouts:
    """The completions of one micro-batch: B samples, N = B * G texts with their tokens.

    ``place`` counts the micro-batches of the step over all ranks. ``ended``: N.
    """

    place: int
    samples: list[Sample]
    texts: list[str]
    ids: list[list[int]]
    ended: list[bool]


@dataclass(frozen=True, slots=True)
class Scored:
    """What one step's completions are worth.

    By place, for this rank's micro-batches: ``advantages`` (N,), ``totals`` (N,) and ``values``
    (N, K), NaN where unscored. ``statistics``: of all ranks, the same on each.
    """

    names: tuple[str, ...]
    advantages: dict[int, Tensor]
    totals: dict[int, Tensor]
    values: dict[int, Tensor]
    statistics: dict[str, float]


@dataclass(slots=True)
class _RankReport:
    """What a rank tells the others."""

    places: list[int] = field(default_factory=list[int])
    values: list[list[list[float]]] = field(default_factory=list[list[list[float]]])
    lengths: list[list[int]] = field(default_factory=list[list[int]])
    labels: list[list[str | None]] = field(default_factory=list[list[str | None]])
    ended: list[list[bool]] = field(default_factory=list[list[bool]])
    failed: list[int] = field(default_factory=list[int])
    failures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


class GroupRewards:
    """The rewards of a run with all that they remember between steps.

    Args:
        outcome: the reward that diagnostics take for the truth; None: the trust's, else one called
            ``outcome``, else the first.

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
        self._hacks = HackWatch(self.names, self.outcome, reference_steps)

    def score(
        self, drawn: Sequence[GroupRollouts], step: int, total: int, ranks: Gathering
    ) -> Scored:
        """Score this rank's completions and compare groups over all ranks.

        Raises:
            TrainingError: a reward failed too often.
        """
        told = self._score(drawn, step, total)
        gathered = ranks.all_gather_text(json.dumps(asdict(told)))
        everyone = [_RankReport(**json.loads(text)) for text in gathered]
        for rank, one in enumerate(everyone):
            for failure in one.failures:
                self.record.event("reward_failed", step=step, rank=rank, **failure)
        order = sorted(
            (place, rank, at)
            for rank, one in enumerate(everyone)
            for at, place in enumerate(one.places)
        )

        def flat(name: str) -> list[Any]:
            return [x for _, rank, at in order for x in getattr(everyone[rank], name)[at]]

        scores = torch.tensor(flat("values"), dtype=torch.float32).view(-1, len(self.names))
        failed = [sum(counts) for counts in zip(*(one.failed for one in everyone), strict=True)]
        self._failures.update(failed, len(scores))
        trusted, combined = self._combine(scores)
        plain = Trusted(combined, scores.new_zeros(0), 1.0)
        advantages, parts = (trusted or plain).advantages(self.group_size, self.scale_rewards)
        lengths, labels, ended = flat("lengths"), flat("labels"), flat("ended")
        statistics = {
            **_reported(everyone),
            **self._statistics(scores, combined, trusted, advantages, parts),
            **self._hacks.step(scores, combined.total, lengths, labels, self.group_size),
            **_lengths(lengths, ended),
        }
        sizes = [len(everyone[rank].values[at]) for _, rank, at in order]

        def mine(values: Tensor) -> dict[int, Tensor]:
            parts = zip(order, values.split(sizes), strict=True)
            return {place: part for (place, rank, _), part in parts if rank == ranks.rank}

        return Scored(self.names, mine(advantages), mine(combined.total), mine(scores), statistics)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; going on from them is exact."""
        return {
            "trust": None if self.trust is None else self.trust.state_dict(),
            "failures": self._failures.state_dict(),
            "hacks": self._hacks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.trust is not None and state["trust"] is not None:
            self.trust.load_state_dict(state["trust"])
        self._failures.load_state_dict(state["failures"])
        self._hacks.load_state_dict(state["hacks"])

    def _score(self, drawn: Sequence[GroupRollouts], step: int, total: int) -> _RankReport:
        if not drawn:
            return _RankReport(failed=[0] * len(self.names))
        idle = [] if self.trust is None else self.trust.idle()
        state = SimpleNamespace(global_step=step, max_steps=total)
        scores = score_completions(self.rewards, drawn, state, idle)
        values: list[list[float]] = scores.values.tolist()
        told = _RankReport(
            failed=scores.failed().tolist(),
            failures=[failure.event() for failure in scores.failures],
            metrics=scores.metrics,
            seconds=scores.seconds,
        )
        for one in drawn:
            told.places.append(one.place)
            told.values.append(values[: len(one.texts)])
            values = values[len(one.texts) :]
            told.lengths.append([len(ids) for ids in one.ids])
            told.ended.append(one.ended)
            told.labels.append(
                [
                    _label(sample, text)
                    for sample, text in zip(
                        _repeat(one.samples, self.group_size), one.texts, strict=True
                    )
                ]
            )
        return told

    def _combine(self, scores: Tensor) -> tuple[Trusted | None, Combined]:
        if self.trust is None:
            return None, combine(scores, self.rewards.weights, self.group_size)
        trusted = self.trust.apply(scores, self.group_size)
        return trusted, trusted.combined

    def _statistics(
        self,
        scores: Tensor,
        combined: Combined,
        trusted: Trusted | None,
        advantages: Tensor,
        parts: Tensor,
    ) -> dict[str, float]:
        """Under TRL's names where it has them. ``within_std`` is the mean standard deviation inside
        groups, ``advantage_share`` the share in the squared advantages."""
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
    """The reward that says which answers are right.

    Raises:
        ConfigError: ``given`` is none of the rewards.
    """
    if given is not None and given not in names:
        raise ConfigError(f"watch.outcome: no reward is called '{given}'; use {', '.join(names)}")
    guess = "outcome" if "outcome" in names else names[0]
    return given or (guess if trust is None else trust.outcome)


def score_completions(
    rewards: RewardSet, drawn: Sequence[GroupRollouts], state: Any, skip: Sequence[str] = ()
) -> RewardScores:
    """Ask the rewards about all completions, prompt by prompt, in the order of ``drawn``."""
    samples = [
        sample
        for one in drawn
        for sample in _repeat(one.samples, len(one.texts) // max(1, len(one.samples)))
    ]
    columns = [columns_of(sample) for sample in samples]
    names = dict.fromkeys(name for column in columns for name in column)
    return rewards.score(
        [prompt_of(sample) for sample in samples],
        [[{"role": "assistant", "content": text}] for one in drawn for text in one.texts],
        [ids for one in drawn for ids in one.ids],
        {name: [column.get(name) for column in columns] for name in names},
        trainer_state=state,
        skip=skip,
    )


def _repeat(samples: Sequence[Sample], group: int) -> list[Sample]:
    return [sample for sample in samples for _ in range(group)]


def _label(sample: Sample, text: str) -> str | None:
    labels, _ = labels_for(sample.truth.label or EMOTIONS[0])
    return read_label(text, labels)


def _spread(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.std()) if len(kept) > 1 else math.nan


def _reported(everyone: Sequence[_RankReport]) -> dict[str, float]:
    """What rewards logged, and the seconds of the slowest rank."""
    found: dict[str, float] = {}
    for name in sorted({name for one in everyone for name in one.metrics}):
        said = [one.metrics[name] for one in everyone if name in one.metrics]
        found[f"rewards/{name}"] = sum(said) / len(said)
    for name in sorted({name for one in everyone for name in one.seconds}):
        found[f"rewards/{name}/seconds"] = max(one.seconds.get(name, 0.0) for one in everyone)
    return found


def _lengths(lengths: Sequence[int], ended: Sequence[bool]) -> dict[str, float]:
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1 - sum(ended) / len(ended),
    }
