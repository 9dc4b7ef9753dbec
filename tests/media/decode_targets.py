"""Targets for decoding workers that misbehave, chosen by the job's name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mmemo.errors import ConfigError
from mmemo.media.clip import DecodedClip, DecodeJob


def act(job: DecodeJob) -> DecodedClip:
    """Do what the first word of the job's name says."""
    word, _, rest = job.name.partition("-")
    if word == "sleep":  # seconds, or forever
        time.sleep(float(rest) if rest else 1e6)
    elif word == "hang":  # without ever giving the interpreter back
        ctypes.PyDLL(None).sleep(1_000_000)
    elif word == "segfault":
        ctypes.string_at(0)
    elif word == "exit":
        print("something to say", file=sys.stderr, flush=True)
        os._exit(3)
    elif word == "allocate":
        np.ones(int(rest) << 20, dtype=np.uint8)
    elif word == "config":
        raise ConfigError("face.model must name a file")
    elif word == "raise":
        raise IndexError("a bug")
    elif word == "once":  # fails with decord, as a clip does on which decord hangs
        if job.limits.backend == "auto":
            os.kill(os.getpid(), signal.SIGSEGV)
    elif word == "pid":
        Path(rest).write_text(str(os.getpid()))
        time.sleep(1e6)
    elif word == "modules":
        return _clip(job, digest=",".join(sorted(sys.modules)))
    return _clip(job)


def _clip(job: DecodeJob, digest: str = "") -> DecodedClip:
    times = np.full(1, os.getpid(), dtype=np.float64)
    return DecodedClip(name=job.name, digest=digest, duration=1.0, times=times)
