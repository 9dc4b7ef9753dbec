"""Stored log-probabilities of the reference, computed once and kept on disk beside the features.

Shapes: B pairs, C tokens of the batch's longest answer.

The address of an entry is a hash of everything that decides its value: the reference's weights, the
number types it computes with, the tokens of prompt and answer, the features that the prompt shows
and how they were corrupted. An entry is therefore never used after any of these changed; it is
computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from mmemo.console import console, progress
from mmemo.errors import StoreError
from mmemo.features.store import FeatureStore
from mmemo.losses.objective import AnswerKey
from mmemo.media.config import StoreConfig
from mmemo.models.adapters.lora import in_adapter
from mmemo.models.composed.configuration import TOWER
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks
from mmemo.train.engine import Engine

_VERSION = 1  # raise it when a change of code changes the log-probabilities of the same inputs


def weights_fingerprint(model: nn.Module, *, adapter: bool) -> str:
    """Hash of all weights that decide a log-probability.

    The encoders' weights are left out, since they are part of the features' addresses.

    Args:
        adapter: hash the model with its adapter. False hashes it as if the adapter were disabled,
            so that the hash does not depend on which adapter it is.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted((_plain(n), t) for n, t in _weights(model, adapter)):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        # As bytes, because NumPy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: nn.Module, adapter: bool) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        in_lora = "modules_to_save" in parts or in_adapter(name)
        if any(tower in parts for tower in TOWER.values()):
            continue
        if adapter or not in_lora:
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
            "make room there, or set dpo.stored_reference=false"
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
