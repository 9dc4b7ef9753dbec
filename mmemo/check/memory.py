"""Forecast of the device memory that a run needs, before it is run.

The most that a run holds is the most of any of its phases: completions are *drawn*, a reference
*scores* them, and the weights are *updated*. Each phase is a small formula below. What autograd
keeps of a layer is not guessed but found for the layers as they are
(:mod:`mmemo.check.layers`). ``tests/check/test_forecast.py`` holds the forecasts against what steps
of the stages were measured to need.

T tokens of a forward pass, K of them scored, k of these in a chunk, n layers, D hidden size, V
vocabulary, i width of the MLP, R rows that are drawn, e bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mmemo.check.layers import Numbers, Passes, layer_bytes, widths
from mmemo.check.sharding import Sharding
from mmemo.generation.free_memory import SHARE
from mmemo.generation.token_scores import MAX_LOGITS
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.merging import merged_bytes
from mmemo.models.adapters.quantization import Quantization
from mmemo.models.attention.fused import FAMILIES
from mmemo.train.reference import copied

FORMULA = (
    "weights in their types (nf4: half a byte and scales; with an engine in bf16: two bytes); "
    "AdamW: 8 bytes per trainable parameter; gradients: 4; activations: what autograd keeps of "
    "every layer, or with gradient_checkpointing each layer's input and one layer whole; logits: "
    "12 bytes for each that is held at once; cache: 2 n k e per token"
)
"""The terms, in one sentence."""

FORMULA_OF_REFERENCE = (
    "; reference: a copy of the weights that learn, with copy_cpu only while there are no "
    "activations and logits"
)
"""The term of a run that has a copy of the model as its reference."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a run needs beside the weights and the optimizer, in bytes by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. Encoding clips is not counted: it is done one clip at a time, before or
    between the steps."""

    weights: int
    """Weights that do not learn."""
    adapter: int = 0
    """Weights that learn."""
    optimizer: int = 0
    reference: int = 0
    """The reference's copy of the weights that learn, if it stays on the device."""
    phases: tuple[Phase, ...] = ()
    trainable: int = 0
    """Trainable parameters, not bytes."""

    @property
    def kept(self) -> int:
        """What is there in every phase."""
        return self.weights + self.adapter + self.optimizer + self.reference

    @property
    def largest(self) -> Phase | None:
        """The phase that decides."""
        return max(self.phases, key=lambda phase: phase.total, default=None)

    @property
    def total(self) -> int:
        largest = self.largest
        return self.kept + (0 if largest is None else largest.total)

    def of(self, part: str) -> int:
        """The most of a part in any phase."""
        return max((phase.parts.get(part, 0) for phase in self.phases), default=0)


@dataclass(frozen=True, slots=True)
class Update:
    """How the weights are updated.

    ``passes``: of a micro-batch. ``accumulates``: gradients of earlier micro-batches are there when
    another is computed. ``max_logits``: as ``train.max_logits``. ``scores``: a pass without
    gradient precedes, of a reference or of the policy as it was.
    """

    passes: Passes
    accumulates: bool = False
    gradient_checkpointing: bool = False
    max_logits: int | None = None
    scores: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """How completions are drawn, or questions answered.

    ``prompts``: B of a micro-batch, of ``length`` tokens each. ``group``: rows of each prompt.
    ``batches``: micro-batches that may be decoded together. ``copies``: decode from a copy of the
    weights; None: if it fits. ``filtered``: tokens are sorted for ``top_p``.
    """

    prompts: int
    length: int
    new_tokens: int
    group: int = 1
    batches: int = 1
    shared: bool = True
    copies: bool | None = False
    filtered: bool = False

    @property
    def rows(self) -> int:
        return self.prompts * self.group


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run does on one device. ``reference``: bytes of a copy of the model;
    ``reference_offloaded``: it is on the device only while it scores. ``limit``: bytes that there
    are, by which copies for drawing are made or not. ``quantization``: of the linear layers, where
    the model at hand is not quantized itself."""

    numbers: Numbers = field(default_factory=Numbers)
    update: Update | None = None
    drawing: Drawing | None = None
    sharding: Sharding = field(default_factory=Sharding)
    reference: int = 0
    reference_offloaded: bool = False
    limit: int | None = None
    quantization: Quantization | None = None


def kept_bytes(model: nn.Module, work: Workload) -> tuple[MemoryEstimate, int]:
    """The part of a :func:`forecast` that is there in every phase, which is quickly found, and the
    bytes of weights that are on other devices."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in learnt)
    share, bf16 = work.sharding, work.numbers.whole_bf16
    if bf16:  # every weight in bfloat16, and a master copy in float32 with the optimizer
        frozen = _stored(model, work.quantization, most=2) - 2 * trainable
        adapter, state = 2 * trainable, 12 * trainable
    else:
        # Trainable weights are kept in float32, whatever the model computes in.
        frozen = _stored(model, work.quantization) - sum(map(_bytes, learnt))
        adapter, state = 4 * trainable, (8 if share.stage == 0 else 12) * trainable
    largest = max((p.numel() for p in model.parameters()), default=0)
    found = MemoryEstimate(
        weights=share.weights(frozen + adapter, 2 if bf16 else 4, largest) - share.own(adapter),
        adapter=share.own(adapter),
        optimizer=share.optimizer(state),
        reference=0 if work.reference_offloaded else work.reference,
        trainable=trainable,
    )
    return found, frozen + adapter - found.weights - found.adapter


def forecast(model: nn.Module, work: Workload) -> MemoryEstimate:
    """Memory of one device. The model's trainable parameters are chosen; its values are not read,
    so that it may be on ``meta``."""
    known, elsewhere = kept_bytes(model, work)
    phases: list[Phase] = []
    if work.drawing is not None:
        phases.append(_drawing(model, work, work.drawing, known.kept, elsewhere))
    if work.update is not None:
        if work.update.scores:
            phases.append(_scoring(model, work, work.update))
        gradients = work.sharding.gradients(known.trainable)
        phases.append(_updating(model, work, work.update, gradients))
    return replace(known, phases=tuple(phases))


def _updating(model: nn.Module, work: Workload, update: Update, gradients: int) -> Phase:
    """The update: the most of three moments.

    1. The loss is computed: everything that autograd keeps, and the logits of a chunk.
    2. The last layer's backward pass: the same without logits, and 8 T i bytes of gradients of its
       activations. With checkpointing, layers' inputs, and one layer that is computed again.
    3. The first layer's: its activations, and the gradients of all weights.

    Gradients of earlier micro-batches are there in all of them.
    """
    lm: Any = unwrap(model).language_model
    passes, w = update.passes, widths(lm.config)
    found = layer_bytes(lm, passes, work.numbers)
    one, rest = found.layer, passes.times * found.rest
    held = (
        w.layers * passes.times * (found.entering if update.gradient_checkpointing else found.layer)
    )
    again = one if update.gradient_checkpointing else 0
    temporary = 8 * passes.tokens * w.mlp + _unpacked(lm, work)
    before = gradients if update.accumulates else 0
    moments: tuple[Mapping[str, int], ...] = (
        {
            "gradients": before,
            "activations": held + rest,
            "logits": _logits(model, work, update, passes.scored * passes.times),
        },
        {"gradients": before, "activations": held + rest + again + temporary},
        {"gradients": gradients, "activations": one + rest + temporary},
    )
    return Phase("update", max(moments, key=lambda parts: sum(parts.values())))


def _scoring(model: nn.Module, work: Workload, update: Update) -> Phase:
    """Passes without gradient: a few of a layer's tensors, or the logits of a chunk; and a copy of
    the model that is there only now."""
    lm: Any = unwrap(model).language_model
    found = {"reference": work.reference if work.reference_offloaded else 0}
    passing = _without_gradient(lm, update.passes.tokens, work.numbers)
    logits = 12 * _held(model, update.max_logits, update.passes.scored)
    part = "logits" if logits > passing else "activations"
    return Phase("scoring", {**found, part: max(passing, logits)})


def _drawing(model: nn.Module, work: Workload, drawing: Drawing, kept: int, gathered: int) -> Phase:
    """Drawing: keys and values of the prompts and of all new tokens, once or for every row; the
    logits of the last position with their softmax and its sum in float64; a copy of the linear
    layers with the adapter added in, if it fits; and with ZeRO-3 the weights of the other devices.
    """
    lm: Any = unwrap(model).language_model
    w, size = widths(lm.config), _size(lm, work.numbers)
    token = 2 * w.layers * w.key * size
    prompts = drawing.prompts * drawing.length * (1 if drawing.shared else drawing.group)
    cache = token * (prompts + drawing.rows * drawing.new_tokens)
    copies = merged_bytes(lm)
    free = None if work.limit is None else work.limit - kept - gathered
    wanted = drawing.copies
    if wanted is None:
        wanted = free is None or copies + cache <= SHARE * free
    if not (_adapted(lm) or (drawing.group > 1 and type(lm).__name__ in FAMILIES)):
        wanted = False
    copies = copies if wanted else 0
    together = drawing.batches
    if free is not None:
        together = max(1, min(together, int(SHARE * (free - copies) / 2 / max(1, cache))))
    rows = drawing.rows * together
    words = _vocabulary(model)
    last = rows * words * (size + 20 + (20 if drawing.filtered else 0))
    prefill = _without_gradient(lm, prompts, work.numbers)
    return Phase(
        "drawing",
        {
            "copy of weights": copies,
            "gathered weights": gathered if work.sharding.stage >= 3 else 0,
            "cache": cache * together,
            "logits": last,
            "activations": max(0, prefill - last),
        },
    )


def _without_gradient(lm: Any, tokens: int, numbers: Numbers) -> int:
    """Tensors of a layer that are there at once: hidden states before and after, and the MLP's."""
    w = widths(lm.config)
    return tokens * _size(lm, numbers) * (3 * w.hidden + max(3 * w.mlp, 2 * w.query + 2 * w.key))


def _logits(model: nn.Module, work: Workload, update: Update, scored: int) -> int:
    """12 bytes for each logit that is held: log-probabilities, and their gradients before and after
    the softmax. In chunks also the hidden states' known gradients, or, where the head learns, a
    second gradient of its weight."""
    held = _held(model, update.max_logits, scored)
    head: Any = unwrap(model).lm_head
    weight = getattr(head, "original_module", head).weight
    learns = any(p.requires_grad for p in head.parameters())
    found = 12 * held
    if held < scored * _vocabulary(model):
        width = int(weight.shape[-1])
        found += 4 * held + 8 * weight.numel() if learns else 2 * scored * width * 4
    if work.numbers.autocast and weight.element_size() == 4:
        found += 2 * weight.numel()  # autocast's copy of the head
    return found


def _held(model: nn.Module, limit: int | None, scored: int) -> int:
    """Number of logits that are held at once."""
    words, limit = _vocabulary(model), MAX_LOGITS if limit is None else limit
    return scored * words if limit == 0 else min(scored, max(1, limit // words)) * words


def _vocabulary(model: nn.Module) -> int:
    head: Any = unwrap(model).lm_head
    return int(getattr(head, "original_module", head).weight.shape[0])


def _unpacked(lm: Any, work: Workload) -> int:
    """The largest quantized layer, as it is computed with."""
    quantized = [
        m
        for m in lm.modules()
        if type(m).__module__.startswith("bitsandbytes")
        or (work.quantization and type(m) is nn.Linear)
    ]
    return 2 * max((m.in_features * m.out_features for m in quantized), default=0)


def _adapted(lm: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in lm.named_parameters())


def _size(lm: Any, numbers: Numbers) -> int:
    return 2 if numbers.whole_bf16 else int(lm.get_input_embeddings().weight.element_size())


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


def _stored(model: nn.Module, quantization: Quantization | None, most: int = 8) -> int:
    """Bytes of all weights. ``most``: of a number, however the model at hand holds it."""
    plain: set[int] = set()
    small = 0
    if quantization is not None:
        lm: Any = unwrap(model).language_model
        for name, module in lm.named_modules():
            if type(module) is nn.Linear and ".lora_" not in f".{name}":
                plain.add(id(module.weight))
                small += quantized_bytes(module.weight, quantization)
    return small + sum(_bytes(x, most) for x in _once(model) if id(x) not in plain)


def quantized_bytes(weight: Tensor, kind: Quantization) -> int:
    """Bytes of a linear layer's weight in nf4 (a float32 scale for 64 values) or in int8 (one for
    each output)."""
    number = weight.numel()
    return number // 2 + number // 16 if kind == "nf4" else number + 4 * int(weight.shape[0])


def _once(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()  # tied weights come once
    yield from model.buffers()


def _bytes(tensor: Tensor, most: int = 8) -> int:
    each = tensor.element_size()
    size = tensor.numel() * (min(most, each) if tensor.is_floating_point() else each)
    state: Any = getattr(tensor, "quant_state", None)  # bitsandbytes: scales of the blocks
    if state is not None and getattr(state, "absmax", None) is not None:
        size += state.absmax.numel() * state.absmax.element_size()
    return size
