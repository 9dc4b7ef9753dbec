"""``mmemo check``, and what commands with a config take; ``mmemo/cli.py`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmemo import content, stages
from mmemo.config import Config, load_config, read_yaml
from mmemo.errors import ConfigError

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file, looked up in the working directory and then among the shipped ones.",
    ),
]
Run = Annotated[
    str | None,
    typer.Option("--run", metavar="DIR", help="Value of ${run} in CONFIG: the run's folder."),
]


def variables(run: str | None, path: Path) -> dict[str, str]:
    """Outside a pipeline ``${run}`` is the value of ``--run``, and ``${seed}`` is 0.

    Raises:
        ConfigError: the file has no ``${run}``, so that ``--run`` would do nothing.
    """
    if run is not None and path.is_file() and b"${run}" not in path.read_bytes():
        raise ConfigError(
            f"--run: {path} has no ${{run}} that it would stand for; write --output_dir=DIR, or "
            "${run} into the file"
        )
    return {"seed": "0"} if run is None else {"run": run, "seed": "0"}


_Stage = Annotated[
    str | None,
    typer.Option(
        metavar="STAGE", help="The stage that CONFIG is for; by default guessed from its keys."
    ),
]
_Probe = Annotated[
    bool,
    typer.Option(
        "--probe", help="Also read every media file from end to end, and note what is odd."
    ),
]
_Notes = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the notes on clips to FILE, one JSON a line."),
]
_Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of a GPU that the run is to fit into, such as 24GB; default: what is free "
        "on this machine.",
    ),
]
_Lengths = Annotated[
    str | None,
    typer.Option(
        metavar="PROMPT+ANSWER",
        help="Only forecast memory, for so many tokens, such as 2048+256. Of the model, "
        "config.json is read; neither weights nor rows nor clips are.",
    ),
]
_Ranks = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="GPUs on all machines together; default: run.processes."),
]


def check(
    context: typer.Context,
    config: ConfigFile,
    run: Run = None,
    stage: _Stage = None,
    probe: _Probe = False,
    notes: _Notes = None,
    memory: _Memory = None,
    lengths: _Lengths = None,
    ranks: _Ranks = None,
) -> None:
    """Validate a config and its data without training.

    It reads every row, looks for every file, encodes a few clips, shows prompts as the model will
    see them, and estimates token lengths, memory and disk. For GRPO it also proves each reward.
    Where the memory does not suffice, the cheapest overrides are named with which it does, and the
    exit code is 1. Nothing is written but the notes that --notes asks for.

    Next: mmemo encode, or the stage itself.
    """
    from mmemo.check.fitting import parse_size
    from mmemo.check.run import forecast_alone, run_check
    from mmemo.experiments.study import VARIABLES

    path, overrides = content.find(config), stages.overrides(context.args)
    stages.quiet()
    # A study's own variables have no value yet when its kind is guessed.
    name = stage or stages.guess(read_yaml(path, later=VARIABLES))
    if name == "study":
        from mmemo.experiments.study import check_study

        check_study(path, overrides)
    elif name == "pipeline":
        from mmemo.experiments.pipeline import check_pipeline

        check_pipeline(path, overrides)
    else:
        kind = stages.stage(name)
        loaded: Config = load_config(kind.config_class, path, overrides, variables(run, path))
        size = None if memory is None else parse_size(memory)
        if lengths is not None:
            report = forecast_alone(loaded, lengths, memory=size, ranks=ranks)
        else:
            report = run_check(
                loaded, stage=kind, probe=probe, notes=notes, memory=size, ranks=ranks
            )
        if not report.fits:
            raise typer.Exit(1)
