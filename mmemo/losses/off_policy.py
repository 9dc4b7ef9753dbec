"""Importance sampling between the sampler that drew completions and the trainer that learns from
them: other kernels or older weights give the same tokens other probabilities.

Shapes: N completions, C tokens of the longest.

    d = log pi(token) - log mu(token)    pi: the trainer at the weights of the draw; mu: the sampler
    w = exp(d)                           token modes: a ratio for each token
    w = exp(sum over the tokens of d)    sequence modes: one for all tokens of a completion
    *_truncate: w is limited to [clip_min, clip_max]; *_mask: w is 0 outside of it

The policy loss of each token is multiplied by w. In expectation over mu, ``sequence`` ratios
without a limit give the gradient under the trainer's own policy. ``token`` ratios leave out that
what came before a token has another probability as well: a bias of first order in d, with less
variance. A limit C from above adds a bias, too: for each completion above it (pi - C mu) times its
gradient where ratios are truncated, and pi times its gradient where they are masked.

Both log-probabilities are of the whole distribution at the run's temperature, before ``top_k``,
``top_p`` and ``min_p``. With these filters the tokens come from less than mu: w then corrects
kernels and weights, and not what the filters leave out.

Sources: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025,
fengyao.notion.site/off-policy-rl (truncated); Liu et al., "When Speed Kills Stability", 2025,
yingru.notion.site, and IcePop in Ring-1T, arXiv 2510.18855 (masked, of sequences and of tokens);
Zheng et al., arXiv 2512.01374 (token ratios as an approximation); TRL 1.16, ``GRPOTrainer`` (names,
modes, defaults). The KL estimate is k3 of Schulman, "Approximating KL Divergence", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ImportanceSamplingMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]


@dataclass(frozen=True, slots=True)
class ImportanceRatio:
    """``values``: (N, C) float32, or (N, 1) in the sequence modes, without gradient; 1 in the
    padding. ``outside``: of the same shape, True where the ratio was truncated or masked."""

    values: Tensor
    outside: Tensor


def importance_ratio(
    logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    *,
    mode: ImportanceSamplingMode = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> ImportanceRatio:
    """What the policy loss of completions is multiplied by.

    Args:
        logps: (N, C) the trainer's log-probabilities at the weights that drew the completions.
        sampling_logps: (N, C) those that the sampler reported.
        mask: (N, C), non-zero where a token counts.
        clip_max: largest ratio; None sets no limit.
        clip_min: smallest ratio; None sets no limit.
    """
    # Padding may hold anything, and infinity times zero is NaN: masked, not multiplied by 0.
    difference = (logps - sampling_logps).detach().masked_fill(mask == 0, 0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(1, keepdim=True)
    ratio = torch.exp(difference)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_max is not None:
        outside |= ratio > clip_max
    if clip_min is not None:
        outside |= ratio < clip_min
    if mode.endswith("mask"):
        return ImportanceRatio(ratio.masked_fill(outside, 0.0), outside)
    if clip_min is None and clip_max is None:
        return ImportanceRatio(ratio, outside)
    return ImportanceRatio(ratio.clamp(clip_min, clip_max), outside)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Sums of how far sampler and trainer are apart, which add up over micro-batches and ranks.

    ``tokens``, ``difference``, ``largest``, ``kl``: number of tokens, sum and maximum of
    ``|d|``, and sum of the KL estimate, in nats. ``ratios``, ``ratio``, ``least``, ``most``,
    ``outside``: number of ratios, their sum, minimum and maximum after the limit, and how many the
    limit changed.
    """

    tokens: float = 0.0
    difference: float = 0.0
    largest: float = 0.0
    kl: float = 0.0
    ratios: float = 0.0
    ratio: float = 0.0
    least: float = float("inf")
    most: float = 0.0
    outside: float = 0.0

    def __add__(self, other: Mismatch) -> Mismatch:
        return Mismatch(
            self.tokens + other.tokens,
            self.difference + other.difference,
            max(self.largest, other.largest),
            self.kl + other.kl,
            self.ratios + other.ratios,
            self.ratio + other.ratio,
            min(self.least, other.least),
            max(self.most, other.most),
            self.outside + other.outside,
        )

    def metrics(self) -> dict[str, float]:
        """Under TRL's names where it has them. Empty where there is no token."""
        if not self.tokens:
            return {}
        return {
            "sampling/sampling_logp_difference/mean": self.difference / self.tokens,
            "sampling/sampling_logp_difference/max": self.largest,
            "sampling/importance_sampling_ratio/min": self.least,
            "sampling/importance_sampling_ratio/mean": self.ratio / self.ratios,
            "sampling/importance_sampling_ratio/max": self.most,
            "sampling/importance_sampling_ratio/clipped": self.outside / self.ratios,
            "sampling/kl": self.kl / self.tokens,
        }


def mismatch(
    logps: Tensor, sampling_logps: Tensor, mask: Tensor, ratio: ImportanceRatio
) -> Mismatch:
    """How far sampler and trainer are apart on the tokens of ``mask``.

    The KL divergence of the trainer from the sampler, KL(mu || pi), is estimated per token by k3,
    ``exp(d) - 1 - d``. It is never below 0, and unbiased for tokens that were drawn from mu.
    """
    here = mask != 0
    if not bool(here.any()):
        return Mismatch()
    # In float32, exp(d) - 1 - d of a small d would be rounding.
    d = (logps - sampling_logps)[here].detach().double()
    # One for each completion that has a token, or for each token; of one token they are the same.
    counted = here.any(1, keepdim=True) if ratio.values.shape[1] == 1 else here
    values, outside = ratio.values[counted].double(), ratio.outside[counted].double()
    sums = torch.stack(
        [
            d.abs().sum(),
            d.abs().max(),
            (torch.expm1(d) - d).sum(),
            values.sum(),
            values.min(),
            values.max(),
            outside.sum(),
        ]
    ).tolist()
    difference, largest, kl, *rest = sums
    return Mismatch(len(d), difference, largest, kl, len(values), *rest)
