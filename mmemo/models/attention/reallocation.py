"""Attention steering while a model answers, from the dominant modality to the other.

This is an attention function for transformers' ``AttentionInterface``. It computes SDPA, except
that the row of the newest token is computed explicitly, so that its weights can be changed and the
attention mass on each modality recorded. Nothing is trained, and no other row changes.

Three changes can be switched on with :func:`reallocating`: :class:`ReallocationConfig` (MoSEAR),
and two simpler ones to compare it with, :class:`AmplificationConfig` (PAI) and :class:`SinkConfig`
(VAR).

Shapes: B rows, P tokens of the prompt, L of a forward, S keys, n of the L tokens whose weights are
computed here, Q query heads, H heads of keys, E width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmemo.config import Config
from mmemo.errors import ConfigError, DataError
from mmemo.models.attention.record import (
    AttentionMass,
    AttentionPass,
    Change,
    Phase,
    Prompt,
    padded,
)
from mmemo.models.transformers_compat import attention_implementation, takes_attention

NAME = "mmemo_reallocation"
"""Name of the attention implementation."""

Kind = Literal["video", "audio", "face", "fusion"]
_LEAST = torch.finfo(torch.float32).eps
"""A side with no more attention mass than this has no weights to scale."""
_KEPT = "mmemo_prompt"  # attribute of a cache: what is known of the tokens in it
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments of attention that is more than a softmax of q k."""


class RowConfig(Config):
    """Layers and tokens whose attention changes."""

    layers: list[int] | None = None
    """Layers to change, counted from 0. None is layer 2 to the last but one, because the first and
    last layers mix modalities little."""
    phase: Phase = "both"
    """``prefill``: the prompt's last token, from which the answer's first is drawn; ``decode``: the
    answer's tokens."""


class ReallocationConfig(RowConfig):
    """When attention counts as unbalanced, and how much of it moves.

    Source: the reconstruction of MoSEAR's attention reallocation (arXiv 2508.01181), whose layers,
    threshold and share are not public. The sides are symmetric: exchanging them changes nothing.
    """

    sides: tuple[list[Kind], list[Kind]] = (["audio"], ["video", "face"])
    """Kinds of token on either side. Other kinds keep their attention, such as ``fusion``, which
    belongs to both sides."""
    # This is VAR's gate, because MoSEAR's is not public.
    head_gate: float = Field(default=0.2, ge=0, le=1)
    """Heads that spend less than this share of their attention on both sides do not change."""
    threshold: float = Field(default=2.0, ge=1)
    """Attention is unbalanced if one side gets more than this many times that of the other."""
    share: float = Field(default=0.4, ge=0, le=1)
    """Share of the stronger side's attention that moves to the other. It may overshoot near the
    threshold: with a threshold of 2, more than a quarter makes the weaker side the stronger."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Attention is divided by (number of the side's tokens) ** eta before the comparison: 0
    compares the sides' sums, 1 the means of their tokens."""

    @model_validator(mode="after")
    def _two_sides(self) -> ReallocationConfig:
        first, second = map(set, self.sides)
        if not first or not second or first & second:
            raise ValueError("sides needs at least one kind on each side, and none on both")
        return self

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention.record.Change`."""
        return self.sides

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention.record.Change`. With S_d the stronger side's mass and
        S_o the other's, the stronger side's weights are scaled by 1 - share and the other's by
        1 + share S_d / S_o."""
        # A decoding step consists of many small kernels whose launch costs more than their work, so
        # every test of the two masses is a column of one matrix product.
        weights = plain.flatten(1, 2)  # (B, Q n, S)
        mass = torch.bmm(weights, sets)  # (B, Q n, 2)
        asked = _asked(self.threshold, self.head_gate, self.share, mass.device)
        if self.eta:
            found = mass @ asked.masses
            found += mass / sets.sum(1, keepdim=True).clamp(min=1) ** self.eta @ asked.levels
        else:
            found = mass @ asked.both
        passed = (found[..., 2:] > asked.least).unflatten(-1, (4, 3)).all(-1)  # (B, Q n, 4)
        # A side below _LEAST fails its third test, so the clamp changes no gain that is used; it
        # only keeps the others finite.
        given = found[..., :2] / mass.clamp(min=_LEAST)
        change = torch.where(passed[..., 2:], given, 0.0).masked_fill_(passed[..., :2], -self.share)
        # addcmul leaves weights bit-identical wherever the change is 0.
        more = torch.bmm(change, sets.transpose(1, 2))
        return torch.addcmul(weights, weights, more).view_as(plain)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The tests of :class:`ReallocationConfig` as linear forms of a head's masses and levels.

    ``masses`` and ``levels`` are (2, 14), ``both`` is their sum. The first 2 columns are the mass
    that a side receives if the other dominates. The other 12 are 4 groups of 3 tests: the first
    side dominates, the second does, and the same two from the receiver's view. A test is passed
    above ``least`` (12,).
    """

    masses: Tensor
    levels: Tensor
    both: Tensor
    least: Tensor


@lru_cache(maxsize=16)
def _asked(threshold: float, gate: float, share: float, device: torch.device) -> _Asked:
    with torch.inference_mode(False):  # cached tensors must work outside inference mode too
        masses, levels = torch.zeros(2, 14), torch.zeros(2, 14)
        for side, other in ((0, 1), (1, 0)):
            masses[other, side] = share
            for at in (2 + 3 * side, 8 + 3 * other):
                levels[side, at], levels[other, at] = 1, -threshold  # this side dominates
                masses[:, at + 1] = 1  # the head attends to the sides at all
                masses[other, at + 2] = 1  # the other side has some attention
        # Every test is a strict one, but a head exactly at the gate does change: the bound is the
        # next number below it.
        from_gate = torch.nextafter(torch.tensor(gate), torch.tensor(-1.0))
        least = torch.tensor([0.0, float(from_gate), _LEAST] * 4)
        return _Asked(*(x.to(device) for x in (masses, levels, masses + levels, least)))


class AmplificationConfig(RowConfig):
    """More attention to all media tokens, whatever their balance.

    Source: PAI, Liu et al., arXiv 2407.21771: scores a of media tokens become
    a + alpha |a| before the softmax. Its contrast with a prompt without media is
    :class:`mmemo.models.attention.contrast.ContrastConfig`.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token whose attention is amplified."""
    # This is the value of PAI's released code.
    alpha: float = Field(default=0.2, ge=0)

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention.record.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention.record.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        # Hidden keys are not in `sets`. Their scores are the dtype's minimum, to which alpha |a|
        # could add enough to show them.
        return (scores + self.alpha * scores.abs() * media).softmax(-1, dtype=torch.float32)


class SinkConfig(RowConfig):
    """Attention that sinks waste goes to the other media tokens.

    Source: VAR, Kang et al., arXiv 2503.03321. There a sink shows in certain dimensions
    of its hidden state, which differ from model to model. Here a sink is a token with many times
    the mean weight, averaged over heads, which needs no knowledge of the model.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token that receive the freed attention."""
    sink: float = Field(default=20.0, gt=1)
    """A sink has more than this many times the mean weight of a token."""
    head_gate: float = Field(default=0.2, ge=0, le=1)
    """Heads that spend less than this share of their attention on the modalities do not change."""
    # The gate, this share and `keep` are the values of VAR's released code.
    most_sunk: float = Field(default=0.5, ge=0, le=1)
    """Heads with more than this share of that attention on sinks do not change either."""
    keep: float = Field(default=0.6, ge=0, le=1)
    """Share of their weight that sinks keep."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention.record.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention.record.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        # A hidden score is the dtype's minimum plus a finite number, hence the margin.
        seen = (scores > torch.finfo(scores.dtype).min / 2).sum(-1, keepdim=True)  # (B, Q, n, 1)
        # The mean weight is 1 / seen. Heads are averaged, so that a sink is one for all of them.
        sink = plain.mean(1, keepdim=True) * seen > self.sink  # (B, Q, n, S)
        sink = sink.to(plain.dtype)
        mass = (plain * media).sum(-1, keepdim=True)  # (B, Q, n, 1)
        rest = (plain * media * (1 - sink)).sum(-1, keepdim=True)
        freed = (1 - self.keep) * (plain * sink).sum(-1, keepdim=True)
        chosen = (mass >= self.head_gate) & (mass - rest <= self.most_sunk * mass)
        chosen &= rest > torch.finfo(plain.dtype).eps
        gain = torch.where(chosen, freed / rest.clamp(min=torch.finfo(plain.dtype).eps), 0.0)
        loss = torch.where(chosen, 1 - self.keep, 0.0)
        return plain * (1 + gain * media * (1 - sink) - loss * sink)


class Reallocation:
    """State of an active :func:`reallocating` context."""

    def __init__(
        self, change: Change | None, depth: int, ids: Tensor | None = None, *, record: bool = False
    ) -> None:
        """``depth`` is the number of decoder layers.

        Raises:
            ConfigError: ``change`` names a layer that does not exist, or there are too few.
        """
        named = None if change is None else change.layers
        layers = list(range(2, depth - 1)) if named is None else named
        if change is not None and (not layers or not all(0 <= one < depth for one in layers)):
            raise ConfigError(
                f"layers {layers} do not fit a decoder with layers 0 to {depth - 1}; list the "
                "layers whose attention is to change"
            )
        self.change, self.record = change, record
        self.layers = frozenset(layers if change is not None else ())
        self._ids, self._given = ids, None
        self._runs: list[Prompt] = []

    def take(self) -> list[AttentionMass]:
        """Attention mass recorded since the last call, one item per prompt in the order of the
        forward passes. A forward without a cache counts as a prompt of its own."""
        runs, self._runs = self._runs, []
        return [run.mass() for run in runs if run.notes]

    def on_carrier(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a module that takes ``modality_ids`` and does not pass them on."""
        self._given: Tensor | None = kwargs.get("modality_ids")

    def on_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of the decoder stack: passes an :class:`AttentionPass` to its layers.

        Raises:
            ConfigError: the model is being trained.
            DataError: it is not known which tokens are of which modality.
        """
        if module.training:
            raise ConfigError("attention is reallocated while a model answers; call model.eval()")
        given: Tensor | None = kwargs.pop("modality_ids", None)
        # Ids are used once, so that a forward without them never gets those of an earlier one.
        given, self._given = (self._given if given is None else given), None
        cache: Any = kwargs.get("past_key_values")
        tokens = next(
            x
            for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
            if x is not None
        )
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt = self._prompt(cache, given, len(tokens), past, tokens.shape[1])
        if cache is not None:
            # The cache knows its prompt, because contrastive decoding alternates between caches in
            # one context and a step brings only its new tokens.
            setattr(cache, _KEPT, prompt)
        found = AttentionPass(
            prompt,
            past,
            tokens.shape[1],
            change=self.change,
            layers=self.layers,
            record=self.record,
        )
        return args, {**kwargs, "reallocation": found}

    def after_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Post-hook: remember the prompt with a cache that the decoder made itself."""
        for one in output.values() if hasattr(output, "values") else output:
            if isinstance(one, Cache):
                setattr(one, _KEPT, kwargs["reallocation"].prompt)

    def _prompt(
        self, cache: Any, given: Tensor | None, rows: int, past: int, length: int
    ) -> Prompt:
        known: Prompt | None = getattr(cache, _KEPT, None) if past else None
        if known is not None:
            if len(known.ids) != rows:
                raise DataError(
                    f"the cache had {len(known.ids)} rows and now has {rows}, so that it is not "
                    "known which row is of which prompt; decode every row to the end with generate"
                )
            if self._ids is None and given is not None:
                known.ids = torch.cat([padded(known.ids, past), given.to(known.ids.device)], 1)
            return known
        ids = given if self._ids is None else self._ids
        if ids is None or (past and self._ids is None):
            raise DataError(
                "attention cannot be reallocated where it is not known which tokens of the prompt "
                "are of which modality; give modality_ids to reallocating() or with the prompt"
            )
        if rows % len(ids) or past + length < ids.shape[1]:
            raise DataError(
                f"modality_ids are of {len(ids)} rows of {ids.shape[1]} tokens but the model is "
                f"given {rows} of {past + length}; give those of this prompt"
            )
        # `generate` puts the answers of a prompt next to each other.
        prompt = Prompt(ids.repeat_interleave(rows // len(ids), 0), ids.shape[1])
        if self.record:
            self._runs.append(prompt)
        return prompt


@contextmanager
def reallocating(
    model: nn.Module,
    change: Change | None,
    modality_ids: Tensor | None = None,
    *,
    record: bool = False,
) -> Generator[Reallocation]:
    """Context in which ``model`` answers with changed attention; it is restored afterwards.

    Rows change from the prompt's last token on. A composed model learns where its prompt ends and
    what it contains from the ``modality_ids`` passed with it. Without a cache, each forward counts
    as a prompt of its own, of which only the last row changes; pass ``modality_ids`` here then.

    Args:
        model: a composed or native model, or a decoder, in eval mode; wrappers are allowed.
        change: one of the configs of this module. None records only.
        modality_ids: (B, P) of the prompts, padded on the left. If the model is given a multiple of
            B rows, each prompt is repeated. None takes them from each prompt's forward.
        record: record the attention mass of every layer, for :meth:`Reallocation.take`.

    Raises:
        ConfigError: the model's attention does not go through transformers' interface, or
            ``change`` does not fit it.
    """
    inner, decoder = _decoder(model)
    config: Any = decoder.config
    switch = Reallocation(change, config.num_hidden_layers, modality_ids, record=record)
    before = attention_implementation(config)
    if takes_attention(decoder) and before != NAME:
        decoder.set_attn_implementation(NAME)
    elif before == NAME:
        raise ConfigError("the model's attention is being reallocated already; leave that first")
    if attention_implementation(config) != NAME:
        raise ConfigError(
            f"{type(decoder).__name__} does not take its attention from transformers' interface, "
            "so that it cannot be reallocated; use a model that does"
        )
    hooks = [
        one.register_forward_pre_hook(switch.on_carrier, with_kwargs=True)
        for one in inner.modules()
        if one is not decoder and "modality_ids" in inspect.signature(type(one).forward).parameters
    ]
    hooks.append(decoder.register_forward_pre_hook(switch.on_decoder, with_kwargs=True))
    hooks.append(decoder.register_forward_hook(switch.after_decoder, with_kwargs=True))
    try:
        yield switch
    finally:
        for hook in hooks:
            hook.remove()
        decoder.set_attn_implementation(before)


def reallocation_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    reallocation: AttentionPass | None = None,
    modality_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query`` (B, Q, L, E), ``key``, ``value`` (B, H, S, E) -> (B, L, Q, E).

    Outside of :func:`reallocating`, the model's forward must be given ``modality_ids`` (B, S) of
    all keys, and the last row changes by the defaults of :class:`ReallocationConfig`.

    Raises:
        ConfigError: this kind of attention is not supported.
        DataError: there are no modality ids.
    """
    found = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if found:
        raise ConfigError(f"attention with '{found[0]}' cannot be reallocated; use another model")
    if reallocation is None:
        reallocation = _alone(module, query, key, modality_ids)
    at: Any = module.layer_idx
    rows = reallocation.rows(at)
    out: Tensor | None = None
    if len(rows) < query.shape[2]:
        attend: Any = sdpa_attention_forward
        out, _ = attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        # Layers that do not change give SDPA's own output, bit for bit.
        if not rows or out is None:
            return _present(out), None
    asked = query[:, :, rows.start : rows.stop]
    batch, queries, n, width = asked.shape
    heads = key.shape[1]
    # Grouped-query attention without repeating keys: query heads of a key head share one product.
    scores = torch.matmul(asked.reshape(batch, heads, -1, width), key.transpose(2, 3))
    scores = scores.view(batch, queries, n, -1) * (width**-0.5 if scaling is None else scaling)
    weights = reallocation.weigh(at, scores, attention_mask).to(value.dtype)
    own = torch.matmul(weights.view(batch, heads, -1, key.shape[2]), value)
    own = own.view(batch, queries, n, -1).transpose(1, 2)
    if out is not None:
        own = torch.cat([out[:, : rows.start], own, out[:, rows.stop :]], 1)
    return own.contiguous(), None


def _alone(module: Any, query: Tensor, key: Tensor, modality_ids: Tensor | None) -> AttentionPass:
    """The pass of a forward outside of :func:`reallocating`."""
    if modality_ids is None or modality_ids.shape[-1] != key.shape[2]:
        raise DataError(
            f"attention '{NAME}' needs to know the modality of every key; use reallocating() or "
            "give the forward modality_ids of all tokens up to its last"
        )
    switch = Reallocation(ReallocationConfig(), module.config.num_hidden_layers)
    length, prompt = query.shape[2], Prompt(modality_ids, key.shape[2])
    past = key.shape[2] - length
    return AttentionPass(prompt, past, length, change=switch.change, layers=switch.layers)


def _decoder(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model inside wrappers, and its decoder stack."""
    inner: Any = model
    while isinstance(inner, PeftModel) or isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner.module
    found: Any = getattr(inner, "language_model", None)
    if found is None and hasattr(inner, "get_decoder"):
        found = inner.get_decoder()
    if not isinstance(found, nn.Module) or not hasattr(found, "set_attn_implementation"):
        raise ConfigError(
            f"{type(inner).__name__} has no decoder stack whose attention could be reallocated"
        )
    return inner, found


def _present(out: Tensor | None) -> Tensor:
    assert out is not None
    return out


AttentionInterface.register(NAME, reallocation_attention)
# Without a mask function under this name, transformers would make no mask at all.
AttentionMaskInterface.register(NAME, sdpa_mask)
