"""What a GRPO run is. Names are TRL's where it has them."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.features.encode import StoreConfig
from mmemo.generation.rollout import RolloutConfig
from mmemo.losses.grpo import LossType
from mmemo.media.config import DecodeConfig
from mmemo.models.build import ModelConfig
from mmemo.rewards.advantages import ScaleRewards
from mmemo.rewards.rewards import RewardConfig
from mmemo.rewards.trust import TrustConfig
from mmemo.train.config import RunConfig, TrainConfig


class GrpoLossConfig(Config):
    """The loss, and how its log-probabilities are computed."""

    loss_type: LossType = "dapo"
    """How tokens become one number; see ``mmemo/losses/grpo.py``."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference, which is the model with its adapter switched off. 0: no
    reference is computed."""
    beta_end: float | None = Field(default=None, ge=0)
    """``beta`` falls in a line to this value (HumanOmniV2's schedule); None: it stays."""
    beta_decay_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the run over which it falls."""
    use_bias_correction_kl: bool = True
    """The KL's gradient unbiased, as in TRL 1.16; DeepSeekMath's has no correction."""
    epsilon: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped this far below 1, and above it unless ``epsilon_high``."""
    epsilon_high: float | None = Field(default=None, gt=0)
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps in a row that learn from the same completions (mu in the papers)."""
    scale_rewards: ScaleRewards = "group"
    """Advantages are divided by the standard deviation of the group, of the batch, or not."""
    mask_truncated_completions: bool = False
    """A completion that was cut at the length limit adds nothing to the loss."""
    filter_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the update."""
    shared_prefix: bool = True
    """Compute each prompt once for its G completions. Off: once for each completion."""
    max_tokens_per_batch: int | None = Field(default=16384, ge=1)
    """Groups of a micro-batch are split so that no forward pass of the update has more tokens; a
    group is never cut. None: as drawn."""
    disable_dropout: bool = True
    """Without dropout the ratio of new to old probability is that of the weights alone."""
    log_entropy: bool = True
    """Compute the entropy of the policy on its completions, for the log."""


class PassRateConfig(Config):
    """Difficulty of each prompt, measured as the pass rate of the model that training starts from.

    Each prompt's difficulty becomes 1 - pass rate; ``curriculum.order: difficulty`` then shows the
    easy ones first.
    """

    rollouts: int = Field(default=4, ge=1)
    """Completions per prompt."""
    correct_from: float = 1.0
    """Scores of the outcome reward from which a completion passes."""
    min_rate: float = Field(default=0.0, ge=0, le=1)
    """Prompts that pass less often are left out. Above 0 this drops what is always wrong."""
    max_rate: float = Field(default=1.0, ge=0, le=1)
    """Prompts that pass more often are left out. Below 1 this drops what is always right."""
    per_device_batch_size: int = Field(default=8, ge=1)
    """Prompts that are completed together."""


class MonitorConfig(Config):
    """What is looked at while it trains; changes no weight."""

    outcome: str | None = None
    """The reward taken for the truth by diagnostics and pass rates. None: the trust's, else the one
    called ``outcome``, else the first."""
    reference_steps: int = Field(default=20, ge=1)
    """Steps at the start that set the length which later ones are compared with."""
    groups: int = Field(default=2, ge=0)
    """Prompts whose completions are written to ``completions.jsonl`` with each log line. So many
    others are followed through the run: written whenever they come by."""


class GrpoConfig(Config):
    """Group-relative policy optimisation of a model from SFT.

    A row is a prompt; ``train.per_device_train_batch_size`` counts prompts, each with
    ``rollout.num_generations`` completions (TRL counts completions).
    """

    output_dir: str
    """Checkpoints, metrics, the run record, completions, and the result in ``final``."""
    model: ModelConfig
    data: DataConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    trust: TrustConfig | None = None
    """Progressive trust in some of the rewards; None: all count fully from the start."""
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoLossConfig = GrpoLossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    pass_rate: PassRateConfig | None = None
    """Measure difficulty before training; None: rows keep the difficulty they have."""
    watch: MonitorConfig = MonitorConfig()
    trainable: list[str] = Field(default=["lm"], min_length=1)
    """Parts that learn: ``lm``, ``connectors``, ``fusion``, or one branch's name."""
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()

    @model_validator(mode="after")
    def _fits(self) -> GrpoConfig:
        section = self.grpo
        if section.beta_end is not None and section.beta_end > section.beta:
            raise ValueError("grpo.beta_end must not be above grpo.beta")
        rate = self.pass_rate
        if rate is not None and rate.min_rate > rate.max_rate:
            raise ValueError("pass_rate.min_rate must not be above pass_rate.max_rate")
        return self
