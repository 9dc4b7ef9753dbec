"""How numbers and lists are written in the report and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 as ``12.3``, None as a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(value: float | None) -> str:
    """0.1234 as ``+12.3``, None as a dash."""
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def span(found: Mapping[str, Any] | None) -> str:
    """The interval as ``70.1–78.0``, empty where there is none."""
    if found is None or found["low"] is None:
        return ""
    return f"{percent(found['low'])}–{percent(found['high'])}"


def signed_span(found: Mapping[str, Any]) -> str:
    """The interval of a difference as ``−1.2 to +3.4``, empty where there is none."""
    return "" if found["low"] is None else f"{signed(found['low'])} to {signed(found['high'])}"


def plain(value: float | None) -> str:
    """A score of any scale: 0.12345 as ``0.123``, 34.5678 as ``34.57``, None as a dash."""
    if value is None:
        return "–"
    text = f"{value:.{3 if abs(value) < 10 else 2}f}".replace("-", "−")
    return text.removeprefix("−") if not text.strip("−0.") else text


def short(value: float) -> str:
    """A number with no more digits than it needs: ``1``, ``0.75``."""
    return f"{value:.3g}".replace("-", "−")


def plain_span(found: Mapping[str, Any]) -> str:
    """The interval of a score: ``0.701–0.780``, or ``−0.1 to 0.2`` where the lower end is below
    0."""
    if found["low"] is None:
        return ""
    between = "–" if found["low"] >= 0 else " to "
    return plain(found["low"]) + between + plain(found["high"])


def plain_signed(value: float | None) -> str:
    """A difference of scores: ``+0.123``, None as a dash."""
    text = plain(value)
    return f"+{text}" if value is not None and text.strip("0.") and value > 0 else text


def p_value(value: float | None) -> str:
    """A p-value with three digits, smaller ones as ``<0.001``; None as a dash."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def minutes(seconds: float | None) -> str:
    """A duration: ``45 s``, ``3.2 min``; None as a dash."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def counted(number: int, noun: str) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def confidence(results: Sequence[Any]) -> str:
    """The confidence level of evaluations' intervals: ``95%``; ``95% or 90%`` where they differ."""
    found = dict.fromkeys(result.made["bootstrap"]["confidence"] for result in results)
    return " or ".join(map(level, found))


def level(share: float) -> str:
    """A confidence level: 0.95 as ``95%``."""
    return f"{round(100 * share, 2):g}%"


def spoken(names: Sequence[str]) -> str:
    """Modalities in words: ``voice``; ``video and face``."""
    return " and ".join({"audio": "voice"}.get(name, name) for name in names)


def joined(parts: Sequence[str]) -> str:
    """A list in words: ``one``; ``one and two``; ``one, two, and three``."""
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"
