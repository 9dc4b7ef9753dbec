"""Generation from features, which are passed once, with the prompt, and never repeated per row.

Shapes: N clips in the batch, B rows, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmemo.data.sample import MODALITIES
from mmemo.models.backbone import TEXT

FEATURES = tuple(f"{name}_features" for name in MODALITIES)
NATIVE = ("video_grid", "video_seconds_per_grid", "video_times", "audio_mel_frames")
"""Inputs that native encoders return for a clip in addition to its features."""
PER_CLIP = (*FEATURES, *(f"{name}_mask" for name in FEATURES), "face_found", *NATIVE)
"""Inputs whose first dimension is the number of clips, not of rows."""


def listed_stop_ids(generation_config: Any) -> list[int]:
    """The generation config's ``eos_token_id`` as a list, whether it is one id, a list or None."""
    named: Any = getattr(generation_config, "eos_token_id", None)
    return named if isinstance(named, list) else [] if named is None else [named]


def stop_token_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer, sorted.

    These are the tokens of the generation config and the tokenizer's own EOS token, with which the
    chat template ends an answer.
    """
    return sorted({*listed_stop_ids(generation_config), int(tokenizer.eos_token_id)})


class ClipGeneration:
    """Mixin to place before transformers' ``GenerationMixin`` among a model's bases."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        is_first_iteration: bool | None = False,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pass features with the prompt only, or at every step if there is no KV cache.

        ``inputs_embeds`` of a prompt, with its placeholders filled, replace the ids and features.
        """
        modality_ids = kwargs.pop("modality_ids", None)
        parent: Any = super()
        # `generate` has made position_ids of them, which it extends.
        kwargs.pop("mrope_positions", None)
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids,
            is_first_iteration=is_first_iteration,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*PER_CLIP, "clip_index"):
                inputs.pop(name, None)
        elif modality_ids is not None:
            # `generate` extends the attention mask but not modality_ids; all that it adds is text.
            grown = input_ids.shape[1] - modality_ids.shape[1]
            ids = nn.functional.pad(modality_ids, (0, max(grown, 0)), value=TEXT)
            new_ids = inputs.get("input_ids")
            inputs["modality_ids"] = ids if new_ids is None else ids[:, -new_ids.shape[1] :]
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows but not clips: repeated rows have the same ``clip_index``."""
        clips = {name: model_kwargs.pop(name) for name in PER_CLIP if name in model_kwargs}
        first = next((x for x in clips.values() if x is not None), None)
        if first is not None and model_kwargs.get("clip_index") is None:
            model_kwargs["clip_index"] = torch.arange(len(first), device=first.device)
        parent: Any = super()
        input_ids, expanded = parent._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**expanded, **clips}
