"""Settings of GRPO that would do nothing are refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.errors import ConfigError
from tests.train.grpo.tiny import grpo_config

TWICE = {"num_iterations": 2}


@pytest.mark.parametrize(
    ("grpo", "sentence"),
    [
        ({"loss_type": "cispo", **TWICE}, "needs epsilon_high"),
        ({"loss_type": "cispo", "epsilon_high": 0.28, **TWICE}, "above 1"),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "epsilon": 0.1, **TWICE},
            "epsilon does nothing with loss_type=cispo",
        ),
        ({"loss_type": "sapo", "epsilon_high": 0.3, **TWICE}, "epsilon_high does nothing"),
        ({"loss_type": "sapo", "delta": 4.0, **TWICE}, "delta does nothing with loss_type=sapo"),
        ({"sapo_temperature_neg": 1.2, **TWICE}, "sapo_temperature_neg does nothing"),
        ({"loss_type": "luspo", **TWICE}, "importance_sampling_level=sequence"),
        ({"delta": 1.1, **TWICE}, r"delta must be above 1 \+ epsilon_high, which is 1.2"),
        ({"delta": 2.0}, "grpo.delta acts on probability ratios, which are all 1"),
        ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, "are all 1"),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, "grpo.loss_type=cispo acts on"),
        ({"loss_type": "sapo"}, "grpo.loss_type=sapo acts on"),
        ({"max_resample_times": 2}, "set filter_zero_variance=true too"),
        ({"steps_per_generation": 3}, "must be a multiple of 2"),
        ({"steps_per_generation": 1}, "must be a multiple of 2"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tmp_path: Path, grpo: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        grpo_config(tmp_path, tmp_path / "run", grpo=grpo, train={"gradient_accumulation_steps": 2})
    assert "grpo" in str(refused.value)


@pytest.mark.parametrize(
    ("grpo", "steps"),
    [
        ({}, 1),
        ({"steps_per_generation": 2}, 1),
        ({"steps_per_generation": 8, "loss_type": "sapo", "sapo_temperature_pos": 2.0}, 4),
        ({"steps_per_generation": 4, "loss_type": "cispo", "epsilon_high": 5.0}, 2),
        ({"importance_sampling_level": "sequence", "loss_type": "luspo", **TWICE}, 1),
        ({"epsilon_high": 0.28, "filter_zero_variance": True, "max_resample_times": 3}, 1),
    ],
)
def test_what_acts_is_accepted(tmp_path: Path, grpo: dict[str, Any], steps: int) -> None:
    """``steps_per_generation`` counts micro-batches, as TRL's does."""
    config = grpo_config(
        tmp_path, tmp_path / "run", grpo=grpo, train={"gradient_accumulation_steps": 2}
    )
    assert config.generation_steps == steps
