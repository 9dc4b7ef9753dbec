"""Saves a run's whole state and finds it again: what makes a resumed run the same run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmemo import checkpoint
from mmemo.console import errors
from mmemo.errors import CheckpointError, ConfigError
from mmemo.record import RunRecord
from mmemo.train import rng
from mmemo.train.config import RunConfig
from mmemo.train.distributed import Ranks
from mmemo.train.engine import Engine


@dataclass(frozen=True, slots=True)
class LoopState:
    """Where a run is: ``step`` optimizer steps were tried, next comes ``batch`` of ``epoch``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    nonfinite: int = 0
    """Steps in a row, up to now, that were skipped."""
    skipped: int = 0
    """Steps skipped in the whole run."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a resumed run must have in common with the one that was stopped.

    ``config``: resolved values that decide the weights. ``inputs``: names to hashes of the data.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])


class Keeper:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        config: RunConfig,
        engine: Engine,
        ranks: Ranks,
        record: RunRecord,
    ) -> None:
        self.folder, self.identity, self.config = folder, identity, config
        self.engine, self.ranks, self.record = engine, ranks, record
        self.extra: dict[str, Any] = {}
        """JSON values that are saved beside the state, and those that :meth:`resume` found."""
        self._saved = -1

    def save(self, state: LoopState) -> None:
        """Commit ``checkpoint-<step>``, then drop the oldest ones.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if state.step == self._saved:
            return

        def write(folder: Path) -> None:
            self.engine.save(folder)
            rng.save(folder / f"rng-{self.ranks.rank}.safetensors")

        meta = {
            "state": asdict(state),
            "identity": asdict(self.identity),
            "engine": self.engine.kind,
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "extra": self.extra,
        }
        final = self.folder / f"checkpoint-{state.step}"
        checkpoint.save(
            final, write, meta=meta, needed=self.engine.bytes_to_save(), ranks=self.ranks
        )
        self._saved = state.step
        if self.ranks.is_main:
            checkpoint.prune(self.folder, newest=state.step, keep=self.config.save_total_limit)
        self.record.event("checkpoint", step=state.step, path=final)

    def resume(self) -> LoopState | None:
        """Load the newest valid checkpoint and say where it stands; None when there is none.

        Raises:
            ConfigError: config or data changed since, and ``run.resume_from_checkpoint`` is not
                ``force``.
            CheckpointError: it was made by another engine or number of DeepSpeed ranks.
        """
        found = json.loads(self.ranks.from_main(self._find() if self.ranks.is_main else ""))
        if found is None:
            return None
        folder, meta = Path(found["path"]), found["meta"]
        self._check(folder, meta)
        self.engine.load(folder)
        mine = folder / f"rng-{self.ranks.rank}.safetensors"
        if mine.exists():  # a run may go on with more ranks than it had
            rng.restore(mine)
        torch.set_num_threads(int(meta["threads"]))
        state = LoopState(**meta["state"])
        self.extra = meta.get("extra", {})
        self._saved = state.step
        self.record.event("resume", step=state.step, path=folder)
        return state

    def _find(self) -> str:
        for path in checkpoint.sweep(self.folder):
            self.record.event("leftover_removed", path=path)
        found = checkpoint.latest_valid(self.folder)
        for refusal in found.refused:
            errors.print(f"[yellow]refused:[/yellow] {refusal}", soft_wrap=True)
            self.record.event("checkpoint_refused", reason=str(refusal))
        if found.checkpoint is None:
            return "null"
        return json.dumps({"path": str(found.checkpoint.path), "meta": found.checkpoint.meta})

    def _check(self, folder: Path, meta: Mapping[str, Any]) -> None:
        changed = differences(meta["identity"], json.loads(json.dumps(asdict(self.identity))))
        if changed and self.config.resume_from_checkpoint != "force":
            raise ConfigError(
                f"{folder} was made with other settings: {'; '.join(changed[:12])}"
                f"{'; ...' if len(changed) > 12 else ''}. Undo the edit, choose another "
                "output_dir, or set run.resume_from_checkpoint=force to go on anyway"
            )
        if changed:
            self.record.event("resume_forced", path=folder, differences=changed)
        if meta["engine"] != self.engine.kind:
            raise CheckpointError(
                f"{folder} was saved by the {meta['engine']} engine and cannot be read by the "
                f"{self.engine.kind} one; set run.deepspeed as it was, or choose another output_dir"
            )
        if self.engine.kind == "deepspeed" and meta["ranks"] != self.ranks.size:
            raise CheckpointError(
                f"{folder} holds the shards of {meta['ranks']} ranks; start as many again"
            )


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Each leaf that differs between two JSON values, as ``place: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        before: dict[str, Any] = old
        after: dict[str, Any] = new
        return [
            line
            for key in sorted({*before, *after})
            for line in differences(
                before.get(key), after.get(key), f"{place}.{key}" if place else key
            )
        ]
    return [] if old == new else [f"{place}: {json.dumps(old)} -> {json.dumps(new)}"]
