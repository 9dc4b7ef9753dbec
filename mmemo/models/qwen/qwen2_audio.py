"""Qwen2-Audio behind the backbone protocol, with its own audio encoder.

The encoder is frozen up to and including its projector. Positions are those of plain text.

Shapes: B rows, L tokens of a row, T feature steps = LM tokens of a clip, E the LM's width, M mel
bins, W mel frames of the encoder's window.

Source: Chu et al., Qwen2-Audio Technical Report, arXiv 2407.10759, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2AudioForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask

from mmemo.data.sample import Modality
from mmemo.errors import ConfigError
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import AUDIO, Backbone, FeatureBatch, Features
from mmemo.models.composed.encoders import hash_weights
from mmemo.models.qwen.base import QwenConfig
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.sound import QwenHearing


class QwenAudioConfig(QwenConfig):
    """There is nothing to set: the encoder hears the window of Whisper, 30 seconds. A longer sound
    is refused; the released processor truncates it."""


class QwenAudioBackbone(QwenHearing):
    """Runs a Qwen2-Audio; implements :class:`~mmemo.models.backbone.Backbone`."""

    modalities: tuple[Modality, ...] = ("audio",)
    name = "Qwen2-Audio"
    placing: Mapping[Modality, tuple[str, ...]] = {}
    mrope = False

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        settings: QwenAudioConfig | None = None,
    ) -> None:
        encoders: dict[Modality, str] = {"audio": "audio_tower"}
        super().__init__(model, tokenizer, sampling, settings or QwenAudioConfig(), encoders)
        # The projector's outputs are what is stored, so it is frozen like the encoder.
        self._inner.multi_modal_projector.requires_grad_(False)
        # Two convolutions of the encoder, of strides 1 and 2, and hops of 10 ms.
        self._window = 2 * self._config.audio_config.max_source_positions
        self.hear(self._window // 100)

    def _identity(self, modality: Modality) -> dict[str, Any]:
        projector = hash_weights(self._inner.multi_modal_projector)
        return {**super()._identity(modality), "projector": projector}

    def _heard(self, clip: DecodedClip) -> Features:
        encoder = self._encoder("audio")
        found = self._extractor(
            self.waveform(clip),
            sampling_rate=self.sampling.sample_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        padded = found["input_features"].to(encoder.device, encoder.dtype)  # (1, M, W)
        # The encoder's lengths: half the frames behind its convolutions, and half of these pooled.
        steps = (int(found["attention_mask"].sum()) - 1) // 2 + 1
        tokens = (steps - 2) // 2 + 1
        real = (torch.arange(self._window // 2) < steps)[None].long().to(encoder.device)
        like = padded.new_zeros(1, self._window // 2, 1)
        mask = create_bidirectional_mask(encoder.config, inputs_embeds=like, attention_mask=real)
        hidden = encoder(padded, attention_mask=mask).last_hidden_state
        return {"x": self._inner.multi_modal_projector(hidden)[0, :tokens]}

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, features: FeatureBatch
    ) -> Tensor:
        """(B, L)."""
        return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)

    def row_positions(self, input_ids: Tensor, features: Mapping[Modality, Features]) -> Tensor:
        raise ConfigError("Qwen2-Audio has plain positions; use positions()")

    def expand(
        self, text: str, features: Mapping[Modality, Features]
    ) -> tuple[list[int], list[int]]:
        """Token ids and modality ids of a text, with ``<audio>`` written out."""
        return self._expand(text, features, inside=False)

    @property
    def kinds(self) -> Mapping[int, int]:
        return {self._config.audio_token_id: AUDIO}

    def spell(self, modality: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        size = features["audio"]["x"].shape[0]
        return self._block(self.sound_marks, self._config.audio_token_id, size)


class NativeQwen2Audio(NativeModel, Qwen2AudioForConditionalGeneration):  # pyright: ignore
    """Qwen2-Audio."""

    backbone_kind = QwenAudioBackbone
    settings_kind = QwenAudioConfig
    encoder_names = ("audio_tower", "multi_modal_projector")


if TYPE_CHECKING:
    _: type[Backbone] = QwenAudioBackbone
    __: type[Backbone] = NativeQwen2Audio
