"""The reference's log-probabilities, computed once and kept on disk beside the features.

Each entry is found by all that decides it: the reference's weights, how they are computed with,
the tokens of prompt and answer, the features that the prompt shows and what was done to them. What
changed is therefore never matched, and is computed anew.

B pairs, C tokens of the batch's longest answer.
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

_VERSION = 1  # raise it when code changes what a log-probability of the same inputs is


def weights_fingerprint(model: nn.Module, *, adapter: bool) -> str:
    """Hash of all weights that decide a log-probability, apart from the towers: these have their
    part in the features' addresses.

    Args:
        adapter: with the adapter on; else as when it is switched off, whatever adapter it is.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted((_plain(n), t) for n, t in _weights(model, adapter)):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: nn.Module, adapter: bool) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        learnt = "modules_to_save" in parts or in_adapter(name)
        if any(tower in parts for tower in TOWER.values()):
            continue
        if adapter or not learnt:
            found.append((name, tensor))
    return found


def _plain(name: str) -> str:
    """Without what PEFT puts around a layer, so that another rank or target shares references."""
    for part in (".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


class References:
    """Log-probabilities of answers under the reference, by their addresses."""

    def __init__(
        self, config: StoreConfig, features: FeatureStore | None, folder: Path, base: Any
    ) -> None:
        """
        Args:
            folder: the run's, where they are kept when there is no feature store.
            base: what all entries have in common: the reference, and how it is computed with.
        """
        path = (features.folder if features is not None else folder) / "reference"
        own = {"path": str(path), "budget_gb": None, "crops_gb": 0.0, "enabled": True}
        self.store = FeatureStore(config.model_copy(update=own))
        self._base = base

    def key(self, mark: str, seen: str) -> str:
        """The address of an answer's.

        Args:
            mark: digest of the tokens of prompt and answer.
            seen: address of what the prompt shows.
        """
        text = json.dumps([_VERSION, "reference", self._base, mark, seen], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def keys(self, digests: Mapping[AnswerKey, tuple[str, str]]) -> dict[AnswerKey, str]:
        """The addresses of a pair's log-probabilities.

        Args:
            digests: of their tokens and of what their prompts show, as :meth:`key` takes them.
        """
        return {place: self.key(tokens, inputs) for place, (tokens, inputs) in digests.items()}

    def get(self, key: str) -> Tensor:
        """(tokens,) float32, nats.

        Raises:
            StoreError: it is not there.
        """
        found = self.store.get(key)
        if found is None:
            raise StoreError(
                f"{self.store.folder}: a stored reference is missing or does not fit the pair any "
                "more; start the run again to have it computed"
            )
        return found["logps"]

    def put(self, key: str, logps: Tensor) -> None:
        """Keep (tokens,) of an answer."""
        self.store.put(key, {"logps": logps.float()})

    def close(self) -> None:
        """Write what is pending."""
        self.store.close()


class ReferencePairs(Protocol):
    """Pairs whose references are to be stored."""

    @property
    def lengths(self) -> Sequence[int]: ...
    def reference_digests(self, row: int) -> dict[AnswerKey, tuple[str, str]]: ...
    def reference_batch(self, rows: Sequence[int]) -> Batch: ...
    def answer_lengths(self, row: int) -> Mapping[AnswerKey, int]: ...


class ReferenceScorer(Protocol):
    """Computes the reference's log-probabilities."""

    def reference_logps(self, model: nn.Module, batch: Batch) -> Mapping[AnswerKey, Tensor]:
        """(B, C) by place, of ``model`` as it is."""
        ...


def fill(
    references: References,
    data: ReferencePairs,
    scorer: ReferenceScorer,
    engine: Engine,
    size: int,
    ranks: Ranks,
    record: RunRecord,
) -> None:
    """Compute what is not stored yet, ``size`` pairs at a time; called on every rank.

    Which pairs are computed together depends on nothing that a kill could change, so that a
    resumed run stores the same numbers, to the bit.

    Raises:
        StoreError: the store cannot be written.
    """
    order = sorted(range(len(data.lengths)), key=lambda row: (-data.lengths[row], row))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    lacking = json.dumps(_lacking(references, data, chunks)) if ranks.is_main else ""
    todo: list[int] = json.loads(ranks.broadcast_text(lacking))
    record.event("reference", pairs=len(order), computed=sum(len(chunks[at]) for at in todo))
    if not todo:
        return
    model = engine.model
    training = model.training
    model.eval()
    with progress("reference", len(todo), unit="batches") as bar:
        for start in range(0, len(todo), ranks.size):
            # Every rank computes something, so that sharded weights meet; what is stored stays.
            mine = chunks[todo[min(start + ranks.rank, len(todo) - 1)]]
            batch = runtime.to_device(data.reference_batch(mine), ranks.device)
            with torch.no_grad(), engine.autocast():
                logps = scorer.reference_logps(model, batch)
            _store(references, data, mine, logps)
            bar.advance(min(ranks.size, len(todo) - start))
    model.train(training)
    references.store.flush()
    ranks.barrier()
    lost = _lacking(references, data, chunks)
    if lost:
        raise StoreError(
            f"{references.store.folder}: references of {len(lost)} batches were not kept; make "
            "room there, or set dpo.stored_reference=false"
        )
    if ranks.is_main:
        console.print(f"reference: {len(order)} pairs in {references.store.folder}")


def _lacking(
    references: References, data: ReferencePairs, chunks: Sequence[Sequence[int]]
) -> list[int]:
    """The chunks of which something is not stored."""
    references.store.missing(())  # take note of what others wrote
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
    references: References,
    data: ReferencePairs,
    rows: Sequence[int],
    logps: Mapping[AnswerKey, Tensor],
) -> None:
    for at, row in enumerate(rows):
        lengths = data.answer_lengths(row)
        for place, key in references.keys(data.reference_digests(row)).items():
            references.put(key, logps[place][at, : lengths[place]])
