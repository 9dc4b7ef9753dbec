"""The settings of a training run: ``TrainConfig`` decides the weights, ``RunConfig`` does not.

Fields that transformers' ``TrainingArguments`` has too have its names and meanings.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from mmemo import content
from mmemo.config import Config
from mmemo.errors import ConfigError


class OptimizerConfig(Config):
    """AdamW and its learning rate."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """Learning rate schedule, one of transformers'."""
    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps in which the learning rate rises linearly from 0. A value below 1 is a fraction of all
    steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW, not applied to biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip gradients to this norm; 0 disables clipping."""


class TrainConfig(OptimizerConfig):
    """Settings that decide the resulting weights. A run cannot be resumed after changing one."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Number of passes over the training rows; may be a fraction."""
    max_steps: int = Field(default=-1, ge=-1)
    """Number of optimizer steps; if positive, overrides ``num_train_epochs``."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows per process in each forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward and backward passes per process in each optimizer step."""
    seed: int = Field(default=42, ge=0)
    """Seed of everything random in training: the order of the rows, dropout, completions."""
    bf16: bool = False
    """Compute in bfloat16; trainable weights stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, and makes a step a quarter to a
    third slower."""
    max_logits: int | None = Field(default=None, ge=0)
    """Maximum number of logits (scored tokens times vocabulary) held at once; more are computed in
    chunks. None is 2**26, which are 256 MiB in float32; 0 holds all."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts, 0.001 in the models' own configs;
    transformers' name. None and 0 leave it out."""
    tf32: bool | None = None
    """Let CUDA multiply float32 matrices in TF32; None leaves it to torch, which does not."""
    full_determinism: bool | None = None
    """Use deterministic kernels where they exist. They cost speed on CUDA, and bit-exact resume
    needs them there. None uses them on the CPU alone."""


class RunConfig(Config):
    """Settings that do not change the resulting weights. They may be changed before a resume."""

    logging_steps: int = Field(default=10, ge=1)
    """Log a line to ``metrics.jsonl`` every N steps."""
    save_steps: int = Field(default=200, ge=1)
    """Save a checkpoint every N steps. A killed run loses at most this many steps."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Number of checkpoints to keep; None keeps all."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on ``eval_data`` every N steps; None evaluates only at the end."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Rows per process in each forward pass of an evaluation."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers to log to, one name or a list, beside ``metrics.jsonl``; ``none`` or an empty list
    disables them."""
    run_name: str | None = None
    """Name of the run in the trackers; None uses the name of the output folder."""
    max_nonfinite: int = Field(default=5, ge=1)
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    resume_from_checkpoint: Literal["auto", "force"] = "auto"
    """``auto`` continues from the newest valid checkpoint if config and data are unchanged, and
    refuses otherwise; ``force`` continues although they changed, and records the differences."""
    use_cpu: bool = False
    """Train on the CPU even if there is a GPU."""
    processes: int = Field(default=1, ge=1)
    """Number of ranks to start on this machine, and on each other node."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each rank; None divides the cores among the ranks. A resumed run keeps the
    number it started with, because the last bit of a sum depends on it."""
    ddp_timeout: int = Field(default=1800, ge=1)
    """Seconds that a rank waits for the others before the run ends with an error. Set it above the
    time that one rank may need alone, as for a slow judge."""
    deepspeed: str | None = None
    """Path of a DeepSpeed JSON config, such as ``ds_configs/zero2.json``; None trains without
    DeepSpeed."""
    prefetch: int = Field(default=2, ge=0, le=64)
    """Number of steps whose batches are prefetched in a background thread; 0 disables it."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if value in ("none", None):
            return []
        return [value] if isinstance(value, str) else value


def zero_stage(run: RunConfig) -> int:
    """The ZeRO stage of the run's DeepSpeed config; 0 without DeepSpeed.

    Raises:
        ConfigError: the file is no DeepSpeed config.
    """
    if run.deepspeed is None:
        return 0
    try:
        values: Any = json.loads(content.find(run.deepspeed).read_text(encoding="utf-8"))
        return int(values.get("zero_optimization", {}).get("stage", 0))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{run.deepspeed}: is not a DeepSpeed JSON config ({error})") from error
