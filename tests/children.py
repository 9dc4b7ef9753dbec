"""Processes that a test starts and kills."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = ["mmemo.train.sft", "mmemo.train.grpo.train", "mmemo.evaluation.runner"]


def start(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """Run ``target``, a function at the top of a module, in a process of its own.

    Processes are forked from one that has imported everything and computed nothing: a start costs
    milliseconds and not the imports of torch and transformers. A fork of the test itself would
    hang, since the threads that torch computes with are not there in the child.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=args)
    process.start()
    return process
