"""Tell a layer's experts which tokens belong to which medium: one :class:`Route` per forward pass.

Experts are chosen by the media tokens of a prompt. The choice belongs to the prompt: its text, the
answers that share it, and the tokens decoded one at a time from a cache all use it. The language
model passes the route to each decoder layer as a keyword argument. Activation checkpointing repeats
keyword arguments, so a layer always sees the tokens of the forward that is recomputed, never those
of a later one.

Shapes: N prompts, P tokens of the longest, B rows, L tokens, R rows that decode, M media, K experts
of each, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmemo.errors import DataError
from mmemo.models.backbone import MODALITY_ID, TEXT

KEYWORD = "route"
"""Name of the language model's keyword argument."""
ROUTER = "mmemo_experts"
"""Attribute of a language model with experts that holds its :class:`ExpertRouter`."""
EMBEDDING_GATE = "mmemo_gate"
"""Child module of a language model that scales the embeddings of media tokens."""
_CACHED = "mmemo_route"


@dataclass(frozen=True, slots=True)
class Gates:
    """The gates of one layer. Both tensors are 0 where a prompt lacks the medium.

    ``weights`` (N, 1 + M) are the shares of text and of each medium. ``use`` (N, M, K) is the share
    of each medium's experts, 1 and 0 when one is picked. None where the variant has no such gate.
    """

    weights: Tensor | None = None
    use: Tensor | None = None


@dataclass(slots=True)
class Route:
    """The tokens of one forward pass, and the gates chosen from them.

    Attributes:
        media: names of the M media.
        slots: (N, P), 0 for text and padding, 1 + m for medium m.
        tokens: (B, L) the prompt of each token; None if row i is prompt i. In a packed sequence the
            prompts come first, each padded to P.
        decoding: the pass holds only text after the prompts, whose gates exist already.
        gates: by layer and adapter.
        embedded: (N, M, D) mean embeddings of each medium.
        distinct: indices of prompts that repeat no earlier one; None is all of them.
        places: (L,) the place of each token in the flattened (N, P), where whole rows are packed
            without padding; None where they are not.
    """

    media: tuple[str, ...]
    slots: Tensor
    tokens: Tensor | None = None
    decoding: bool = False
    gates: dict[tuple[str, str], Gates] = field(default_factory=dict[tuple[str, str], Gates])
    embedded: Tensor | None = None
    distinct: Tensor | None = None
    places: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """(N, M) bool."""
        return self._one_hot().any(1)

    def pool(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (N, M, D): the mean over each medium's tokens, 0 if it has none."""
        prompts, length = self.slots.shape
        if self.places is not None:
            flat = x.new_zeros(prompts * length, x.shape[-1])
            x = flat.index_copy(0, self.places, x[0]).unflatten(0, (prompts, length))
        elif self.tokens is not None:
            x = x[0, : prompts * length].unflatten(0, (prompts, length))  # (N, P, D)
        mine = self._one_hot().to(x.dtype)
        return torch.bmm(mine.transpose(1, 2), x) / mine.sum(1).clamp(min=1)[..., None]

    def spread(self, values: Tensor) -> Tensor:
        """(N, ...) -> (B, L or 1, ...): the value of each token's prompt."""
        return values[:, None] if self.tokens is None else values[self.tokens]

    def token_slots(self) -> Tensor:
        """(B, L) slots of the tokens of this pass."""
        if self.tokens is None:
            return self.slots
        if self.decoding:
            return torch.zeros_like(self.tokens)
        flat = self.slots.flatten()
        if self.places is not None:
            return flat[self.places][None]
        # All tokens behind the prompts of a packed sequence are answers, hence text.
        return functional.pad(flat, (0, self.tokens.shape[1] - len(flat)))[None]

    def after(self, rows: Tensor) -> Route:
        """The route of tokens (R, any) that follow the prompts ``rows`` (R,)."""
        # The copy shares `gates`, where its tokens find what their prompts have chosen.
        return replace(self, tokens=rows[:, None], decoding=True, places=None)

    def _one_hot(self) -> Tensor:
        """(N, P, M) bool."""
        media = torch.arange(1, 1 + len(self.media), device=self.slots.device)
        return self.slots[..., None] == media


def join_routes(routes: Sequence[Route]) -> Route:
    """The route of all prompts of several passes, whose gates exist, for tokens that follow."""
    width = max(route.slots.shape[1] for route in routes)
    slots = [functional.pad(route.slots, (width - route.slots.shape[1], 0)) for route in routes]

    def joined(key: tuple[str, str], name: str) -> Tensor | None:
        found = [getattr(route.gates[key], name) for route in routes]
        return None if found[0] is None else torch.cat(found)

    gates = {key: Gates(joined(key, "weights"), joined(key, "use")) for key in routes[0].gates}
    return Route(routes[0].media, torch.cat(slots), gates=gates)


class ExpertRouter:
    """Connects the experts of one language model with the forward pass that is running.

    Attributes:
        current: the route of the decoder layer that is running.
        last: the newest route that was not decoding.
        settings: the experts' config of each adapter.
        balance: what training keeps of the gates over its steps
            (:class:`mmemo.train.expert_balance.ExpertBalance`); None before it.
    """

    def __init__(self, media: tuple[str, ...]) -> None:
        self.media = media
        self.current: Route | None = None
        self.last: Route | None = None
        self.settings: dict[str, Any] = {}
        self.balance: Any = None

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Pre-hook of the modules that a decoder layer passes its keyword arguments to."""
        self.current = kwargs.pop(KEYWORD, None)
        return args, kwargs

    def route(self) -> Route:
        """The route of the running forward pass.

        Raises:
            DataError: the language model was called without one.
        """
        if self.current is None:
            raise DataError(
                "the language model has experts but was not told which tokens are media; call the "
                "whole model, or give it what mmemo.models.adapters.routing.routed returns"
            )
        return self.current

    def begin(
        self, kinds: Tensor, tokens: Tensor | None = None, places: Tensor | None = None
    ) -> Route:
        """Start a pass over prompts with modality ids ``kinds`` (N, P)."""
        # A medium that has no experts is like text to them, slot 0.
        table = torch.zeros(1 + max(MODALITY_ID.values()), dtype=torch.long, device=kinds.device)
        for place, name in enumerate(self.media):
            table[MODALITY_ID[name]] = 1 + place
        self.last = Route(self.media, table[kinds.long()], tokens, places=places)
        return self.last


def find_router(model: nn.Module) -> ExpertRouter | None:
    """The router of the language model anywhere inside ``model``; None without experts."""
    return next((vars(one)[ROUTER] for one in model.modules() if ROUTER in vars(one)), None)


def router_of(lm: nn.Module) -> ExpertRouter | None:
    """The router of a language model; None without experts."""
    return vars(lm).get(ROUTER)


def last_route(model: nn.Module) -> Route | None:
    """The route of the newest forward pass that was not decoding; None without experts."""
    router = find_router(model)
    return None if router is None else router.last


def routed(
    lm: nn.Module,
    embeds: Tensor,
    kinds: Tensor | None,
    tokens: Tensor | None = None,
    distinct: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The embeddings (B, L, D) and keyword arguments to call ``lm`` with.

    There are no keyword arguments for a language model without experts.

    Args:
        kinds: (N, P) modality ids of the prompts, or of whole rows, since answers are text and text
            chooses no expert.
        tokens: (B, L) the prompt of each token of a packed sequence.
        distinct: rows whose prompts repeat no earlier row's; None is all of them.
        places: as of :class:`Route`.

    Raises:
        DataError: there are experts, and ``kinds`` is None.
    """
    router = router_of(lm)
    if router is None:
        return embeds, {}
    if kinds is None:
        raise DataError("experts are chosen by which tokens are media; pass modality_ids too")
    route = router.begin(kinds, tokens, places)
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
    """As :func:`routed`, for tokens that may follow a cache, whose prompts have chosen already.

    Args:
        kinds: None reads them from ``input_ids`` (B, L) and the media tokens of ``token_ids``.

    Raises:
        DataError: the cache was filled without experts, or more media follow it.
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
    """Store the route of a cache's prompts on it. ``given`` comes from :func:`resumed`."""
    route: Route | None = given.get(KEYWORD)
    # A decoding pass names the prompts of its own rows; the cache keeps the route of the prompts.
    if cache is not None and route is not None and not route.decoding:
        setattr(cache, _CACHED, route)
