"""Which modalities a model relies on, as the report shows it: sentences and chart positions.

A chart position is in percent of the chart's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmemo.evaluation.reliance.summary import read_reliance
from mmemo.evaluation.results import EvaluatedRun
from mmemo.evaluation.scoring import Block
from mmemo.formats import (
    joined,
    percent,
    plain_signed,
    plain_span,
    signed,
    signed_span,
    spoken,
)
from mmemo.report.charts import layer_chart, ticks

UNCLEAR = "does not clearly change"
"""Said of a difference whose interval includes 0."""

WHERE: Mapping[str, str] = {
    "all": "All clips",
    "video_aligned": "Where the face is right",
    "audio_aligned": "Where the voice is right",
    "consistent": "Where both agree",
    "none": "Other clips",
}


@dataclass(frozen=True, slots=True)
class DotRow:
    """One row of a dot chart: a value, its interval, and the baseline that it is compared with."""

    name: str
    kind: str
    """The modality that gives the row its colour."""
    value_at: float
    baseline_at: float
    text: str
    """The value in words."""
    interval: str = ""
    """The interval in words."""
    low_at: float | None = None
    high_at: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class DotChart:
    """A dot chart with the sentence above it. ``axis`` holds positions and tick labels."""

    title: str
    rows: Sequence[DotRow]
    axis: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class TitledChart:
    """A finished chart and its title."""

    title: str
    chart: Markup


@dataclass(frozen=True, slots=True)
class RelianceView:
    """What ``--reliance`` measured of one run."""

    name: str
    changes: DotChart | None
    attention: DotChart | None
    attention_missing: str | None
    """Why attention could not be measured."""
    attention_peaks: str
    """The sentence above ``attention_layers``."""
    attention_layers: Sequence[TitledChart]
    """Empty for measurements of older versions, which do not have it."""
    shapley_title: str
    """The sentence above ``shapley``, which has one chart per conflict subset."""
    shapley: Sequence[DotChart]
    shapley_n: int
    instruction: str
    asked: int
    """The number of questions drawn for the changes."""
    left_out: int
    """The largest number of these that a change could not be made to."""


def views_of(runs: Sequence[EvaluatedRun]) -> list[RelianceView]:
    """The measurements of each run that has some.

    Raises:
        EvaluationError: a measurement is damaged, or belongs to other answers.
    """
    views: list[RelianceView] = []
    for run in runs:
        found = None if run.result is None else read_reliance(run.result)
        if found is not None:
            views.append(_view(run.name, found))
    return views


def errors_title(name: str, block: Block) -> str | None:
    """A sentence about whose label the wrong answers name; None where that is not known."""
    errors = block.get("reliance", {}).get("errors")
    if errors is None:
        return None
    if errors["signed"]["value"] is None:
        return f"{name} gives no wrong answer on a conflict clip."
    voice, face = (percent(errors[side]["value"], 0) for side in ("voice", "face"))
    return (
        f"When {name} is wrong about a conflict clip, it names the voice’s emotion in {voice}% of "
        f"cases and the face’s in {face}%."
    )


def _view(name: str, found: Mapping[str, Any]) -> RelianceView:
    changes = [change for change in found["changes"].values() if change["subsets"]]
    shapley = found["shapley"]
    return RelianceView(
        name=name,
        changes=_changes(changes) if changes else None,
        attention=_attention(found["attention"]) if found["attention"] else None,
        attention_missing=found["attention_missing"],
        attention_peaks=_peaks(found["attention"]) if found["attention"] else "",
        attention_layers=_by_layer(found["attention"]) if found["attention"] else [],
        shapley_title=_shapley_title(shapley["subsets"]["all"]) if shapley else "",
        shapley=list(_shapley(shapley["subsets"])) if shapley else [],
        shapley_n=shapley["n"] if shapley else 0,
        instruction=found["made"]["instruction"].replace("{labels}", "(the labels)"),
        asked=max((change["n"] + change["left_out"] for change in changes), default=0),
        left_out=max((change["left_out"] for change in found["changes"].values()), default=0),
    )


def _changes(changes: Sequence[Mapping[str, Any]]) -> DotChart:
    """Accuracy after each change, against the accuracy on the same clips unchanged."""
    rows: list[DotRow] = []
    for change in changes:
        found, streams = change["subsets"]["all"], change["streams"]
        now, gap, notes = found["accuracy"], found["difference"], list[str]()
        if "followed" in found:
            share, before = (percent(found[key]["value"], 0) for key in _FOLLOWED)
            notes.append(f"names the other clip’s emotion: {share}%, without the swap {before}%")
        if change["left_out"]:
            notes.append(f"n = {change['n']}")
        rows.append(
            DotRow(
                name=f"{spoken(streams)} {change['kind']}",
                kind=_kind(streams),
                value_at=_percent(now["value"]),
                baseline_at=_percent(found["plain"]["value"]),
                text=f"{signed(gap['value'])} points",
                interval=signed_span(gap),
                low_at=None if now["low"] is None else _percent(now["low"]),
                high_at=None if now["high"] is None else _percent(now["high"]),
                note="; ".join(notes),
            )
        )
    axis = [(float(tick), f"{tick}") for tick in (0, 25, 50, 75, 100)]
    return DotChart(_changes_title(changes), rows, axis)


def _changes_title(changes: Sequence[Mapping[str, Any]]) -> str:
    """What each change does to the accuracy: blanking where it was measured, else swapping."""
    kind = "blanked" if any(change["kind"] == "blanked" for change in changes) else "swapped"
    parts: list[str] = []
    for change in (one for one in changes if one["kind"] == kind):
        gap = change["subsets"]["all"]["difference"]
        clear = gap["low"] is not None and not gap["low"] <= 0 <= gap["high"]
        verb = "falls by" if gap["value"] < 0 else "rises by"
        effect = f"{verb} {percent(abs(gap['value']))} points" if clear else UNCLEAR
        is_are = "is" if len(change["streams"]) == 1 else "are"
        parts.append(f"{effect} when the {spoken(change['streams'])} {is_are} {kind}")
    return f"Accuracy {joined(parts)}."


def _attention(found: Mapping[str, Any]) -> DotChart:
    """Each kind of token's share of the attention, against its share of the prompt's tokens."""
    shares = found["subsets"]["all"]
    # The axis must reach the intervals and the baselines too.
    ends = [one[end] or 0.0 for one in shares.values() for end in ("value", "high")]
    most = max([*ends, *found["tokens"].values()])
    axis = [(tick, f"{tick:g}") for tick in ticks(0.0, 100 * most)]
    end = axis[-1][0]
    rows = [
        DotRow(
            name=spoken([name]),
            kind=name,
            value_at=_position(100 * one["value"], 0.0, end),
            baseline_at=_position(100 * found["tokens"][name], 0.0, end),
            text=f"{percent(one['value'])}%",
            interval=f"{percent(found['tokens'][name])}% of the tokens",
            low_at=None if one["low"] is None else _position(100 * one["low"], 0.0, end),
            high_at=None if one["high"] is None else _position(100 * one["high"], 0.0, end),
        )
        for name, one in shares.items()
    ]
    parts = [
        f"{percent(one['value'])}% to the {spoken([name])}"
        for name, one in shares.items()
        if name != "text"
    ]
    title = f"While it answers, its attention goes {joined(parts)}; the rest goes to text."
    return DotChart(title, rows, [(_position(tick, 0.0, end), name) for tick, name in axis])


def _peaks(found: Mapping[str, Any]) -> str:
    """The layer in which each modality but text gets the most attention, in a sentence."""
    parts: list[str] = []
    for name in _without_text(found["by_layer"]):
        shares = found["by_layer"][name]
        layer, most = found["layers"][shares.index(max(shares))], percent(max(shares))
        peaks = "" if parts else "peaks "
        parts.append(f"to the {spoken([name])} {peaks}in layer {layer} ({most}%)")
    return f"Attention {joined(parts)}." if parts else ""


def _by_layer(found: Mapping[str, Any]) -> list[TitledChart]:
    """Attention by layer, without text: its share is so large that the others would not be told
    apart."""
    sizes = {
        place: max(one["n"] for one in shares.values())
        for place, shares in found["subsets"].items()
    }
    subsets = {
        place: {name: shares[name] for name in _without_text(shares)}
        for place, shares in found.get("by_subset", {}).items()
    }
    return layer_charts(subsets, found["layers"], sizes)


def _without_text(shares: Mapping[str, Any]) -> list[str]:
    return [name for name in shares if name != "text"]


def layer_charts(
    subsets: Mapping[str, Mapping[str, Sequence[float]]],
    layers: Sequence[int],
    sizes: Mapping[str, int],
) -> list[TitledChart]:
    """One chart of shares by layer for each conflict subset, all on one scale; a single one for all
    clips where there are no subsets.

    Args:
        subsets: conflict subset or "all" -> kind of token -> a share for each layer.
        sizes: number of questions of each subset.
    """
    subsets = {place: found for place, found in subsets.items() if place != "all"} or subsets
    top = max((max(s) for found in subsets.values() for s in found.values()), default=0.0)
    charts: list[TitledChart] = []
    for place, found in subsets.items():
        title = f"{WHERE[place]} (n = {sizes[place]})"
        lines = [(kind, spoken([kind]), shares) for kind, shares in found.items()]
        charts.append(TitledChart(title, layer_chart(lines, layers, top=top, title=title)))
    return charts


def _shapley(subsets: Mapping[str, Mapping[str, Any]]) -> Iterator[DotChart]:
    """One chart per conflict subset, all on one scale."""
    every = [found for players in subsets.values() for found in players.values()]
    known = [one[end] for one in every for end in ("value", "low", "high") if one[end] is not None]
    steps = ticks(min(0.0, *known), max(0.0, *known), 4)
    low, high = steps[0], steps[-1]
    for subset, players in subsets.items():
        rows = [
            DotRow(
                name=spoken([name]),
                kind=name,
                value_at=_position(one["value"], low, high),
                baseline_at=_position(0.0, low, high),
                text=plain_signed(one["value"]),
                interval=plain_span(one),
                low_at=None if one["low"] is None else _position(one["low"], low, high),
                high_at=None if one["high"] is None else _position(one["high"], low, high),
            )
            for name, one in players.items()
        ]
        axis = [(_position(step, low, high), f"{step:g}".replace("-", "−")) for step in steps]
        n = max(one["n"] for one in players.values())
        yield DotChart(f"{WHERE[subset]} (n = {n})", rows, axis)


def _shapley_title(players: Mapping[str, Any]) -> str:
    ordered = sorted(players.items(), key=lambda item: -item[1]["value"])
    parts = [f"{spoken([name])} {plain_signed(one['value'])}" for name, one in ordered]
    return f"Contributions to the log-probability of the right answer: {', '.join(parts)} nats."


_FOLLOWED = ("followed", "followed_plain")


def _kind(streams: Sequence[str]) -> str:
    return streams[0] if len(streams) == 1 else "audio" if "audio" in streams else "face"


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _position(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)
