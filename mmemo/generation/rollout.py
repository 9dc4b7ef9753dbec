"""Rollouts: samples G completions of each prompt for policy optimisation, with one shared prefill.

A prompt with media is long and its completions are short. Its features are embedded once, the
prompt is prefilled once per group, and all G rows read the same key-value cache; finished rows
leave the batch. Each completion is sampled with random numbers of its own, so it depends neither on
the rest of the batch nor on whether the run was resumed (except for rounding).

B prompts, P tokens of the longest, G completions of each, N = B * G completions prompt by prompt,
C tokens of the longest, R rows still in the batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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

SMALL_COPY = 2**31
"""Size in bytes of the largest language model whose weights are copied for rollouts by default."""


class RolloutConfig(Config):
    """How completions are sampled. Fields have TRL's names where it has them."""

    num_generations: int = Field(default=8, ge=2)
    """G: number of completions per prompt, which are compared with each other."""
    max_completion_length: int = Field(default=256, ge=1)
    """Maximum length of a completion in tokens; a longer one is cut."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. The loss divides the logits by it, too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens whose total probability is this."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens; 0 samples from all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens at least this times as likely as the most likely one. None disables
    it."""
    shared_prefill: bool = True
    """Prefill each prompt once for all of its completions instead of once for each."""
    shared_cache: bool = True
    """Let completions read their prompt's keys and values in place instead of each having a
    copy."""
    merge_adapter: bool | None = None
    """Generate with the adapter merged into a copy of the weights, instead of computing the adapter
    for every token. None merges if the language model has at most 2 GiB."""
    fused_steps: bool | None = None
    """Decode with a fused copy of the weights, if the language model's architecture is supported,
    instead of with its own modules. None does so if the language model has at most 2 GiB."""
    drop_finished: bool = True
    """Remove finished completions from the batch."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """N completions, prompt by prompt.

    ``ids``: (N, C), including the end token. ``mask``: (N, C) int64, 1 for tokens; padding is last.
    ``logps``: (N, C) float32 log-probability of each token in nats at the temperature, before
    ``top_k``, ``top_p`` and ``min_p``; 0 in the padding. ``ended``: (N,) bool, False where the
    length limit cut the completion. ``texts``: N texts without the end token; each begins with what
    the generation prompt has opened, such as ``<think>``, which is in none of the ids.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    ended: Tensor
    texts: list[str]


class RolloutEngine(Protocol):
    """A source of completions. :class:`HFRollouts` samples from the policy in this process.

    This is the interface for a server such as vLLM. Each call receives the live policy, so an
    engine can push the trainable weights (the adapter and the connectors) first; ``backbone.embed``
    of the collated prompts gives the embeddings that such servers take in place of ids and media;
    and the seed of each completion goes into the server's sampling parameters. A server's kernels
    give slightly different probabilities; where that matters, set ``grpo.num_iterations`` above 1,
    or have the old log-probabilities recomputed.
    """

    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """Complete B collated prompts.

        Args:
            model: the policy in eval mode, possibly wrapped.
            prompts: a batch of :class:`~mmemo.data.collate.Collator` with ``generation=True`` on
                the model's device: left-padded ``input_ids``, ``attention_mask``,
                ``modality_ids`` (B, P) and the clips' features.
            seeds: B * G seeds, prompt by prompt.
        """
        ...


def rollout_seed(seed: int, step: int | str, sample_id: str, index: int) -> int:
    """A 63-bit seed for one completion, derived from its run, step, row and index."""
    # Not hash(), which differs between processes; 63 bits fit a signed 64-bit seed anywhere.
    text = f"{seed}/{step}/{sample_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class HFRollouts:
    """Samples from the policy itself, token by token."""

    def __init__(
        self, tokenizer: Any, backbone: nn.Module, config: RolloutConfig, *, opened: str = ""
    ) -> None:
        """``opened``: what the prompts leave open, which begins every text; see
        :attr:`~mmemo.models.chat.ChatRenderer.opened`."""
        self.tokenizer, self.config, self.opened = tokenizer, config, opened
        generation: Any = getattr(backbone, "generation_config", None)
        self.stops = stop_token_ids(generation, tokenizer)
        self.never: list[int] = list(getattr(generation, "suppress_tokens", None) or [])
        """Tokens that are never sampled: placeholders, for which there would be no features."""
        self._silent = {*self.stops, tokenizer.pad_token_id, tokenizer.bos_token_id}

    @torch.no_grad()
    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """See :class:`RolloutEngine`.

        Raises:
            ValueError: the number of seeds is no multiple of B, or a prompt is not left-padded.
        """
        batch = len(prompts["input_ids"])
        if len(seeds) % batch:
            raise ValueError(f"{len(seeds)} seeds do not make whole groups for {batch} prompts")
        if not bool(prompts["attention_mask"][:, -1].all()):
            raise ValueError("prompts must be padded on the left; collate with generation=True")
        group = len(seeds) // batch
        backbone = cast(Backbone, unwrap(model))
        if not self.config.shared_prefill:
            prompts, group = _repeated(prompts, group), 1
        longest = self.config.max_completion_length
        config, lm = self.config, backbone.language_model
        shared = config.shared_cache and group > 1
        small = sum(one.numel() * one.element_size() for one in lm.parameters()) <= SMALL_COPY
        merge = small if config.merge_adapter is None else config.merge_adapter
        fused = None
        if (small if config.fused_steps is None else config.fused_steps) and shared:
            fused = fuse(lm, adapter=merge) if use_prefixes(lm) else None
        # The fused copy has the adapter in its weights already.
        with merged(model, linear=merge and fused is None):
            state = Decoder(backbone, prompts, group, longest, shared=shared, fused=fused)
            return self._decode(state, seeds, longest)

    def _decode(self, state: Decoder, seeds: Sequence[int], longest: int) -> Rollouts:
        logits = state.logits
        device, number = logits.device, len(seeds)
        # Generated on the CPU, so that they are the same on every device.
        uniforms = torch.stack([_uniforms(seed, longest) for seed in seeds]).to(device)  # (N, C)
        shape, pad = (number, longest), self.tokenizer.pad_token_id
        ids = torch.full(shape, pad, dtype=torch.long, device=device)
        mask, logps = torch.zeros_like(ids), torch.zeros(shape, device=device)
        stops = torch.tensor(self.stops, device=device)
        never = token_mask(self.never, logits.shape[-1], device)
        rows = torch.arange(number, device=device)  # (R,) index in N of each row in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # (R,)
        for step in range(longest):
            tokens, chosen = sample_tokens(logits, uniforms[rows, step], self.config, never)
            # Finished rows that are still in the batch go on decoding, but nothing of them is kept.
            here = rows[alive]
            ids[here, step], mask[here, step] = tokens[alive], 1
            logps[here, step] = chosen[alive]
            alive = alive & ~torch.isin(tokens, stops)
            left = int(alive.sum())
            if left == 0 or step + 1 == longest:
                break
            # Copying rows of a cache costs about as much as a step, so not for a row or two.
            enough = len(rows) - 1 if state.shared else 0.75 * len(rows)
            if self.config.drop_finished and left <= enough:
                kept = alive.nonzero().squeeze(1)
                state.keep(kept)
                rows, tokens, alive = rows[kept], tokens[kept], alive[kept]
            logits = state.advance(tokens)
        width = int(mask.sum(1).max())
        ids, mask = ids[:, :width], mask[:, :width]
        # (N,) last token of each completion, a stop token unless the limit has cut it.
        last = ids.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        texts = [self._text(row) for row in ids.tolist()]
        return Rollouts(ids, mask, logps[:, :width], torch.isin(last, stops), texts)

    def _text(self, ids: list[int]) -> str:
        """The text as evaluation reads it: only padding, begin and end tokens are removed, because
        tags may be special tokens."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        kept = [token for token in ids[:end] if token not in self._silent]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return (self.opened + text).strip()


def sample_tokens(
    logits: Tensor, uniforms: Tensor, config: RolloutConfig, never: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token per row by inverting the cumulative distribution at the row's random number.

    Args:
        logits: (R, V) float32.
        uniforms: (R,) float64 in [0, 1).
        config: temperature and filters.
        never: (V,) bool, tokens that cannot be sampled.

    Returns:
        The tokens (R,), and their log-probabilities (R,) in nats at the temperature alone.
    """
    scaled = logits / config.temperature
    allowed = scaled if never is None else scaled.masked_fill(never, -torch.inf)
    allowed = filter_logits(allowed, config)
    # In float32, a sum over the whole vocabulary loses the small probabilities.
    mass = allowed.double().softmax(-1).cumsum(-1)  # (R, V)
    # Slightly below 1, so that rounding never leads beyond the last token with any mass.
    at = (uniforms * (1 - 1e-12))[:, None] * mass[:, -1:]
    # right=True passes over tokens without mass, whose cumulative sum is the one before theirs.
    tokens = torch.searchsorted(mass, at, right=True).clamp(max=logits.shape[-1] - 1)
    # Without the filters, which the log-probabilities of the loss do not have either.
    logps = scaled.gather(1, tokens) - scaled.logsumexp(-1, keepdim=True)
    return tokens.squeeze(1), logps.squeeze(1)


def filter_logits(logits: Tensor, config: RolloutConfig) -> Tensor:
    """(R, V) logits after temperature, with -inf for tokens that a filter excludes. Filters and
    their order are those of transformers."""
    if 0 < config.top_k < logits.shape[-1]:
        lowest = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if config.top_p < 1:
        ascending, order = logits.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        # The most likely token always stays, however small top_p is.
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if config.min_p:
        probabilities = logits.softmax(-1)
        lowest = config.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < lowest, -torch.inf)
    return logits


def token_mask(tokens: Sequence[int], size: int, device: torch.device) -> Tensor | None:
    """(V,) bool mask of ``tokens``; None if there are none."""
    if not tokens:
        return None
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(tokens)] = True
    return mask


def _repeated(prompts: Mapping[str, Any], group: int) -> dict[str, Any]:
    """The prompts with ``group`` rows each, which share one clip."""
    rows = {
        name: prompts[name].repeat_interleave(group, 0)
        for name in ("input_ids", "attention_mask", "modality_ids", "mrope_positions")
        if name in prompts
    }
    clips: Tensor | None = prompts.get("clip_index")
    if clips is None:
        clips = torch.arange(len(prompts["input_ids"]), device=rows["input_ids"].device)
    return {**prompts, **rows, "clip_index": clips.repeat_interleave(group)}


def _uniforms(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
