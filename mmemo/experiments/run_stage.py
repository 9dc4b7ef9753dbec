"""Run one stage: in this process, or as several ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmemo.config import Config, dump, parse, save_resolved
from mmemo.errors import ConfigError
from mmemo.run_log import RunRecord, announce, withdraw
from mmemo.stages import Stage
from mmemo.train.nodes import LAUNCHED, TIMEOUT, join_slurm, nodes_of


def run_stage(stage: Stage, config: Config) -> Any:
    """Do the work of a stage. If ``run.processes`` asks for several ranks, start them: each runs
    this stage on the same resolved config, ``launch.yaml`` in the stage's folder. A stage that
    ``shares`` its work with them finishes it in this process, on the first node.

    The folder's record says which stage ran with which config, so that a report knows what a
    folder is even if no pipeline made it.

    Returns:
        What the stage's function returns; None where ranks were started.

    Raises:
        MmemoError: whatever the stage raises.
        ConfigError: another launcher started ranks of a stage that only shares its work with them.
        TrainingError: a rank failed.
    """
    settings: Any = config  # every stage has `output_dir`, and one that starts ranks has `run`
    folder = Path(settings.output_dir)
    if stage.ranks or stage.shares:
        from mmemo.train.distributed import in_launch

        if in_launch() and stage.shares:
            if LAUNCHED not in os.environ:
                raise ConfigError(
                    f"{stage.reference} starts its processes itself and finishes alone; run it "
                    "once on each node with --processes N, without torchrun"
                )
            return stage.runner(config)
        launched = _launched(stage, config, folder / "launch.yaml")
        if launched and (stage.ranks or nodes_of(os.environ).rank > 0):
            return None
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


def run_inputs(stage: Stage, config: Config, other: Stage) -> Any:
    """Do the work of a stage on what another stage reads, given that one's config. It has as many
    ranks as the other one would.

    Raises:
        MmemoError: as :func:`run_stage`.
    """
    settings: Any = config
    resolved = Path(settings.output_dir) / stage.name / "launch.yaml"
    if stage.ranks and (other.ranks or other.shares) and _launched(stage, config, resolved):
        return None
    return stage.runner(other.read_inputs(config))


def _launched(stage: Stage, config: Config, resolved: Path) -> bool:
    """Start the ranks that the config asks for, on the config at ``resolved``, and wait for them;
    False if this process is to do the work."""
    from mmemo.train.distributed import in_launch, launch

    settings: Any = config
    # Only ranks of such a stage do the whole work together.
    if stage.ranks and settings.run.processes == 1 and not in_launch():
        join_slurm(os.environ)
    if in_launch() or not (settings.run.processes > 1 or nodes_of(os.environ).count > 1):
        return False
    save_resolved(config, resolved)
    timeout = getattr(settings.run, "ddp_timeout", TIMEOUT)
    launch([stage.reference, str(resolved)], settings.run.processes, timeout=timeout)
    return True


def run_values(stage: Stage, values: dict[str, Any]) -> None:
    """Do the work of a stage, given plain config values.

    Raises:
        ConfigError: a value is wrong.
    """
    run_stage(stage, parse(stage.config_class, values))
