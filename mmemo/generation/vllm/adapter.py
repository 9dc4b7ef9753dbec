"""The trained adapter as vLLM loads it: a folder whose name stands for the weights in it.

A name made of the weights' digest can never stand for other weights: a server that answers under
it has drawn with exactly these, whether it was restarted, or serves other runs too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.layouts import obstacle, vllm_name

_KEPT = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "bias")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's weights by vLLM's names, on the CPU, and what computes with them."""

    weights: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def version(self) -> str:
        """16 hexadecimal digits that these weights alone have."""
        digest = xxhash.xxh3_64(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.weights):
            x = self.weights[name]
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the folder whole: it is not there, or all of it is."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        save_file(self.weights, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        (staged / "adapter_config.json").write_text(text, encoding="utf-8")
        if not folder.exists():
            staged.rename(folder)
        shutil.rmtree(staged, ignore_errors=True)


def run_name(folder: Path) -> str:
    """A short name of the run in ``folder``, so that runs on one server do not meet."""
    return f"mmemo-{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()}"


def adapted(model: nn.Module) -> PeftModel | None:
    """The model with its adapter inside of other wrappers; None for one without an adapter."""
    inner: Any = model
    while not isinstance(inner, PeftModel):
        inner = inner.__dict__.get("_modules", {}).get("module")
        if not isinstance(inner, nn.Module):
            return None
    return inner


def check_served(model: nn.Module, base: Path | str | None) -> None:
    """Check that vLLM can draw with this model.

    Args:
        model: possibly wrapped.
        base: what the server reads its weights from, if that is known here.

    Raises:
        ConfigError: it cannot.
    """
    peft = adapted(model)
    plain: Any = unwrap(model)
    config = None if peft is None else _config(peft)
    why = obstacle("vllm", plain, config, base)
    if why is None and getattr(getattr(plain, "backbone", None), "branches", None):
        names = " and ".join(plain.backbone.branches)
        why = f"vLLM knows no {names} branch"
    if why is not None:
        raise ConfigError(
            f"vLLM cannot draw with this model, because {why}; set rollout.engine: hf"
        )


def current(model: nn.Module) -> Adapter | None:
    """The adapter with its weights of now; None for a model without one.

    Raises:
        ConfigError: vLLM has no name for one of them.
    """
    peft = adapted(model)
    if peft is None:
        return None
    kind: str = unwrap(model).config.model_type
    state: dict[str, Tensor] = get_peft_model_state_dict(peft, save_embedding_layers=False)
    weights = {
        vllm_name(kind, name): x.detach().to("cpu", copy=True).contiguous()
        for name, x in state.items()
    }
    layers = {name.removesuffix(".weight").rpartition(".")[0] for name in weights}
    config = {name: value for name, value in _config(peft).items() if name in _KEPT}
    # vLLM wants plain names; mmemo's pattern would name transformers' modules.
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    return Adapter(weights, config)


def _config(peft: PeftModel) -> dict[str, Any]:
    active: Any = peft.active_adapter
    found: dict[str, Any] = peft.peft_config[active].to_dict()
    values = {name: getattr(value, "value", value) for name, value in found.items()}
    return {**values, "use_rslora": bool(values.get("use_rslora"))}
