"""What each rank of the tests of another number of ranks runs: ``python -m tests.train.resize_job``

``FOLDER begin`` trains the smallest model six steps under each engine. ``FOLDER go_on`` goes on
from the third step of each under each engine, with as many ranks as there are, and writes the
weights to ``FOLDER/<ranks>-<from>-<to>.safetensors``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmemo.train.distributed import Ranks, leave
from tests.train import rank_job, toy

STAGES = {**rank_job.STAGES, "offload": "ds_configs/zero3_offload.json"}
PAIRS = [(one, other) for one in rank_job.STAGES for other in rank_job.STAGES]
PAIRS += [("zero3", "offload"), ("offload", "offload")]
"""The engine that began a run, and the one that goes on."""
ROWS = 12
"""Rows of a step, which two and three ranks share evenly."""


def loop(folder: Path, stage: str, ranks: Ranks) -> Any:
    torch.manual_seed(0)
    return toy.loop(
        folder,
        model=toy.Model(dropout=0.0),
        data=toy.Rows(ROWS),
        train={
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": ROWS // (2 * ranks.size),
        },
        run={
            "deepspeed": STAGES[stage],
            "save_steps": 3,
            "save_total_limit": None,
            # A stage lets the product of ranks and accumulation stand for both; this one does not.
            "resume_from_checkpoint": "force",
        },
        ranks=ranks,
    )


def keep(trained: Any, file: Path, ranks: Ranks) -> None:
    state = trained.engine.whole_state()
    if state is None:
        module = getattr(trained.engine.model, "module", trained.engine.model)
        state = {name: p.detach().clone() for name, p in module.named_parameters()}
    if ranks.is_main:
        save_file(state, file)


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(cpu=True)
    for begun in STAGES if what == "begin" else ():
        trained = loop(folder / begun, begun, ranks)
        trained.run()
        keep(trained, folder / f"{begun}.safetensors", ranks)
    for begun, stage in PAIRS if what == "go_on" else ():
        name = f"{ranks.size}-{begun}-{stage}"
        if ranks.is_main:
            shutil.copytree(folder / begun, folder / name)
            shutil.rmtree(folder / name / "checkpoint-6")
        ranks.barrier()
        trained = loop(folder / name, stage, ranks)
        trained.run()
        keep(trained, folder / f"{name}.safetensors", ranks)
    leave()


if __name__ == "__main__":
    main()
