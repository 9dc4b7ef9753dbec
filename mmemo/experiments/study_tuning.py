"""The tuning of a study: every arm gets the same number of runs on worlds of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.config import dump
from mmemo.experiments.study_config import Point, StudyConfig, grid_of
from mmemo.experiments.study_runner import KILLED, Runs
from mmemo.experiments.study_table import markdown, number, title


def choose(study: StudyConfig, parts: Sequence[Runs]) -> tuple[dict[str, int], dict[str, str]]:
    """The point of the grid that each arm uses, and the arms that have none, with the reason.

    A point counts if all of its runs gave a number; one that failed with an error, such as a loss
    that is not finite, is left out. Of equal points the first is chosen, so that the choice does
    not depend on the order in which runs end. An arm whose runs are not over is in neither.
    """
    chosen: dict[str, int] = {}
    without: dict[str, str] = {}
    for arm in study.arms:
        grid = grid_of(study, arm)
        if not grid:
            continue
        scores: list[float | None] = []
        over = True
        for point in range(len(grid)):
            states = [(runs, label) for runs, label in _runs_of(parts, arm, point)]
            status = [runs.status[label] for runs, label in states]
            reasons = [runs.errors.get(label, "") for runs, label in states]
            over &= bool(status) and "waiting" not in status
            if any(reason.startswith(KILLED) for reason in reasons):
                # Its chance would be lost to a full memory; it runs again with the next start.
                without[arm] = "a run of its tuning was killed; start the study again"
            scores.append(_score(study, states))
        if arm in without or not over:
            continue
        if all(score is None for score in scores):
            without[arm] = "no point of its tuning grid gave a number; see tuning.md"
            continue
        best = max(score for score in scores if score is not None)
        chosen[arm] = scores.index(best)
    return chosen, without


def _runs_of(parts: Sequence[Runs], arm: str, point: int) -> list[tuple[Runs, str]]:
    found = {
        cell.label: (runs, cell.label)
        for runs in parts
        for cell in runs.cells
        if (cell.arm, cell.point) == (arm, point)
    }
    return list(found.values())


def _score(study: StudyConfig, states: Sequence[tuple[Runs, str]]) -> float | None:
    """Mean over the tuning seeds; None if a run gave no number."""
    assert study.tuning is not None
    values: list[float] = []
    for runs, label in states:
        entry = runs.entries.get(label)
        value = entry["metrics"][study.tuning.maximise] if entry else None
        if value is None:
            return None
        values.append(value)
    return sum(values) / len(values) if values else None


def tuning_results(
    study: StudyConfig, parts: Sequence[Runs], chosen: Mapping[str, int]
) -> dict[str, Any]:
    """The content of ``tuning.json``."""
    assert study.tuning is not None
    runs: list[dict[str, Any]] = []
    arms: dict[str, Any] = {}
    for arm in study.arms:
        points: list[dict[str, Any]] = []
        for point, settings in enumerate(grid_of(study, arm)):
            states = _runs_of(parts, arm, point)
            points.append({"settings": settings, "score": _score(study, states)})
            runs += [_row(part, label, point) for part, label in states]
        if points:
            choice = chosen.get(arm)
            arms[arm] = {"chosen": None if choice is None else choice + 1, "points": points}
    config = dump(study)
    return {
        "schema": 1,
        "name": study.name,
        "arms": arms,
        "runs": runs,
        "config": {key: config[key] for key in ("tuning", "metrics")},
    }


def _row(runs: Runs, label: str, point: int) -> dict[str, Any]:
    cell = next(cell for cell in runs.cells if cell.label == label)
    row = {
        "arm": cell.arm,
        "point": point + 1,
        "seed": cell.seed,
        "status": runs.status[label],
        "fingerprint": cell.fingerprint,
        **runs.entries.get(label, {"metrics": {}}),
    }
    return row | ({"error": runs.errors[label]} if label in runs.errors else {})


def tuning_table(results: Mapping[str, Any]) -> str:
    """``tuning.json`` as Markdown: each arm's points, and the one that was chosen."""
    tuning: Mapping[str, Any] = results["config"]["tuning"]
    metric = results["config"]["metrics"][tuning["maximise"]]
    rows: list[list[str]] = []
    for arm, found in results["arms"].items():
        for place, point in enumerate(found["points"], start=1):
            mark = "chosen" if place == found["chosen"] else ""
            if any(run["status"] == "failed" for run in _of(results, arm, place)):
                mark = "failed"
            score = number(point["score"], metric)
            rows.append([arm, settings_text(point["settings"]), score, mark])
    seeds = ", ".join(map(str, tuning["seeds"]))
    lines = [
        f"# Tuning of {results['name']}",
        "",
        f"Every tuned arm has {len(tuning['grid'])} points, each run with seed {seeds}, which the "
        f"study does not use. The best mean of {tuning['maximise']} is chosen.",
        "",
        *markdown(["arm", "settings", title(tuning["maximise"], metric), ""], rows),
    ]
    return "\n".join(lines) + "\n"


def _of(results: Mapping[str, Any], arm: str, point: int) -> list[Mapping[str, Any]]:
    return [run for run in results["runs"] if (run["arm"], run["point"]) == (arm, point)]


def settings_text(point: Point) -> str:
    """A point of a grid in one line."""
    return ", ".join(f"`{text}`" for overrides in point.values() for text in overrides)
