"""From a stage's plan and the lengths of its rows to what its steps compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmemo.check.layers import Numbers, Passes
from mmemo.check.memory import Drawing, Update, Workload, reference_bytes
from mmemo.check.plan import CheckPlan, TrainingPlan
from mmemo.check.sharding import Sharding, sharding_of
from mmemo.generation.rollout import RolloutConfig
from mmemo.models.adapters.lora import unwrap


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the longest row or prompt, and of its answer. ``pair``: of the largest pair, the
    tokens that are trained on together (0: not known), and those of them whose logits are needed.
    """

    longest: int
    answer: int
    pair: tuple[int, int] | None = None


def workload(
    plan: CheckPlan,
    model: nn.Module,
    lengths: Lengths,
    *,
    ranks: int | None = None,
    limit: int | None = None,
    on_gpu: bool = True,
) -> Workload:
    """What a stage does on one device.

    Args:
        model: with its trainable parameters chosen.
        ranks: devices on all machines; None: as the config says.
        limit: bytes of the device.
        on_gpu: ``copy_cpu`` has a memory of its own to go to.
    """
    training = plan.training
    if training is None:
        drawing = Drawing(plan.batch_size, lengths.longest, plan.new_tokens, shared=False)
        return Workload(drawing=drawing, limit=limit)
    lm: Any = unwrap(model).language_model
    sharding = sharding_of(training.run, ranks=ranks, width=int(lm.config.hidden_size))
    deepspeed = training.run.deepspeed is not None
    copied = 0
    if training.reference in ("copy", "copy_cpu"):
        copied = reference_bytes(model, shared=sharding.stage < 3)
    rollout = training.rollout
    return Workload(
        numbers=Numbers(
            autocast=training.train.bf16 and not deepspeed,
            whole_bf16=training.train.bf16 and deepspeed,
            dropout=training.dropout,
        ),
        update=_update(training, lengths, sharding),
        drawing=None
        if rollout is None or rollout.engine != "hf"  # a server draws
        else _drawing(training, rollout, lengths.longest),
        sharding=sharding,
        reference=copied,
        reference_offloaded=training.reference == "copy_cpu" and on_gpu,
        limit=limit,
    )


def _update(training: TrainingPlan, lengths: Lengths, sharding: Sharding) -> Update:
    train, passes = training.train, _passes(training, lengths)
    # GRPO splits what exceeds its budget over several passes.
    split = training.rollout is not None and passes.rows < train.per_device_train_batch_size
    packs = training.packing is not None and passes.rows < train.per_device_train_batch_size
    return Update(
        passes=passes,
        accumulates=train.gradient_accumulation_steps > 1 or split or packs or sharding.stage > 0,
        gradient_checkpointing=train.gradient_checkpointing,
        max_logits=train.max_logits,
        scores=training.scores,
    )


def _passes(training: TrainingPlan, lengths: Lengths) -> Passes:
    rows, rollout = training.train.per_device_train_batch_size, training.rollout
    if rollout is not None:  # a prompt and all of its completions are one packed row
        group, new = rollout.num_generations, rollout.max_completion_length
        budget = training.max_tokens_per_batch
        if budget is not None:
            rows = min(rows, max(1, budget // (lengths.longest + group * new)))
        return _continued(training, rows, lengths.longest, group, new, 1)
    if training.answers:
        branches, answers = training.branches, training.answers
        # Where clips decide a prompt's length, it is known by the rows of chosen answers alone.
        prompt, scored = lengths.longest - lengths.answer, answers * lengths.answer
        if lengths.pair is not None:
            together, scored = lengths.pair
            prompt = (together - scored) // branches if together else prompt
        return _continued(
            training, rows, prompt, answers // branches, -(-scored // answers), branches
        )
    if training.packing is not None:
        # As many rows as are in a step, or as fit into the budget, if all were the longest.
        rows *= training.train.gradient_accumulation_steps
        rows = min(rows, max(1, training.packing // lengths.longest))
        return Passes(rows, lengths.longest, rows * lengths.answer, packed=True)
    return Passes(rows, lengths.longest, rows * lengths.answer)


def _continued(
    training: TrainingPlan, rows: int, prompt: int, group: int, width: int, times: int
) -> Passes:
    """Rows of prompts with ``group`` continuations each."""
    group = max(1, group)
    scored = rows * group * width
    if training.shared_prefix:
        return Passes(rows, prompt, scored, rows * group, width, times=times)
    return Passes(rows * group, prompt + width, scored, times=times)


def _drawing(training: TrainingPlan, rollout: RolloutConfig, longest: int) -> Drawing:
    wanted = (rollout.merge_adapter, rollout.fused_steps)
    copies = True if True in wanted else False if wanted == (False, False) else None
    return Drawing(
        prompts=training.train.per_device_train_batch_size,
        length=longest,
        new_tokens=rollout.max_completion_length,
        group=rollout.num_generations,
        batches=training.drawn_batches if rollout.whole_steps else 1,
        shared=rollout.shared_prefill and rollout.shared_cache,
        copies=copies,
        filtered=rollout.top_p < 1,
    )
