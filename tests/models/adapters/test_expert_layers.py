"""The PEFT config of experts; what layers compute is tested in ``test_experts.py``."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.models.adapters.experts import ExpertsConfig


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"variant": "mosee"}, "variant is 'mosee'; use one of mose, gate, moka, hydra"),
        ({"routing": "hard"}, "routing is 'hard'; use one of straight_through, soft"),
        ({"gate_input": "mean"}, "gate_input is 'mean'; use one of hidden, embedding"),
        ({"per_modality": 0}, "per_modality is 0; it must be above 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"modalities": ["sound"]}, "use each of video, audio, face, fusion at most once"),
        ({"modalities": ["audio", "audio"]}, "modalities are audio, audio; use each"),
        ({"modalities": ["text", "audio"]}, "modalities are text, audio; use each"),
    ],
)
def test_a_config_made_by_hand_is_checked(given: dict[str, Any], says: str) -> None:
    """PEFT's configs take any value; an unknown variant would be plain LoRA in silence."""
    with pytest.raises(ValueError, match=says):
        ExpertsConfig(**given)
