"""Which log-probabilities a vLLM server gives, and whether training can use them.

``--logprobs-mode`` of vLLM gives either ``raw_logprobs`` (its default), at temperature 1 and before
any filter, or ``processed_logprobs``, at the temperature and after the filters. Training needs them
at the temperature and before the filters, as the loss has them. So either mode fits at temperature
1 without filters, the processed one alone fits another temperature without filters, and the raw one
alone fits filters at temperature 1. Nothing fits both at once. The processed ones are also after
the placeholders of media, which are never sampled, have lost their probability.

Source: ``LogprobsMode`` and ``v1/sample/sampler.py`` of vLLM 0.32.
"""

from __future__ import annotations

import math
from typing import Any

from mmemo.errors import ConfigError
from mmemo.generation.rollout import RolloutConfig
from mmemo.generation.vllm.client import Unavailable, VllmClient

_TOP = 5
_PROMPT = (1, 2, 3)
"""Any tokens; what follows does not matter."""


def mode_for(config: RolloutConfig) -> str:
    """The ``--logprobs-mode`` that gives what training needs."""
    return "raw_logprobs" if config.temperature == 1 else "processed_logprobs"


def check_mode(client: VllmClient, model: str, config: RolloutConfig) -> None:
    """Check that the server's log-probabilities are those that training needs.

    Args:
        model: name of a model that it serves.

    Raises:
        ConfigError: they are not.
        Unavailable, Refused: the server does not say.
    """
    if config.temperature != 1 and config.filtered:
        raise ConfigError(
            "vLLM gives no log-probabilities at a temperature and before filters; with "
            "rollout.engine: vllm set rollout.temperature: 1, or leave top_k, top_p and min_p out"
        )
    cool, warm = (first_tokens(client, model, temperature) for temperature in (1.0, 2.0))
    if any(math.fsum(map(math.exp, one.values())) > 1.001 for one in (cool, warm)):
        raise ConfigError(
            f"{client.url} gives logits for log-probabilities; start vLLM with --logprobs-mode "
            "processed_logprobs"
        )
    both = sorted(cool.keys() & warm.keys(), key=cool.__getitem__)
    if len(both) < 2:
        raise Unavailable("its first answers have other tokens each time")
    # Twice the temperature halves the differences between log-probabilities that it acts on.
    low, high = both[0], both[-1]
    processed = warm[high] - warm[low] < 0.75 * (cool[high] - cool[low])
    wanted = "processed" if config.temperature != 1 else "raw" if config.filtered else None
    if wanted is not None and (wanted == "processed") != processed:
        why = "temperature" if wanted == "processed" else "filters at temperature 1"
        raise ConfigError(
            f"{client.url} gives log-probabilities that do not fit rollout's {why}; start vLLM "
            f"with --logprobs-mode {wanted}_logprobs"
        )


def first_tokens(client: VllmClient, model: str, temperature: float) -> dict[int, float]:
    """The log-probabilities of the most likely tokens after a prompt, by token.

    Raises:
        Unavailable, Refused: the server gives none.
    """
    body: dict[str, Any] = {
        "model": model,
        "token_ids": list(_PROMPT),
        "sampling_params": {
            "temperature": temperature,
            "max_tokens": 1,
            "logprobs": _TOP,
            "seed": 0,
            "ignore_eos": True,
            "detokenize": False,
        },
    }
    reply = client.generate(body)
    try:
        (choice,) = reply["choices"]
        (first,) = choice["logprobs"]["content"]
        return {int(one["token_id"]): float(one["logprob"]) for one in first["top_logprobs"]}
    except (KeyError, TypeError, ValueError) as error:
        raise Unavailable("its first answer has no log-probabilities") from error
