"""Models of transformers that bring their own encoders, driven by stored features.

A native model is a subclass of transformers' model class. Its weights, their names, its config and
its files are those of the parent class, so that any other program reads them, and so are adapters
trained on it. Instead of pixels and sound it takes the stored features of its own frozen encoders.

:mod:`mmemo.models.backbones` lists the native models and says how to add one.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps, E the LM's width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from mmemo.data.sample import Modality
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters.routing import keep, resumed
from mmemo.models.backbone import FeatureBatch, Features, prompt_positions
from mmemo.models.composed.modeling import MmemoCausalLMOutput
from mmemo.models.generation import PER_CLIP, ClipGeneration
from mmemo.models.qwen.base import QwenBackbone, QwenConfig
from mmemo.models.qwen.branch import Branch
from mmemo.models.qwen.branches import own_weight


class NativeModel(ClipGeneration, PreTrainedModel):
    """Mixin that makes one of transformers' model classes a native model.

    It comes first among the bases: ``class NativeVL(NativeModel, Qwen2_5_VLForConditional...)``.
    Load it with ``from_pretrained`` and then give it its tokenizer and settings with
    :meth:`attach`; from then on it implements :class:`~mmemo.models.backbone.Backbone`.
    """

    backbone_kind: ClassVar[type[QwenBackbone]]
    """How its encoders are run and its placeholders written."""
    settings_kind: ClassVar[type[QwenConfig]]
    """What ``model.native`` of a config may set."""
    encoder_names: ClassVar[tuple[str, ...]]
    """Names of the frozen encoders in ``model.model``."""

    if TYPE_CHECKING:
        backbone: QwenBackbone
        sampling: SamplingConfig
        lm_head: nn.Module
        model: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers renames weights between file and model by the name of the class or the type
        # of the model, and does so for classes outside of transformers only where either is
        # registered.
        kind: Any = cls.config_class
        for key, name in (
            (cls.released_class().__name__, cls.__name__),
            (kind.model_type, kind.model_type),
        ):
            mapping: Any = get_checkpoint_conversion_mapping(key)
            if mapping is not None:
                register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
                break

    @classmethod
    def released_class(cls) -> type[PreTrainedModel]:
        """The class of transformers that this one extends, whose files it reads and writes."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.mod"))

    def attach(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        settings: QwenConfig,
    ) -> Self:
        """Give the model what its files do not hold, and freeze its encoders. Returns itself."""
        kind: Any = self.backbone_kind
        # Not a submodule: it holds this model.
        self.__dict__["backbone"] = backbone = kind(self, tokenizer, sampling, settings)
        self.sampling = backbone.sampling
        # The model must never speak a placeholder: it would have no features to stand for.
        config: Any = self.config
        names = ("image_token_id", "video_token_id", "audio_token_id")
        ids = [getattr(config, name, None) for name in names]
        generation: Any = self.generation_config
        generation.suppress_tokens = sorted(x for x in ids if x is not None)
        generation.pad_token_id = tokenizer.pad_token_id
        return self.eval()

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return self.backbone.modalities

    @property
    def deepstack(self) -> int:
        """Number of the LM's first layers that features of deeper encoder layers enter."""
        return self.backbone.deepstack

    def add_branch(self, branch: Branch) -> None:
        """Take a branch (:mod:`mmemo.models.qwen.branches`), whose modules are there already."""
        self.backbone.add_branch(branch)
        generation: Any = self.generation_config
        generation.suppress_tokens = sorted({*generation.suppress_tokens, branch.token_id})
        self.eval()

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
        """(3, B, L), or (B, L) without M-RoPE. Without a mask no token is padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.backbone.positions(input_ids, mask, _indexed(features, input_ids))

    def layer_inputs(self, modality_ids: Tensor, features: FeatureBatch) -> dict[str, Any]:
        """See :func:`~mmemo.models.backbone.layer_inputs`."""
        return self.backbone.layer_inputs(modality_ids, _indexed(features, modality_ids))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch."""
        return self.backbone.logits(batch)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; the frozen encoders stay in eval mode."""
        super().train(mode)
        # from_pretrained calls eval() before there is a backbone.
        if "backbone" in vars(self):
            self.backbone.freeze_encoders()
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers, with the released class as the architecture in ``config.json``. A branch
        goes into a folder of its own, so that other programs read the rest."""
        folder = Path(args[0] if args else kwargs.pop("save_directory"))
        weights: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or self.state_dict()
        released = {name: x for name, x in weights.items() if not own_weight(name)}
        super().save_pretrained(folder, *args[1:], state_dict=released, **kwargs)
        config: Any = self.config
        # transformers writes the name of our class, which no other program knows.
        config.architectures = [self.released_class().__name__]
        config.save_pretrained(folder)
        for branch in self.backbone.branches.values():
            branch.save(folder, branch.weights(weights))

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
        # `generate` refuses keyword arguments that forward does not name.
        video_features: Tensor | None = None,
        video_features_mask: Tensor | None = None,
        video_grid: Tensor | None = None,
        video_seconds_per_grid: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_features_mask: Tensor | None = None,
        audio_mel_frames: Tensor | None = None,
        face_features: Tensor | None = None,
        face_features_mask: Tensor | None = None,
        face_found: Tensor | None = None,
        video_times: Tensor | None = None,
        mrope_positions: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MmemoCausalLMOutput:
        """``logits`` of the last ``logits_to_keep`` tokens (0: all).

        ``{modality}_features`` (N, T, E) with ``{modality}_features_mask`` (N, T) and what else the
        encoders say of a clip (N, ...), and ``clip_index`` (B,) from row to clip (row i is clip i
        without it). ``mrope_positions`` (B, 3, L), from the collator, and ``position_ids`` are
        made from these if neither is given. ``inputs_embeds`` replaces ``input_ids`` and features.
        ``modality_ids`` (B, L), which experts read, are what the ids say if they are not given.
        """
        given = {"clip_index": clip_index, "video_features": video_features}
        given |= {"video_features_mask": video_features_mask, "video_grid": video_grid}
        given |= {"video_seconds_per_grid": video_seconds_per_grid}
        given |= {"audio_features": audio_features, "audio_features_mask": audio_features_mask}
        given |= {"audio_mel_frames": audio_mel_frames, "face_features": face_features}
        given |= {"face_features_mask": face_features_mask}
        features = {name: x for name, x in given.items() if x is not None}
        deep: dict[str, Any] = {}
        if inputs_embeds is None and input_ids is not None:
            modality_ids = self._kinds(input_ids) if modality_ids is None else modality_ids
            inputs_embeds = self.embed(input_ids, modality_ids, features)
            deep = self.layer_inputs(modality_ids, features)
            if position_ids is None:
                given = {"input_ids": input_ids, "attention_mask": attention_mask, **features}
                position_ids = prompt_positions(self, {**given, "mrope_positions": mrope_positions})
        elif inputs_embeds is None or position_ids is None:
            raise ValueError("pass input_ids, or inputs_embeds with position_ids")
        return self._decoded(
            {"inputs_embeds": inputs_embeds, "position_ids": position_ids},
            modality_ids,
            logits_to_keep,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **{**kwargs, **deep},
        )

    def _decoded(
        self,
        tokens: Mapping[str, Tensor],
        modality_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        **given: Any,
    ) -> MmemoCausalLMOutput:
        """The language model's outputs for embedded ``tokens``."""
        lm: Any = self.language_model
        embeds, routing = resumed(
            lm, tokens["inputs_embeds"], given["past_key_values"], modality_ids, None, {}
        )
        given |= {**tokens, "inputs_embeds": embeds, **routing, "return_dict": True}
        outputs = lm(**given)
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
        names = (*PER_CLIP, "clip_index", "attention_mask", "mrope_positions")
        given = {n: model_kwargs[n] for n in names if model_kwargs.get(n) is not None}
        return prompt_positions(self, {**given, "input_ids": ids})


def _indexed(features: FeatureBatch, input_ids: Tensor) -> FeatureBatch:
    """With ``clip_index``: row i is clip i unless it says otherwise."""
    if "clip_index" in features:
        return features
    return {**features, "clip_index": torch.arange(len(input_ids), device=input_ids.device)}
