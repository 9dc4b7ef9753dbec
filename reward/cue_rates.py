"""How often a reasoning leans on what it should not: the two failures that AVEm-DPO is after.

``spurious``: a cue that is there and says nothing of the emotion, such as the scene.
``hallucinated``: a cue that is not there (arXiv 2602.07054). Both are 1 for a reasoning that names
one and 0 for one that does not, so that their mean over answers is a rate. They are measures, lower
is better: give them to ``scores`` of ``mmemo eval``, or to GRPO with a negative weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.content import load

WORLD_CUES: Sequence[str] = load("reward/grounding.py:WORLD_CUES")

Cues = Sequence[Mapping[str, Sequence[str]] | None]


def spurious(
    prompts: Sequence[Chat], completions: Sequence[Chat], *, cues: Cues, **_: Any
) -> list[float | None]:
    """1 where a cue is named that is there but irrelevant; None where the row lists none.

    Args:
        cues: of each row the texts that are ``present``, ``absent`` and ``spurious``.
    """
    found: list[float | None] = []
    for completion, row in zip(completions, cues, strict=True):
        truth = row or {}
        known = set(truth.get("spurious", ())) - set(truth.get("present", ()))
        found.append(_names_any(completion, known, known) if known else None)
    return found


def hallucinated(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    cues: Cues,
    vocabulary: Sequence[str] = WORLD_CUES,
    **_: Any,
) -> list[float | None]:
    """1 where a cue is named that is not in the clip; None where the row lists no present cue.

    Args:
        vocabulary: cues that are absent wherever a row does not list them. Give your own, or []
            where rows do not list every cue that is there.
    """
    found: list[float | None] = []
    for completion, row in zip(completions, cues, strict=True):
        truth = row or {}
        there = {*truth.get("present", ()), *truth.get("spurious", ())}
        absent = {*truth.get("absent", ()), *vocabulary} - there
        known = there | absent
        found.append(_names_any(completion, known, absent) if truth.get("present") else None)
    return found


def _names_any(completion: Chat, known: set[str], wanted: set[str]) -> float:
    phrases = {cue: (cue,) for cue in known}
    named = read_claims(think_text(completion_text(completion)), phrases).asserted
    return float(bool(named & wanted))
