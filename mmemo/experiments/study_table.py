"""The numbers of a study: intervals over seeds, paired tests, a table and plots.

Intervals and tests are over seeds: they tell what another seed would give, with all that differs
between seeds: training alone, or also data, encoders and pairs. All use Student's t. P-values are
two-sided and paired by seed, and are also given with Holm's correction over the comparisons of one
metric (Holm 1979). Whether a metric was kept is a test of non-inferiority: the interval of the
difference excludes a loss of more than the metric's margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmemo.formats import counted, p_value
from mmemo.statistics import holm, t_interval, t_test

CONFIDENCE = 0.95

Values = Mapping[str, Mapping[int, float]]
"""Arm to seed to value. A seed without a number is not there."""


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with its t interval. Fewer than two seeds have no interval."""
    n = len(values)
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(np.mean(values))
    low, high = t_interval(values, CONFIDENCE) or (None, None)
    return {"mean": mean, "low": low, "high": high, "n": n}


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, Any]:
    """``a`` minus ``b`` over the seeds that both have: mean, t interval, and the p-value of the
    two-sided paired t-test.

    If all differences are equal there is no spread to test against, so no interval and no p.
    """
    seeds = [seed for seed in a if seed in b]
    differences = [a[seed] - b[seed] for seed in seeds]
    found = mean_interval(differences)
    found["p"] = t_test(differences)
    return found


def kept(row: Mapping[str, Any], metric: Mapping[str, Any]) -> bool | None:
    """Whether the interval of a difference excludes a loss of more than the metric's margin; None
    without a margin or an interval."""
    margin = metric.get("margin")
    if margin is None or row["low"] is None:
        return None
    return row["low"] > -margin if metric["better"] == "higher" else row["high"] < margin


def summary(
    runs: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    metrics: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """For each metric: the mean and interval of each arm, and the paired comparisons."""
    found: dict[str, Any] = {}
    for metric, shown in metrics.items():
        values = values_of(runs, metric, arms)
        rows = [paired(values[arm], values[reference]) for arm, reference in comparisons]
        adjusted = holm([row["p"] for row in rows])
        found[metric] = {
            "arms": {arm: mean_interval(list(values[arm].values())) for arm in arms},
            "comparisons": [
                {"arm": arm, "reference": reference, **row, "p_holm": p, "kept": kept(row, shown)}
                for (arm, reference), row, p in zip(comparisons, rows, adjusted, strict=True)
            ],
        }
    return found


def values_of(runs: Sequence[Mapping[str, Any]], metric: str, arms: Sequence[str]) -> Values:
    """The finite values of one metric in the finished runs."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for run in runs:
        value = run["metrics"].get(metric) if run["status"] == "done" else None
        if value is not None:
            values[run["arm"]][run["seed"]] = value
    return values


def table(results: Mapping[str, Any]) -> str:
    """A study's ``results.json`` as Markdown: arms by metrics, then the comparisons."""
    metrics: Mapping[str, Mapping[str, Any]] = results["config"]["metrics"]
    found: Mapping[str, Any] = results["summary"]
    runs: Sequence[Mapping[str, Any]] = results["runs"]
    arms = list(results["config"]["arms"])
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    lines = [f"# {results['name']}", ""]
    head = ["arm", *(title(name, metric) for name, metric in metrics.items()), "seeds"]
    rows: list[list[str]] = []
    for arm in arms:
        done = sum(run["arm"] == arm and run["status"] == "done" for run in runs)
        cells = [_with_interval(found[m]["arms"][arm], metrics[m]) for m in metrics]
        rows.append([arm, *cells, str(done)])
    lines += [*markdown(head, rows), "", *_notes(results, len(seeds)), ""]
    lines += _comparisons(results)
    bad = [run for run in runs if run["status"] == "failed"]
    waiting = sum(run["status"] == "waiting" for run in runs)
    if waiting:
        lines += [f"{counted(waiting, 'run')} of {len(runs)} not done yet.", ""]
    lines += [f"- failed: {run['arm']}, seed {run['seed']}: {run['error']}" for run in bad]
    return "\n".join(lines).rstrip() + "\n"


def _comparisons(results: Mapping[str, Any]) -> list[str]:
    metrics: Mapping[str, Mapping[str, Any]] = results["config"]["metrics"]
    found: Mapping[str, Any] = results["summary"]
    guarded = [name for name, metric in metrics.items() if metric.get("margin") is not None]
    flags = {
        (name, row["arm"], row["reference"]): row["kept"]
        for name in guarded
        for row in found[name]["comparisons"]
    }
    head = ["comparison", "metric", "difference", "95% interval", "p", "p (Holm)"]
    rows = [
        [
            f"{row['arm']} − {row['reference']}",
            title(metric, metrics[metric]),
            number(row["mean"], metrics[metric], sign=True),
            span(row, metrics[metric], sign=True) or "–",
            p_value(row["p"]),
            p_value(row["p_holm"]),
            *(yes_no(flags[name, row["arm"], row["reference"]]) for name in guarded),
            str(row["n"]),
        ]
        for metric in metrics
        for row in found[metric]["comparisons"]
    ]
    if not rows:
        return []
    head += [*(f"{name} kept" for name in guarded), "seeds"]
    pairs = len(rows) // len(metrics)
    notes = [
        "Differences are paired by seed; p is the two-sided paired t-test's, and Holm's over the "
        f"{counted(pairs, 'comparison')} of one metric. The table looks at {len(rows)} differences "
        f"({pairs} × {counted(len(metrics), 'metric')}). A dash means fewer than two seeds in "
        "common, or the same difference in every seed."
    ]
    for name in guarded:
        margin = number(metrics[name]["margin"], metrics[name])
        notes.append(
            f"{name} is kept where the 95% interval of its difference excludes a loss of more than "
            f"{margin}; where it is not, a gain elsewhere may have been paid for with it."
        )
    return [*markdown(head, rows), "", " ".join(notes), ""]


DATA = {"world": "data", "encoders": "encoders", "pairs": "preference pairs"}
"""Stages that make what training starts from, and what intervals then cover."""


def covered(results: Mapping[str, Any]) -> str:
    """What differs between the seeds of a study."""
    own = [what for stage, what in DATA.items() if stage in results.get("seed_has", [])]
    return f"{', '.join(own)} and training" if own else "training"


def _notes(results: Mapping[str, Any], seeds: int) -> list[str]:
    runs = [run for run in results["runs"] if run["status"] == "done"]
    versions = {run.get("code") for run in runs}
    if seeds < 2:
        notes = ["One seed: intervals and tests need at least two."]
    elif covered(results) == "training":
        notes = ["Mean over seeds with the 95% t interval, which is over training runs alone."]
    else:
        notes = [
            f"Mean over seeds with the 95% t interval. Each seed has its own {covered(results)}, "
            "so the intervals are over worlds and training runs."
        ]
    if len(versions) > 1:
        notes.append(f"The runs were made with {len(versions)} versions of mmemo's code.")
    if results.get("tuned"):
        notes.append("Every tuned arm had the same number of tuning runs (tuning.md).")
    return [" ".join(notes)]


def yes_no(flag: bool | None) -> str:
    """A flag as the tables show it."""
    return {True: "yes", False: "no", None: "–"}[flag]


def number(value: float | None, metric: Mapping[str, Any], *, sign: bool = False) -> str:
    """A value as the table shows it: percent with one decimal, or four significant digits."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    text = f"{100 * value:{plus}.1f}" if metric["percent"] else f"{value:{plus}.4g}"
    return text.replace("-", "−")


def span(row: Mapping[str, Any], metric: Mapping[str, Any], *, sign: bool = False) -> str:
    """The ends of an interval; empty where there is none."""
    if row["low"] is None:
        return ""
    ends = [number(row[side], metric, sign=sign) for side in ("low", "high")]
    return " to ".join(ends)


def _with_interval(row: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    ends = span(row, metric)
    return number(row["mean"], metric) + (f" ({ends})" if ends else "")


def title(name: str, metric: Mapping[str, Any]) -> str:
    """A metric's name with its unit and direction."""
    arrow = {"higher": " ↑", "lower": " ↓"}.get(metric["better"] or "", "")
    return name + (", %" if metric["percent"] else "") + arrow


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def plot(results: Mapping[str, Any], metric: str, path: Path) -> None:
    """Draw one metric as a PNG: the values of each arm on the left, the paired differences on the
    right.

    A small dot is a seed, the large dot their mean, and the bar its 95% t interval.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = results["config"]["metrics"][metric]
    arms = list(results["config"]["arms"])
    values = values_of(results["runs"], metric, arms)
    block = results["summary"][metric]
    rows = block["comparisons"]
    scale = 100 if shown["percent"] else 1
    height = 1.4 + 0.42 * max(len(arms), len(rows))
    figure = Figure(figsize=(10 if rows else 5.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    _strip(
        axes[0], arms, [values[arm] for arm in arms], [block["arms"][arm] for arm in arms], scale
    )
    axes[0].set_xlabel(title(metric, shown))
    if rows:
        names = [f"{row['arm']} − {row['reference']}" for row in rows]
        pairs = [(values[row["arm"]], values[row["reference"]]) for row in rows]
        dots = [{seed: a[seed] - b[seed] for seed in a if seed in b} for a, b in pairs]
        _strip(axes[1], names, dots, rows, scale)
        axes[1].axvline(0, color="0.4", linewidth=0.9, zorder=1)
        axes[1].set_xlabel("difference, paired by seed" + (", points" if shown["percent"] else ""))
    figure.suptitle(results["name"], fontsize=11)
    # Without the library's version in it, the same numbers give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _strip(
    axis: Any,
    names: Sequence[str],
    dots: Sequence[Mapping[int, float]],
    rows: Sequence[Mapping[str, Any]],
    scale: float,
) -> None:
    for place, (points, row) in enumerate(zip(dots, rows, strict=True)):
        axis.plot(
            [scale * value for value in points.values()], [place + 0.18] * len(points), "o",
            color="C0", alpha=0.45, markersize=4.5, markeredgewidth=0,
        )  # fmt: skip
        if row["low"] is not None:
            ends = [scale * row["low"], scale * row["high"]]
            axis.plot(ends, [place - 0.08] * 2, color="0.15", linewidth=1.6)
        if row["mean"] is not None:
            axis.plot([scale * row["mean"]], [place - 0.08], "o", color="0.15", markersize=6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
