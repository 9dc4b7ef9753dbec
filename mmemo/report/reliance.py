"""What an evaluation's answers hang on, as the report shows it: sentences, and places of bars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmemo.evaluation.reliance.summary import read_reliance
from mmemo.evaluation.results import EvaluatedRun
from mmemo.evaluation.scoring import Block
from mmemo.formats import (
    percent,
    plain_signed,
    plain_span,
    signed,
    signed_span,
    spoken,
)
from mmemo.report.charts import layer_chart, ticks

WHERE: Mapping[str, str] = {
    "all": "All clips",
    "video_aligned": "Where the face is right",
    "audio_aligned": "Where the voice is right",
    "consistent": "Where both agree",
    "none": "Other clips",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One row of a chart. ``kind``: the modality that gives the colour. ``at``, ``low``, ``high``,
    ``base`` are places in percent of the width: the value, its interval, and what it is seen
    against. ``said``, ``span``: the value and its interval in words."""

    name: str
    kind: str
    at: float
    base: float
    said: str
    span: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Rows under a sentence. ``axis``: places in percent and what stands there."""

    title: str
    marks: Sequence[Mark]
    axis: Sequence[tuple[float, str]]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A finished chart and what stands over it."""

    title: str
    chart: Markup


@dataclass(frozen=True, slots=True)
class RelianceView:
    """What was measured of one run. ``shapley_title`` stands over one chart a conflict subset, and
    ``attention_peaks`` over ``attention_layers``, which an older measurement has not.
    ``asked``: questions that changes were made to, as far as they could; ``left_out``: of these,
    the most that a change could not be made to."""

    name: str
    changes: Chart | None
    attention: Chart | None
    attention_missing: str | None
    attention_peaks: str
    attention_layers: Sequence[Drawing]
    shapley_title: str
    shapley: Sequence[Chart]
    shapley_n: int
    instruction: str
    asked: int
    left_out: int


def views_of(runs: Sequence[EvaluatedRun]) -> list[RelianceView]:
    """Of each run that was measured.

    Raises:
        EvaluationError: what was measured is damaged or of other answers.
    """
    views: list[RelianceView] = []
    for run in runs:
        found = None if run.result is None else read_reliance(run.result)
        if found is not None:
            views.append(_view(run.name, found))
    return views


def errors_title(name: str, block: Block) -> str | None:
    """Whose label the wrong answers are, in a sentence; None where that is not known."""
    errors = block.get("reliance", {}).get("errors")
    if errors is None:
        return None
    if errors["signed"]["value"] is None:
        return f"{name} has no wrong answer on a conflict clip."
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


def _changes(changes: Sequence[Mapping[str, Any]]) -> Chart:
    """Accuracy under each change, against that on the same clips as they are."""
    marks: list[Mark] = []
    for change in changes:
        found, streams = change["subsets"]["all"], change["streams"]
        now, gap, notes = found["accuracy"], found["difference"], list[str]()
        if "followed" in found:
            share, before = (percent(found[key]["value"], 0) for key in _FOLLOWED)
            notes.append(f"says what the other clip shows: {share}%, unswapped {before}%")
        if change["left_out"]:
            notes.append(f"n = {change['n']}")
        marks.append(
            Mark(
                name=f"{spoken(streams)} {change['kind']}",
                kind=_kind(streams),
                at=_percent(now["value"]),
                base=_percent(found["plain"]["value"]),
                said=f"{signed(gap['value'])} points",
                span=signed_span(gap),
                low=None if now["low"] is None else _percent(now["low"]),
                high=None if now["high"] is None else _percent(now["high"]),
                note="; ".join(notes),
            )
        )
    axis = [(float(tick), f"{tick}") for tick in (0, 25, 50, 75, 100)]
    return Chart(_changes_title(changes), marks, axis)


def _changes_title(changes: Sequence[Mapping[str, Any]]) -> str:
    kind = "blanked" if any(change["kind"] == "blanked" for change in changes) else "swapped"
    parts: list[str] = []
    for change in (one for one in changes if one["kind"] == kind):
        gap = change["subsets"]["all"]["difference"]
        sure = gap["low"] is not None and not gap["low"] <= 0 <= gap["high"]
        moved = "falls by" if gap["value"] < 0 else "rises by"
        points = f"{moved} {percent(abs(gap['value']))} points"
        with_what = f"with {spoken(change['streams'])} {kind}"
        parts.append(f"{points if sure else 'does not clearly change'} {with_what}")
    return f"Accuracy {', '.join(parts)}."


def _attention(found: Mapping[str, Any]) -> Chart:
    """Each kind's share of the attention, against its share of the prompt's tokens."""
    shares = found["subsets"]["all"]
    most = max([*(one["value"] for one in shares.values()), *found["tokens"].values()])
    axis = [(tick, f"{tick:g}") for tick in ticks(0.0, 100 * most)]
    end = axis[-1][0]
    marks = [
        Mark(
            name=spoken([name]),
            kind=name,
            at=_place(100 * one["value"], 0.0, end),
            base=_place(100 * found["tokens"][name], 0.0, end),
            said=f"{percent(one['value'])}%",
            span=f"of the tokens {percent(found['tokens'][name])}%",
            low=None if one["low"] is None else _place(100 * one["low"], 0.0, end),
            high=None if one["high"] is None else _place(100 * one["high"], 0.0, end),
        )
        for name, one in shares.items()
    ]
    parts = [
        f"{percent(one['value'])}% lies on the {spoken([name])}"
        for name, one in shares.items()
        if name != "text"
    ]
    title = f"Of its attention while it answers, {', '.join(parts)}; the rest lies on text."
    return Chart(title, marks, [(_place(tick, 0.0, end), name) for tick, name in axis])


def _peaks(found: Mapping[str, Any]) -> str:
    """In which layer each medium gets most."""
    parts: list[str] = []
    for name in _seen(found["by_layer"]):
        shares = found["by_layer"][name]
        layer, most = found["layers"][shares.index(max(shares))], percent(max(shares))
        parts.append(f"{'' if parts else 'is highest '}in layer {layer} ({most}%)")
        parts[-1] = f"to the {spoken([name])} {parts[-1]}"
    return f"Attention {', '.join(parts)}." if parts else ""


def _by_layer(found: Mapping[str, Any]) -> list[Drawing]:
    """Of the media alone: text has the rest, and so much that they would not be told apart."""
    sizes = {
        place: max(one["n"] for one in shares.values())
        for place, shares in found["subsets"].items()
    }
    subsets = {
        place: {name: shares[name] for name in _seen(shares)}
        for place, shares in found.get("by_subset", {}).items()
    }
    return layer_drawings(subsets, found["layers"], sizes)


def _seen(shares: Mapping[str, Any]) -> list[str]:
    return [name for name in shares if name != "text"]


def layer_drawings(
    subsets: Mapping[str, Mapping[str, Sequence[float]]],
    layers: Sequence[int],
    sizes: Mapping[str, int],
) -> list[Drawing]:
    """One chart of shares by layer for each conflict subset, all on one scale; one for all clips
    where there are no subsets.

    Args:
        subsets: place -> kind of token -> a share for each layer.
        sizes: questions of each place.
    """
    subsets = {place: found for place, found in subsets.items() if place != "all"} or subsets
    top = max((max(s) for found in subsets.values() for s in found.values()), default=0.0)
    drawings: list[Drawing] = []
    for place, found in subsets.items():
        title = f"{WHERE[place]} (n = {sizes[place]})"
        lines = [(kind, spoken([kind]), shares) for kind, shares in found.items()]
        drawings.append(Drawing(title, layer_chart(lines, layers, top=top, title=title)))
    return drawings


def _shapley(subsets: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    """One chart for each conflict subset, all on one scale."""
    every = [found for players in subsets.values() for found in players.values()]
    known = [one[end] for one in every for end in ("value", "low", "high") if one[end] is not None]
    steps = ticks(min(0.0, *known), max(0.0, *known), 4)
    low, high = steps[0], steps[-1]
    for subset, players in subsets.items():
        marks = [
            Mark(
                name=spoken([name]),
                kind=name,
                at=_place(one["value"], low, high),
                base=_place(0.0, low, high),
                said=plain_signed(one["value"]),
                span=plain_span(one),
                low=None if one["low"] is None else _place(one["low"], low, high),
                high=None if one["high"] is None else _place(one["high"], low, high),
            )
            for name, one in players.items()
        ]
        axis = [(_place(step, low, high), f"{step:g}".replace("-", "−")) for step in steps]
        n = max(one["n"] for one in players.values())
        yield Chart(f"{WHERE[subset]} (n = {n})", marks, axis)


def _shapley_title(players: Mapping[str, Any]) -> str:
    ordered = sorted(players.items(), key=lambda item: -item[1]["value"])
    parts = [f"{spoken([name])} {plain_signed(one['value'])}" for name, one in ordered]
    return f"What makes the right answer likelier, in nats: {', '.join(parts)}."


_FOLLOWED = ("followed", "followed_plain")


def _kind(streams: Sequence[str]) -> str:
    return streams[0] if len(streams) == 1 else "audio" if "audio" in streams else "face"


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _place(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)
