"""A GRPO stage as the report shows it: small charts, warning signs, completions side by side.

Shapes: L log lines, G completions per prompt.
"""

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

Line = Mapping[str, Any]
"""One line of a JSON Lines file."""

WHEN = ("early", "middle", "late")

_PLACEHOLDERS = re.compile(r"<(?:video|audio|face)>")


@dataclass(frozen=True, slots=True)
class GrpoLog:
    """What a GRPO stage recorded: its metrics by step, and some completions of its policy."""

    lines: Sequence[Line]
    """(L,) lines of ``metrics.jsonl``, by step."""
    rewards: Sequence[Mapping[str, Any]]
    """The rewards of the run, with ``name``, ``path`` and ``weight``."""
    outcome: str
    """Name of the reward that is taken as the truth."""
    trusted: Sequence[str]
    """Names of the rewards behind the trust gate."""
    config: Mapping[str, Any]
    groups: Sequence[Line]
    """Prompts with their completions, as in ``completions.jsonl``."""
    first_warned: Mapping[str, int]
    """Metric to the step in which the run first warned of it."""
    labels: Sequence[str] = ()
    """The label set of the run's rows; empty in records of older versions."""

    @property
    def names(self) -> list[str]:
        """Names of the rewards, in the config's order."""
        return [str(one["name"]) for one in self.rewards]

    def lines_of(self, reward: str | None) -> Sequence[Line]:
        """The lines of the steps in which a reward was computed; all lines for None."""
        return gate_open_lines(self.lines, self.trusted) if reward in self.trusted else self.lines

    def points(self, metric: str, reward: str | None = None) -> list[tuple[float, float]]:
        """(step, value) of a metric, for the lines that have it."""
        return [
            (float(line["step"]), float(line[metric]))
            for line in self.lines_of(reward)
            if metric in line
        ]

    def idle(self, step: int) -> list[str]:
        """The rewards that were not computed in a step because the gate was closed."""
        gate = (strength for at, strength in self.points("trust/gate_strength") if at >= step)
        return list(self.trusted) if next(gate, 1.0) == 0 else []

    @property
    def flags(self) -> list[Alert]:
        """The warning signs that the run shows at its end."""
        return find_alerts(self.lines, self.names, self.outcome, self.trusted)

    @property
    def passed(self) -> dict[str, int]:
        """The metrics that the run warned of but that are no warning at its end, with the step of
        the first warning."""
        shown = {flag.metric for flag in self.flags}
        return {metric: step for metric, step in self.first_warned.items() if metric not in shown}


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion. ``label`` is None where it names no label or several; ``right`` is None where
    the row has no label."""

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
    # A resumed run has one such event for each start; the last config is the one that finished.
    config: Mapping[str, Any] = started[-1].get("config") or {}
    rewards = started[-1].get("rewards") or []
    names = [one["name"] for one in rewards]
    trust: Mapping[str, Any] = config.get("trust") or {}
    # Chosen as the run itself chooses it, in outcome_reward.
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
        first_warned=_first_warned(events),
        labels=next((e["labels"] for e in reversed(events) if e.get("kind") == "reward_proof"), ()),
    )


def _first_warned(events: Iterable[Line]) -> dict[str, int]:
    found: dict[str, int] = {}
    for event in events:
        metric, step = event.get("metric"), event.get("step")
        if event.get("kind") == "sign" and isinstance(metric, str) and isinstance(step, int):
            found.setdefault(metric, step)
    return found


def side_by_side(groups: Sequence[Line], rows: int = 2) -> list[tuple[Line, ...]]:
    """Up to ``rows`` triples of prompts from the start, the middle and the end of a run.

    A triple is one prompt that was logged three times, or else three prompts with the same true
    label, or else any three. Candidates nearest to the first, middle and last logged step win.
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


def completions_of(group: Line, classes: Sequence[str] = ()) -> list[Completion]:
    """(G,) completions by falling advantage, then in the order in which they were sampled.

    Args:
        classes: the label set that answers are read with; empty: the emotions that mmemo knows.
    """
    truth = group.get("label")
    labels, right = labels_for(str(truth or next(iter(classes), "neutral")), tuple(classes) or None)
    completions: list[Completion] = []
    for place, text in enumerate(group["completions"]):
        label = read_label(text, labels)
        completions.append(
            Completion(
                text=text,
                label=label,
                right=None if truth is None else label == right,
                ended=bool(group.get("ended", [True] * (place + 1))[place]),
                rewards={name: values[place] for name, values in group["rewards"].items()},
                advantage=float(group["advantages"][place]),
            )
        )
    return sorted(completions, key=lambda one: -one.advantage)


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart. ``legend`` has the colour number and the name of each line."""

    title: str
    note: str
    chart: Markup
    legend: Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class RewardSummary:
    """One reward: its weight, and its metrics at the start and at the end of the run."""

    name: str
    path: str
    weight: float
    role: str
    numbers: Mapping[str, tuple[float, float] | None]


@dataclass(frozen=True, slots=True)
class Moment:
    """A prompt at one moment of the run, with its completions by falling advantage."""

    when: str
    step: int
    group: Line
    question: str
    completions: Sequence[Completion]
    idle: Sequence[str]
    """The rewards that were not computed at that step."""
    video: str | None
    """The clip as a data URI; None where it cannot be read."""
    poster: str | None


@dataclass(frozen=True, slots=True)
class GrpoView:
    """What the report shows of one GRPO stage. ``moments`` has rows of three."""

    name: str
    log: GrpoLog
    panels: Sequence[Panel]
    rewards: Sequence[RewardSummary]
    flags: Sequence[Alert]
    moments: Sequence[Sequence[Moment]]


REWARD_COLUMNS: Mapping[str, str] = {
    "rewards/{reward}/mean": "Mean",
    "rewards/{reward}/within_std": "Spread in groups",
    "rewards/{reward}/advantage_share": "Share of advantage",
    "hack/{reward}/outcome_correlation": "Correlation with outcome",
    "hack/{reward}/unscored_rate": "Unscored",
}
"""Metric to column title in the table of rewards."""


def view_of(name: str, log: GrpoLog) -> GrpoView:
    """The charts, the table of rewards, the warning signs and the completions of a stage."""
    return GrpoView(
        name=name,
        log=log,
        panels=[panel for panel in _panels(log) if panel is not None],
        rewards=[_summary(log, one) for one in log.rewards],
        flags=log.flags,
        moments=_moments(log),
    )


def _summary(log: GrpoLog, given: Mapping[str, Any]) -> RewardSummary:
    name = str(given["name"])
    role = "the outcome" if name == log.outcome else "trusted" if name in log.trusted else ""
    return RewardSummary(
        name=name,
        path=str(given.get("path", "")),
        weight=float(given.get("weight", 1.0)),
        role=role,
        numbers={
            title: quarter_means(log.lines_of(name), metric.format(reward=name))
            for metric, title in REWARD_COLUMNS.items()
        },
    )


def _panels(log: GrpoLog) -> list[Panel | None]:
    """The charts in reading order; None for those that the log has no numbers for."""
    gate = (log.config.get("trust") or {}).get("gate") or {}
    threshold = [float(gate["threshold"])] if "threshold" in gate else []
    return [
        _by_reward(log, "Reward", "rewards/{reward}/mean", "Mean over the completions of a step."),
        _by_reward(log, "Spread within groups", "rewards/{reward}/within_std",
                   "Standard deviation within a prompt’s completions; at 0 there is no signal."),
        _by_reward(log, "Share of the advantage", "rewards/{reward}/advantage_share",
                   "How much of the update each reward decides.", bounds=(0, 1)),
        _by_reward(log, "Correlation with the outcome", "hack/{reward}/outcome_correlation",
                   "Below 0, a reward favours wrong answers.", guides=[0.0], bounds=(-0.5, 0.5)),
        _named(log, "Trust", "τ is 1 where right answers have the better reasoning.",
               {"trust/mean_tau": "mean τ", "trust/share_distrusted": "groups with τ < 1"},
               bounds=(0, 1)),
        _named(log, "Gate", "Opens once the accuracy stays above the dashed line.",
               {"trust/gate_accuracy": "accuracy", "trust/gate_strength": "strength"},
               bounds=(0, 1), guides=threshold),
        _named(log, "KL to the reference", "Mean per token, in nats.", {"kl": "KL"}),
        _named(log, "Engine and trainer", "KL between them, mean per token, in nats.",
               {"sampling/kl": "KL"}),
        _named(log, "Entropy", "Entropy of the policy per token, in nats.", {"entropy": "entropy"}),
        _named(log, "Completion length", "In tokens.",
               {"completions/mean_length": "mean", "completions/min_length": "shortest",
                "completions/max_length": "longest"}),
        _named(log, "Readable samples", "Share of completions that read as language.",
               {"readable": "readable"}, bounds=(0, 1)),
        _named(log, "Groups without a signal", "All completions of the prompt earn the same.",
               {"hack/zero_variance_share": "share of groups"}, bounds=(0, 1), guides=[0.5]),
        _named(log, "Dynamic sampling", "Groups without a signal are replaced by further prompts.",
               {"resampling/prompts": "prompts drawn for them",
                "resampling/groups_missing": "groups still missing"}),
        _named(log, "Labels", "Few distinct labels, or one for most clips, suggest a shortcut.",
               {"hack/distinct_label_rate": "distinct per completion",
                "hack/top_label_share": "most common label"}, bounds=(0, 1)),
        _unscored(log),
    ]  # fmt: skip


def _by_reward(log: GrpoLog, title: str, metric: str, note: str, **look: Any) -> Panel | None:
    """A chart with one line per reward, which has the same colour in every chart."""
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
    note = "Completions that a reward gave no score, and those that name no single label."
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
    """Rows of three moments, each with its clip if that can be found."""
    triples = side_by_side(log.groups)
    names = {str(group["sample_id"]) for triple in triples for group in triple}
    clips = _clips(log.config.get("data") or {}, names)
    return [
        [
            Moment(
                when,
                int(group["step"]),
                group,
                _PLACEHOLDERS.sub("", str(group.get("prompt", ""))).strip(),
                completions_of(group, log.labels),
                log.idle(int(group["step"])),
                *clips.get(str(group["sample_id"]), (None, None)),
            )
            for when, group in zip(WHEN, triple, strict=True)
        ]
        for triple in triples
    ]


def _clips(data: Mapping[str, Any], names: set[str]) -> dict[str, tuple[str | None, str | None]]:
    """Clip and poster of some rows of a stage's JSONL manifests, by sample id."""
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
