"""The config of GRPO. Fields that TRL's ``GRPOConfig`` has too have its names and meanings."""

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
    """The GRPO loss and how its log-probabilities are computed."""

    loss_type: LossType = "dapo"
    """How the losses of tokens are averaged; ``mmemo/losses/grpo.py`` has the table."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference, which is the model with its adapter disabled.
    With 0 no reference is computed."""
    beta_end: float | None = Field(default=None, ge=0)
    """Decrease ``beta`` linearly to this value (HumanOmniV2's schedule); None keeps it constant."""
    beta_decay_share: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the run over which ``beta`` decreases."""
    use_bias_correction_kl: bool = True
    """Correct the KL estimator so that its gradient is unbiased, as TRL 1.16 does and DeepSeekMath
    does not."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clip the probability ratio at 1 - epsilon, and at 1 + epsilon unless ``epsilon_high`` is
    set."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Clip the probability ratio at 1 + epsilon_high; None uses ``epsilon``."""
    num_iterations: int = Field(default=1, ge=1)
    """Number of consecutive optimizer steps that use the same completions (mu in the papers)."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the rewards in the ``group`` or ``batch``;
    ``none`` does not divide."""
    mask_truncated_completions: bool = False
    """Exclude completions that reached ``rollout.max_completion_length`` from the loss."""
    filter_zero_variance: bool = False
    """Exclude groups whose rewards are all equal from the update."""
    shared_prefix: bool = True
    """Compute each prompt once for its G completions; if false, once for each completion."""
    max_tokens_per_batch: int | None = Field(default=16384, ge=1)
    """Most tokens of a forward pass of the update. The groups of a micro-batch that have more are
    split over several passes; a single group is never split. None puts all in one pass."""
    disable_dropout: bool = True
    """Disable dropout, so that the ratio of new to old probabilities depends on the weights
    alone."""
    log_entropy: bool = True
    """Log the entropy of the policy on its completions."""


class PassRateConfig(Config):
    """Measures how difficult each prompt is: the pass rate of the model that training starts from.

    The difficulty of a prompt becomes 1 - pass rate; with ``curriculum.order: difficulty`` the easy
    prompts come first.
    """

    rollouts: int = Field(default=4, ge=1)
    """Number of completions per prompt."""
    correct_from: float = 1.0
    """A completion passes if the outcome reward gives it at least this score."""
    min_rate: float = Field(default=0.0, ge=0, le=1)
    """Drop prompts with a lower pass rate. Any value above 0 drops those that are always wrong."""
    max_rate: float = Field(default=1.0, ge=0, le=1)
    """Drop prompts with a higher pass rate. Any value below 1 drops those that are always right."""
    per_device_batch_size: int = Field(default=8, ge=1)
    """Prompts per process that are completed together."""


class MonitorConfig(Config):
    """What is proved before training and monitored during it; it changes no weight."""

    prove_rewards: bool = True
    """Prove each reward on a few rows before training, as ``mmemo check`` does on more, and refuse
    to start with one that pays for attacks. The run record says whether this was done."""

    outcome: str | None = None
    """Name of the reward that alerts and pass rates take for the truth. None uses the outcome of
    ``trust``, else the reward named ``outcome``, else the first reward."""
    reference_steps: int = Field(default=20, ge=1)
    """Number of first steps whose mean completion length later steps are compared with."""
    samples: int = Field(default=8, ge=0)
    """Number of prompts whose completions by the starting model are read before training: are they
    language? 0 reads none."""
    min_readable: float = Field(default=0.0, ge=0, le=1)
    """Refuse to start if a smaller share of these completions is readable; 0 only warns."""
    answers: DataConfig | None = None
    """Rows with answers, such as those of SFT; those of ``data`` count as well. Completions with
    words that none of them holds are flagged, if the answers repeat their words."""
    groups: int = Field(default=2, ge=0)
    """Number of prompts whose completions are written to ``completions.jsonl`` with each log line.
    As many other prompts are followed through the run: they are written whenever they come up."""


class GrpoConfig(Config):
    """Group-relative policy optimisation of a fine-tuned model.

    A row is a prompt: ``train.per_device_train_batch_size`` counts prompts, each with
    ``rollout.num_generations`` completions, where TRL counts completions.
    """

    output_dir: str
    """Folder for checkpoints, metrics, the event log, completions, and the result in ``final``."""
    model: ModelConfig
    data: DataConfig
    rewards: list[RewardConfig] = Field(min_length=1)
    trust: TrustConfig | None = None
    """Progressive trust in some of the rewards; None gives all rewards full weight from the
    start."""
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoLossConfig = GrpoLossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    pass_rate: PassRateConfig | None = None
    """Measure the difficulty of each prompt before training; None keeps the manifest's."""
    watch: MonitorConfig = MonitorConfig()
    trainable: list[str] = Field(default=["lm"], min_length=1)
    """Parts of the model that are trained: ``lm``, ``connectors``, ``fusion``, or the name of one
    branch."""
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
