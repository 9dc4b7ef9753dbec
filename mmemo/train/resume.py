"""Saves a run's whole state and restores it, so that a resumed run computes the same weights.

Random numbers need no pickle: the states of Python, NumPy and torch are tensors in a safetensors
file. Dropout does not depend on them: every micro-batch seeds torch from (seed, step, index of the
micro-batch), so that dropout is the same whether the micro-batches of a step run on one rank or on
several, and whether or not the run was interrupted. The saved states are for anything else that
draws random numbers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text
from safetensors.torch import load_file, save_file

from mmemo import __version__, checkpoint
from mmemo.config import without_new
from mmemo.console import errors
from mmemo.errors import CheckpointError, ConfigError
from mmemo.run_log import RunRecord
from mmemo.train.config import RunConfig
from mmemo.train.distributed import Ranks
from mmemo.train.engine import Engine


def seed_micro_batch(seed: int, step: int, index: int) -> None:
    """Seed torch for the micro-batch number ``index``, over all ranks, of an optimizer step."""
    text = f"{seed}/{step}/{index}".encode()
    value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    # torch.manual_seed formats a traceback for each kind of accelerator, which takes longer than
    # the step of a small model.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(value)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    # NumPy takes no more than 32 bits.
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def save_random_state(path: Path) -> None:
    """Write the random states of Python, NumPy, torch and each CUDA device."""
    _, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner: dict[str, object] = numpy_state["state"]  # pyright: ignore
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.asarray(inner["key"], dtype=np.int64)),
        "numpy_place": torch.tensor([inner["pos"], numpy_state["has_gauss"]]),  # pyright: ignore
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),  # pyright: ignore
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    save_file(tensors, path)


def load_random_state(path: Path) -> None:
    """Set the states that :func:`save_random_state` wrote."""
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    gauss = tensors["python_gauss"].tolist()
    # 3 is the version of the state that random.getstate() returns.
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    place, has_gauss = tensors["numpy_place"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": place},
            "has_gauss": has_gauss,
            "gauss": float(tensors["numpy_gauss"]),
        }
    )
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _optional(value: float | None) -> torch.Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class TrainerState:
    """How far a run is: ``step`` optimizer steps were attempted, and ``batch`` of ``epoch`` is
    next."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    nonfinite: int = 0
    """The number of skipped steps in a row, up to now."""
    skipped: int = 0
    """The number of skipped steps in the whole run."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a resumed run must have in common with the one that was stopped.

    ``config`` holds the resolved values that decide the weights, ``inputs`` the hashes of data and
    starting weights, by name. ``chosen``: values of the config that are not defaults; None where
    all count as chosen.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    chosen: Mapping[str, Any] | None = None

    @property
    def saved(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        # Through JSON, as those of a checkpoint went: tuples, for instance, come back as lists.
        both: dict[str, Any] = json.loads(
            json.dumps({"config": self.config, "inputs": self.inputs})
        )
        return both

    def changed_from(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from the :attr:`saved` values of a checkpoint. Settings that its version did
        not know count where they are not at their defaults."""
        now = self.saved
        if self.chosen is not None:
            now["config"] = without_new(now["config"], saved.get("config"), self.chosen)
        return differences(saved, now)


class CheckpointManager:
    """Writes the checkpoints of one run folder, drops old ones, and resumes from the newest."""

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
        """JSON values that are saved beside the state, and that :meth:`resume` reads."""
        self.balance: dict[str, Any] = {}
        """The same, of the experts' running mean."""
        self._saved = -1
        self._checked = False
        self._found: dict[str, Any] | None = None

    def save(self, state: TrainerState) -> None:
        """Commit ``checkpoint-<step>``, then delete the oldest ones.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        # A stop may come right after a save of the same step.
        if state.step == self._saved:
            return

        def write(folder: Path) -> None:
            self.engine.save(folder)
            save_random_state(folder / f"rng-{self.ranks.rank}.safetensors")

        meta = {
            "state": asdict(state),
            "identity": self.identity.saved,
            "engine": self.engine.kind,
            "ranks": self.ranks.size,
            "threads": torch.get_num_threads(),
            "version": __version__,
            "extra": self.extra,
            "expert_balance": self.balance,
        }
        final = self.folder / f"checkpoint-{state.step}"
        checkpoint.save(
            final, write, meta=meta, needed=self.engine.bytes_to_save(), ranks=self.ranks
        )
        self._saved = state.step
        if self.ranks.is_main:
            checkpoint.prune(self.folder, newest=state.step, keep=self.config.save_total_limit)
        self.record.event("checkpoint", step=state.step, path=final)

    def check(self) -> None:
        """Choose the checkpoint that :meth:`resume` will load, and refuse one of another run.

        A stage calls it before it computes anything that a refused run has no use for.

        Raises:
            ConfigError: config or data changed since, and ``run.resume_from_checkpoint`` is not
                ``force``.
            CheckpointError: it was made by another engine or number of DeepSpeed ranks.
        """
        if self._checked:
            return
        # One rank hashes and chooses for all: they must not resume from different checkpoints.
        chosen = self.ranks.broadcast_text(self._find() if self.ranks.is_main else "")
        self._found = json.loads(chosen)
        if self._found is not None:
            self._check(Path(self._found["path"]), self._found["meta"])
        self._checked = True

    def resume(self) -> TrainerState | None:
        """Load the newest valid checkpoint and return its state; None when there is none.

        Raises:
            ConfigError, CheckpointError: as :meth:`check`.
        """
        self.check()
        if self._found is None:
            return None
        folder, meta = Path(self._found["path"]), self._found["meta"]
        self.engine.load(folder)
        mine = folder / f"rng-{self.ranks.rank}.safetensors"
        if mine.exists():  # a run may continue with more ranks than it had
            load_random_state(mine)
        # The last bit of a sum depends on the number of threads.
        torch.set_num_threads(int(meta["threads"]))
        state = TrainerState(**meta["state"])
        self.extra = meta.get("extra", {})
        self.balance = meta.get("expert_balance", {})  # a checkpoint before 0.3 has none
        self._saved = state.step
        self.record.event("resume", step=state.step, path=folder)
        return state

    def _find(self) -> str:
        for path in checkpoint.sweep(self.folder):
            self.record.event("leftover_removed", path=path)
        found = checkpoint.latest_valid(self.folder)
        for refusal in found.refused:
            errors.print(
                Text.assemble(("checkpoint refused:", "yellow"), f" {refusal}"), soft_wrap=True
            )
            self.record.event("checkpoint_refused", reason=str(refusal))
        if found.checkpoint is None:
            return "null"
        return json.dumps({"path": str(found.checkpoint.path), "meta": found.checkpoint.meta})

    def _check(self, folder: Path, meta: Mapping[str, Any]) -> None:
        changed = self.identity.changed_from(meta["identity"])
        if changed and self.config.resume_from_checkpoint != "force":
            version = meta.get("version", "0.1.0")  # which did not say it
            by = "" if version == __version__ else f" by mmemo {version} (this is {__version__})"
            raise ConfigError(
                f"{folder} was made{by} with other settings: {'; '.join(changed[:12])}"
                f"{'; ...' if len(changed) > 12 else ''}. Undo the edit, choose another "
                "output_dir, or set run.resume_from_checkpoint=force to continue anyway"
            )
        if changed:
            self.record.event("resume_forced", path=folder, differences=changed)
        if meta["engine"] == "torch" or (folder / "optimizer.safetensors").exists():
            return  # weights and optimizer state by name, which any engine reads
        if meta["engine"] != self.engine.kind or meta["ranks"] != self.ranks.size:
            raise CheckpointError(
                f"{folder} holds DeepSpeed's shards for {meta['ranks']} ranks, as mmemo wrote them "
                "up to 0.4; start that many ranks with run.deepspeed again"
            )


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Every leaf that differs between two JSON values, as ``place: old -> new``."""
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
