"""Load-balancing penalties for the experts: on a batch's mean weights, and on the experts' load.

    KL(mean of w || mean of u)        sum over media of CV^2(load)

w are a prompt's weights; u are equal weights over the media that the prompt has. The penalty holds
the mean over the batch, not each prompt's weights, so that a clip whose media disagree may still be
routed to one of them. The load of an expert is how often it is used among the prompts that have its
medium; CV^2 is the squared coefficient of variation over the K experts.

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
    # The text comes first among the weights, and every prompt has it.
    there = functional.pad(present, (1, 0), value=True).to(weights.dtype)
    equal = (there / there.sum(1, keepdim=True)).mean(0)  # (1 + M,)
    some = equal > 0
    # A medium that no prompt has is left out: log(0) has no finite gradient, even times zero.
    mean = weights.mean(1)[:, some].clamp(min=1e-12)  # (Y, up to 1 + M)
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
    load = use.sum(1) / present.sum(0).clamp(min=1)[:, None]  # (Y, M, K), sums of 1
    mean = 1 / use.shape[-1]
    variation = ((load - mean) ** 2).mean(-1) / mean**2
    return (variation * present.any(0)).sum(-1).mean()
