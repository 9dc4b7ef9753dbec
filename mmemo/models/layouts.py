"""How other programs name and hold what is exported: one table for every native model.

vLLM takes an adapter whose names it does not know without a word, and then answers as the base
model does. The names are therefore written as vLLM maps them, and a name that the table does not
know is refused.

Sources: ``hf_to_vllm_mapper`` and ``SupportsLoRA`` of the model classes of vLLM 0.32
(``vllm/model_executor/models``), and its ``PEFTHelper`` for what an adapter may contain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mmemo.errors import ConfigError
from mmemo.models.adapters.experts import NAME as EXPERTS
from mmemo.models.qwen.branch import home
from mmemo.models.qwen.branches import own_weight
from mmemo.models.qwen.native import NativeModel

Program = Literal["peft", "transformers", "vllm"]

_PEFT = "base_model.model."
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A released checkpoint that holds the trained model among others."""

    model_type: str
    architecture: str
    prefix: str = "thinker."
    key: str = "thinker_config"
    # The parts that speak are not exported, so that nobody may look for them.
    values: Mapping[str, Any] = field(default_factory=lambda: {"enable_audio_output": False})


@dataclass(frozen=True, slots=True)
class Layout:
    """How other programs name the parts of a model."""

    lora: Mapping[str, str] | None
    """Beginnings of module names: transformers' to those that vLLM maps. None: vLLM serves no
    adapters on this model."""
    whole: Whole | None = None
    """vLLM reads the model from such a checkpoint only."""


_SAME = {"model.language_model.": "model.language_model.", "lm_head.": "lm_head."}
_THINKER = {"model.language_model.": "thinker.model.", "lm_head.": "thinker.lm_head."}

LAYOUTS: Mapping[str, Layout] = {
    "qwen2_5_omni_thinker": Layout(
        _THINKER, Whole("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration")
    ),
    "qwen3_omni_moe_thinker": Layout(
        _THINKER, Whole("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration")
    ),
    "qwen2_vl": Layout(_SAME),
    "qwen2_5_vl": Layout(_SAME),
    "qwen3_vl": Layout(_SAME),
    "qwen2_audio": Layout(None),
}
"""``model_type`` of a native model to its layout."""


def obstacle(
    program: Program, model: Any, adapter: Mapping[str, Any] | None, base: Path | str | None
) -> str | None:
    """Why a program cannot load an export; None if it can.

    Args:
        model: the plain model, without the adapter around it.
        adapter: content of ``adapter_config.json``; None for merged weights.
        base: the model under the adapter.
    """
    if adapter is not None and adapter.get("peft_type") == EXPERTS:
        return "it has experts per modality, which only mmemo knows"
    if not isinstance(model, NativeModel):
        if program != "vllm":
            return None  # with mmemo's own classes
        return "it is built from parts with connectors, and vLLM has no such model"
    extra = extra_parts(model)
    if extra:
        return f"it has the part '{extra[0]}', which only mmemo knows"
    return _vllm_obstacle(model, adapter, base) if program == "vllm" else None


def extra_parts(model: NativeModel) -> list[str]:
    """Modules of a native model that the released class does not have, without what is inside.
    Branches are none of them: their files lie apart (:func:`branch_note`)."""
    with torch.device("meta"):
        released: Any = model.released_class()(model.config)
    known = {name for name, _ in released.named_modules()}
    found: list[str] = []
    for name, _ in model.named_modules():
        parent = name.rpartition(".")[0]
        # What PEFT has put around a layer is the adapter's.
        wrapped = type(model.get_submodule(parent)).__module__.startswith("peft.")
        if name not in known and parent in known and not (wrapped or own_weight(name)):
            found.append(name)
    return found


def branch_note(model: Any, kind: str) -> str | None:
    """A sentence on what other programs do with the branches of a native model; None without.

    Args:
        kind: as :data:`mmemo.export.stage.KINDS`.
    """
    branches = list(model.backbone.branches) if isinstance(model, NativeModel) else []
    if not branches:
        return None
    unseen = {"face": "see no face", "fusion": "fuse no streams"}
    folders = " and ".join(f"`{home(name)}`" for name in branches)
    what = "the weights" if kind == "merged" else "the language model's adapter"
    told = (
        f"The {' and '.join(branches)} {'branch lies' if len(branches) == 1 else 'branches lie'} "
        f"in {folders}: PEFT, transformers and vLLM load {what} alone, "
        f"{' and '.join(unseen[name] for name in branches)}"
    )
    if kind == "vllm":
        return f"{told}; mmemo loads both from what `mmemo export RUN --for peft` writes."
    return f"{told}; mmemo loads both."


def _vllm_obstacle(
    model: NativeModel, adapter: Mapping[str, Any] | None, base: Path | str | None
) -> str | None:
    kind = cast(Any, model.config).model_type
    layout = LAYOUTS.get(kind)
    if layout is None:
        return f"vLLM's names for a '{kind}' are not known to this version of mmemo"
    if adapter is None:
        return None
    if layout.lora is None:
        return f"vLLM serves no adapters on a '{kind}'"
    if adapter.get("use_dora"):
        return "it is a DoRA adapter, which vLLM does not know"
    if adapter.get("modules_to_save") or adapter.get("trainable_token_indices"):
        return "it trains tokens or modules beside its matrices, which vLLM does not take"
    if adapter.get("target_parameters"):
        return "it trains experts of the language model, whose names in vLLM are not known to mmemo"
    if adapter["r"] > _RANKS[-1]:
        return f"its rank is {adapter['r']}, and vLLM takes at most {_RANKS[-1]}"
    whole = layout.whole
    if whole and isinstance(base, Path) and _model_type(base) != whole.model_type:
        return (
            f"its base '{base.name}' is not a whole '{whole.model_type}' checkpoint, which is all "
            "that vLLM reads; train on the released folder or hub id"
        )
    return None


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def max_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` of vLLM that fits."""
    return next(one for one in _RANKS if one >= rank)


def vllm_name(model_type: str, name: str) -> str:
    """The name of an adapter's weight, in the file of PEFT, as vLLM maps it.

    Raises:
        ConfigError: it is no LoRA matrix of the language model.
    """
    layout, inner = LAYOUTS.get(model_type), name.removeprefix(_PEFT)
    for begin, new in ((layout and layout.lora) or {}).items():
        if inner.startswith(begin) and inner.endswith((".lora_A.weight", ".lora_B.weight")):
            return _PEFT + new + inner.removeprefix(begin)
    raise ConfigError(
        f"vLLM has no name for the adapter's weight '{name}' of a '{model_type}'; use --for merged"
    )


def check_names(file: Path, model_type: str) -> None:
    """Refuse an adapter's file with a weight that vLLM has no name for.

    Raises:
        ConfigError: as :func:`vllm_name`.
    """
    with safe_open(file, framework="pt") as opened:
        names: list[str] = list(opened.keys())
    for name in names:
        vllm_name(model_type, name)


def name_for_vllm(folder: Path, model_type: str) -> None:
    """Rewrite the PEFT adapter in ``folder`` with the names that vLLM maps.

    Raises:
        ConfigError: as :func:`vllm_name`.
    """
    file = folder / "adapter_model.safetensors"
    weights = {vllm_name(model_type, name): x for name, x in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    layers = {name.removesuffix(".weight").rpartition(".")[0] for name in weights}
    # vLLM wants plain names; the pattern would name transformers' modules.
    rewrite(
        folder / "adapter_config.json",
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
    )


def make_whole(folder: Path, model: NativeModel) -> None:
    """Rewrite the merged weights in ``folder`` in the layout of the whole released checkpoint.

    transformers and mmemo load the trained part from either layout, vLLM from this one alone. The
    parts that speak are left out, and the config says so.
    """
    config: Any = model.config
    layout = LAYOUTS.get(config.model_type)
    if layout is None or layout.whole is None or extra_parts(model):
        return
    whole = layout.whole
    for file in folder.glob("*.safetensors"):
        weights = {_begin(whole.prefix, name): x for name, x in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        kept = json.loads(index.read_text(encoding="utf-8"))
        named = {_begin(whole.prefix, name): file for name, file in kept["weight_map"].items()}
        rewrite(index, weight_map=named)
    inside = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    outer = AutoConfig.for_model(whole.model_type, **{whole.key: inside, **whole.values})
    outer.architectures, outer.dtype = [whole.architecture], config.dtype
    outer.save_pretrained(folder)


def _begin(prefix: str, name: str) -> str:
    # transformers writes the names as it read them: with the prefix, if the base was a whole model.
    return name if name.startswith(prefix) else prefix + name


def mark_ties(folder: Path, model: NativeModel) -> None:
    """Say in ``config.json`` whether the head is tied to the embedding, as it is.

    vLLM believes the flag of the language model, which transformers ignores beside the outer one.
    """
    inside: Any = model.language_model
    tied = cast(Any, model.lm_head).weight is inside.get_input_embeddings().weight
    file = folder / "config.json"
    text = json.loads(file.read_text(encoding="utf-8"))["text_config"]
    rewrite(file, tie_word_embeddings=tied, text_config={**text, "tie_word_embeddings": tied})


def rewrite(file: Path, **values: Any) -> None:
    """Replace values of a JSON object in a file."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps({**kept, **values}, indent=2, sort_keys=True) + "\n"
    file.write_text(text, encoding="utf-8")
