"""The table over all tasks of a benchmark that has one, such as MER-UniBench's mean of nine sets.

A benchmark's file may have ``SUMMARY``, a function that maps the tasks of ``results.json`` to
``{column: {row: number or None}}``. It is ``summary`` in ``results.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from mmemo import content
from mmemo.console import console
from mmemo.evaluation.benchmark import Benchmark

Summary = Mapping[str, Mapping[str, float | None]]


def summary_of(benchmark: Benchmark, tasks: Mapping[str, Mapping[str, Any]]) -> Summary:
    """The table of a declared benchmark; empty where its file has none."""
    if not benchmark.tasks or benchmark.file.startswith("labels:"):
        return {}
    make: Callable[..., Summary] | None
    make = getattr(content.load_module(benchmark.file), "SUMMARY", None)
    return {} if make is None else make(tasks)


def print_summary(summary: Summary) -> None:
    """Print the table, shares in percent; nothing where it is empty."""
    if not summary:
        return
    table = Table("", *summary, title="All tasks")
    for row in dict.fromkeys(row for column in summary.values() for row in column):
        values = (column.get(row) for column in summary.values())
        table.add_row(row, *("-" if one is None else f"{100 * one:.2f}" for one in values))
    console.print(table)
