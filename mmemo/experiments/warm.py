"""Starts the processes of runs from one in which the libraries are imported already.

Importing torch, transformers and peft takes about ten seconds of a core, as long as many an
evaluation. The first run starts a server process (:mod:`multiprocessing.forkserver`) that imports
them once; each run is a fork of it. Nothing else is shared: a run sets its own seeds and opens its
own files.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

from mmemo.train.distributed import die_with

IMPORTED = (
    "mmemo.experiments.pipeline",
    "mmemo.evaluation.runner",
    "mmemo.train.sft",
    "mmemo.train.grpo.train",
    "mmemo.train.dpo.train",
)
"""What every run needs, or most of them."""


class WarmProcess:
    """A run in a process of its own, with the methods of :class:`subprocess.Popen` that are used.

    Args:
        file: the pipeline's file.
        log: where its output goes.
        environment: variables of the server, which count from the first run on.
    """

    def __init__(self, file: Path, log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        with _environment(environment):
            self._process = _start(context, file, log)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


def _start(context: ForkServerContext, file: Path, log: Path) -> multiprocessing.Process:
    process = context.Process(target=_run, args=(str(file), str(log), os.getcwd()))
    process.start()
    return process  # pyright: ignore[reportReturnType]


def _run(file: str, log: str, folder: str) -> None:
    """Run a pipeline in this process, as ``mmemo pipeline FILE`` does."""
    # Its parent is the server, which lives as long as any run does, so the study is watched too.
    die_with(os.getppid())
    threading.Thread(target=_die_with_study, daemon=True).start()
    # A session of its own keeps the terminal's Ctrl-C from reaching a run twice.
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    with open(log, "wb") as written, open(os.devnull, "rb") as nothing:
        for number, handle in ((0, nothing), (1, written), (2, written)):
            os.dup2(handle.fileno(), number)
    sys.argv = ["mmemo", "pipeline", file]
    # A command line of its own, like that of a cold run: this room lies below it.
    runpy.run_module("mmemo.cli", run_name="__main__")


def _die_with_study() -> None:
    study = multiprocessing.parent_process()
    if study is not None:
        study.join()
    os._exit(137)


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    """These variables, until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
