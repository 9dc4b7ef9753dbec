"""Penalties that keep experts in use: on a batch's mean weights, and on how often experts are used.

    KL(mean of w || mean of u)        sum over media of CV^2(load)

w are a prompt's weights, u the equal weights of what that prompt has (of all media alike where
every prompt has all). It is the mean that is held, so that a clip whose media disagree may be
decisive. A load is how often an expert of its medium is used among the prompts that have it; CV^2
is its squared coefficient of variation over the K experts.

Source: a reconstruction of MoSEAR, ACM MM 2025, arXiv 2508.01181; the load's form is Shazeer et
al., ICLR 2017, arXiv 1701.06538.

Shapes: Y layers, N prompts, M media, K experts of each.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def weight_divergence(weights: Tensor, present: Tensor) -> Tensor:
    """In nats, the mean over layers: (Y, N, 1 + M) and (N, M) bool -> ()."""
    there = functional.pad(present, (1, 0), value=True).to(weights.dtype)
    equal = (there / there.sum(1, keepdim=True)).mean(0)  # (1 + M,)
    some = equal > 0
    # The logarithm of what no prompt has would have no gradient, even times zero.
    mean = weights.mean(1)[:, some].clamp(min=1e-12)  # (Y, up to 1 + M)
    return (mean * (mean / equal[some]).log()).sum(-1).mean()


def load_variation(use: Tensor, present: Tensor) -> Tensor:
    """The mean over layers of the sum over media that some prompt has: (Y, N, M, K) and (N, M)
    bool -> (). 0 when all experts are used alike, M (K - 1) when one of each is."""
    load = use.sum(1) / present.sum(0).clamp(min=1)[:, None]  # (Y, M, K), sums of 1
    mean = 1 / use.shape[-1]
    variation = ((load - mean) ** 2).mean(-1) / mean**2
    return (variation * present.any(0)).sum(-1).mean()
