"""Qwen3-VL behind the backbone protocol, with its own vision encoder.

Features of deeper layers of the encoder enter the first layers of the LM (deepstack). A video is
written as one block of vision tokens for each step of time, each after its time in seconds.

Source: Bai et al., Qwen3-VL Technical Report, arXiv 2511.21631, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from transformers import Qwen3VLForConditionalGeneration

from mmemo.data.sample import Modality
from mmemo.media.clip import DecodedClip
from mmemo.models.backbone import Backbone, Features
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.vl import QwenVLBackbone, QwenVLConfig

HALF = (0.5, 0.5, 0.5)


class Qwen3VLConfig(QwenVLConfig):
    """Inputs of the encoder. Bounds are those of one frame; the released processor bounds all
    frames of a video together. One LM token covers 32 x 32 pixels."""

    min_pixels: int = Field(default=128 * 32 * 32, ge=28 * 28)
    max_pixels: int = Field(default=768 * 32 * 32, ge=28 * 28)
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF


class Qwen3VLBackbone(QwenVLBackbone):
    """Runs a Qwen3-VL; implements :class:`~mmemo.models.backbone.Backbone`.

    Features of a video have ``times`` (t,) float64 too, the seconds that are written before each
    block, and ``x`` (T, (1 + layers) E): see :meth:`layer_inputs`.
    """

    name = "Qwen3-VL"

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        found = super()._encode(modality, clip)
        size, times = self._config.vision_config.temporal_patch_size, np.asarray(clip.times)
        # A step of time is the middle of its frames; the last frame is repeated to fill it.
        full = np.pad(times, (0, -len(times) % size), mode="edge").reshape(-1, size)
        return {**found, "times": torch.from_numpy((full[:, 0] + full[:, -1]) / 2)}

    def spell(self, modality: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        if self._stills:
            return super().spell(modality, features, inside=inside)
        times, size = features["video"]["times"], features["video"]["x"].shape[0]
        (token,) = self.kinds
        block = self._block(self.vision_marks, token, size // len(times))
        return "".join(f"<{time:.1f} seconds>{block}" for time in times.tolist())


class NativeQwen3VL(NativeModel, Qwen3VLForConditionalGeneration):  # pyright: ignore
    """Qwen3-VL."""

    backbone_kind = Qwen3VLBackbone
    settings_kind = Qwen3VLConfig
    encoder_names = ("visual",)


if TYPE_CHECKING:
    _: type[Backbone] = Qwen3VLBackbone
    __: type[Backbone] = NativeQwen3VL
