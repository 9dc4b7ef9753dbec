"""Log-probabilities of several continuations of a prompt, with the prompt computed only once.

GRPO scores G completions of a prompt up to three times per step, DPO a chosen and several rejected
answers, and the prompt that they share is the long part. Here prompts and continuations form one
packed sequence ``[P1 | P2 | ... | c1 | c2 | ...]``, in which a continuation attends to its own
prompt and itself, and its positions continue from the prompt's. :func:`packed_logps` gives the same
numbers and gradients as :func:`naive_logps`, in which every continuation has a copy of its prompt.

B prompts, P tokens of the longest, N continuations (G of each prompt in GRPO), C tokens of the
longest, T tokens of the packed sequence, K scored tokens, D hidden size, V vocabulary.

Source: Liu et al., Prefix Grouper, arXiv 2506.05433; Wang and Hegde, arXiv 2410.20305 (for DPO).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmemo.errors import ConfigError
from mmemo.generation.packing import (
    REAL,
    Packed,
    PackedRows,
    block_mask,
    check_shapes,
    pack,
    prompt_tensors,
    real_tokens,
    rows_mask,
)
from mmemo.generation.token_scores import TokenScores, chunk_size, token_scores
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.routing import routed
from mmemo.models.attention.shared_prefix import RowsLayout, poison_mask, use_prefixes
from mmemo.models.backbone import TEXT, Backbone, layer_inputs, prompt_positions
from mmemo.models.transformers_compat import attention_implementation


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of N continuations.

    ``logps``: (N, C) log-probability of each token in nats, with gradient. ``entropies``: (N, C)
    entropy in nats of the distribution at each token, without gradient, if requested. Both are 0 in
    the padding; an empty continuation is a row of zeros.
    """

    logps: Tensor
    entropies: Tensor | None = None


def packed_logps(
    model: nn.Module,
    prompts: Mapping[str, Any],
    continuation_ids: Tensor,
    continuation_mask: Tensor,
    prompt_index: Tensor,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    max_logits: int | None = None,
) -> Scores:
    """Score every continuation, with each prompt computed once. Follows autograd's grad mode.

    Args:
        model: a backbone, possibly wrapped by PEFT or a training engine.
        prompts: a collated batch: ``input_ids``, ``modality_ids`` (B, P), the clips' features and,
            if there is padding (on either side), ``attention_mask``.
        continuation_ids: (N, C).
        continuation_mask: (N, C), non-zero for tokens; padding is last.
        prompt_index: (N,) index of each continuation's prompt, in any order.
        temperature: divisor of the logits, as in sampling.
        entropies: also compute entropies.
        max_logits: as for :func:`~mmemo.generation.token_scores.token_scores`.

    Raises:
        ConfigError: the language model's attention does not support a block mask.
        ValueError: shapes do not match, or a continuation has padding before a token.
    """
    arguments = (prompts, continuation_ids, continuation_mask, prompt_index)
    return _score(model, _packed, *arguments, temperature, entropies, max_logits)


def naive_logps(
    model: nn.Module,
    prompts: Mapping[str, Any],
    continuation_ids: Tensor,
    continuation_mask: Tensor,
    prompt_index: Tensor,
    *,
    temperature: float = 1.0,
    entropies: bool = False,
    max_logits: int | None = None,
) -> Scores:
    """Score every continuation with the ordinary forward pass, each with its own copy of the
    prompt.

    The alternative to :func:`packed_logps` that works with any attention. Arguments, result and
    ``ValueError`` are the same.
    """
    arguments = (prompts, continuation_ids, continuation_mask, prompt_index)
    return _score(model, _naive, *arguments, temperature, entropies, max_logits)


_Predicting = tuple[Tensor, Tensor, Tensor]
"""Hidden states (K, D), the tokens that they predict (K,), and their indices (K,) in a flattened
(N, C)."""


def _score(
    model: nn.Module,
    forward_pass: Callable[[Backbone, Mapping[str, Any], Tensor, Tensor, Tensor], _Predicting],
    prompts: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor,
    prompt_index: Tensor,
    temperature: float,
    entropies: bool,
    max_logits: int | None,
) -> Scores:
    backbone = cast(Backbone, unwrap(model))
    check_shapes(len(prompts["input_ids"]), ids, mask, prompt_index)

    def compute() -> tuple[Tensor, ...]:
        hidden, targets, slots = forward_pass(backbone, prompts, ids, mask, prompt_index)
        found = token_scores(
            backbone,
            hidden,
            targets,
            temperature=temperature,
            entropies=entropies,
            max_logits=max_logits,
        )
        return tuple(
            # Slots are distinct, so they are copied; adding at indices is slower and, on CUDA, not
            # deterministic.
            x.new_zeros(ids.numel()).index_copy(0, slots, x).view(ids.shape)
            for x in (found.logps, found.entropies)
            if x is not None
        )

    return Scores(*_as_forward(model, cast(nn.Module, backbone), compute))


def _as_forward(
    model: nn.Module, backbone: nn.Module, compute: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Run ``compute()`` as the forward pass of ``model``, a wrapper around ``backbone``.

    Wrappers rely on seeing each forward pass: if the engine itself is never called, DeepSpeed's
    stage 3 silently overwrites the gradient of one micro-batch with that of the next.
    """
    if model is backbone:
        return compute()
    # A wrapper may have set a forward on this instance already, which is put back.
    before = vars(backbone).get("forward")

    def forward(*_: Any, **__: Any) -> tuple[Tensor, ...]:
        return compute()

    setattr(backbone, "forward", forward)  # noqa: B010 - an instance attribute, no method
    try:
        return model()
    finally:
        delattr(backbone, "forward")
        if before is not None:
            setattr(backbone, "forward", before)  # noqa: B010


def _packed(
    backbone: Backbone,
    prompts: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor,
    prompt_index: Tensor,
) -> _Predicting:
    lm, config = backbone.language_model, cast(Any, backbone.language_model.config)
    packed = pack(backbone, prompts, ids, mask, prompt_index)
    _check_window(config, int(packed.position_ids.max()) + 1)
    embeds = embed_packed(backbone, packed, prompts)
    if use_prefixes(lm):
        # A layer that loses ``prefix`` fails at this mask instead of attending to everything.
        arguments: dict[str, Any] = {"attention_mask": poison_mask(embeds), "prefix": packed.layout}
    else:
        arguments = {"attention_mask": _attention_mask(block_mask(packed), config, embeds.dtype)}
    embeds, routing = routed(lm, embeds, packed.prompt_modality_ids, packed.owner[:1])
    arguments |= {"position_ids": packed.position_ids, **routing}
    deep = layer_inputs(backbone, packed.prompt_modality_ids, prompts)
    arguments |= {name: _in_pack(value, packed) for name, value in deep.items()}
    given = REAL.set(real_tokens(packed))
    try:
        hidden = lm(inputs_embeds=embeds, use_cache=False, **arguments).last_hidden_state[0]
    finally:
        REAL.reset(given)
    # (T, D). Only positions that predict a scored token go on to the head, since its logits are the
    # largest tensor of the pass.
    return hidden.index_select(0, packed.predictors), packed.targets, packed.slots


def _naive(
    backbone: Backbone,
    prompts: Mapping[str, Any],
    ids: Tensor,
    mask: Tensor,
    prompt_index: Tensor,
) -> _Predicting:
    prompt_ids, kinds, prompt_mask = prompt_tensors(prompts)
    P, at = prompt_ids.shape[1], torch.arange(prompt_ids.shape[1] + ids.shape[1], device=ids.device)
    clips = prompts.get("clip_index")
    clips = torch.arange(len(prompt_ids), device=ids.device) if clips is None else clips
    # Copies of a prompt point at the same clip, whose features are not copied.
    features = {**prompts, "clip_index": clips[prompt_index]}
    row_ids = torch.cat([prompt_ids[prompt_index], ids], 1)  # (N, P + C)
    row_kinds = torch.cat([kinds[prompt_index], torch.full_like(ids, TEXT)], 1)
    row_mask = torch.cat([prompt_mask[prompt_index].long(), mask.long()], 1)
    embeds = backbone.embed(row_ids, row_kinds, features)
    # Copies of a prompt count once in the experts' balance, as they do in the packed pass.
    repeats = (prompt_index[:, None] == prompt_index).tril(-1).any(1)
    first = (~repeats).nonzero().squeeze(1)
    embeds, routing = routed(backbone.language_model, embeds, row_kinds, distinct=first)
    hidden = backbone.language_model(
        inputs_embeds=embeds,
        # Counted anew for whole rows, so that this pass can check how packed ones continue.
        position_ids=backbone.positions(row_ids, row_mask, features),
        attention_mask=row_mask,
        use_cache=False,
        **layer_inputs(backbone, row_kinds, features),
        **routing,
    ).last_hidden_state  # (N, P + C, D)
    # (N, C) position that predicts each token, then its index in a flattened (N, P + C).
    before = at[P - 1 : -1].expand(ids.shape).clone()
    # A continuation's first token is predicted by its prompt's last one, wherever padding puts it.
    before[:, 0] = (at[:P] * prompt_mask).amax(1)[prompt_index]
    before = before + torch.arange(len(ids), device=ids.device)[:, None] * len(at)
    slots = mask.flatten().nonzero().squeeze(1)
    predicting = hidden.flatten(0, 1).index_select(0, before.flatten()[slots])
    return predicting, ids.flatten()[slots], slots


def row_scores(
    model: nn.Module,
    rows: Mapping[str, Any],
    predictors: Tensor,
    targets: Tensor,
    *,
    packed: PackedRows | None = None,
    max_logits: int | None = None,
) -> TokenScores:
    """Score tokens of whole rows, prompt and answer together. Follows autograd's grad mode.

    Args:
        model: a backbone, possibly wrapped by PEFT or a training engine.
        rows: a collated batch: ``input_ids``, ``modality_ids``, ``attention_mask`` (B, L) and the
            clips' features.
        predictors: (K,) positions in the flattened (B, L), or in the packed sequence, whose hidden
            states predict a scored token.
        targets: (K,) the scored tokens.
        packed: compute the rows as one sequence without padding.
        max_logits: as for :func:`~mmemo.generation.token_scores.token_scores`.

    Returns:
        Log-probabilities, and which tokens are the most likely ones.

    Raises:
        ConfigError: the language model's attention does not support packed rows.
    """
    backbone = cast(Backbone, unwrap(model))

    def compute() -> tuple[Tensor, ...]:
        ids, kinds, mask = prompt_tensors(rows)
        embeds = backbone.embed(ids, kinds, rows)
        at = prompt_positions(backbone, rows)  # (B, L) or (3, B, L)
        deep = layer_inputs(backbone, kinds, rows)
        lm = backbone.language_model
        given: dict[str, Any] = {"attention_mask": mask.long()}
        if packed is None:
            embeds, routing = routed(lm, embeds, kinds)
        else:
            places = packed.places
            embeds = embeds.flatten(0, 1).index_select(0, places)[None]  # (1, T, D)
            at = at.flatten(-2).index_select(-1, places).unsqueeze(-2)
            deep = _in_order(deep, places)
            owner = (places // ids.shape[1])[None]
            embeds, routing = routed(lm, embeds, kinds, owner, places=places)
            given = _rows_arguments(lm, packed.layout, embeds)
        given |= {**deep, **routing}
        out = lm(inputs_embeds=embeds, position_ids=at, use_cache=False, **given)
        hidden = out.last_hidden_state  # (B, L, D) or (1, T, D)
        # Only positions that predict a scored token go on to the head.
        picked = hidden.flatten(0, 1).index_select(0, predictors)
        found = token_scores(backbone, picked, targets, correct=True, max_logits=max_logits)
        assert found.correct is not None
        return found.logps, found.correct

    logps, correct = _as_forward(model, cast(nn.Module, backbone), compute)
    return TokenScores(logps, correct=correct)


@dataclass(frozen=True, slots=True)
class Ranks:
    """How unlikely the tokens of N continuations are. ``tails``: (N, C) probability of all tokens
    that are at most as likely as this one, at temperature 1. ``best``: (N, C) the most likely
    token. Padding has a tail of 1 and the token 0."""

    tails: Tensor
    best: Tensor


@torch.no_grad()
def token_ranks(
    model: nn.Module,
    prompts: Mapping[str, Any],
    continuation_ids: Tensor,
    continuation_mask: Tensor,
    prompt_index: Tensor,
    *,
    shared_prefix: bool = True,
    max_logits: int | None = None,
) -> Ranks:
    """Rank each token of continuations in the distribution that it was drawn from.

    Arguments as for :func:`packed_logps`; ``shared_prefix=False`` gives each continuation a copy of
    its prompt. The modules are called directly, without the wrapper of a training engine.
    """
    backbone = cast(Backbone, unwrap(model))
    ids, mask = continuation_ids, continuation_mask
    check_shapes(len(prompts["input_ids"]), ids, mask, prompt_index)
    forward_pass = _packed if shared_prefix else _naive
    hidden, targets, slots = forward_pass(backbone, prompts, ids, mask, prompt_index)
    scale: Any = getattr(backbone, "_scale", None) or nn.Identity()
    tails, best = torch.ones(ids.numel(), device=ids.device), torch.zeros_like(ids).flatten()
    size = chunk_size(backbone, max_logits) or max(1, len(hidden))
    pieces = zip(hidden.split(size), targets.split(size), slots.split(size), strict=True)
    for states, tokens, places in pieces:
        logits = scale(backbone.lm_head(states)).float()
        # Summed from below: next to the mass of the likely tokens, a tail would be rounding.
        below = logits <= logits.gather(1, tokens[:, None])
        tails[places] = (logits.softmax(-1) * below).sum(-1)
        best[places] = logits.argmax(-1)
    return Ranks(tails.view(ids.shape), best.view(ids.shape))


def _rows_arguments(lm: nn.Module, layout: RowsLayout, embeds: Tensor) -> dict[str, Any]:
    """The keyword arguments with which the language model computes packed rows."""
    config = cast(Any, lm.config)
    _check_window(config, layout.lengths[0])
    if use_prefixes(lm):
        # A layer that loses ``prefix`` fails at this mask instead of attending to everything.
        return {"attention_mask": poison_mask(embeds), "prefix": layout}
    mask = rows_mask(layout.lengths, embeds.device)
    return {"attention_mask": _attention_mask(mask, config, embeds.dtype)}


def embed_packed(backbone: Backbone, packed: Packed, prompts: Mapping[str, Any]) -> Tensor:
    """(1, T, D) embeddings: the prompts with their features, then the continuations' tokens."""
    embedded = backbone.embed(packed.prompt_ids, packed.prompt_modality_ids, prompts)
    table = cast(Any, backbone.language_model).get_input_embeddings()
    text: Tensor = table(packed.continuation_ids).to(embedded.dtype)
    return torch.cat([embedded.flatten(0, 1)[None], text], 1)


def _in_pack(value: Any, packed: Packed) -> Any:
    """What is per token, (B, P), for all tokens of a pack, (1, T). Continuations have no media."""
    if not isinstance(value, Tensor):
        return value
    behind = packed.continuation_ids.shape[1]
    return functional.pad(value.flatten(), (0, behind))[None]


def _in_order(deep: Mapping[str, Any], places: Tensor) -> dict[str, Any]:
    """What :func:`~mmemo.models.backbone.layer_inputs` gives for rows (B, L), for their tokens at
    ``places`` (T,) of the flattened rows, as (1, T). Lists are of the marked tokens, in order."""
    masks = [value for value in deep.values() if isinstance(value, Tensor)]
    if not masks:
        return dict(deep)
    marked = masks[0].flatten()
    packed = marked.index_select(0, places)
    order = (marked.cumsum(0) - 1).index_select(0, places)[packed]
    return {
        name: packed[None] if isinstance(value, Tensor) else [x[order] for x in value]
        for name, value in deep.items()
    }


def _check_window(config: Any, longest: int) -> None:
    """Check that every layer attends to all of ``longest`` positions.

    Raises:
        ConfigError: some layers do not.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    # Without ``layer_types``, a configured window applies to every layer.
    slides = "sliding_attention" in kinds or not getattr(config, "layer_types", None)
    short = slides and window is not None and window < longest
    if short or kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"the language model has layers that do not attend to all positions ({', '.join(kinds)}"
            "), so that nothing can be packed into one sequence; switch packing and the shared "
            "prefix off"
        )


def _attention_mask(mask: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """The block mask in the form that the attention implementation takes.

    Raises:
        ConfigError: it takes none.
    """
    name = attention_implementation(config)
    if name == "sdpa":
        return mask
    if name == "eager":
        # eager adds its mask to the scores; transformers' own masks have this number, not -inf.
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    raise ConfigError(
        f"attention '{name}' supports no block mask, so that nothing can be packed into one "
        "sequence; set model.attn_implementation to sdpa or eager, or switch packing and the "
        "shared prefix off"
    )
