"""Contrastive decoding: logits given the clip, minus logits without one of its modalities.

Shapes: B rows, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import LogitsProcessor

from mmemo.config import Config
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.attention.reallocation import Kind
from mmemo.models.backbone import MODALITY_ID, TEXT, prompt_positions
from mmemo.models.qwen.native import NativeModel


class ContrastConfig(Config):
    """Which modalities are removed, and how strongly the answer is contrasted.

    Source: VCD, Leng et al., arXiv 2311.16922, and for more than one modality AVCD, Jung et al.,
    arXiv 2505.20862. VCD adds noise to the image and AVCD hides the most important tokens. Here all
    tokens of a modality are hidden, so that there is no noise level to choose.
    """

    remove: list[list[Kind]] = Field(default=[["audio"], ["video", "face"]], min_length=1)
    """Sets of modalities. Each that a prompt has is hidden separately, and the contrasts are
    averaged. Fusion tokens, made of several modalities, are hidden with any of them."""
    alpha: float = Field(default=1.0, gt=0)
    """Logits l become l + alpha (l - l'), where l' are the logits without the modality."""
    # This is PAI's value; AVCD's released code has 0.2.
    cutoff: float = Field(default=0.1, ge=0, le=1)
    """Only tokens with at least this share of the top token's probability may be generated."""
    # AVCD's released code has 0.6.
    min_entropy: float = Field(default=0.0, ge=0)
    """Entropy in nats below which the logits are not changed, because the model is sure."""


class Contrast(LogitsProcessor):
    """Logits processor for one call of ``generate``, with the contrasted prompts beside it.

    Hidden tokens are masked, and experts are not chosen by them. A composed model's positions skip
    them, so that it answers a prompt that never had them; a native model keeps the positions of the
    whole prompt. Each item of ``remove`` costs one more cached forward pass.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor], config: ContrastConfig) -> None:
        """Prepare the contrasted prompts.

        Args:
            inputs: of the prompts, as passed to ``generate``: ``input_ids``, ``attention_mask``,
                ``modality_ids`` (B, P) and features.

        Raises:
            ConfigError: the prompts' modalities are unknown.
        """
        if inputs.get("modality_ids") is None or inputs.get("attention_mask") is None:
            raise ConfigError("contrast needs modality_ids and attention_mask of the prompts")
        self._model, self._inputs, self._config = model, dict(inputs), config
        kinds, mask = inputs["modality_ids"], inputs["attention_mask"]
        self._masks: list[Tensor] = []
        self._kinds: list[Tensor] = []
        for names in config.remove:
            hidden = [MODALITY_ID[name] for name in {*names, "fusion"}]
            gone = torch.isin(kinds, kinds.new_tensor(hidden)) & (mask != 0)
            if not bool(gone.any()):
                continue  # no prompt has it
            self._masks.append(mask * ~gone)
            # Experts are chosen by what is not text, and a hidden token must choose none.
            self._kinds.append(kinds.masked_fill(gone, TEXT))
        self._caches: list[Any] = [None] * len(self._masks)
        # (B,) rows that have it, and (B, 1) how many of these a row has.
        self._less = [(one != mask).any(1) for one in self._masks]
        self._parts = sum((one.long() for one in self._less), mask.new_zeros(len(mask)))[:, None]
        self._processed = 0
        self._positions: Tensor | None = None
        inner = unwrap(model)
        if isinstance(inner, NativeModel):
            self._positions = prompt_positions(inner, inputs)  # (B, P) or (3, B, P)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, ...) tokens so far and (B, V) logits of the next -> (B, V)."""
        if not self._masks:
            return scores
        if len(input_ids) != len(self._parts):
            raise ConfigError(
                "contrast takes one answer a prompt; set num_beams and num_return_sequences to 1"
            )
        push = torch.zeros_like(scores)
        for place in range(len(self._masks)):
            gap = scores - self._without(place, input_ids).to(scores.dtype)
            # A product with 0 would be NaN for suppressed tokens, whose scores are -inf.
            push += torch.where(self._less[place][:, None], gap, 0.0)
        self._processed = input_ids.shape[1]
        pushed = scores + self._config.alpha / self._parts.clamp(min=1) * push
        logp = scores.log_softmax(-1)
        if self._config.cutoff > 0:
            best = logp.amax(-1, keepdim=True) + math.log(self._config.cutoff)
            pushed = pushed.masked_fill(logp < best, -torch.inf)
        # The clamp makes the term of a suppressed token 0, where 0 times -inf would be NaN.
        entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
        change = torch.stack(self._less).any(0) & (entropy >= self._config.min_entropy)
        return torch.where(change[:, None], pushed, scores)

    def _without(self, place: int, input_ids: Tensor) -> Tensor:
        """(B, V) logits of the next token without the modalities of ``place``."""
        cache, mask = self._caches[place], self._masks[place]
        given = {"input_ids": input_ids[:, self._processed :]}
        if cache is None:
            given = {**self._inputs, "modality_ids": self._kinds[place]}
        more = input_ids.shape[1] - mask.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), more)], 1)
        given |= {"attention_mask": mask, "past_key_values": cache, **self._places(input_ids)}
        out = self._model(**given, use_cache=True, logits_to_keep=1)
        self._masks[place], self._caches[place] = mask, out.past_key_values
        return out.logits[:, -1].float()

    def _places(self, input_ids: Tensor) -> dict[str, Tensor]:
        """``position_ids`` (3, B, .) of the new tokens; empty for a composed model."""
        if self._positions is None:
            return {}
        width = self._positions.shape[-1]
        behind = torch.arange(1, 1 + input_ids.shape[1] - width, device=input_ids.device)
        places = torch.cat([self._positions, self._positions[..., -1:] + behind], -1)
        return {"position_ids": places[..., self._processed :]}
