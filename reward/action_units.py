"""Action units: pays for the F1 of the action units that the reasoning claims against the clip's.

Range: 0 to 1. None: the row does not say which units are active.
Source: Facial-R1's R_AU (arXiv 2511.10254), in the paper's form F1 in [0, 1]; the released code
uses 2·F1 - 1.

Only the ``<think>`` span counts. The released code takes every mention as a claim; here a denied or
hedged unit claims nothing, and neither does one that is both claimed and denied. Claiming a unit
outside the truth costs, even one that the data set never labels. Where the truth is that no unit is
active, saying so ("No action units are active.") scores 1; claiming one, or saying nothing about
them, scores 0. A unit may be named by number ("AU12", "AUs 1, 2 and 4"), by its name in the Facial
Action Coding System, or in the words of mmemo's synthetic world.

The truth may be given in any form of :mod:`mmemo.data.action_units`: intensities from 0 to 1 or
from 0 to 5, OpenFace's columns, or a list of the active units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.data.action_units import ACTIVE, common_scale, read_units
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

# "AU1, 2 and 4", and after a plural also "AUs 1 2 4"; "AU12 0" and "AU12 0.8" are values.
_NUMBER = r"(?!0+\b)\d{1,2}\b(?!\.\d|%)"
_LIST = re.compile(
    rf"\b(?:(?:aus|action units)[\s\-_:]*{_NUMBER}"
    rf"(?:(?:\s*[,+&/]\s*|\s+)(?:and\s+|or\s+|nor\s+)?{_NUMBER})*"
    rf"|(?:au|action unit)[\s\-_]*{_NUMBER}"
    rf"(?:(?:\s*[,+&/]\s*(?:and\s+|or\s+|nor\s+)?|\s+(?:and|or|nor)\s+){_NUMBER})*)",
    re.IGNORECASE,
)
# "AU1-AU28", "AUs 1 to 28": a claim of every unit between.
_RANGE = re.compile(
    r"\b(?:aus?|action units?)[\s\-_:]*(\d{1,2})\s*(?:[-–—~～]|\bto\b|\bthrough\b|至|到)\s*"
    r"(?:aus?[\s\-_]*|action units?[\s\-_]*)?(\d{1,2})(?!\d|\.\d|%)",
    re.IGNORECASE,
)
_ANY = "any unit"
_ANY_WORDINGS = (
    *("action unit", "action units", "active action unit", "active action units"),
    *("facial action unit", "facial action units", "au", "aus", "active au", "active aus"),
    *("visible action units", "动作单元", "面部动作单元", "动作单位"),
)


def au_f1(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    aus: Sequence[Any],
    active: float = ACTIVE,
    **_: Any,
) -> list[float | None]:
    """F1, 0 to 1 per completion; None where the row names no unit at all.

    Args:
        aus: each row's units, in a form of :mod:`mmemo.data.action_units`. An empty list says that
            no unit is active, an empty mapping or None says nothing.
        active: minimum intensity, from 0 to 1, of an active unit. A unit below half of it, or
            without a value, is inactive; in between it neither earns nor costs.
    """
    scores: list[float | None] = []
    truths = common_scale([read_units(one) for one in aus])
    for completion, given, truth in zip(completions, aus, truths, strict=True):
        if not truth and not isinstance(given, list | tuple):
            scores.append(None)
            continue
        shown = {unit for unit, value in truth.items() if value >= active}
        doubtful = {unit for unit, value in truth.items() if active / 2 <= value < active}
        thought = think_text(completion_text(completion))
        claimed = claimed_units(thought) - doubtful
        if shown:
            scores.append(2 * len(claimed & shown) / (len(claimed) + len(shown)))
        else:
            scores.append(float(not claimed and denies_all(thought)))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """A reasoning that names the row's active units, or says that there are none; None where the
    row does not say."""
    truth = read_units(row.get("aus"))
    if not truth and not isinstance(row.get("aus"), list | tuple):
        return None
    shown = [unit for unit, value in truth.items() if value >= ACTIVE]
    said = f"{', '.join(shown)} are active." if shown else "No action units are active."
    return f"<think>{said}</think><answer>{row.get('label')}</answer>"


def attacks(row: Mapping[str, Any]) -> dict[str, str]:
    """The right reasoning with a unit that is not active, and with all units."""
    right = gold(row)
    if right is None:
        return {}
    truth = read_units(row.get("aus"))
    absent = next(unit for unit in ACTION_UNITS if not truth.get(unit))
    return {
        "added unit": right.replace("<think>", f"<think>{absent} is active. ", 1),
        "all units": f"<think>{', '.join(ACTION_UNITS)}.</think><answer></answer>",
    }


def denies_all(text: str) -> bool:
    """Whether ``text`` says that no action unit is active."""
    return _ANY in read_claims(text, {_ANY: _ANY_WORDINGS}).denied


def claimed_units(text: str) -> frozenset[str]:
    """The units, such as ``AU12``, that ``text`` claims."""
    return read_claims(_LIST.sub(_spell_out, _RANGE.sub(_fill, text)), _PHRASES).asserted


def _phrases() -> dict[str, tuple[str, ...]]:
    words = {unit: (unit,) for unit in ACTION_UNITS}
    for names in (FACS_NAMES, {unit: (one,) for unit, one in WORLD_WORDS.items()}):
        words.update({unit: (*words[unit], *more) for unit, more in names.items()})
    return words


def _fill(found: re.Match[str]) -> str:
    """``AU1-AU3`` -> ``AU1 and AU2 and AU3``."""
    first, last = int(found.group(1)), int(found.group(2))
    if first >= last:
        return found.group()
    units = [f"AU{unit}" for unit in range(first, last + 1) if f"AU{unit}" in ACTION_UNITS]
    return " and ".join(units)


def _spell_out(found: re.Match[str]) -> str:
    """``AUs 1, 02 and 4`` -> ``AU1, AU2 and AU4``, so that each unit is a separate mention."""
    listed = re.sub(r"^\D+", "", found.group())
    return re.sub(r"\d+", lambda number: f"AU{int(number.group())}", listed)


_PHRASES = _phrases()
