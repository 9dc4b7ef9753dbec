"""Export a trained model for other people: an adapter or merged weights, with a model card.

An exported adapter is a plain PEFT folder (connectors and fusion as ``modules_to_save``) with its
processor, or the same weights under the names that vLLM maps. Merged weights are a plain Hugging
Face folder in safetensors. The branches of a native model lie in folders of their own beside them.
All are written whole or not at all, with the SHA-256 of every file in ``manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from pydantic import model_validator
from rich.text import Text
from safetensors.torch import load_file, save_file

from mmemo import __version__, checkpoint
from mmemo.config import Config
from mmemo.console import console
from mmemo.errors import CheckpointError, ConfigError
from mmemo.export.card import model_card
from mmemo.models.adapters.lora import base_of, has_experts, read_record, save_model, unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.models.layouts import (
    Program,
    branch_note,
    check_names,
    make_whole,
    mark_ties,
    name_for_vllm,
    obstacle,
    rewrite,
)
from mmemo.models.qwen.native import NativeModel
from mmemo.models.saved import hub_base

Kind = Literal["adapter", "peft", "vllm", "merged"]
Dtype = Literal["float32", "bfloat16", "float16"]
KINDS: tuple[Kind, ...] = ("adapter", "peft", "vllm", "merged")
"""What can be written. ``adapter`` is for mmemo, and is what ``peft`` writes where PEFT can load
it alone; ``merged`` is the whole model."""


class ExportConfig(Config):
    """The ``export`` stage of a pipeline. It writes a folder of each name that is set."""

    output_dir: str
    """Folder of the folders ``adapter``, ``peft``, ``vllm`` and ``merged``."""
    source: str
    """The output folder of a training stage, or its ``final`` folder."""
    adapter: bool = False
    """Write the PEFT adapter."""
    merged: bool = True
    """Write the whole model."""
    peft: bool = False
    """Write the PEFT adapter, or fail if PEFT cannot load it without mmemo's layers."""
    vllm: bool = False
    """Write the adapter with the names of layers that vLLM maps, or fail if vLLM cannot take it."""
    dtype: Dtype | None = None
    """Number type of the weights; None keeps each as it was trained."""
    base: str | None = None
    """What an adapter names as its base model: a hub id or a folder. None is the hub id that the
    run began with, or else the absolute path of the saved base."""

    @model_validator(mode="after")
    def _something(self) -> ExportConfig:
        if not (self.adapter or self.merged or self.peft or self.vllm):
            raise ValueError("set adapter, merged, peft or vllm")
        return self


def run_export(config: ExportConfig) -> Path:
    """Export as a stage of a pipeline; returns ``output_dir``.

    Raises:
        ConfigError, CheckpointError: as :func:`export_run`.
    """
    folder = Path(config.output_dir)
    wanted: dict[Kind, Path] = {kind: folder / kind for kind in KINDS if getattr(config, kind)}
    export_to(Path(config.source), wanted, dtype=config.dtype, base=config.base)
    return folder


def export_run(source: Path, *, adapter: Path | None = None, merged: Path | None = None) -> None:
    """Write the result of a run to ``adapter``, to ``merged``, or to both.

    Raises:
        ConfigError, CheckpointError: as :func:`export_to`.
    """
    wanted: dict[Kind, Path | None] = {"adapter": adapter, "merged": merged}
    export_to(source, {kind: out for kind, out in wanted.items() if out is not None})


def parse_request(
    target: str | None,
    out: Path | None,
    dtype: str | None,
    *,
    adapter: Path | None = None,
    merged: Path | None = None,
) -> tuple[dict[Kind, Path], Dtype | None]:
    """The options of ``mmemo export`` as :func:`export_to` takes them.

    Raises:
        ConfigError: one of ``--for`` and ``--out`` without the other, an unknown value, or two
            folders for one kind.
    """
    if (target is None) != (out is None):
        raise ConfigError("--for and --out go together: give --for peft, vllm or merged, and a DIR")
    programs: tuple[Kind, ...] = ("peft", "vllm", "merged")
    kind: Kind | None = next((one for one in programs if one == target), None)
    if target is not None and kind is None:
        raise ConfigError(f"--for: there is no '{target}'; use {', '.join(programs)}")
    number_type = next((one for one in get_args(Dtype) if one == dtype), None)
    if dtype is not None and number_type is None:
        raise ConfigError(f"--dtype: there is no '{dtype}'; use {', '.join(get_args(Dtype))}")
    if kind == "merged" and merged is not None:
        raise ConfigError("--for merged and --merged ask for the same; give one")
    found: dict[Kind, Path | None] = {"adapter": adapter, "merged": merged}
    if target is not None:
        found[cast(Kind, target)] = out
    return {name: folder for name, folder in found.items() if folder is not None}, number_type


def export_to(
    source: Path,
    outs: Mapping[Kind, Path],
    *,
    dtype: Dtype | None = None,
    base: str | None = None,
) -> None:
    """Write the result of a run in one or more kinds, each to a folder of its own.

    Args:
        dtype: number type of the weights; None keeps each as it was trained.
        base: what an adapter names as its base model (:class:`ExportConfig`).

    Raises:
        ConfigError: no target is given, there is no result, it is not an adapter, or the program
            that a kind is for cannot load it.
        CheckpointError: the run's files are damaged; the message names the file.
    """
    if not outs:
        raise ConfigError(
            "nothing to write: give --for peft, vllm or merged with --out DIR, or --adapter DIR or "
            "--merged DIR"
        )
    final = _final(source)
    _check_targets(list(outs.values()), final)
    is_adapter = (final / "adapter_config.json").exists()
    adapters: dict[Kind, Path] = {kind: outs[kind] for kind in KINDS[:-1] if kind in outs}
    if adapters:
        if not is_adapter:
            raise ConfigError(
                f"{final} holds a whole model, not an adapter (the run had no model.lora); "
                "use --merged"
            )
        loaded = load_model(ModelConfig(path=str(final)))
        named = _named_base(final, base)
        # Nothing is written before every kind is known to be possible.
        for kind in adapters:
            _check_program(kind, loaded, final, named)
        if dtype is not None:
            _cast(load_file(final / "adapter_model.safetensors"), dtype)
        for kind, out in adapters.items():
            _write(loaded, out, final, kind, dtype, named)
    if "merged" in outs:
        # Merged in the wider type. 4-bit weights are rounded in the type they were trained in.
        wide = "float32" if dtype == "float32" and not _is_4_bit(final) else None
        loaded = load_model(ModelConfig(path=str(final), adapter="merge", dtype=wide))
        _write(loaded, outs["merged"], final, "merged", dtype, None)


def _is_4_bit(final: Path) -> bool:
    return read_record(final)["quantization"] is not None


def _named_base(final: Path, given: str | None) -> str:
    """What ``adapter_config.json`` says of the base. A relative path would break when moved."""
    if given is not None:
        folder = Path(given).expanduser()
        if folder.exists():
            return str(folder.resolve())
        if given.startswith((".", "/", "~")):
            raise ConfigError(f"--base: there is no folder {given}; give a hub id or a folder")
        return given
    found = base_of(final)
    return found if isinstance(found, str) else hub_base(found) or str(found)


def _check_program(kind: Kind, loaded: Loaded, final: Path, base: str) -> None:
    """Refuse a kind that its program would ignore or refuse."""
    if kind not in ("peft", "vllm"):
        return
    program: Program = kind
    adapter = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    folder = Path(base) if Path(base).is_absolute() else base
    reason = obstacle(program, unwrap(loaded.model), adapter, folder)
    if reason is not None:
        other = "--adapter" if has_experts(final) else "--for merged"
        name = "vLLM" if program == "vllm" else "PEFT"
        raise ConfigError(f"{name} cannot load the adapter of {final}: {reason}; use {other}")
    if kind == "vllm":
        model_type = unwrap(loaded.model).config.model_type
        check_names(final / "adapter_model.safetensors", model_type)


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
        return checkpoint.verify(out).meta.get("kind") in KINDS
    except CheckpointError:
        return False


def _write(
    loaded: Loaded, out: Path, final: Path, kind: Kind, dtype: Dtype | None, base: str | None
) -> None:
    model = unwrap(loaded.model)
    if kind == "merged" and dtype is not None:
        _cast_model(model, dtype)

    def write(staged: Path) -> None:
        save_model(loaded.model, loaded.processor, staged, base=loaded.base or final)
        if kind == "merged":
            if isinstance(model, NativeModel):
                mark_ties(staged, model)
                make_whole(staged, model)
        else:
            rewrite(staged / "adapter_config.json", base_model_name_or_path=base)
            if kind == "vllm":
                name_for_vllm(staged, model.config.model_type)
            if dtype is not None:
                file = staged / "adapter_model.safetensors"
                save_file(_cast(load_file(file), dtype), file, metadata={"format": "pt"})
        # PEFT has put an empty card of its own there.
        card = model_card(loaded, final, kind, staged, base)
        (staged / "README.md").write_text(card, encoding="utf-8")

    meta = {"source": f"{final.parent.name}/{final.name}", "kind": kind, "version": __version__}
    checkpoint.save(out, write, meta=meta)
    size = sum(row[0] for row in checkpoint.verify(out).files.values())
    console.print(
        Text.assemble(f"{kind}: ", (str(out), "bold"), f" ({size / 1e6:.1f} MB)"), soft_wrap=True
    )
    note = branch_note(model, kind)
    if note is not None:
        console.print(note.replace("`", ""), soft_wrap=True)
    if base is not None and Path(base).is_absolute():
        console.print(
            f"Its base is the local folder {base}: name a hub id with --base before you share it.",
            soft_wrap=True,
        )


def _cast_model(model: Any, dtype: Dtype) -> None:
    for name, weight in model.named_parameters():  # one at a time: a copy of all may not fit
        _cast({name: weight.data}, dtype)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)


def _cast(weights: Mapping[str, torch.Tensor], dtype: Dtype) -> dict[str, torch.Tensor]:
    """The weights in a number type, in which each of them has to be finite."""
    wanted, found = getattr(torch, dtype), dict[str, torch.Tensor]()
    for name, weight in weights.items():
        found[name] = weight.to(wanted)
        if not bool(torch.isfinite(found[name]).all()):
            raise ConfigError(
                f"--dtype: the weight '{name}' is too large for {dtype}; use bfloat16 or float32"
            )
    return found
