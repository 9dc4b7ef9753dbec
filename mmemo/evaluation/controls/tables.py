"""The controls of an evaluation as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mmemo.evaluation.controls.summary import TITLES
from mmemo.evaluation.scoring import Block
from mmemo.formats import (
    p_value,
    percent,
    plain,
    plain_signed,
    plain_span,
    signed,
    signed_span,
    span,
)

_WIDTH = 34


def control_table(task: str, block: Block, tests: int) -> Table:
    """The model and its baselines on one task."""
    table = _table(f"Baselines: {task}", block)
    table.caption = (
        f"n = {block['n']}. Difference: the model minus the baseline, paired, with its interval; "
        f"p after Holm's correction over {tests} tests. The other streams are left out of the "
        "prompt."
    )
    _add_numbers(table, block)
    return table


def paraphrase_table(task: str, block: Block, tests: int) -> Table:
    """The wordings of one task, their mean and their range."""
    table = _table(f"Wordings: {task}", block)
    engine = any(row.get("by") == "engine" for row in block["rows"])
    framed = (
        " The engine framed the question, as the benchmark has no paraphrase." if engine else ""
    )
    table.caption = (
        f"n = {block['n']}; {percent(block['alike']['value'])} % of the answers are alike in all "
        f"wordings. p after Holm's correction over {tests} tests.{framed}"
    )
    _add_numbers(table, block)
    share = _share(block)
    for name, key in (("Mean", "mean"), ("Lowest", "lowest"), ("Highest", "highest")):
        cells: list[str] = []
        for metric in block["metrics"]:
            value = block["over"][metric][key]
            cells += [percent(value) if share else plain(value), "", "", ""]
        table.add_row(Text(name, style="bold"), *cells)
    return table


def robustness_table(task: str, block: Block, tests: int) -> Table:
    """The edits of one task."""
    table = _table(f"Small edits: {task}", block, unchanged=True)
    moved = "" if block["scale"] is None else " (moved by less than 0.05 of the scale)"
    table.caption = (
        f"n = {block['n']}. Unchanged: percent of the answers that the edit does not change{moved}."
        f" Difference: the plain clips minus the edited ones, paired; p after Holm's correction "
        f"over {tests} tests."
    )
    _add_numbers(table, block, unchanged=True)
    return table


def groups_table(tasks: Mapping[str, Block]) -> Table | None:
    """The worst of the balanced groups of each task; None where there are none."""
    table = Table(title="Balanced groups", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "Gap: between the best and the worst group. Chance: the largest gap in simulations of a "
        "model that guesses, and of one that is as good as this one and knows no groups."
    )
    for name in ("", "Metric", "Worst", "Best"):
        table.add_column(name, no_wrap=True)
    for name in ("Gap", "Chance", "Beyond", "Groups × n"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, block in tasks.items():
        for key, found in block.get("balanced_groups", {}).items():
            for metric, one in found["metrics"].items():
                groups, chance = one["groups"], one["chance"]
                worst, best = one["worst"], one["best"]
                levels = "; ".join(plain(chance[kind]["gap"]) for kind in chance)
                table.add_row(
                    *(f"{task}, {key}", metric.upper()),
                    f"{worst} ({plain(groups[worst]['value'])})",
                    f"{best} ({plain(groups[best]['value'])})",
                    *(plain(one["gap"]), levels, "yes" if one["beyond_chance"] else "no"),
                    f"{len(found['n'])} × {found['balanced_to']}",
                )
    return table if table.row_count else None


def _table(title: str, block: Block, *, unchanged: bool = False) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("", max_width=_WIDTH)
    if unchanged:
        table.add_column("Unchanged", justify="right", no_wrap=True)
    for metric in block["metrics"]:
        title = TITLES.get(metric, metric.upper())
        for name in (title, "Difference", "Interval", "p"):
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_numbers(table: Table, block: Block, *, unchanged: bool = False) -> None:
    share = _share(block)
    for row in block["rows"]:
        cells: list[Text | str] = []
        if unchanged:
            cells.append(_with_span(row.get("unchanged"), share=True))
        for metric in block["metrics"]:
            cells += _metric_cells(row, metric, share)
        name = str(row.get("title", row["name"]))
        table.add_row(Text(name, style="bold" if row["kind"] == "model" else ""), *cells)


def _metric_cells(row: Block, metric: str, share: bool) -> Sequence[Text | str]:
    gap = row.get("differences", {}).get(metric)
    value = _with_span(row["values"][metric], share=share)
    if gap is None:
        return [value, "", "", ""]
    told = signed(gap["value"]) if share else plain_signed(gap["value"])
    between = signed_span(gap) if share else _signed_plain_span(gap)
    return [value, told, between, p_value(gap["p_holm"])]


def _with_span(found: Block | None, *, share: bool) -> Text:
    if found is None:
        return Text("")
    text = Text(percent(found["value"]) if share else plain(found["value"]))
    between = span(found) if share else plain_span(found)
    if between:
        text.append(f"\n{between}", style="dim")
    return text


def _signed_plain_span(gap: Block) -> str:
    if gap["low"] is None:
        return ""
    return f"{plain_signed(gap['low'])} to {plain_signed(gap['high'])}"


def _share(block: Block) -> bool:
    """Whether the metrics are percentages: those of labels are, others only if they say so."""
    found = [row["values"][metric] for row in block["rows"] for metric in block["metrics"]]
    return all(one.get("share", True) for one in found)
