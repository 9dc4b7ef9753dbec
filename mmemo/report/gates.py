"""What a model's experts choose, as the report shows it: sentences, bars and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmemo.evaluation.reliance.gates import read_gates
from mmemo.evaluation.results import EvaluatedRun
from mmemo.formats import percent, signed_span, spoken
from mmemo.report.reliance import WHERE, Drawing, layer_drawings

_ENTITLED = 0.16
"""The share of a bar in which its name has room."""


@dataclass(frozen=True, slots=True)
class Part:
    """One colour of a bar. ``width`` in percent; ``inside``: what is written in it."""

    kind: str
    width: float
    inside: str


@dataclass(frozen=True, slots=True)
class Bar:
    """The weights of one group of ``n`` questions. ``beside``: those too small to be named inside;
    ``said``: all of them in words."""

    name: str
    n: int
    parts: Sequence[Part]
    beside: str
    said: str


@dataclass(frozen=True, slots=True)
class Expert:
    """The experts of one medium. ``columns``: what a linear layer's experts are called, the most
    used first; ``groups`` (of clips) and ``layers``: rows of a name, an n that layers have not, and
    shares."""

    kind: str
    name: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, int | None, Sequence[float]]]
    layers: Sequence[tuple[str, int | None, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class GatesView:
    """What was noted of one run; ``weighed`` and ``used`` are empty where there is no such thing.
    ``kinds``: what weights are of. ``table``: a name and a number with interval for each."""

    name: str
    role: str
    n: int
    weighed: str
    subsets: Sequence[Bar]
    emotions: Sequence[Bar]
    kinds: Sequence[str]
    table: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    layers: Sequence[Drawing]
    used: str
    experts: Sequence[Expert]


def gates_of_runs(runs: Sequence[EvaluatedRun]) -> list[GatesView]:
    """Of each run whose model has experts that choose.

    Raises:
        EvaluationError: what was noted is damaged or of other answers.
    """
    views: list[GatesView] = []
    for run in runs:
        found = None if run.result is None else read_gates(run.result)
        if found is not None:
            views.append(_view(run, found))
    return views


def _view(run: EvaluatedRun, found: Mapping[str, Any]) -> GatesView:
    weights, use, sizes = found["weights"], found["use"], found["sizes"]
    subsets = weights["subsets"] if weights else {}
    kinds = list(subsets["all"]) if weights else []
    by_layer = weights["by_layer"] if weights and found["layers"] else {}
    return GatesView(
        name=run.name,
        role=run.role,
        n=found["n"],
        weighed=_weighed(run.name, weights) if weights else "",
        subsets=[
            _bar(WHERE[place], sizes["subsets"][place], {k: x["value"] for k, x in one.items()})
            for place, one in subsets.items()
        ],
        emotions=[
            _bar(name, sizes["emotions"][name], one)
            for name, one in (weights["emotions"] if weights else {}).items()
        ],
        kinds=[spoken([kind]) for kind in kinds],
        table=[(WHERE[place], [one[kind] for kind in kinds]) for place, one in subsets.items()],
        layers=layer_drawings(by_layer, found["layers"], sizes["subsets"]) if by_layer else [],
        used=_used(use["alike"]) if use else "",
        experts=[_expert(kind, found) for kind in use["subsets"]] if use else [],
    )


def _weighed(name: str, weights: Mapping[str, Any]) -> str:
    """What weighs how much where the face is right and where the voice is, and what changes."""
    subsets, shift = weights["subsets"], weights["shift"]
    kinds = [kind for kind in ("face", "audio") if kind in subsets["all"]]
    kinds = kinds if len(kinds) == 2 else [kind for kind in subsets["all"] if kind != "text"]

    def listed(place: str) -> str:
        parts = [f"the {spoken([k])} {percent(subsets[place][k]['value'], 0)}%" for k in kinds]
        return _and(parts)

    if not shift:
        return f"{name} weighs {listed('all')}."
    moved: list[str] = []
    for kind in kinds:
        one = shift[kind]
        span = f" ({signed_span(one)})" if one["low"] is not None else ""
        sure = one["low"] is not None and not one["low"] <= 0 <= one["high"]
        how = "rises" if one["value"] > 0 else "falls"
        points = f"{how} by {percent(abs(one['value']))} points"
        moved.append(f"that of the {spoken([kind])} {points if sure else _UNCLEAR}{span}")
    return (
        f"Where the face is right, {name} weighs {listed('video_aligned')}; where the voice is "
        f"right, {listed('audio_aligned')}. From the one to the other the weight {_and(moved)}."
    ).replace("the weight that of", "the weight of", 1)


_UNCLEAR = "does not clearly change"


def _used(alike: Mapping[str, Mapping[str, float | None]]) -> str:
    """Whether experts go by emotion."""
    parts = [
        f"{percent(one['same'], 0)}% against {percent(one['other'], 0)}% for the {spoken([kind])}"
        for kind, one in alike.items()
        if one["same"] is not None and one["other"] is not None
    ]
    if not parts:
        return "Which expert is used, by emotion and by layer."
    return (
        "How often two clips of one emotion have the same expert, against two clips of different "
        f"emotions: {', '.join(parts)}."
    )


def _bar(name: str, n: int, weights: Mapping[str, float]) -> Bar:
    said = {kind: f"{spoken([kind])} {percent(value, 0)}" for kind, value in weights.items()}
    parts = [
        Part(kind, round(100 * value, 2), said[kind] if value >= _ENTITLED else "")
        for kind, value in weights.items()
    ]
    small = [said[part.kind] for part in parts if not part.inside]
    return Bar(name, n, parts, ", ".join(small), ", ".join(f"{one}%" for one in said.values()))


def _expert(kind: str, found: Mapping[str, Any]) -> Expert:
    use, sizes = found["use"], found["sizes"]
    subsets, emotions = use["subsets"][kind], use["emotions"][kind]
    number = len(subsets["all"])
    columns = ["most used", "second", "third", *(f"{at}th" for at in range(4, number + 1))]
    layers = zip(found["layers"], use["by_layer"][kind], strict=True)
    return Expert(
        kind=kind,
        name=spoken([kind]),
        columns=columns[:number],
        groups=[
            *((_GROUPS[at], sizes["subsets"][at], shares) for at, shares in subsets.items()),
            *((name, sizes["emotions"][name], shares) for name, shares in emotions.items()),
        ],
        layers=[(f"layer {layer}", None, shares) for layer, shares in layers],
    )


_GROUPS: Mapping[str, str] = {
    "all": "all clips",
    "video_aligned": "face right",
    "audio_aligned": "voice right",
    "consistent": "both agree",
    "none": "other clips",
}


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
