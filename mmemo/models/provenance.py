"""Where the parts of a model come from, for its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from transformers.utils.hub import cached_file


def part_source(name: str | None) -> dict[str, str | None]:
    """``hub`` id or ``folder`` name, and ``license`` as the part's own card says it.

    A folder's path would mean nothing elsewhere, so only its name is kept. All are None for a part
    that is made here; ``license`` is None where nothing says.
    """
    if name is None:
        return {"hub": None, "folder": None, "license": None}
    local = Path(name).exists()
    return {
        "hub": None if local else name,
        "folder": Path(name).resolve().name if local else None,
        "license": _license(name),
    }


def _license(name: str) -> str | None:
    try:
        file = cached_file(name, "README.md")
        text = Path(str(file)).read_text(encoding="utf-8")
        card: Any = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    if not isinstance(card, dict):
        return None
    values = cast(dict[str, Any], card)
    found = values.get("license_name") or values.get("license")
    return None if found is None else str(found)
