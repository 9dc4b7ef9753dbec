"""Rows of attention whose weights are computed explicitly, to change and to record them.

Shapes: B rows, S keys, n tokens whose attention is computed here, Q query heads, M kinds of token,
A recorded layers, T recorded tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mmemo.models.backbone import MODALITY_ID, TEXT

KINDS: tuple[str, ...] = tuple(MODALITY_ID)
"""Names of the M kinds of token, in the order of ``modality_ids``."""

Phase = Literal["prefill", "decode", "both"]


class Change(Protocol):
    """A change of attention rows, such as :class:`~.reallocation.ReallocationConfig`."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """The sets of token kinds whose membership :meth:`apply` needs."""
        ...

    @property
    def layers(self) -> list[int] | None:
        """Layers that change, counted from 0; None is the default range."""
        ...

    @property
    def phase(self) -> Phase:
        """The tokens whose attention changes."""
        ...

    def apply(self, scores: Tensor, plain: Tensor, sets: Tensor) -> Tensor:
        """Weights (B, Q, n, S), each row of which adds up to 1.

        Args:
            scores: (B, Q, n, S) before the softmax, with the mask added.
            plain: their softmax, float32.
            sets: (B, S, groups) float32, 1 where a token is in a group and the last of the n rows
                may attend to it, else 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class AttentionMass:
    """The attention mass on each kind of token, for one run of a prompt.

    ``layers`` has length A. ``before`` and ``after`` are (B, T, A, Q, M) float32 on the CPU,
    without and with the change in that layer, kinds in the order of :data:`KINDS`. The first of the
    T tokens is the prompt's last; the others are the answer's, including those after its end.
    """

    layers: tuple[int, ...]
    before: Tensor
    after: Tensor


@dataclass(eq=False, slots=True)
class Prompt:
    """What is known of the tokens in a cache.

    ``ids`` (B, .) are modality ids; all later tokens are text. ``width`` is the prompt's length.
    ``notes`` maps a layer to its recorded (before, after), each (B, n, Q, M), in order of forwards.
    """

    ids: Tensor
    width: int
    notes: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def mass(self) -> AttentionMass:
        """Everything recorded so far."""
        layers = tuple(sorted(self.notes))
        before, after = (
            torch.stack([torch.cat([pair[i] for pair in self.notes[at]], 1) for at in layers], 2)
            for i in (0, 1)
        )
        return AttentionMass(layers, before.cpu(), after.cpu())


@dataclass(eq=False, slots=True)
class _View:
    """What rows may attend to under one mask.

    ``bias`` is added to the scores. ``ids`` (B, S) are the keys' modality ids. ``visible``
    (B or 1, S or 1, 1) is 1 for the keys that the last of the rows may attend to.
    """

    bias: Tensor | None
    ids: Tensor
    visible: Tensor
    sets: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, groups: Sequence[Sequence[str]]) -> Tensor:
        """(B, S, groups) as in :class:`Change`; computed once per name."""
        if name not in self.sets:
            table = [[float(kind in group) for kind in KINDS] for group in groups]
            # Indexing the table (groups, M) by ids gives (groups, B, S).
            members = self.ids.new_tensor(table, dtype=torch.float32)[:, self.ids]
            # Contiguous per group, which matrix products read fastest.
            own = (members * self.visible[None, ..., 0]).transpose(0, 1).contiguous()
            self.sets[name] = own.transpose(1, 2)
        return self.sets[name]


class AttentionPass:
    """One forward of a decoder: which rows are computed in the open, and what they may see."""

    def __init__(
        self,
        prompt: Prompt,
        past: int,
        length: int,
        *,
        change: Change | None,
        layers: frozenset[int],
        record: bool = False,
    ) -> None:
        """Plan which rows of a forward pass are computed explicitly.

        Args:
            past: number of tokens in the cache.
            length: number of tokens of the forward.
            layers: the layers that change.
            record: record every layer.
        """
        self.prompt, self._past, self._total = prompt, past, past + length
        self._change, self._layers, self._record = change, layers, record
        last = prompt.width - 1
        first, end = {
            "prefill": (last, last + 1),
            "decode": (last + 1, self._total),
            "both": (last, self._total),
        }["both" if change is None else change.phase]
        self._changed = self._rows(first, end)
        self._noted = self._rows(last, self._total)
        self._views: dict[tuple[int, int, int], _View] = {}

    def _rows(self, first: int, end: int) -> range:
        """Rows of the forward, from positions in the whole sequence."""
        return range(max(first - self._past, 0), max(min(end, self._total) - self._past, 0))

    def rows(self, layer: int) -> range:
        """The n rows of the forward whose weights are computed explicitly; may be empty."""
        if self._record:
            return self._noted
        return self._changed if layer in self._layers else range(0)

    def weigh(self, layer: int, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Scores (B, Q, n, S) of :meth:`rows` to float32 weights.

        Args:
            mask: of the whole forward, as transformers' SDPA takes it.
        """
        rows = self.rows(layer)
        view = self._view(mask, scores, rows)
        if view.bias is not None:
            scores = scores + view.bias
        weights = plain = scores.softmax(-1, dtype=torch.float32)
        if self._change is not None and layer in self._layers and self._changed:
            sets = view.of("change", self._change.groups)
            start, end = self._changed.start - rows.start, self._changed.stop - rows.start
            if end - start == len(rows):
                weights = self._change.apply(scores, plain, sets)
            else:
                part = scores[:, :, start:end], plain[:, :, start:end]
                # Recording still needs the plain weights, from before the change.
                weights = plain.clone()
                weights[:, :, start:end] = self._change.apply(*part, sets)
        if self._record:
            kinds = view.of("kinds", [[kind] for kind in KINDS])  # (B, S, M)
            before = _mass(plain, kinds)
            after = before if weights is plain else _mass(weights, kinds)
            self.prompt.notes.setdefault(layer, []).append((before, after))
        return weights

    def _view(self, mask: Tensor | None, scores: Tensor, rows: range) -> _View:
        """The view under a mask, computed once per mask of a forward."""
        keys = scores.shape[-1]
        # Layers of one kind share a mask object. The views live no longer than its forward, so no
        # other mask can get its id meanwhile.
        key = (id(mask), keys, rows.start)
        if key in self._views:
            return self._views[key]
        ids = padded(self.prompt.ids, self._total).to(scores.device)
        # A sliding window keeps the last keys; a static cache has empty slots at the end.
        ids = ids[:, self._total - keys :] if keys < self._total else padded(ids, keys)
        low = torch.finfo(scores.dtype).min
        bias: Tensor | None = None
        visible: Tensor | None = None
        if mask is not None:
            visible = mask[:, :, rows.start : rows.stop, :keys]
            if mask.dtype != torch.bool:
                # Floating masks hide by the dtype's minimum or -inf, both below its half.
                bias, visible = visible, visible > low / 2
        # Transformers leaves out a mask that is merely causal. A single row at the end sees every
        # key and needs none.
        elif len(rows) > 1 or self._past + rows.stop < self._total or keys > self._total:
            at = torch.arange(keys, device=scores.device) + max(self._total - keys, 0)
            ends = torch.arange(rows.start, rows.stop, device=scores.device) + self._past
            visible = (at <= ends[:, None])[None, None]
        seen = torch.ones(1, 1, 1, device=scores.device)
        if visible is not None:
            # The last row speaks for all n, because every row here sees the prompt and its media.
            seen = visible[:, 0, -1, :, None].float()
            if bias is None:
                bias = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, low)
        self._views[key] = _View(bias, ids, seen)
        return self._views[key]


def _mass(weights: Tensor, kinds: Tensor) -> Tensor:
    """(B, Q, n, S) and (B, S, M) -> (B, n, Q, M), without gradient."""
    found = torch.bmm(weights.detach().flatten(1, 2), kinds)  # (B, Q n, M)
    return found.unflatten(1, weights.shape[1:3]).transpose(1, 2)


def padded(ids: Tensor, width: int) -> Tensor:
    """Modality ids (B, .) padded with text to (B, width), unless they are longer."""
    return nn.functional.pad(ids, (0, max(width - ids.shape[1], 0)), value=TEXT)
