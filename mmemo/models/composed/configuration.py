"""Config of the composed model: a causal LM, one branch per modality, and a pre-fusion branch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mmemo.config import Config, parse
from mmemo.data.sample import MODALITIES, Modality
from mmemo.errors import ConfigError
from mmemo.media.config import SamplingConfig

SUB_CONFIG = {"video": "vision_config", "audio": "audio_config", "face": "face_config"}
# transformers' `get_encoder` finds the vision and the audio tower by these names.
TOWER = {"video": "vision_tower", "audio": "audio_tower", "face": "face_tower"}
"""Attribute of the model that holds each branch's encoder. These are keys of saved weights."""
SPECIAL_TOKEN = {
    "video": "<|video|>",
    "audio": "<|audio|>",
    "face": "<|face|>",
    "fusion": "<|fusion|>",
}
"""Special token of each branch; the processor repeats it as often as the branch makes tokens."""


class BranchBaseConfig(Config):
    """Which output of a frozen encoder is used, and how a connector turns it into LM tokens."""

    layer: int | list[int] | Literal["mix"] = -1
    """Hidden state to use: -1 is the encoder's output, 0 its embeddings. A list, or ``mix`` for all
    of them, is combined by softmax weights that are learned with the connector."""
    spatial_tokens: int = Field(default=1, ge=0, le=64)
    """Images and videos: side k of the k x k grid that patches or feature maps are averaged to, per
    frame or step of time; 0 takes the class token."""
    stride: int = Field(default=1, ge=1, le=1500)
    """Audio: number of encoder steps that are averaged into one feature step."""
    tokens: int = Field(default=1, ge=1, le=4096)
    """Number of LM tokens per clip."""
    pooling: Literal["attention", "mean"] = "mean"
    """``mean`` averages the steps of each of ``tokens`` equal parts of the clip; ``attention`` sums
    all steps, weighted by one linear layer per token (AffectGPT, ICML 2025)."""
    score: Literal["softmax", "linear"] = "softmax"
    """``attention`` only. ``linear`` omits the softmax, as AffectGPT's released code does."""
    connector: Literal["linear", "mlp"] = "mlp"
    """``linear`` is one layer to the LM's width; ``mlp`` is linear, GELU, linear."""
    norm: bool = True
    """Apply layer normalisation to the encoder's features before the connector."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of stored features."""


class SavedBranchConfig(BranchBaseConfig):
    """A branch as saved with the model. The last two fields are measured when it is built."""

    preprocessor: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Content of the encoder's ``preprocessor_config.json``."""
    feature_size: int = Field(ge=1)
    """Width D of the features."""
    feature_layers: int = Field(default=0, ge=0)
    """Number of hidden states kept for a learned mix; 0 without one."""


class FusionConfig(Config):
    """Pre-fusion of the encoders' outputs before the LM (AffectGPT, ICML 2025)."""

    kind: Literal["attention", "qformer"] = "attention"
    visual: Literal["video", "face"] | None = None
    """Branch that is fused with audio; None is video, or face if there is no video branch."""
    score: Literal["softmax", "linear"] = "softmax"
    """``attention`` only. ``linear`` omits the softmax, as the released code does."""
    norm: bool = True
    """Normalise each stream first; the released code does not."""
    queries: int = Field(default=4, ge=1, le=512)
    """``qformer`` only: number of learned queries, which is the number of LM tokens."""
    # These are BERT-base's sizes with two layers, as in AffectGPT's release.
    hidden_size: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    layers: int = Field(default=2, ge=1, le=12)
    # AffectGPT's release has as many for both streams together.
    positions: int = Field(default=264, ge=2)
    """``qformer`` only: number of learned positions, half for each stream. Longer streams are
    averaged to fit."""

    @model_validator(mode="after")
    def _heads_divide(self) -> FusionConfig:
        if self.kind == "qformer" and self.hidden_size % self.heads:
            raise ValueError("hidden_size must be a multiple of heads")
        return self

    @property
    def tokens(self) -> int:
        """Number of LM tokens per clip of the fusion branch."""
        return self.queries if self.kind == "qformer" else 1


class MmemoConfig(PreTrainedConfig):
    """Config of :class:`~mmemo.models.composed.modeling.MmemoModel`.

    ``vision_config`` is the video branch's encoder. ``branches`` maps a modality to its
    :class:`SavedBranchConfig` as plain values, ``fusion`` holds :class:`FusionConfig`, ``sampling``
    :class:`~mmemo.media.config.SamplingConfig`. ``parts`` says where ``text`` and each branch's
    encoder came from (:func:`~mmemo.models.saved.part_source`).
    """

    model_type = "mmemo"
    # TRL looks here for the class of an architecture that transformers does not ship.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs_defaults = {
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(AutoConfig, model_type="dinov2", optional=True),
        "audio_config": SubConfigSpec(AutoConfig, model_type="whisper", optional=True),
        "face_config": SubConfigSpec(AutoConfig, model_type="vit", optional=True),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_config: dict[str, Any] | PreTrainedConfig | None = None
    face_config: dict[str, Any] | PreTrainedConfig | None = None
    branches: dict[str, Any] | None = None
    fusion: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None
    parts: dict[str, Any] | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    face_token_id: int | None = None
    fusion_token_id: int | None = None
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        # Most LMs save this in their text config, but here the head belongs to this model.
        if getattr(text, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        self.branches = dict(self.branches or {})
        for name in self.branches:
            if name not in SUB_CONFIG:
                raise ConfigError(f"branch '{name}' is unknown; use {', '.join(SUB_CONFIG)}")
            if getattr(self, SUB_CONFIG[name]) is None:
                raise ConfigError(f"branch '{name}' needs '{SUB_CONFIG[name]}'")

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The branches that the model has, in the fixed order video, audio, face."""
        return tuple(name for name in MODALITIES if name in (self.branches or {}))

    def branch(self, modality: str) -> SavedBranchConfig:
        """The typed settings of one branch."""
        found = (self.branches or {}).get(modality)
        if found is None:
            known = ", ".join(self.modalities) or "none"
            raise ConfigError(f"the model has no {modality} branch (it has: {known})")
        return parse(SavedBranchConfig, found, where=f"branches.{modality}")

    @property
    def fusion_settings(self) -> FusionConfig | None:
        """The typed settings of the fusion branch; None without one."""
        return None if self.fusion is None else parse(FusionConfig, self.fusion, where="fusion")

    @property
    def fusion_visual(self) -> Modality | None:
        """The branch that pre-fusion joins with audio; None without a fusion branch."""
        settings = self.fusion_settings
        if settings is None:
            return None
        side: Modality = settings.visual or ("video" if "video" in self.modalities else "face")
        if side not in self.modalities or "audio" not in self.modalities:
            raise ConfigError(f"fusion needs the branches audio and {side}; add them or drop it")
        return side

    @property
    def sampling_config(self) -> SamplingConfig:
        """What is sampled from a clip before it is encoded."""
        return parse(SamplingConfig, self.sampling or {}, where="sampling")

    @property
    def token_ids(self) -> dict[str, int]:
        """Branch name (fusion included) -> id of its special token."""
        names = [*self.modalities, *(["fusion"] if self.fusion is not None else [])]
        ids = {name: getattr(self, f"{name}_token_id") for name in names}
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise ConfigError(f"set {missing[0]}_token_id, the id of {SPECIAL_TOKEN[missing[0]]}")
        return ids

    @property
    def token_counts(self) -> dict[str, int]:
        """Branch name (fusion included) -> LM tokens per clip."""
        counts = {name: self.branch(name).tokens for name in self.modalities}
        settings = self.fusion_settings
        return counts if settings is None else {**counts, "fusion": settings.tokens}
