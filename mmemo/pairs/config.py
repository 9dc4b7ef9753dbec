"""Settings of ``mmemo pairs``: where the pairs come from, their negatives, and their checks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmemo.config import Config, nearest
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import KIND_STREAMS, KINDS, QUERIES, Query
from mmemo.generation.rollout import RolloutConfig
from mmemo.media.config import DecodeConfig, StoreConfig
from mmemo.models.config import ModelConfig
from mmemo.rewards.judge.openai_client import EndpointConfig
from mmemo.rewards.rewards import RewardConfig

HEARD = (
    *("pitch", "range", "loudness", "rate", "ending", "breath", "music"),
    *("voice", "vocal", "tone", "volume", "speech", "speaks", "sound", "sounds"),
)
"""Words of a cue that is heard."""


class TruthSource(Config):
    """Rejected answers are the row's own answer with its cues, and perhaps its emotion, made wrong
    by what is known of the clip (``cues`` and ``modality_labels``)."""

    kind: Literal["truth"]
    asks: dict[Query, list[str]] = {"video": ["face", "look"], "audio": ["voice", "sound"]}
    """Words by which a question is about one channel; about both, or with none of the words, it is
    joint. A row's ``query_modality``, listed in ``data.columns``, goes before."""
    questions: dict[Query, list[str]] = Field(default_factory=dict[Query, list[str]])
    """Questions to ask about every clip besides the rows' own, one of each list. Their answers are
    written from the truth, as are those of rows that have none."""
    heard: list[str] = list(HEARD)
    """A cue with one of these words is heard; any other is seen."""
    closed_vocabulary: bool = False
    """Rows list every cue that is there: what other rows call present is absent where a row does
    not list it. Off: only what a row lists as absent is."""
    wrong_label_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the rejected answers that name another emotion too; in the rest only the reasons
    are wrong."""


class ModelSource(Config):
    """Several answers of a model to each prompt; the best and the worst grounded make a pair."""

    kind: Literal["model"]
    model: ModelConfig
    reward: RewardConfig = RewardConfig(path="reward/grounding.py:grounding")
    """What scores an answer."""
    rollout: RolloutConfig = RolloutConfig()
    """How ``num_generations`` answers are drawn."""
    per_device_batch_size: int = Field(default=8, ge=1)
    """Prompts at once."""
    min_gap: float = Field(default=0.25, gt=0)
    """Least difference of the two scores; closer ones are ties, counted and left out."""
    asks: dict[Query, list[str]] = {"video": ["face", "look"], "audio": ["voice", "sound"]}
    """As for ``truth``."""
    rejected_kind: Literal["spurious", "hallucinated"] | None = None
    """Which answer the worst one stands for. None: read from its cues, where a row lists them."""


class CaptionSource(Config):
    """A chat endpoint describes picture and sound apart and writes questions about cues."""

    kind: Literal["captions"]
    endpoint: EndpointConfig
    frames: int = Field(default=8, ge=1, le=64)
    """Pictures of a clip that the endpoint is shown."""
    frame_size: int = Field(default=336, ge=32, le=1024)
    """Longest side of a picture, in pixels."""
    questions: int = Field(default=1, ge=0, le=4)
    """Questions with four choices for each cell of a clip."""
    probes: int = Field(default=1, ge=0, le=4)
    """Yes/no questions for each cell of a clip."""
    labels: list[str] = Field(default_factory=list[str])
    """Emotions that the endpoint may name. Empty: those of the rows."""
    max_failure_share: float = Field(default=0.2, ge=0, le=1)
    """Clips that may be left out because the endpoint gave nothing that could be used."""


Source = Annotated[TruthSource | ModelSource | CaptionSource, Field(discriminator="kind")]


class NegativesConfig(Config):
    """Worse inputs: kinds by weight. A question about one channel has only that channel's streams
    replaced, a joint one all."""

    kinds: dict[str, float] = {"different_label": 0.5, "swapped": 0.25, "noise": 0.25}
    """Kind to weight. A kind that a clip has no material for leaves its turn to the others."""
    irrelevant: dict[str, float] = Field(default_factory=dict[str, float])
    """The same for the channel that is not asked about, as MoD-DPO wants it. Empty: none."""
    snr_db: float = Field(default=0.0, ge=-60, le=60)
    """Signal over noise of the kind ``noise``, in dB."""

    @field_validator("kinds", "irrelevant")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        allowed = [kind for kind in KINDS if kind != "given"]
        for kind, weight in value.items():
            if kind not in allowed:
                guess = nearest(kind, allowed)
                hint = f"did you mean '{guess}'?" if guess else f"use {', '.join(allowed)}"
                raise ValueError(f"no kind is called '{kind}'; {hint}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of '{kind}' must be a number from 0")
        return value

    @model_validator(mode="after")
    def _for_joint(self) -> NegativesConfig:
        if self.kinds and not any(len(KIND_STREAMS[kind]) == 3 for kind in self.kinds):
            raise ValueError("kinds: none of them can replace all the streams of a joint question")
        return self


Check = Literal["clip", "speaker", "digest", "duplicates", "length", "text"]


class ReportConfig(Config):
    """What is looked for in the pairs, and what stops the stage."""

    against: list[str] = Field(default_factory=list[str])
    """Evaluation manifests, of which no clip, speaker or file may be in the pairs."""
    against_root: str | None = None
    """Folder of their media; ``data.media_root`` unless given."""
    digests: bool = True
    """Compare the content of the files too, which finds a clip under another name."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Two pairs of one clip whose words overlap by this much (Jaccard) are near-duplicates."""
    max_text_accuracy: float = Field(default=0.65, ge=0.5, le=1)
    """How often a classifier that sees no clip may tell the chosen answer from the rejected."""
    allow: list[Check] = Field(default_factory=list[Check])
    """Findings that are only reported."""


class PairsConfig(Config):
    """Everything that ``mmemo pairs`` needs. The same config and files give the same pairs."""

    output_dir: str
    """Folder for ``pairs.jsonl``, ``report.json``, the resolved config and the run record."""
    data: DataConfig
    source: Source
    queries: list[Query] = Field(default=list(QUERIES), min_length=1)
    """Questions to keep: about the picture, about the sound, joint."""
    negatives: NegativesConfig = NegativesConfig()
    report: ReportConfig = ReportConfig()
    seed: int = Field(default=0, ge=0)
    decode: DecodeConfig = DecodeConfig()
    store: StoreConfig = StoreConfig()
