"""Runs a benchmark from its file and its data: ``mmemo eval eval/dfew.py --model M --data DIR``, or
the file as a script, ``python eval/dfew.py ...``.

It does the same as ``mmemo eval`` with a config, any value of which can be overridden as there:
``--generation.max_new_tokens=16``. The folder of a release becomes a manifest in the output folder,
``benchmark.jsonl``, so that ``mmemo eval OUTPUT_DIR/config.yaml`` repeats the run.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mmemo import content
from mmemo.config import apply_overrides, parse
from mmemo.console import console, hush
from mmemo.data.adapter import Excluded, parse_options, run_manifest
from mmemo.errors import ConfigError, MmemoError
from mmemo.evaluation.task import write_excluded
from mmemo.stages import stage

if TYPE_CHECKING:  # importing it imports torch
    from mmemo.evaluation.config import EvalConfig

MANIFEST = "benchmark.jsonl"
"""What a release's folder becomes in the output folder."""
FindData = Callable[[Sequence[str]], Mapping[str, Any]]


def run_zero_shot(
    benchmark: str | Path,
    argv: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    find_data: FindData | None = None,
) -> None:
    """Evaluate the model given on the command line on the content file ``benchmark``. Errors are
    printed in one sentence to stderr and end the process.

    Args:
        benchmark: the script's own ``__file__``.
        argv: the arguments, without the script's name.
        defaults: values of the ``mmemo eval`` config that the command line can override; by
            default the file's ``DEFAULTS``.
        find_data: maps the paths after ``--data`` to the ``data`` values of that config; by default
            the file's ``find_data``. Without either, the paths are the manifests.
    """
    hush()
    try:
        given, _ = _given(benchmark, argv)
        if given.dry_run:
            dry_run(given)
            return
        config = zero_shot_config(benchmark, argv, defaults, find_data)
        stage("eval").runner(config)
    except MmemoError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}; check the path")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to resume from the last answers")
    results = Path(config.output_dir) / "results.json"
    console.print(Text.assemble("\nResults: ", (str(results), "bold")), soft_wrap=True)


def zero_shot_config(
    benchmark: str | Path,
    argv: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    find_data: FindData | None = None,
) -> EvalConfig:
    """The config that a command line describes; see :func:`run_zero_shot`.

    Raises:
        ConfigError: an override or a value is wrong.
        SystemExit: the arguments are wrong, or ask for help.
    """
    given, overrides = _given(benchmark, argv)
    path = given.benchmark
    if given.model is None:
        raise ConfigError("give a model: --model FOLDER_OR_HUB_ID, or --dry-run to check the data")
    module = content.load_module(path.as_posix())
    defaults = getattr(module, "DEFAULTS", None) if defaults is None else defaults
    find_data = getattr(module, "find_data", None) if find_data is None else find_data
    name = str(given.name or given.model)
    folder = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    values: dict[str, Any] = {
        "output_dir": given.output_dir or str(Path("runs", path.stem, folder)),
        "name": name,
        **(defaults or {}),
        "model": {"path": given.model},
    }
    values["benchmark"] = {**values.get("benchmark", {}), "path": path.as_posix()}
    if hasattr(module, "samples"):  # it reads the release itself, so the options are its own
        overrides = [*(f"--benchmark.params.{option}" for option in given.option), *overrides]
        find_data = find_data or (lambda paths: {"manifests": list(paths)})
    if find_data is not None:
        found = find_data(given.data)
    else:
        output = Path(values["output_dir"])
        found = release_data(given.benchmark.as_posix(), given.data, given.option, output)
    values["data"] = {**values.get("data", {}), **found}
    if given.media_root is not None:
        values["data"]["media_root"] = given.media_root
    return parse(stage("eval").config_class, apply_overrides(values, overrides))  # pyright: ignore[reportReturnType]


def dry_run(given: Any) -> None:
    """Check a copy of a release without a model: rows left out, files that are missing or that no
    row names, label counts against the published ones, and clips without sound or picture.

    Raises:
        ConfigError, DataError: nothing can be asked about these data.
    """
    from mmemo.evaluation.copy_check import check_copy

    options = parse_options(given.option)
    check_copy(given.benchmark.as_posix(), given.data, options, given.media_root)


def release_data(
    benchmark: str,
    data: Sequence[str],
    options: Sequence[str],
    output: Path,
    *,
    need_clips: bool = True,
) -> Mapping[str, Any]:
    """The ``data`` values for the paths after ``--data``: manifests, or a release's folder, which
    the benchmark's adapter turns into one in ``output``.

    Args:
        options: ``KEY=VALUE`` texts for the adapter.
        need_clips: leave out the rows whose files are not in the folder.

    Raises:
        ConfigError, DataError: the paths or the options are wrong.
    """
    folders = [path for path in map(Path, data) if path.is_dir()]
    if not folders:
        if options:
            raise ConfigError("--option is for the folder of a release; --data names manifests")
        return {"manifests": list(data)}
    if len(data) > 1:
        raise ConfigError("give one folder after --data, or manifests only")
    adapter = adapter_of(benchmark)
    manifest = output / MANIFEST
    given = options_of(benchmark, parse_options(options))
    made = run_manifest(adapter, folders[0], manifest, given, need_clips=need_clips)
    missing = [Excluded(path, "missing file") for path in made.missing]
    write_excluded(manifest, [*made.excluded, *missing])
    return {
        "manifests": [manifest.as_posix()],
        "media_root": folders[0].as_posix(),
        "columns": columns_of_adapter(adapter),
    }


def columns_of_adapter(adapter: str) -> list[str]:
    """The row keys beyond the known ones that an adapter names."""
    return [*getattr(content.load_module(adapter), "COLUMNS", ())]


def benchmark_inputs(
    benchmark: str,
    data: Sequence[str],
    options: Sequence[str],
    output: Path,
    media_root: str | None = None,
    *,
    need_clips: bool = True,
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The benchmark's parameters and the ``data`` values, as ``mmemo eval`` finds them for the same
    paths and options.

    Args:
        need_clips: leave out the rows whose files are not in the folder.

    Raises:
        ConfigError, DataError: the paths or the options are wrong.
    """
    module = content.load_module(benchmark)
    defaults: Mapping[str, Any] = getattr(module, "DEFAULTS", {})
    params: Mapping[str, Any] = defaults.get("benchmark", {}).get("params", {})
    find_data: FindData | None = getattr(module, "find_data", None)
    if hasattr(module, "samples"):  # it reads the release itself, so the options are its own
        given = [f"--params.{key}={value}" for key, value in parse_options(options).items()]
        params = apply_overrides({"params": dict(params)}, given)["params"]
        found = find_data(data) if find_data is not None else {"manifests": list(data)}
    else:
        found = release_data(benchmark, data, options, output, need_clips=need_clips)
    values = {**defaults.get("data", {}), **found}
    return params, values if media_root is None else {**values, "media_root": media_root}


def adapter_of(benchmark: str) -> str:
    """The data set adapter of a benchmark: its ``ADAPTER``, or the file itself if it has ``rows``.

    Raises:
        ConfigError: it has neither.
    """
    module = content.load_module(benchmark)
    found = getattr(module, "ADAPTER", None)
    if found is None and not callable(getattr(module, "rows", None)):
        raise ConfigError(f"{benchmark} reads no folder of a release; give manifests after --data")
    return benchmark if found is None else str(found)


def options_of(benchmark: str, given: Mapping[str, str]) -> dict[str, str]:
    """The adapter's options: the benchmark's ``OPTIONS``, such as its split, and those given."""
    defaults: Mapping[str, str] = getattr(content.load_module(benchmark), "OPTIONS", {})
    return {**defaults, **given}


def _given(benchmark: str | Path, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """The options, with the benchmark's path in ``benchmark``, and the overrides.

    Raises:
        ConfigError: an argument is neither.
    """
    path = Path(benchmark)
    if path.is_absolute() or path.exists():
        path = path.resolve()
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    given, overrides = _parser(path).parse_known_args(argv)
    # The options of `mmemo eval` with a config hold here too.
    for option in stage("eval").options:
        value = getattr(given, option.flag.lstrip("-").replace("-", "_"))
        if option.override is not None and value not in (None, False):
            overrides.append("--" + option.override.format(value))
    # parse_known_args also returns mistyped options, which must not pass for overrides.
    for text in overrides:
        if not text.startswith("--") or "=" not in text:
            raise ConfigError(f"'{text}' is not understood; write --section.key=value, or see -h")
    given.benchmark = path
    return given, overrides


def _parser(benchmark: Path) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python {benchmark}",
        # Otherwise argparse takes a mistyped override for the option that it abbreviates.
        allow_abbrev=False,
        description="Evaluate a model on this benchmark, as `mmemo eval` does.",
        epilog="Any value of the `mmemo eval` config can be set with --section.key=value; "
        "`mmemo schema eval` lists them.",
    )
    parser.add_argument("--model", help="folder or Hub id of a model, or folder of an adapter")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="the folder of the release, or manifests",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the release's adapter, such as fold=1; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only check this copy of the data, without a model"
    )
    parser.add_argument("--media-root", "--media_root", metavar="DIR", help="folder of the clips")
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        metavar="DIR",
        help=f"folder for the results (default: runs/{benchmark.stem}/MODEL)",
    )
    parser.add_argument("--name", help="name of this run in reports (default: MODEL)")
    for option in stage("eval").options:
        how: dict[str, Any] = {"action": "store_true"}
        how = how if option.metavar is None else {"metavar": option.metavar}
        parser.add_argument(option.flag, help=option.help, **how)
    return parser
