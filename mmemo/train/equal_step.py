"""Plain LoRA whose first optimizer step moves the logits as far as that of experts does.

An adapter adds s B(A x) to a layer, where s is its scaling, and B = 0 at the start. So A has no
gradient in the first step, and AdamW, whose first update is the sign of the gradient G of B (its
two moments are g and g^2 after their correction), sets B = -lr sign(G). The layer's output moves by

    -lr s sum over j of sign(G_.j) (A x)_j

for all adapters. What differs is the sum: over R products for plain LoRA of rank R, and for experts
over r products for each expert in use, multiplied by weights that sum to 1. Where the signs agree
with the products, the sum grows with the rank; where they do not, with its root, which is what
rsLoRA (arXiv 2312.03732) assumes. Which of the two depends on how much the tokens of the data have
in common, layer by layer: with plain LoRA's scaling equal to that of the experts, its first step is
2.5 to 8 times as far on random tiny models, and the root of the ranks' ratio misses that by up to
half. So the step is measured, and neither rule is used.

Since the sign of G does not depend on s, the step is proportional to s as far as the logits are
linear in it, and does not depend on the gradient's scale. The learning rate cancels likewise. A few
corrections of s take care of what is not linear.

Shapes: B rows, L tokens, K positions that predict an answer token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from mmemo import files
from mmemo.console import console
from mmemo.data.collate import IGNORE_INDEX
from mmemo.errors import ConfigError
from mmemo.losses.sft import answer_positions
from mmemo.models.adapters.lora import add_lora, as_experts, as_plain, in_adapter, of_tokens
from mmemo.models.build import Loaded, set_trainable
from mmemo.models.config import AdapterConfig
from mmemo.train import runtime
from mmemo.train.config import TrainConfig
from mmemo.train.dataloader import Batch, Data
from mmemo.train.engine import adamw, trainable
from mmemo.train.resume import Identity
from mmemo.train.stage import MediaStageConfig, StageContext
from mmemo.train.trainer import Objective

FILE = "equal_step.json"
"""File in the run's folder with what was measured, which a resumed run reads."""
_ROWS = 64
"""Rows of the first step that are measured, at most."""
_CLOSE = 0.01
"""Relative distance from the experts' step at which the scaling is left as it is."""


@dataclass(frozen=True, slots=True)
class EqualStep:
    """What was measured: how far the first step moves the answers' logits, as the root of the mean
    square over tokens and vocabulary.

    ``experts`` is the reference's. ``plain`` is that of LoRA at the scaling of the experts, and
    ``matched`` at ``lora_alpha``.
    """

    lora_alpha: float
    experts: float
    plain: float
    matched: float


def equal_step(
    context: StageContext,
    config: MediaStageConfig,
    data: Data,
    objective: Objective,
    identity: Identity,
) -> StageContext:
    """The context with an adapter of equal step in its model; called on every rank.

    Args:
        identity: what decides the measurement. A run that is resumed with the same uses what was
            measured, since sums in another order would give another scaling.

    Raises:
        ConfigError: one of the adapters does not move the logits.
    """
    run, section = context.run, config.model.lora
    assert section is not None
    path, key = run.folder / FILE, _key(identity)
    known = json.loads(run.ranks.broadcast_text(_stored(path, key) if run.ranks.is_main else ""))
    make = _Maker(context.loaded, section, config, run.ranks.device)
    if known is None:
        rows, size = data.plan(0)[0][:_ROWS], config.train.per_device_train_batch_size
        batches = [data.collate(rows[at : at + size]) for at in range(0, len(rows), size)]
        found = first_steps(make, _Probe(objective, batches, config.train, run.ranks.device))
        # Kernels may round differently from rank to rank: all take the main rank's.
        found = EqualStep(**json.loads(run.ranks.broadcast_text(json.dumps(asdict(found)))))
        if run.ranks.is_main:
            files.write_whole(path, json.dumps({"key": key, "measured": asdict(found)}) + "\n")
    else:
        found = EqualStep(**known)
    run.record.event("equal_step", **asdict(found))
    if run.ranks.is_main:
        console.print(
            f"LoRA of equal size: the first step would go {found.plain / found.experts:.2f} times "
            f"as far as the experts'; lora_alpha {found.lora_alpha:.4g} makes it "
            f"{found.matched / found.experts:.2f} times as far"
        )
    loaded = context.loaded
    return replace(
        context, loaded=Loaded(make.plain(found.lora_alpha), loaded.processor, loaded.base)
    )


def _key(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity.saved, sort_keys=True).encode()).hexdigest()


def _stored(path: Path, key: str) -> str:
    """The JSON of what an earlier start of this run measured, or of None."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return json.dumps(values["measured"] if values["key"] == key else None)
    except (OSError, ValueError, KeyError, TypeError):
        return "null"


class _Maker:
    """Puts one adapter after another on a model. Each is drawn as it would be alone: the experts
    are those of a run with the same config and seed."""

    def __init__(
        self,
        loaded: Loaded,
        section: AdapterConfig,
        config: MediaStageConfig,
        device: torch.device,
    ) -> None:
        self.section, self.config, self.device = section, config, device
        self.tokenizer = loaded.processor.tokenizer
        assert loaded.drawn_from is not None  # only new adapters come here
        self.drawn_from = loaded.drawn_from
        self.bare: Any = _unloaded(loaded.model)
        self.plain_section = as_plain(self.bare, section)
        self._last: PeftModel | None = None

    def experts(self) -> PeftModel:
        return self._make(as_experts(self.section))

    def plain(self, alpha: float | None = None) -> PeftModel:
        changed = {} if alpha is None else {"lora_alpha": alpha}
        return self._make(self.plain_section.model_copy(update=changed))

    def _make(self, section: AdapterConfig) -> PeftModel:
        if self._last is not None:
            _unloaded(self._last)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.drawn_from)
            new = self.config.model.new_tokens or ()
            made = add_lora(self.bare, section, self.tokenizer, new)
        set_trainable(made, self.config.trainable)
        made.to(self.device).eval()
        self._last = made
        return made


def _unloaded(model: Any) -> Any:
    """The model without its adapter, as it was before it had one."""
    inner = model.base_model.model
    wrapped = [(n, m) for n, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    bare = model.base_model.unload()
    # PEFT leaves the copies that would have learnt, which are not tied to each other any more.
    for name, module in wrapped:
        parent, _, last = name.rpartition(".")
        setattr(bare.get_submodule(parent), last, module.original_module)
    return bare


def first_steps(make: _Maker, probe: _Probe) -> EqualStep:
    """Measure the first step of the experts and of plain LoRA, and find the scaling at which the
    second is as far as the first.

    Measured without dropout, at the peak learning rate, for the adapter alone: all other weights
    begin with the same gradient under both. In bf16, rounding adds to both moves.

    Raises:
        ConfigError: one of the adapters does not move the logits.
    """
    reference = make.experts()
    probe.step(reference)
    wanted = probe.move(reference)
    lora = make.plain()
    alpha = float(lora.peft_config["default"].lora_alpha)  # pyright: ignore
    probe.step(lora)
    first = moved = probe.move(lora)
    if not (0 < wanted < math.inf and 0 < first < math.inf):
        raise ConfigError(
            "lora.experts.match_step: the first step does not move the logits, so that there is "
            "nothing to match; check train.learning_rate and the rows, or leave match_step out"
        )
    for _ in range(4):
        if abs(moved / wanted - 1) < _CLOSE:
            break
        alpha *= wanted / moved
        for layer in lora.modules():
            if isinstance(layer, LoraLayer):
                for name in layer.scaling:
                    layer.scaling[name] *= wanted / moved
        moved = probe.move(lora)
    return EqualStep(alpha, wanted, first, moved)


class _Probe:
    """Takes the first step of an adapter and measures how far it moves the logits."""

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Batch],
        train: TrainConfig,
        device: torch.device,
    ) -> None:
        self.objective, self.batches, self.train, self.device = objective, batches, train, device

    def _autocast(self) -> Any:
        if not self.train.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def step(self, model: nn.Module) -> None:
        """One AdamW step of the adapter's weights, with the gradient of all batches."""
        weight = sum(map(self.objective.weight, self.batches))
        for batch in self.batches:
            with self._autocast():
                loss = self.objective(model, runtime.to_device(batch, self.device)).rows.sum()
            (loss / max(weight, 1e-12)).backward()
        learnt = trainable(model)
        limit = self.train.max_grad_norm or float("inf")
        nn.utils.clip_grad_norm_(learnt.values(), limit)
        # Trained tokens take the same step under both.
        adapter = {n: p for n, p in learnt.items() if in_adapter(n) and not of_tokens(n)}
        adamw(adapter, self.train).step()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def move(self, model: Any) -> float:
        """Root mean square, over answer tokens and vocabulary, of what the adapter adds."""
        square, count = 0.0, 0
        for one in self.batches:
            batch = runtime.to_device(one, self.device)
            positions = answer_positions(batch["labels"])
            scored = batch["labels"][:, positions + 1] != IGNORE_INDEX  # (B, K)
            with self._autocast():
                with model.disable_adapter():
                    before = self._logits(model, batch, positions)[scored]
                change = self._logits(model, batch, positions)[scored].double() - before.double()
            square += float(change.square().sum())
            count += change.numel()
        return math.sqrt(square / max(count, 1))

    def _logits(self, model: Any, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """(B, K, V)."""
        inputs = {name: batch[name] for name in batch["inputs"]}
        return model(**inputs, logits_to_keep=positions, use_cache=False).logits
