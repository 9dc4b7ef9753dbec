"""The command line: parse, call, print. Each verb's work lives beside its config class."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mmemo import __version__, content, stages
from mmemo.config import Config, apply_overrides, load_config, parse, read_yaml, save_resolved
from mmemo.console import console, errors, hush
from mmemo.errors import MmemoError
from mmemo.stages import OF_VERBS, VERBS, config_class, config_classes, guess_verb, quiet, runner

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Fine-tune and align multimodal LLMs that see the face, hear the voice and understand "
        "emotion.\n\nA verb that takes CONFIG takes one YAML file, and any value in it can be set "
        "on the command line: [bold]mmemo sft CONFIG --train.learning_rate=1e-4[/bold]. "
        "[bold]mmemo schema VERB[/bold] lists every key that a verb's config knows."
    ),
)

_ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; looked up here, then as shipped.")
]
_Run = Annotated[
    str | None,
    typer.Option("--run", metavar="DIR", help="What ${run} stands for in the config."),
]
_Processes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Ranks to start on this node (run.processes)."),
]
_OVERRIDABLE: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def _example(command: str) -> str:
    return f"Example: mmemo {escape(command)}. Set any value of CONFIG with --section.key=value."


def _command(example: str, name: str | None = None) -> Callable[[Any], Any]:
    """A command that takes overrides."""
    return app.command(name, context_settings=_OVERRIDABLE, epilog=_example(example))


def _load(verb: str, path: Path, context: typer.Context, run: str | None) -> Config:
    overrides = _overrides(context)
    return load_config(config_class(verb), content.find(path), overrides, _variables(run))


def _variables(run: str | None) -> dict[str, str]:
    """Outside a pipeline ``${run}`` is what ``--run`` says, and ``${seed}`` is 0."""
    return {"seed": "0"} if run is None else {"run": run, "seed": "0"}


def _overrides(context: typer.Context) -> list[str]:
    return stages.overrides(context.args)


@_command("pipeline train_configs/quickstart/pipeline.yaml --seed=1")
def pipeline(
    context: typer.Context,
    config: _ConfigFile,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Run just this stage.")] = None,
) -> None:
    """Run named stages in order; what is done and unchanged is skipped, what was cut goes on."""
    from mmemo.experiments.pipeline import run_pipeline

    root = run_pipeline(config, _overrides(context), _run_stage, only=only, known=config_classes())
    page, made = root / "report.html", sorted(root.glob("*/report.html"))
    if made and not page.exists():  # the stage's own copy is the one that is kept
        shutil.copyfile(made[-1], page)
    if page.exists():
        from mmemo.report.page import print_results

        print_results(root)
        console.print(f"\nReport: [bold]{page}[/bold]")


@_command("study my_study.yaml --workers 2")
def study(
    context: typer.Context,
    config: _ConfigFile,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs at a time (workers).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate every arm and seed, list the runs, stop.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only make table and plots of the runs that are done.")
    ] = False,
) -> None:
    """Run arms x seeds, what they share once; write results, a table with tests, and plots.

    Each arm and seed is a pipeline in a folder of its own, so a study that was stopped or killed
    goes on where it was, and a run that failed does not stop the others.
    """
    from mmemo.experiments.study import check_study, run_study

    overrides = _overrides(context) + ([] if workers is None else [f"--workers={workers}"])
    quiet()
    if check:
        check_study(config, overrides, config_classes())
    else:
        run_study(config, overrides, config_classes(), report=report)


def _run_stage(verb: str, values: dict[str, Any]) -> None:
    config = parse(config_class(verb), values)
    if verb in ("sft", "grpo", "dpo", "reward-model"):
        _train(verb, config)
    else:
        runner(verb)(config)


def _train(verb: str, config: Any) -> None:
    """Train here, or start the ranks: each runs this verb on the same resolved config."""
    from mmemo.train.distributed import in_launch, launch

    if config.run.processes == 1 or in_launch():
        runner(verb)(config)
        return
    resolved = Path(config.output_dir) / "launch.yaml"
    save_resolved(config, resolved)
    launch([verb, str(resolved)], config.run.processes)


@_command("world train_configs/quickstart/world.yaml --preview sheet.png")
def world(
    context: typer.Context,
    config: _ConfigFile,
    run: _Run = None,
    preview: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Write a contact sheet instead of the data set."),
    ] = None,
) -> None:
    """Write a synthetic audiovisual data set with known truth: mp4 files and manifests."""
    loaded: Any = _load("world", config, context, run)
    if preview is None:
        runner("world")(loaded)
        return
    from mmemo.world.preview import preview as draw

    draw(loaded, preview)
    console.print(f"Contact sheet: [bold]{preview}[/bold]")


@_command("towers train_configs/quickstart/towers.yaml --run runs/quickstart")
def towers(context: typer.Context, config: _ConfigFile, run: _Run = None) -> None:
    """Train small video, audio and face encoders from scratch on known attributes."""
    runner("towers")(_load("towers", config, context, run))


@_command("encode train_configs/quickstart/encode.yaml --run runs/quickstart --dry-run")
def encode(
    context: typer.Context,
    config: _ConfigFile,
    run: _Run = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast the size on disk; write nothing.")
    ] = False,
) -> None:
    """Fill the feature store ahead of training: each clip is decoded and encoded once."""
    path = content.find(config)
    values = apply_overrides(read_yaml(path, _variables(run)), _overrides(context))
    verb = guess_verb(values)
    if verb in ("sft", "grpo"):  # the clips and the model of a training stage
        parse(config_class(verb), values, where=str(path))
        values = {key: values[key] for key in config_class("encode").model_fields if key in values}
    runner("encode")(parse(config_class("encode"), values, where=str(path)), dry_run=dry_run)


@_command("sft train_configs/small_real/sft.yaml --train.learning_rate=1e-4")
def sft(
    context: typer.Context, config: _ConfigFile, run: _Run = None, processes: _Processes = None
) -> None:
    """Supervised fine-tuning of one curriculum stage. Resumes by itself after a kill."""
    if processes is not None:
        context.args.append(f"--run.processes={processes}")
    _train("sft", _load("sft", config, context, run))


@_command("grpo train_configs/quickstart/grpo.yaml --run runs/quickstart")
def grpo(
    context: typer.Context, config: _ConfigFile, run: _Run = None, processes: _Processes = None
) -> None:
    """Improve an SFT model by rewards, with progressive trust. Resumes by itself after a kill."""
    if processes is not None:
        context.args.append(f"--run.processes={processes}")
    _train("grpo", _load("grpo", config, context, run))


@_command("dpo train_configs/quickstart/dpo.yaml --run runs/quickstart")
def dpo(
    context: typer.Context, config: _ConfigFile, run: _Run = None, processes: _Processes = None
) -> None:
    """Prefer what a clip shows over spurious and imagined cues. Resumes by itself after a kill."""
    if processes is not None:
        context.args.append(f"--run.processes={processes}")
    _train("dpo", _load("dpo", config, context, run))


@_command("pairs train_configs/quickstart/pairs.yaml --run runs/quickstart")
def pairs(context: typer.Context, config: _ConfigFile, run: _Run = None) -> None:
    """Make preference pairs with worse answers and inputs; check what tells them apart."""
    runner("pairs")(_load("pairs", config, context, run))


@_command(
    "reward-model train_configs/quickstart/reward_model.yaml --run runs/judge", name="reward-model"
)
def reward_model(
    context: typer.Context, config: _ConfigFile, run: _Run = None, processes: _Processes = None
) -> None:
    """Train a judge of reasoning on graded answers and report how well it is calibrated."""
    if processes is not None:
        context.args.append(f"--run.processes={processes}")
    _train("reward-model", _load("reward-model", config, context, run))


@_command("eval train_configs/quickstart/eval.yaml --run runs/quickstart", name="eval")
def evaluate(
    context: typer.Context,
    config: _ConfigFile,
    run: _Run = None,
    reliance: Annotated[
        bool, typer.Option("--reliance", help="Also measure which modalities answers hang on.")
    ] = False,
) -> None:
    """Answer a benchmark with a model and score it, with intervals and conflict subsets.

    Goes on where it was cut. Reward functions listed under 'scores' grade whole answers too.
    """
    if reliance:
        context.args.append("--reliance.enabled=true")
    runner("eval")(_load("eval", config, context, run))


@_command("check train_configs/small_real/sft.yaml --data.manifests=[my/train.jsonl]")
def check(
    context: typer.Context,
    config: _ConfigFile,
    run: _Run = None,
    verb: Annotated[
        str | None,
        typer.Option(metavar="VERB", help="What the config is for; guessed when left out."),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also open every media file.")] = False,
) -> None:
    """Validate a config and its data without training: samples, lengths, memory, disk."""
    from mmemo.check.run import run_check
    from mmemo.experiments.study import VARIABLES

    path = content.find(config)
    quiet()
    verb = verb or guess_verb(read_yaml(path, later=VARIABLES))
    if verb == "study":
        from mmemo.experiments.study import check_study

        check_study(path, _overrides(context), config_classes())
        return
    if verb == "pipeline":
        from mmemo.experiments.pipeline import check_pipeline

        check_pipeline(path, _overrides(context), config_classes())
        return
    values = apply_overrides(read_yaml(path, _variables(run)), _overrides(context))
    run_check(parse(config_class(verb), values, where=str(path)), probe=probe)


@app.command(epilog="Example: mmemo export runs/quickstart/emotion --adapter out/adapter")
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A stage's output folder, or its 'final' folder.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the PEFT adapter, connectors and model card."),
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write full merged safetensors.")
    ] = None,
) -> None:
    """Export a trained run as a PEFT adapter, as merged weights, or both."""
    from mmemo.export import export_run

    export_run(run, adapter=adapter, merged=merged)


@app.command(epilog="Example: mmemo report runs/quickstart")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A pipeline's output folder.")],
    out: Annotated[
        Path | None, typer.Option(metavar="HTML", help="Default: RUN/report.html.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a pipeline's results."""
    from mmemo.report.page import build_report

    console.print(f"Report: [bold]{build_report(run, out or run / 'report.html')}[/bold]")


@app.command(epilog="Example: mmemo compare runs/a/evaluation runs/b/evaluation")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's output folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
) -> None:
    """Compare two evaluations question by question: A minus B, with intervals and p-values."""
    from mmemo.report.tables import compare_runs

    compare_runs(first, second)


@app.command(epilog="Example: mmemo manifest data/emodb.py --root EMODB --output emodb.jsonl")
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


@app.command(epilog="Example: mmemo schema sft")
def schema(
    verb: Annotated[
        str, typer.Argument(metavar="VERB", help=f"One of {', '.join([*VERBS, *OF_VERBS])}.")
    ],
) -> None:
    """Print the JSON schema of a verb's config, with every key, type, default and limit."""
    typer.echo(json.dumps(config_class(verb).model_json_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _complain(sentence: str) -> None:
    errors.print(f"[red]error:[/red] {escape(sentence)}", soft_wrap=True)


def main() -> None:
    """Entry point: errors a user can cause are one sentence, without a traceback."""
    hush()
    code = _run()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from mmemo.train.distributed import leave

        leave(code)
    sys.exit(code)


def _run() -> int:
    """Do what the command line says; the exit code."""
    try:
        app(standalone_mode=False)
    except MmemoError as error:
        _complain(str(error))
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:  # a run that was stopped, and has saved
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError as error:
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}; check the path")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped; run the same command again to go on from the last checkpoint")
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        _complain(f"{error.format_message()}; see --help")  # pyright: ignore
        return 2
    return 0


if __name__ == "__main__":
    main()
