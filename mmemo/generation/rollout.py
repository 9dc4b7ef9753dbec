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
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmemo.config import Config, dump
from mmemo.generation.decoder import Decoder, can_join
from mmemo.generation.free_memory import SHARE, fits, free_bytes
from mmemo.generation.graphs import StepGraph
from mmemo.generation.vllm.config import VllmConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.merging import merged, merged_bytes
from mmemo.models.attention.fused import fuse
from mmemo.models.attention.shared_prefix import use_prefixes
from mmemo.models.backbone import Backbone
from mmemo.models.generation import stop_token_ids

POLL_STEPS = 16
"""After how many tokens an accelerator is asked which rows have ended."""


class EngineConfig(Config):
    """What samples the completions."""

    engine: Literal["hf", "vllm"] = "hf"
    """What samples: ``hf`` the model itself, ``vllm`` a vLLM server (``rollout.vllm``), to which
    the adapter is handed over whenever it has changed."""
    vllm: VllmConfig = VllmConfig()
    """The server of ``engine: vllm``."""


class RolloutConfig(EngineConfig):
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
    for every token. None merges if the copy fits into the memory that is free."""
    fused_steps: bool | None = None
    """Decode with a fused copy of the weights, if the language model's architecture is supported,
    instead of with its own modules. None does so if the copy fits into the memory that is free."""
    drop_finished: bool = True
    """Remove finished completions from the batch."""
    poll_steps: int | None = Field(default=None, ge=1)
    """After how many tokens it is read which completions have ended. An accelerator has to wait for
    this. None is 16 on an accelerator and 1 on the CPU."""
    whole_steps: bool = True
    """Decode the prompts of all micro-batches of an optimizer step together, as many as fit into
    the memory that is free, instead of one micro-batch after the other. Each completion has random
    numbers of its own, so only rounding changes."""
    cuda_graphs: bool = False
    """Launch each fused step as one CUDA graph. The cache then has its full length from the start,
    and rows are removed only when half of them have ended. On the CPU the same steps run without a
    graph."""

    @model_validator(mode="after")
    def _fits_engine(self) -> RolloutConfig:
        if self.engine == "hf":
            if self.vllm.is_set:
                raise ValueError("rollout.vllm names a server; set rollout.engine to vllm")
            return self
        if not self.vllm.is_set:
            raise ValueError(
                "rollout.engine vllm needs a server; set rollout.vllm.url, rollout.vllm.gpus or "
                "rollout.vllm.colocate"
            )
        if not 0.01 <= self.temperature <= 2:
            raise ValueError("vLLM takes a rollout.temperature from 0.01 to 2")
        return self

    def deciding(self) -> dict[str, Any]:
        """The settings that decide what is drawn, as plain values. Where a server is does not, and
        what was made before there were servers stays as it is."""
        values = dump(self)
        del values["vllm"]
        if self.engine == "hf":
            del values["engine"]
        return values

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out by their probability."""
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """N completions, prompt by prompt.

    ``ids``: (N, C), including the end token. ``mask``: (N, C) int64, 1 for tokens; padding is last.
    ``logps``: (N, C) float32 log-probability of each token in nats at the temperature, before
    ``top_k``, ``top_p`` and ``min_p``; 0 in the padding. ``ended``: (N,) bool, False where the
    length limit cut the completion. ``texts``: N texts without the end token; each begins with what
    the generation prompt has opened, such as ``<think>``, which is in none of the ids. ``version``:
    name of the weights that a server drew with; empty where the model itself did.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor
    ended: Tensor
    texts: list[str]
    version: str = ""


class RolloutEngine(Protocol):
    """A source of completions: :class:`HFRollouts` samples from the policy in this process, and
    :class:`~mmemo.generation.vllm.engine.VllmRollouts` has a server do it.

    Each call receives the live policy, so an engine can hand the trained weights over first. A
    server's kernels give slightly different probabilities, which GRPO corrects by the
    log-probabilities of the :class:`Rollouts`, unless the engine has an attribute ``exact`` that is
    True: it says that they are those of the trainer at its weights.
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


@runtime_checkable
class JoiningEngine(Protocol):
    """A :class:`RolloutEngine` that draws for several batches of prompts together."""

    def generate_all(
        self, model: nn.Module, batches: Sequence[tuple[Mapping[str, Any], Sequence[int]]]
    ) -> list[Rollouts]:
        """:meth:`RolloutEngine.generate` for each of the batches."""
        ...


def exact(engine: RolloutEngine) -> bool:
    """Whether an engine's log-probabilities are the trainer's; False for one that does not say."""
    return bool(getattr(engine, "exact", False))


def rollout_seed(seed: int, step: int | str, sample_id: str, index: int) -> int:
    """A 63-bit seed for one completion, derived from its run, step, row and index."""
    # Not hash(), which differs between processes; 63 bits fit a signed 64-bit seed anywhere.
    text = f"{seed}/{step}/{sample_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


class Endings:
    """What ends a completion, what is never sampled, and how the text of one is read.

    Args:
        backbone: the model, whose generation config names its end tokens.
        opened: what the prompts leave open, which begins every text; see
            :attr:`~mmemo.models.chat.ChatRenderer.opened`.
    """

    def __init__(self, tokenizer: Any, backbone: nn.Module, *, opened: str = "") -> None:
        self.tokenizer, self.opened = tokenizer, opened
        generation: Any = getattr(backbone, "generation_config", None)
        self.stops = stop_token_ids(generation, tokenizer)
        self.never: list[int] = list(getattr(generation, "suppress_tokens", None) or [])
        """Tokens that are never sampled: placeholders, for which there would be no features."""
        self._silent = {*self.stops, tokenizer.pad_token_id, tokenizer.bos_token_id}

    def finish(self, ids: Tensor, logps: Tensor, stops: Tensor, version: str = "") -> Rollouts:
        """Completions of ``ids`` and ``logps`` (N, C) with anything behind the first stop token."""
        stop = torch.isin(ids, stops)
        mask = (stop.cumsum(1) - stop.long() == 0).long()
        width = int(mask.sum(1).max())
        ids, mask, stop = ids[:, :width], mask[:, :width], stop[:, :width]
        ids = ids.masked_fill(mask == 0, self.tokenizer.pad_token_id)
        # A row without a stop token has been cut by the limit.
        texts = [self._text(row) for row in ids.tolist()]
        return Rollouts(ids, mask, logps[:, :width] * mask, stop.any(1), texts, version)

    def _text(self, ids: list[int]) -> str:
        """The text as evaluation reads it: only padding, begin and end tokens are removed, because
        tags may be special tokens."""
        end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids))
        kept = [token for token in ids[:end] if token not in self._silent]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return (self.opened + text).strip()


class HFRollouts(Endings):
    """Samples from the policy itself, token by token."""

    exact = True
    """Its log-probabilities are the trainer's, but for rounding."""

    def __init__(
        self, tokenizer: Any, backbone: nn.Module, config: RolloutConfig, *, opened: str = ""
    ) -> None:
        """``opened`` is that of :class:`Endings`."""
        super().__init__(tokenizer, backbone, opened=opened)
        self.config = config

    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """See :class:`RolloutEngine`.

        Raises:
            ValueError: the number of seeds is no multiple of B, or a prompt is not left-padded.
        """
        return self.generate_all(model, [(prompts, seeds)])[0]

    @torch.no_grad()
    def generate_all(
        self, model: nn.Module, batches: Sequence[tuple[Mapping[str, Any], Sequence[int]]]
    ) -> list[Rollouts]:
        """:meth:`generate` for several batches with the same number of rows for each prompt. They
        are prefilled one after the other and decoded together, as many as fit into memory.

        Raises:
            ValueError: as :meth:`generate`, or the batches' prompts have different numbers of rows.
        """
        if not batches:
            return []
        groups = {_group_of(prompts, seeds) for prompts, seeds in batches}
        if len(groups) > 1:
            raise ValueError(f"batches drawn together need equal groups, not {sorted(groups)}")
        (group,) = groups
        given = [(prompts, list(seeds)) for prompts, seeds in batches]
        if not self.config.shared_prefill:
            given = [(_repeated(prompts, group), seeds) for prompts, seeds in given]
            group = 1
        backbone, config = cast(Backbone, unwrap(model)), self.config
        lm, longest = backbone.language_model, config.max_completion_length
        shared, device = config.shared_cache and group > 1, given[0][0]["input_ids"].device
        sizes = [_cache_bytes(lm, prompts, len(seeds), longest) for prompts, seeds in given]
        room = merged_bytes(lm) + max(sizes)
        merge, fused_steps = (
            fits(room, device) if wanted is None else wanted
            for wanted in (config.merge_adapter, config.fused_steps)
        )
        fused = None
        if fused_steps and shared and use_prefixes(lm):
            fused = fuse(lm, adapter=merge)
        found: list[Rollouts] = []
        # The fused copy has the adapter in its weights already.
        with merged(model, linear=merge and fused is None):
            for pack in self._packs(lm, sizes, device):
                chosen = [given[at] for at in pack]
                state = Decoder(
                    backbone,
                    [prompts for prompts, _ in chosen],
                    group,
                    longest,
                    shared=shared,
                    fused=fused,
                    fixed=config.cuda_graphs,
                )
                rows = [seed for _, seeds in chosen for seed in seeds]
                found += self._decode(state, rows, longest, [len(seeds) for _, seeds in chosen])
        return found

    def _packs(self, lm: Any, sizes: Sequence[int], device: torch.device) -> list[list[int]]:
        """Which batches are decoded together, given the bytes of their caches."""
        if not (self.config.whole_steps and len(sizes) > 1 and can_join(lm.config)):
            return [[at] for at in range(len(sizes))]
        # Twice, because the parts and what they are joined to exist side by side.
        most = SHARE * free_bytes(device) / 2
        packs: list[list[int]] = [[]]
        for at, size in enumerate(sizes):
            if packs[-1] and sum(sizes[one] for one in packs[-1]) + size > most:
                packs.append([])
            packs[-1].append(at)
        return packs

    def _decode(
        self, state: Decoder, seeds: Sequence[int], longest: int, parts: Sequence[int]
    ) -> list[Rollouts]:
        """``parts``: numbers of rows of the batches that were joined."""
        logits = state.logits
        device, number = logits.device, len(seeds)
        # Generated on the CPU, so that they are the same on every device.
        uniforms = torch.stack([_uniforms(seed, longest) for seed in seeds]).to(device)  # (N, C)
        pad, stops = self.tokenizer.pad_token_id, torch.tensor(self.stops, dtype=torch.long)
        ids = torch.full((number, longest), pad, dtype=torch.long, device=device)
        logps, stops = torch.zeros(ids.shape, device=device), stops.to(device)
        never = token_mask(self.never, logits.shape[-1], device)
        rows = torch.arange(number, device=device)  # (R,) index in N of each row in the batch
        poll = self.config.poll_steps or poll_of(device)

        def following(tokens: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            return sample_tokens(state.advance(tokens), numbers, self.config, never)

        step_on = StepGraph(following) if state.fixed else following
        new = sample_tokens(logits, uniforms[:, 0], self.config, never)
        said, started = [new], 0
        for step in range(1, longest + 1):
            if step % poll == 0 or step == longest:
                words, chosen = (torch.stack(one, 1) for one in zip(*said, strict=True))  # (R, t)
                ids[:, started:step].index_copy_(0, rows, words)
                logps[:, started:step].index_copy_(0, rows, chosen)
                said, started = [], step
                # Rows that have ended go on decoding until now; the mask hides what they said.
                alive = ~torch.isin(ids.index_select(0, rows)[:, :step], stops).any(1)
                left = int(alive.sum())  # waits for the device
                if left == 0 or step == longest:
                    break
                if self.config.drop_finished and left <= _few_enough(state, len(rows)):
                    kept = alive.nonzero().squeeze(1)
                    state.keep(kept)
                    rows, new = rows[kept], (new[0][kept], new[1][kept])
                    uniforms = uniforms[kept]
                    if isinstance(step_on, StepGraph):
                        step_on.forget()
            new = step_on(new[0], uniforms[:, step])
            said.append(new)
        return [
            self.finish(*one, stops)
            for one in zip(ids.split(list(parts)), logps.split(list(parts)), strict=True)
        ]


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
    scaled = logits if config.temperature == 1 else logits / config.temperature
    allowed = scaled if never is None else scaled.masked_fill(never, -torch.inf)
    allowed = filter_logits(allowed, config)
    # In float32, a running sum over the whole vocabulary loses the small probabilities.
    mass = allowed.softmax(-1).cumsum(-1, dtype=torch.float64)  # (R, V)
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


def poll_of(device: torch.device) -> int:
    """After how many tokens it is read which rows have ended: the CPU need not wait for itself."""
    return 1 if device.type == "cpu" else POLL_STEPS


def _few_enough(state: Decoder, rows: int) -> float:
    """Of how few rows it pays to remove the others. Copying rows of a cache costs about as much as
    a step, and recording a graph anew as several."""
    if state.fixed:
        return 0.5 * rows
    return rows - 1 if state.shared else 0.75 * rows


def _group_of(prompts: Mapping[str, Any], seeds: Sequence[int]) -> int:
    """Rows of each prompt."""
    batch = len(prompts["input_ids"])
    if not seeds or len(seeds) % batch:
        raise ValueError(f"{len(seeds)} seeds do not make whole groups for {batch} prompts")
    if not bool(prompts["attention_mask"][:, -1].all()):
        raise ValueError("prompts must be padded on the left; collate with generation=True")
    return len(seeds) // batch


def _cache_bytes(lm: Any, prompts: Mapping[str, Any], rows: int, room: int) -> int:
    """About the bytes of the keys and values of some prompts and of ``rows`` completions."""
    config = lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(lm.parameters()).element_size()
    each = 2 * config.num_hidden_layers * heads * width * size
    return each * (prompts["input_ids"].numel() + rows * room)


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
