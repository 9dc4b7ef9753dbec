"""The config of GRPO. Fields that TRL's ``GRPOConfig`` has too have its names and meanings."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.features.encode import StoreConfig
from mmemo.generation.rollout import RolloutConfig
from mmemo.losses.grpo import ImportanceSamplingLevel, LossType
from mmemo.losses.off_policy import ImportanceSamplingMode
from mmemo.media.config import DecodeConfig
from mmemo.models.build import ModelConfig
from mmemo.rewards.advantages import ScaleRewards
from mmemo.rewards.rewards import RewardConfig
from mmemo.rewards.trust import TrustConfig
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.reference import ReferenceKind


class PolicyConfig(Config):
    """The policy loss and its advantages: keys of ``grpo``, under TRL's names."""

    loss_type: LossType = "dapo"
    """What the loss does with the probability ratio, and how the losses of tokens are averaged;
    ``mmemo/losses/grpo.py`` has the table. ``cispo`` and ``sapo`` need completions that are used
    for more than one optimizer step: where the ratio is 1, they are ``dapo`` and ``grpo``."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """``sequence`` takes one ratio for all tokens of a completion, the geometric mean of theirs;
    with ``loss_type: grpo`` this is GSPO."""
    epsilon: float = Field(default=0.2, gt=0)
    """Clip the probability ratio at 1 - epsilon, and at 1 + epsilon unless ``epsilon_high`` is
    set. GSPO's ratios differ little from 1; its paper clips at 3e-4 and 4e-4."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Clip the probability ratio at 1 + epsilon_high; None uses ``epsilon``. With ``cispo`` it is
    the largest ratio itself and must be given; ScaleRL recommends 5."""
    delta: float | None = Field(default=None, gt=1)
    """Largest probability ratio where the advantage is negative, which clipping leaves unlimited;
    None sets no limit."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """How fast the gradient of ``sapo`` fades where the advantage is not positive."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """How fast the gradient of ``sapo`` fades where the advantage is positive."""
    scale_rewards: ScaleRewards = "group"
    """Divide advantages by the standard deviation of the rewards in the ``group`` or ``batch``;
    ``none`` does not divide."""
    mask_truncated_completions: bool = False
    """Exclude completions that reached ``rollout.max_completion_length`` from the loss."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        """Refuse what would do nothing."""
        kind, high = self.loss_type, self.epsilon_high
        clipped = kind not in ("cispo", "sapo")
        if kind == "cispo" and (high is None or high <= 1):
            raise ValueError(
                "loss_type=cispo needs epsilon_high, the largest importance weight, above 1; "
                "ScaleRL recommends 5.0"
            )
        if kind == "luspo" and self.importance_sampling_level != "sequence":
            raise ValueError("loss_type=luspo needs importance_sampling_level=sequence")
        if not clipped and (self.epsilon != 0.2 or (kind == "sapo" and high is not None)):
            name = "epsilon" if self.epsilon != 0.2 else "epsilon_high"
            raise ValueError(f"{name} does nothing with loss_type={kind}; leave it out")
        if self.delta is not None and not clipped:
            raise ValueError(f"delta does nothing with loss_type={kind}; leave it out")
        upper = 1 + (self.epsilon if high is None else high)
        if self.delta is not None and self.delta <= upper:
            raise ValueError(f"delta must be above 1 + epsilon_high, which is {upper:g}")
        for name, default in (("sapo_temperature_neg", 1.05), ("sapo_temperature_pos", 1.0)):
            if kind != "sapo" and getattr(self, name) != default:
                raise ValueError(f"{name} does nothing with loss_type={kind}; leave it out")
        return self


class KlConfig(Config):
    """The KL penalty: keys of ``grpo``."""

    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference, which is the model that training starts from.
    With 0 no reference is computed."""
    reference: ReferenceKind | None = None
    """What computes the reference: ``adapter_off`` switches a new adapter off, ``copy`` is a second
    copy of the weights that learn, ``copy_cpu`` one that is kept in the CPU's memory and comes to
    the device while it is used. None is ``adapter_off`` with a new adapter and ``copy`` without
    one."""
    beta_end: float | None = Field(default=None, ge=0)
    """Decrease ``beta`` linearly to this value (HumanOmniV2's schedule); None keeps it constant."""
    beta_decay_share: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the run over which ``beta`` decreases."""
    use_bias_correction_kl: bool = True
    """Correct the KL estimator so that its gradient is unbiased, as TRL 1.16 does and DeepSeekMath
    does not."""


class DrawConfig(Config):
    """For how many steps completions are used, and which are: keys of ``grpo``."""

    steps_per_generation: int | None = Field(default=None, ge=1)
    """Number of micro-batches of each process whose completions are generated at once, a multiple
    of ``train.gradient_accumulation_steps``; None is that number. With k times as many, the policy
    takes k optimizer steps, on other prompts each, before completions are generated again."""
    num_iterations: int = Field(default=1, ge=1)
    """How often all steps of a generation are taken (mu in the papers). Checkpoints and stops wait
    until the completions of a generation are used up, so that a resumed run generates the same."""
    filter_zero_variance: bool = False
    """Exclude groups whose rewards are all equal from the update."""
    max_resample_times: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO): how often the groups that ``filter_zero_variance`` excludes are
    replaced by groups of further prompts, the next ones in the order of the epoch, before the
    update does with fewer. 0 replaces none."""

    @model_validator(mode="after")
    def _resamples(self) -> Self:
        if self.max_resample_times and not self.filter_zero_variance:
            raise ValueError(
                "max_resample_times replaces the groups that filter_zero_variance excludes; set "
                "filter_zero_variance=true too"
            )
        return self


class OffPolicyConfig(Config):
    """The correction of a sampler that is not the trainer: keys of ``grpo``, under TRL's names.

    A server's kernels give the sampled tokens other probabilities than the trainer's, and so
    completions of another policy than the one that learns. The policy loss is multiplied by the
    ratio of the two, of which ``mmemo/losses/off_policy.py`` has the formulas. Both are of the
    distribution at ``rollout.temperature``, before ``top_k``, ``top_p`` and ``min_p``, which the
    ratio does not correct.
    """

    vllm_importance_sampling_correction: bool | None = None
    """Correct the policy loss by the log-probabilities that the engine reported, with one more
    forward pass per generation, and log how far they are from the trainer's. None does so if the
    engine's are not the trainer's own, which those of ``hf`` are."""
    vllm_importance_sampling_mode: ImportanceSamplingMode = "sequence_mask"
    """One ratio for each token or for all tokens of a completion (``sequence``), and what happens
    to ratios outside of the limits: ``truncate`` sets them to the limit, ``mask`` to 0."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    """Largest ratio; None sets no limit."""
    vllm_importance_sampling_clip_min: float | None = Field(default=None, gt=0)
    """Smallest ratio; None sets no limit."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        mode = self.vllm_importance_sampling_mode
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min ({low:g}) must be below "
                f"vllm_importance_sampling_clip_max ({high:g})"
            )
        if mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={mode} needs vllm_importance_sampling_clip_max or "
                "vllm_importance_sampling_clip_min"
            )
        if self.vllm_importance_sampling_correction is False and (idle := self._changed()):
            raise ValueError(
                f"{idle} does nothing with vllm_importance_sampling_correction=false; leave it out"
            )
        return self

    def _changed(self) -> str:
        """A setting of how to correct that is not its default; empty if all are."""
        fields = OffPolicyConfig.model_fields
        how = [name for name in fields if name != "vllm_importance_sampling_correction"]
        return next((name for name in how if getattr(self, name) != fields[name].default), "")


class GrpoLossConfig(PolicyConfig, KlConfig, DrawConfig, OffPolicyConfig):
    """The GRPO loss and how its log-probabilities are computed."""

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

    @property
    def generation_steps(self) -> int:
        """Number of optimizer steps whose completions are generated at once, on prompts of their
        own each; all of them are taken ``grpo.num_iterations`` times."""
        accumulation = self.train.gradient_accumulation_steps
        return (self.grpo.steps_per_generation or accumulation) // accumulation

    @model_validator(mode="after")
    def _fits(self) -> GrpoConfig:
        section = self.grpo
        accumulation = self.train.gradient_accumulation_steps
        if (section.steps_per_generation or accumulation) % accumulation:
            raise ValueError(
                f"grpo.steps_per_generation must be a multiple of {accumulation}, which is "
                "train.gradient_accumulation_steps: an optimizer step uses whole micro-batches"
            )
        if self.generation_steps * section.num_iterations == 1 and (idle := _idle(section)):
            raise ValueError(
                f"grpo.{idle} acts on probability ratios, which are all 1 where completions are "
                "used for one optimizer step only; set grpo.num_iterations to 2 or more, or "
                "grpo.steps_per_generation to twice train.gradient_accumulation_steps or more"
            )
        if section.beta_end is not None and section.beta_end > section.beta:
            raise ValueError("grpo.beta_end must not be above grpo.beta")
        rate = self.pass_rate
        if rate is not None and rate.min_rate > rate.max_rate:
            raise ValueError("pass_rate.min_rate must not be above pass_rate.max_rate")
        return self


def _idle(section: GrpoLossConfig) -> str:
    """A setting that is there for probability ratios other than 1; empty if there is none."""
    if section.loss_type in ("cispo", "sapo"):
        return f"loss_type={section.loss_type}"
    if section.importance_sampling_level == "sequence":
        return "importance_sampling_level=sequence"
    return "delta" if section.delta is not None else ""
