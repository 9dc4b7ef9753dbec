"""What a preference run is. Names are TRL's where it has them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.features.encode import StoreConfig
from mmemo.losses.objective import ObjectiveConfig
from mmemo.media.config import DecodeConfig
from mmemo.models.build import ModelConfig
from mmemo.train.config import RunConfig, TrainConfig


class DpoLossConfig(Config):
    """How log-probabilities are computed, and what is looked at."""

    stored_reference: bool = True
    """Compute the reference's log-probabilities once, before training, and keep them beside the
    features. Off: in every step, which needs a new adapter that can be switched off."""
    shared_prefix: bool = True
    """Compute each prompt once for all of its answers. Off: once for each answer."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What logits are divided by, the reference's too."""
    disable_dropout: bool = True
    """Without dropout the difference to the reference is that of the weights alone."""
    alternate_queries: bool = False
    """Make each batch of questions about one channel, and alternate between the channels, as
    MoD-DPO does."""
    grad_share_steps: int | None = Field(default=None, ge=1)
    """Every so many steps, log each term's share of the gradient's norm: ``<term>/grad_share``.
    Costs a backward pass for each term and changes no gradient. None: never."""


class DpoConfig(Config):
    """Preference optimisation of a model from SFT.

    A row is a pair: one prompt, the chosen answer, one or two rejected ones. The reference is the
    model that training starts from: without its adapter where that is new, else as it is.
    """

    output_dir: str
    """Checkpoints, metrics, the run record, and the result in ``final``."""
    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    """Pairs whose loss and margins are reported and never learnt from."""
    objective: ObjectiveConfig
    dpo: DpoLossConfig = DpoLossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    trainable: list[str] = Field(default=["lm"], min_length=1)
    """Parts that learn: ``lm``, ``connectors``, ``fusion``, or one branch's name."""
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
    """Whether switching the adapter off gives the model that training starts from."""
    path = None if model.path is None else Path(model.path)
    goes_on = path is not None and (path / "adapter_config.json").exists()
    return model.lora is not None and not (goes_on and model.adapter == "continue")
