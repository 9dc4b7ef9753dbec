"""What autograd keeps of a language model's layers, found by a pass that computes nothing.

A copy of the first two layers goes through a forward pass on fake tensors, which have shapes and
types and no values. So the figures are those of the layers as they are: with adapters, dropout,
frozen norms and the number types of autocast, whatever the architecture.

B rows or prompts, L tokens of the longest, N continuations, C tokens of the longest, D hidden size.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmemo.console import errors
from mmemo.models.attention.shared_prefix import (
    PrefixLayout,
    RowsLayout,
    poison_mask,
    row_slots,
    use_prefixes,
)
from mmemo.train.reference import disable_dropout


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward passes of a micro-batch, whose tensors are held together until the backward pass.

    ``rows``: B rows, or prompts where there are continuations. ``length``: L. ``scored``: number of
    tokens whose logits are needed, over all passes. ``continuations``: N that share their prompts;
    0 where each row is whole. ``width``: C. ``packed``: B rows of L tokens are one sequence without
    padding. ``times``: number of such passes.
    """

    rows: int
    length: int
    scored: int
    continuations: int = 0
    width: int = 0
    packed: bool = False
    times: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one pass. The last one of a continuation predicts nothing."""
        return self.rows * self.length + self.continuations * max(0, self.width - 1)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes that one pass keeps for its backward pass.

    ``layer``: of each layer. ``entering``: the input of a layer. ``rest``: outside of the layers,
    less what the first layer does not keep, whose input needs no gradient.
    """

    layer: int
    entering: int
    rest: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """How a training engine computes. ``autocast``: in bfloat16, from weights that keep their type.
    ``whole_bf16``: the engine holds every weight in bfloat16. ``dropout``: it is on."""

    autocast: bool = False
    whole_bf16: bool = False
    dropout: bool = True


def layer_bytes(lm: nn.Module, passes: Passes, numbers: Numbers) -> LayerBytes:
    """What one of the passes keeps of a decoder stack, whose trainable parameters are chosen.

    The weights' values are not read, so that they may be on ``meta``. Where a stack cannot be
    computed without values, its layers count as pre-norm layers with a gated MLP
    (:func:`rule_of_thumb`).
    """
    known = _FOUND.setdefault(lm, {})
    learns = tuple(p.requires_grad for p in lm.parameters())
    table: Any = cast(Any, lm).get_input_embeddings()
    key = (passes, numbers, hash(learns), table.weight.dtype)
    if key not in known:
        known[key] = _found(lm, passes, numbers)
    return known[key]


_FOUND: WeakKeyDictionary[nn.Module, dict[Any, LayerBytes]] = WeakKeyDictionary()
"""What was found already: the search for changes that fit asks often."""


def _found(lm: nn.Module, passes: Passes, numbers: Numbers) -> LayerBytes:
    try:
        return _kept(lm, passes, numbers)
    except Exception as error:  # any architecture and adapter may do what fake tensors cannot
        said = next(iter(str(error).splitlines()), type(error).__name__)
        _say_guessed(type(lm).__name__, said)
        return rule_of_thumb(cast(Any, lm).config, passes, numbers)


@functools.cache
def _say_guessed(lm: str, reason: str) -> None:
    """Once, since a search for changes that fit asks often."""
    text = (
        f"The activations of {lm} are forecast by a rule of thumb, because its layers do not run "
        f"on tensors without values ({reason})."
    )
    errors.print(Text(text, style="yellow"), soft_wrap=True)


def rule_of_thumb(config: Any, passes: Passes, numbers: Numbers) -> LayerBytes:
    """The same by the widths alone: D hidden, q and k of queries and keys, i of the MLP.

    Autograd keeps the input, the normed value and its product at both norms (6D); queries, keys and
    values after rotation, the attention's output and its copy (3q + 2k); gate, its activation, up,
    and their product (4i).
    """
    w = widths(config)
    size = 2 if numbers.autocast or numbers.whole_bf16 else 4
    each = passes.tokens * size
    kept = 6 * w.hidden + 3 * w.query + 2 * w.key + 4 * w.mlp
    return LayerBytes(each * kept, each * w.hidden, 2 * each * w.hidden)


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of the hidden states, the queries, the keys, and the MLP that a token goes through."""

    hidden: int
    query: int
    key: int
    mlp: int
    layers: int


def widths(config: Any) -> Widths:
    """The widths in a language model's Hugging Face config."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    # Grouped-query attention has fewer heads of keys and values than of queries.
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    mlp = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    # Of a mixture of experts, a token goes through a few.
    routed = getattr(config, "moe_intermediate_size", None)
    if routed and getattr(config, "num_experts_per_tok", None):
        mlp = max(int(config.num_experts_per_tok) * int(routed), 1)
    return Widths(hidden, heads * size, groups * size, mlp, int(config.num_hidden_layers))


def _kept(lm: nn.Module, passes: Passes, numbers: Numbers) -> LayerBytes:
    """What two layers and the rest keep. The second layer counts: the first may keep its input for
    the whole stack."""
    mode = FakeTensorMode()
    twin, last = _twin(lm, mode, numbers)
    if numbers.whole_bf16:
        with mode:
            twin.to(torch.bfloat16)
    twin.train()
    if not numbers.dropout:
        disable_dropout(twin)
    own = {x.untyped_storage()._cdata for x in [*twin.parameters(), *twin.buffers()]}
    seen: dict[int, Any] = {}
    entering: list[int] = []
    marks: list[int] = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key not in own:
            seen[key] = storage  # held, so that its address is not used again
        return x

    def held() -> int:
        return sum(storage.nbytes() for storage in seen.values())

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        entering.append(given.numel() * given.element_size())
        marks.append(held())

    def leave(*_: Any) -> None:
        marks.append(held())

    last.register_forward_pre_hook(enter, with_kwargs=True)
    last.register_forward_hook(leave)
    kind = twin.get_input_embeddings().weight.dtype
    with mode:
        given = _arguments(twin, passes, int(cast(Any, lm).config.hidden_size), kind)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=numbers.autocast),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            out = twin(use_cache=False, **given)
    layer = marks[1] - marks[0]
    # The outputs are alive until here, and with them everything that was kept.
    found = LayerBytes(layer, entering[0], held() - twin.config.num_hidden_layers * layer)
    del out
    return found


def _arguments(twin: nn.Module, passes: Passes, hidden: int, kind: torch.dtype) -> dict[str, Any]:
    """What the stack is called with, as the stages call it."""
    B, L, N, C = passes.rows, passes.length, passes.continuations, passes.width
    if passes.packed or N:
        embeds = torch.empty(1, passes.tokens, hidden, dtype=kind)
        if not use_prefixes(twin):
            T = passes.tokens
            return {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 1, T, T).bool()}
        layout: Any = _rows(B, L) if passes.packed else _prefixes(B, L, N, C)
        return {
            "inputs_embeds": embeds,
            "attention_mask": poison_mask(embeds),
            "prefix": layout,
        }
    embeds = torch.empty(B, L, hidden, dtype=kind)
    # Rows of different lengths have a mask; with it, attention repeats the keys of its groups.
    mask = torch.ones(B, 1, L, L, dtype=torch.bool) if B > 1 else None
    return {"inputs_embeds": embeds, "attention_mask": mask}


def _rows(B: int, L: int) -> RowsLayout:
    lengths = (L,) * B
    return RowsLayout(lengths, torch.empty(len(row_slots(lengths)), dtype=torch.long))


def _prefixes(B: int, L: int, N: int, C: int) -> PrefixLayout:
    width = max(0, C - 1)
    return PrefixLayout(
        prompts=B,
        prompt_index=torch.empty(N, dtype=torch.long),
        slots=torch.empty(N * width, dtype=torch.long),
        width=width,
        mask=torch.empty(N if B > 1 else 1, 1, width, L + width, dtype=torch.bool),
        group=N // B,
    )


def _twin(lm: nn.Module, mode: FakeTensorMode, numbers: Numbers) -> tuple[Any, nn.Module]:
    """A copy of a stack with fake weights and two layers, and the second of them."""
    config: Any = lm.config
    memo: dict[int, Any] = {}
    for tensor in [*lm.parameters(), *lm.buffers()]:
        # Weights that learn are kept in float32, whatever the model at hand has them in.
        raised = tensor.requires_grad and not numbers.whole_bf16
        with mode:
            kind = torch.float32 if raised else tensor.dtype
            fake = torch.empty(tensor.shape, dtype=kind, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake  # what deepcopy finds in the memo it takes as it is
    layers = next(
        module
        for module in lm.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    some = nn.ModuleList([copy.deepcopy(layer, memo) for layer in list(layers)[:2]])
    memo[id(layers)] = some
    twin: Any = copy.deepcopy(lm, memo)
    twin.config.num_hidden_layers = len(some)
    with mode:
        _replace(twin, config)
    return twin, some[-1]


def _replace(twin: nn.Module, config: Any) -> None:
    """Put plain modules in the place of those that need values: quantized layers, and experts,
    which compute as many tokens as are routed to them."""
    for name, module in list(twin.named_modules()):
        one: Any = module
        plain: nn.Module | None = None
        if type(module).__module__.startswith("bitsandbytes"):
            kind = getattr(one, "compute_dtype", None) or torch.float32
            if one.weight.dtype.is_floating_point:
                kind = one.weight.dtype
            plain = nn.Linear(one.in_features, one.out_features, one.bias is not None, dtype=kind)
            plain.requires_grad_(False)
        elif isinstance(getattr(one, "gate_up_proj", None), nn.Parameter):
            plain = _Routed(one, int(config.num_experts_per_tok))
        if plain is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, plain)


class _Routed(nn.Module):
    """Experts of which each token goes through k, as one of the size of all tokens' shares."""

    def __init__(self, experts: Any, k: int) -> None:
        super().__init__()
        self.k, self.act_fn = k, experts.act_fn
        learns = experts.gate_up_proj.requires_grad
        up, down = experts.gate_up_proj[0].shape, experts.down_proj[0].shape
        kind = experts.gate_up_proj.dtype
        self.up = nn.Parameter(torch.empty(up, dtype=kind), requires_grad=learns)
        self.down = nn.Parameter(torch.empty(down, dtype=kind), requires_grad=learns)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """(T, D), (T, k) -> (T, D)."""
        each = hidden.repeat_interleave(self.k, 0)
        gate, up = nn.functional.linear(each, self.up).chunk(2, -1)
        out = nn.functional.linear(self.act_fn(gate) * up, self.down)
        return (out * weights.flatten()[:, None]).view(-1, self.k, hidden.shape[-1]).sum(1)
