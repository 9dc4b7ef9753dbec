"""Export a trained model for other people: an adapter or merged weights, with a model card.

An exported adapter is a plain PEFT folder (connectors and fusion as ``modules_to_save``) with its
processor. Merged weights are a plain Hugging Face folder in safetensors. Both are written whole or
not at all, with the SHA-256 of every file in ``manifest.json``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import model_validator
from rich.text import Text

from mmemo import __version__, checkpoint
from mmemo.config import Config, read_yaml
from mmemo.console import console
from mmemo.errors import CheckpointError, ConfigError
from mmemo.evaluation.results import RESULTS, read_results
from mmemo.evaluation.tables import metric_text
from mmemo.formats import percent, span
from mmemo.models.adapters.lora import base_of, save_model, unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.models.qwen.processing import NativeProcessor

_KINDS = ("adapter", "merged")


class ExportConfig(Config):
    """The ``export`` stage of a pipeline. It writes the folders ``adapter`` and ``merged``."""

    output_dir: str
    """Folder of the folders ``adapter`` and ``merged``."""
    source: str
    """The output folder of a training stage, or its ``final`` folder."""
    adapter: bool = False
    """Write the PEFT adapter."""
    merged: bool = True
    """Write the whole model."""

    @model_validator(mode="after")
    def _something(self) -> ExportConfig:
        if not (self.adapter or self.merged):
            raise ValueError("set adapter, merged, or both")
        return self


def run_export(config: ExportConfig) -> Path:
    """Export as a stage of a pipeline; returns ``output_dir``.

    Raises:
        ConfigError, CheckpointError: as :func:`export_run`.
    """
    folder = Path(config.output_dir)
    export_run(
        Path(config.source),
        adapter=folder / "adapter" if config.adapter else None,
        merged=folder / "merged" if config.merged else None,
    )
    return folder


def export_run(source: Path, *, adapter: Path | None = None, merged: Path | None = None) -> None:
    """Write the result of a run to ``adapter``, to ``merged``, or to both.

    Raises:
        ConfigError: no target is given, there is no result, or it is not an adapter.
        CheckpointError: the run's files are damaged; the message names the file.
    """
    if adapter is None and merged is None:
        raise ConfigError("nothing to write: give --adapter DIR, --merged DIR, or both")
    final = _final(source)
    outs = [out for out in (adapter, merged) if out is not None]
    _check_targets(outs, final)
    is_adapter = (final / "adapter_config.json").exists()
    if adapter is not None:
        if not is_adapter:
            raise ConfigError(
                f"{final} holds a whole model, not an adapter (the run had no model.lora); "
                "use --merged"
            )
        loaded = load_model(ModelConfig(path=str(final)))
        _write(loaded, adapter, final, "adapter")
    if merged is not None:
        loaded = load_model(ModelConfig(path=str(final), adapter="merge"))
        _write(loaded, merged, final, "merged")


def _final(source: Path) -> Path:
    for folder in (source / "final", source):
        if (folder / checkpoint.MANIFEST).exists():
            return folder
    raise ConfigError(
        f"{source} holds no finished model; give the output folder of a training stage, such as "
        "`mmemo sft`"
    )


def _check_targets(outs: Sequence[Path], final: Path) -> None:
    """Refuse to write over, into or around a model, or over anything but an old export."""
    kept = [final.resolve()]
    if (final / "adapter_config.json").exists() and isinstance(base := base_of(final), Path):
        kept.append(base)
    for number, out in enumerate(outs):
        path = out.resolve()
        inside = [folder for folder in path.parents if (folder / checkpoint.MANIFEST).exists()]
        others = [*kept, *(other.resolve() for other in outs[:number])]
        touched = [o for o in others if path == o or path in o.parents or o in path.parents]
        if inside or touched:
            raise ConfigError(
                f"{out} is, lies in, or contains the model in {[*touched, *inside][0]}; export to "
                "another folder"
            )
        if path.exists() and not _may_replace(path):
            raise ConfigError(
                f"{out} holds other files than an unchanged export; give an empty or new folder"
            )


def _may_replace(out: Path) -> bool:
    if not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    try:
        return checkpoint.verify(out).meta.get("kind") in _KINDS
    except CheckpointError:
        return False


def _write(loaded: Loaded, out: Path, final: Path, kind: str) -> None:
    card = model_card(loaded, final, kind, out)

    def write(staged: Path) -> None:
        # The base is named relative to where the adapter will lie, which is beside the staging.
        save_model(loaded.model, loaded.processor, staged, base=loaded.base)
        (staged / "README.md").write_text(card, encoding="utf-8")

    meta = {"source": f"{final.parent.name}/{final.name}", "kind": kind, "version": __version__}
    checkpoint.save(out, write, meta=meta)
    size = sum(row[0] for row in checkpoint.verify(out).files.values())
    console.print(
        Text.assemble(f"{kind}: ", (str(out), "bold"), f" ({size / 1e6:.1f} MB)"), soft_wrap=True
    )


def model_card(loaded: Loaded, final: Path, kind: str, out: Path) -> str:
    """The README.md of a model that is exported to ``out``: its parts and their licences, how it
    was trained and evaluated, and how to load it. It contains no absolute path."""
    model = unwrap(loaded.model)
    config: Any = model.config
    run_config = final.parent / "config.yaml"
    training = read_yaml(run_config) if run_config.exists() else {}
    environment = Environment(
        loader=PackageLoader("mmemo", "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["yaml"] = lambda value: yaml.safe_dump(value, sort_keys=False).rstrip()
    base = os.path.relpath(loaded.base.resolve(), out.resolve()) if loaded.base else None
    return environment.get_template("model_card.md.j2").render(
        kind=kind,
        name=final.resolve().parent.name,
        version=__version__,
        base=(base or base_of(final)) if kind == "adapter" else None,
        language_model=config.get_text_config().model_type,
        **_parts(loaded),
        sampling=_portable(model.sampling.model_dump(mode="json")),
        training=_portable(_training(training)),
        evaluations=_portable(_evaluations(final)),
    )


def _parts(loaded: Loaded) -> dict[str, Any]:
    """The parts of a model for its card. A native model is a single part with its own encoders."""
    config: Any = unwrap(loaded.model).config
    if isinstance(loaded.processor, NativeProcessor):
        notes, source = loaded.processor.notes, loaded.processor.notes.source
        hub = None if source is None else source["hub"]
        return {
            "hub_ids": [hub] if hub else [],
            "origins": {"text": _origin(source)},
            "native": {"model_type": config.model_type, **(notes.settings or {})},
            "branches": {},
            "encoders": {},
            "fusion": None,
        }
    parts: dict[str, dict[str, str | None]] = config.parts or {}
    return {
        "hub_ids": list(dict.fromkeys(part["hub"] for part in parts.values() if part["hub"])),
        "origins": {name: _origin(parts.get(name)) for name in ("text", *config.modalities)},
        "native": None,
        "branches": {name: config.branch(name) for name in config.modalities},
        "encoders": {
            "video": config.vision_config,
            "audio": config.audio_config,
            "face": config.face_config,
        },
        "fusion": config.fusion_settings,
    }


def _origin(part: Mapping[str, str | None] | None) -> str:
    """Two cells of the table of parts: origin and licence."""
    if part is None:
        return "unknown | unknown"
    hub, folder, known = part["hub"], part["folder"], part["license"] or "unknown"
    if hub:
        return f"[{hub}](https://huggingface.co/{hub}) | {known}"
    return f"local folder `{folder}` | {known}" if folder else "made for this model | none needed"


def _portable(value: Any) -> Any:
    """The value with absolute paths cut to their last part: the rest is about this machine."""
    if isinstance(value, dict):
        return {key: _portable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("data", "curriculum", "trainable", "train")
    return {key: config[key] for key in keep if key in config}


def _evaluations(final: Path) -> list[dict[str, Any]]:
    """The evaluations of this very model in the folders beside the run's."""
    found: list[dict[str, Any]] = []
    for path in sorted(final.parent.parent.glob(f"*/{RESULTS}")):
        result = read_results(path.parent)
        made = result.made
        if made["model"]["path"] and Path(made["model"]["path"]).resolve() == final.resolve():
            block = result.main
            # A benchmark without labels has its headline metric in place of accuracies.
            if block["labels"]:
                numbers = {name: _interval(block["metrics"][name]) for name in ("war", "uar")}
            else:
                value, interval = metric_text(block.get("average"))
                told = f"{value} ({interval})" if interval else value
                numbers = {"war": f"{block.get('headline', '')} {told}".strip(), "uar": "–"}
            found.append(
                {
                    "name": result.name,
                    "n": result.main["n"],
                    **numbers,
                    "benchmark": made["benchmark"]["file"],
                }
            )
    return found


def _interval(number: Mapping[str, float]) -> str:
    # A single speaker has no interval.
    found = span(number)
    return percent(number["value"]) + (f" ({found})" if found else "")
