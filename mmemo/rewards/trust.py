"""Progressive trust: how far, and from when, a reasoning reward counts.

EmotionThinker's GRPO-PTR (arXiv 2601.15668), for each completion of a group of G for one prompt:

    R = α_f·R_format + α_o·R_outcome + α_t·τ·R_reasoning
    τ = 1 if the mean R_reasoning of the group's correct answers is at least that of its incorrect
        ones, else exp(mean of correct - mean of incorrect)

so that a scorer is trusted where it prefers the reasoning of correct answers. R_reasoning joins
only once the accuracy has settled. The α are the weights of the rewards: 0.3, 1.0, 0.5 in the
paper. What the paper leaves open is reconstructed, each as a config field with that default: τ of
a group without a correct or an incorrect answer, and what "settled" means.

Two settings are ours, because the paper's τ did not keep a wrong scorer out
(train_configs/studies/progressive_trust):

- ``acts_on: advantage`` applies τ after the scaling: A = (1 - τ)·A without the trusted rewards
  + τ·A with them. When τ multiplies the reward, the scaling divides it out again wherever the
  outcomes of a group are equal, however small τ is.
- ``evidence: run`` tests over the whole run whether correct answers are reasoned better, and trusts
  the scorer as far as that is certain. The paper tests each group alone, and trusts the scorer
  where nothing speaks against it.

N completions stand prompt by prompt, G of each prompt; K rewards; P = N / G groups. Groups must be
whole, so scores are gathered over the ranks first, and every rank computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmemo.config import Config, nearest
from mmemo.errors import ConfigError
from mmemo.rewards.advantages import (
    Combined,
    ScaleRewards,
    advantage_parts,
    combine,
    compared,
    group_advantages,
)


class GateConfig(Config):
    """When the trusted rewards join: our reconstruction of "accuracy stabilises around 50 %"."""

    ema_beta: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the exponential moving average of the outcome reward's batch mean."""
    threshold: float = 0.5
    """Value that the average must reach."""
    patience: int = Field(default=50, ge=1)
    """Consecutive steps that the average must stay there before the gate opens, for good."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps over which the trusted rewards' weight then rises linearly from 0 to its full value."""


class TrustConfig(Config):
    """How far the reasoning reward is trusted."""

    outcome: str = "outcome"
    """Name of the reward that decides which answers are correct."""
    trusted: list[str] = ["reasoning"]
    """Names of the rewards to which τ and the gate apply."""
    correct_from: float = 1.0
    """Lowest outcome score of a correct answer."""
    use_tau: bool = True
    """Weight the trusted rewards by τ. False sets τ to 1 everywhere."""
    sharpness: float = Field(default=1.0, gt=0)
    """Factor of the difference in the exponent. The paper's is 1; with rewards in [0, 1], τ then
    never falls below 0.37."""
    all_correct: Annotated[float, Field(ge=0, le=1)] | Literal["running"] = 1.0
    """τ of a group whose answers are all correct; our reconstruction. ``running`` uses the τ of the
    moving average of the difference over the groups that could be judged, so that a scorer which
    those groups distrust is not trusted where no answer speaks against it."""
    all_wrong: float = Field(default=0.0, ge=0, le=1)
    """τ of a group whose answers are all wrong, in which reasoning would be the only signal and
    therefore the easiest to hack; our reconstruction."""
    acts_on: Literal["reward", "advantage"] = "reward"
    """What τ multiplies. ``reward`` is the paper's. ``advantage`` is ours and cannot be undone by
    ``grpo.scale_rewards``: with τ = 0, training is exactly GRPO without the trusted rewards."""
    evidence: Literal["group", "run"] = "group"
    """What τ is estimated from. ``group`` is the paper's. ``run`` is ours: τ is the same in all
    groups with a correct answer, and rises with the certainty, over the run so far, that correct
    answers score higher than incorrect ones. A scorer that pays for something else earns no
    trust."""
    earned_from: float = 1.0
    """With ``evidence: run``, the t statistic of the mean difference up to which τ is 0."""
    earned_at: float = 3.0
    """The t statistic from which τ is 1. In between, τ is linear."""
    gate: GateConfig | None = GateConfig()
    """When the trusted rewards join. None counts them from the first step."""

    @model_validator(mode="after")
    def _rises(self) -> TrustConfig:
        if self.earned_at <= self.earned_from:
            raise ValueError("earned_at must be above earned_from")
        return self


EVIDENCE_BETA = 0.95
"""Share of the evidence of earlier steps that each step keeps, for ``evidence: run``."""


@dataclass(slots=True)
class Evidence:
    """How surely a scorer prefers the reasoning of correct answers, over the run so far.

    One group's difference between correct and incorrect answers is noise; the mean over many
    groups, in units of its standard error, says how sure it is. Recent groups weigh most. Not from
    a paper. The fields are sums of weights, of squared weights, of weighted differences, and of
    weighted squared differences.
    """

    weight: float = 0.0
    weight2: float = 0.0
    total: float = 0.0
    total2: float = 0.0

    def add(self, differences: Tensor) -> None:
        """Add the (P,) differences of one step's groups; NaN for groups that cannot be judged."""
        # The sums go on through the whole run, so they are taken in float64.
        known = differences[~differences.isnan()].double()
        self.weight = EVIDENCE_BETA * self.weight + len(known)
        self.weight2 = EVIDENCE_BETA**2 * self.weight2 + len(known)
        self.total = EVIDENCE_BETA * self.total + float(known.sum())
        self.total2 = EVIDENCE_BETA * self.total2 + float((known**2).sum())

    @property
    def t(self) -> float:
        """Mean difference divided by its standard error; 0 with an effective number of groups below
        two."""
        # Kish's effective sample size: recent groups weigh more, so fewer than all of them count.
        number = self.weight**2 / self.weight2 if self.weight2 > 0 else 0.0
        if number < 2:
            return 0.0
        mean = self.total / self.weight
        # Rounding may take the variance of equal differences slightly below 0.
        spread = max(0.0, self.total2 / self.weight - mean**2) / (number - 1)
        # The floor keeps differences without any spread from dividing by 0.
        return mean / max(math.sqrt(spread), 1e-6)


@dataclass(slots=True)
class GateState:
    """State of the gate between steps. ``average`` is not corrected for its start at 0."""

    average: float = 0.0
    updates: int = 0
    streak: int = 0
    open_steps: int = 0


RUNNING_BETA = 0.9
"""Decay of the moving average of ``all_correct: running``."""


class Gate:
    """Opens when the moving average of the outcome has stayed at the threshold long enough."""

    def __init__(self, config: GateConfig) -> None:
        self.config = config
        self.state = GateState()

    @property
    def accuracy(self) -> float:
        """The moving average, corrected for its start at 0; NaN before the first update."""
        if self.state.updates == 0:
            return math.nan
        return self.state.average / (1 - self.config.ema_beta**self.state.updates)

    @property
    def strength(self) -> float:
        """Factor of the trusted rewards in the next step: 0 while closed, then rising to 1."""
        if self.state.open_steps == 0:
            return 0.0
        return min(1.0, self.state.open_steps / max(1, self.config.ramp_steps))

    def update(self, outcome_mean: float) -> None:
        """Add the outcome's batch mean over all ranks. NaN, where no completion was scored, only
        advances the ramp."""
        state, config = self.state, self.config
        if state.open_steps:
            state.open_steps += 1
        if math.isnan(outcome_mean):
            return
        state.average = config.ema_beta * state.average + (1 - config.ema_beta) * outcome_mean
        state.updates += 1
        state.streak = state.streak + 1 if self.accuracy >= config.threshold else 0
        if state.streak >= config.patience and not state.open_steps:
            state.open_steps = 1


@dataclass(frozen=True, slots=True)
class Trusted:
    """The combined rewards of one step.

    ``combined``: totals (N,) and parts (N, K), including τ. ``tau``: (P,), NaN where no completion
    has both an outcome and a trusted reward, or the gate was closed. ``strength``: the gate's
    factor in this step. ``mixed``: with ``acts_on: advantage``, the totals without and with the
    full trusted rewards, and the share (N,) of the latter.
    """

    combined: Combined
    tau: Tensor
    strength: float
    mixed: tuple[Combined, Combined, Tensor] | None = None

    def advantages(self, group_size: int, scale_rewards: ScaleRewards) -> tuple[Tensor, Tensor]:
        """(N,) advantages, and (N, K) the part of each reward in them."""
        if self.mixed is None:
            return (
                group_advantages(self.combined.total, group_size, scale_rewards),
                advantage_parts(self.combined, group_size, scale_rewards),
            )
        without, whole, share = self.mixed
        found = [
            (
                group_advantages(one.total, group_size, scale_rewards),
                advantage_parts(one, group_size, scale_rewards),
            )
            for one in (without, whole)
        ]
        (left, left_parts), (right, right_parts) = found
        # In this form, a share of 0 gives exactly the advantages without the trusted rewards.
        parts = left_parts + share[:, None] * (right_parts - left_parts)
        return left + share * (right - left), parts


class ProgressiveTrust:
    """Combines the scores of K rewards into one total per completion.

    Args:
        names: names of the rewards, in the order of the scores.
        weights: (K,) their weights α.

    Raises:
        ConfigError: the config names a reward that does not exist.
    """

    def __init__(self, config: TrustConfig, names: Sequence[str], weights: Tensor) -> None:
        self.config = config
        self.names = tuple(names)
        self.weights = weights
        self.gate = Gate(config.gate) if config.gate is not None else None
        self.difference = math.nan
        """Moving average of the difference between correct and incorrect answers; NaN before any
        group could be judged."""
        self.evidence = Evidence()
        for name in (config.outcome, *config.trusted):
            if name not in self.names:
                guess = nearest(name, self.names)
                hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(self.names)}"
                raise ConfigError(f"trust: no reward is called '{name}'; {hint}")
        if config.outcome in config.trusted:
            raise ConfigError(f"trust: '{config.outcome}' cannot be both outcome and trusted")
        self._outcome = self.names.index(config.outcome)
        self._trusted = torch.tensor([name in config.trusted for name in self.names])

    @property
    def strength(self) -> float:
        """The gate's factor of the trusted rewards in the next step."""
        return 1.0 if self.gate is None else self.gate.strength

    def idle(self) -> list[str]:
        """Names of rewards that cannot count in the next step; skip them to spare the judge."""
        return list(self.config.trusted) if self.strength == 0 else []

    def apply(self, scores: Tensor, group_size: int) -> Trusted:
        """Combine the scores of one step under the current gate, then update the gate.

        Args:
            scores: (N, K) scores of all ranks; NaN where a reward returned None.
            group_size: G.
        """
        strength = self.strength
        trusted = self._trusted.to(scores.device)
        weights = self.weights.to(scores.device)
        # Trusted rewards are not called while the gate is closed.
        if strength == 0:
            weights = torch.where(trusted, 0.0, weights)
        kept = compared(scores, weights)
        tau = self._tau(scores, kept, group_size)
        if strength == 0:
            tau = torch.full_like(tau, torch.nan)
        # Without a known outcome, no answer is known to be correct.
        unknown = self.config.all_wrong if self.config.use_tau else 1.0
        factor = tau.nan_to_num(nan=unknown).repeat_interleave(group_size)[:, None] * strength
        factors = torch.where(trusted, factor, 1.0)
        combined = combine(scores, weights, group_size, factors)
        mixed = None
        if self.config.acts_on == "advantage":
            whole = combine(scores, weights, group_size)
            # Both totals must be of the same completions: those that trusted rewards scored too.
            parts = torch.where(trusted, 0.0, whole.parts)
            total = torch.where(whole.total.isnan(), torch.nan, parts.sum(dim=1))
            mixed = (Combined(total, parts), whole, factor.squeeze(1))
        # The gate was read above and changes only now, so a step's outcomes never decide its own
        # rewards.
        if self.gate is not None:
            self.gate.update(float(scores[:, self._outcome].nanmean()))
        return Trusted(combined, tau, strength, mixed)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which a run resumes exactly."""
        return {
            "gate": None if self.gate is None else asdict(self.gate.state),
            "difference": None if math.isnan(self.difference) else self.difference,
            "evidence": asdict(self.evidence),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        if self.gate is not None and state["gate"] is not None:
            self.gate.state = GateState(**state["gate"])
        difference = state["difference"]
        self.difference = math.nan if difference is None else float(difference)
        self.evidence = Evidence(**state["evidence"])

    def _tau(self, scores: Tensor, kept: Tensor, group_size: int) -> Tensor:
        """(P,) τ from the completions that are compared. Several trusted rewards count by their
        weighted mean."""
        weights = self.weights.to(scores.device)[self._trusted.to(scores.device)]
        trusted = scores[:, self._trusted.to(scores.device)]
        share = torch.where(trusted.isnan(), 0.0, weights.abs())
        # 0 / 0 is NaN, which marks a completion that no trusted reward scored.
        reasoning = (trusted.nan_to_num(nan=0.0) * share).sum(dim=1) / share.sum(dim=1)
        outcome = scores[:, self._outcome]
        usable = kept & ~reasoning.isnan() & ~outcome.isnan()
        reasoning = torch.where(usable, reasoning, torch.nan)
        correct = outcome >= self.config.correct_from
        differences = trust_differences(reasoning, correct, group_size)
        # Collected whichever evidence counts, because the log shows it in both cases.
        self.evidence.add(differences)
        mean = float(differences.nanmean())
        if not math.isnan(mean):
            # The first mean starts the average, which so needs no correction for a start at 0.
            past = mean if math.isnan(self.difference) else self.difference
            self.difference = RUNNING_BETA * past + (1 - RUNNING_BETA) * mean
        tau = trust_factors(reasoning, correct, group_size, self.config, self.difference)
        if self.config.evidence == "group" or not self.config.use_tau:
            return tau
        any_correct = (usable & correct).view(-1, group_size).any(dim=1)
        earned = torch.where(any_correct, self.earned, self.config.all_wrong)
        # The group's tau still says which groups have any reasoning score at all.
        return torch.where(tau.isnan(), torch.nan, earned)

    @property
    def earned(self) -> float:
        """τ of ``evidence: run``, from 0 to 1."""
        low, high = self.config.earned_from, self.config.earned_at
        return min(1.0, max(0.0, (self.evidence.t - low) / (high - low)))


def trust_differences(reasoning: Tensor, correct: Tensor, group_size: int) -> Tensor:
    """(P,) mean reasoning score of a group's correct answers minus that of its incorrect ones; NaN
    for a group without both. The arguments are those of :func:`trust_factors`."""
    groups = reasoning.view(-1, group_size)
    is_correct = correct.view(-1, group_size)
    of_correct = torch.where(is_correct, groups, torch.nan).nanmean(dim=1)
    return of_correct - torch.where(is_correct, torch.nan, groups).nanmean(dim=1)


def trust_factors(
    reasoning: Tensor,
    correct: Tensor,
    group_size: int,
    config: TrustConfig,
    running: float = math.nan,
) -> Tensor:
    """(P,) τ of each group; NaN for a group without any reasoning score.

    Args:
        reasoning: (N,) R_reasoning; NaN where unscored or not compared.
        correct: (N,) bool.
        group_size: G.
        config: the trust settings.
        running: moving average of the difference, for ``all_correct: running``; NaN counts as 0.
    """
    scored = ~reasoning.view(-1, group_size).isnan()
    any_correct = (scored & correct.view(-1, group_size)).any(dim=1)
    difference = trust_differences(reasoning, correct, group_size)
    # Clamping the exponent at 0 is the paper's case of tau = 1, and cannot overflow.
    tau = (difference * config.sharpness).clamp(max=0.0).exp()
    if not config.use_tau:
        tau = torch.ones_like(tau)
    else:
        all_correct = config.all_correct
        if all_correct == "running":
            known = 0.0 if math.isnan(running) else running
            all_correct = math.exp(min(0.0, known * config.sharpness))
        one_sided = difference.isnan()
        tau = torch.where(one_sided & any_correct, all_correct, tau)
        tau = torch.where(one_sided & ~any_correct, config.all_wrong, tau)
    return torch.where(scored.any(dim=1), tau, torch.nan)


def trust_statistics(trusted: Trusted, trust: ProgressiveTrust) -> dict[str, float]:
    """Metrics of trust and gate in one step; undefined ones are left out.

    ``trust/share_distrusted`` is the share of groups with τ < 1, ``trust/running_difference`` the
    moving average of correct minus incorrect, and ``trust/evidence`` the t statistic of the run's
    differences.
    """
    tau = trusted.tau[~trusted.tau.isnan()]
    found = {
        "trust/mean_tau": float(tau.mean()) if len(tau) else math.nan,
        "trust/share_distrusted": float((tau < 1).float().mean()) if len(tau) else math.nan,
        "trust/running_difference": trust.difference,
        "trust/evidence": trust.evidence.t if trust.evidence.weight > 0 else math.nan,
        "trust/gate_strength": trusted.strength,
    }
    if trust.gate is not None:
        found["trust/gate_accuracy"] = trust.gate.accuracy
        found["trust/gate_streak"] = float(trust.gate.state.streak)
    return {name: value for name, value in found.items() if not math.isnan(value)}
