"""Calibration of a judge of reasoning: whether it reads the facts, and how well it grades.

The headline is what its grades lose when each answer stands beside another clip's facts
(:func:`facts_read`). A judge that looks at the text alone loses nothing, may still agree well with
known grades, and pays for one good answer to every question. :func:`refusal` says why such a judge
must not pay.

n rows, K dimensions. Intervals come from a jackknife over speakers, as everywhere in mmemo.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy import stats

from mmemo.errors import EvaluationError
from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST, JudgeItem
from mmemo.statistics import BootstrapConfig, Clusters, Interval

Floats = NDArray[np.float64]
Grade = Callable[[Sequence[JudgeItem]], Sequence[Sequence[float] | None]]
"""Grades items; None for one that it cannot grade."""

CALIBRATION = "calibration.json"
RIGHT = 4  # factual grade from which an answer counts as right
CONSTANTS, CLIPS = 8, 64
"""Numbers of answers that are tried as constant ones, and of clips beside whose facts they are."""
HIGHEST_CONSTANT = 0.5
"""Most that a constant answer may earn on average, of 1."""


@dataclass(frozen=True, slots=True)
class Graded:
    """A graded row. ``given``: the judge's grade of each dimension; ``known``: the true ones.
    ``faults``: the candidate's known faults and their severities."""

    given: Sequence[float]
    known: Sequence[float]
    speaker: str
    faults: Mapping[str, int]


def calibrate(rows: Sequence[Graded], config: BootstrapConfig) -> dict[str, Any]:
    """Measure the agreement of given and known grades.

    Returns:
        JSON values. ``dimensions``: for each dimension, Spearman's rank correlation with its
        interval, the mean absolute error in grades, the share of rows whose rounded grade equals
        the known one, and the mean given grade by known grade. ``mean_grade``: the rank
        correlation of the mean over dimensions. ``faults``: for rows with a single fault, the mean
        known and given grades.

    Raises:
        EvaluationError: there are no rows.
    """
    if not rows:
        raise EvaluationError("no row could be graded, so there is no calibration; check the judge")
    given = np.array([row.given for row in rows], dtype=np.float64)
    known = np.array([row.known for row in rows], dtype=np.float64)
    clusters = Clusters([row.speaker for row in rows], config)
    dimensions = {
        name: _dimension(given[:, k], known[:, k], clusters) for k, name in enumerate(DIMENSIONS)
    }
    total = _spearman(given.mean(1), known.mean(1), clusters)
    return {
        "n": len(rows),
        "speakers": clusters.count,
        "confidence": config.confidence,
        "dimensions": dimensions,
        "mean_grade": {"spearman": total.row()},
        "faults": _faults(rows, given, known),
    }


def facts_read(
    items: Sequence[JudgeItem],
    known: Sequence[Sequence[float]],
    speakers: Sequence[str],
    grade: Grade,
    config: BootstrapConfig,
) -> dict[str, Any]:
    """Measure whether a judge reads the facts.

    Args:
        items: answers beside the facts of their own clips.
        known: their known grades.
        speakers: of the clips.
        grade: the judge.

    Returns:
        JSON values. ``swapped``: the factual grade of answers that are known to be right (4 or 5)
        beside their own facts (``own``) and beside those of another clip (``other``), and the
        ``drop`` with its interval; ``spearman`` of factual grades of all answers in both cases, and
        its ``drop``. ``constant``: the highest mean reward, of 1, that one answer earns over the
        clips (:func:`reward_of`), and that answer.

    Raises:
        EvaluationError: there are fewer than two clips, or no answer is known to be right.
    """
    swapped = swap_facts(items)
    if swapped is None:
        raise EvaluationError(
            "the calibration swaps the facts of clips, but all rows have the same; add other clips"
        )
    both = [*zip(grade(items), grade(swapped), strict=True)]
    kept = [at for at, pair in enumerate(both) if pair[0] is not None and pair[1] is not None]
    own, other = (
        np.array([both[at][side] for at in kept], dtype=np.float64).reshape(-1, len(DIMENSIONS))
        for side in (0, 1)
    )
    true = np.array([known[at][0] for at in kept], dtype=np.float64)
    people = [speakers[at] for at in kept]
    return {
        "swapped": _swapped(own[:, 0], other[:, 0], true, people, config),
        "constant": _constant(items, own, kept, grade),
    }


def _swapped(
    own: Floats, other: Floats, true: Floats, speakers: Sequence[str], config: BootstrapConfig
) -> dict[str, Any]:
    """What (n,) factual grades lose from their own facts to other ones."""
    right = np.flatnonzero(true >= RIGHT)
    if not len(right):
        raise EvaluationError(
            "no answer with a grade of 4 or 5 in factual_alignment could be graded, so there is "
            "nothing that swapped facts could cost; add correct answers to test_data"
        )
    costs = (own - other)[right]
    people = Clusters([speakers[int(at)] for at in right], config)
    # The grades lie between LOWEST and HIGHEST, and so their mean difference in this range.
    most = float(HIGHEST - LOWEST)
    drop = people.sums(np.stack([costs, np.ones_like(costs)], axis=1)).interval(
        lambda sums: sums[..., 0] / sums[..., 1], len(right), limits=(-most, most)
    )

    def lost(rows: NDArray[np.intp]) -> float:
        return spearman(own[rows], true[rows]) - spearman(other[rows], true[rows])

    ranks = Clusters(speakers, config).of_rows(lost, (-2.0, 2.0))
    return {
        "own": round(float(own[right].mean()), 4),
        "other": round(float(other[right].mean()), 4),
        "drop": drop.row(),
        "spearman": {
            "own": _rounded(spearman(own, true)),
            "other": _rounded(spearman(other, true)),
            "drop": ranks.row(),
        },
    }


def clip_keys(items: Sequence[JudgeItem]) -> list[Hashable]:
    """What tells the clips of items apart: their facts, or the clip itself where all have the same
    facts, as for a judge that reads a clip's features alone."""
    if len({item.facts for item in items}) > 1:
        return [item.facts for item in items]
    return [item.clip for item in items]


def swap_facts(items: Sequence[JudgeItem]) -> list[JudgeItem] | None:
    """Each item with the facts (and the clip) of another clip; None where all have the same. It is
    deterministic, and reads no grade."""
    keys, places = clip_keys(items), dict[Hashable, int]()
    for at, key in enumerate(keys):
        places.setdefault(key, at)
    clips = list(places.values())
    if len(clips) < 2:
        return None
    # Half way round, because the next clips of a manifest may be of the same speaker.
    step = max(1, len(clips) // 2)
    other = {
        keys[at]: items[clips[(number + step) % len(clips)]] for number, at in enumerate(clips)
    }
    return [
        replace(item, facts=other[key].facts, clip=other[key].clip)
        for item, key in zip(items, keys, strict=True)
    ]


def reward_of(grades: Sequence[float]) -> float:
    """What grades earn, of 1, where each dimension counts for the same and none for more than
    factual alignment (``reward/reasoning.py``)."""
    return sum(min(one, grades[0]) for one in grades) / (HIGHEST * len(grades))


def _constant(
    items: Sequence[JudgeItem], own: Floats, kept: Sequence[int], grade: Grade
) -> dict[str, Any]:
    """The best of the answers that the judge likes best, each given to every clip."""
    liked = sorted(range(len(kept)), key=lambda at: -reward_of(own[at]))
    texts = list(dict.fromkeys(items[kept[at]].completion for at in liked))[:CONSTANTS]
    clips = list(dict(zip(clip_keys(items), items, strict=True)).values())
    clips = clips[:: max(1, len(clips) // CLIPS)][:CLIPS]
    found = [(0.0, "")]
    for text in texts:
        given = grade([replace(clip, completion=text) for clip in clips])
        rewards = [reward_of(one) for one in given if one is not None]
        found.append((sum(rewards) / max(1, len(rewards)), text))
    score, answer = max(found)
    return {"reward": round(score, 4), "answer": answer, "tried": len(texts), "clips": len(clips)}


def refusal(found: Mapping[str, Any]) -> str | None:
    """Why a judge with this calibration must not pay; None if it may."""
    try:
        drop, constant = found["swapped"]["drop"], float(found["constant"]["reward"])
        value, low = drop["value"], drop["low"]
    except (KeyError, TypeError, ValueError):
        return "its calibration does not say whether it reads the facts; train it again"
    if low is None or low <= 0:
        return (
            "it does not read the facts: beside another clip's facts, right answers lose "
            f"{_number(value)} grades of factual alignment ({_number(low)} to "
            f"{_number(drop.get('high'))})"
        )
    if constant > HIGHEST_CONSTANT:
        return f"one answer, given to every clip, earns {constant:.2f} of 1"
    return None


def read_calibration(folder: Path, digest: str) -> dict[str, Any] | None:
    """The calibration of the reward model in ``folder``, from there or from the folder above; None
    if there is none, or it is that of other weights.

    Args:
        digest: of the weights.
    """
    for path in (folder / CALIBRATION, folder.parent / CALIBRATION):
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and cast("Any", found).get("model", {}).get("sha256") == digest:
            return cast("dict[str, Any]", found)
    return None


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)


def _dimension(given: Floats, known: Floats, clusters: Clusters) -> dict[str, Any]:
    by_grade = {
        str(grade): {
            "n": int((known == grade).sum()),
            "mean": round(float(given[known == grade].mean()), 4),
            "low": round(float(np.quantile(given[known == grade], 0.1)), 4),
            "high": round(float(np.quantile(given[known == grade], 0.9)), 4),
        }
        for grade in range(LOWEST, HIGHEST + 1)
        if (known == grade).any()
    }
    return {
        "spearman": _spearman(given, known, clusters).row(),
        "mean_absolute_error": round(float(np.abs(given - known).mean()), 4),
        # Half up, as the judge rounds; np.round would round half to even.
        "exact": round(float((np.floor(given + 0.5) == known).mean()), 4),
        "by_known_grade": by_grade,
    }


def _spearman(given: Floats, known: Floats, clusters: Clusters) -> Interval:
    """The rank correlation with its interval; None where one side is constant."""
    # Ranks are no function of sums, so each value of the jackknife needs its rows.
    return clusters.correlation(lambda rows: spearman(given[rows], known[rows]))


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two (n,) arrays, with midranks for ties; NaN where one of them
    is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1])


def _faults(rows: Sequence[Graded], given: Floats, known: Floats) -> dict[str, Any]:
    names = [next(iter(row.faults), "none") if len(row.faults) < 2 else "" for row in rows]
    found: dict[str, Any] = {}
    for name in sorted({name for name in names if name}):
        chosen = np.array([one == name for one in names])
        found[name] = {
            "n": int(chosen.sum()),
            "known": _by_dimension(known[chosen].mean(0)),
            "given": _by_dimension(given[chosen].mean(0)),
        }
    return found


def _by_dimension(values: Floats) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in zip(DIMENSIONS, values, strict=True)}


def calibration_table(found: Mapping[str, Any]) -> Table:
    """The agreement by dimension as a table for the terminal."""
    percent = round(100 * found["confidence"])
    table = Table(
        title=f"Calibration on {found['n']} rows of {found['speakers']} held-out speakers",
        caption=f"{percent} % intervals over speakers (jackknife, Student's t)",
    )
    for title in ("dimension", "Spearman", "interval", "error in grades", "exact"):
        table.add_column(title, justify="left" if title == "dimension" else "right")
    for name, row in found["dimensions"].items():
        rank = row["spearman"]
        table.add_row(
            name.replace("_", " "),
            _number(rank["value"]),
            f"{_number(rank['low'])} to {_number(rank['high'])}",
            f"{row['mean_absolute_error']:.2f}",
            f"{row['exact']:.0%}",
        )
    return table


def read_headline(folder: Path) -> str:
    """The headline of the run in ``folder``, with what refuses it; empty if it has none."""
    try:
        found: Any = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))
        reason = refusal(found)
        return headline(found) + (
            f" It is refused as a reward, because {reason}." if reason else ""
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def headline(found: Mapping[str, Any]) -> str:
    """Whether the judge reads the facts, in two sentences."""
    swapped, constant = found["swapped"], found["constant"]
    drop = swapped["drop"]
    return (
        f"Beside another clip's facts, right answers lose {_number(drop['value'])} grades of "
        f"factual alignment ({_number(drop['low'])} to {_number(drop['high'])}): "
        f"{swapped['own']:.2f} with their own facts, {swapped['other']:.2f} with others. The best "
        f"constant answer earns {constant['reward']:.2f} of 1."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_calibration(found: Mapping[str, Any], path: Path) -> None:
    """Write a PNG that plots, for each dimension, the given grade over the known one: the mean and
    the middle 80 % of the rows."""
    # pyplot would keep the figure in global state and choose a backend for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(DIMENSIONS), sharey=True)
    for panel, (name, row) in zip(panels, found["dimensions"].items(), strict=True):
        grades = [int(grade) for grade in row["by_known_grade"]]
        means = [one["mean"] for one in row["by_known_grade"].values()]
        # errorbar refuses negative lengths, and a mean may lie outside the middle 80 %.
        spread = [
            [max(0.0, one["mean"] - one["low"]) for one in row["by_known_grade"].values()],
            [max(0.0, one["high"] - one["mean"]) for one in row["by_known_grade"].values()],
        ]
        panel.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], color="0.75", linewidth=1, zorder=0)
        panel.errorbar(grades, means, yerr=spread, fmt="o", color="#1f5f8b", capsize=3)
        rank = row["spearman"]
        panel.set_title(name.replace("_and_", ", ").replace("_", " "), size=9)
        panel.set_xlabel(f"known grade (Spearman {_number(rank['value'])})", size=9)
        panel.set_xticks(range(LOWEST, HIGHEST + 1))
    panels[0].set_ylabel("given grade", size=9)
    figure.savefig(path, dpi=120)
