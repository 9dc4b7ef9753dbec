"""Cue rates: measures how often the reasoning cites a spurious or a hallucinated cue.

Range: 0 or 1, so that the mean over answers is a rate; lower is better. None: for ``spurious``, the
row lists no spurious cue; for ``hallucinated``, it lists no present one.
Source: the two failures that AVEm-DPO addresses (arXiv 2602.07054); the form is ours.

``spurious`` is 1 for a reasoning that names a cue that is present but irrelevant to the emotion,
such as the scene; ``hallucinated`` for one that names an absent cue. They are meant for ``scores``
of ``mmemo eval``, or for GRPO with a negative weight.
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
    """1 where the reasoning names a present but irrelevant cue; None where the row lists none.

    Args:
        cues: each row's texts by kind: ``present``, ``absent`` and ``spurious``.
    """
    scores: list[float | None] = []
    for completion, row in zip(completions, cues, strict=True):
        truth = row or {}
        known = set(truth.get("spurious", ())) - set(truth.get("present", ()))
        scores.append(_names_any(completion, known, known) if known else None)
    return scores


def hallucinated(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    cues: Cues,
    vocabulary: Sequence[str] = WORLD_CUES,
    **_: Any,
) -> list[float | None]:
    """1 where the reasoning names an absent cue; None where the row lists no present cue.

    Args:
        cues: each row's texts by kind: ``present``, ``absent`` and ``spurious``.
        vocabulary: cues that are absent unless a row lists them. Give your own, or [] if rows do
            not list all present cues.
    """
    scores: list[float | None] = []
    for completion, row in zip(completions, cues, strict=True):
        truth = row or {}
        in_clip = {*truth.get("present", ()), *truth.get("spurious", ())}
        absent = {*truth.get("absent", ()), *vocabulary} - in_clip
        known = in_clip | absent
        scores.append(_names_any(completion, known, absent) if truth.get("present") else None)
    return scores


def _names_any(completion: Chat, known: set[str], wanted: set[str]) -> float:
    phrases = {cue: (cue,) for cue in known}
    named = read_claims(think_text(completion_text(completion)), phrases).asserted
    return float(bool(named & wanted))
