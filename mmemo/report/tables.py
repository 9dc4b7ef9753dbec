"""The tables of ``mmemo compare``: finished evaluations side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mmemo import files
from mmemo.config import parse
from mmemo.console import console
from mmemo.evaluation.clusters import claim_notes
from mmemo.evaluation.metrics import SCALARS
from mmemo.evaluation.results import Comparison, compare, read_results
from mmemo.evaluation.scoring import SUBSETS, Block
from mmemo.evaluation.tables import COLUMNS
from mmemo.formats import (
    counted,
    level,
    p_value,
    percent,
    plain,
    plain_signed,
    plain_span,
    signed,
    signed_span,
)
from mmemo.statistics import BootstrapConfig


def compare_runs(*folders: Path, confidence: float | None = None) -> list[Comparison]:
    """Print the paired comparisons of the first evaluation folder with each of the others, task by
    task: the numbers of both on the questions that both answered, the difference with its interval,
    p and Holm's p, and every setting in which the runs differ. Open questions are compared by their
    scores only.

    Args:
        confidence: confidence level; by default that of the first run.

    Raises:
        EvaluationError: a folder holds no evaluation, or the runs cannot be compared.
        ConfigError: ``confidence`` is out of bounds.
    """
    results = [read_results(folder) for folder in folders]
    config = None
    if results and confidence is not None:
        given = {**results[0].bootstrap.model_dump(), "confidence": confidence}
        config = parse(BootstrapConfig, given, where="compare")
    found = compare(*results, config=config)
    for place, one in enumerate(found):
        letter = chr(ord("B") + place) if place < 25 else f"run {place + 2}"
        for task, block in one.tasks.items():
            console.print()
            if "differences" in block:
                console.print(comparison_table(task, block, one, letter))
            else:
                title = f"Open questions: {task}, A {one.first.name}, {letter} {one.other.name}"
                console.print(title, style="bold")
            if block["scored"]:
                console.print(scored_comparison_table(block, letter))
            if block["scores"] or block["unlike_scores"]:
                console.print(score_comparison_table(block, letter))
            for note in comparison_notes(one, block):
                console.print(note, style="yellow")
        console.print(unlike_table(one, letter) if one.unlike else "The runs differ in no setting.")
    return found


def write_comparison(path: Path, found: Sequence[Comparison]) -> None:
    """Write all numbers of some comparisons as JSON."""
    values = {"comparisons": [one.row() for one in found]}
    files.write_whole(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def comparison_notes(one: Comparison, block: Block) -> list[str]:
    """What a reader of one comparison must know, in whole sentences."""
    notes = claim_notes(block["clusters"], block["cluster_words"], one.config, one.tests)
    if block["reworded"]:
        notes.append(f"{counted(block['reworded'], 'question')} had other words in the other run.")
    return notes


def unlike_table(one: Comparison, letter: str) -> Table:
    """The settings in which two runs differ."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.title, table.title_justify = "In what the runs differ", "left"
    for name in ("", "A", letter):
        table.add_column(name, overflow="fold")
    for name, ours, theirs in one.unlike:
        table.add_row(name, _setting(ours), _setting(theirs))
    return table


def _setting(value: Any) -> Text:
    """A setting's value; a hash is known by its first digits."""
    text = "–" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return Text(f"{text[:12]}…" if is_hash else text)


def comparison_table(task: str, block: Block, one: Comparison, letter: str = "B") -> Table:
    """A paired comparison with one row per number: run A, the other run, and their difference."""
    sides = Text("")
    for name, result in (("A", one.first), (letter, one.other)):
        sides.append(f"{name}  {result.name}", style="bold").append(f"  {result.folder}\n", "dim")
    sides.append(f"Task: {task}")
    alone = block["discordant"]
    caption = (
        f"{block['n']} questions answered by both runs; {block['unpaired']} others left out. "
        f"Percent; differences in points with {level(one.config.confidence)} intervals over "
        f"{block['cluster_words']}; p is two-sided, from exchanging the runs' answers in whole "
        f"clusters, and Holm's p corrects all {one.tests} that are shown. Only A is right on "
        f"{alone['only_a']} questions, only {letter} on {alone['only_b']}."
    )
    table = Table(title=sides, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.title_justify = table.caption_justify = "left"
    table.title_style = ""
    table.add_column("", no_wrap=True)
    for name in ("A", letter, f"A − {letter}", "Interval", "p", "Holm", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {**COLUMNS, "none": "No conflict field", **SCALARS}
    order = ["average", *SUBSETS, "conflict_average", *SCALARS]
    for name in (name for name in order if name in block["differences"]):
        gap = block["differences"][name]
        cells = (percent(gap["a"]), percent(gap["b"]), signed(gap["value"]), signed_span(gap))
        last = name in ("average", "conflict_average")
        table.add_row(
            names[name], *cells, p_value(gap["p"]), p_value(gap["p_holm"]), str(gap["n"]),
            end_section=last,
            style="bold" if name == "average" else "",
        )  # fmt: skip
    return table


def score_comparison_table(block: Block, letter: str = "B") -> Table:
    """The paired comparison of the scores that both runs have."""
    caption = "Scores on the questions for which both answers have one."
    if block["unlike_scores"]:
        caption += (
            f" Left out because the two runs computed them differently: "
            f"{', '.join(block['unlike_scores'])}."
        )
    table = Table(caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("A", letter, f"A − {letter}", "Interval", "p", "Holm", "n", "No\nscore"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in block["scores"].items():
        cells = (plain(one["a"]), plain(one["b"]), plain_signed(one["value"]), plain_span(one))
        tests = (p_value(one["p"]), p_value(one["p_holm"]))
        table.add_row(name, *cells, *tests, str(one["n"]), str(one["unscored"]))
    return table


def scored_comparison_table(block: Block, letter: str = "B") -> Table:
    """The paired comparison of the metrics of the task's scorers."""
    left_out = sorted({one["unscored"] for one in block["scored"].values()})
    caption = "Metrics over shares are in percent, and their differences in points."
    if any(left_out):
        caption += (
            f" Left out: {' or '.join(map(str, left_out))} questions for which one of both answers "
            "has no value."
        )
    table = Table(caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.caption_justify = "left"
    table.add_column("", overflow="fold")
    for name in ("A", letter, f"A − {letter}", "Interval", "p", "Holm", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in block["scored"].items():
        if one["share"]:
            cells = (percent(one["a"]), percent(one["b"]), signed(one["value"]), signed_span(one))
        else:
            cells = (plain(one["a"]), plain(one["b"]), plain_signed(one["value"]), plain_span(one))
        tests = (p_value(one["p"]), p_value(one["p_holm"]))
        table.add_row(Text(name), *cells, *tests, str(one["n"]))
    return table
