"""What a GRPO stage wrote down: its numbers by step, and what its policy said.

L log lines, G completions of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo.record import read_events
from mmemo.rl.labels import labels_for, read_label
from mmemo.rl.signs import Flag, asked_lines, find_flags

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
        return asked_lines(self.lines, self.trusted) if reward in self.trusted else self.lines

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
    def flags(self) -> list[Flag]:
        """The warning signs that the run shows at its end."""
        return find_flags(self.lines, self.names, self.outcome, self.trusted)

    @property
    def passed(self) -> dict[str, int]:
        """The signs named on the way that it no longer shows at its end."""
        shown = {flag.metric for flag in self.flags}
        return {metric: step for metric, step in self.named.items() if metric not in shown}


@dataclass(frozen=True, slots=True)
class Said:
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
        named=_named(events),
    )


def _named(events: Iterable[Line]) -> dict[str, int]:
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


def completions_of(group: Line) -> list[Said]:
    """(G,) the best paid first: by advantage, then as they were drawn."""
    truth = group.get("label")
    labels, right = labels_for(str(truth)) if truth else labels_for("neutral")
    said: list[Said] = []
    for place, text in enumerate(group["completions"]):
        label = read_label(text, labels)
        said.append(
            Said(
                text=text,
                label=label,
                right=None if truth is None else label == right,
                ended=bool(group.get("ended", [True] * (place + 1))[place]),
                rewards={name: values[place] for name, values in group["rewards"].items()},
                advantage=float(group["advantages"][place]),
            )
        )
    return sorted(said, key=lambda one: -one.advantage)
