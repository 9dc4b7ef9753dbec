"""A target for decoding workers that hangs on some files. Imports little: workers start with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.decode import decode

LOG = "MMEMO_TEST_DECODE_LOG"


def slow_decode(job: DecodeJob) -> DecodedClip:
    """Notes the job, and hangs on files named ``slow*``."""
    with Path(os.environ[LOG]).open("a") as handle:
        handle.write(f"{job.name} {','.join(sorted(job.want))}\n")
    if job.name.startswith("slow"):
        time.sleep(60)
    return decode(job)
