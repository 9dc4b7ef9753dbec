"""Build or load the model and processor of a config: from parts, a saved model or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import initialization as init

from mmemo.config import dump
from mmemo.data.sample import MODALITIES, Modality
from mmemo.errors import ConfigError
from mmemo.media.config import SamplingConfig
from mmemo.models import new_tokens, saved
from mmemo.models.adapters import lora
from mmemo.models.adapters.lora import as_plain
from mmemo.models.adapters.quantization import quantize
from mmemo.models.attention.shared_prefix import use_prefixes
from mmemo.models.backbones import ENCODER_NAMES
from mmemo.models.composed import encoders, scratch
from mmemo.models.composed.configuration import SPECIAL_TOKEN, SUB_CONFIG, TOWER, MmemoConfig
from mmemo.models.composed.connectors import Connectors, Fusion
from mmemo.models.composed.modeling import MmemoForConditionalGeneration
from mmemo.models.composed.processing import MmemoProcessor
from mmemo.models.config import (
    AdapterConfig,
    BranchConfig,
    LoraExpertsConfig,
    ModelConfig,
    ScratchConfig,
    ScratchText,
)
from mmemo.models.generation import listed_stop_ids
from mmemo.models.qwen.branches import add_face, add_fusion
from mmemo.models.qwen.native import NativeModel
from mmemo.models.saved import Loaded, part_source
from mmemo.models.transformers_compat import attention_implementation, takes_attention

__all__ = [
    "AdapterConfig",
    "BranchConfig",
    "Loaded",
    "LoraExpertsConfig",
    "ModelConfig",
    "ScratchConfig",
    "ScratchText",
    "load_model",
    "set_trainable",
]


def load_model(
    config: ModelConfig, texts: Sequence[str] = (), base_dir: Path | None = None
) -> Loaded:
    """Build or load the model that ``config`` describes, in eval mode.

    Args:
        texts: training texts of the tokenizer of ``text.scratch``.
        base_dir: folder in which to save the base model of a new adapter, unless it is a saved
            model already. Adapters refer to it by a relative path. Without it, an adapter on a
            model built from parts can be trained but not saved.

    Raises:
        ConfigError: the config or the folder does not fit.
        CheckpointError: weights of a saved model are damaged or missing.
    """
    # New weights are drawn on the CPU by the seed alone, and the caller's generator goes on as if
    # nothing had been drawn.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        loaded = _load(config, texts, base_dir)
    _set_chat(config, loaded)
    _set_attention(config, loaded)
    # PEFT creates its layers in training mode, in which dropout would change every answer.
    loaded.model.eval()
    return loaded


def _set_chat(config: ModelConfig, loaded: Loaded) -> None:
    """Apply the config's chat template and end-of-answer token, at which ``generate`` stops."""
    processor, tokenizer = loaded.processor, loaded.processor.tokenizer
    if config.chat_template_path is not None:
        try:
            template = Path(config.chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat_template_path: '{config.chat_template_path}' cannot be read; give a Jinja "
                "file"
            ) from error
        processor.chat_template = tokenizer.chat_template = template
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"eos_token: '{config.eos_token}' is not one token of this tokenizer; name the one "
                "that the chat template ends an answer with"
            )
        tokenizer.eos_token = config.eos_token
    generation: Any = lora.unwrap(loaded.model).generation_config
    listed = listed_stop_ids(generation)
    if tokenizer.eos_token_id not in listed:
        generation.eos_token_id = [*listed, tokenizer.eos_token_id]


def _set_attention(config: ModelConfig, loaded: Loaded) -> None:
    """Apply ``attn_implementation`` to the language model."""
    name, lm = config.attn_implementation, lora.unwrap(loaded.model).language_model
    if name is None:
        return
    try:
        if takes_attention(lm):
            lm.set_attn_implementation("sdpa" if name == "flex_attention" else name)
            taken = name != "flex_attention" or use_prefixes(lm, by_flex=True)
        else:
            taken = name == attention_implementation(lm.config)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"attn_implementation: '{name}' cannot be used here ({_first_line(error)}); leave it "
            "out"
        ) from error
    if not taken:
        raise ConfigError(
            f"attn_implementation: a '{lm.config.model_type}' language model cannot use '{name}'; "
            "leave it out"
        )


def _load(config: ModelConfig, texts: Sequence[str], base_dir: Path | None) -> Loaded:
    path = None if config.path is None else Path(config.path)
    if path is not None and (path / "adapter_config.json").exists():
        loaded = saved.from_adapter(config, path)
        if isinstance(loaded.model, PeftModel):
            _check_added(config, loaded)
            return loaded
        model, processor, base = loaded.model, loaded.processor, None
    elif config.path is not None:
        model, processor = saved.from_saved(config, config.path, config.dtype)
        _add_branches(config, model)
        base = path if path is not None and path.exists() else None
    else:
        model, processor = _from_parts(config, texts)
        base = None
    if new_tokens.add_tokens(model, processor.tokenizer, config.new_tokens or ()):
        base = None  # the saved model has other tables
    # The base is saved before it is quantized, because such weights cannot be saved whole.
    if config.lora is not None and base is None and base_dir is not None:
        base = saved.keep_base(config, model, processor, base_dir)
    if config.quantization is not None:
        quantize(model, config.quantization)
    if config.lora is None:
        return Loaded(model, processor, base)
    section, tokenizer = as_plain(model, config.lora), processor.tokenizer
    drawn_from = torch.get_rng_state()
    adapted = lora.add_lora(model, section, tokenizer, config.new_tokens or ())
    return Loaded(adapted, processor, base, drawn_from)


def _add_branches(config: ModelConfig, model: lora.Model) -> None:
    """Give the model of ``path`` the new branches of the config."""
    given = [name for name in ("face", "fusion") if getattr(config, name) is not None]
    if given and not isinstance(model, NativeModel):
        raise ConfigError(
            f"'{config.path}' was built from parts, whose branches are fixed; leave "
            f"model.{given[0]} out"
        )
    if config.face is not None:
        add_face(model, config.face, part_source(config.face.encoder))
    if config.fusion is not None:
        add_fusion(model, config.fusion)


def _check_added(config: ModelConfig, loaded: Loaded) -> None:
    missing = new_tokens.missing_tokens(loaded.processor.tokenizer, config.new_tokens or ())
    if missing:
        raise ConfigError(
            f"new_tokens: '{missing[0]}' is not a token of '{config.path}', and an adapter "
            "cannot be trained on with other tables; set adapter: merge"
        )


def _from_parts(
    config: ModelConfig, texts: Sequence[str]
) -> tuple[MmemoForConditionalGeneration, MmemoProcessor]:
    """Assemble a causal LM, encoders and new connectors."""
    dtype = getattr(torch, config.dtype or "float32")
    sampling = config.sampling or SamplingConfig()
    lm, tokenizer = _language_model(config, texts, dtype)
    parts: dict[Modality, encoders.LoadedEncoder] = {}
    for name in MODALITIES:
        branch: BranchConfig | None = getattr(config, name)
        if branch is not None:
            parts[name] = encoders.load_encoder(name, branch, sampling, dtype)
    named = {name: getattr(config, name).encoder for name in parts}
    text = None if isinstance(config.text, ScratchText) else config.text
    names = [*parts, *(["fusion"] if config.fusion is not None else [])]
    ids = _add_tokens(lm, tokenizer, names)
    lm.config.pad_token_id = tokenizer.pad_token_id
    # Untyped, because a type checker cannot follow computed keyword names.
    known: dict[str, Any] = {
        **{SUB_CONFIG[name]: part.model.config for name, part in parts.items()},
        **{f"{name}_token_id": token for name, token in ids.items()},
    }
    made = MmemoConfig(
        text_config=lm.config,
        **known,
        branches={name: dump(part.spec) for name, part in parts.items()},
        fusion=None if config.fusion is None else dump(config.fusion),
        sampling=dump(sampling),
        parts={name: part_source(one) for name, one in {"text": text, **named}.items()},
        lm_head_bias=getattr(lm.get_output_embeddings(), "bias", None) is not None,
        tie_word_embeddings=bool(lm.config.tie_word_embeddings),
        dtype=dtype,
    )
    model = _assemble(made, lm, {name: part.model for name, part in parts.items()})
    processor = MmemoProcessor(
        tokenizer,
        token_counts=made.token_counts,
        fusion_visual=made.fusion_visual,
        sampling=sampling,
    )
    return model, processor


def _language_model(
    config: ModelConfig, texts: Sequence[str], dtype: torch.dtype
) -> tuple[Any, Any]:
    """A causal LM with its head, and its tokenizer."""
    if isinstance(config.text, ScratchText):
        tokenizer = scratch.train_tokenizer(texts, config.text.scratch.vocab_size)
        lm: Any = scratch.build_llama(config.text.scratch, tokenizer)
        return lm.to(dtype), tokenizer
    name = str(config.text)
    try:
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"text: '{name}' cannot be loaded as a causal LM ({_first_line(error)}); check the "
            "name or the folder"
        ) from error
    if tokenizer.pad_token_id is None:
        # The pad token only fills rows; attention masks and labels ignore it.
        tokenizer.pad_token = tokenizer.eos_token
    return lm, tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _add_tokens(lm: Any, tokenizer: Any, names: Sequence[str]) -> dict[str, int]:
    """Add the special tokens of the branches; the embedding grows only if it has no spare rows.

    Their embeddings need no training, because the model overwrites them with the branch's output.
    New rows are the mean of the old ones, since a random row of the head could win the softmax.
    """
    tokens = [AddedToken(SPECIAL_TOKEN[name], special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)
    old = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        # transformers' own resizing to the mean draws rows at random around it.
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                weight = module.weight
                # A sum over a whole vocabulary loses digits in half precision.
                weight[old:] = weight[:old].float().mean(0).to(weight.dtype)
    return {name: int(tokenizer.convert_tokens_to_ids(SPECIAL_TOKEN[name])) for name in names}


def _assemble(
    config: MmemoConfig, lm: Any, encoders: dict[Modality, PreTrainedModel]
) -> MmemoForConditionalGeneration:
    """Assemble a model around loaded parts without allocating anything large twice."""
    with torch.device("meta"), init.no_init_weights():
        model = MmemoForConditionalGeneration(config)
    inner: Any = model.model
    if type(inner.language_model) is not type(lm.base_model):
        raise ConfigError(
            f"text: '{type(lm).__name__}' is not a plain causal LM around its AutoModel; use one"
        )
    inner.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    for name, encoder in encoders.items():
        setattr(inner, TOWER[name], encoder.requires_grad_(False))
    width = lm.get_input_embeddings().weight.shape[1]
    inner.connectors = model.initialised(Connectors(config, width))
    if config.fusion is not None:
        inner.fusion = model.initialised(Fusion(config, width))
    generation: Any = lm.generation_config
    model.generation_config = generation
    # Never generate a placeholder, for which there would be no features.
    generation.suppress_tokens = sorted(config.token_ids.values()) or None
    generation.pad_token_id = lm.config.pad_token_id
    # The parts that were tied on meta have been replaced, so they are tied once more.
    model.tie_weights()
    return model.eval()


def set_trainable(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Make exactly these parts trainable, and return the names of their parameters.

    ``lm`` is the language model with its head, or its adapters if it has any. ``connectors`` are
    all connectors; ``video``, ``audio`` and ``face`` are those of one branch. ``fusion`` is the
    pre-fusion branch. Encoders are always frozen.

    Raises:
        ConfigError: the model does not have a part, or nothing is trainable.
    """
    inner = lora.unwrap(model)
    composed = isinstance(inner, MmemoForConditionalGeneration)
    own = inner.modalities if composed else ["face"]
    known = ["lm", *(["connectors", *own] if "connectors" in lora.own_parts(inner) else [])]
    known += ["fusion"] if "fusion" in lora.own_parts(inner) else []
    for part in parts:
        if part not in known:
            raise ConfigError(f"trainable part '{part}' is unknown; use {', '.join(known)}")
    chosen: list[str] = []
    adapted = any(lora.in_adapter(name) for name, _ in model.named_parameters())
    if lora.is_quantized(inner) and not adapted:
        raise ConfigError(
            "quantization: such weights cannot be trained without an adapter; add lora or leave "
            "quantization out"
        )
    for name, parameter in model.named_parameters():
        part = _part_of(name, adapted)
        names = () if part is None else (part, part.partition(".")[0], part.partition(".")[2])
        # Packed 4-bit weights are integers, which cannot have a gradient.
        trains = any(one in parts for one in names) and parameter.is_floating_point()
        parameter.requires_grad_(trains)
        if trains:
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"trainable parts {list(parts)} select no parameters; name at least one")
    return chosen


def _part_of(name: str, adapted: bool) -> str | None:
    """The part that a parameter belongs to, such as ``connectors.video``; None if it is frozen."""
    path = name.split(".")
    # PEFT keeps the untrained original beside the copy of a module that it saves.
    if "original_module" in path:
        return None
    # Before the encoders: the fusion calls its picture side `visual`, as Qwen2.5-VL its encoder.
    if "fusion" in path:
        return "fusion"
    if not ENCODER_NAMES.isdisjoint(path):
        return None
    if "connectors" in path:
        modality = next(part for part in path if part in MODALITIES)
        return f"connectors.{modality}"
    if "language_model" in path or "lm_head" in path:
        beside = "modules_to_save" in path  # the embedding or the head, trained whole
        return "lm" if not adapted or beside or lora.in_adapter(name) else None
    return None
