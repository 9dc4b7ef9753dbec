"""The command line: parse, call, print.

The command of each stage is made from its row in ``mmemo/stages.py``. Commands that are not about
one stage's config, such as ``pipeline`` and ``check``, are written here.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from mmemo import __version__, cli_tools, content, stages
from mmemo.cli_check import ConfigFile, Run, check, variables
from mmemo.config import apply_overrides, nearest, parse, read_yaml
from mmemo.console import console, errors, hush
from mmemo.errors import ConfigError, MmemoError
from mmemo.rewards.time_limit import running_on
from mmemo.stages import COMPOSITES, RENAMED, STAGES, Option, Stage

_OVERRIDABLE: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
_OVERRIDES_HINT = "\n\nSet any value of CONFIG with --section.key=value."
_STAGES, _RUNS, _TOOLS = "Stages", "Runs of several stages", "Tools"


class _Commands(TyperGroup):
    """The commands below, and one for each stage of the registry or of a file."""

    def list_commands(self, ctx: Any) -> list[str]:
        own = super().list_commands(ctx)
        return [*(name for name in STAGES if name not in own), *own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        if cmd_name in STAGES or cmd_name in RENAMED or stages.is_path(cmd_name):
            return _stage_command(stages.stage(cmd_name))
        known = self.list_commands(ctx)
        guess = nearest(cmd_name, known)
        hint = f"did you mean '{guess}'?" if guess else f"commands: {', '.join(known)}"
        raise ConfigError(f"there is no command '{cmd_name}'; {hint}")


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune and align multimodal LLMs that see the face, hear the voice and understand "
        "emotion.\n\nEach stage takes CONFIG, one YAML file. Any value in it can be set on the "
        "command line: [bold]mmemo sft CONFIG --train.learning_rate=1e-4[/bold]. "
        "[bold]mmemo schema STAGE[/bold] lists every key of a stage's config, "
        "[bold]mmemo check CONFIG[/bold] validates a config with its data, and "
        "[bold]mmemo pipeline CONFIG[/bold] runs several stages in order.\n\n"
        "To try everything on a CPU without a download: "
        "[bold]mmemo pipeline train_configs/quickstart/pipeline.yaml[/bold]"
    ),
)


def _example(command: str) -> str:
    return f"Example: mmemo {escape(command)}"


def _command(example: str, *, panel: str = _TOOLS, overrides: bool = True) -> Callable[[Any], Any]:
    """Register a command that is written here; ``overrides``: it takes ``--section.key=value``."""
    hint = _OVERRIDES_HINT if overrides else ""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        return app.command(
            help="\n\n".join(" ".join(text.split()) for text in paragraphs),
            context_settings=_OVERRIDABLE if overrides else None,
            epilog=_example(example) + hint,
            rich_help_panel=panel,
        )(function)

    return register


def _stage_command(stage: Stage) -> Any:
    """The command ``mmemo STAGE CONFIG [options] [overrides]``, made from a stage's row."""

    def command(context: typer.Context, config: Path, run: str | None, **given: Any) -> None:
        _run_command(stage, context, config, run, given)

    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter("context", plain, annotation=typer.Context),
        inspect.Parameter("config", plain, annotation=ConfigFile),
        inspect.Parameter("run", plain, default=None, annotation=Run),
        *(
            inspect.Parameter(_variable(one), plain, default=None, annotation=_typed(one))
            for one in stage.options
        ),
    ]
    # typer reads options from the signature, which for a stage is only known at run time.
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(
        stage.reference,
        help=_help(stage),
        epilog=_example(f"{stage.reference} {stage.example}") + _OVERRIDES_HINT,
        context_settings=_OVERRIDABLE,
        rich_help_panel=_STAGES,
    )(command)
    return typer.main.get_command(alone)


def _help(stage: Stage) -> str:
    parts = {"Needs": stage.needs, "Writes": stage.writes, "Next": stage.then}
    lines = [f"{name}: {escape(text)}" for name, text in parts.items() if text]
    return "\n\n".join([escape(stage.help or f"Run the stage {stage.name}."), *lines])


def _variable(option: Option) -> str:
    return option.flag.lstrip("-").replace("-", "_")


def _typed(option: Option) -> Any:
    if option.metavar is None:
        return Annotated[bool | None, typer.Option(option.flag, help=option.help)]
    kind = int if option.metavar == "N" else Path
    return Annotated[
        kind | None, typer.Option(option.flag, metavar=option.metavar, help=option.help)
    ]


def _run_command(
    stage: Stage, context: typer.Context, path: Path, run: str | None, given: dict[str, Any]
) -> None:
    if path.suffix == ".py" and stage.script is not None:
        if run is not None:
            raise ConfigError(f"--run is for a config; give {path} --output-dir DIR")
        # typer has taken the command's own options out of the arguments.
        stages.resolve(stage.script)(path, [*context.args, *_flags(stage, given)])
        return
    overrides = stages.overrides(context.args)
    instead: tuple[Callable[..., Any], list[Any]] | None = None
    for option in stage.options:
        value = given[_variable(option)]
        if value is None or value is False:
            continue
        if option.override is not None:
            overrides.append("--" + option.override.format(value))
        if option.run is not None:
            stages.quiet()
            instead = stages.resolve(option.run), [] if option.metavar is None else [value]
    config = _load(stage, content.find(path), overrides, run)
    # The config may be another stage's, whose inputs this stage takes.
    other = None if type(config) is stage.config_class else stages.stage_of(config)
    if instead is not None:
        given_to = config if other is None else other.read_inputs(config)
        instead[0](given_to, *instead[1])
        return
    from mmemo.experiments.run_stage import run_inputs, run_stage

    if other is None:
        run_stage(stage, config)
    else:
        run_inputs(stage, config, other)


def _flags(stage: Stage, given: dict[str, Any]) -> list[str]:
    """The options of a command that were given, as they stood on the command line."""
    found: list[str] = []
    for option in stage.options:
        value = given[_variable(option)]
        if value is not None and value is not False:
            found += [option.flag] if option.metavar is None else [option.flag, str(value)]
    return found


def _load(stage: Stage, path: Path, overrides: list[str], run: str | None) -> Any:
    """The config of a stage; for a stage that takes those of others, perhaps another's."""
    values = apply_overrides(read_yaml(path, variables(run, path)), overrides)
    # A key that this stage does not have shows that the config is another stage's.
    if stage.takes_inputs and not set(values) <= set(stage.config_class.model_fields):
        other = stages.stage(stages.guess(values))
        if other.name != stage.name:
            stages.quiet()
            return parse(other.config_class, values, where=str(path))
    return parse(stage.config_class, values, where=str(path))


@_command("pipeline train_configs/quickstart/pipeline.yaml --seed=1", panel=_RUNS)
def pipeline(
    context: typer.Context,
    config: ConfigFile,
    only: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run only the stage of this name.")
    ] = None,
) -> None:
    """Run the stages of a pipeline in order, each in its own folder.

    Stages that finished and whose inputs did not change are skipped, and a stage that was killed
    resumes: run the same command again.

    Needs: a file with a name, an output_dir and a list of stages, each with its name, its kind
    (stage: sft) and its config file.

    Writes: one folder for each stage, state.json, events.jsonl, and report.html if the pipeline
    has a report.

    Next: mmemo study, to repeat a pipeline over seeds and arms.
    """
    from mmemo.experiments.pipeline import run_pipeline

    root = run_pipeline(config, stages.overrides(context.args), only=only)
    page, made = root / "report.html", sorted(root.glob("*/report.html"))
    if made and not page.exists():  # the stage's own copy is the one that is kept
        shutil.copyfile(made[-1], page)
    if page.exists():
        from mmemo.report.page import print_results

        print_results(root)
        console.print(Text.assemble("\nReport: ", (str(page), "bold")), soft_wrap=True)


@_command("study train_configs/studies/preference/study.yaml --workers 2", panel=_RUNS)
def study(
    context: typer.Context,
    config: ConfigFile,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs at a time (workers).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate every arm and seed and list the runs.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only make the table and plots of finished runs.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Take no run from published results. Leave it out to resume."),
    ] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Let each run import the libraries anew, ten seconds slower each."
        ),
    ] = False,
) -> None:
    """Run a pipeline for every arm and seed of a study, and compare the arms.

    What arms or seeds share is made once, and every arm is tuned alike before. Each arm and seed
    has a folder of its own, so a study that was stopped or killed resumes, and a run that fails
    does not stop the others. Runs that the published results.json holds with the same config are
    not run again, so a study also goes on from a commit.

    Needs: a file with seeds, stages, arms (how each differs from the stages) and metrics.

    Writes: results.json, table.md with paired tests over seeds, tuning.json, tuning.md, and a plot
    for each metric.
    """
    from mmemo.experiments.study import COLD, check_study, run_study

    overrides = stages.overrides(context.args)
    overrides += [] if workers is None else [f"--workers={workers}"]
    stages.quiet()
    if check:
        check_study(config, overrides)
    else:
        run_study(config, overrides, command=COLD if cold else None, report=report, fresh=fresh)


_command("check train_configs/small_real/sft.yaml --data.manifests=[my/train.jsonl]")(check)


@_command("export runs/quickstart/emotion --for peft --out out/peft", overrides=False)
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A stage's output folder, or its 'final' folder.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="peft|vllm|merged",
            help="Who loads it: an adapter for PEFT or for vLLM, or merged weights. Needs --out.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what --for names here.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Number type of the weights; default: as trained.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            help="Base model that the adapter names; default: the hub id that the run began with, "
            "or else the saved base's absolute path.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the PEFT adapter with its connectors and a model card here."
        ),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the whole model as merged safetensors here."),
    ] = None,
) -> None:
    """Export a trained model as a PEFT adapter, as merged weights, or both.

    Needs: the output folder of a stage that trained a model.

    Writes: plain PEFT or Hugging Face folders, with the SHA-256 of every file in manifest.json, and
    a model card that shows how PEFT, vLLM and mmemo load them.
    """
    from mmemo.export.stage import export_to, parse_request

    outs, number_type = parse_request(target, out, dtype, adapter=adapter, merged=merged)
    export_to(run, outs, dtype=number_type, base=base)


@_command("report runs/quickstart", overrides=False)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A pipeline's output folder.")],
    out: Annotated[
        Path | None, typer.Option(metavar="HTML", help="Output file; default: RUN/report.html.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about the results of a run.

    Needs: a folder that holds at least one evaluation.

    Writes: one HTML file that loads nothing from outside.
    """
    from mmemo.report.page import build_report

    page = build_report(run, out or run / "report.html")
    console.print(Text.assemble("Report: ", (str(page), "bold")), soft_wrap=True)


_command("compare runs/a/evaluation runs/b/evaluation runs/c/evaluation", overrides=False)(
    cli_tools.compare
)
_command("score predictions.csv --benchmark eval/dfew.py --data DFEW", overrides=False)(
    cli_tools.score
)
_command("leaderboard runs --output leaderboard.html", overrides=False)(cli_tools.leaderboard)


@_command("reliance runs/ca_mer runs/crema_d", overrides=False)
def reliance(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Output folders of evaluations, or folders of them."),
    ],
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all numbers to this file."),
    ] = None,
) -> None:
    """Print one table over all conflict benchmarks: does a model follow the voice or the face?

    For each benchmark and model: the accuracy where the voice is right, where the face is and where
    both agree, the worse side, the gap, and the signed reliance, with intervals.

    Needs: evaluations of benchmarks such as eval/ca_mer.py and eval/crema_d.py.
    """
    from mmemo.report.conflicts import print_reliance

    print_reliance(runs, json_)


@_command("manifest data/emodb.py --root EMODB --output emodb.jsonl", overrides=False)
def manifest(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Data set adapter, such as data/emodb.py.")
    ],
    root: Annotated[Path, typer.Option(metavar="DIR", help="The data set's folder.")],
    output: Annotated[Path, typer.Option(metavar="JSONL", help="The manifest to write.")],
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="The data set's split, such as train.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the adapter.")
    ] = None,
) -> None:
    """Turn a released data set into a manifest, and validate every row."""
    from mmemo.data.adapter import parse_options, run_manifest

    run_manifest(adapter, root, output, parse_options(option or [], split))


@_command("schema sft", overrides=False)
def schema(
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help=f"One of {', '.join([*STAGES, *COMPOSITES])}."),
    ],
) -> None:
    """Print the JSON schema of a stage's config: every key with its type, default and limits."""
    typer.echo(json.dumps(stages.config_class(stage).model_json_schema(), indent=2))


@_command("labels iemocap6 mer2023", overrides=False)
def labels(
    name: Annotated[
        str | None, typer.Argument(metavar="SET", help="A label set, such as meld.")
    ] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="The set to map SET's labels to.")
    ] = None,
) -> None:
    """Print the known label sets, the labels of one, or how one maps to another.

    A set's labels are printed with their codes in the data's files, their forms, and their place on
    the circumplex. A mapping says for each label what it becomes, or why it has no counterpart.
    """
    from mmemo.answers import label_sets

    if name is None:
        _print_rows(label_sets.set_table(), "Label sets")
    elif target is None:
        _print_rows(label_sets.label_table(name), label_sets.emotion_set(name).title)
    else:
        mapped = label_sets.mapping(name, target)
        _print_rows(mapped.table(), f"{mapped.source.title} to {mapped.target.title}")
        console.print(mapped.describe())


def _print_rows(rows: Sequence[Mapping[str, str]], title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


@app.command(rich_help_panel=_TOOLS)
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _complain(sentence: str) -> None:
    errors.print(Text.assemble(("error:", "red"), f" {sentence}"), soft_wrap=True)


def main() -> None:
    """Entry point: errors a user can cause are one sentence, without a traceback."""
    hush()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show, or that is no text at all, ends no command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    # leave() skips the shutdown of the interpreter, in which torch may abort a finished rank, or a
    # process in which a reward runs on after its time limit.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or running_on():
        from mmemo.train.distributed import leave

        leave(code)
    sys.exit(code)


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without ``--local_rank``, which older launchers add beside ``LOCAL_RANK``."""
    left: list[str] = []
    given = iter(arguments)
    for one in given:
        name, _, value = one.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value or next(given, "0"))
        else:
            left.append(one)
    return left


def _run() -> int:
    """Run the command line and return the exit code."""
    try:
        # In standalone mode, click reports usage errors in its own form and exits by itself.
        app(_without_local_rank(sys.argv[1:]), standalone_mode=False)
    except MmemoError as error:
        _complain(str(error))
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:  # a run that was stopped, and has saved
        if isinstance(stop.code, str):  # a benchmark that is run as a script
            errors.print(Text(stop.code), soft_wrap=True)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}; check the path")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped; run the same command again to go on from what it has saved")
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        _complain(f"{error.format_message()}; see --help")  # pyright: ignore
        return 2
    return 0


if __name__ == "__main__":
    main()
