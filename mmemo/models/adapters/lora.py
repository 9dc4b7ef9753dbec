"""LoRA, DoRA and QLoRA on the language model, saved and loaded as plain PEFT folders.

``lora.experts: {variant: lora}`` asks for the baseline of the experts: plain LoRA of about the same
number of weights (:func:`equal_rank`), which experts have to beat.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmemo.config import dump
from mmemo.errors import CheckpointError, ConfigError
from mmemo.models.adapters.experts import NAME as EXPERTS
from mmemo.models.adapters.experts import PREFIX, ExpertsConfig, count_weights, sizes
from mmemo.models.adapters.quantization import Quantization, quantization_of
from mmemo.models.adapters.tokens import peft_fields
from mmemo.models.composed.modeling import MmemoForConditionalGeneration
from mmemo.models.composed.processing import MmemoProcessor
from mmemo.models.config import AdapterConfig
from mmemo.models.qwen.branch import Branch
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.processing import NativeProcessor

Model = MmemoForConditionalGeneration | NativeModel
Processor = MmemoProcessor | NativeProcessor

_RECORD = "mmemo_adapter.json"
"""File beside the adapter with the settings that PEFT's own config cannot hold."""

_WEIGHTS = "adapter_model.safetensors"
_INNER = "base_model.model."
"""What PEFT puts before the names of a model's weights."""

_TOKENS = "trainable_tokens_delta"
"""Where PEFT keeps the trained rows of the embedding and the head."""


def unwrap(model: nn.Module) -> Any:
    """The :data:`Model` inside PEFT, DeepSpeed or DDP wrappers."""
    inner: Any = model
    # Wrappers come first: PEFT's and DeepSpeed's pass attributes of the model inside through.
    while True:
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif hasattr(inner, "feature_fingerprint"):
            return inner
        else:
            raise TypeError(f"there is no mmemo model inside {type(model).__name__}")


def targets(model: Model, wanted: str | list[str] | set[str] | None) -> str:
    """``lora.target_modules`` as a regular expression that matches linear layers of the LM only.

    Encoders and connectors never match. Nor does the head, because it may be tied to the embedding,
    and merging an adapter into it would change both.

    Raises:
        ConfigError: ``wanted`` names or matches anything else.
    """
    prefix = next(n for n, m in model.named_modules() if m is model.language_model)
    linear = [
        f"{prefix}.{name}"
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if wanted is None or wanted == "all-linear":
        wanted = {name.rpartition(".")[2] for name in linear}
    if not isinstance(wanted, str):
        for part in wanted:
            if not any(name.endswith(f".{part}") for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ConfigError(
                    f"lora.target_modules: the language model has no linear layer '{part}'; use "
                    f"some of {known}"
                )
        # PEFT would match a list by the ends of names, also those in the encoders.
        return rf".*\.language_model\.(.*\.)?({'|'.join(sorted(map(re.escape, wanted)))})"
    try:
        hit = {name for name, _ in model.named_modules() if re.fullmatch(wanted, name)}
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules: '{wanted}' is no regular expression ({error})"
        ) from error
    outside = sorted(hit.difference(linear))
    if outside:
        raise ConfigError(
            f"lora.target_modules: '{wanted}' matches '{outside[0]}', which is no linear layer of "
            r"the language model; begin it with .*\.language_model\. and end it with layers' names"
        )
    return wanted


_OUTSIDE = r"(?!(.*\.)?language_model\.).*"
"""Matches modules outside of the language model."""


def _stacked(model: Model) -> set[str]:
    """Names of the language model's stacked weights, one of which holds all experts of a layer."""
    inside = {id(p) for p in model.language_model.parameters() if p.ndim == 3}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def _check_parameters(model: Model, wanted: Sequence[str]) -> None:
    """Check that ``lora.target_parameters`` names stacked weights of the language model only.

    Raises:
        ConfigError: a name is the end of no such weight, or of another one too.
    """
    stacked = _stacked(model)
    known = sorted({".".join(name.split(".")[-2:]) for name in stacked})
    for part in wanted:
        hit = {n for n, _ in model.named_parameters() if n.endswith(f".{part}")}
        if not hit or hit - stacked:
            use = f"use some of {', '.join(known)}" if known else "leave it out"
            raise ConfigError(
                f"lora.target_parameters: '{part}' is the name of no weights of experts in the "
                f"language model; {use}"
            )


def own_parts(model: Model) -> list[str]:
    """Trainable modules outside the language model; a native model has those of its branches."""
    if isinstance(model, NativeModel):
        return [branch.part for branch in model.backbone.branches.values()]
    fusion = ["fusion"] if model.model.fusion is not None else []
    return [*(["connectors"] if model.modalities else []), *fusion]


def media_of(model: Model) -> list[str]:
    """Names of the media that a prompt can contain, fusion included, in a fixed order."""
    if isinstance(model, NativeModel):
        return list(dict.fromkeys([*model.modalities, *model.backbone.branches]))
    return list(model.config.token_ids)


def add_lora(
    model: Model,
    section: AdapterConfig,
    tokenizer: Any | None = None,
    new_tokens: Sequence[str] = (),
) -> PeftModel:
    """Put new adapters on the language model. Connectors and fusion train and are saved with them.

    Args:
        tokenizer: of the model, for ``trainable_tokens``.
        new_tokens: what ``trainable_tokens: new`` stands for.

    Raises:
        ConfigError: the section does not fit the model.
    """
    values = _values(section)
    experts: dict[str, Any] | None = values.pop("experts")
    _check_parameters(model, section.target_parameters or ())
    fields = peft_fields(model, section, tokenizer, new_tokens)
    values |= fields | {
        "task_type": "CAUSAL_LM",
        "target_modules": targets(model, section.target_modules),
        # PEFT turns a pattern into bare names where transformers has stacked experts, which would
        # match layers of the encoders too.
        "exclude_modules": _OUTSIDE if _stacked(model) else None,
        "modules_to_save": [*own_parts(model), *fields["modules_to_save"]] or None,
    }
    try:
        if experts is None:
            config: PeftConfig = LoraConfig(**values)
        else:
            for name in ("use_dora", "ensure_weight_tying"):
                del values[name]
            del experts["match_step"]
            config = ExpertsConfig(**values, **experts, modalities=media_of(model))
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def _values(section: AdapterConfig) -> dict[str, Any]:
    """The settings that PEFT has under the same name."""
    values = dump(section)
    for name in ("trainable_tokens", "modules_to_save"):
        del values[name]
    if values["target_parameters"] is None:  # experts' configs do not have it
        del values["target_parameters"]
    return values


def equal_rank(model: Model, section: AdapterConfig) -> int:
    """The rank at which plain LoRA on the same layers has about as many weights as experts.

    Args:
        model: without an adapter.
        section: describes the experts; its own ``r`` is returned if it has none.
    """
    values = _values(section)
    wanted = re.compile(targets(model, section.target_modules))
    layers = [m for n, m in model.named_modules() if wanted.fullmatch(n)]
    one = sum(sum(sizes(layer)) for layer in layers)  # plain LoRA's weights per unit of rank
    if section.experts is None:
        return section.r
    experts = values.pop("experts")
    del values["use_dora"], experts["match_step"]
    config = ExpertsConfig(**values, **experts, modalities=media_of(model))
    width = cast(Any, model.language_model).get_input_embeddings().weight.shape[1]
    return max(1, round(count_weights(layers, config, width) / one))


def as_plain(model: Model, section: AdapterConfig) -> AdapterConfig:
    """``section`` with the variant ``lora`` replaced by the plain LoRA that it stands for.

    Its rank is that of :func:`equal_rank`, and ``lora_alpha`` grows with it, so that its output is
    scaled as the experts' is. Of equal scale, it takes a larger first step, because more products
    are summed; ``match_step`` corrects that afterwards (:mod:`mmemo.train.equal_step`). ``model``
    has no adapter yet.
    """
    if section.experts is None or section.experts.variant != "lora":
        return section
    rank = equal_rank(model, as_experts(section))
    grown = rank / section.r
    alpha = section.lora_alpha * (grown**0.5 if section.use_rslora else grown)
    return section.model_copy(update={"r": rank, "lora_alpha": alpha, "experts": None})


def as_experts(section: AdapterConfig) -> AdapterConfig:
    """``section`` with the variant ``lora`` replaced by the experts that it is the baseline of."""
    assert section.experts is not None
    experts = section.experts.model_copy(update={"variant": "mose", "match_step": False})
    # Experts cannot have whole modules beside them.
    return section.model_copy(update={"experts": experts, "modules_to_save": None})


def in_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter, by its full name; modules saved beside it do not."""
    return any(part.startswith(("lora_", PREFIX, _TOKENS)) for part in name.split("."))


def of_tokens(name: str) -> bool:
    """Whether a weight is the embedding of tokens that an adapter trains (``trainable_tokens``)."""
    return any(part.startswith(_TOKENS) for part in name.split("."))


_NO_PART_IN_AN_ANSWER = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "init_lora_weights", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
        # Seen in the names of the adapter's weights.
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "peft_type"),
    }
)
"""Settings of PEFT's that only name, initialise or train an adapter."""


def deciding_settings(config: PeftConfig) -> dict[str, Any]:
    """What an adapter computes with beside its weights, such as ``lora_alpha``: the settings that
    are not PEFT's defaults, whatever the method and whoever made the adapter."""
    if isinstance(config, ExpertsConfig):
        return config.deciding()
    values: dict[str, Any] = config.to_dict()
    defaults = type(config)().to_dict()
    return {
        key: value
        for key, value in sorted(values.items())
        if key not in _NO_PART_IN_AN_ANSWER and value != defaults.get(key)
    }


def is_quantized(model: nn.Module) -> bool:
    """Whether the model inside is quantized (:mod:`mmemo.models.adapters.quantization`)."""
    return quantized_as(model) is not None


def quantized_as(model: nn.Module) -> Quantization | None:
    """How the model inside is quantized."""
    return quantization_of(unwrap(model))


def base_of(folder: Path) -> Path | str:
    """The base model of an adapter: a folder, or a hub id.

    A relative path is resolved from the adapter's own folder, so that a run can be moved.

    Raises:
        ConfigError: the adapter names no base, or the folder is not there.
    """
    named = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{folder / 'adapter_config.json'} names no base model; set one")
    beside = (folder / named).resolve()
    if (beside / "config.json").exists():
        return beside
    # Otherwise a folder that was lost would be taken for a hub id and asked for there.
    if named.startswith((".", "/")):
        raise ConfigError(
            f"{folder}: the adapter's base model '{named}' is not there; move the adapter together "
            "with it, or name a hub id or another folder in adapter_config.json"
        )
    return str(named)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read; save or fetch the adapter again") from error


def has_experts(folder: Path) -> bool:
    """Whether the adapter in ``folder`` has experts, which cannot be merged into the weights."""
    return _read(folder / "adapter_config.json").get("peft_type") == EXPERTS


def read_record(folder: Path) -> dict[str, Any]:
    """``dtype`` and ``quantization`` of the model that the adapter was trained on.

    Both are None for an adapter that mmemo did not write.
    """
    file = folder / _RECORD
    return {"dtype": None, "quantization": None, **(_read(file) if file.exists() else {})}


def load(model: Model, folder: Path, *, trainable: bool) -> PeftModel:
    """Load the adapter of ``folder`` onto its base.

    Raises:
        CheckpointError: weights are missing, or belong to another model.
    """
    file = folder / _WEIGHTS
    again = "save or fetch the adapter again"
    try:
        with safe_open(file, framework="pt") as opened:
            saved = set(opened.keys())
        with _for_peft(model, folder) as (place, beside):
            saved |= beside
            loaded = PeftModel.from_pretrained(model, str(place), is_trainable=trainable)
    except KeyError as error:  # a connector's: PEFT looks these up one by one
        raise CheckpointError(f"{file}: lacks the weights of {error.args[0]}; {again}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{file}: does not fit its base ({reason}); {again}") from error
    # PEFT only warns of any other weight that is missing.
    # Left to decide about embeddings by itself, it might ask the hub for the base's config.
    wanted: Any = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    missing = sorted(set(wanted) - saved)
    if missing:
        raise CheckpointError(
            f"{file}: lacks the weights of {missing[0]} ({len(missing)} in all); {again}"
        )
    return loaded


def _branches(model: Model) -> list[Branch]:
    return list(model.backbone.branches.values()) if isinstance(model, NativeModel) else []


def _set_apart(folder: Path, branches: Sequence[Branch]) -> None:
    """Move the branches out of the files of PEFT, which then fit the released model."""
    file, parts = folder / _WEIGHTS, {branch.part for branch in branches}
    weights = load_file(file)
    for branch in branches:
        own = branch.weights(weights, _INNER)
        branch.save(folder, own)
        for name in own:
            del weights[f"{_INNER}{branch.part}.{name}"]
    save_file(weights, file, metadata={"format": "pt"})
    config = folder / "adapter_config.json"
    values = _read(config)
    kept = [one for one in values.get("modules_to_save") or () if one not in parts]
    _write(config, {**values, "modules_to_save": kept or None})


@contextmanager
def _for_peft(model: Model, folder: Path) -> Generator[tuple[Path, set[str]]]:
    """A folder from which PEFT loads an adapter with the branches beside it, and the names of the
    branches' weights. A model without branches is loaded from its own folder.

    Raises:
        CheckpointError: a branch is missing or damaged.
    """
    branches = _branches(model)
    if not branches:
        yield folder, set()
        return
    beside = {
        f"{_INNER}{branch.part}.{name}": weight
        for branch in branches
        for name, weight in branch.read(folder).items()
    }
    with TemporaryDirectory() as made:
        place, values = Path(made), _read(folder / "adapter_config.json")
        parts = [*(branch.part for branch in branches), *(values.get("modules_to_save") or ())]
        _write(place / "adapter_config.json", {**values, "modules_to_save": parts})
        save_file(load_file(folder / _WEIGHTS) | beside, place / _WEIGHTS)
        yield place, set(beside)


def check_same(
    model: Model,
    section: AdapterConfig,
    folder: Path,
    tokenizer: Any | None = None,
    new_tokens: Sequence[str] = (),
) -> None:
    """Check that a ``lora`` section equals the settings of the adapter that training continues.

    ``model`` is the base, without the adapter. ``tokenizer`` and ``new_tokens`` are those of
    :func:`add_lora`. Where ``match_step`` has decided the adapter's ``lora_alpha``, the section's
    does not count.

    Raises:
        ConfigError: a setting differs.
    """
    saved = _read(folder / "adapter_config.json")
    given = _values(as_plain(model, section))
    if section.experts is not None and section.experts.match_step:
        del given["lora_alpha"]
    experts: dict[str, Any] | None = given.pop("experts")
    if (experts is not None) != (saved.get("peft_type") == EXPERTS):
        raise ConfigError(
            f"lora.experts is {'not ' if experts is None else ''}set but the adapter {folder} has "
            f"{'some' if experts is None else 'none'}; make them equal, or set adapter: merge"
        )
    given |= experts or {}
    given["target_parameters"] = section.target_parameters
    if "target_modules" in saved:
        # The folder holds a pattern, whatever form the config had, so patterns are compared.
        saved["target_modules"] = targets(model, saved["target_modules"])
        given["target_modules"] = targets(model, section.target_modules)
    fields = peft_fields(model, section, tokenizer, new_tokens)
    if (fields["trainable_token_indices"] or {}) != (saved.get("trainable_token_indices") or {}):
        raise ConfigError(
            f"lora.trainable_tokens names other tokens than the adapter {folder} trains; make them "
            "equal, or set adapter: merge"
        )
    own = set(own_parts(model))
    given["modules_to_save"] = sorted(fields["modules_to_save"])
    saved["modules_to_save"] = sorted(set(saved.get("modules_to_save") or []) - own)
    for key, value in given.items():
        if key in saved and saved[key] != value:
            raise ConfigError(
                f"lora.{key} is {value} but the adapter {folder} has {saved[key]}; make them "
                "equal, or set adapter: merge"
            )


def save_full(
    model: Model,
    processor: Processor,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a whole model as safetensors, with its processor.

    Raises:
        ConfigError: the model is quantized.
    """
    if is_quantized(model):
        raise ConfigError("a quantized model cannot be saved whole; leave quantization out")
    made_in = model.config.dtype
    model.save_pretrained(folder, state_dict=state_dict)
    # save_pretrained recorded the dtype of the first weight, which training may keep in float32.
    model.config.dtype = made_in
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_model(
    model: nn.Module,
    processor: Processor,
    folder: Path,
    *,
    base: Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a plain model whole, or an adapter as a PEFT folder that names ``base`` relatively.

    Args:
        base: the saved model under the adapter.
        state_dict: gathered weights to save instead of the model's own, as DeepSpeed provides.

    Raises:
        ConfigError: an adapter has no saved base, or a quantized model has no adapter.
    """
    inner: Any = model
    while not isinstance(inner, MmemoForConditionalGeneration | NativeModel | PeftModel):
        inner = inner.module
    if not isinstance(inner, PeftModel):
        save_full(inner, processor, folder, state_dict)
        return
    if base is None:
        raise ConfigError(
            "an adapter needs a saved base model; pass base_dir when loading the model"
        )
    inner.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
    name_base(folder, base)
    branches = _branches(unwrap(inner))
    if branches:
        _set_apart(folder, branches)
    record = {
        "dtype": str(unwrap(inner).config.dtype).removeprefix("torch."),
        "quantization": quantized_as(inner),
    }
    _write(folder / _RECORD, record)
    processor.save_pretrained(folder)


def name_base(folder: Path, base: Path) -> None:
    """Write the relative path from an adapter folder to its base into ``adapter_config.json``."""
    file = folder / "adapter_config.json"
    _write(
        file,
        {
            **_read(file),
            "base_model_name_or_path": os.path.relpath(base.resolve(), folder.resolve()),
        },
    )


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
