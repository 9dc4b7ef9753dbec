"""The headers of the configs for Qwen2.5-Omni say what is forecast, and the page has each case."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mmemo.check.fitting import parse_size

DOCS = Path(__file__).parent.parent / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEADERS, TABLE = load("memory_headers"), load("memory_table")


def test_a_header_is_what_is_forecast() -> None:
    """One of them; ``python docs/memory_headers.py --check`` forecasts all."""
    assert HEADERS.main(["--check", "sft"]) == 0, "run python docs/memory_headers.py"


def test_a_header_of_other_values_is_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in HEADERS.FOLDER.glob("*.yaml"):
        text = file.read_text(encoding="utf-8").replace("_batch_size: 2", "_batch_size: 4")
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(HEADERS, "FOLDER", tmp_path)
    assert HEADERS.main(["--check", "sft"]) == 1
    with pytest.raises(SystemExit, match="are missing"):
        HEADERS.filled("output_dir: x\n", [])


@pytest.mark.parametrize("name", ["sft", "grpo_ptr", "avem_dpo", "pipeline"])
def test_every_hardware_is_in_a_header_and_suffices(name: str) -> None:
    text = (HEADERS.FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    for title, hardware in HEADERS.HARDWARE.items():
        line = next(one for one in text.splitlines() if one.startswith(f"# - {title}: "))
        totals = line.partition(": ")[2].split(", ")
        assert len(totals) == (len(HEADERS.PIPELINE) if name == "pipeline" else 1)
        for total in totals:
            assert parse_size(" ".join(total.split()[-2:])) < hardware.memory


def test_the_page_has_a_row_for_each_case() -> None:
    assert TABLE.main(["--check"]) == 0
