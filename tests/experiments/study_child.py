"""What ``mmemo pipeline FILE`` is to the studies of the tests: toy stages, each counted in a file.

The file is named by ``STUDY_LOG``: as a config value it would count as an input that changes.
A stage writes ``value`` plus what its ``source`` holds. ``mood`` says what else happens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mmemo import stages
from mmemo.errors import MmemoError
from mmemo.experiments.pipeline import run_pipeline
from mmemo.stages import Stage
from tests.experiments.toy_stages import EVAL, MAKE


def toy(stage: Stage, values: dict[str, Any]) -> None:
    """Do a stage."""
    folder, log = Path(values["output_dir"]), os.environ["STUDY_LOG"]
    folder.mkdir(parents=True, exist_ok=True)
    line = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name} {os.getpid()}\n"
    with Path(log).open("a") as handle:
        handle.write(line)
    if values["mood"] == "fail" and not Path(log + ".mended").exists():
        raise MmemoError("the stage is sad; cheer it up")
    if values["mood"] == "sleep" and not Path(log + ".awake").exists():
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / "saved.tmp").write_text("x")
            sys.exit(130)
    source = values["source"]
    before = json.loads((Path(source) / "results.json").read_text())["n"] if source else 0
    (folder / "results.json").write_text(json.dumps({"n": before + values["value"]}))
    (folder / "weights.bin").write_bytes(b"large")


if __name__ == "__main__":
    for one in (MAKE, EVAL):
        stages.register(one)
    try:
        run_pipeline(Path(sys.argv[2]), [], run=toy)
    except MmemoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
