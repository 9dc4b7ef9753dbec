"""Grounding: are the cues that the reasoning names really in the clip?

The measure behind AVEm-DPO's hallucinated and spurious cues (arXiv 2602.07054), as a reward; its
form is ours. Of the cues that the ``<think>`` span claims, those that are present earn, those that
are absent cost, and those that are there but say nothing of the emotion (the scene) only dilute:

    max(0, present - absent_cost · absent) / named · min(1, present / need)

with ``need`` the smaller of ``need`` and the cues there are, so that one safe cue is not enough.
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
"""What a face and a voice of the synthetic world can show."""


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
        cues: of each row the texts that are ``present``, ``absent`` and ``spurious``.
        need: present cues that a full score asks for.
        absent_cost: what an absent cue costs, in present ones.
        vocabulary: cues that are absent wherever a row does not list them. Give your own, or []
            where rows do not list every cue that is there.
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
    """A reasoning of present cues alone; None where none is known."""
    present = (row.get("cues") or {}).get("present", ())
    if not present:
        return None
    return f"<think>{', '.join(present)}.</think><answer>{row.get('label')}</answer>"
