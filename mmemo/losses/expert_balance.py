"""Load-balancing penalties for the experts: on a batch's mean weights, and on the experts' load.

    KL(mean of w || mean of u)        sum over media of CV^2(load)

w are a prompt's weights; u are equal weights over the media that the prompt has. The penalty holds
the mean over many prompts, not each prompt's weights, so that a clip whose media disagree may still
be routed to one of them. The load of an expert is how often it is used among the prompts that have
its medium; CV^2 is the squared coefficient of variation over the K experts. Which prompts the means
are over is decided in :mod:`mmemo.train.expert_balance`.

Source: a reconstruction of MoSEAR, ACM MM 2025, arXiv 2508.01181; the load's form is Shazeer et
al., ICLR 2017, arXiv 1701.06538.

Shapes: Y layers, N prompts, M media, K experts of each.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def weight_divergence(weights: Tensor, present: Tensor) -> Tensor:
    """KL of the mean weights from the mean equal weights, averaged over layers, in nats.

    Args:
        weights: (Y, N, 1 + M) weights of the text and of each medium.
        present: (N, M) bool, which media a prompt has.

    Returns:
        () penalty.
    """
    equal = equal_weights(present).to(weights.dtype).mean(0)
    return mean_weight_divergence(weights.mean(1), equal)


def equal_weights(present: Tensor) -> Tensor:
    """(N, 1 + M) equal weights of the text and the media that a prompt has: ``present`` (N, M)."""
    # The text comes first among the weights, and every prompt has it.
    there = functional.pad(present, (1, 0), value=True).float()
    return there / there.sum(1, keepdim=True)


def mean_weight_divergence(mean: Tensor, equal: Tensor) -> Tensor:
    """:func:`weight_divergence` from means over prompts: ``mean`` (Y, 1 + M), ``equal`` (1 + M)."""
    some = equal > 0
    # A medium that no prompt has is left out: log(0) has no finite gradient, even times zero.
    mean = mean[:, some].clamp(min=1e-12)  # (Y, up to 1 + M)
    return (mean * (mean / equal[some]).log()).sum(-1).mean()


def load_variation(use: Tensor, present: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' load, summed over the media that some prompt
    has, averaged over layers.

    Args:
        use: (Y, N, M, K) how much each prompt uses each expert; sums to 1 over K.
        present: (N, M) bool, which media a prompt has.

    Returns:
        () penalty: 0 if all experts of a medium are used equally, M (K - 1) if one of each is.
    """
    return mean_load_variation(use.mean(1), present.to(use.dtype).mean(0))


def mean_load_variation(use: Tensor, present: Tensor) -> Tensor:
    """:func:`load_variation` from means over prompts: ``use`` (Y, M, K), ``present`` (M,) shares of
    the prompts that have a medium."""
    some = present > 0
    load = use / present.masked_fill(~some, 1)[:, None]  # (Y, M, K), sums of 1
    mean = 1 / use.shape[-1]
    variation = ((load - mean) ** 2).mean(-1) / mean**2
    return (variation * some).sum(-1).mean()
