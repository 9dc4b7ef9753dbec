"""The table of native backbones: how far each is from the untouched model, and its length.

    python docs/backbones_table.py            compares them and writes docs/backbones.md
    python docs/backbones_table.py --check    fails if a row is missing or has another length

The comparison is that of ``tests/models/qwen/test_kinds.py``, on tiny random models.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mmemo.experiments.study_table import markdown  # noqa: E402
from mmemo.models.backbones import BACKBONES  # noqa: E402
from mmemo.models.qwen.native import NativeModel  # noqa: E402
from tests.models.qwen.kinds import DTYPES, KINDS, differences, load  # noqa: E402

PAGE = ROOT / "docs" / "backbones.md"
BEGIN, END = "<!-- backbones: made by docs/backbones_table.py -->", "<!-- /backbones -->"
HEAD = [
    *("Model", "`model_type`", "Media", "File", "Lines"),
    *("Batches", "Largest difference", "Smallest difference of a fault"),
]


def native(name: str) -> tuple[type[NativeModel], list[str]]:
    """The class that loads a kind, and all types of model that it loads."""
    kind = KINDS[name].config.model_type
    found = BACKBONES[kind]
    return found, sorted(key for key, one in BACKBONES.items() if one is found)


def known(name: str) -> list[str]:
    """What a row says without a comparison."""
    model, types = native(name)
    file = Path(inspect.getfile(model))
    media = [one for one in ("video", "audio") if f"<{one}>" in KINDS[name].media]
    return [
        model.backbone_kind.name,
        ", ".join(f"`{one}`" for one in types),
        ", ".join(media),
        f"`{file.relative_to(ROOT)}`",
        str(len(file.read_text(encoding="utf-8").splitlines())),
    ]


def compared(name: str) -> list[str]:
    """Number of batches, the largest difference, and the smallest that a fault makes."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(name, KINDS[name].save(Path(folder)))
        cases = [one for dtype in DTYPES for one in differences(name, loaded, dtype)]
    faults = [least for one in cases for least in one.controls]
    return [str(len(cases)), f"{max(one.difference for one in cases):g}", f"{min(faults):.1f}"]


def filled(text: str, rows: Sequence[Sequence[str]]) -> str:
    """The page with these rows between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the marks {BEGIN} and {END} are missing; put them back")
    block = "\n".join(markdown(HEAD, [list(row) for row in rows]))
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def stale(text: str) -> list[str]:
    """Kinds whose row is missing, has another file or length, or a difference."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    count = {name: str(len(DTYPES) * 3 * len(KINDS[name].media)) for name in KINDS}
    return [
        name for name in KINDS if [*known(name), count[name], "0"] not in [row[:-1] for row in rows]
    ]


def main(arguments: Sequence[str]) -> int:
    """Write or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in arguments:
        for name in stale(text):
            print(f"{name}: run python docs/backbones_table.py")
        return len(stale(text))
    rows = [[*known(name), *compared(name)] for name in KINDS]
    PAGE.write_text(filled(text, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
