"""How a layer's experts learn whose tokens they see: one object a forward pass, handed down to it.

What experts are chosen from is the media of a prompt, at whose tokens every layer looks in passing.
The choice belongs to the prompt: its text, the answers that share it, and the tokens that come one
at a time from a cache all use it. The object goes from the language model to each decoder layer
among its keyword arguments. Recomputing an activation repeats these, so that a layer sees the
tokens of the forward that is recomputed, never of a later one.

Shapes: N prompts, P tokens of the longest, B rows, L tokens, R rows that decode, M media, K experts
of each, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmemo.errors import DataError
from mmemo.models.backbone import MODALITY_ID, TEXT

KEYWORD = "route"
"""Of the language model's keyword argument."""
ROUTER = "mmemo_experts"
"""The attribute of a language model with experts: :class:`ExpertRouter`."""
EMBEDDING_GATE = "mmemo_gate"
"""The child of a language model that scales its media's embeddings."""
_CACHED = "mmemo_route"


@dataclass(frozen=True, slots=True)
class Gates:
    """What one layer chose. Both are 0 where a prompt lacks the medium.

    ``weights``: (N, 1 + M) shares of text and of each medium. ``use``: (N, M, K) share of each
    medium's experts; 1 and 0 when one is picked. None for what the variant has not.
    """

    weights: Tensor | None = None
    use: Tensor | None = None


@dataclass(slots=True)
class Route:
    """The tokens of one forward pass.

    ``slots``: (N, P), 0 for text and padding, 1 + m for medium m. ``tokens``: (B, L) the prompt of
    each token; None where row i is prompt i. In a packed sequence the prompts come first, each
    padded to P. ``decoding``: nothing but text after the prompts, whose gates are there already.
    ``gates``: by layer and adapter. ``embedded``: (N, M, D) means of the embeddings. ``distinct``:
    of the N, those that repeat no earlier one; None: all.
    """

    media: tuple[str, ...]
    slots: Tensor
    tokens: Tensor | None = None
    decoding: bool = False
    gates: dict[tuple[str, str], Gates] = field(default_factory=dict[tuple[str, str], Gates])
    embedded: Tensor | None = None
    distinct: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """(N, M) bool."""
        return self._one_hot().any(1)

    def pool(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (N, M, D): the mean over each medium's tokens, 0 where there is none."""
        if self.tokens is not None:
            prompts, length = self.slots.shape
            x = x[0, : prompts * length].unflatten(0, (prompts, length))
        mine = self._one_hot().to(x.dtype)
        return torch.bmm(mine.transpose(1, 2), x) / mine.sum(1).clamp(min=1)[..., None]

    def spread(self, values: Tensor) -> Tensor:
        """(N, ...) -> (B, L or 1, ...): each token gets its prompt's."""
        return values[:, None] if self.tokens is None else values[self.tokens]

    def token_slots(self) -> Tensor:
        """(B, L)."""
        if self.tokens is None:
            return self.slots
        if self.decoding:
            return torch.zeros_like(self.tokens)
        flat = self.slots.flatten()
        return functional.pad(flat, (0, self.tokens.shape[1] - len(flat)))[None]

    def after(self, rows: Tensor) -> Route:
        """For tokens (R, any) that come after the prompts ``rows`` (R,)."""
        return replace(self, tokens=rows[:, None], decoding=True)

    def _one_hot(self) -> Tensor:
        """(N, P, M) bool."""
        media = torch.arange(1, 1 + len(self.media), device=self.slots.device)
        return self.slots[..., None] == media


class ExpertRouter:
    """The experts of one language model, and the forward pass that they are in.

    ``settings``: of each adapter. ``last``: the newest forward pass that was not decoding.
    """

    def __init__(self, media: tuple[str, ...]) -> None:
        self.media = media
        self.current: Route | None = None
        self.last: Route | None = None
        self.settings: dict[str, Any] = {}

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A forward pre-hook of what a decoder layer hands its keyword arguments to first."""
        self.current = kwargs.pop(KEYWORD, None)
        return args, kwargs

    def route(self) -> Route:
        """Raises:
        DataError: the language model was called without one.
        """
        if self.current is None:
            raise DataError(
                "the language model has experts but was not told which tokens are media; call the "
                "whole model, or give it what mmemo.models.adapters.routing.routed returns"
            )
        return self.current

    def begin(self, kinds: Tensor, tokens: Tensor | None = None) -> Route:
        """``kinds``: (N, P) modality ids of the prompts; ``tokens``: as in :class:`Route`."""
        table = torch.zeros(1 + max(MODALITY_ID.values()), dtype=torch.long, device=kinds.device)
        for place, name in enumerate(self.media):
            table[MODALITY_ID[name]] = 1 + place
        self.last = Route(self.media, table[kinds.long()], tokens)
        return self.last


def find_router(model: nn.Module) -> ExpertRouter | None:
    """That of the language model anywhere inside ``model``."""
    return next((vars(one)[ROUTER] for one in model.modules() if ROUTER in vars(one)), None)


def router_of(lm: nn.Module) -> ExpertRouter | None:
    """None for a language model without experts."""
    return vars(lm).get(ROUTER)


def last_route(model: nn.Module) -> Route | None:
    """Of the newest forward pass that was not decoding; None for a model without experts."""
    router = find_router(model)
    return None if router is None else router.last


def routed(
    lm: nn.Module,
    embeds: Tensor,
    kinds: Tensor | None,
    tokens: Tensor | None = None,
    distinct: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """What to call ``lm`` with: embeddings (B, L, D) and keyword arguments, which are none for a
    language model without experts.

    Args:
        kinds: (N, P) modality ids of the prompts, or of whole rows: answers are text, and no
            expert is chosen by text.
        tokens: (B, L) the prompt of each token of a packed sequence.
        distinct: rows whose prompts repeat no earlier row's; None: all.

    Raises:
        DataError: there are experts, and ``kinds`` is None.
    """
    router = router_of(lm)
    if router is None:
        return embeds, {}
    if kinds is None:
        raise DataError("experts are chosen by which tokens are media; pass modality_ids too")
    route = router.begin(kinds, tokens)
    route.embedded, route.distinct = route.pool(embeds), distinct
    gate: Any = getattr(lm, EMBEDDING_GATE, None)
    return (embeds if gate is None else gate(embeds, route)), {KEYWORD: route}


def resumed(
    lm: nn.Module,
    embeds: Tensor,
    cache: Any,
    kinds: Tensor | None,
    input_ids: Tensor | None,
    token_ids: Mapping[str, int],
) -> tuple[Tensor, dict[str, Any]]:
    """As :func:`routed`, for what may follow on a cache: its prompts' choice holds.

    Args:
        kinds: None is what ``input_ids`` (B, L) and each medium's token of ``token_ids`` say.

    Raises:
        DataError: the cache was filled without experts, or more media follow on it.
    """
    if router_of(lm) is None:
        return embeds, {}
    if kinds is None and input_ids is not None:
        kinds = torch.full_like(input_ids, TEXT)
        for name, token in token_ids.items():
            kinds[input_ids == token] = MODALITY_ID[name]
    if cache is None or cache.get_seq_length() == 0:
        return routed(lm, embeds, kinds)
    route: Route | None = getattr(cache, _CACHED, None)
    if route is None or len(route.slots) != len(embeds):
        raise DataError(
            "this cache is not of these rows' prompts with their experts; fill a new one"
        )
    if kinds is not None and bool((kinds != TEXT).any()):
        raise DataError(
            "experts were chosen from the prompt in the cache, and more media follow on it; give "
            "all media with the prompt"
        )
    return embeds, {KEYWORD: route.after(torch.arange(len(embeds), device=embeds.device))}


def keep(cache: Any, given: dict[str, Any]) -> None:
    """Remember with the cache what its prompts chose. ``given``: from :func:`resumed`."""
    route: Route | None = given.get(KEYWORD)
    if cache is not None and route is not None and not route.decoding:
        setattr(cache, _CACHED, route)
