"""The metrics of a run: sums over micro-batches and ranks, ``metrics.jsonl`` and trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmemo import files
from mmemo.errors import ConfigError
from mmemo.train.config import RunConfig
from mmemo.train.distributed import Ranks

Ratio = tuple[Tensor | float, Tensor | float]
"""A metric as (sum, count), which can be added up over micro-batches and ranks."""


class Sums:
    """Adds ratios up without synchronising with the device. Every rank must add the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, ratios: Mapping[str, Ratio], *, keep: bool = True) -> None:
        """Add each (sum, count). With ``keep`` False only the names are kept, with zeros: a padding
        batch counts nothing, and yet the ranks must add the same names."""
        for name, (total, count) in ratios.items():
            total = torch.as_tensor(total).detach().double()
            pair = torch.stack([total, torch.as_tensor(count, dtype=total.dtype).to(total.device)])
            self._put(name, pair if keep else torch.zeros_like(pair))

    def merge(self, other: Sums) -> None:
        """Add the sums of ``other``."""
        for name, pair in other._sums.items():
            self._put(name, pair)

    def over(self, ranks: Ranks) -> dict[str, tuple[float, float]]:
        """Name to (sum, count) over all ranks."""
        # The ranks add up by position, so each sends its sums in the same order.
        names = sorted(self._sums)
        values = ranks.sum([x for name in names for x in self._sums[name].tolist()])
        return dict(zip(names, zip(values[::2], values[1::2], strict=True), strict=True))

    def _put(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sum divided by count, for the names whose count is not zero."""
    return {name: total / count for name, (total, count) in sums.items() if count > 0}


class LineWatch(Protocol):
    """Reads the lines of ``metrics.jsonl`` as they are written, on the main rank."""

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """The lines that a resumed run has already."""
        ...

    def see(self, line: Mapping[str, Any]) -> None:
        """A new line."""
        ...


class MetricsLogger:
    """Writes metrics as one line to ``metrics.jsonl``, to the trackers, and to ``watch``."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        ranks: Ranks,
        resolved: Any,
        watch: LineWatch | None = None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.ranks, self.watch = ranks, watch
        self._trackers = _trackers(folder, config, resolved) if ranks.is_main else []
        self._clock = time.perf_counter()
        self._steps = 0

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, which a resumed run writes again."""
        if not self.ranks.is_main or not self.path.exists():
            return
        kept = files.keep_rows(self.path, up_to(step))
        if self.watch is not None:
            self.watch.restore(kept)

    def tick(self) -> None:
        """Count a step for :meth:`lap`."""
        self._steps += 1

    def lap(self) -> tuple[float, int]:
        """The seconds and the number of steps since the last lap."""
        now = time.perf_counter()
        seconds, steps = now - self._clock, self._steps
        self._clock, self._steps = now, 0
        return max(seconds, 1e-9), steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line; values that are not finite are left out. Only the main rank writes."""
        if not self.ranks.is_main:
            return
        # json.dumps would write NaN and Infinity, which are not JSON.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **{name: _short(value) for name, value in values.items()}}
        files.append_rows(self.path, [line])
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)
        if self.watch is not None:
            self.watch.see(line)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def up_to(step: int) -> Callable[[Any], bool]:
    """Whether a row of a training log is of ``step`` or an earlier one."""

    def keep(row: Any) -> bool:
        try:
            return int(row["step"]) <= step
        except (ValueError, KeyError, TypeError):
            return False

    return keep


def _trackers(folder: Path, config: RunConfig, resolved: Any) -> list[Any]:
    from accelerate import tracking

    name = config.run_name or folder.name
    made: list[Any] = []
    for kind in config.report_to:
        try:
            if kind == "tensorboard":
                tracker: Any = tracking.TensorBoardTracker(name, logging_dir=str(folder / "logs"))
            else:
                tracker = tracking.WandBTracker(name)
            tracker.start()
        except ImportError as error:
            raise ConfigError(
                f"run.report_to: {kind} is not installed; run `pip install {kind}` or leave it out"
            ) from error
        if kind == "wandb":  # TensorBoard takes flat values only
            tracker.store_init_configuration(resolved)
        made.append(tracker)
    return made
