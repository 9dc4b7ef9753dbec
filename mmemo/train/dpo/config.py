"""The config of a preference run, with TRL's names where TRL has the same setting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.features.encode import StoreConfig
from mmemo.losses.objective import ObjectiveConfig
from mmemo.media.config import DecodeConfig
from mmemo.models.build import ModelConfig
from mmemo.train.config import RunConfig, TrainConfig

MissingNegative = Literal["leave_out", "noise"]


class DpoLossConfig(Config):
    """How log-probabilities are computed, and what is logged."""

    stored_reference: bool = True
    """Compute the reference's log-probabilities once before training and store them beside the
    features. False computes them in every step, which needs a new adapter to switch off."""
    shared_prefix: bool = True
    """Compute each prompt once for all of its answers. False computes it once per answer."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divisor of the logits of the policy and of the reference."""
    disable_dropout: bool = True
    """Disable dropout, so that policy and reference differ in their weights only."""
    alternate_queries: bool = False
    """Fill each batch with questions about one modality and alternate between the modalities, as
    MoD-DPO does."""
    missing_negative: MissingNegative = "leave_out"
    """What becomes of a negative that a term reads and a row does not give. ``leave_out`` leaves
    the pair out of that part of the term alone (PMP of ``avem_dpo``, the conditional preference of
    ``mdpo``); ``mod_dpo``, whose whole margin needs it, does not count the pair. ``noise`` replaces
    each such stream by uniform noise, as AVERE's loader does."""
    grad_share_steps: int | None = Field(default=None, ge=1)
    """Log each term's share of the gradient norm, ``<term>/grad_share``, every N steps. It costs a
    backward pass per term and changes no gradient. None never logs it."""


class DpoConfig(Config):
    """Preference optimisation of a model after SFT.

    Each row is a pair: one prompt, the chosen answer, and one or two rejected answers. The
    reference is the model that training starts from: without its adapter if that is new, else as it
    is.
    """

    output_dir: str
    """Folder for checkpoints, metrics, the run record, and the trained model in ``final``."""
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    """Pairs whose loss and margins are reported but not trained on."""
    objective: ObjectiveConfig
    """The loss: a weighted sum of terms."""
    dpo: DpoLossConfig = DpoLossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    trainable: list[str] = Field(default=["lm"], min_length=1)
    """Trainable parts: ``lm``, ``connectors``, ``fusion``, or the name of one branch."""
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _fits(self) -> DpoConfig:
        if self.dpo.grad_share_steps is not None and self.run.deepspeed is not None:
            raise ValueError(
                "dpo.grad_share_steps needs whole gradients, which DeepSpeed's engine does not "
                "hold; leave one of them out"
            )
        return self


def starts_new_adapter(model: ModelConfig) -> bool:
    """Whether disabling the adapter gives the model that training starts from."""
    path = None if model.path is None else Path(model.path)
    has_adapter = path is not None and (path / "adapter_config.json").exists()
    return model.lora is not None and not (has_adapter and model.adapter == "continue")
