"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mmemo.errors import TrainingError
from mmemo.train.distributed import Ranks


@contextmanager
def run_lock(folder: Path, ranks: Ranks) -> Generator[None]:
    """Hold ``folder/run.lock`` on the main rank; the kernel drops it when the process dies.

    A POSIX record lock: decoding workers do not inherit it, so none of them can outlive the run
    and keep its folder locked.

    Raises:
        TrainingError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("a") as handle:
        taken = False
        if ranks.is_main:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                taken = True
        if ranks.any(taken):
            raise TrainingError(
                f"{folder}: another run is training here; wait for it or use another output_dir"
            )
        yield
