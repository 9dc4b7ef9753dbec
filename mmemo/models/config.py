"""The ``model`` section of the config of every stage."""

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
    """Width of the feed-forward layers; None is four times ``hidden_size``."""
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    # The 256 bytes, 3 control tokens and 4 media tokens alone are 263.
    vocab_size: int = Field(default=1024, ge=300)
    """Maximum size of the byte-level BPE tokenizer's vocabulary."""
    max_length: int = Field(default=1024, ge=16)

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchConfig:
        # Rotary positions turn pairs of values, so that a head's width must be even.
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size must be an even multiple of heads")
        return self


class ScratchText(Config):
    """``text: {scratch: {...}}``."""

    scratch: ScratchConfig


class BranchConfig(BranchBaseConfig):
    """A modality branch of a model that is built from parts."""

    encoder: str | None = None
    """Hub id or folder of the frozen encoder: any image, video or audio model of transformers."""
    encoder_config: dict[str, Any] | None = None
    """Instead of ``encoder``: the values of a Hugging Face config, with its ``model_type``, for an
    encoder with random weights."""
    preprocessor: dict[str, Any] | None = None
    """Content of a ``preprocessor_config.json``; None reads the encoder's own."""

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
    """Low-rank adapters with experts per modality (:mod:`mmemo.models.adapters.experts`)."""

    variant: Literal["mose", "gate", "moka", "hydra", "lora"] = "mose"
    """``mose`` has experts for each modality and weights the modalities (MoSEAR). The others are
    simpler: ``gate`` is plain LoRA with a learned scale of each modality's embeddings; ``moka`` has
    one matrix A for text and for each modality; ``hydra`` chooses experts per token (HydraLoRA);
    ``lora`` is plain LoRA with about as many weights as ``mose`` would have."""
    # MoSEAR publishes neither this number nor the penalties below; they are ours to start with.
    per_modality: int = Field(default=3, ge=1)
    """Number of experts: per modality for ``mose``, in total for ``hydra``."""
    gate_input: Literal["hidden", "embedding"] = "hidden"
    """``mose`` chooses experts by the mean over a modality's tokens of this: the layer's own input,
    or the embeddings."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores of experts and of embedding scales before the softmax."""
    routing: Literal["straight_through", "soft"] = "straight_through"
    """``mose``: use only the expert with the highest score, with the gradient of the softmax, or
    mix all experts by their softmax."""
    weight_penalty: float = Field(default=0.1, ge=0)
    """``mose``: weight of the divergence between the mean modality weights and equal weights.
    Single rows may still prefer one modality, since only the mean is penalised."""
    load_penalty: float = Field(default=0.01, ge=0)
    """``mose``: weight of the squared coefficient of variation of how often each modality's experts
    are used."""
    penalty_decay: float | None = Field(default=0.9, ge=0, lt=1)
    """``mose``: the penalties hold a running mean over all prompts of the optimizer steps so far,
    of which each step keeps this share; 0 is the last step alone. How a step is split into
    micro-batches and ranks makes no difference. None penalises the mean of each micro-batch on its
    own, in which a batch of one row is pushed to weigh its own modalities equally."""
    match_step: bool = False
    """``lora``: scale the adapter so that the first optimizer step moves the logits as far as that
    of the ``mose`` it stands for, as measured on the rows of the first step (``sft`` only)."""

    @model_validator(mode="after")
    def _nothing_for_nothing(self) -> LoraExpertsConfig:
        idle = {name for name, kinds in _SETTINGS.items() if self.variant not in kinds}
        for name in sorted(idle):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} has no effect with the variant '{self.variant}'; leave it out"
                )
        return self


_SETTINGS: dict[str, tuple[str, ...]] = {
    "per_modality": ("mose", "hydra", "lora"),
    "gate_input": ("mose", "lora"),
    "temperature": ("mose", "gate", "hydra"),
    "routing": ("mose",),
    "weight_penalty": ("mose",),
    "load_penalty": ("mose",),
    "penalty_decay": ("mose",),
    "match_step": ("lora",),
}
"""The variants that each setting affects; ``lora`` is sized like the ``mose`` it replaces."""


class AdapterConfig(Config):
    """Low-rank adapters on the language model, with PEFT's names and defaults of its own."""

    # Rank, alpha and dropout are those of AffectGPT's release.
    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: str | list[str] | None = None
    """Names of layers of the language model, or a regular expression that matches full module
    names. None or ``all-linear`` is every linear layer of the language model."""
    target_parameters: list[str] | None = None
    """Stacked weights of a mixture of experts to adapt besides, by the ends of their names, such as
    ``experts.gate_up_proj``; PEFT's name. They allow no dropout and no DoRA."""
    use_dora: bool = False
    use_rslora: bool = False
    trainable_tokens: Literal["new", "all"] | list[str] | None = None
    """Tokens whose rows of the embedding and the head are trained too, because the model does not
    know them well: their texts (``" Voice"``, with the space), ``new`` for ``model.new_tokens``, or
    ``all``. PEFT's ``trainable_token_indices``."""
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] | None = None
    """Train and save the whole embedding, the whole head, or both, by PEFT's usual names. If they
    are tied, either name stands for both."""
    experts: LoraExpertsConfig | None = None
    """Experts per modality. Such an adapter cannot be merged into the weights."""

    @model_validator(mode="after")
    def _one_kind(self) -> AdapterConfig:
        if self.use_dora and self.experts is not None:
            raise ValueError("use_dora and experts exclude each other; give one")
        if self.target_parameters is not None:
            if not self.target_parameters:
                raise ValueError("target_parameters names no weight; leave it out")
            # PEFT adds an adapter of stacked weights to the weights, whose inputs it does not see.
            if self.lora_dropout or self.use_dora or self.experts is not None:
                raise ValueError(
                    "target_parameters needs lora_dropout: 0, and neither use_dora nor experts"
                )
        if self.trainable_tokens is not None and self.modules_to_save:
            raise ValueError("trainable_tokens and modules_to_save exclude each other; give one")
        if self.trainable_tokens == []:
            raise ValueError("trainable_tokens names no token; leave it out")
        # PEFT's own way to keep two whole modules tied is for its LoRA alone.
        if self.modules_to_save and self.experts is not None and self.experts.variant != "lora":
            raise ValueError("experts cannot have modules_to_save; use trainable_tokens: all")
        return self


class PartsConfig(Config):
    """The parts that a model is built from."""

    text: str | ScratchText | None = None
    """Hub id or folder of a causal LM, or ``{scratch: {...}}``."""
    video: BranchConfig | None = None
    audio: BranchConfig | None = None
    face: BranchConfig | None = None
    fusion: FusionConfig | None = None


class ModelConfig(PartsConfig):
    """Either ``path``, or parts: ``text`` and any of ``video``, ``audio``, ``face``, ``fusion``. A
    native model that is named by ``path`` can be given the branches ``face`` and ``fusion``."""

    path: str | None = None
    """A saved mmemo model, an adapter folder of a run, or a native model: the folder or hub id of
    Qwen2.5-Omni or Qwen3-Omni (whole or the Thinker alone), Qwen2-VL, Qwen2.5-VL, Qwen3-VL or
    Qwen2-Audio."""
    native: dict[str, Any] | None = None
    """Inputs of a native model's encoders: values of its ``QwenConfig``, such as ``max_pixels``.
    None uses the released processor's values, or those of the saved model."""
    sampling: SamplingConfig | None = None
    """What is sampled from each clip. None is the default for parts and released native models, and
    the saved model's sampling for ``path``."""
    lora: AdapterConfig | None = None
    adapter: Literal["continue", "merge"] = "continue"
    """If ``path`` is an adapter: continue training it, or merge it into the weights first."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the LM and the encoders; connectors and fusion are always float32. None is float32
    for parts, and the saved dtype for ``path``."""
    attn_implementation: (
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = None
    """Attention of the language model; None is transformers' choice, mostly ``sdpa``. The encoders
    keep theirs, because their outputs are stored. ``flash_attention_2`` and ``flash_attention_3``
    need their package and CUDA, and pack nothing: switch the shared prefix and packing off.
    ``flex_attention`` computes shared prefixes and packed rows by torch's FlexAttention on CUDA,
    without copies of a prompt's keys, and everything else as ``sdpa``."""
    quantization: Literal["nf4", "int8"] | None = None
    """Load the LM's linear layers in 4 bits (QLoRA) or in 8. Training then needs ``lora`` or an
    adapter.
    None uses the quantization that an adapter was trained with, and no quantization otherwise,
    including ``adapter: merge``. The layers are kept in ``~/.cache/mmemo/quantized``, or in the
    folder that the environment variable ``MMEMO_QUANTIZED`` names (0: nowhere), so that a machine
    quantizes the same weights once."""
    chat_template_path: str | None = None
    """Jinja file with a chat template that replaces the tokenizer's own. Saved with the model."""
    new_tokens: list[str] | None = None
    """Texts that become one token each, such as tags and action units, if they are not yet. Their
    embeddings start as the mean of those of their old tokens. Saved with the model. With ``lora``
    they are learnt only if ``lora.trainable_tokens`` is ``new``."""
    eos_token: str | None = None
    """Token that ends an answer, if not the tokenizer's own. Saved with the model."""
    seed: int = 0
    """Random seed of new weights: connectors, fusion, adapters and scratch parts."""

    @model_validator(mode="before")
    @classmethod
    def _dtype_of_parts(cls, values: Any) -> Any:
        """Write the default out, so that a resolved config records the dtype of a built model."""
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, Any], values)
        of_parts = given.get("path") is None and given.get("dtype") is None
        return {**given, "dtype": "float32"} if of_parts else given

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        parts = (self.text, self.video, self.audio)
        if self.path is not None and any(part is not None for part in parts):
            raise ValueError(
                "give either path or parts (text, video, audio, face, fusion); only the branches "
                "face and fusion can be added to the model of path"
            )
        if self.path is None and self.native is not None:
            raise ValueError("native is for a model that is named by path")
        if self.path is None and self.text is None:
            raise ValueError("give path, or parts with at least text")
        return self
