"""Estimate of the device memory that a step needs, before it is run.

B rows of a forward pass, L tokens of the longest row, A of them scored, h hidden size, q and k
widths of queries and keys, i width of the MLP, V vocabulary, e bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmemo.train.reference import copied

FORMULA = (
    "weights: every parameter in its type (nf4: half a byte and its scales); gradients: 4 bytes "
    "and AdamW: 8 bytes per trainable parameter; activations: B L e (6h + 3q + 2k + 4i) per layer "
    "of the LM, or B L e h per layer and one whole layer with gradient_checkpointing; logits: "
    "B A V (12 + 2e); KV cache of generation: 2 B (L + new) k e per layer"
)
"""The terms of the estimates. The activations are the tensors that autograd keeps in a
pre-norm decoder layer with a gated MLP and fused attention: the input, the normed value and its
product at both norms (6h); queries, keys and values after rotation, the attention's output and
its contiguous copy (3q + 2k); gate, its activation, up, and their product (4i)."""

FORMULA_OF_REFERENCE = (
    "; reference: a copy of the weights that learn, with copy_cpu only while there are no "
    "activations and logits"
)
"""The term of a run that has a copy of the model as its reference."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. Activations of the encoders are not counted, because features are
    computed one clip at a time, before or between the steps."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    cache: int = 0
    reference: int = 0
    """The reference's copy of the weights that learn."""
    reference_offloaded: bool = False
    """The copy is on the device only while it scores, when activations and logits are not."""
    trainable: int = 0
    """Trainable parameters, not bytes."""

    @property
    def total(self) -> int:
        passing = self.activations + self.logits + self.cache
        kept = self.weights + self.gradients + self.optimizer
        if self.reference_offloaded:
            return kept + max(passing, self.reference)
        return kept + passing + self.reference


def estimate_training(
    model: nn.Module,
    text_config: Any,
    *,
    batch_size: int,
    length: int,
    answer_length: int,
    number_size: int,
    gradient_checkpointing: bool = False,
    ranks: int = 1,
    zero_stage: int = 0,
    reference: int = 0,
    reference_offloaded: bool = False,
) -> MemoryEstimate:
    """Memory of one training step on one device.

    Args:
        text_config: the Hugging Face config of the language model.
        length: L of the longest batch. answer_length: A.
        number_size: e, 2 for bf16 and 4 for float32.
        ranks: devices among which ZeRO shards: the optimizer state in stage 1, also the gradients
            in stage 2, also the weights in stage 3.
        reference: bytes of the reference's copy, which is never sharded.
        reference_offloaded: keep it on the device only while it scores.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in learnt)
    # Trainable weights are kept in float32, whatever the model computes in.
    raised = sum(p.numel() * max(0, 4 - p.element_size()) for p in learnt)
    layers, per_token = layer_numbers(text_config)
    tokens = batch_size * length
    whole = tokens * per_token * number_size
    hidden = int(text_config.hidden_size)
    # Checkpointing keeps the input of each layer, and one layer whole while it is recomputed.
    checkpointed = tokens * hidden * number_size * layers + whole
    vocabulary = int(text_config.vocab_size)
    return MemoryEstimate(
        weights=(_stored(model) + raised) // (ranks if zero_stage >= 3 else 1),
        gradients=4 * trainable // (ranks if zero_stage >= 2 else 1),
        optimizer=8 * trainable // (ranks if zero_stage >= 1 else 1),
        activations=checkpointed if gradient_checkpointing else whole * layers,
        logits=batch_size * answer_length * vocabulary * (12 + 2 * number_size),
        reference=reference,
        reference_offloaded=reference_offloaded,
        trainable=trainable,
    )


def reference_bytes(model: nn.Module, *, shared: bool) -> int:
    """Bytes of a reference's copy of a model whose trainable parameters are chosen.

    Args:
        shared: frozen weights are the policy's own, as without ZeRO-3.
    """
    # Those that learn are kept in float32, and so is their copy.
    return sum(
        p.numel() * max(p.element_size(), 4 if p.requires_grad else 0)
        for p in copied(model, shared=shared)
    )


def estimate_generation(
    model: nn.Module,
    text_config: Any,
    *,
    batch_size: int,
    length: int,
    new_tokens: int,
    number_size: int,
) -> MemoryEstimate:
    """Memory of generation: weights, the activations of one layer on the prompt, the KV cache, and
    the logits of the last position."""
    layers, per_token = layer_numbers(text_config)
    widths = _widths(text_config)
    cache = 2 * batch_size * (length + new_tokens) * widths.key * number_size * layers
    return MemoryEstimate(
        weights=_stored(model),
        activations=batch_size * length * per_token * number_size,
        # Only the last position's logits are made: once as computed, and once in float32.
        logits=batch_size * int(text_config.vocab_size) * (4 + number_size),
        cache=cache,
    )


@dataclass(frozen=True, slots=True)
class _Widths:
    hidden: int
    query: int
    key: int
    mlp: int


def _widths(config: Any) -> _Widths:
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    # Grouped-query attention has fewer heads of keys and values than of queries.
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    mlp = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    return _Widths(hidden, heads * size, groups * size, mlp)


def layer_numbers(config: Any) -> tuple[int, int]:
    """Number of layers, and of the values that autograd keeps for each token in each layer."""
    w = _widths(config)
    return int(config.num_hidden_layers), 6 * w.hidden + 3 * w.query + 2 * w.key + 4 * w.mlp


def _stored(model: nn.Module) -> int:
    return sum(_bytes(tensor) for tensor in _once(model))


def _once(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()  # tied weights come once
    yield from model.buffers()


def _bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes: scales of the blocks
    if state is not None and getattr(state, "absmax", None) is not None:
        size += state.absmax.numel() * state.absmax.element_size()
    return size
