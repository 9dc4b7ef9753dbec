"""Completions of prompts for policy optimisation: G of each, the prompt computed once.

A prompt with media is long and its answers are short. Features go in once, the prompt is prefilled
once per group and its cache read by G rows; rows that have ended leave the batch. Each
completion draws from random numbers of its own, so that what it says depends neither on what else
is in the batch nor on whether the run was resumed (but for rounding).

B prompts, P tokens of the longest, G completions of each, N = B * G completions prompt by prompt,
C tokens of the longest, R rows still in the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mmemo.config import Config
from mmemo.generation.decoder import Decoder
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.merging import merged
from mmemo.models.attention.fused import fuse
from mmemo.models.attention.shared_prefix import use_prefixes
from mmemo.models.backbone import Backbone
from mmemo.models.generation import stop_token_ids

# One token from each row of logits, by a random number that the caller brings. R rows, V words.


class Filters(Protocol):
    """What narrows the distribution; names and order of application are transformers'."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float | None: ...


def draw(
    logits: Tensor, uniforms: Tensor, filters: Filters, never: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the distribution function at the row's number.

    Args:
        logits: (R, V) float32.
        uniforms: (R,) float64 in [0, 1).
        never: (V,) bool, tokens that cannot be drawn.

    Returns:
        The tokens (R,), and their log-probabilities (R,) in nats under the temperature alone.
    """
    scaled = logits / filters.temperature
    allowed = scaled if never is None else scaled.masked_fill(never, -torch.inf)
    allowed = narrow(allowed, filters)
    mass = allowed.double().softmax(-1).cumsum(-1)  # (R, V)
    # Just below 1, so that rounding never leads past the last token that has any mass.
    at = (uniforms * (1 - 1e-12))[:, None] * mass[:, -1:]
    tokens = torch.searchsorted(mass, at, right=True).clamp(max=logits.shape[-1] - 1)
    logps = scaled.gather(1, tokens) - scaled.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), logps.squeeze(1)


def narrow(logits: Tensor, filters: Filters) -> Tensor:
    """(R, V) logits after temperature -> the same with -inf where a filter rules a token out."""
    if 0 < filters.top_k < logits.shape[-1]:
        least = logits.topk(filters.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if filters.top_p < 1:
        ascending, order = logits.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - filters.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if filters.min_p:
        probabilities = logits.softmax(-1)
        least = filters.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def silenced(tokens: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """(V,) bool, True for ``tokens``; None when there are none."""
    if not tokens:
        return None
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(tokens)] = True
    return mask


SMALL_COPY = 2**31
"""Bytes of language model up to which its weights are copied for rollouts unless told otherwise."""


class RolloutConfig(Config):
    """How completions are drawn, under TRL's names."""

    num_generations: int = Field(default=8, ge=2)
    """G: completions of each prompt, which are compared with each other."""
    max_completion_length: int = Field(default=256, ge=1)
    """A completion that has not ended after so many tokens is cut there."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, in sampling and in the loss."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that together have this probability are drawn."""
    top_k: int = Field(default=0, ge=0)
    """Only the k likeliest tokens are drawn; 0: all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Only tokens at least this times as likely as the likeliest are drawn."""
    shared_prefill: bool = True
    """Compute each prompt once for its G completions. Off: once for each completion."""
    shared_cache: bool = True
    """Completions read their prompt's keys and values where they are. Off: each has a copy."""
    merge_adapter: bool | None = None
    """Draw from weights with the adapter added in, which are held once more meanwhile. Off: the
    adapter is computed beside them for every token. None: on where that copy is small (2 GiB)."""
    fused_steps: bool | None = None
    """Take the steps after the prompt with fused weights, which are held once more meanwhile, where
    the language model's architecture is known. Off: with its own modules. None: as above."""
    drop_finished: bool = True
    """Take rows that have ended out of the batch."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """N completions, prompt by prompt.

    ``ids``: (N, C), the end token included; ``mask``: (N, C) int64, 1 for tokens, padding last.
    ``logps``: (N, C) float32 log-probability of each token in nats under the temperature, before
    ``top_k``, ``top_p`` and ``min_p``; 0 in the padding. ``ended``: (N,) bool, False where the
    length limit cut. ``texts``: without the end token.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    ended: Tensor
    texts: list[str]


class RolloutEngine(Protocol):
    """Where completions come from. :class:`HFRollouts` is the policy itself, in this process.

    The seam for a server such as vLLM: it is handed the live policy in each call, so it can push
    the trainable weights (the adapter and the connectors) before it asks; ``backbone.embed`` of the
    collated prompts gives the embeddings that such servers take in place of ids and media; one seed
    for each completion goes into the server's own sampling parameters. What it draws with other
    kernels has slightly other probabilities: set ``grpo.num_iterations`` above 1, or have the old
    log-probabilities computed, where that matters.
    """

    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """Complete B collated prompts.

        Args:
            model: the policy, in eval mode; wrappers allowed.
            prompts: a batch of :class:`~mmemo.data.collate.Collator` with ``generation=True`` on
                the model's device: left-padded ``input_ids``, ``attention_mask``,
                ``modality_ids`` (B, P) and the clips' features.
            seeds: B * G, prompt by prompt.
        """
        ...


def rollout_seed(seed: int, step: int | str, sample_id: str, index: int) -> int:
    """The seed of one completion, from what names it: 63 bits."""
    text = f"{seed}/{step}/{sample_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class HFRollouts:
    """Samples from the model itself, token by token."""

    def __init__(self, tokenizer: Any, backbone: nn.Module, section: RolloutConfig) -> None:
        self.tokenizer, self.section = tokenizer, section
        generation: Any = getattr(backbone, "generation_config", None)
        self.stops = stop_token_ids(generation, tokenizer)
        self.never: list[int] = list(getattr(generation, "suppress_tokens", None) or [])
        """Tokens that are never drawn: placeholders, which would have no features."""
        self._silent = {*self.stops, tokenizer.pad_token_id, tokenizer.bos_token_id}

    @torch.no_grad()
    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """See :class:`RolloutEngine`.

        Raises:
            ValueError: seeds do not make whole groups, or a prompt is not padded on the left.
        """
        batch = len(prompts["input_ids"])
        if len(seeds) % batch:
            raise ValueError(f"{len(seeds)} seeds do not make whole groups for {batch} prompts")
        if not bool(prompts["attention_mask"][:, -1].all()):
            raise ValueError("prompts must be padded on the left; collate with generation=True")
        group = len(seeds) // batch
        backbone = cast(Backbone, unwrap(model))
        if not self.section.shared_prefill:
            prompts, group = _repeated(prompts, group), 1
        longest = self.section.max_completion_length
        section, lm = self.section, backbone.language_model
        shared = section.shared_cache and group > 1
        small = sum(one.numel() * one.element_size() for one in lm.parameters()) <= SMALL_COPY
        merge = small if section.merge_adapter is None else section.merge_adapter
        fused = None
        if (small if section.fused_steps is None else section.fused_steps) and shared:
            fused = fuse(lm, adapter=merge) if use_prefixes(lm) else None
        merge = merge and fused is None
        with merged(model) if merge else nullcontext():
            state = Decoder(backbone, prompts, group, longest, shared=shared, fused=fused)
            return self._decode(state, seeds, longest)

    def _decode(self, state: Decoder, seeds: Sequence[int], longest: int) -> Rollouts:
        logits = state.logits
        device, number = logits.device, len(seeds)
        # Drawn on the CPU: the same numbers on every device.
        uniforms = torch.stack([_uniforms(seed, longest) for seed in seeds]).to(device)  # (N, C)
        shape, pad = (number, longest), self.tokenizer.pad_token_id
        ids = torch.full(shape, pad, dtype=torch.long, device=device)
        mask, logps = torch.zeros_like(ids), torch.zeros(shape, device=device)
        stops = torch.tensor(self.stops, device=device)
        never = silenced(self.never, logits.shape[-1], device)
        rows = torch.arange(number, device=device)  # (R,) places of the batch's rows in N
        alive = torch.ones_like(rows, dtype=torch.bool)  # (R,)
        for step in range(longest):
            tokens, chosen = draw(logits, uniforms[rows, step], self.section, never)
            here = rows[alive]
            ids[here, step], mask[here, step] = tokens[alive], 1
            logps[here, step] = chosen[alive]
            alive = alive & ~torch.isin(tokens, stops)
            left = int(alive.sum())
            if left == 0 or step + 1 == longest:
                break
            # Copying whole rows of a cache costs about as much as a step: not for a row or two.
            enough = len(rows) - 1 if state.shared else 0.75 * len(rows)
            if self.section.drop_finished and left <= enough:
                kept = alive.nonzero().squeeze(1)
                state.keep(kept)
                rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            logits = state.advance(tokens)
        width = int(mask.sum(1).max())
        ids, mask = ids[:, :width], mask[:, :width]
        last = ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        texts = [self._text(row) for row in ids.tolist()]
        return Rollouts(ids, mask, logps[:, :width], torch.isin(last, stops), texts)

    def _text(self, ids: list[int]) -> str:
        """As in evaluation: tags may be special tokens, so only padding and ends are left out."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        kept = [token for token in ids[:end] if token not in self._silent]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return text.strip()


def _repeated(prompts: Mapping[str, Any], group: int) -> dict[str, Any]:
    """Each prompt as ``group`` rows; its clip stays one."""
    rows = {
        name: prompts[name].repeat_interleave(group, 0)
        for name in ("input_ids", "attention_mask", "modality_ids")
    }
    clips: Tensor | None = prompts.get("clip_index")
    if clips is None:
        clips = torch.arange(len(prompts["input_ids"]), device=rows["input_ids"].device)
    return {**prompts, **rows, "clip_index": clips.repeat_interleave(group)}


def _uniforms(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
