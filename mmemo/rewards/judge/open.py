"""Opens the judge that a config describes: an endpoint, or a reward model trained here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.rewards.judge.endpoint import EndpointJudge, JudgeConfig
from mmemo.rewards.judge.rubric import Judge


def open_judge(values: Mapping[str, Any], *, where: str = "judge") -> Judge:
    """Open a judge: an endpoint if ``values`` hold ``base_url``, else the folder of a reward model.

    Args:
        values: the config's fields.
        where: name of the config's section, for errors.

    Raises:
        ConfigError: a field is invalid, fields of both kinds are mixed, or the reward model was not
            shown to read the facts.
        CheckpointError: the reward model's weights are damaged.
    """
    # Imported here, so that importing this module does not load torch.
    from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig, require_calibration

    of_endpoint, of_model = set(JudgeConfig.model_fields), set(LocalJudgeConfig.model_fields)
    if "base_url" in values:
        mixed = sorted(set(values) & (of_model - of_endpoint))
        if mixed:
            raise ConfigError(
                f"{where}: '{mixed[0]}' belongs to a reward model and base_url to an endpoint; "
                "give the fields of one of them"
            )
        return EndpointJudge(parse(JudgeConfig, values, where=where))
    mixed = sorted(set(values) & (of_endpoint - of_model))
    if mixed:
        raise ConfigError(
            f"{where}: '{mixed[0]}' belongs to an endpoint, which needs base_url; without it, "
            "model is the folder of a reward model, which has none of the endpoint's fields"
        )
    config = parse(LocalJudgeConfig, values, where=where)
    judge = LocalJudge(config)  # first, because it says what is wrong with a folder
    require_calibration(config, where)
    return judge
