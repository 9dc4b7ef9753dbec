"""The table of native backbones has a row for each, of its present file, without a difference."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backbones_table", DOCS / "backbones_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load()


def test_the_page_has_a_row_for_each() -> None:
    assert not TABLE.stale(TABLE.PAGE.read_text()), "run python docs/backbones_table.py"


def test_a_file_stays_short() -> None:
    """Adding a backbone is one file of at most 130 lines; the first of a kind may be longer."""
    lines = {name: int(TABLE.known(name)[4]) for name in TABLE.KINDS}
    assert max(lines[name] for name in lines if name != "qwen2_5_omni") <= 130


def test_another_length_or_a_difference_is_stale() -> None:
    text = TABLE.PAGE.read_text()
    row = next(line for line in text.splitlines() if "`qwen2_vl`" in line)
    cells = row.split("|")
    longer = [*cells[:5], f" {int(cells[5]) + 1} ", *cells[6:]]
    apart = [*cells[:7], " 0.5 ", *cells[8:]]
    for changed in (longer, apart):
        assert TABLE.stale(text.replace(row, "|".join(changed))) == ["qwen2_vl"]
    with pytest.raises(SystemExit, match="put them back"):
        TABLE.filled("no marks", [])
