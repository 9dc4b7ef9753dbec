"""What ``mmemo eval`` reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmemo.config import Config
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Modality
from mmemo.evaluation.reward_scores import ScoreConfig
from mmemo.features.store import StoreConfig
from mmemo.media.config import DecodeConfig
from mmemo.models.attention.contrast import ContrastConfig
from mmemo.models.attention.reallocation import AmplificationConfig, ReallocationConfig, SinkConfig
from mmemo.models.build import ModelConfig
from mmemo.statistics import BootstrapConfig


class AnswerGenerationConfig(Config):
    """How answers are generated. Names are those of transformers' ``GenerationConfig``."""

    max_new_tokens: int = Field(default=64, ge=1, le=8192)
    do_sample: bool = False
    """False is greedy: the same answers every time."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    reallocation: ReallocationConfig | None = None
    """Move attention between the modalities where one has most of it."""
    amplification: AmplificationConfig | None = None
    """Instead: attend more to all modalities."""
    sinks: SinkConfig | None = None
    """Instead: attend more to the modalities where attention sinks take some of it."""
    contrast: ContrastConfig | None = None
    """Push answers off what the model says without a modality; with or without one of the above."""

    @model_validator(mode="after")
    def _greedy_needs_no_sampling(self) -> AnswerGenerationConfig:
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError("temperature, top_p and top_k do nothing without do_sample: true")
        return self

    @model_validator(mode="after")
    def _one_change_of_attention(self) -> AnswerGenerationConfig:
        if sum(x is not None for x in (self.reallocation, self.amplification, self.sinks)) > 1:
            raise ValueError("give at most one of reallocation, amplification and sinks")
        if self.contrast is not None and self.repetition_penalty != 1:
            raise ValueError("contrast compares logits as they are; leave repetition_penalty at 1")
        return self

    @property
    def change(self) -> ReallocationConfig | AmplificationConfig | SinkConfig | None:
        """What is done to attention."""
        return self.reallocation or self.amplification or self.sinks

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``. All that could change the answers is given, so that
        nothing is taken from the generation config that came with a model."""
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
    """The questions of an evaluation and their scoring."""

    path: str = "eval/world_conflict.py"
    """The content file."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments for its ``samples``."""


class RelianceConfig(Config):
    """What an answer hangs on: the questions of the headline task asked again about changed clips,
    attention by modality, and Shapley values. ``mmemo eval --reliance`` switches it on."""

    enabled: bool = False
    change: list[list[Modality]] = Field(
        default=[["audio"], ["video", "face"], ["video"], ["face"]], min_length=1
    )
    """Streams that are blanked, and swapped for those of another clip, at once. Streams that the
    clips or the model do not have are passed over."""
    questions: int | None = Field(default=None, ge=1)
    """Of these, equally many from each conflict subset, every change is asked about. None: all."""
    attention_questions: int = Field(default=64, ge=0)
    """Questions during whose answers attention is measured; 0 for none."""
    shapley_questions: int = Field(default=32, ge=0)
    """Questions whose Shapley values are computed, from the answers to 16 prompts each with three
    streams; 0 for none."""
    instruction: str = "Answer with one of these: {labels}."
    """What a prompt says where Shapley values have no text in it."""
    answer: str = "<answer>{label}</answer>"
    """An answer as the model writes it behind its reasoning, whose log-probability Shapley values
    share out."""
    seed: int = Field(default=0, ge=0)
    """Of which questions are drawn and which clips lend their streams."""

    @model_validator(mode="after")
    def _whole(self) -> RelianceConfig:
        for group in self.change:
            if not group or len(set(group)) < len(group):
                raise ValueError("change needs groups of one or more streams, each named once")
        if "{label}" not in self.answer:
            raise ValueError("answer needs {label}, which stands for the label")
        return self


class EvalConfig(Config):
    """An evaluation of one model on one benchmark."""

    output_dir: str
    """Folder of ``predictions.jsonl`` and ``results.json``."""
    name: str = "model"
    """What reports call this run."""
    role: Literal["model", "baseline"] = "model"
    """Reports compare models with baselines."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """The benchmark; a plain path stands for a content file without parameters."""
    scores: list[ScoreConfig] = []
    """Reward functions to score the answers by, beside the benchmark: how good the reasoning is.
    Adding or changing one asks no question again."""
    model: ModelConfig
    data: DataConfig
    store: StoreConfig = StoreConfig()
    decode: DecodeConfig = DecodeConfig()
    generation: AnswerGenerationConfig = AnswerGenerationConfig()
    per_device_eval_batch_size: int = Field(default=16, ge=1, le=4096)
    bootstrap: BootstrapConfig = BootstrapConfig()
    majority_from: DataConfig | None = None
    """Training rows whose most common label is the majority baseline."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampled generation; greedy answers do not depend on it."""
    reliance: RelianceConfig = RelianceConfig()

    @field_validator("benchmark", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
