"""Qwen3-Omni's Thinker behind the backbone protocol, with its own encoders.

Its vision encoder is a deepstack like Qwen3-VL's, its sound has 13 tokens a second, and its LM is a
mixture of experts. Positions count time in fractions.

Source: Xu et al., Qwen3-Omni Technical Report, arXiv 2509.17765, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from mmemo.data.sample import Modality
from mmemo.models.backbone import Backbone, Features
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.omni import QwenOmniBackbone, QwenOmniConfig
from mmemo.models.qwen.qwen3_vl import HALF


class Qwen3OmniConfig(QwenOmniConfig):
    """Inputs of the encoders. One LM token covers 32 x 32 pixels."""

    min_pixels: int = Field(default=128 * 32 * 32, ge=28 * 28)
    max_pixels: int = Field(default=768 * 32 * 32, ge=28 * 28)
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF


class Qwen3OmniBackbone(QwenOmniBackbone):
    """Runs a Thinker; implements :class:`~mmemo.models.backbone.Backbone`."""

    name = "Qwen3-Omni"
    vision_marks = ("<|vision_start|>", "<|vision_end|>")
    sound_marks = ("<|audio_start|>", "<|audio_end|>")

    def _interleaved(self, features: Mapping[Modality, Features]) -> str:
        """Each token of sound after the video's steps that begin no later than it."""
        config, video = self._config, features["video"]
        times, height, width = (int(size) for size in video["grid"])
        per_step = height * width // config.vision_config.spatial_merge_size**2
        # As the model's own positions are computed, in float32.
        begins = (
            torch.arange(times) * video["seconds_per_grid"] * config.position_id_per_seconds
        ).tolist()
        see, hear = (self._token(one) for one in (config.video_token_id, config.audio_token_id))
        text, heard, sounds = "", 0, features["audio"]["x"].shape[0]
        for begin in begins:
            while heard < min(sounds, begin):
                text, heard = text + hear, heard + 1
            text += see * per_step
        return self._both(text + hear * (sounds - heard))


class NativeQwen3Omni(NativeModel, Qwen3OmniMoeThinkerForConditionalGeneration):  # pyright: ignore
    """Qwen3-Omni's Thinker."""

    backbone_kind = Qwen3OmniBackbone
    settings_kind = Qwen3OmniConfig
    encoder_names = ("visual", "audio_tower")


if TYPE_CHECKING:
    _: type[Backbone] = Qwen3OmniBackbone
    __: type[Backbone] = NativeQwen3Omni
