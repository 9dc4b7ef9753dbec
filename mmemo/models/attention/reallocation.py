"""Attention moved from the modality that takes most of it to the other, while a model answers.

An attention function for transformers' interface: SDPA, but that the row of the newest token is
computed in the open, where weights may be changed and the mass on each modality noted. Nothing is
trained, and no other row changes. :mod:`mmemo.models.attention.reallocation` has two simpler
changes for the same switch.

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
"""Of the attention implementation."""

Kind = Literal["video", "audio", "face", "fusion"]
_LEAST = torch.finfo(torch.float32).eps
"""A side with no more of the mass has no weights to scale."""
_KEPT = "mmemo_prompt"  # on a cache: what is known of the tokens in it
_UNKNOWN = (
    "softcap",
    "s_aux",
    "position_bias",
    "cache",
)  # of attention that is not a softmax of q k


class RowConfig(Config):
    """Where a change of attention applies."""

    layers: list[int] | None = None
    """Counted from 0. None: from 2 to the last but one, as later and earlier ones mix modalities
    little."""
    phase: Phase = "both"
    """``prefill``: the prompt's last token, from which the answer's first is drawn; ``decode``: the
    answer's tokens."""


class ReallocationConfig(RowConfig):
    """When attention counts as out of balance, and how much of it moves.

    Source: the reconstruction of MoSEAR's attention reallocation (arXiv 2508.01181), whose layers,
    threshold and share are not public. Neither side is favoured: exchange them and nothing changes.
    """

    sides: tuple[list[Kind], list[Kind]] = (["audio"], ["video", "face"])
    """Kinds of token on either side. Others are left alone, such as ``fusion``, which is both."""
    head_gate: float = Field(default=0.2, ge=0, le=1)
    """Heads with less than this share of their attention on both sides together do not change."""
    threshold: float = Field(default=2.0, ge=1)
    """Out of balance: one side has over so many times the attention of the other."""
    share: float = Field(default=0.4, ge=0, le=1)
    """Of the stronger side's attention, what moves to the other. May overshoot near the threshold:
    over a quarter, with a threshold of 2, makes the weaker side the stronger one."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Attention is compared after division by (number of the side's tokens) ** eta: 0 compares the
    sides as they are, 1 the means of their tokens."""

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
        # A step of decoding is many small computations, each of which costs more than its numbers:
        # all that is asked of the two masses is one product.
        weights = plain.flatten(1, 2)  # (B, Q n, S)
        mass = torch.bmm(weights, sets)  # (B, Q n, 2)
        asked = _asked(self.threshold, self.head_gate, self.share, mass.device)
        if self.eta:
            found = mass @ asked.masses
            found += mass / sets.sum(1, keepdim=True).clamp(min=1) ** self.eta @ asked.levels
        else:
            found = mass @ asked.both
        passed = (found[..., 2:] > asked.least).unflatten(-1, (4, 3)).all(-1)  # (B, Q n, 4)
        given = found[..., :2] / mass.clamp(min=_LEAST)
        change = torch.where(passed[..., 2:], given, 0.0).masked_fill_(passed[..., :2], -self.share)
        # Exactly what it was wherever nothing is out of balance.
        more = torch.bmm(change, sets.transpose(1, 2))
        return torch.addcmul(weights, weights, more).view_as(plain)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Of a head's masses on both sides, and of its levels: linear forms (2, 14), and their sum.

    The first 2 are what comes to a side where the other is too strong. The others are 4 times 3
    tests: the first side is too strong, the second is, and these two in turn. A test is passed
    above ``least`` (12,).
    """

    masses: Tensor
    levels: Tensor
    both: Tensor
    least: Tensor


@lru_cache(maxsize=16)
def _asked(threshold: float, gate: float, share: float, device: torch.device) -> _Asked:
    with torch.inference_mode(False):  # to be there in every mode
        masses, levels = torch.zeros(2, 14), torch.zeros(2, 14)
        for side, other in ((0, 1), (1, 0)):
            masses[other, side] = share
            for at in (2 + 3 * side, 8 + 3 * other):
                levels[side, at], levels[other, at] = 1, -threshold  # a side out of balance
                masses[:, at + 1] = 1  # in a head that attends to both
                masses[other, at + 2] = 1  # to another that has some
        from_gate = torch.nextafter(torch.tensor(gate), torch.tensor(-1.0))
        least = torch.tensor([0.0, float(from_gate), _LEAST] * 4)
        return _Asked(*(x.to(device) for x in (masses, levels, masses + levels, least)))


class Reallocation:
    """The switch, while it is on; :func:`reallocating` makes it."""

    def __init__(
        self, change: Change | None, depth: int, ids: Tensor | None = None, *, record: bool = False
    ) -> None:
        """``depth``: layers of the decoder.

        Raises:
            ConfigError: ``change`` names a layer that is not there, or there are too few.
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
        """What was noted since the last call, one for each prompt in the order they were run; a
        forward without a cache is a prompt of its own."""
        runs, self._runs = self._runs, []
        return [run.mass() for run in runs if run.notes]

    def on_carrier(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a module that is given ``modality_ids`` and does not hand them on."""
        self._given: Tensor | None = kwargs.get("modality_ids")

    def on_decoder(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Before the decoder stack, to give its layers a :class:`AttentionPass`.

        Raises:
            ConfigError: the model is being trained.
            DataError: it is not known which tokens are of which modality.
        """
        if module.training:
            raise ConfigError("attention is reallocated while a model answers; call model.eval()")
        given: Tensor | None = kwargs.pop("modality_ids", None)
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
        """Mark the cache that the decoder made itself."""
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
    """Within it, ``model`` answers with ``change``; afterwards it is what it was.

    Rows change from the prompt's last on. A composed model is told where its prompt ends and what
    is in it by the ``modality_ids`` that go in with it. Without a cache each forward counts as a
    prompt of its own, of which only the last row changes: give ``modality_ids`` then too.

    Args:
        model: a composed or native model, or a decoder, in eval mode; wrappers allowed.
        change: a :class:`ReallocationConfig`, or one of :mod:`mmemo.models.attention.reallocation`.
            None: note only.
        modality_ids: (B, P) of the prompts, padded on the left; rows that are a multiple of B are
            each prompt's several times. None: they come with each prompt's forward.
        record: note attention mass in every layer, for :meth:`Reallocation.take`.

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

    Outside of :func:`reallocating` the model's forward must be given ``modality_ids`` (B, S) of all
    keys; the last row then changes as :class:`ReallocationConfig` has it by default.

    Raises:
        ConfigError: the attention is of a kind that is not known here.
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
        if not rows or out is None:
            return _present(out), None
    asked = query[:, :, rows.start : rows.stop]
    batch, queries, n, width = asked.shape
    heads = key.shape[1]
    # Query heads of one head of keys are queries of one product: keys are not repeated.
    scores = torch.matmul(asked.reshape(batch, heads, -1, width), key.transpose(2, 3))
    scores = scores.view(batch, queries, n, -1) * (width**-0.5 if scaling is None else scaling)
    weights = reallocation.weigh(at, scores, attention_mask).to(value.dtype)
    own = torch.matmul(weights.view(batch, heads, -1, key.shape[2]), value)
    own = own.view(batch, queries, n, -1).transpose(1, 2)
    if out is not None:
        own = torch.cat([out[:, : rows.start], own, out[:, rows.stop :]], 1)
    return own.contiguous(), None


def _alone(module: Any, query: Tensor, key: Tensor, modality_ids: Tensor | None) -> AttentionPass:
    """A forward outside of the switch."""
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
AttentionMaskInterface.register(NAME, sdpa_mask)


# Two simpler changes of attention, to compare reallocation with. Both take the same switch,
# :func:`mmemo.models.attention.reallocation.reallocating`.
#
# Shapes: B rows, S keys, n rows of attention, Q query heads.


class AmplificationConfig(RowConfig):
    """More attention to everything seen and heard, whatever its balance.

    Source: PAI, Liu et al., arXiv 2407.21771: scores a of media tokens become
    a + alpha |a| before the softmax. Its contrast with a prompt without media is
    :class:`mmemo.models.attention.contrast.ContrastConfig`.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token that are amplified."""
    alpha: float = Field(default=0.2, ge=0)

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention.record.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention.record.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        return (scores + self.alpha * scores.abs() * media).softmax(-1, dtype=torch.float32)


class SinkConfig(RowConfig):
    """Attention wasted on sinks goes to the other media tokens.

    Source: VAR, Kang et al., arXiv 2503.03321. There a sink shows in certain dimensions
    of its hidden state, which differ from model to model; here it is a token with many times the
    mean weight of a token, all heads together, which needs nothing to be known of the model.
    """

    modalities: list[Kind] = Field(default=["video", "audio", "face", "fusion"], min_length=1)
    """Kinds of token that receive."""
    sink: float = Field(default=20.0, gt=1)
    """A sink has over so many times the weight of the mean token."""
    head_gate: float = Field(default=0.2, ge=0, le=1)
    """Heads with less than this share of their attention on the modalities do not change."""
    most_sunk: float = Field(default=0.5, ge=0, le=1)
    """Nor do heads with over this share of their attention to the modalities on sinks."""
    keep: float = Field(default=0.6, ge=0, le=1)
    """What sinks keep of their weight."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """See :class:`~mmemo.models.attention.record.Change`."""
        return [self.modalities]

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """See :class:`~mmemo.models.attention.record.Change`."""
        media = sets[:, None, None, :, 0]  # (B, 1, 1, S)
        seen = (scores > torch.finfo(scores.dtype).min / 2).sum(-1, keepdim=True)  # (B, Q, n, 1)
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
