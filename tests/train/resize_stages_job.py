"""What each rank of the tests of another number of ranks runs, with the stages and a native model:
``python -m tests.train.resize_stages_job FOLDER begin|go_on``

``begin`` takes four optimizer steps of each case and writes ``FOLDER/<ranks>/<case>``. ``go_on``
takes what runs of another number of ranks left after two steps, and goes on with as many as there
are, in ``FOLDER/<begun>-<ranks>/<case>``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from mmemo.config import parse
from mmemo.stages import config_class, stage
from mmemo.train.distributed import Ranks, leave
from tests.train.native_ranks_job import cases, values_of
from tests.train.rank_job import STAGES

CASES = (("sft", "zero2"), ("sft", "zero3"), ("grpo", "zero3"), ("dpo", "zero2"))
SIZES = ((2, 1), (2, 3), (1, 2))
"""Ranks that began a run, and that go on with it."""
ROWS = 6
"""Rows of a step, which two and three ranks share evenly."""
STEPS, STOPPED = 4, 2


def train(folder: Path, out: Path, name: str, engine: str, ranks: Ranks) -> None:
    kind, changes = next((k, x) for case, k, x, _ in cases(folder) if case == name)
    values = values_of(folder, out, 1, **changes)
    values["train"] |= {"max_steps": STEPS, "gradient_accumulation_steps": ROWS // ranks.size}
    values["run"] |= {
        "deepspeed": STAGES[engine],
        "save_steps": STOPPED,
        "save_total_limit": None,
    }
    torch.manual_seed(0)
    stage(kind).runner(parse(config_class(kind), values))


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(cpu=True)
    for name, engine in CASES:
        case = f"{name}-{engine}"
        if what == "begin":
            train(folder, folder / str(ranks.size) / case, name, engine, ranks)
            continue
        for begun in [begun for begun, size in SIZES if size == ranks.size]:
            out = folder / f"{begun}-{ranks.size}" / case
            if ranks.is_main:
                shutil.copytree(folder / str(begun) / case, out)
                # As it was when the run was stopped after the first checkpoint.
                for late in ("final", f"checkpoint-{STEPS}"):
                    shutil.rmtree(out / late)
            ranks.barrier()
            train(folder, out, name, engine, ranks)
    leave()


if __name__ == "__main__":
    main()
