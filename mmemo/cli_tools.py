"""Commands about finished evaluations and predictions; ``mmemo/cli.py`` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mmemo.config import load_config
from mmemo.console import console


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Output folders of two or more evaluations."),
    ],
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all numbers to this file."),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a table with one row per difference."),
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write a booktabs table of the runs, with intervals."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Confidence level, such as 0.95; as in the first run."),
    ] = None,
) -> None:
    """Compare evaluations question by question: the first minus each of the others.

    Each difference has an interval over speakers, a p-value where there are enough speakers (six at
    a confidence level of 95%), and Holm's p-value, which corrects everything that is printed
    together. Every setting in which two runs differ is named. The LaTeX table compares every pair
    of runs, and sets the best number in bold only if it is better than every other one by Holm's p.

    Needs: two or more evaluations of the same benchmark, read by the same parser.
    """
    from mmemo.report.comparison_files import write_csv, write_latex
    from mmemo.report.tables import compare_runs, write_comparison

    found = compare_runs(*runs, confidence=confidence)
    if json_ is not None:
        write_comparison(json_, found)
    if csv is not None:
        write_csv(csv, found)
    if latex is not None:
        write_latex(latex, found)


_Benchmark = Annotated[
    str | None, typer.Option(metavar="FILE", help="The benchmark, such as eval/dfew.py.")
]
_Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="The benchmark's release; no clip is needed.")
]
_Manifest = Annotated[
    list[str] | None, typer.Option(metavar="FILE", help="Manifests, in place of --data.")
]
_Option = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the release's adapter, as fold=1."),
]
_MediaRoot = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder that the paths of clips begin at, if needed."),
]
_Labels = Annotated[
    str | None,
    typer.Option(
        metavar="SET",
        help="In place of a benchmark, for a file that holds the truths: a label set, or labels "
        "between commas.",
    ),
]
_Format = Annotated[
    str | None, typer.Option(metavar="NAME", help="Format of the file; told by its content.")
]
_Id = Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="The column of ids.")]
_Text = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column of the model's texts.")
]
_Truth = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column of the right answers.")
]
_Judge = Annotated[
    Path | None,
    typer.Option(
        metavar="YAML", help="The judge of generated texts: base_url, model and api_key_env."
    ),
]
_ByPosition = Annotated[
    bool,
    typer.Option("--by-position", help="The nth prediction answers the nth row of the benchmark."),
]
_OutputDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the results; default: runs/BENCHMARK/FILE."),
]
_Name = Annotated[
    str | None, typer.Option(help="Name of this run in reports; default: the file's.")
]


def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of the predictions.")],
    benchmark: _Benchmark = None,
    data: _Data = None,
    manifest: _Manifest = None,
    option: _Option = None,
    media_root: _MediaRoot = None,
    labels: _Labels = None,
    format: _Format = None,
    id: _Id = None,
    text: _Text = None,
    truth: _Truth = None,
    by_position: _ByPosition = False,
    judge: _Judge = None,
    output_dir: _OutputDir = None,
    name: _Name = None,
) -> None:
    """Score predictions that were made elsewhere, as if mmemo had made them.

    Reads JSON Lines (sample_id, and raw, prediction or answer), CSV, TSV and Excel tables, result
    files of VLMEvalKit, sample logs of lmms-eval, and AffectGPT's npz. Ids are matched exactly,
    then by file name, never by position unless asked for. Questions without a prediction count as
    wrong; what fits nothing is counted, shown, and listed in unmatched.jsonl.

    Writes: predictions.jsonl and results.json, as mmemo eval does.

    Next: mmemo compare, mmemo leaderboard or mmemo report with this folder.
    """
    from mmemo.evaluation.elsewhere.prediction import Columns
    from mmemo.evaluation.elsewhere.score import Asked, Predictions, score_file
    from mmemo.rewards.judge.openai_client import EndpointConfig

    endpoint = None if judge is None else load_config(EndpointConfig, judge)
    paths = [*([] if data is None else [data]), *(manifest or [])]
    score_file(
        Predictions(file, format, Columns(id, text, truth), by_position),
        Asked(benchmark, paths, option or [], media_root, labels, endpoint),
        output_dir,
        name,
    )


def leaderboard(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with evaluations at any depth.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="HTML", help="Output file; default: DIR/leaderboard.html."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Write one self-contained HTML page with a sortable table for each benchmark.

    Needs: a folder that holds finished evaluations, also those of mmemo score.

    Writes: one HTML file that loads nothing from outside.
    """
    from mmemo.report.leaderboard import build_leaderboard

    page = build_leaderboard(folder, output or folder / "leaderboard.html", title=title)
    console.print(Text.assemble("Leaderboard: ", (str(page), "bold")), soft_wrap=True)
