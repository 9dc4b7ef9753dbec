"""Qwen2.5-VL behind the backbone protocol, with its own vision encoder.

The frames of a clip are one video, or each is an image of its own.

Shapes: B rows, L tokens of a row, T feature steps = LM tokens of a clip, E the LM's width,
(t, h, w) the grid of vision patches.

Source: Bai et al., Qwen2.5-VL Technical Report, arXiv 2502.13923, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from mmemo.data.sample import Modality
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import VIDEO, Backbone, Features
from mmemo.models.qwen.base import QwenBackbone, QwenVisionConfig
from mmemo.models.qwen.native import NativeModel


class QwenVLConfig(QwenVisionConfig):
    """Inputs of the encoder. The defaults are those of the released processor for video."""

    stills: bool = False
    """Pass each frame as an image between vision tokens of its own, without a place in time. The
    released processor bounds images by 3136 and 1003520 pixels. Otherwise frames are one video."""


class QwenVLBackbone(QwenBackbone):
    """Runs a Qwen2.5-VL; implements :class:`~mmemo.models.backbone.Backbone`.

    With ``stills`` the first of a ``grid`` is the number of images.
    """

    modalities: tuple[Modality, ...] = ("video",)
    name = "Qwen2.5-VL"
    vision_marks = ("<|vision_start|>", "<|vision_end|>")

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        settings: QwenVLConfig | None = None,
    ) -> None:
        own = settings or QwenVLConfig()
        super().__init__(model, tokenizer, sampling, own, {"video": "visual"})
        self._stills = own.stills

    def _in_time(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        # An image is a video that repeats one frame.
        times = self._config.vision_config.temporal_patch_size if self._stills else 1
        return np.repeat(pixels, times, axis=0)

    def row_positions(self, input_ids: Tensor, features: Mapping[Modality, Features]) -> Tensor:
        """(3, L): the model's M-RoPE. Nothing is cached."""
        config, given = self._config, dict[str, Any]()
        images, film = input_ids == config.image_token_id, input_ids == config.video_token_id
        if bool((images | film).any()):
            video = self._placed("video", features)
            count, height, width = video["grid"].tolist()
            given["video_grid_thw"] = video["grid"][None]
            given["second_per_grid_ts"] = video["seconds_per_grid"][None]
            # Each still is an image of its own, with one step of time.
            given["image_grid_thw"] = torch.tensor([[1, height, width]] * count)
        # transformers numbers the kinds of token 0 text, 1 image, 2 video.
        kinds = images.int() + 2 * film.int()
        positions, _ = self._inner.get_rope_index(
            input_ids[None], mm_token_type_ids=kinds[None], **given
        )
        return positions[:, 0]

    def expand(
        self, text: str, features: Mapping[Modality, Features]
    ) -> tuple[list[int], list[int]]:
        """Token ids and modality ids of a text, with ``<video>`` written out to as many tokens as
        the clip's features have steps.

        Raises:
            DataError: a placeholder without features.
        """
        return self._expand(text, features, inside=False)

    @property
    def kinds(self) -> Mapping[int, int]:
        config = self._config
        return {config.image_token_id if self._stills else config.video_token_id: VIDEO}

    def spell(self, modality: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        count = int(features["video"]["grid"][0]) if self._stills else 1
        size = features["video"]["x"].shape[0] // count
        (token,) = self.kinds
        return self._block(self.vision_marks, token, size) * count


class NativeVL(NativeModel, Qwen2_5_VLForConditionalGeneration):  # pyright: ignore
    """Qwen2.5-VL."""

    backbone_kind = QwenVLBackbone
    settings_kind = QwenVLConfig
    encoder_names = ("visual",)


if TYPE_CHECKING:
    _: type[Backbone] = QwenVLBackbone
    __: type[Backbone] = NativeVL
