"""Grounding: pays for reasoning that names cues which are present in the clip.

Range: 0 to 1. None: the row lists no present cue.
Source: the hallucinated and spurious cues of AVEm-DPO (arXiv 2602.07054); the reward's form is
ours.

Among the cues that the ``<think>`` span claims, present ones earn, absent ones cost, and those that
are present but irrelevant to the emotion (the scene) only dilute:

    max(0, present - absent_cost · absent) / named · min(1, present / need)

``need`` is capped at the number of present cues. It makes a single safe cue insufficient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.world.emotions import ACTION_UNITS

_VOICE = ("pitch", "range", "loudness", "rate", "ending", "breath")
WORLD_CUES: tuple[str, ...] = (
    *ACTION_UNITS.values(),
    *(f"{level} {noun}" for noun in _VOICE for level in ("low", "high")),
)
"""All cues of faces and voices in the synthetic world."""


def grounding(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    cues: Sequence[Mapping[str, Sequence[str]] | None],
    need: int = 2,
    absent_cost: float = 1.0,
    vocabulary: Sequence[str] = WORLD_CUES,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row lists no present cue.

    Args:
        cues: each row's texts by kind: ``present``, ``absent`` and ``spurious``.
        need: number of present cues that a full score requires.
        absent_cost: cost of an absent cue, in units of a present one.
        vocabulary: cues that are absent unless a row lists them. Give your own, or [] if rows do
            not list all present cues.
    """
    scores: list[float | None] = []
    for completion, row in zip(completions, cues, strict=True):
        truth = row or {}
        present = set(truth.get("present", ()))
        spurious = set(truth.get("spurious", ())) - present
        absent = {*truth.get("absent", ()), *vocabulary} - present - spurious
        if not present:
            scores.append(None)
            continue
        phrases = {cue: (cue,) for cue in (*present, *absent, *spurious)}
        named = read_claims(think_text(completion_text(completion)), phrases).asserted
        right, wrong = len(named & present), len(named & absent)
        earned = max(0.0, right - absent_cost * wrong) / max(1, len(named))
        scores.append(earned * min(1.0, right / max(1, min(need, len(present)))))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """A reasoning of present cues alone; None where the row lists none."""
    present = (row.get("cues") or {}).get("present", ())
    if not present:
        return None
    return f"<think>{', '.join(present)}.</think><answer>{row.get('label')}</answer>"
