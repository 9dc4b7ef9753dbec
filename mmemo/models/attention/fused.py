"""A decoder stack with fused weights, for decoding one token at a time.

transformers' modules run about a hundred small operations per layer, and LoRA adds two products per
linear layer. For a few rows of one token, launching them costs more than computing them. Here the
adapter is added to its weight, products with the same input are joined, and nothing runs that a new
token at the end of its row does not need. Results equal the modules', up to rounding.

Shapes: R rows, D hidden size, Q query heads, H heads of keys and values, E width of a head, I inner
width, c tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmemo.models.adapters.merging import whole_weight
from mmemo.models.attention.shared_prefix import SharedPrompts
from mmemo.models.transformers_compat import has_forward_hooks

FAMILIES = (
    *("LlamaModel", "Qwen2Model", "Qwen2_5_VLTextModel", "Qwen2_5OmniThinkerTextModel"),
    *("Qwen3Model", "Qwen3VLTextModel"),
)
"""Decoder stacks of transformers that :meth:`FusedLM.step` can replace."""

_Linear = tuple[Tensor, Tensor | None]
"""Weight (in, out) and bias of a linear layer."""
_KINDS = (nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.SiLU, nn.Identity, nn.Dropout)


@dataclass(frozen=True, slots=True)
class _Layer:
    """``qkv``: (D, Q E + 2 H E); ``out``: (Q E, D); ``gate_up``: (D, 2 I); ``down``: (I, D).
    ``heads``: (Q + H, E) weights of the norms of queries and keys, if there are any."""

    before: Tensor
    qkv: _Linear
    out: _Linear
    between: Tensor
    gate_up: _Linear
    down: _Linear
    heads: Tensor | None


class FusedLM:
    """Fused copy of a language model's weights, made by :func:`fuse`."""

    def __init__(self, lm: Any, layers: list[_Layer]) -> None:
        config, attention = lm.config, lm.layers[0].self_attn
        self._rope, self._layers, self._norm = lm.rotary_emb, layers, lm.norm.weight
        self._width, self._eps = attention.head_dim, config.rms_norm_eps
        self._queries, self._heads = config.num_attention_heads, config.num_key_value_heads
        self._scaling = attention.scaling

    def step(
        self, x: Tensor, positions: Tensor, store: TokenStore, prompts: SharedPrompts
    ) -> Tensor:
        """Embeddings (R, D) of one new token per row -> hidden states (R, D) after the last norm.

        Args:
            positions: (R,); text has the same position on all axes of M-RoPE.
            store: the rows' earlier tokens, to which this one is appended.
        """
        at = positions[:, None]
        axes = 3 if hasattr(self._rope, "mrope_section") else 0
        cos, sin = self._rope(x[:, None], at.expand(axes, -1, -1) if axes else at)
        half = self._width // 2
        # rotate_half as one roll: cat(-x2, x1) = roll(x) * cat(-1, 1); fold the sign into sin.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        turned, both = self._queries + self._heads, self._queries + 2 * self._heads
        size = (x.shape[-1],)
        store.begin()
        for place, layer in enumerate(self._layers):
            near = functional.rms_norm(x, size, layer.before, self._eps)
            heads = _times(near, layer.qkv).view(-1, both, self._width)
            qk = heads[:, :turned]
            if layer.heads is not None:
                qk = functional.rms_norm(qk, (self._width,), None, self._eps) * layer.heads
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)  # (R, Q + H, E)
            keys, values = store.add(place, qk[:, self._queries :], heads[:, turned:])
            query = qk[:, : self._queries, None]
            # (R, 1, Q, E)
            seen = prompts.attend(place, query, keys, values, self._scaling, store.bias)
            x = x + _times(seen.flatten(1), layer.out)
            near = functional.rms_norm(x, size, layer.between, self._eps)
            gate, up = _times(near, layer.gate_up).chunk(2, -1)
            x = x + _times(functional.silu(gate) * up, layer.down)
        # The length grows last, because every layer writes its keys at the same place.
        store.length += 1
        return functional.rms_norm(x, size, self._norm, self._eps)


class TokenStore:
    """Keys and values (R, H, c, E) per layer of the tokens generated after the prompts.

    With ``fixed`` shapes, c is always the whole room, of which ``bias`` hides what is not written
    yet, and ``length`` is a tensor: a step is then the same operations on the same memory each
    time, which a CUDA graph needs.
    """

    def __init__(
        self, prompts: SharedPrompts, rows: int, room: int, *, fixed: bool = False
    ) -> None:
        """``room`` is the maximum number of tokens per row."""
        self.length: Any = 0
        self.bias: Tensor | None = None  # (1, 1, 1, c)
        if fixed:
            like = prompts.keys[0]
            self.length = torch.zeros(1, dtype=torch.long, device=like.device)
            self.bias = like.new_full((1, 1, 1, room), torch.finfo(like.dtype).min)
        # All room is taken at once, so that no earlier token is copied when one is added.
        shapes = [(one.new_empty(rows, one.shape[1], room, one.shape[3])) for one in prompts.keys]
        self._stores = [(one, torch.empty_like(one)) for one in shapes]
        if fixed:  # a hidden value has no weight, but NaN times nothing is NaN
            for pair in self._stores:
                for one in pair:
                    one.zero_()

    def begin(self) -> None:
        """Make room for the token of a step, before its layers."""
        if self.bias is not None:
            self.bias.index_fill_(3, self.length, 0.0)

    def add(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (R, H, E); return all keys and values as views. The caller raises ``length``."""
        if self.bias is not None:
            for store, new in zip(self._stores[layer], (key, value), strict=True):
                store.index_copy_(2, self.length, new[:, :, None].to(store.dtype))
            return self._stores[layer]
        for store, new in zip(self._stores[layer], (key, value), strict=True):
            store[:, :, self.length] = new
        keys, values = (store[:, :, : self.length + 1] for store in self._stores[layer])
        return keys, values

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Begin with tokens (R, H, c, E) that the rows have already; the same number in each
        layer."""
        self.length = keys.shape[2]
        for store, new in zip(self._stores[layer], (keys, values), strict=True):
            store[:, :, : self.length] = new

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self._stores = [(keys[rows], values[rows]) for keys, values in self._stores]


def fuse(lm: nn.Module, *, adapter: bool = True) -> FusedLM | None:
    """Fuse a language model, or return None if it cannot be fused.

    It can if it is, module by module, one of :data:`FAMILIES`, and its adapters can be added to
    their weights. With ``adapter=False``, a model with adapters is not fused.
    """
    model: Any = lm
    if type(lm).__name__ not in FAMILIES or not _is_stock(lm, adapter):
        return None
    if getattr(model.config, "hidden_act", None) != "silu":
        return None
    layers: list[_Layer] = []
    for one in model.layers:
        attention, mlp = one.self_attn, one.mlp
        parts = (
            _joined(attention.q_proj, attention.k_proj, attention.v_proj),
            _joined(attention.o_proj),
            _joined(mlp.gate_proj, mlp.up_proj),
            _joined(mlp.down_proj),
        )
        qkv, out, gate_up, down = parts
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        before, between = one.input_layernorm.weight, one.post_attention_layernorm.weight
        # A step has no casts; autocast brings its own.
        kinds = {one[0].dtype for one in parts if one is not None} | {before.dtype, between.dtype}
        if len(kinds) > 1 and not torch.is_autocast_enabled(before.device.type):
            return None
        norms = _head_norms(attention, model.config)
        layers.append(_Layer(before, qkv, out, between, gate_up, down, norms))
    return FusedLM(lm, layers)


def _head_norms(attention: Any, config: Any) -> Tensor | None:
    """(Q + H, E): the weight of the norm of each head's queries and keys (Qwen3)."""
    query, key = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if query is None or key is None:
        return None
    counts = (config.num_attention_heads, config.num_key_value_heads)
    rows = [one.weight.expand(n, -1) for one, n in zip((query, key), counts, strict=True)]
    return torch.cat(rows)


def _is_stock(lm: nn.Module, adapter: bool) -> bool:
    """Whether all modules of ``lm`` are the family's or torch's own, without hooks."""
    home = type(lm).__module__
    model: Any = lm
    # Tokens are embedded by the module itself, whatever PEFT makes of it.
    embedding = set(model.get_input_embeddings().modules())
    for name, module in lm.named_modules():
        if module in embedding:
            continue
        # A fused step never calls the module and would pass over a hook or a patched forward.
        if has_forward_hooks(module) or "forward" in vars(module):
            return False
        if hasattr(module, "base_layer") and not adapter:
            return False
        if ".base_layer" in name or ".lora_" in name or hasattr(module, "base_layer"):
            continue  # _joined checks whether the adapter can be added to the weight
        kind = type(module)
        known = kind.__module__ == home or kind in _KINDS
        # _joined checks these too.
        known = known or kind.__name__ in ("SiLUActivation", "Linear4bit")
        if not known:
            return False
    return True


def _joined(*layers: nn.Module) -> _Linear | None:
    """The weights of several layers side by side; None if one is not a plain product."""
    found = [whole_weight(layer) for layer in layers]
    weights = [one[0] for one in found if one is not None]
    biases = [one[1] for one in found if one is not None and one[1] is not None]
    if len(weights) < len(layers) or len(biases) not in (0, len(layers)):
        return None
    # Transposed, because CPUs multiply a few rows faster that way.
    return _ready(torch.cat(weights).t().contiguous()), _ready(
        torch.cat(biases)
    ) if biases else None


def _ready(weight: Tensor) -> Tensor:
    """In the type of autocast, which would otherwise convert the copy again for every token."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _times(x: Tensor, linear: _Linear) -> Tensor:
    weight, bias = linear
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
