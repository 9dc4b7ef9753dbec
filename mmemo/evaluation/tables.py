"""The results of evaluations as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mmemo.answers.parsing import STATUSES
from mmemo.console import console
from mmemo.evaluation.results import EvalResult, EvaluatedRun, claim_notes_of
from mmemo.evaluation.scoring import Block
from mmemo.formats import (
    confidence,
    p_value,
    percent,
    plain,
    plain_signed,
    plain_span,
    signed,
    signed_span,
    span,
    spoken,
)

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
"""Key to title of the columns of results tables. ``average`` is the headline: the mean over the
conflict subsets."""


_SLICED = {"war": "WAR", "uar": "UAR", "weighted_f1": "Weighted F1"}
_MOST_VALUES = 15  # rows of a field in the table of slices


def number(block: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """The number of a column with its interval; None where the run does not have it."""
    if column in ("average", "conflict_average"):
        return block.get(column)
    if column in block.get("subsets", {}):
        return block["subsets"][column]["war"]
    return block.get("metrics", {}).get(column)


def columns_of(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The columns for which at least one run has a number."""
    return [name for name in COLUMNS if any(number(run.block, name) for run in runs)]


def results_table(runs: Sequence[EvaluatedRun], *, title: str = "", width: int = 100) -> Table:
    """Results in percent, models above baselines, with the interval in a dim second line.

    Where the columns do not fit into ``width`` characters, the least important ones are left out;
    the report has them all.
    """
    results = [run.result for run in runs if run.result is not None]
    caption = (
        f"Percent with {confidence(results)} intervals over {results[0].cluster_words}; "
        f"n = {runs[0].block['n']}."
    )
    if runs[0].block["subsets"]:
        caption += " Average: mean over the subsets."
    table = Table(title=title or None, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    names = _fitting(runs, width)
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    for name in names:
        table.add_column(_header(name), justify="right", no_wrap=True)
    table.add_column("Invalid", justify="right", no_wrap=True)
    for index, run in enumerate(runs):
        cells = [_cell(number(run.block, name), bold=run.role == "model") for name in names]
        invalid = run.block["statuses"]["refused"] + run.block["statuses"]["malformed"]
        last = index + 1 < len(runs) and run.role != runs[index + 1].role
        label = Text(run.name, style="bold" if run.role == "model" else "")
        table.add_row(label, *cells, str(invalid), end_section=last)
    return table


def print_results(runs: Sequence[EvaluatedRun], *, title: str = "") -> None:
    """Print the results table, or one table per reading where the benchmark has readings; then the
    scores and the open questions, where a run has some."""
    readings = readings_of(runs)
    for reading in readings:
        console.print(readings_table(runs, *reading))
    if not readings and runs[0].block["labels"]:
        console.print(results_table(runs, title=title, width=console.width))
    for task in scored_tasks(runs):
        console.print(scored_table(runs, task))
    for result in _results(runs):
        for task, block in result.tasks.items():
            if block.get("slices"):
                console.print(slices_table(result.name, task, block))
    if any(run.result and run.block.get("by_reading") for run in runs):
        console.print(statuses_table(runs))
    if any(run.block.get("scores") for run in runs):
        console.print(scores_table(runs))
    results = [run.result for run in runs if run.result is not None]
    for note in claim_notes_of(results):
        console.print(note, style="yellow")
    for task in open_tasks(runs):
        console.print(open_table(runs, task))


def statuses_table(runs: Sequence[EvaluatedRun]) -> Table:
    """How both readings read the answers to the headline task, one row per run and reading."""
    table = Table(title="How the answers were read", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        "The results above are those of the verdict reading. The strict one, which rewards use, "
        "takes only an answer that is a label and nothing else."
    )
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    table.add_column("Reading", no_wrap=True)
    for name in ("Right", *map(str.capitalize, STATUSES)):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        # A baseline without answers of its own is always read.
        read = {} if run.result is None else run.block.get("by_reading", {})
        for place, (name, found) in enumerate(read.items()):
            counts = (str(found[key]) for key in ("right", *STATUSES))
            table.add_row(Text(run.name if place == 0 else ""), name, *counts)
    return table


YES_NO_COLUMNS: Mapping[str, str] = {
    "yes_rate": "Yes-rate",
    "harmonic_mean": "Harmonic mean",
    "f1": "F1",
}
"""Columns of the numbers that only yes-or-no questions have. The harmonic mean combines the
accuracy where yes is right with the accuracy where no is right; F1 is the usual F1 of yes."""


def readings_of(runs: Sequence[EvaluatedRun]) -> list[tuple[str, str]]:
    """Name and parser of every reading that a run has. Numbers of two parsers are never put in one
    table, even if their readings have the same name."""
    results = [run.result for run in runs if run.result is not None]
    found = [(n, str(block["parser"])) for r in results for n, block in r.readings.items()]
    return list(dict.fromkeys(found))


def readings_table(runs: Sequence[EvaluatedRun], name: str, parser: str) -> Table:
    """The results of one reading: under each run one row per task, then their mean."""
    results = [
        r
        for run in runs
        if (r := run.result) is not None and r.readings.get(name, {}).get("parser") == parser
    ]
    effect = {"wrong": "count as wrong", "skipped": "are skipped"}
    caption = (
        f"Percent with {confidence(results)} intervals. Mean: mean accuracy over the tasks. "
        f"Missing: questions without an answer because the clip could not be read; they "
        f"{effect[results[0].readings[name]['missing']]}."
    )
    table = Table(title=f"Parser: {name} ({parser})", caption=caption, box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    for column in ("Accuracy", *YES_NO_COLUMNS.values(), "n", "Missing"):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in results:
        block = result.readings[name]
        table.add_row(Text(result.name, style="bold" if result.role == "model" else ""))
        for task, found in block["tasks"].items():
            numbers = [found["accuracy"], *(found.get("yes_no", {}).get(c) for c in YES_NO_COLUMNS)]
            cells = [_cell(one, bold=False) for one in numbers]
            table.add_row(f" {task}", *cells, str(found["n"]), str(found["missing"]))
        missing = sum(found["missing"] for found in block["tasks"].values())
        blank = [""] * len(YES_NO_COLUMNS)
        cells = (_cell(block["mean"], bold=True), *blank, str(block["mean"]["n"]), str(missing))
        table.add_row(Text(" Mean", style="bold"), *cells)
    return table


def open_tasks(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The tasks of open questions that at least one run has, and that only ``scores`` rate."""
    found = {
        name: block.get("scorers") and not block.get("scores")
        for result in _results(runs)
        for name, block in result.tasks.items()
        if not block["labels"]
    }
    return [name for name, by_scorers in found.items() if not by_scorers]


def scored_tasks(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The tasks with metrics of scorers, or of a released scorer, in at least one run."""
    blocks = ((name, block) for r in _results(runs) for name, block in r.tasks.items())
    return list(dict.fromkeys(name for name, block in blocks if _has_metrics(block)))


def _has_metrics(block: Mapping[str, Any]) -> bool:
    return bool(block.get("scored") or block.get("official"))


def scored_table(runs: Sequence[EvaluatedRun], task: str) -> Table:
    """The metrics of a task's scorers, and those of the benchmark's released scorer where there is
    one: one column per run."""
    results = [r for r in _results(runs) if _has_metrics(r.tasks.get(task, {}))]
    scored = [r.tasks[task].get("scored", {}) for r in results]
    names = dict.fromkeys(name for found in scored for name in found)
    official = dict.fromkeys(name for r in results for name in r.tasks[task].get("official", {}))
    table = Table(title=f"Metrics: {task}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = (
        f"With {confidence(results)} intervals; n = {results[0].tasks[task]['n']}. Metrics over "
        "shares are in percent. Unscored answers could not be read."
    )
    if official:
        table.caption += " Official: as the benchmark's released scorer counts."
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(Text(result.name), justify="right")
    for name in names:
        table.add_row(name, *(_metric_cell(found.get(name)) for found in scored))
    if names:
        unscored = [next(iter(found.values()), {}).get("unscored", "") for found in scored]
        table.add_row("Unscored", *map(str, unscored), end_section=bool(official))
    for name in official:
        values = (r.tasks[task].get("official", {}).get(name) for r in results)
        table.add_row(f"{name} (official)", *map(plain, values))
    return table


def slices_table(name: str, task: str, block: Block) -> Table:
    """The numbers of one task for each value of its slices. Metrics that do not fit, and values
    beyond the first :data:`_MOST_VALUES` of a field, are in ``results.json``."""
    table = Table(title=f"{name}: {task} by slice", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.caption = "Intervals of every slice, and more metrics, are in results.json."
    slices: Mapping[str, Mapping[str, Block]] = block["slices"]
    found = [one for values in slices.values() for one in values.values()]
    labels = [key for key in ("war", "uar", "weighted_f1") if "metrics" in found[0]]
    scored = list(found[0].get("scored", {}))[: 4 - len(labels)]
    table.add_column("", no_wrap=True)
    for title in ("n", "Invalid", *(_SLICED.get(key, key) for key in (*labels, *scored))):
        table.add_column(title, justify="right", no_wrap=True)
    for field, values in slices.items():
        for value, one in list(values.items())[:_MOST_VALUES]:
            invalid = one["n"] - one["statuses"].get("ok", 0)
            cells = [percent(one["metrics"][key]["value"]) for key in labels]
            cells += [metric_text(one["scored"].get(key))[0] for key in scored]
            table.add_row(Text(f"{field}: {value}"), str(one["n"]), str(invalid), *cells)
    return table


def metric_text(found: Mapping[str, Any] | None) -> tuple[str, str]:
    """A metric of a scorer and its interval as texts, shares in percent."""
    if found is None:
        return "–", ""
    if found["share"]:
        return percent(found["value"]), span(found)
    return plain(found["value"]), plain_span(found)


def _metric_cell(found: Mapping[str, Any] | None) -> Text:
    value, interval = metric_text(found)
    text = Text(value)
    if interval:
        text.append("\n" + interval, style="dim")
    return text


def _results(runs: Sequence[EvaluatedRun]) -> list[EvalResult]:
    return [run.result for run in runs if run.result is not None]


def open_table(runs: Sequence[EvaluatedRun], task: str) -> Table:
    """The scores of a task of open questions, which have no accuracy: under each run one row per
    score, with its mean over all answers and over each subset."""
    results = [r for run in runs if (r := run.result) is not None and task in r.tasks]
    subsets = dict.fromkeys(
        name
        for result in results
        for found in result.tasks[task]["scores"].values()
        for name in found["subsets"]
    )
    caption = (
        f"Means with {confidence(results)} intervals; n = {results[0].tasks[task]['n']}. Open "
        "answers have no accuracy. Unscored answers are left out of the means."
    )
    if any(name.endswith("_official") for r in results for name in r.tasks[task]["scores"]):
        caption += " NAME_official is MER-UniBench's F1, of the mean precision and mean recall."
    table = Table(title=f"Open questions: {task}", caption=caption, box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    for name in ("All", *map(_header, subsets), "Un-\nscored"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(Text(result.name, style="bold" if result.role == "model" else ""))
        for name, found in result.tasks[task]["scores"].items():
            cells = [_plain_cell(found), *(_plain_cell(found["subsets"].get(s)) for s in subsets)]
            table.add_row(f" {name}", *cells, str(found["unscored"]))
    return table


def scores_table(runs: Sequence[EvaluatedRun]) -> Table:
    """The scores of the headline task, one row per run and score. The report also has them by
    subset."""
    results = [run.result for run in runs if run.result is not None]
    caption = (
        f"Means with {confidence(results)} intervals over {results[0].cluster_words}. Unscored "
        "answers are left out of the means."
    )
    table = Table(title="Reasoning and other scores", caption=caption, box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True, max_width=_NAME_WIDTH)
    table.add_column("Score", no_wrap=True)
    for name in ("Mean", "Interval", "n", "Unscored"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        for place, (name, found) in enumerate(run.block.get("scores", {}).items()):
            table.add_row(
                run.name if place == 0 else "",
                *(name, plain(found["value"]), plain_span(found)),
                *(str(found["n"]), str(found["unscored"])),
            )
    return table


def reliance_tables(values: Block) -> list[Table]:
    """The results of ``--reliance``: the accuracy after each change of the clips, and the Shapley
    value of each modality."""
    changed = Table(title="Which modalities the answers rely on", box=box.SIMPLE_HEAD)
    changed.caption = (
        "Accuracy in percent after each change, and its difference in points from the accuracy on "
        "the unchanged clips."
    )
    for name in ("", "Accuracy", "Difference", "Interval", "p", "n"):
        changed.add_column(name, justify="right" if name else "left", no_wrap=True)
    for change in values["changes"].values():
        found = change["subsets"].get("all")
        if found is not None:
            gap = found["difference"]
            cells = (percent(found["accuracy"]["value"]), signed(gap["value"]), signed_span(gap))
            name = f"{spoken(change['streams'])} {change['kind']}"
            changed.add_row(name, *cells, p_value(gap["p"]), str(change["n"]))
    tables = [changed] if changed.row_count else []
    if values["shapley"]:
        shares = Table(title="Contributions to the right answer", box=box.SIMPLE_HEAD)
        shares.caption = "Shapley values of the log-probability of the right answer, in nats."
        for name in ("", "Value", "Interval", "n"):
            shares.add_column(name, justify="right" if name else "left", no_wrap=True)
        for name, found in values["shapley"]["subsets"]["all"].items():
            cells = (plain_signed(found["value"]), plain_span(found), str(found["n"]))
            shares.add_row(spoken([name]), *cells)
        tables.append(shares)
    for table in tables:
        table.title_justify = table.caption_justify = "left"
        table.pad_edge = False
    return tables


_NAME_WIDTH = 26
_PRIORITY = (
    *("average", "video_aligned", "audio_aligned", "consistent"),
    *("uar", "weighted_f1", "conflict_average", "macro_f1"),
)


def _fitting(runs: Sequence[EvaluatedRun], width: int) -> list[str]:
    """The most important columns that fit beside the names, in the order of ``COLUMNS``."""
    gap = 3
    used = min(_NAME_WIDTH, max(len(run.name) for run in runs)) + gap + len("Invalid")
    names: list[str] = []
    for name in sorted(columns_of(runs), key=_PRIORITY.index):
        cells = [span(number(run.block, name)) for run in runs]
        used += max(5, *map(len, [*cells, *_header(name).splitlines()])) + gap
        if used <= width:
            names.append(name)
    return sorted(names, key=list(COLUMNS).index)


def _plain_cell(found: Mapping[str, Any] | None) -> Text:
    text = Text(plain(found["value"] if found else None))
    if found and found["low"] is not None:
        text.append("\n" + plain_span(found), style="dim")
    return text


def _header(name: str) -> str:
    return COLUMNS.get(name, "No conflict field").replace(" ", "\n").replace("-", "-\n")


def _cell(found: Mapping[str, Any] | None, *, bold: bool) -> Text:
    if found is None:
        return Text("–", style="dim")
    text = Text(percent(found["value"]), style="bold" if bold else "")
    interval = span(found)
    if interval:
        text.append("\n" + interval, style="dim not bold")
    return text
