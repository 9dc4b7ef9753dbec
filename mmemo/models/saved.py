"""Load saved models and adapters, whole and undamaged, or refuse them by name.

Also records where the parts of a model come from (:func:`part_source`), for its model card.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import cached_file

from mmemo import checkpoint
from mmemo.config import dump, parse
from mmemo.errors import CheckpointError, ConfigError
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters import lora
from mmemo.models.adapters.lora import Model, Processor
from mmemo.models.adapters.quantization import dequantize, quantize
from mmemo.models.backbones import BACKBONES
from mmemo.models.composed.configuration import MmemoConfig
from mmemo.models.composed.modeling import MmemoForConditionalGeneration
from mmemo.models.composed.processing import MmemoProcessor
from mmemo.models.config import ModelConfig
from mmemo.models.qwen.base import QwenConfig
from mmemo.models.qwen.branches import load_branch
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.processing import (
    NativeProcessor,
    Notes,
    own_pixels,
    own_template,
    read_json,
    read_notes,
)

_BASE_RECORD = "mmemo_base.json"
"""File in the folder of a base model that says what it was made of."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to use. ``base`` is the saved model under the adapter, if there is one.
    ``drawn_from`` is the state of torch's generator from which a new adapter was drawn."""

    model: Model | PeftModel
    processor: Processor
    base: Path | None = None
    drawn_from: torch.Tensor | None = None


def part_source(name: str | None) -> dict[str, str | None]:
    """Where a part comes from: ``hub`` id or ``folder`` name, and the ``license`` of its card.

    Only the name of a folder is kept, because its path would mean nothing elsewhere. All values are
    None for a part with random weights; ``license`` is None if the card does not say.
    """
    if name is None:
        return {"hub": None, "folder": None, "license": None}
    local = Path(name).exists()
    return {
        "hub": None if local else name,
        "folder": Path(name).resolve().name if local else None,
        "license": _license(name),
    }


def _license(name: str) -> str | None:
    try:
        file = cached_file(name, "README.md")
        text = Path(str(file)).read_text(encoding="utf-8")
        card: Any = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    if not isinstance(card, dict):
        return None
    values = cast(dict[str, Any], card)
    found = values.get("license_name") or values.get("license")
    return None if found is None else str(found)


def from_saved(
    config: ModelConfig, path: str, dtype: str | None, notes: Notes | None = None
) -> tuple[Model, Processor]:
    """Load a full model and its processor: one saved by mmemo, or a native model as released.

    Args:
        dtype: None is the dtype that the folder records.
        notes: replace those saved beside a native model.

    Raises:
        ConfigError: the folder is no such model, or differs from ``config``.
        CheckpointError: weights are damaged or missing.
    """
    _verify(Path(path))
    try:
        values, _ = PreTrainedConfig.get_config_dict(path)
        native = BACKBONES.get(values.get("model_type", ""))
        found = None if native is not None else AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{path}' is neither a model nor an adapter folder ({_first_line(error)}); check the "
            "path"
        ) from error
    kept = getattr(torch, dtype) if dtype else "auto"
    if native is not None:
        return _native(config, native, path, kept, notes or read_notes(path))
    if not isinstance(found, MmemoConfig):
        raise ConfigError(
            f"'{path}' is a '{values.get('model_type')}' model, not a saved mmemo model nor one of "
            f"{', '.join(BACKBONES)}; name it as text and give branches"
        )
    if config.native is not None:
        raise ConfigError(f"'{path}' was built from parts; leave model.native out")
    model: Any = _weights(MmemoForConditionalGeneration, path, kept)
    processor = MmemoProcessor.from_pretrained(path)
    _check_pair(model, processor, path)
    _check_kept("sampling", config.sampling, model.sampling, path)
    return model, processor


def saved_sampling(path: str) -> SamplingConfig | None:
    """What a saved model or adapter samples from a clip, without loading it; None if it does not
    say, as released models.

    Raises:
        ConfigError, CheckpointError: its files cannot be read, or an adapter's base is lost.
    """
    notes = read_notes(path)
    kept = notes.sampling if notes else read_json(path, "processor_config.json").get("sampling")
    if kept is None and (Path(path) / "adapter_config.json").exists():
        return saved_sampling(str(lora.base_of(Path(path))))
    return None if kept is None else parse(SamplingConfig, kept, where=path)


def saved_dtype(config: ModelConfig) -> torch.dtype | None:
    """The number type that the language model of ``path`` is loaded in, without loading it; None if
    its files do not say."""
    path = str(config.path)
    name = config.dtype
    if name is None and (Path(path) / "adapter_config.json").exists():
        name = lora.read_record(Path(path))["dtype"]
    values = read_json(whole_model(path), "config.json")
    name = name or values.get("dtype") or values.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else None


def saved_branches(config: ModelConfig) -> bool:
    """Whether there are branches beside the native model of ``path``, or whether it was built from
    parts."""
    path = str(config.path)
    found = [read_notes(one) for one in {path, whole_model(path)}]
    kind = read_json(whole_model(path), "config.json").get("model_type")
    return kind not in BACKBONES or any(notes is not None and notes.branches for notes in found)


def whole_model(path: str) -> str:
    """``path``, or the base of the adapter that is there.

    Raises:
        ConfigError: the base is lost.
    """
    adapted = (Path(path) / "adapter_config.json").exists()
    return str(lora.base_of(Path(path))) if adapted else path


def _native(
    config: ModelConfig, kind: type[NativeModel], path: str, dtype: Any, notes: Notes | None
) -> tuple[NativeModel, NativeProcessor]:
    """A native model with its own encoders, tokenizer and template.

    ``notes`` are those of an adapter on it, or its own."""
    saved_with = read_notes(path)
    if notes is None:
        sampling = config.sampling or SamplingConfig()
        settings = parse(kind.settings_kind, config.native or {}, where="model.native")
        # A checkpoint may normalise pixels differently than the defaults, so its own file decides.
        if not {"image_mean", "image_std"} & (config.native or {}).keys():
            settings = own_pixels(path, settings)
        notes = Notes(sampling=dump(sampling), settings=dump(settings), source=part_source(path))
    else:
        sampling = parse(SamplingConfig, notes.sampling or {}, where=path)
        settings = parse(kind.settings_kind, notes.settings or {}, where=path)
        _check_kept("sampling", config.sampling, sampling, path)
        _check_given(config, kind, settings, path)
    model: NativeModel = _weights(kind, path, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{path}' has no tokenizer ({_first_line(error)}); save the model and its processor "
            "together"
        ) from error
    if tokenizer.pad_token_id is None:
        # The pad token only fills rows; attention masks and labels ignore it.
        tokenizer.pad_token = tokenizer.eos_token
    template = own_template(path, tokenizer)
    model.attach(tokenizer, sampling, settings)
    for name in saved_with.branches if saved_with else ():
        load_branch(model, path, name, weights=True)
    return model, NativeProcessor(model.backbone, template, path, notes)


def _check_given(
    config: ModelConfig, kind: type[NativeModel], settings: QwenConfig, path: str
) -> None:
    given = dump(parse(kind.settings_kind, config.native or {}, where="model.native"))
    kept = dump(settings)
    for name in config.native or {}:
        _check_kept(f"native.{name}", given[name], kept[name], path)


def _check_kept(name: str, given: Any, kept: Any, path: str) -> None:
    if given is not None and given != kept:
        raise ConfigError(
            f"{name} differs from what '{path}' was trained with; leave model.{name} out"
        )


def _verify(folder: Path) -> None:
    """Check a folder against its manifest, if it has one; unlisted files are allowed."""
    if (folder / checkpoint.MANIFEST).exists():
        checkpoint.verify(folder, extra_ok=True)


def _weights(kind: Any, path: str, dtype: Any) -> Any:
    """Load a model of class ``kind`` with all of its weights.

    transformers only warns of missing weights and fills them with random numbers.
    """
    try:
        # Only safetensors are read, because a pickled file can run code.
        model, info = kind.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: its weights cannot be loaded ({_first_line(error)}); save or fetch it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path}: lacks the weights of {missing[0]} ({len(missing)} in all); save or fetch it "
            "again"
        )
    return model


def _check_pair(
    model: MmemoForConditionalGeneration, processor: MmemoProcessor, path: Path | str
) -> None:
    counts = model.config.token_counts
    if processor.sampling != model.sampling or processor.token_counts != counts:
        raise ConfigError(
            f"{path}: config.json and processor_config.json disagree about sampling or tokens; "
            "save the model and its processor together"
        )


def _adapter_base(config: ModelConfig, folder: Path, base: str, dtype: str | None) -> Any:
    """The model under an adapter, with the adapter's own processor or else the base's."""
    noted = read_notes(str(folder))
    model, processor = from_saved(config, base, dtype, noted)
    if isinstance(model, NativeModel) and noted is not None:
        for name in [one for one in noted.branches if one not in model.backbone.branches]:
            load_branch(model, str(folder), name, weights=False)
    # The chat template and the end of an answer may have been set for the adapter's run.
    if isinstance(model, NativeModel) and (folder / "tokenizer_config.json").exists():
        notes = processor.notes if isinstance(processor, NativeProcessor) else Notes()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.backbone.tokenizer = tokenizer
        template = own_template(str(folder), tokenizer)
        return model, NativeProcessor(model.backbone, template, str(folder), notes)
    if (
        isinstance(model, MmemoForConditionalGeneration)
        and (folder / "processor_config.json").exists()
    ):
        processor = MmemoProcessor.from_pretrained(folder)
        _check_pair(model, processor, folder)
    return model, processor


def from_adapter(config: ModelConfig, folder: Path) -> Loaded:
    """Load an adapter on its base, as a PeftModel or merged into a plain model.

    Dtype and quantization are those it was trained with, unless ``config`` says otherwise.

    Raises:
        ConfigError: the base is not there, or ``config.lora`` is not the adapter's.
        CheckpointError: weights of the adapter or its base are damaged or missing.
    """
    _verify(folder)
    for name in ("face", "fusion"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{folder} is an adapter, which begins with or without a {name} branch; leave "
                f"model.{name} out, or start from its base"
            )
    record = lora.read_record(folder)
    base = lora.base_of(folder)
    model, processor = _adapter_base(config, folder, str(base), config.dtype or record["dtype"])
    if config.adapter == "merge":
        if lora.has_experts(folder):
            raise ConfigError(
                f"{folder} has experts, which are chosen anew for every prompt and cannot be "
                "merged; use adapter: continue, or export the adapter"
            )
        if config.quantization is not None and config.lora is None:
            raise ConfigError("adapter: merge with quantization needs lora, or use continue")
        if record["quantization"] is not None:
            # Merge into the rounded weights that the adapter was trained on, not the originals.
            quantize(model, record["quantization"])
            dequantize(model)
        return Loaded(lora.load(model, folder, trainable=False).merge_and_unload(), processor)
    if config.lora is not None:
        given, tokenizer = config.lora, processor.tokenizer
        lora.check_same(model, given, folder, tokenizer, config.new_tokens or ())
    kind = config.quantization or record["quantization"]
    if kind:
        quantize(model, kind)
    local = base if isinstance(base, Path) else None
    return Loaded(lora.load(model, folder, trainable=True), processor, local)


def keep_base(config: ModelConfig, model: Model, processor: Processor, base: Path) -> Path:
    """Save the model under an adapter once; several ranks may call this at the same time.

    Raises:
        ConfigError: the folder holds a base model with other settings or parts.
        CheckpointError: the folder could not be written, or is damaged.
    """
    # The config names folders whose content may change, so the weights are compared as well.
    digest = xxhash.xxh3_128(processor.tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    made = {"config": dump(config), "weights": digest.hexdigest()}
    record = json.dumps(made, sort_keys=True)

    def write(staged: Path) -> None:
        lora.save_full(model, processor, staged)
        (staged / _BASE_RECORD).write_text(record, encoding="utf-8")

    # One rank writes and the others wait: a 7B takes 15 GB of disk, and eight ranks would take 120.
    with _locked(base):
        if not base.exists():
            try:
                checkpoint.save(base, write)
            except CheckpointError:
                if not base.exists():  # else another was faster, where locks do not hold
                    raise
    kept = base / _BASE_RECORD
    if not kept.exists() or _base_record(kept) != made:
        raise ConfigError(
            f"{base} holds a base model that was made with other settings or parts; delete it or "
            "use another output_dir"
        )
    # The folder may come from an earlier run and have been damaged since.
    _verify(base)
    return base


@contextmanager
def _locked(base: Path) -> Generator[None]:
    """Hold ``base.lock`` beside a base model; the kernel releases it when the process dies."""
    base.parent.mkdir(parents=True, exist_ok=True)
    with base.with_name(f"{base.name}.lock").open("a") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


def hub_base(base: Path) -> str | None:
    """The hub id whose weights a saved base model holds unchanged; None if there is no such."""
    found = _base_record(base / _BASE_RECORD) if (base / _BASE_RECORD).exists() else None
    notes = read_notes(str(base))
    source = notes.source if notes else None
    if found is None or source is None or found["config"]["new_tokens"]:
        return None
    # A base may also have been merged from an adapter, whose source is the hub as well.
    return source["hub"] if source["hub"] == found["config"]["path"] else None


def _base_record(file: Path) -> dict[str, Any] | None:
    """What :func:`keep_base` wrote, newer settings at their defaults; None if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "config": dump(parse(ModelConfig, found["config"]))}
    except (ValueError, KeyError, ConfigError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
