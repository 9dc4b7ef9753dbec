"""Which judge a config means: one behind an endpoint, or a reward model of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.rewards.judge.endpoint import EndpointJudge, JudgeConfig
from mmemo.rewards.judge.rubric import Judge


def open_judge(values: Mapping[str, Any], *, where: str = "judge") -> Judge:
    """The judge that ``values`` describe: with ``base_url`` an endpoint, else a trained folder.

    Raises:
        ConfigError: a field is wrong, or fields of both kinds stand together.
        CheckpointError: the reward model's weights are damaged.
    """
    from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig

    at_endpoint, here = set(JudgeConfig.model_fields), set(LocalJudgeConfig.model_fields)
    if "base_url" in values:
        mixed = sorted(set(values) & (here - at_endpoint))
        if mixed:
            raise ConfigError(
                f"{where}: '{mixed[0]}' is for a reward model of your own and base_url for an "
                "endpoint; give the fields of one of them"
            )
        return EndpointJudge(parse(JudgeConfig, values, where=where))
    mixed = sorted(set(values) & (at_endpoint - here))
    if mixed:
        raise ConfigError(
            f"{where}: '{mixed[0]}' is for an endpoint, which needs base_url; without it, model "
            "is the folder of a reward model, and takes none of the endpoint's fields"
        )
    return LocalJudge(parse(LocalJudgeConfig, values, where=where))
