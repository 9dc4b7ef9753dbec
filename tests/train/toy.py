"""The smallest thing that can be trained: a linear map of fixed random rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.config import parse
from mmemo.run_log import RunRecord
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks
from mmemo.train.trainer import Identity, Loss, Trainer

ROWS = 24


class Model(nn.Module):
    """Dropout makes the result depend on the random state of every step."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
            )
            self.spare = nn.Linear(4, 1)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        return (self.body(x) + (self.spare(x) if spare else 0)).squeeze(-1)


class Squares:
    """Squared error, in units of a row's own weight."""

    def weight(self, batch: Batch) -> float:
        return float(batch["weight"].sum())

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        off = model(batch["x"], batch.get("spare", False)) - batch["y"]
        rows = off.square() * batch["weight"]
        return Loss(rows, {"error": (off.detach().abs().sum(), len(off))})


class Rows:
    """Row i is named ``row-i``; ``hook(rows)`` may change a batch or raise."""

    def __init__(self, batch_size: int = 4, hook: Callable[[Batch], None] | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(ROWS, 4, generator=generator)
        self.y = self.x.tanh().sum(1)
        self.batch_size, self.hook = batch_size, hook

    def plan(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[i : i + self.batch_size] for i in range(0, ROWS, self.batch_size)]

    def collate(self, rows: Sequence[int]) -> Batch:
        index = torch.tensor(rows)
        batch: Batch = {
            "x": self.x[index],
            "y": self.y[index],
            "weight": 1.0 + index % 3,
            "sample_ids": [f"row-{row}" for row in rows],
        }
        if self.hook is not None:
            self.hook(batch)
        return batch


def loop(
    folder: Path,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    train: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    ranks: Ranks | None = None,
    **others: Any,
) -> Trainer:
    values = {"max_steps": 12, "learning_rate": 0.01, "warmup_steps": 0.1, **(train or {})}
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model=model or Model(),
        objective=Squares(),
        data=data or Rows(),
        folder=folder,
        train=parse(TrainConfig, values),
        run=parse(RunConfig, {"save_steps": 3, "logging_steps": 1, "threads": 1, **(run or {})}),
        identity=Identity({"train": values}, inputs or {"rows": "abc"}),
        record=RunRecord(folder, enabled=ranks is None or ranks.is_main),
        ranks=ranks,
        **others,
    )


def digest(model: nn.Module) -> str:
    """SHA-256 over all weights, to the bit."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
