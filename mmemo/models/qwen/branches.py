"""The branches that a native model can be given: a face's, and the pre-fusion of two streams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from mmemo.config import parse
from mmemo.errors import CheckpointError, ConfigError
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import FusionConfig
from mmemo.models.config import BranchConfig
from mmemo.models.qwen.branch import Branch, home, spare_token, unreadable
from mmemo.models.qwen.face import FaceBranch
from mmemo.models.qwen.fusion import FusionBranch

KINDS: Mapping[str, type[Branch]] = {"face": FaceBranch, "fusion": FusionBranch}
"""In the order in which they are added: a fusion may read the face's features."""
_OWN = frozenset(name for kind in KINDS.values() for name in (kind.part, *kind.frozen))


def own_weight(name: str) -> bool:
    """Whether a weight of a native model belongs to a branch, and not to the model's own files."""
    return name.split(".")[0] in _OWN


def add_face(model: Any, branch: BranchConfig, source: Mapping[str, str | None]) -> None:
    """Give a native model a face branch with a new connector.

    Raises:
        ConfigError: the encoder does not fit, there is a face branch already, or the tokenizer has
            no token to spare.
    """
    token = _token(model, "face")
    loaded = encoders.load_encoder("face", branch, model.sampling, model.dtype)
    model.add_branch(FaceBranch(model, token, loaded, source))


def add_fusion(model: Any, settings: FusionConfig) -> None:
    """Give a native model a new pre-fusion branch.

    Raises:
        ConfigError: the model lacks a stream, has such a branch already, or its tokenizer has no
            token to spare.
    """
    model.add_branch(FusionBranch(model, _token(model, "fusion"), settings))


def _token(model: Any, name: str) -> str:
    present: dict[str, Branch] = model.backbone.branches
    if name in present:
        raise ConfigError(
            f"the model of model.path has a {name} branch already; leave model.{name} out"
        )
    taken = [one.token for one in present.values()]
    return spare_token(model.backbone.tokenizer, taken, name)


def load_branch(model: Any, path: str, name: str, *, weights: bool) -> None:
    """Give a native model the branch that was saved with it or with an adapter.

    Args:
        path: folder or hub id of the model, or folder of the adapter.
        weights: whether to load what was trained, or leave it as new: an adapter loads it itself.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise CheckpointError(f"{path}: has a branch '{name}', which this mmemo does not know")
    folder = _fetch(path, kind)
    place = folder / home(name)
    try:
        record = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        token = str(record["token"])
        if kind is FaceBranch:
            branch: Branch = FaceBranch.load(model, token, record, place, model.dtype)
        else:
            settings = parse(FusionConfig, record["settings"], where=str(place))
            branch = FusionBranch(model, token, settings)
        if weights:
            branch.module.load_state_dict(branch.read(folder))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ConfigError) as error:
        raise unreadable(place, error) from error
    model.add_branch(branch)


def _fetch(path: str, kind: type[Branch]) -> Path:
    """The folder that holds a branch, which is fetched from the hub if it is not local."""
    if Path(path).exists():
        return Path(path)
    files = [f"{kind.name}.json", f"{kind.part}.safetensors"]
    for tower in kind.frozen:
        files += [f"{tower}/config.json", f"{tower}/model.safetensors"]
    try:
        found = [cached_file(path, f"{home(kind.name)}/{file}") for file in files]
    except OSError as error:
        raise unreadable(Path(path) / home(kind.name), error) from error
    return Path(str(found[0])).parent.parent
