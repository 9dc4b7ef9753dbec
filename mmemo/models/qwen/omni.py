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

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import AUDIO, VIDEO, Backbone, Features
from mmemo.models.composed.audio_encoders import MIN_AUDIO_SECONDS
from mmemo.models.qwen.base import QwenBackbone, QwenVisionConfig
from mmemo.models.qwen.native import NativeModel

SOUND_MARKS = ("<|audio_bos|>", "<|audio_eos|>")


class QwenOmniConfig(QwenVisionConfig):
    """Inputs of the encoders. The defaults are those of the released processor."""

    max_seconds: int = Field(default=300, ge=1)
    """Longest sound in seconds. A longer one is refused; the released processor truncates it."""
    audio_in_video: bool = False
    """For rows with both, interleave sound with the video's chunks of the same time, as the Thinker
    was trained on films. Otherwise sound is a block beside the block of video."""


class QwenOmniBackbone(QwenBackbone):
    """Runs a Thinker; implements :class:`~mmemo.models.backbone.Backbone`.

    Features of sound: ``x`` (T, E), ``mel_frames`` () int64.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")
    name = "Qwen2.5-Omni"
    vision_marks = ("<|vision_bos|>", "<|vision_eos|>")
    placing: Mapping[Modality, tuple[str, ...]] = {
        **QwenBackbone.placing,
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
        self._longest = own.max_seconds
        self._extractor = WhisperFeatureExtractor(
            feature_size=self._config.audio_config.num_mel_bins,
            sampling_rate=self.sampling.sample_rate,
            chunk_length=self._longest,
        )

    @property
    def thinker(self) -> Qwen2_5OmniThinkerForConditionalGeneration:
        return self.model

    def _identity(self, modality: Modality) -> dict[str, Any]:
        return {"extractor": self._extractor.to_dict() if modality == "audio" else None}

    def mel(self, clip: DecodedClip) -> Tensor:
        """Inputs of the audio encoder: log-mel (M, S), without padding to a full window."""
        waveform = clip.waveform
        if waveform is None or len(waveform) == 0:
            raise MediaError(clip.name, "no_audio", "there is no sound to encode")
        rate = self.sampling.sample_rate
        if len(waveform) > self._longest * rate:
            raise MediaError(
                clip.name,
                "too_long",
                f"has {len(waveform) / rate:.0f} s of sound, at most {self._longest} "
                "s fit; set start and end",
            )
        shortest = int(MIN_AUDIO_SECONDS * rate)
        samples = max(len(waveform), shortest)
        hop = self._extractor.hop_length
        frames = -(-samples // hop)
        # Pad with silence, as a full window would, to a whole number of hops.
        total = frames * hop + self._extractor.n_fft
        padded = np.pad(waveform, (0, total - len(waveform)))
        found = self._extractor(
            padded, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="pt"
        )
        return found["input_features"][0, :, :frames]

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        if modality == "video":
            return super()._encode(modality, clip)
        encoder = self._encoder(modality)
        mel = self.mel(clip).to(encoder.device, encoder.dtype)
        frames = torch.tensor([mel.shape[1]], device=encoder.device)
        x = encoder(mel, feature_lens=frames).last_hidden_state
        return {"x": x, "mel_frames": frames[0]}

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
        return self._block(SOUND_MARKS, config.audio_token_id, features["audio"]["x"].shape[0])

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
        (see, unsee), (hear, unhear) = self.vision_marks, SOUND_MARKS
        return f"{see}{hear}{text}{unhear}{unsee}"


class NativeThinker(NativeModel, Qwen2_5OmniThinkerForConditionalGeneration):  # pyright: ignore
    """Qwen2.5-Omni's Thinker."""

    backbone_kind = QwenOmniBackbone
    settings_kind = QwenOmniConfig
    encoder_names = ("visual", "audio_tower")


if TYPE_CHECKING:
    _: type[Backbone] = QwenOmniBackbone
    __: type[Backbone] = NativeThinker
