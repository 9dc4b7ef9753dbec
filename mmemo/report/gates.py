"""How a model's experts are routed, as the report shows it: sentences, bars and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmemo.evaluation.reliance.gates import read_gates
from mmemo.evaluation.results import EvaluatedRun
from mmemo.formats import joined, percent, signed_span, spoken
from mmemo.report.reliance import UNCLEAR, WHERE, TitledChart, layer_charts

_LABELLED_FROM = 0.16
"""The smallest share of a bar that has room for its name."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One colour of a stacked bar. ``width`` is in percent; ``inside`` is the text inside it."""

    kind: str
    width: float
    inside: str


@dataclass(frozen=True, slots=True)
class StackedBar:
    """The weights of one group of ``n`` questions. ``beside`` names the weights that are too small
    to be labelled inside; ``text`` names all of them."""

    name: str
    n: int
    segments: Sequence[Segment]
    beside: str
    text: str


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """How often each expert of one modality is used."""

    kind: str
    name: str
    columns: Sequence[str]
    """Names of a linear layer's experts, the most used one first."""
    groups: Sequence[tuple[str, int | None, Sequence[float]]]
    """Name, n and shares of each group of clips."""
    layers: Sequence[tuple[str, int | None, Sequence[float]]]
    """Name, None and shares of each decoder layer."""


@dataclass(frozen=True, slots=True)
class GatesView:
    """Expert routing of one run. ``weighed`` and ``used`` are sentences, empty where the adapter
    has no weights, or no experts to choose from."""

    name: str
    role: str
    n: int
    weighed: str
    subsets: Sequence[StackedBar]
    emotions: Sequence[StackedBar]
    kinds: Sequence[str]
    """The modalities that have a weight."""
    table: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    """Name of each subset, and the weight of each modality with its interval."""
    layers: Sequence[TitledChart]
    used: str
    experts: Sequence[ExpertUse]


def gates_of_runs(runs: Sequence[EvaluatedRun]) -> list[GatesView]:
    """The routing of each run whose model has experts with a gate.

    Raises:
        EvaluationError: a record is damaged, or belongs to other answers.
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
        layers=layer_charts(by_layer, found["layers"], sizes["subsets"]) if by_layer else [],
        used=_used(use["alike"]) if use else "",
        experts=[_expert_use(kind, found) for kind in use["subsets"]] if use else [],
    )


def _weighed(name: str, weights: Mapping[str, Any]) -> str:
    """How the weights differ between clips where the face is right and where the voice is."""
    subsets, shift = weights["subsets"], weights["shift"]
    kinds = [kind for kind in ("face", "audio") if kind in subsets["all"]]
    kinds = kinds if len(kinds) == 2 else [kind for kind in subsets["all"] if kind != "text"]

    def listed(place: str) -> str:
        parts = [f"the {spoken([k])} {percent(subsets[place][k]['value'], 0)}%" for k in kinds]
        return joined(parts)

    if not shift:
        return f"{name} gives {listed('all')} of the weight."
    changes: list[str] = []
    for kind in kinds:
        one = shift[kind]
        span = f" ({signed_span(one)})" if one["low"] is not None else ""
        clear = one["low"] is not None and not one["low"] <= 0 <= one["high"]
        verb = "rises" if one["value"] > 0 else "falls"
        effect = f"{verb} by {percent(abs(one['value']))} points" if clear else UNCLEAR
        subject = "that of" if changes else "the weight of"
        changes.append(f"{subject} the {spoken([kind])} {effect}{span}")
    return (
        f"Where the face is right, {name} gives {listed('video_aligned')} of the weight; where the "
        f"voice is right, {listed('audio_aligned')}. From the first to the second, "
        f"{joined(changes)}."
    )


def _used(alike: Mapping[str, Mapping[str, float | None]]) -> str:
    """Whether experts are chosen by emotion, in a sentence."""
    parts = [
        f"{percent(one['same'], 0)}% against {percent(one['other'], 0)}% for the {spoken([kind])}"
        for kind, one in alike.items()
        if one["same"] is not None and one["other"] is not None
    ]
    if not parts:
        return "Expert use by emotion and by layer."
    return (
        "How often two clips of the same emotion use the same expert, against two clips of "
        f"different emotions: {joined(parts)}."
    )


def _bar(name: str, n: int, weights: Mapping[str, float]) -> StackedBar:
    texts = {kind: f"{spoken([kind])} {percent(value, 0)}" for kind, value in weights.items()}
    segments = [
        Segment(kind, round(100 * value, 2), texts[kind] if value >= _LABELLED_FROM else "")
        for kind, value in weights.items()
    ]
    beside = ", ".join(texts[one.kind] for one in segments if not one.inside)
    return StackedBar(name, n, segments, beside, ", ".join(f"{one}%" for one in texts.values()))


def _expert_use(kind: str, found: Mapping[str, Any]) -> ExpertUse:
    use, sizes = found["use"], found["sizes"]
    subsets, emotions = use["subsets"][kind], use["emotions"][kind]
    number = len(subsets["all"])
    columns = ["most used", "second", "third", *(f"{at}th" for at in range(4, number + 1))]
    layers = zip(found["layers"], use["by_layer"][kind], strict=True)
    return ExpertUse(
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
