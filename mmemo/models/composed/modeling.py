"""The composed multimodal LLM: any causal LM that hears and sees through frozen encoders.

Shapes: N clips in the batch, B rows, L tokens, T feature steps, D an encoder's width, K tokens of
a branch, E the LM's width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from mmemo.data.sample import Modality
from mmemo.errors import DataError
from mmemo.media.clip import DecodedClip
from mmemo.models.adapters.routing import keep, resumed
from mmemo.models.backbone import FeatureBatch, Features
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import SUB_CONFIG, TOWER, MmemoConfig
from mmemo.models.composed.connectors import Connectors, Fusion, dummy_features, streams
from mmemo.models.composed.fusion import LayerMix, QFormerFusion
from mmemo.models.generation import FEATURES, PER_CLIP, ClipGeneration

M = TypeVar("M", bound=nn.Module)


@dataclass
class MmemoCausalLMOutput(ModelOutput):
    """``loss`` (), ``logits`` (B, L, V), and the LM's cache, hidden states and attentions."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MmemoPreTrainedModel(PreTrainedModel):
    """Settings of transformers that both models share."""

    config: MmemoConfig
    config_class = MmemoConfig
    base_model_prefix = "model"
    input_modalities = ["video", "audio", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # These are small and trained in every recipe; half precision would lose their updates.
    _keep_in_fp32_modules_strict = {"connectors", "fusion"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerMix):
            init.zeros_(module.scores)
        elif isinstance(module, QFormerFusion):
            init.normal_(module.queries, std=0.02)
            init.normal_(module.positions, std=0.02)

    def initialised(self, module: M) -> M:
        """``module`` with newly initialised weights, following this model's config."""
        return module.apply(self._init_weights)


class MmemoModel(MmemoPreTrainedModel):
    """Encoders, connectors, fusion and the decoder stack, without the vocabulary head."""

    def __init__(self, config: MmemoConfig) -> None:
        super().__init__(config)
        for name in config.modalities:
            encoder = encoders.build_encoder(getattr(config, SUB_CONFIG[name]))
            setattr(self, TOWER[name], encoder.requires_grad_(False).eval())
        self.language_model: Any = AutoModel.from_config(config.text_config)
        width = self.language_model.get_input_embeddings().weight.shape[1]
        self.connectors = Connectors(config, width)
        self.fusion = Fusion(config, width) if config.fusion is not None else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> MmemoModel:
        """As ``nn.Module.train``; the frozen encoders stay in eval mode."""
        super().train(mode)
        for name in self.config.modalities:
            getattr(self, TOWER[name]).eval()
        return self

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Branch -> (N, K, E), for the branches whose features are given."""
        connected: dict[str, Tensor] = self.connectors(features)
        if self.fusion is not None:
            needed = (f"{self.config.fusion_visual}_features", "audio_features")
            if all(name in features for name in needed):
                connected["fusion"] = self.fusion(features)
        return connected

    def embed(self, input_ids: Tensor, features: FeatureBatch) -> Tensor:
        """(B, L) ids and the features of N clips -> (B, L, E) with placeholders filled.

        Raises:
            DataError: the placeholders of a row do not match its features, or there are none.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if not self.config.modalities:
            return embeds
        dummies = dummy_features(self.config, embeds, features)
        connected = self.connect({**features, **dummies})
        # A branch that no row asks for joins the graph all the same, so that every rank has a
        # gradient for each of its weights.
        touch = embeds.new_zeros(())
        for name, token in self.config.token_ids.items():
            mask = input_ids == token
            needs = ("audio", str(self.config.fusion_visual)) if name == "fusion" else (name,)
            values = self._values(name, mask, connected[name], features, needs)
            if values is None:
                # Multiply by zero before the sum, which may overflow in half precision.
                touch = touch + (connected[name] * 0).sum().to(embeds.dtype)
            else:
                embeds = embeds.masked_scatter(mask.unsqueeze(-1), values.to(embeds))
        return embeds + touch

    def _values(
        self,
        name: str,
        mask: Tensor,
        connected: Tensor,
        features: FeatureBatch,
        needs: tuple[str, ...],
    ) -> Tensor | None:
        """Embeddings (rows with the branch, K, E) for its placeholders; None if no row has any.

        Raises:
            DataError: the placeholders of a row do not match its features.
        """
        counts = mask.sum(1)
        rows = (counts > 0).nonzero().flatten()
        expected = connected.shape[1]
        wrong = rows[counts[rows] != expected].tolist()
        if wrong:
            raise DataError(
                f"row {wrong[0]} has {int(counts[wrong[0]])} {name} placeholder tokens but the "
                f"{name} branch makes {expected}; render the text with this model's processor and "
                "never cut it"
            )
        if not len(rows):
            return None
        absent = [need for need in needs if f"{need}_features" not in features]
        if absent:
            raise DataError(
                f"row {int(rows[0])} has {name} placeholders but the batch has no features for "
                f"them; pass {absent[0]}_features"
            )
        index = features.get("clip_index")
        if index is None and len(connected) != len(mask):
            raise DataError(
                f"{len(mask)} rows and {len(connected)} clips need clip_index (one per row)"
            )
        # Only rows with placeholders are checked; the others may point to any clip.
        chosen = rows if index is None else index.to(mask.device)[rows].long()
        if int(chosen.max()) >= len(connected) or int(chosen.min()) < 0:
            raise DataError(
                f"clip_index {int(chosen.max())} is outside of the {len(connected)} clips given"
            )
        for need in needs:
            empty = (~streams(features, need)[1].any(1).to(mask.device)[chosen]).nonzero()
            if len(empty):
                raise DataError(
                    f"row {int(rows[empty[0]])} has {name} placeholders but its clip has no {need} "
                    "features; add the stream or drop the placeholder"
                )
        return connected[chosen]

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Attention mask (B, L) -> positions (B, L) that skip padding."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        modality_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns ``last_hidden_state`` (B, L, E), one per input token.

        Takes ``{modality}_features`` (N, [layers,] T, D) with ``{modality}_features_mask`` (N, T),
        and ``clip_index`` (B,) from row to clip (row i is clip i without it). ``inputs_embeds``
        replaces ``input_ids`` and the features. ``attention_mask`` is (B, L), or any 4-D mask that
        the LM takes. Only experts read ``modality_ids`` (B, L).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        media = {name: kwargs.pop(name, None) for name in (*PER_CLIP, "clip_index")}
        features = {name: value for name, value in media.items() if value is not None}
        if inputs_embeds is None:
            # `generate` passes features with the prompt only, and all later tokens are text.
            decoding = past > 0 and not any(name in features for name in FEATURES)
            inputs_embeds = (
                self.get_input_embeddings()(input_ids)
                if decoding
                else self.embed(_present(input_ids), features)
            )
        # Only a 2-D mask of all tokens says which are padding; with any other, the LM counts.
        if (
            position_ids is None
            and attention_mask is not None
            and attention_mask.ndim == 2
            and attention_mask.shape[1] == past + _present(inputs_embeds).shape[1]
        ):
            position_ids = self.positions(attention_mask)[:, past:]
        kinds = (modality_ids, input_ids, self.config.token_ids)
        given = (self.language_model, _present(inputs_embeds), past_key_values)
        inputs_embeds, routing = resumed(*given, *kinds)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **routing,
            **kwargs,
        )
        keep(outputs.get("past_key_values"), routing)
        return BaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class MmemoForConditionalGeneration(  # pyright: ignore[reportIncompatibleMethodOverride]
    MmemoPreTrainedModel, ClipGeneration, GenerationMixin
):
    """The composed model with its vocabulary head. Implements
    :class:`~mmemo.models.backbone.Backbone`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MmemoConfig) -> None:
        super().__init__(config)
        self.model = MmemoModel(config)
        embeddings: Any = self.model.get_input_embeddings()
        rows, width = embeddings.weight.shape
        # TRL multiplies hidden states by the head's weight itself, so the head is one linear layer.
        self.lm_head: nn.Module = nn.Linear(width, rows, bias=config.lm_head_bias)
        # LMs name their embedding differently (GPT-2's is wte), and tying goes by the real name.
        name = next(key for key, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.sampling = config.sampling_config
        self.modalities = config.modalities
        self._fingerprints: dict[str, str] = {}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack."""
        return self.model.language_model

    def encoder(self, modality: Modality) -> PreTrainedModel:
        """The frozen encoder of one branch."""
        self.config.branch(modality)
        return getattr(self.model, TOWER[modality])

    def feature_fingerprint(self, modality: Modality) -> str:
        """See :class:`~mmemo.models.backbone.Backbone`. The weights are hashed once."""
        if modality not in self._fingerprints:
            spec = self.config.branch(modality)
            self._fingerprints[modality] = encoders.fingerprint(
                self.encoder(modality), spec, modality
            )
        return self._fingerprints[modality]

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """See :class:`~mmemo.models.backbone.Backbone`. ``x`` is (T, D), or (layers, T, D).

        Raises:
            MediaError: a clip has no such stream.
        """
        spec = self.config.branch(modality)
        return [encoders.encode(self.encoder(modality), spec, modality, clip) for clip in clips]

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Branch (fusion included) -> (N, K, E)."""
        return self.model.connect(features)

    def embed(self, input_ids: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """(B, L, E) with placeholders filled; the ids alone say where they are."""
        return self.model.embed(input_ids, features)

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, features: FeatureBatch
    ) -> Tensor:
        """(B, L)."""
        return self.model.positions(attention_mask)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch; unknown keys are ignored."""
        known = inspect.signature(MmemoForConditionalGeneration.forward).parameters
        # With labels, forward would also compute a loss that nobody reads.
        kept = {key: value for key, value in batch.items() if key in known and key != "labels"}
        return self(**kept, use_cache=False).logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        modality_ids: Tensor | None = None,
        clip_index: Tensor | None = None,
        # `generate` refuses keyword arguments that forward does not name.
        video_features: Tensor | None = None,
        video_features_mask: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_features_mask: Tensor | None = None,
        face_features: Tensor | None = None,
        face_features_mask: Tensor | None = None,
        face_found: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MmemoCausalLMOutput:
        """As :meth:`MmemoModel.forward`, with ``logits`` of the last ``logits_to_keep`` tokens (0
        is all) and, given ``labels`` (B, L), the mean cross-entropy of those that are not -100.
        Collators pass ``face_found`` (N,), which is not read."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            modality_ids=modality_ids,
            clip_index=clip_index,
            video_features=video_features,
            video_features_mask=video_features_mask,
            audio_features=audio_features,
            audio_features_mask=audio_features_mask,
            face_features=face_features,
            face_features_mask=face_features_mask,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self._scale(self.lm_head(hidden))
        loss = None
        if labels is not None:
            loss_function: Any = self.loss_function
            loss = loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items)
        return MmemoCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _scale(self, logits: Tensor) -> Tensor:
        """Apply what some LMs do to logits after the head, read from their config as TRL does."""
        text: Any = self.config.text_config
        scale = next(
            (
                value
                for key in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if (value := getattr(text, key, None)) is not None
            ),
            None,
        )
        divisor = getattr(text, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = 1 / divisor
        if scale is not None:
            logits = logits * scale
        cap = getattr(text, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _present(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    return value
