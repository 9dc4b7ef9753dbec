"""The table of forecast and measured memory in docs/performance.md.

    python docs/memory_table.py            measures every case and writes the page
    python docs/memory_table.py --check    fails if a case has no row

The cases are those of ``tests/check/test_forecast.py``, on tiny random models.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from mmemo.experiments.study_table import markdown  # noqa: E402
from tests.check.measured import (  # noqa: E402
    CASES,
    config_of,
    forecast_of,
    measure,
    save_base,
    write_rows,
)

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- memory: made by docs/memory_table.py -->", "<!-- /memory -->"
HEAD = ["Step", "Measured, MB", "Forecast / measured"]


def row_of(name: str, folder: Path) -> list[str]:
    """Measure a case."""
    one = CASES[name]
    config = config_of(one, folder, folder / "runs" / name)
    forecast = forecast_of(config).total
    with pytest.MonkeyPatch.context() as patch:
        measured = measure(one.stage, config, patch)
    return [name, f"{measured / 1e6:.1f}", f"{forecast / measured:.2f}"]


def filled(text: str, rows: Sequence[Sequence[str]]) -> str:
    """The page with these rows between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the marks {BEGIN} and {END} are missing; put them back")
    block = "\n".join(markdown(HEAD, [list(row) for row in rows]))
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in arguments:
        missing = [name for name in CASES if f"| {name} |" not in text]
        for name in missing:
            print(f"{name}: run python docs/memory_table.py")
        return len(missing)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        for base in {one.base for one in CASES.values()} - {"composed"}:
            save_base(Path(folder), base)
        rows = [row_of(name, Path(folder)) for name in CASES]
    PAGE.write_text(filled(text, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
