"""The config of a preference run, with TRL's names where TRL has the same setting."""

from __future__ import annotations

from typing import Any, Literal

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
NegativeAudio = Literal["as_given", "noise"]


class DpoLossConfig(Config):
    """How log-probabilities are computed, and what is logged."""

    reference: Literal["stored", "adapter_off", "copy", "copy_cpu"] = "stored"
    """The model that training starts from, which the policy is compared with. ``stored`` computes
    its log-probabilities once before training and keeps them beside the features. The others
    compute them in every step: ``adapter_off`` by switching a new adapter off, ``copy`` with a
    second copy of the weights that learn, ``copy_cpu`` with one that is kept in the CPU's memory
    and comes to the device while it is used."""
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
    negative_audio: NegativeAudio = "as_given"
    """The sound of the negatives that replace what a question is about. ``as_given`` leaves it as
    it is where the question is about the picture, as the paper on AVEm-DPO does; ``noise`` puts
    uniform noise in its place in every pair, as the authors' released loader does."""
    grad_share_steps: int | None = Field(default=None, ge=1)
    """Log each term's share of the gradient norm, ``<term>/grad_share``, every N steps. It costs a
    backward pass per term and changes no gradient. None never logs it."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        """``stored_reference``, true or false, of version 0.3 and before."""
        if not isinstance(values, dict) or "stored_reference" not in values:
            return values  # pyright: ignore[reportUnknownVariableType]
        given: dict[str, Any] = {**values}
        stored = given.pop("stored_reference")
        if not isinstance(stored, bool) or "reference" in given:
            raise ValueError(
                "stored_reference is now called reference; give reference: stored, adapter_off, "
                "copy or copy_cpu instead"
            )
        return {**given, "reference": "stored" if stored else "adapter_off"}


class DpoConfig(Config):
    """Preference optimisation of a model after SFT.

    Each row is a pair: one prompt, the chosen answer, and one or two rejected answers. The
    reference is the model that training starts from.
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
