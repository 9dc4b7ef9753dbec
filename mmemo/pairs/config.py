"""The config of ``mmemo pairs``: the source of the pairs, their negatives, and their checks."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmemo.config import Config, nearest
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import KINDS, QUERIES, WRITTEN_KINDS, Query
from mmemo.generation.rollout import RolloutConfig
from mmemo.media.config import DecodeConfig, StoreConfig
from mmemo.models.config import ModelConfig
from mmemo.rewards.judge.openai_client import EndpointConfig
from mmemo.rewards.rewards import RewardConfig

ASKS: dict[Query, list[str]] = {
    "video": ["face", "look", "脸", "面部", "表情", "画面"],
    "audio": ["voice", "sound", "声音", "嗓音", "语音", "语气", "语调"],
}
"""Words that make a question one about the picture or about the sound."""


class TruthSource(Config):
    """Builds rejected answers from a row's own answer by replacing its cues, and possibly its
    emotion, with wrong ones according to the row's ``cues`` and ``modality_labels``."""

    kind: Literal["truth"]
    asks: dict[Query, list[str]] = dict(ASKS)
    """Words that make a question one about the picture or about the sound. A question with words of
    both, or of neither, is joint. A row's own ``query_modality``, if listed in ``data.columns``,
    takes precedence."""
    questions: dict[Query, list[str]] = Field(default_factory=dict[Query, list[str]])
    """Additional questions about every clip, one drawn from each list. Their answers are written
    from the labels and cues, as are the answers of rows that have none."""
    heard: list[str] = Field(default_factory=list[str])
    """Words that make a cue audible if the row does not say where it is. They take precedence over
    the lexicon (:mod:`mmemo.answers.cue_channels`)."""
    seen: list[str] = Field(default_factory=list[str])
    """Words that make a cue visible, likewise."""
    spurious: Literal["listed", "outweighed", "both"] = "listed"
    """How spurious answers are made. ``listed``: with the cues that the row lists as spurious in
    the channel asked about. If no right answer ever cites them, the words give the answer away.
    ``outweighed``: for joint questions about clips whose channels disagree, by resting the answer
    on the channel that does not decide; the words tell nothing. ``both``: outweighed where
    possible, else listed."""
    hallucinated: Literal["all_cues", "one_cue"] = "all_cues"
    """How hallucinated answers are made. ``all_cues``: all cited cues of the channel are replaced
    by those that another clip's answer cites for the emotion named. ``one_cue``: where the emotion
    named is the right one, a single cue is replaced by an absent one that other answers cite for
    it, which is harder to tell. Combine it with ``wrong_label_share: 0``."""
    closed_vocabulary: bool = False
    """Whether rows list every cue that is present, so that a cue that other rows list as present is
    absent where a row does not list it. False treats only cues listed as absent as absent."""
    wrong_label_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the rejected answers that also name another emotion; in the others only the
    reasoning is wrong."""


class ModelSource(Config):
    """Samples several answers of a model to each prompt and pairs the best with the worst."""

    kind: Literal["model"]
    model: ModelConfig
    reward: RewardConfig = RewardConfig(path="reward/grounding.py:grounding")
    """The reward that scores the answers."""
    rollout: RolloutConfig = RolloutConfig()
    """How the ``num_generations`` answers are sampled."""
    per_device_batch_size: int = Field(default=8, ge=1)
    """Prompts per generation batch."""
    min_gap: float = Field(default=0.25, gt=0)
    """Minimum difference between the two scores. Prompts below it are skipped as ties."""
    readable: bool = True
    """Leave out answers that are no language, which a pair would teach to prefer or to avoid: those
    with invalid UTF-8, and those with a word that no answer of the data holds, where the data's
    answers repeat their words."""
    answers: DataConfig | None = None
    """Rows with answers, such as those of SFT, for ``readable``; those of ``data`` count too."""
    asks: dict[Query, list[str]] = dict(ASKS)
    """Words that make a question one about the picture or the sound, as for ``truth``."""
    rejected_kind: Literal["spurious", "hallucinated"] | None = None
    """The kind of the rejected answer. None derives it from the answer's cues if the row lists
    them."""


class CaptionSource(Config):
    """Asks a chat endpoint to describe picture and sound separately and to write questions about
    cues."""

    kind: Literal["captions"]
    endpoint: EndpointConfig
    frames: int = Field(default=8, ge=1, le=64)
    """Frames of a clip that are sent to the endpoint."""
    frame_size: int = Field(default=336, ge=32, le=1024)
    """Longest side of a frame, in pixels."""
    questions: int = Field(default=1, ge=0, le=4)
    """Multiple-choice questions (four options) per cell of a clip."""
    probes: int = Field(default=1, ge=0, le=4)
    """Yes/no questions per cell of a clip."""
    labels: list[str] = Field(default_factory=list[str])
    """Emotions that the endpoint may name. An empty list allows the labels of the rows."""
    max_failure_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the clips that may be skipped because the endpoint gave no usable reply."""


Source = Annotated[TruthSource | ModelSource | CaptionSource, Field(discriminator="kind")]


class NegativesConfig(Config):
    """Negatives: kinds of corrupted inputs, by weight. For a question about one modality only its
    streams are replaced, for a joint question all of them."""

    kinds: dict[str, float] = {"different_label": 0.5, "swapped": 0.25, "noise": 0.25}
    """Weight of each kind. If a kind cannot be made for a clip, another one is drawn."""
    irrelevant: dict[str, float] = Field(default_factory=dict[str, float])
    """Weight of each kind for the modality that is not asked about, as MoD-DPO needs it. Empty
    makes none."""
    snr_db: float = Field(default=0.0, ge=-60, le=60)
    """Signal-to-noise ratio of the kind ``noise``, in dB; at ``level: media``, of sound only."""
    level: Literal["features", "media"] = "features"
    """``features``: kinds that are made of the clip itself change its stored features. ``media``:
    they are files, decoded and encoded like other clips, for which there are the kinds ``blurred``
    and ``cropped`` too; a clip with one stream of another is a file of its own."""
    folder: str = "negatives"
    """Folder of these files in ``data.media_root``. A file that is there is used again."""
    noise_step: int = Field(default=500, ge=1, le=999)
    """At ``level: media``, the diffusion step of ``noise`` in pictures, of 1000 (VCD)."""
    blur: float = Field(default=0.05, gt=0, le=1)
    """Standard deviation of ``blurred``, as a share of the picture's longer side."""
    crop_scale: tuple[float, float] = (0.01, 0.2)
    """Smallest and largest share of the picture's area that ``cropped`` keeps (mDPO)."""

    @field_validator("kinds", "irrelevant")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        allowed = [kind for kind in KINDS if kind != "given"]
        for kind, weight in value.items():
            if kind not in allowed:
                guess = nearest(kind, allowed)
                hint = f"did you mean '{guess}'?" if guess else f"use {', '.join(allowed)}"
                raise ValueError(f"there is no kind of negative called '{kind}'; {hint}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of '{kind}' must be a finite number of at least 0")
        return value

    @field_validator("folder")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError("must be a folder inside data.media_root, such as negatives")
        return str(path)

    @model_validator(mode="after")
    def _consistent(self) -> NegativesConfig:
        for kind in (*self.kinds, *self.irrelevant):
            if kind in WRITTEN_KINDS and self.level != "media":
                raise ValueError(f"the kind '{kind}' exists as files only; set level: media")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("crop_scale must be two shares of the area, the smaller one first")
        return self


Check = Literal["clip", "speaker", "digest", "duplicates", "length", "text"]


class ReportConfig(Config):
    """The checks of the pairs, and which findings are errors."""

    against: list[str] = Field(default_factory=list[str])
    """Evaluation manifests whose clips, speakers and files must not occur in the pairs."""
    against_root: str | None = None
    """Media folder of these manifests; defaults to ``data.media_root``."""
    digests: bool = True
    """Also compare the files' contents, which finds a clip under another name."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Jaccard similarity of the words from which two pairs of a clip are near-duplicates."""
    max_text_accuracy: float = Field(default=0.65, ge=0.5, le=1)
    """Highest accuracy at which a text-only classifier may tell the chosen from the rejected
    answer."""
    allow: list[Check] = Field(default_factory=list[Check])
    """Checks whose findings are reported but are not errors."""


class PairsRunConfig(Config):
    """How the prompts are distributed over processes."""

    processes: int = Field(default=1, ge=1)
    """Number of processes that sample a model's answers, each with a GPU of its own if there are
    any. One more then scores the answers and makes the pairs."""


class PairsConfig(Config):
    """The config of ``mmemo pairs``. The same config and files give the same pairs."""

    output_dir: str
    """Folder for ``pairs.jsonl``, ``report.json``, the resolved config and the run record."""
    data: DataConfig
    source: Source
    queries: list[Query] = Field(default=list(QUERIES), min_length=1)
    """Kinds of question to keep: about the sound, about the picture, or joint. A question about a
    clip with one modality counts as one about that modality unless it names the other one."""
    one_channel: bool = True
    """Whether clips that a row shows with one modality only (sound alone; picture or face alone)
    give pairs."""
    negatives: NegativesConfig = NegativesConfig()
    report: ReportConfig = ReportConfig()
    seed: int = Field(default=0, ge=0)
    decode: DecodeConfig = DecodeConfig()
    store: StoreConfig = StoreConfig()
    run: PairsRunConfig = PairsRunConfig()

    @model_validator(mode="after")
    def _only_a_model_is_shared(self) -> Self:
        if self.run.processes > 1 and not isinstance(self.source, ModelSource):
            raise ValueError(
                f"run.processes: source.kind={self.source.kind} has no model whose answers several "
                "processes could sample; leave --processes out"
            )
        return self
