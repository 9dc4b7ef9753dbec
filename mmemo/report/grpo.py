"""A GRPO stage as the report shows it: small charts, warning signs, completions side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmemo.answers.parsing import labels_for, read_label
from mmemo.report.charts import COLOURS, Points, line_chart
from mmemo.report.gallery import clip_uris
from mmemo.rewards.hacking import Alert, find_alerts, gate_open_lines, quarter_means
from mmemo.run_log import read_events

# What a GRPO stage wrote down: its numbers by step, and what its policy said.
#
# L log lines, G completions of a prompt.

Line = Mapping[str, Any]

WHEN = ("early", "middle", "late")


@dataclass(frozen=True, slots=True)
class GrpoLog:
    """``lines``: (L,) of ``metrics.jsonl``, by step. ``rewards``: as the run was given them, with
    ``name``, ``path``, ``weight``. ``outcome``: the reward taken for the truth. ``trusted``: those
    behind the gate. ``groups``: prompts with their completions, as in ``completions.jsonl``.
    ``named``: metric to the step in which the run first named a sign."""

    lines: Sequence[Line]
    rewards: Sequence[Mapping[str, Any]]
    outcome: str
    trusted: Sequence[str]
    config: Mapping[str, Any]
    groups: Sequence[Line]
    named: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """Of the rewards, in the config's order."""
        return [str(one["name"]) for one in self.rewards]

    def lines_of(self, reward: str | None) -> Sequence[Line]:
        """The lines from steps in which a reward was asked; None: all."""
        return gate_open_lines(self.lines, self.trusted) if reward in self.trusted else self.lines

    def points(self, metric: str, reward: str | None = None) -> list[tuple[float, float]]:
        """A number by step."""
        return [
            (float(line["step"]), float(line[metric]))
            for line in self.lines_of(reward)
            if metric in line
        ]

    def idle(self, step: int) -> list[str]:
        """The rewards that were not asked in a step, because the gate was closed."""
        gate = (strength for at, strength in self.points("trust/gate_strength") if at >= step)
        return list(self.trusted) if next(gate, 1.0) == 0 else []

    @property
    def flags(self) -> list[Alert]:
        """The warning signs that the run shows at its end."""
        return find_alerts(self.lines, self.names, self.outcome, self.trusted)

    @property
    def passed(self) -> dict[str, int]:
        """The signs named on the way that it no longer shows at its end."""
        shown = {flag.metric for flag in self.flags}
        return {metric: step for metric, step in self.named.items() if metric not in shown}


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion. ``label``: what it names, None where nothing or several; ``right``: None
    where the row has no label."""

    text: str
    label: str | None
    right: bool | None
    ended: bool
    rewards: Mapping[str, float | None]
    advantage: float


def read_grpo(folder: Path) -> GrpoLog | None:
    """The log of a GRPO stage; None where ``folder`` holds none."""
    events = list(read_events(folder / "events.jsonl"))
    started = [event for event in events if event.get("kind") == "grpo"]
    by_step = {
        line["step"]: line
        for line in read_events(folder / "metrics.jsonl")
        if isinstance(line.get("step"), int)  # a step done again after a kill counts once
    }
    if not started or not by_step:
        return None
    config: Mapping[str, Any] = started[-1].get("config") or {}
    rewards = started[-1].get("rewards") or []
    names = [one["name"] for one in rewards]
    trust: Mapping[str, Any] = config.get("trust") or {}
    guess = "outcome" if "outcome" in names else next(iter(names), "")
    given = (config.get("watch") or {}).get("outcome")
    wanted = ("step", "sample_id", "completions", "rewards", "advantages")
    return GrpoLog(
        lines=[by_step[step] for step in sorted(by_step)],
        rewards=rewards,
        outcome=given or trust.get("outcome") or guess,
        trusted=trust.get("trusted", ()),
        config=config,
        groups=[
            line
            for line in read_events(folder / "completions.jsonl")
            if all(name in line for name in wanted)
        ],
        named=_named_of_grpo_log(events),
    )


def _named_of_grpo_log(events: Iterable[Line]) -> dict[str, int]:
    found: dict[str, int] = {}
    for event in events:
        metric, step = event.get("metric"), event.get("step")
        if event.get("kind") == "sign" and isinstance(metric, str) and isinstance(step, int):
            found.setdefault(metric, step)
    return found


def side_by_side(groups: Sequence[Line], rows: int = 2) -> list[tuple[Line, ...]]:
    """Up to ``rows`` triples of prompts from the start, the middle and the end of a run.

    One prompt three times where it was logged so often; else three of one true label; else any.
    Among equals those nearest to the run's first, middle and last logged step.
    """
    steps = sorted({int(group["step"]) for group in groups})
    if len(steps) < len(WHEN):
        return []
    aims = (steps[0], steps[len(steps) // 2], steps[-1])
    third = len(steps) / 3
    parts = [
        [g for g in groups if int(steps.index(int(g["step"])) / third) == part] for part in range(3)
    ]

    def distance(group: Line, part: int) -> int:
        return abs(int(group["step"]) - aims[part])

    chosen: list[tuple[Line, ...]] = []
    left = [sorted(part, key=lambda g, at=at: distance(g, at)) for at, part in enumerate(parts)]
    for key in ("sample_id", "label", ""):
        for first in list(left[0]):
            mates = [
                next((g for g in part if not key or g.get(key) == first.get(key)), None)
                for part in left[1:]
            ]
            if len(chosen) == rows:
                return chosen
            shown = {str(triple[0]["sample_id"]) for triple in chosen}
            if None not in mates and str(first["sample_id"]) not in shown:
                triple = (first, *(mate for mate in mates if mate is not None))
                chosen.append(triple)
                left = [[g for g in p if g is not t] for p, t in zip(left, triple, strict=True)]
    return chosen


def completions_of(group: Line) -> list[Completion]:
    """(G,) the best paid first: by advantage, then as they were drawn."""
    truth = group.get("label")
    labels, right = labels_for(str(truth)) if truth else labels_for("neutral")
    said: list[Completion] = []
    for place, text in enumerate(group["completions"]):
        label = read_label(text, labels)
        said.append(
            Completion(
                text=text,
                label=label,
                right=None if truth is None else label == right,
                ended=bool(group.get("ended", [True] * (place + 1))[place]),
                rewards={name: values[place] for name, values in group["rewards"].items()},
                advantage=float(group["advantages"][place]),
            )
        )
    return sorted(said, key=lambda one: -one.advantage)


_PLACES = re.compile(r"<(?:video|audio|face)>")


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart. ``legend``: colour number and name of each line."""

    title: str
    note: str
    chart: Markup
    legend: Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Component:
    """One reward: its weight, and numbers at the start and the end of the run."""

    name: str
    path: str
    weight: float
    role: str
    numbers: Mapping[str, tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Moment:
    """A prompt of one moment of the run with what the policy said to it, the best paid first.
    ``idle``: rewards that were not asked then.
    ``video``, ``poster``: data URIs; None where the clip cannot be read."""

    when: str
    step: int
    group: Line
    question: str
    said: Sequence[Completion]
    idle: Sequence[str]
    video: str | None
    poster: str | None


@dataclass(frozen=True, slots=True)
class GrpoView:
    """What the report shows of one stage. ``moments``: rows of three."""

    name: str
    log: GrpoLog
    panels: Sequence[Panel]
    components: Sequence[Component]
    flags: Sequence[Alert]
    moments: Sequence[Sequence[Moment]]


NUMBERS: Mapping[str, str] = {
    "rewards/{reward}/mean": "Mean",
    "rewards/{reward}/within_std": "Spread in groups",
    "rewards/{reward}/advantage_share": "Share of advantage",
    "hack/{reward}/outcome_correlation": "Correlation with outcome",
    "hack/{reward}/unscored_rate": "Unscored",
}
"""Columns of the table of components."""


def view_of(name: str, log: GrpoLog) -> GrpoView:
    """The charts, table, signs and completions of a stage."""
    return GrpoView(
        name=name,
        log=log,
        panels=[panel for panel in _panels(log) if panel is not None],
        components=[_component(log, one) for one in log.rewards],
        flags=log.flags,
        moments=_moments(log),
    )


def _component(log: GrpoLog, given: Mapping[str, Any]) -> Component:
    name = str(given["name"])
    role = "the outcome" if name == log.outcome else "trusted" if name in log.trusted else ""
    return Component(
        name=name,
        path=str(given.get("path", "")),
        weight=float(given.get("weight", 1.0)),
        role=role,
        numbers={
            title: quarter_means(log.lines_of(name), metric.format(reward=name))
            for metric, title in NUMBERS.items()
        },
    )


def _panels(log: GrpoLog) -> list[Panel | None]:
    """The charts, in the order in which they are read."""
    gate = (log.config.get("trust") or {}).get("gate") or {}
    threshold = [float(gate["threshold"])] if "threshold" in gate else []
    return [
        _by_reward(log, "Reward", "rewards/{reward}/mean", "Mean over the step’s answers."),
        _by_reward(log, "Spread within groups", "rewards/{reward}/within_std",
                   "Standard deviation among the answers to a prompt; at 0 it teaches nothing."),
        _by_reward(log, "Share of the advantage", "rewards/{reward}/advantage_share",
                   "How much of the update each reward decides.", bounds=(0, 1)),
        _by_reward(log, "Correlation with the outcome", "hack/{reward}/outcome_correlation",
                   "Below 0 a reward pays for wrong answers.", guides=[0.0], bounds=(-0.5, 0.5)),
        _named(log, "Trust", "τ is 1 where right answers have the better reasoning.",
               {"trust/mean_tau": "mean τ", "trust/share_distrusted": "groups with τ < 1"},
               bounds=(0, 1)),
        _named(log, "Gate", "Opens when the accuracy has stayed at the dashed line.",
               {"trust/gate_accuracy": "accuracy", "trust/gate_strength": "strength"},
               bounds=(0, 1), guides=threshold),
        _named(log, "KL to the reference", "Per token, in nats.", {"kl": "KL"}),
        _named(log, "Entropy", "Of the policy, per token, in nats.", {"entropy": "entropy"}),
        _named(log, "Length of answers", "In tokens.",
               {"completions/mean_length": "mean", "completions/min_length": "shortest",
                "completions/max_length": "longest"}),
        _named(log, "Groups without a signal", "All answers to the prompt earn the same.",
               {"hack/zero_variance_share": "share of groups"}, bounds=(0, 1), guides=[0.5]),
        _named(log, "Labels", "Few distinct labels, or one for most clips, is a shortcut.",
               {"hack/distinct_label_rate": "distinct per answer",
                "hack/top_label_share": "commonest label"}, bounds=(0, 1)),
        _unscored(log),
    ]  # fmt: skip


def _by_reward(log: GrpoLog, title: str, metric: str, note: str, **look: Any) -> Panel | None:
    """One line a reward; each has the same colour in every chart."""
    series = {
        (at % COLOURS, name): log.points(metric.format(reward=name), name)
        for at, name in enumerate(log.names)
    }
    return _panel(title, note, series, **look)


def _named(
    log: GrpoLog, title: str, note: str, metrics: Mapping[str, str], **look: Any
) -> Panel | None:
    series = {(at, name): log.points(key) for at, (key, name) in enumerate(metrics.items())}
    return _panel(title, note, series, **look)


def _unscored(log: GrpoLog) -> Panel | None:
    series = {
        (at % COLOURS, name): log.points(f"hack/{name}/unscored_rate", name)
        for at, name in enumerate(log.names)
    }
    last = len(log.names)
    series[last % COLOURS, "no single label"] = log.points("hack/unreadable_rate")
    note = "Answers that a reward gave no number, and those that name no one label."
    return _panel("Unscored", note, series, bounds=(0, 1))


def _panel(
    title: str, note: str, series: Mapping[tuple[int, str], Points], **look: Any
) -> Panel | None:
    found = {key: points for key, points in series.items() if points}
    if not found:
        return None
    chart = line_chart(
        [(name, points) for (_, name), points in found.items()],
        title=title,
        y_label="",
        colours=[colour for colour, _ in found],
        linear=True,
        **look,
    )
    return Panel(title, note, chart, list(found))


def _moments(log: GrpoLog) -> list[list[Moment]]:
    """Rows of three moments, each with its clip where that can be found."""
    triples = side_by_side(log.groups)
    names = {str(group["sample_id"]) for triple in triples for group in triple}
    clips = _clips(log.config.get("data") or {}, names)
    return [
        [
            Moment(
                when,
                int(group["step"]),
                group,
                _PLACES.sub("", str(group.get("prompt", ""))).strip(),
                completions_of(group),
                log.idle(int(group["step"])),
                *clips.get(str(group["sample_id"]), (None, None)),
            )
            for when, group in zip(WHEN, triple, strict=True)
        ]
        for triple in triples
    ]


def _clips(data: Mapping[str, Any], names: set[str]) -> dict[str, tuple[str | None, str | None]]:
    """Video and poster of some rows of a stage's JSONL manifests, by sample."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for manifest in data.get("manifests", ()):
        if not str(manifest).endswith(".jsonl"):
            continue
        for row in read_events(Path(manifest)):
            name = str(row.get("sample_id"))
            media = [*row.get("videos", ()), *row.get("faces", ()), *row.get("audios", ())]
            if name in names and name not in found and media:
                path = Path(data.get("media_root", ".")) / str(media[0])
                found[name] = clip_uris(path, row.get("start"), row.get("end"))
    return found
