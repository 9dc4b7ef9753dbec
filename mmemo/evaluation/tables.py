"""The results table at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mmemo.evaluation.overview import Run

COLUMNS: Mapping[str, str] = {
    "average": "Average",
    "video_aligned": "Video-aligned",
    "audio_aligned": "Audio-aligned",
    "consistent": "Consistent",
    "conflict_average": "Conflict",
    "uar": "UAR",
    "weighted_f1": "Weighted F1",
    "macro_f1": "Macro F1",
}
"""Columns of the results tables. ``average`` is the headline: the mean of the subsets."""


def number(block: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """The interval that stands in a column, or None where the run has none."""
    if column in ("average", "conflict_average"):
        return block.get(column)
    if column in block.get("subsets", {}):
        return block["subsets"][column]["war"]
    return block["metrics"].get(column)


def columns_of(runs: Sequence[Run]) -> list[str]:
    """The columns that some run has a number for."""
    return [name for name in COLUMNS if any(number(run.block, name) for run in runs)]


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 as ``12.3``, None as a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def span(found: Mapping[str, Any] | None) -> str:
    """The interval as ``70.1–78.0``, empty where there is none."""
    if found is None or found["low"] is None:
        return ""
    return f"{percent(found['low'])}–{percent(found['high'])}"


def results_table(runs: Sequence[Run], *, title: str = "", width: int = 100) -> Table:
    """Models above, baselines below; percent, with the interval in a dim second line. The less
    telling columns are left to the report where ``width`` characters do not hold them."""
    block = runs[0].block
    caption = (
        f"Percent, with intervals from {block['clusters']} speakers; n = {block['n']}. "
        "Average: mean of the subsets."
    )
    table = Table(title=title or None, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    names = _fitting(runs, width)
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    for name in names:
        table.add_column(_header(name), justify="right", no_wrap=True)
    table.add_column("Unread", justify="right", no_wrap=True)
    for index, run in enumerate(runs):
        cells = [_cell(number(run.block, name), bold=run.role == "model") for name in names]
        unread = run.block["statuses"]["refused"] + run.block["statuses"]["malformed"]
        last = index + 1 < len(runs) and run.role != runs[index + 1].role
        label = Text(run.name, style="bold" if run.role == "model" else "")
        table.add_row(label, *cells, str(unread), end_section=last)
    return table


_NAME_WIDTH = 26
_PRIORITY = (
    *("average", "video_aligned", "audio_aligned", "consistent"),
    *("uar", "weighted_f1", "conflict_average", "macro_f1"),
)


def _fitting(runs: Sequence[Run], width: int) -> list[str]:
    """The most telling columns that fit beside the names, in the order of COLUMNS."""
    gap = 3
    used = min(_NAME_WIDTH, max(len(run.name) for run in runs)) + gap + len("Unread")
    names: list[str] = []
    for name in sorted(columns_of(runs), key=_PRIORITY.index):
        cells = [span(number(run.block, name)) for run in runs]
        used += max(5, *map(len, [*cells, *_header(name).splitlines()])) + gap
        if used <= width:
            names.append(name)
    return sorted(names, key=list(COLUMNS).index)


def _header(name: str) -> str:
    return COLUMNS[name].replace(" ", "\n").replace("-", "-\n")


def _cell(found: Mapping[str, Any] | None, *, bold: bool) -> Text:
    if found is None:
        return Text("–", style="dim")
    text = Text(percent(found["value"]), style="bold" if bold else "")
    interval = span(found)
    if interval:
        text.append("\n" + interval, style="dim not bold")
    return text
