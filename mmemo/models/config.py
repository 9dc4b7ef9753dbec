"""The ``model`` section of every stage's config."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.media.config import SamplingConfig
from mmemo.models.composed.configuration import BranchBaseConfig, FusionConfig


class ScratchConfig(Config):
    """A small Llama with random weights and a tokenizer trained on the stage's own texts."""

    hidden_size: int = Field(default=128, ge=8)
    intermediate_size: int | None = Field(default=None, ge=8)
    """None is four times ``hidden_size``."""
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    vocab_size: int = Field(default=1024, ge=300)
    """Most tokens that the byte-level BPE tokenizer may learn."""
    max_length: int = Field(default=1024, ge=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size must be an even multiple of heads")
        return self


class ScratchText(Config):
    """``text: {scratch: {...}}``."""

    scratch: ScratchConfig


class BranchConfig(BranchBaseConfig):
    """A branch of a model that is built from parts."""

    encoder: str | None = None
    """Hub id or folder of the frozen encoder."""
    encoder_config: dict[str, Any] | None = None
    """Instead of ``encoder``: values of an HF config with its ``model_type``, for an encoder with
    random weights."""
    preprocessor: dict[str, Any] | None = None
    """HF preprocessor config; None reads the encoder's own."""

    @model_validator(mode="after")
    def _one_encoder(self) -> BranchConfig:
        if (self.encoder is None) == (self.encoder_config is None):
            raise ValueError("give exactly one of encoder and encoder_config")
        if self.encoder_config is not None and "model_type" not in self.encoder_config:
            raise ValueError("encoder_config needs a model_type")
        if self.encoder_config is not None and self.preprocessor is None:
            raise ValueError("encoder_config needs a preprocessor")
        return self


class LoraExpertsConfig(Config):
    """Low-rank adapters that tell media apart (:mod:`mmemo.models.adapters.experts`)."""

    variant: Literal["mose", "gate", "moka", "hydra", "lora"] = "mose"
    """``mose``: experts of each medium, and weights of the media (MoSEAR). The simpler ones:
    ``gate``, plain LoRA and a learned scale of each medium's embeddings; ``moka``, a matrix A for
    text and each medium; ``hydra``, experts that are chosen for each token (HydraLoRA); ``lora``,
    plain LoRA of the rank at which it has as many weights as ``mose`` would."""
    per_modality: int = Field(default=3, ge=1)
    """``mose``: experts of each medium. ``hydra``: experts in all."""
    gate_input: Literal["hidden", "embedding"] = "hidden"
    """``mose``: what means are taken of to choose by: the layer's own input, or the embeddings."""
    temperature: float = Field(default=1.0, gt=0)
    """What the scores of experts, and of embeddings' scales, are divided by before the softmax."""
    routing: Literal["straight_through", "soft"] = "straight_through"
    """``mose``: use the expert with the highest score, with the gradient of the softmax; or all of
    them, by their shares."""
    weight_penalty: float = Field(default=0.1, ge=0)
    """``mose``: times the divergence of the micro-batch's mean weights from equal ones. A single
    row may be decisive: only the mean is held."""
    load_penalty: float = Field(default=0.01, ge=0)
    """``mose``: times the squared coefficient of variation of how often each medium's experts are
    used in the micro-batch, which must have several rows to mean anything."""

    @model_validator(mode="after")
    def _nothing_for_nothing(self) -> LoraExpertsConfig:
        idle = {name for name, kinds in _SETTINGS.items() if self.variant not in kinds}
        for name in sorted(idle):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} does nothing for the variant '{self.variant}'; leave it out"
                )
        return self


_SETTINGS: dict[str, tuple[str, ...]] = {
    "per_modality": ("mose", "hydra", "lora"),
    "gate_input": ("mose", "lora"),
    "temperature": ("mose", "gate", "hydra"),
    "routing": ("mose",),
    "weight_penalty": ("mose",),
    "load_penalty": ("mose",),
}
"""The variants that each setting means something to; ``lora`` has the size of such a ``mose``."""


class AdapterConfig(Config):
    """Low-rank adapters on the language model, through PEFT and under its names."""

    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] | None = None
    """Names of layers of the language model, or a regular expression of whole module names. None,
    or ``all-linear``, is every linear layer of the language model."""
    use_dora: bool = False
    use_rslora: bool = False
    experts: LoraExpertsConfig | None = None
    """Tell media apart. Such an adapter cannot be merged into the weights."""

    @model_validator(mode="after")
    def _one_kind(self) -> AdapterConfig:
        if self.use_dora and self.experts is not None:
            raise ValueError("use_dora and experts exclude each other; give one")
        return self


class ModelConfig(Config):
    """Either ``path``, or parts: ``text`` and any of ``video``, ``audio``, ``face``, ``fusion``."""

    path: str | None = None
    """A saved mmemo model, an adapter folder of a run, or a native model: folder or hub id of a
    Qwen2.5-Omni, whole or its Thinker alone, or of a Qwen2.5-VL."""
    native: dict[str, Any] | None = None
    """What a native model's towers are fed: values of ``QwenOmniConfig`` or ``QwenVLConfig``,
    such as ``max_pixels``. None is the released processor's, or what the saved model says."""
    text: str | ScratchText | None = None
    """Hub id or folder of a causal LM, or ``scratch``."""
    video: BranchConfig | None = None
    audio: BranchConfig | None = None
    face: BranchConfig | None = None
    fusion: FusionConfig | None = None
    sampling: SamplingConfig | None = None
    """None is the default for parts and for a native model as it was released, and what the saved
    model says for ``path``."""
    lora: AdapterConfig | None = None
    adapter: Literal["continue", "merge"] = "continue"
    """When ``path`` is an adapter: train it on, or merge it into the weights first."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the LM and the encoders; connectors and fusion are always float32. None is float32 for
    parts, and what it was made with for ``path``."""
    quantization: Literal["nf4"] | None = None
    """Hold the LM's linear layers in 4 bits (QLoRA). Needs ``lora`` or an adapter to train. None is
    what an adapter was trained on, and whole weights for everything else, ``merge`` included."""
    chat_template_path: str | None = None
    """Jinja file of a chat template, in place of the tokenizer's own. Saved with the model."""
    eos_token: str | None = None
    """The token that ends an answer, in place of the tokenizer's own. Saved with the model."""
    seed: int = 0
    """Of new weights: connectors, fusion, adapters, scratch parts."""

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_parts(cls, values: Any) -> Any:
        """Written out, so that a resolved config says what a model was built in."""
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, Any], values)
        of_parts = given.get("path") is None and given.get("dtype") is None
        return {**given, "dtype": "float32"} if of_parts else given

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        parts = (self.text, self.video, self.audio, self.face, self.fusion)
        if self.path is not None and any(part is not None for part in parts):
            raise ValueError("give either path or parts (text, video, audio, face, fusion)")
        if self.path is None and self.native is not None:
            raise ValueError("native is for a model that is named by path")
        if self.path is None and self.text is None:
            raise ValueError("give path, or parts with at least text")
        return self
