"""Run one stage: in this process, or as several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmemo.config import Config, dump, parse, save_resolved
from mmemo.run_log import RunRecord, announce, withdraw
from mmemo.stages import Stage


def run_stage(stage: Stage, config: Config) -> Any:
    """Do the work of a stage. If ``run.processes`` asks for several ranks, start them: each runs
    this stage on the same resolved config, ``launch.yaml`` in the stage's folder. A stage that
    ``shares`` its work with them finishes it in this process.

    The folder's record says which stage ran with which config, so that a report knows what a
    folder is even if no pipeline made it.

    Returns:
        What the stage's function returns; None where ranks were started.

    Raises:
        MmemoError: whatever the stage raises.
        TrainingError: a rank failed.
    """
    settings: Any = config  # every stage has `output_dir`, and one that starts ranks has `run`
    folder = Path(settings.output_dir)
    if stage.ranks:
        from mmemo.train.distributed import in_launch, launch

        if settings.run.processes > 1 and not in_launch():
            resolved = folder / "launch.yaml"
            save_resolved(config, resolved)
            launch([stage.reference, str(resolved)], settings.run.processes)
            return None
    if stage.shares:
        from mmemo.train.distributed import in_launch, launch

        if in_launch():
            return stage.runner(config)
        if settings.run.processes > 1:
            resolved = folder / "launch.yaml"
            save_resolved(config, resolved)
            launch([stage.reference, str(resolved)], settings.run.processes)
    if os.environ.get("RANK", "0") != "0":
        return stage.runner(config)
    opening = {"stage": stage.reference, "config": dump(config)}
    if not stage.ranks:
        RunRecord(folder).event("stage", **opening)
        return stage.runner(config)
    # A stage with ranks locks its folder, and is refused where another run is at work.
    announce(folder, "stage", **opening)
    try:
        made = stage.runner(config)
    finally:
        left = withdraw(folder)
    if left is not None:  # it has written no event of its own
        RunRecord(folder).event(**left)
    return made


def run_values(stage: Stage, values: dict[str, Any]) -> None:
    """Do the work of a stage, given plain config values.

    Raises:
        ConfigError: a value is wrong.
    """
    run_stage(stage, parse(stage.config_class, values))
