"""Action units in the forms in which data sets release them, as one mapping of intensities.

Accepted are

- intensities by unit, ``{"AU12": 0.8}``: from 0 to 1, or from 0 to 5 (the FACS grades A to E);
- OpenFace's columns, ``{"AU12_r": 2.5, "AU12_c": 1}``: ``_r`` is an intensity from 0 to 5, ``_c``
  presence. Where both are given, presence decides whether the unit is active;
- lists of active units: ``["AU4", "AU12"]``, ``[4, 12]``, or the text ``"AU4+12"``. Each is active
  at full intensity, and all others are inactive.

Intensities of 0 to 5 are divided by 5. A mapping is on that scale if one of its values is above 1.
As a mapping of small values alone does not tell its scale, :func:`common_scale` decides for all
rows of a manifest together.

A unit is active from :data:`ACTIVE` on: grade A, a trace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

# Facial Action Coding System (Ekman, Friesen, Hager 2002): action units, head and eye positions.
UNITS: tuple[str, ...] = tuple(
    f"AU{unit}" for unit in (1, 2, *range(4, 8), *range(9, 47), *range(51, 66))
)
"""The names of all units."""

ACTIVE = 0.2
"""Lowest intensity, from 0 to 1, of an active unit: the FACS grade A, 1 of 5."""

_HIGHEST = 5.0
_NAME = re.compile(r"(?:AU|action[ _]?unit)?[ _\-]*0*(\d{1,2})", re.IGNORECASE)
_OPENFACE = re.compile(r"(.*?)_([rc])", re.IGNORECASE)


def unit_name(name: object) -> str | None:
    """``AU04``, ``au 4``, ``4`` or 4 as ``AU4``; None for anything else."""
    if isinstance(name, bool) or not isinstance(name, int | str):
        return None
    found = _NAME.fullmatch(str(name).strip())
    return f"AU{int(found.group(1))}" if found and int(found.group(1)) else None


def read_units(value: object) -> dict[str, float]:
    """Intensities from 0 to 1 by unit, from any of the accepted forms; {} for None.

    Raises:
        ValueError: a name is no unit, or an intensity is not from 0 to 5.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return _listed(part for part in re.split(r"[\s,;+&/|]+", value) if part)
    if isinstance(value, Mapping):
        given = cast("Mapping[Any, Any]", value)
        return to_unit_scale(_intensities(given))
    return _listed(cast("Iterable[object]", value))


def canonical(value: object) -> object:
    """A row's value as a mapping of unit names, where it is in another accepted form; intensities
    keep their scale, except OpenFace's. Any other value is returned as it is, for a later check
    that names what is wrong with it. An empty list says that no unit is active."""
    try:
        if isinstance(value, str | list):
            return read_units(value) or dict.fromkeys(UNITS, 0.0)
        if isinstance(value, Mapping):
            given = cast("Mapping[Any, Any]", value)
            odd = [key for key in given if f"{key}" not in UNITS]
            return _intensities(given) if odd else given
    except (ValueError, TypeError):
        pass
    return value


def active_units(value: object, active: float = ACTIVE) -> list[str]:
    """The units of intensity ``active`` or more."""
    return [unit for unit, intensity in read_units(value).items() if intensity >= active]


def to_unit_scale(intensities: Mapping[str, float]) -> dict[str, float]:
    """Intensities from 0 to 1, of which any above 1 says that all are from 0 to 5."""
    high = any(value > 1 for value in intensities.values())
    return {unit: value / _HIGHEST if high else value for unit, value in intensities.items()}


def common_scale(rows: Sequence[Mapping[str, float] | None]) -> list[dict[str, float]]:
    """:func:`to_unit_scale` of many rows together, which are all on one scale."""
    high = any(value > 1 for row in rows for value in (row or {}).values())
    divisor = _HIGHEST if high else 1.0
    return [{unit: value / divisor for unit, value in (row or {}).items()} for row in rows]


def _listed(names: Iterable[object]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in names:
        unit = unit_name(name)
        if unit is None:
            raise ValueError(f"{name!r} is not an action unit; names look like AU4 or AU12")
        found[unit] = 1.0
    return found


def _intensities(given: Mapping[Any, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    present: dict[str, bool] = {}
    openface: set[str] = set()
    for key, value in given.items():
        parts = _OPENFACE.fullmatch(str(key).strip())
        unit = unit_name(parts.group(1) if parts else key)
        if unit is None:
            raise ValueError(f"{key!r} is not an action unit; names look like AU4 or AU12")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} is {value!r}; give an intensity")
        number = float(value)
        if not 0 <= number <= _HIGHEST:
            raise ValueError(f"{key} is {number:g}; intensities lie between 0 and 1, or 0 and 5")
        if parts and parts.group(2).lower() == "c":
            present[unit] = number > 0
        elif parts:
            found[unit] = number / _HIGHEST
            openface.add(unit)
        else:
            found[unit] = number
    for unit, here in present.items():
        intensity = found.get(unit, 1.0)
        found[unit] = max(ACTIVE, intensity) if here else 0.0
    return found
