"""Qwen2.5-Omni's Thinker behind the backbone protocol, with its own encoders.

The audio encoder is frozen up to and including its projection. The number of tokens of a clip
depends on its pixels and its duration.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps = LM tokens of a clip, E
the LM's width, (t, h, w) the grid of vision patches, S mel frames.

Source: Xu et al., Qwen2.5-Omni Technical Report, arXiv 2503.20215, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from mmemo.data.sample import Modality
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import AUDIO, VIDEO, Backbone, Features
from mmemo.models.qwen.base import QwenVisionConfig
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.sound import QwenHearing


class QwenOmniConfig(QwenVisionConfig):
    """Inputs of the encoders. The defaults are those of the released processor."""

    max_seconds: int = Field(default=300, ge=1)
    """Longest sound in seconds. A longer one is refused; the released processor truncates it."""
    audio_in_video: bool = False
    """For rows with both, interleave sound with the video's chunks of the same time, as the Thinker
    was trained on films. Otherwise sound is a block beside the block of video."""


class QwenOmniBackbone(QwenHearing):
    """Runs a Thinker; implements :class:`~mmemo.models.backbone.Backbone`.

    Features of sound: ``x`` (T, E), ``mel_frames`` () int64.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")
    name = "Qwen2.5-Omni"
    vision_marks = ("<|vision_bos|>", "<|vision_eos|>")
    placing: Mapping[Modality, tuple[str, ...]] = {
        **QwenHearing.placing,
        "audio": ("mel_frames",),
    }

    def __init__(
        self,
        thinker: Qwen2_5OmniThinkerForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        settings: QwenOmniConfig | None = None,
    ) -> None:
        own = settings or QwenOmniConfig()
        encoders: dict[Modality, str] = {"video": "visual", "audio": "audio_tower"}
        super().__init__(thinker, tokenizer, sampling, own, encoders)
        self.hear(own.max_seconds)

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        return self.model

    def row_positions(self, input_ids: Tensor, features: Mapping[Modality, Features]) -> Tensor:
        """(3, L): the Thinker's time-aligned M-RoPE.

        The Thinker's own function takes one ``use_audio_in_video`` per batch and counts media over
        all rows. Calling it row by row lets a batch mix anything. Nothing is cached.
        """
        config, given = self._config, dict[str, Any]()
        if bool((input_ids == config.video_token_id).any()):
            video = self._placed("video", features)
            given["video_grid_thw"] = video["grid"][None]
            given["second_per_grids"] = video["seconds_per_grid"][None]
        if bool((input_ids == config.audio_token_id).any()):
            given["audio_seqlens"] = self._placed("audio", features)["mel_frames"][None]
        # Only an interleaved block opens with both marks, that of vision first.
        starts = input_ids[:-1] == config.vision_start_token_id
        inside = bool((starts & (input_ids[1:] == config.audio_start_token_id)).any())
        positions, _ = self._inner.get_rope_index(
            input_ids[None],
            attention_mask=torch.ones_like(input_ids)[None],
            use_audio_in_video=inside,
            **given,
        )
        return positions[:, 0]

    def expand(
        self,
        text: str,
        features: Mapping[Modality, Features],
        *,
        audio_in_video: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Token ids and modality ids of a text, with ``<video>`` and ``<audio>`` written out to
        as many tokens as the clip's features have steps.

        ``audio_in_video`` interleaves the two in chunks of time at ``<video>``, as the Thinker
        was trained for films; ``<audio>`` then writes nothing.

        Raises:
            DataError: a placeholder without features.
        """
        both = "<video>" in text and "<audio>" in text
        return self._expand(text, features, inside=audio_in_video and both)

    @property
    def kinds(self) -> Mapping[int, int]:
        return {self._config.video_token_id: VIDEO, self._config.audio_token_id: AUDIO}

    def spell(self, modality: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        config = self._config
        if inside:
            return self._interleaved(features) if modality == "video" else ""
        if modality == "video":
            size = features["video"]["x"].shape[0]
            return self._block(self.vision_marks, config.video_token_id, size)
        return self._block(self.sound_marks, config.audio_token_id, features["audio"]["x"].shape[0])

    def _interleaved(self, features: Mapping[Modality, Features]) -> str:
        """Chunks of equal time, video before audio in each, inside both pairs of marks."""
        config, video = self._config, features["video"]
        times, height, width = (int(size) for size in video["grid"])
        per_step = height * width // config.vision_config.spatial_merge_size**2
        step = float(video["seconds_per_grid"]) * config.position_id_per_seconds
        video_at = (torch.arange(times).float() * step).long().repeat_interleave(per_step)
        audio_at = torch.arange(features["audio"]["x"].shape[0])
        size = int(config.position_id_per_seconds * config.seconds_per_chunk)
        # The model's own function cuts the chunks, so that its positions agree with these tokens.
        chunks = [self._inner.get_chunked_index(at, size, 0) for at in (video_at, audio_at)]
        tokens = [self._token(one) for one in (config.video_token_id, config.audio_token_id)]
        text = ""
        for place in range(max(map(len, chunks))):
            for found, token in zip(chunks, tokens, strict=True):
                # One stream may end before the other, whose chunks then follow alone.
                if place < len(found):
                    start, end = found[place]
                    text += token * (end - start)
        return self._both(text)

    def _both(self, text: str) -> str:
        """Tokens of both inside both pairs of marks."""
        (see, unsee), (hear, unhear) = self.vision_marks, self.sound_marks
        return f"{see}{hear}{text}{unhear}{unsee}"


class NativeThinker(NativeModel, Qwen2_5OmniThinkerForConditionalGeneration):  # pyright: ignore
    """Qwen2.5-Omni's Thinker."""

    backbone_kind = QwenOmniBackbone
    settings_kind = QwenOmniConfig
    encoder_names = ("visual", "audio_tower")


if TYPE_CHECKING:
    _: type[Backbone] = QwenOmniBackbone
    __: type[Backbone] = NativeThinker
