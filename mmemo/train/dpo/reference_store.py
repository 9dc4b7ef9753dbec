"""Stored log-probabilities of the reference, computed once and kept on disk beside the features.

Shapes: B pairs, C tokens of the batch's longest answer.

The address of an entry is a hash of everything that decides its value: the reference's weights and
settings, those of its adapter included, the number types it computes with, the tokens of prompt and
answer, the features that the prompt shows and how they were corrupted. An entry is therefore never
used after any of these changed; it is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import xxhash
from torch import Tensor, nn

from mmemo.console import console, progress
from mmemo.errors import StoreError
from mmemo.features.store import FeatureStore
from mmemo.losses.objective import AnswerKey
from mmemo.media.config import StoreConfig
from mmemo.models.adapters.lora import deciding_settings, in_adapter, unwrap
from mmemo.models.composed.configuration import TOWER
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks
from mmemo.train.engine import Engine
from mmemo.train.zero.compat import whole

_VERSION = 1  # raise it when a change of code changes the log-probabilities of the same inputs


def reference_fingerprint(model: nn.Module, *, adapter: bool) -> str:
    """Hash of all weights and settings of a model that decide a log-probability.

    The same weights compute something else with another rotary base, pooling or ``lora_alpha``. The
    encoders' weights are left out, since they are part of the features' addresses.

    Args:
        adapter: hash the model with its adapters. False hashes it as if these were disabled, so
            that the hash does not depend on which they are.
    """
    digest = xxhash.xxh3_128()
    settings = [_settings(model), _adapters(model) if adapter else {}]
    digest.update(json.dumps(settings, sort_keys=True, default=_plain_value).encode())
    for name, tensor in sorted((_plain(n), t) for n, t in _weights(model, adapter)):
        values = whole(tensor)
        digest.update(f"{name}:{values.dtype}:{list(values.shape)};".encode())
        flat = values.cpu().contiguous().reshape(-1)
        # As bytes, because NumPy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


_NO_PART = ("_name_or_path", "transformers_version", "architectures", "auto_map", "parts")
"""Values of a model's config that say where it comes from."""


def _settings(model: nn.Module) -> dict[str, Any]:
    return _without(unwrap(model).config.to_dict(), _NO_PART)


def _without(value: Any, names: Collection[str]) -> Any:
    """The value without the keys ``names`` of it and of every mapping inside."""
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, Any]", value)
        return {key: _without(x, names) for key, x in inner.items() if key not in names}
    return value


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The settings of the model's adapters, and which of them are active."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    if not configs:
        return {}
    active: Any = getattr(model, "active_adapters", [])
    settings = {name: deciding_settings(one) for name, one in configs.items()}
    return {"active": list(active), "settings": settings}


def _plain_value(value: Any) -> Any:
    """A value of a config that JSON has no form for, in the same form in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)  # pyright: ignore


def _weights(model: nn.Module, adapter: bool) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    # With the parameters themselves, which know whether they are sharded.
    for name, tensor in model.state_dict(keep_vars=True).items():
        parts = name.split(".")
        # PEFT keeps trained rows of an embedding in a token adapter.
        own = {"modules_to_save", "token_adapter"}.intersection(parts) or in_adapter(name)
        if any(tower in parts for tower in TOWER.values()):
            continue
        if adapter or not own:
            found.append((name, tensor))
    return found


def _plain(name: str) -> str:
    """A weight's name without PEFT's wrappers, so that another rank or target shares references."""
    for part in (".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


class ReferenceStore:
    """Token log-probabilities of answers under the reference, by address."""

    def __init__(
        self, config: StoreConfig, features: FeatureStore | None, folder: Path, base: Any
    ) -> None:
        """
        Args:
            config: settings of the feature store, whose I/O settings are used.
            features: the feature store, beside which the references are kept; None: in ``folder``.
            folder: the run folder.
            base: JSON values that all entries share: the reference and its number types.
        """
        path = (features.folder if features is not None else folder) / "reference"
        # Without a budget: an evicted entry could not be computed again once the weights have
        # changed.
        own = {"path": str(path), "budget_gb": None, "crops_gb": 0.0, "enabled": True}
        self.store = FeatureStore(config.model_copy(update=own))
        self._base = base

    def key(self, token_digest: str, branch_digest: str) -> str:
        """The address of an answer's log-probabilities.

        Args:
            token_digest: digest of the tokens of prompt and answer.
            branch_digest: digest of what the prompt shows.
        """
        parts = [_VERSION, "reference", self._base, token_digest, branch_digest]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def keys(self, digests: Mapping[AnswerKey, tuple[str, str]]) -> dict[AnswerKey, str]:
        """The addresses of a pair's log-probabilities.

        Args:
            digests: (token digest, branch digest) of each.
        """
        return {key: self.key(tokens, shown) for key, (tokens, shown) in digests.items()}

    def get(self, key: str) -> Tensor:
        """(tokens,) float32, nats.

        Raises:
            StoreError: there is no entry at the address.
        """
        found = self.store.get(key)
        if found is None:
            raise StoreError(
                f"{self.store.folder}: a stored reference log-probability is missing; start the "
                "run again to compute it"
            )
        return found["logps"]

    def put(self, key: str, logps: Tensor) -> None:
        """Store the log-probabilities (tokens,) of an answer."""
        self.store.put(key, {"logps": logps.float()})

    def close(self) -> None:
        """Write pending entries and close the store."""
        self.store.close()


class ReferencedPairs(Protocol):
    """Pairs whose reference log-probabilities are to be stored."""

    @property
    def lengths(self) -> Sequence[int]: ...
    def reference_digests(self, row: int) -> dict[AnswerKey, tuple[str, str]]: ...
    def reference_batch(self, rows: Sequence[int]) -> Batch: ...
    def answer_lengths(self, row: int) -> Mapping[AnswerKey, int]: ...


class ReferenceScorer(Protocol):
    """Computes the reference's log-probabilities."""

    def reference_logps(self, model: nn.Module, batch: Batch) -> Mapping[AnswerKey, Tensor]:
        """(B, C) log-probabilities under ``model`` as it is, by (branch, answer) key."""
        ...


def fill_references(
    references: ReferenceStore,
    data: ReferencedPairs,
    scorer: ReferenceScorer,
    engine: Engine,
    size: int,
    ranks: Ranks,
    record: RunRecord,
) -> None:
    """Compute the log-probabilities that are not stored yet. Call it on every rank.

    The pairs that are computed together do not depend on which are stored already, so that a
    killed and resumed run stores bit-identical numbers.

    Args:
        size: pairs that are computed together.

    Raises:
        StoreError: the store cannot be written.
    """
    order = sorted(range(len(data.lengths)), key=lambda row: (-data.lengths[row], row))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    # One rank decides for all: other runs may add entries meanwhile, and the ranks would disagree.
    missing = json.dumps(_missing(references, data, chunks)) if ranks.is_main else ""
    todo: list[int] = json.loads(ranks.broadcast_text(missing))
    record.event("reference", pairs=len(order), computed=sum(len(chunks[at]) for at in todo))
    if not todo:
        return
    model = engine.model
    training = model.training
    model.eval()
    with progress("reference", len(todo), unit="batches") as bar:
        for start in range(0, len(todo), ranks.size):
            # Every rank computes something, as sharded weights require; what is stored stays.
            mine = chunks[todo[min(start + ranks.rank, len(todo) - 1)]]
            batch = runtime.to_device(data.reference_batch(mine), ranks.device)
            with torch.no_grad(), engine.autocast():
                logps = scorer.reference_logps(model, batch)
            _store(references, data, mine, logps)
            bar.advance(min(ranks.size, len(todo) - start))
    model.train(training)
    references.store.flush()
    ranks.barrier()
    lost = _missing(references, data, chunks)
    if lost:
        raise StoreError(
            f"{references.store.folder}: references of {len(lost)} batches could not be kept; "
            "make room there, or set dpo.reference=copy or adapter_off"
        )
    if ranks.is_main:
        console.print(f"reference: {len(order)} pairs in {references.store.folder}")


def _missing(
    references: ReferenceStore, data: ReferencedPairs, chunks: Sequence[Sequence[int]]
) -> list[int]:
    """The chunks that are not completely stored."""
    references.store.missing(())  # reads what other processes have written
    return [
        at
        for at, rows in enumerate(chunks)
        if any(
            not references.store.has(key)
            for row in rows
            for key in references.keys(data.reference_digests(row)).values()
        )
    ]


def _store(
    references: ReferenceStore,
    data: ReferencedPairs,
    rows: Sequence[int],
    logps: Mapping[AnswerKey, Tensor],
) -> None:
    for at, row in enumerate(rows):
        lengths = data.answer_lengths(row)
        for answer_key, address in references.keys(data.reference_digests(row)).items():
            references.put(address, logps[answer_key][at, : lengths[answer_key]])
