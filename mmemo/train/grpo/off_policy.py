"""What GRPO does about an engine whose log-probabilities are not the trainer's: it refuses what is
no log-probability, weighs the policy loss by importance ratios, and measures the mismatch.

The signs that warn of a large mismatch are with the others in :mod:`mmemo.rewards.hacking`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor

from mmemo.errors import RolloutError
from mmemo.generation.rollout import RolloutEngine, Rollouts
from mmemo.losses.off_policy import Mismatch, importance_ratio, mismatch
from mmemo.train.distributed import Ranks
from mmemo.train.grpo.config import OffPolicyConfig

LEAST, MOST = -500.0, 0.01
"""The log-probabilities in nats that a sampled token may have. No token as unlikely as exp(-500) is
ever drawn: servers put such a number in place of none (vLLM -9999). Rounding may give a certain
token a little more than 0."""


def needs_correction(section: OffPolicyConfig, engine: RolloutEngine) -> bool:
    """Whether the policy loss is corrected: as the config says, else unless the engine's
    log-probabilities are those of the trainer."""
    wanted = section.vllm_importance_sampling_correction
    return not getattr(engine, "exact", False) if wanted is None else wanted


class OffPolicyCorrection:
    """Corrects the micro-batches of a generation, and measures what it corrects.

    Args:
        section: mode and limits of the ratios.
        engine: what drew the completions, for messages.
    """

    def __init__(self, section: OffPolicyConfig, engine: RolloutEngine, ranks: Ranks) -> None:
        self._ranks, self._engine = ranks, type(engine).__name__
        self._limits: dict[str, Any] = {
            "mode": section.vllm_importance_sampling_mode,
            "clip_max": section.vllm_importance_sampling_clip_max,
            "clip_min": section.vllm_importance_sampling_clip_min,
        }
        self._measured: list[Mismatch] = []

    def check(self, drawn: Sequence[Rollouts]) -> None:
        """Refuse completions whose log-probabilities cannot be what they were drawn with. Called on
        every rank.

        Raises:
            RolloutError: on every rank, if one rank's are not one finite number for each token.
        """
        mine = next((fault for one in drawn if (fault := _fault(one))), "")
        # A rank that raised alone would leave the others waiting for it.
        fault = next((text for text in self._ranks.all_gather_text(mine) if text), "")
        if fault:
            raise RolloutError(
                f"{self._engine} reported {fault}; these completions are not trained on. See to it "
                "that it returns the log-probability of each sampled token, or set "
                "grpo.vllm_importance_sampling_correction=false, which trains as if the trainer "
                "had sampled"
            )

    def ratio(
        self, logps: Tensor, sampling_logps: Tensor, mask: Tensor, *, measured: bool = True
    ) -> Tensor:
        """(N, C) or (N, 1), what the policy loss of a micro-batch is multiplied by.

        Args:
            logps: (N, C) the trainer's log-probabilities at the weights of the draw.
            sampling_logps: (N, C) the engine's.
            mask: (N, C), non-zero where a token counts.
            measured: False for an idle batch, which the metrics leave out.
        """
        sampling_logps = sampling_logps.to(logps)
        found = importance_ratio(logps, sampling_logps, mask, **self._limits)
        if measured:
            self._measured.append(mismatch(logps, sampling_logps, mask, found))
        return found.values

    def metrics(self) -> dict[str, float]:
        """The mismatch of all micro-batches of all ranks since the last call. Called on every rank;
        empty where there was nothing to train on."""
        mine: Mismatch = reduce(add, self._measured, Mismatch())
        self._measured = []
        everyone = self._ranks.all_gather_text(json.dumps(astuple(mine)))
        return reduce(add, (Mismatch(*json.loads(text)) for text in everyone)).metrics()


def _fault(one: Rollouts) -> str:
    """What is wrong with the log-probabilities of some completions; empty if nothing is."""
    # An engine may be anyone's, and give None or a list.
    if not isinstance(given := cast(Any, one.logps), Tensor):
        return "no log-probabilities"
    if given.shape != one.ids.shape:
        shapes = f"{tuple(given.shape)} for tokens of shape {tuple(one.ids.shape)}"
        return f"log-probabilities of shape {shapes}"
    logps = one.logps[one.mask != 0].float()
    bad = logps[~(torch.isfinite(logps) & (logps > LEAST) & (logps < MOST))]
    if not len(bad):
        return ""
    values = sorted({f"{value:g}" for value in bad[:64].tolist()})
    listed = ", ".join(values[:3])
    return f"{listed} as log-probabilities of {len(bad)} of {len(logps)} sampled tokens"
