"""The words of each language that answers are read with: one file a language in ``languages/``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).with_name("languages")


@dataclass(frozen=True, slots=True)
class Language:
    """The words of one language.

    ``labels`` maps an emotion (its English base form) to the forms that mean it, and
    ``abbreviations`` an emotion to the name that corpora give its label.
    """

    code: str
    name: str
    labels: Mapping[str, tuple[str, ...]]
    abbreviations: Mapping[str, str]


@lru_cache(maxsize=1)
def languages() -> Mapping[str, Language]:
    """Every language that has a file, by its code (``en``, ``zh``)."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.toml"))}


def _read(path: Path) -> Language:
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    labels = {label: tuple(forms) for label, forms in values.get("labels", {}).items()}
    return Language(path.stem, values["name"], labels, values.get("abbreviations", {}))


@lru_cache(maxsize=1)
def emotion_forms() -> Mapping[str, tuple[str, ...]]:
    """Every emotion (its English base form) -> its forms in all languages, English first."""
    found: dict[str, tuple[str, ...]] = {}
    for language in languages().values():
        for emotion, forms in language.labels.items():
            found[emotion] = (*found.get(emotion, ()), *forms)
    return found
