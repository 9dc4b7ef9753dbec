"""Runs a benchmark as a script: ``python eval/emorealm.py --model MODEL --data FILE ...``.

It does the same as ``mmemo eval`` with a config, any value of which can be overridden as there:
``--generation.max_new_tokens=16``.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mmemo.config import apply_overrides, parse
from mmemo.console import console, hush
from mmemo.errors import ConfigError, MmemoError
from mmemo.stages import stage

if TYPE_CHECKING:  # importing it imports torch
    from mmemo.evaluation.config import EvalConfig

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
        defaults: values of the ``mmemo eval`` config that the command line can override.
        find_data: maps the paths after ``--data`` to the ``data`` values of that config; unless
            given, the paths are the manifests.
    """
    hush()
    try:
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
    path = Path(benchmark).resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    given, overrides = _parser(path).parse_known_args(argv)
    # parse_known_args also returns mistyped options, which must not pass for overrides.
    for text in overrides:
        if not text.startswith("--") or "=" not in text:
            raise ConfigError(f"'{text}' is not understood; write --section.key=value, or see -h")
    name = str(given.name or given.model)
    folder = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    values: dict[str, Any] = {
        "output_dir": given.output_dir or str(Path("runs", path.stem, folder)),
        "name": name,
        **(defaults or {}),
        "model": {"path": given.model},
    }
    values["benchmark"] = {**values.get("benchmark", {}), "path": path.as_posix()}
    found = {"manifests": given.data} if find_data is None else find_data(given.data)
    values["data"] = {**values.get("data", {}), **found}
    if given.media_root is not None:
        values["data"]["media_root"] = given.media_root
    return parse(stage("eval").config_class, apply_overrides(values, overrides))  # pyright: ignore[reportReturnType]


def _parser(benchmark: Path) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"python {benchmark}",
        # Otherwise argparse takes a mistyped override for the option that it abbreviates.
        allow_abbrev=False,
        description="Evaluate a model on this benchmark, as `mmemo eval` does.",
        epilog="Any value of the `mmemo eval` config can be set with --section.key=value; "
        "`mmemo schema eval` lists them.",
    )
    parser.add_argument(
        "--model", required=True, help="folder or Hub id of a model, or folder of an adapter"
    )
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="files or folders with the benchmark's data",
    )
    parser.add_argument("--media-root", "--media_root", metavar="DIR", help="folder of the clips")
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        metavar="DIR",
        help=f"folder for the results (default: runs/{benchmark.stem}/MODEL)",
    )
    parser.add_argument("--name", help="name of this run in reports (default: MODEL)")
    return parser
