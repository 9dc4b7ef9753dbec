"""The model card of an export: what it is, how each program loads it, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mmemo import __version__, checkpoint
from mmemo.config import read_yaml
from mmemo.content import sha256
from mmemo.errors import CheckpointError
from mmemo.evaluation.results import RESULTS, read_results
from mmemo.evaluation.tables import metric_text
from mmemo.formats import percent, span
from mmemo.models.adapters.lora import read_record, unwrap
from mmemo.models.build import Loaded
from mmemo.models.layouts import Program, branch_note, max_rank, obstacle
from mmemo.models.qwen.fusion import FusionBranch
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.processing import NativeProcessor
from mmemo.run_log import RunRecord

# Of the hub's list; the name of any other licence stands beside "other".
_LISTED = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0"}

_ATTENTION = ("reallocation", "amplification", "sinks", "contrast")
"""Settings of an evaluation that change how the model answers, and are no part of it."""

_SENSES = {"face": "the face", "audio": "the voice", "video": "the scene"}


def model_card(
    loaded: Loaded, final: Path, kind: str, folder: Path, base: str | None = None
) -> str:
    """The README.md of an export: its parts and their licences, how each program loads it, and how
    it was trained and evaluated. It contains no absolute path.

    Args:
        kind: as :data:`mmemo.export.stage.KINDS`.
        folder: holds the exported files.
        base: what the adapter names as its base; None for merged weights.
    """
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
    parts = _parts(loaded)
    return environment.get_template("model_card.md.j2").render(
        kind=kind,
        name=final.resolve().parent.name,
        version=__version__,
        language_model=config.get_text_config().model_type,
        senses=[words for name, words in _SENSES.items() if name in model.modalities],
        **parts,
        **_licence(loaded),
        load=_load(model, final, kind, base),
        branch_note=branch_note(model, kind),
        files=_files(folder),
        sampling=_portable(model.sampling.model_dump(mode="json")),
        stages=_portable(list(_stages(final))[::-1]),
        training=_portable(_training(training)),
        evaluations=_portable(_evaluations(final)),
    )


def _load(model: Any, final: Path, kind: str, base: str | None) -> dict[str, Any]:
    """What the template needs to show how PEFT, transformers, vLLM and mmemo load an export."""
    adapter: dict[str, Any] | None = None
    if kind != "merged":
        adapter = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    local = base is not None and Path(base).is_absolute()
    folder = Path(base) if base is not None and local else base
    programs: tuple[Program, ...] = ("peft", "transformers", "vllm")
    native = isinstance(model, NativeModel)
    bits = adapter is not None and read_record(final)["quantization"] is not None
    return {
        "why_not": {one: obstacle(one, model, adapter, folder) for one in programs},
        # An absolute path says something of this machine, and nothing to anybody else.
        "base": f"path/to/{Path(base).name}" if base is not None and local else base,
        "base_is_local": local,
        "native": native,
        "model_class": model.released_class().__name__ if native else type(model).__name__,
        "encoders": [*model.encoder_names, "lm_head"] if native else ["lm_head"],
        "four_bit": bits,
        "dtype": str(model.config.dtype).removeprefix("torch."),
        "max_rank": None if adapter is None or adapter["r"] > 512 else max_rank(adapter["r"]),
    }


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    found = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): sha256(file) for file in found}


def _licence(loaded: Loaded) -> dict[str, str | None]:
    """The base's licence as the hub writes it: that of a native model's source, or of the LM."""
    if isinstance(loaded.processor, NativeProcessor):
        source: Any = loaded.processor.notes.source
    else:
        config: Any = unwrap(loaded.model).config
        source = (config.parts or {}).get("text")
    known = None if source is None else source.get("license")
    listed = known is None or known.lower() in _LISTED
    return {"licence": known if listed else "other", "licence_name": None if listed else known}


def _stages(final: Path) -> Iterator[dict[str, Any]]:
    """The training stages that led to ``final``, the last one first: name, kind, rows and steps."""
    seen: set[Path] = set()
    while (run := final.resolve().parent) not in seen and (run / "config.yaml").exists():
        seen.add(run)
        config = read_yaml(run / "config.yaml")
        try:
            meta = checkpoint.verify(final, extra_ok=True).meta
        except CheckpointError:
            meta = {}
        kinds = [event["kind"] for event in RunRecord(run, enabled=False).events()]
        data = config.get("data") or {}
        start = (config.get("model") or {}).get("path")
        began = start and (
            Path(start).resolve().parent.name if Path(start).name == "final" else start
        )
        yield {
            "name": run.name,
            "kind": next((one for one in kinds if one in ("sft", "grpo", "dpo")), None),
            "data": data.get("manifests") or [],
            "steps": meta.get("step"),
            "start": began,
        }
        if not start or not Path(start).exists():
            return
        final = Path(start)


def _parts(loaded: Loaded) -> dict[str, Any]:
    """The parts of a model for its card. A native model is a single part with its own encoders."""
    config: Any = unwrap(loaded.model).config
    if isinstance(loaded.processor, NativeProcessor):
        notes, source = loaded.processor.notes, loaded.processor.notes.source
        backbone = loaded.processor.backbone
        face, fusion = backbone.face, backbone.branches.get("fusion")
        sources = [source, *([face.source] if face else [])]
        named = [one["hub"] for one in sources if one is not None and one["hub"]]
        return {
            "hub_ids": list(dict.fromkeys(named)),
            "origins": {
                "text": _origin(source),
                **({"face": _origin(face.source)} if face else {}),
            },
            "native": {"model_type": config.model_type, **(notes.settings or {})},
            "branches": {"face": face.spec} if face else {},
            "encoders": {"face": face.encoder.config} if face else {},
            "fusion": fusion.settings if isinstance(fusion, FusionBranch) else None,
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
                    "attention": [name for name in _ATTENTION if made["generation"].get(name)],
                }
            )
    return found


def _interval(number: Mapping[str, float]) -> str:
    # A single speaker has no interval.
    found = span(number)
    return percent(number["value"]) + (f" ({found})" if found else "")
