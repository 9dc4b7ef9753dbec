"""The cheapest changes of a config with which a run fits into a device's memory.

In the order of what they cost, from what changes no number to what changes the model:

1. logits in smaller chunks; a reference in the CPU's memory; ZeRO-2 over the GPUs that there are;
2. recomputed activations, which make a step a quarter to a third slower;
3. smaller micro-batches, and as many more of them: the same steps up to rounding, and slower;
4. ZeRO-3, which sends all weights around in every pass, and more so with weights and optimizer in
   the CPU's memory;
5. bfloat16, which rounds;
6. weights in 8 bits, then in 4, which round the frozen model;
7. an adapter instead of all weights, which is another method.

What would change the experiment is never proposed: shorter rows, fewer or shorter completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mmemo.check.fitting import Forecaster
from mmemo.check.memory import MemoryEstimate
from mmemo.config import Config as Config
from mmemo.config import apply_overrides, dump, parse

_SMALL = 1 << 22
"""Number of logits held at once in small chunks: 50 MB while the loss is computed."""
_MOST = 4
"""Changes that are combined at most."""


@dataclass(frozen=True, slots=True)
class Change:
    """Overrides of a config, in the form of the command line. ``cost``: in the order above.
    ``group``: of several in a group, one is made at most."""

    overrides: tuple[str, ...]
    cost: int
    group: str


@dataclass(frozen=True, slots=True)
class Fit:
    """Overrides with which the run fits, and the forecast with them."""

    overrides: tuple[str, ...]
    estimate: MemoryEstimate


def cheapest(config: Config, limit: int, again: Forecaster, count: int = 3) -> list[Fit]:
    """The cheapest changes, alone or together, with which the forecast is at most ``limit`` bytes.

    Args:
        again: the forecast for a changed config.

    Returns:
        At most ``count``, cheapest first. None holds another one and something more.
    """
    found: list[tuple[set[Change], Fit]] = []
    for chosen in _sets(list(possible(dump(config)))):
        if any(smaller <= set(chosen) for smaller, _ in found):
            continue
        overrides = tuple(one for change in chosen for one in change.overrides)
        values = apply_overrides(dump(config), [f"--{one}" for one in overrides])
        changed = parse(type(config), values)
        if again.kept(changed) > limit:
            continue
        estimate = again(changed)
        if estimate.total <= limit:
            found.append((set(chosen), Fit(overrides, estimate)))
        if len(found) == count:
            break
    return [fit for _, fit in found]


def _sets(changes: list[Change]) -> Iterator[tuple[Change, ...]]:
    """Sets of changes of different groups, the cheapest first, small ones before large ones."""
    sets = [
        chosen
        for number in range(1, _MOST + 1)
        for chosen in combinations(changes, number)
        if len({change.group for change in chosen}) == number
    ]
    yield from sorted(sets, key=lambda chosen: (sum(c.cost for c in chosen), len(chosen)))


def possible(values: Mapping[str, Any]) -> Iterator[Change]:
    """The changes that can be made to a config, by its resolved values."""
    train, model, run = values["train"], values["model"], values["run"]
    limit = train["max_logits"]
    if limit is None or limit == 0 or limit > _SMALL:
        yield Change((f"train.max_logits={_SMALL}",), 1, "logits")
    yield from _of_reference(values)
    if run["processes"] > 1 and run["deepspeed"] is None:
        yield Change(("run.deepspeed=ds_configs/zero2.json",), 2, "zero")
    if run["processes"] > 1 and "zero3" not in str(run["deepspeed"]):
        yield Change(("run.deepspeed=ds_configs/zero3.json",), 8, "zero")
    if run["processes"] > 1 and "offload" not in str(run["deepspeed"]):
        yield Change(("run.deepspeed=ds_configs/zero3_offload.json",), 10, "zero")
    if not train["gradient_checkpointing"]:
        yield Change(("train.gradient_checkpointing=true",), 3, "again")
    yield from _of_batches(values)
    if not train["bf16"]:
        kept = () if model["dtype"] == "bfloat16" else ("model.dtype=bfloat16",)
        yield Change(("train.bf16=true", *kept), 9, "numbers")
    yield from _of_weights(values)


def _of_reference(values: Mapping[str, Any]) -> Iterator[Change]:
    dpo, grpo = values.get("dpo"), values.get("grpo")
    if dpo and dpo["reference"] == "copy":
        yield Change(("dpo.reference=stored",), 1, "reference")
    if grpo and grpo["beta"] and (grpo["reference"] == "copy" or values["model"]["lora"] is None):
        yield Change(("grpo.reference=copy_cpu",), 2, "reference")


def _of_batches(values: Mapping[str, Any]) -> Iterator[Change]:
    train, grpo = values["train"], values.get("grpo")
    rows, accumulated = (
        train["per_device_train_batch_size"],
        train["gradient_accumulation_steps"],
    )
    steps = 0
    smaller = rows
    while smaller > 1 and not values.get("packing"):
        smaller = next(n for n in range(smaller // 2, 0, -1) if rows % n == 0)
        steps += 1
        many = accumulated * rows // smaller
        also = ()
        if grpo and grpo["steps_per_generation"]:
            also = (f"grpo.steps_per_generation={grpo['steps_per_generation'] * rows // smaller}",)
        yield Change(
            (
                f"train.per_device_train_batch_size={smaller}",
                f"train.gradient_accumulation_steps={many}",
                *also,
            ),
            3 + steps,
            "batches",
        )
    if values.get("packing"):
        tokens = values["packing"]["max_tokens"]
        for part in (2, 4):
            yield Change((f"packing.max_tokens={max(1, tokens // part)}",), 3 + part, "batches")
    if grpo and grpo["max_tokens_per_batch"] != 1:
        # One prompt with its completions at a time: a group is never split.
        yield Change(("grpo.max_tokens_per_batch=1",), 4, "batches of the update")


def _of_weights(values: Mapping[str, Any]) -> Iterator[Change]:
    model = values["model"]
    adapted = model["lora"] is not None
    if "lm" not in values["trainable"]:
        return
    if not adapted and model["adapter"] == "continue" and model["quantization"] is None:
        yield Change(("model.lora={r: 64, lora_alpha: 128}",), 20, "adapter")
        both = ("model.lora={r: 64, lora_alpha: 128}", "model.quantization=nf4")
        yield Change(both, 30, "adapter")
    if adapted and model["quantization"] is None:
        if values["run"]["deepspeed"] is None:
            yield Change(("model.quantization=int8",), 11, "quantization")
        yield Change(("model.quantization=nf4",), 12, "quantization")
