"""What a training run is: ``TrainConfig`` changes the weights, ``RunConfig`` does not.

Names and meanings are those of transformers' ``TrainingArguments`` where it has the field.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mmemo.config import Config


class TrainConfig(Config):
    """Everything that decides which weights come out. Editing it forbids a resume."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of AdamW."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; above 0 it wins over ``num_train_epochs``."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows of one forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes of one process per optimizer step."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "cosine"
    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps in which the rate rises from zero; below 1 it is a share of all steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    seed: int = Field(default=42, ge=0)
    bf16: bool = False
    """Compute in bfloat16; trainable weights stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter to a third slower."""
    full_determinism: bool = True
    """Deterministic kernels where there are any. Bit-exact resume needs it on a GPU."""


class RunConfig(Config):
    """How a run is carried out. May be edited between a stop and a resume."""

    logging_steps: int = Field(default=10, ge=1)
    """Steps between two lines of ``metrics.jsonl``."""
    save_steps: int = Field(default=200, ge=1)
    """Steps between two checkpoints: the most that a kill can cost."""
    save_total_limit: int | None = Field(default=2, ge=1)
    """Checkpoints kept; None keeps all."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between two passes over ``eval_data``; None: only at the end."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers, one name or a list; ``none`` or an empty list: only ``metrics.jsonl``."""
    run_name: str | None = None
    max_nonfinite: int = Field(default=5, ge=1)
    """The run stops after this many steps in a row whose loss or gradient is not finite."""
    resume_from_checkpoint: Literal["auto", "force"] = "auto"
    """``auto`` goes on from the newest valid checkpoint if config and data are unchanged;
    ``force`` goes on although they changed, and records what did."""
    use_cpu: bool = False
    """Train on the CPU although there is a GPU."""
    processes: int = Field(default=1, ge=1)
    """Ranks started on this machine."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each rank; None divides the cores among the ranks. A resumed run keeps the
    number it began with, since sums depend on it in the last bit."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file, such as ``ds_configs/zero2.json``."""
    prefetch: int = Field(default=2, ge=0, le=64)
    """Steps whose batches are made ahead in a background thread; 0: none."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        if value in ("none", None):
            return []
        return [value] if isinstance(value, str) else value
