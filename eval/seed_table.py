"""Markdown table over pipeline runs with different seeds: python eval/seed_table.py RUN [RUN ...]

One row a run: the conflict-plus-consistent average of the model and of each baseline with its 95%
interval (bootstrap over speakers), and whether the model's interval lies above every baseline's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmemo.evaluation.overview import read_run


def cell(number: dict[str, float]) -> str:
    """A number with its interval, in percent."""
    return f"{100 * number['value']:.1f} ({100 * number['low']:.1f}–{100 * number['high']:.1f})"


def main(folders: list[str]) -> None:
    """Print the table."""
    header: list[str] = []
    lines: list[str] = []
    for folder in folders:
        runs = read_run(Path(folder)).runs
        ours, others = runs[0].block, runs[1:]
        if not header:
            names = [run.name for run in runs]
            header = ["run", *names, "conflict clips", "apart"]
            lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        apart = all(ours["average"]["low"] > run.block["average"]["high"] for run in others)
        cells = [Path(folder).name, *(cell(run.block["average"]) for run in runs)]
        cells += [cell(ours["conflict_average"]), "yes" if apart else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
