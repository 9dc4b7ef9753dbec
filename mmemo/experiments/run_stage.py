"""Run one stage: in this process, or as several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmemo.config import Config, parse, save_resolved
from mmemo.stages import Stage


def run_stage(stage: Stage, config: Config) -> None:
    """Do the work of a stage. If ``run.processes`` asks for several ranks, start them: each runs
    this stage on the same resolved config, ``launch.yaml`` in the stage's folder.

    Raises:
        MmemoError: whatever the stage raises.
        TrainingError: a rank failed.
    """
    if not stage.ranks:
        stage.runner(config)
        return
    from mmemo.train.distributed import in_launch, launch

    settings: Any = config  # a stage that starts ranks has `run` and `output_dir`
    if settings.run.processes == 1 or in_launch():
        stage.runner(config)
        return
    resolved = Path(settings.output_dir) / "launch.yaml"
    save_resolved(config, resolved)
    launch([stage.reference, str(resolved)], settings.run.processes)


def run_values(stage: Stage, values: dict[str, Any]) -> None:
    """Do the work of a stage, given plain config values.

    Raises:
        ConfigError: a value is wrong.
    """
    run_stage(stage, parse(stage.config_class, values))
