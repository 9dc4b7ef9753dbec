"""Rows of the tables of controls: the headline metrics of a variant, and how it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import Block
from mmemo.statistics import holm, rounded

COLUMNS = (
    *("task", "name", "kind", "metric", "value", "low", "high", "n"),
    *("unchanged", "unchanged_low", "unchanged_high"),
    *("difference", "difference_low", "difference_high", "p", "p_holm"),
)
"""Columns of the CSV tables of controls."""

TITLES: Mapping[str, str] = {"average": "Average", "uar": "UAR"}


def headlines(block: Block) -> list[str]:
    """The metrics of a task that controls compare: the average and UAR of labels, or the first
    metric of its scorers; none for open questions without a scorer."""
    if block["labels"]:
        return ["average", "uar"]
    return [block["headline"]] if "headline" in block else []


def number_of(block: Block, metric: str) -> Block:
    """A metric of a task's block, with its interval."""
    if block["labels"]:
        return block["average"] if metric == "average" else block["metrics"][metric]
    return block["scored"][metric]


def summarised(name: str, block: Block, metrics: Sequence[str], *, kind: str) -> Block:
    """A row: the name, the kind, n and each metric of a variant."""
    return {
        "name": name,
        "kind": kind,
        "n": block["n"],
        "values": {metric: number_of(block, metric) for metric in metrics},
    }


def against(compared: Block, metrics: Sequence[str]) -> Block:
    """The differences of the model from a variant, model - variant, by metric. A metric that is no
    function of sums has none."""
    known = {**compared.get("scored", {}), **compared.get("differences", {})}
    return {"differences": {metric: known[metric] for metric in metrics if metric in known}}


def answered_alike(one: Row, other: Row) -> bool:
    """Whether two runs answer a question alike; two answers that cannot be read for the same reason
    are alike too."""
    return one["status"] == other["status"] and one["answer"] == other["answer"]


def csv_rows(tasks: Mapping[str, Block]) -> Iterator[Row]:
    """One row for each task, variant and metric of some tables."""
    for task, block in tasks.items():
        for row in block["rows"]:
            same: Block = row.get("unchanged", {})
            for metric, found in row["values"].items():
                gap: Block = row.get("differences", {}).get(metric, {})
                values = {
                    "task": task,
                    "name": row["name"],
                    "kind": row["kind"],
                    "metric": metric,
                    **{key: found[key] for key in ("value", "low", "high", "n")},
                    "unchanged": same.get("value"),
                    "unchanged_low": same.get("low"),
                    "unchanged_high": same.get("high"),
                    "difference": gap.get("value"),
                    "difference_low": gap.get("low"),
                    "difference_high": gap.get("high"),
                    "p": gap.get("p"),
                    "p_holm": gap.get("p_holm"),
                }
                yield {key: value for key, value in values.items() if value is not None}


def correct_all(tasks: Mapping[str, Block]) -> int:
    """Add ``p_holm`` to every difference of some tables, corrected over all of them; returns their
    number. Without subsets, UAR and average are still two tests."""
    found: list[dict[str, Any]] = [
        one
        for block in tasks.values()
        for row in block["rows"]
        for one in row.get("differences", {}).values()
    ]
    for one, p in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = rounded(p)
    return sum(one["p"] is not None for one in found)
