"""Action units: pays for the F1 of the action units that the reasoning claims against the clip's.

Range: 0 to 1. None: the row has no active action unit.
Source: Facial-R1's R_AU (arXiv 2511.10254), in the paper's form F1 in [0, 1]; the released code
uses 2·F1 - 1.

Only the ``<think>`` span counts. The released code takes every mention as a claim; here a denied or
hedged unit claims nothing, and neither does one that is both claimed and denied. Claiming a unit
outside the truth costs, even one that the data set never labels. A unit may be named by number
("AU12", "AUs 1, 2 and 4"), by its name in the Facial Action Coding System, or in the words of
mmemo's synthetic world.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.data.row_models import ACTION_UNITS
from mmemo.world.emotions import ACTION_UNITS as WORLD_WORDS

FACS_NAMES: Mapping[str, tuple[str, ...]] = {
    "AU1": ("inner brow raiser", "inner brow raised", "inner brow raise"),
    "AU2": ("outer brow raiser", "outer brow raised", "outer brow raise"),
    "AU4": ("brow lowerer", "brow lowered", "lowered brows", "furrowed brows", "furrowed brow"),
    "AU5": ("upper lid raiser", "upper lid raised", "raised upper lids"),
    "AU6": ("cheek raiser", "cheek raised", "raised cheeks"),
    "AU7": ("lid tightener", "tightened lids"),
    "AU9": ("nose wrinkler", "wrinkled nose"),
    "AU10": ("upper lip raiser", "raised upper lip"),
    "AU12": ("lip corner puller", "lip corners pulled up", "raised lip corners"),
    "AU14": ("dimpler",),
    "AU15": ("lip corner depressor", "lip corners pulled down", "lowered lip corners"),
    "AU17": ("chin raiser", "raised chin"),
    "AU20": ("lip stretcher", "stretched lips"),
    "AU23": ("lip tightener", "tightened lips"),
    "AU24": ("lip pressor",),
    "AU25": ("lips part", "parted lips"),
    "AU26": ("jaw drop", "dropped jaw"),
    "AU43": ("eyes closed", "closed eyes"),
}

_LIST = re.compile(
    r"\b(?:aus?|action units?)[\s\-_]*"
    r"(\d{1,2}(?:(?:\s*[,+&/]\s*|\s+)(?:and\s+|or\s+|nor\s+)?\d{1,2})*)\b",
    re.IGNORECASE,
)


def au_f1(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    aus: Sequence[Mapping[str, float] | None],
    active: float = 0.2,
    **_: Any,
) -> list[float | None]:
    """F1, 0 to 1 per completion; None where the row has no active unit.

    Args:
        aus: each row's intensities by unit, 0 to 1.
        active: minimum intensity of an active unit. A unit below half of it, or without a value, is
            inactive; in between it neither earns nor costs.
    """
    scores: list[float | None] = []
    for completion, truth in zip(completions, aus, strict=True):
        shown = {unit for unit, value in (truth or {}).items() if value >= active}
        doubtful = {unit for unit, value in (truth or {}).items() if active / 2 <= value < active}
        claimed = claimed_units(think_text(completion_text(completion))) - doubtful
        right = 2 * len(claimed & shown)
        scores.append(right / (len(claimed) + len(shown)) if shown else None)
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """A reasoning that names the row's active units; None without any."""
    shown = [unit for unit, value in (row.get("aus") or {}).items() if value >= 0.2]
    named = ", ".join(shown)
    return (
        f"<think>{named} are active.</think><answer>{row.get('label')}</answer>" if shown else None
    )


def claimed_units(text: str) -> frozenset[str]:
    """The units, such as ``AU12``, that ``text`` claims."""
    return read_claims(_LIST.sub(_spell_out, text), _PHRASES).asserted


def _phrases() -> dict[str, tuple[str, ...]]:
    words = {unit: (unit,) for unit in ACTION_UNITS}
    for names in (FACS_NAMES, {unit: (one,) for unit, one in WORLD_WORDS.items()}):
        words.update({unit: (*words[unit], *more) for unit, more in names.items()})
    return words


def _spell_out(found: re.Match[str]) -> str:
    """``AUs 1, 02 and 4`` -> ``AU1, AU2 and AU4``, so that each unit is a separate mention."""
    return re.sub(r"\d+", lambda number: f"AU{int(number.group())}", found.group(1))


_PHRASES = _phrases()
