"""The config of ``mmemo eval``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmemo.config import Config
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Modality
from mmemo.evaluation.reward_scores import ScoreConfig
from mmemo.features.store import StoreConfig
from mmemo.generation.vllm.config import VllmConfig
from mmemo.media.config import DecodeConfig
from mmemo.media.edits import EDITS
from mmemo.models.attention.contrast import ContrastConfig
from mmemo.models.attention.reallocation import AmplificationConfig, ReallocationConfig, SinkConfig
from mmemo.models.build import ModelConfig
from mmemo.rewards.judge.openai_client import EndpointConfig
from mmemo.statistics import BootstrapConfig


class AnswerGenerationConfig(Config):
    """How answers are generated. The names are those of transformers' ``GenerationConfig``."""

    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    do_sample: bool = False
    """Sample answers instead of decoding greedily. Greedy answers are the same every time."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Number of tokens to sample from; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    reallocation: ReallocationConfig | None = None
    """Move attention between the modalities where one of them dominates."""
    amplification: AmplificationConfig | None = None
    """Alternatively, attend more to all modalities."""
    sinks: SinkConfig | None = None
    """Alternatively, move attention from attention sinks to the modalities."""
    contrast: ContrastConfig | None = None
    """Contrastive decoding against the model's answers without a modality. It can be combined with
    one of the three above."""

    @model_validator(mode="after")
    def _greedy_needs_no_sampling(self) -> AnswerGenerationConfig:
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError("temperature, top_p and top_k have no effect unless do_sample is true")
        return self

    @model_validator(mode="after")
    def _one_change_of_attention(self) -> AnswerGenerationConfig:
        if sum(x is not None for x in (self.reallocation, self.amplification, self.sinks)) > 1:
            raise ValueError("give at most one of reallocation, amplification and sinks")
        if self.contrast is not None and self.repetition_penalty != 1:
            raise ValueError("contrast needs unpenalised logits; leave repetition_penalty at 1")
        return self

    @property
    def change(self) -> ReallocationConfig | AmplificationConfig | SinkConfig | None:
        """The change of attention, if any."""
        return self.reallocation or self.amplification or self.sinks

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``. Everything that could change the answers is given, so
        that nothing is taken from the generation config that comes with a model."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
        }


class BenchmarkConfig(Config):
    """The benchmark of an evaluation: its questions and how they are scored."""

    path: str = "eval/world_conflict.py"
    """The content file of the benchmark."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments for the file's ``samples`` function."""
    judge: EndpointConfig | None = None
    """The judge of the file's ``judge`` scorers. Without one their metrics are left out."""


class RelianceConfig(Config):
    """Measures which modalities the model relies on: the questions of the headline task are asked
    again about perturbed clips, and attention and Shapley values are computed by modality.
    ``mmemo eval --reliance`` switches it on."""

    enabled: bool = False
    """Measure reliance after the evaluation."""
    change: list[list[Modality]] = Field(
        default=[["audio"], ["video", "face"], ["video"], ["face"]], min_length=1
    )
    """Groups of streams. The streams of a group are blanked together, and swapped together for
    those of another clip. Streams that the clips or the model lack are ignored."""
    questions: int | None = Field(default=None, ge=1)
    """Number of questions re-asked per perturbation, sampled evenly across the conflict subsets.
    None uses all."""
    attention_questions: int = Field(default=64, ge=0)
    """Number of questions for which attention is measured; 0 turns this off."""
    shapley_questions: int = Field(default=32, ge=0)
    """Number of questions whose Shapley values are computed; 0 turns this off. With three streams,
    each takes the answers to 16 prompts."""
    instruction: str = "Answer with one of these: {labels}."
    """Text of the prompts without the question's text, for Shapley values. ``{labels}`` is replaced
    by the possible answers."""
    answer: str = "<answer>{label}</answer>"
    """Format of the model's answer after its reasoning. Shapley values attribute the
    log-probability of this text."""
    seed: int = Field(default=0, ge=0)
    """Seed for the choice of questions and of the clips that streams are swapped with."""

    @model_validator(mode="after")
    def _whole(self) -> RelianceConfig:
        for group in self.change:
            if not group or len(set(group)) < len(group):
                raise ValueError("each group in change must name one or more streams, each once")
        if "{label}" not in self.answer:
            raise ValueError("answer must contain {label}, which is replaced by the label")
        return self


class ControlsConfig(Config):
    """What the numbers are compared with. Each of the first three asks the same questions again,
    as evaluations of their own in subfolders, which resume like any other."""

    baselines: bool = False
    """Ask without any clip and with one stream alone, and add the majority answer."""
    paraphrases: bool = False
    """Ask in two more wordings; gives the mean and the range over the three."""
    robustness: bool = False
    """Ask about slightly edited sounds and pictures."""
    edits: list[str] = Field(default_factory=list[str])
    """The edits of ``robustness`` (:mod:`mmemo.media.edits`). None named: all that apply."""
    nbest: list[int] = Field(default_factory=list[int])
    """Numbers n: how often the right label is among the n most probable ones."""
    majority_from: DataConfig | None = None
    """Training rows whose most common label gives the majority baseline. It is also read where
    earlier versions had it, beside ``controls``."""
    wording: int = Field(default=0, ge=0, le=99)
    """Which wording of the questions is asked; 0 is the benchmark's own."""
    simulations: int = Field(default=1000, ge=0, le=100_000)
    """Number of simulations behind the level that chance gives to the difference of a group; 0
    leaves the balanced groups out."""
    group_questions: int = Field(default=10, ge=2)
    """Groups with fewer answers are not compared."""

    @field_validator("edits")
    @classmethod
    def _known_edits(cls, value: list[str]) -> list[str]:
        unknown = [one for one in value if one not in EDITS]
        if unknown:
            raise ValueError(f"there is no edit '{unknown[0]}'; there are {', '.join(EDITS)}")
        return list(dict.fromkeys(value))

    @field_validator("nbest")
    @classmethod
    def _counts(cls, value: list[int]) -> list[int]:
        if any(one < 1 for one in value):
            raise ValueError("the numbers of nbest must be 1 or more")
        return sorted(set(value))


class EvalRunConfig(Config):
    """How the questions are distributed over processes and batches. It affects speed and memory,
    and of the answers nothing but rounding."""

    processes: int = Field(default=1, ge=1)
    """Number of processes that answer, each with a GPU of its own if there are any. One more then
    scores what they have answered, and measures what else is asked for."""
    share_prefixes: bool = True
    """Compute what the questions about one clip begin with once for all of them in a batch. Applies
    to greedy answers without a change of attention, contrast, penalty or experts."""
    max_tokens_per_batch: int | None = Field(default=65536, ge=1)
    """With ``share_prefixes``, a batch of more tokens than this, answers and padding included, is
    answered in parts. None sets no limit."""
    engine: Literal["hf", "vllm"] = "hf"
    """What answers: ``hf`` the model itself, ``vllm`` a vLLM server."""
    vllm: VllmConfig = VllmConfig()
    """The server of ``engine: vllm``."""

    @model_validator(mode="after")
    def _one_engine(self) -> EvalRunConfig:
        if (self.engine == "vllm") is not self.vllm.is_set:
            raise ValueError(
                "run.engine vllm and a server in run.vllm (url, gpus or colocate) need each other"
            )
        return self


class AskConfig(Config):
    """How the questions are asked."""

    run: EvalRunConfig = EvalRunConfig()


class EvalConfig(AskConfig):
    """An evaluation of one model on one benchmark."""

    output_dir: str
    """Folder for ``predictions.jsonl`` and ``results.json``."""
    name: str = "model"
    """Name of this run in reports."""
    role: Literal["model", "baseline"] = "model"
    """Whether reports show this run as a model or as a baseline to compare models with."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """The benchmark. A plain path is a content file without parameters."""
    scores: list[ScoreConfig] = []
    """Reward functions that also score the answers, for example their reasoning. Adding or changing
    one does not generate any answer again."""
    model: ModelConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()
    generation: AnswerGenerationConfig = AnswerGenerationConfig()
    per_device_eval_batch_size: int = Field(default=16, ge=1, le=4096)
    bootstrap: BootstrapConfig = BootstrapConfig()
    seed: int = Field(default=0, ge=0)
    """Seed for sampled answers. Greedy answers do not depend on it."""
    reliance: RelianceConfig = RelianceConfig()
    controls: ControlsConfig = ControlsConfig()

    @model_validator(mode="before")
    @classmethod
    def _majority_outside(cls, value: Any) -> Any:
        """Configs of earlier versions have ``majority_from`` beside ``controls``."""
        if not isinstance(value, dict) or "majority_from" not in value:
            return value  # pyright: ignore[reportUnknownVariableType]
        values: dict[str, Any] = dict(value)  # pyright: ignore[reportUnknownArgumentType]
        rows, controls = values.pop("majority_from"), values.get("controls")
        if rows is not None and (controls is None or isinstance(controls, dict)):
            values["controls"] = {"majority_from": rows, **(controls or {})}
        return values

    @property
    def majority_from(self) -> DataConfig | None:
        """``controls.majority_from``."""
        return self.controls.majority_from

    @field_validator("benchmark", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
