"""Models of transformers' that have towers of their own, loaded as they are and driven by features.

A native model is transformers' own, of another class: weights, names, config and files are those
that any other program reads, and so are adapters on it. What it is given are the stored features of
its own frozen towers in place of pixels and sound.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps, E the LM's width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from mmemo.data.sample import Modality
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters.routing import keep, resumed
from mmemo.models.backbone import Backbone, FeatureBatch, Features
from mmemo.models.composed.modeling import MmemoCausalLMOutput
from mmemo.models.generation import PER_CLIP, ClipGeneration
from mmemo.models.qwen.base import QwenBackbone, QwenVisionConfig
from mmemo.models.qwen.omni import QwenOmniBackbone, QwenOmniConfig
from mmemo.models.qwen.vl import QwenVLBackbone, QwenVLConfig


class NativeModel(ClipGeneration, PreTrainedModel):
    """To stand before a class of transformers' among a model's bases. Implements
    :class:`~mmemo.models.backbone.Backbone` by the ``backbone`` that :meth:`adopt` gives it."""

    plain: ClassVar[type[PreTrainedModel]]
    """The class that it is loaded and saved as."""
    backbone_kind: ClassVar[type[QwenBackbone]]
    settings_kind: ClassVar[type[QwenVisionConfig]]

    if TYPE_CHECKING:
        backbone: QwenBackbone
        sampling: SamplingConfig
        modalities: tuple[Modality, ...]
        lm_head: nn.Module
        model: nn.Module

    @classmethod
    def adopt(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        settings: QwenVisionConfig,
    ) -> NativeModel:
        """A model of class :attr:`plain`, made one of this class in place; its towers freeze."""
        found: Any = model
        found.__class__ = cls
        kind: Any = cls.backbone_kind
        # Not a submodule: it holds this model.
        found.__dict__["backbone"] = backbone = kind(found, tokenizer, sampling, settings)
        found.sampling, found.modalities = backbone.sampling, backbone.modalities
        # The model must never speak a placeholder: it would have no features to stand for.
        names = ("image_token_id", "video_token_id", "audio_token_id")
        ids = [getattr(found.config, name, None) for name in names]
        found.generation_config.suppress_tokens = sorted(x for x in ids if x is not None)
        found.generation_config.pad_token_id = tokenizer.pad_token_id
        return found.eval()

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack; position ids are (3, B, L)."""
        return self.backbone.language_model

    def feature_fingerprint(self, modality: Modality) -> str:
        return self.backbone.feature_fingerprint(modality)

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """As :meth:`~mmemo.models.qwen.base.QwenBackbone.encode`."""
        return self.backbone.encode(modality, clips)

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        return self.backbone.connect(features)

    def embed(self, input_ids: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """(B, L, E)."""
        return self.backbone.embed(input_ids, modality_ids, _indexed(features, input_ids))

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor | None, features: FeatureBatch
    ) -> Tensor:
        """(3, B, L). Without a mask no token is padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.backbone.positions(input_ids, mask, _indexed(features, input_ids))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch."""
        return self.backbone.logits(batch)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; the frozen towers stay in eval mode."""
        super().train(mode)
        if "backbone" in vars(self):
            self.backbone.rest_encoders()
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', which goes by the class: how weights are named on disk, and what
        ``config.json`` says of the architecture."""
        found: Any = self
        own = type(self)
        found.__class__ = own.plain
        try:
            found.save_pretrained(*args, **kwargs)
        finally:
            found.__class__ = own

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        clip_index: Tensor | None = None,
        video_features: Tensor | None = None,
        video_features_mask: Tensor | None = None,
        video_grid: Tensor | None = None,
        video_seconds_per_grid: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_features_mask: Tensor | None = None,
        audio_mel_frames: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MmemoCausalLMOutput:
        """``logits`` of the last ``logits_to_keep`` tokens (0: all).

        ``{modality}_features`` (N, T, E) with ``{modality}_features_mask`` (N, T) and what else the
        towers say of a clip (N, ...), and ``clip_index`` (B,) from row to clip (row i is clip i
        without it). ``inputs_embeds`` replaces ``input_ids`` and features. ``modality_ids`` (B, L),
        which experts read, are what the ids say where they are not given.
        """
        given = {"clip_index": clip_index, "video_features": video_features}
        given |= {"video_features_mask": video_features_mask, "video_grid": video_grid}
        given |= {"video_seconds_per_grid": video_seconds_per_grid}
        given |= {"audio_features": audio_features, "audio_features_mask": audio_features_mask}
        given |= {"audio_mel_frames": audio_mel_frames}
        features = {name: x for name, x in given.items() if x is not None}
        if inputs_embeds is None and input_ids is not None:
            modality_ids = self._kinds(input_ids) if modality_ids is None else modality_ids
            inputs_embeds = self.embed(input_ids, modality_ids, features)
            if position_ids is None:
                position_ids = self.positions(input_ids, attention_mask, features)
        elif inputs_embeds is None or position_ids is None:
            raise ValueError("pass input_ids, or inputs_embeds with position_ids")
        lm: Any = self.language_model
        inputs_embeds, routing = resumed(lm, inputs_embeds, past_key_values, modality_ids, None, {})
        outputs = lm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **{**kwargs, **routing, "return_dict": True},
        )
        keep(outputs.past_key_values, routing)
        return MmemoCausalLMOutput(
            logits=self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _kinds(self, input_ids: Tensor) -> Tensor:
        rows = [self.backbone.modality_ids(row) for row in input_ids.tolist()]
        return torch.tensor(rows, device=input_ids.device)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: Mapping[str, Any]
    ) -> Tensor:
        """(3, B, L) of the prompts; transformers counts on from their last token."""
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None else ids
        if ids.is_floating_point():
            raise ValueError("pass input_ids with the features, or position_ids")
        mask = model_kwargs.get("attention_mask")
        names = (*PER_CLIP, "clip_index")
        features = {n: model_kwargs[n] for n in names if model_kwargs.get(n) is not None}
        return self.positions(ids, mask, features)


def _indexed(features: FeatureBatch, input_ids: Tensor) -> FeatureBatch:
    """With ``clip_index``: row i is clip i unless it says otherwise."""
    if "clip_index" in features:
        return features
    return {**features, "clip_index": torch.arange(len(input_ids), device=input_ids.device)}


class NativeThinker(NativeModel, Qwen2_5OmniThinkerForConditionalGeneration):  # pyright: ignore
    """Qwen2.5-Omni's Thinker."""

    plain = Qwen2_5OmniThinkerForConditionalGeneration
    backbone_kind = QwenOmniBackbone
    settings_kind = QwenOmniConfig


class NativeVL(NativeModel, Qwen2_5_VLForConditionalGeneration):  # pyright: ignore
    """Qwen2.5-VL."""

    plain = Qwen2_5_VLForConditionalGeneration
    backbone_kind = QwenVLBackbone
    settings_kind = QwenVLConfig


KINDS: Mapping[str, type[NativeModel]] = {
    "qwen2_5_omni": NativeThinker,
    "qwen2_5_omni_thinker": NativeThinker,
    "qwen2_5_vl": NativeVL,
}
"""``model_type`` of a checkpoint, whole or the Thinker alone, to the class that takes it."""


if TYPE_CHECKING:
    _: type[Backbone] = NativeThinker
