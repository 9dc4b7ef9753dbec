"""The table of methods: what each one did beside its control, from the studies' published results.

    python docs/methods_table.py            writes docs/studies/methods.md and README.md
    python docs/methods_table.py --check    fails if they are not what the results give

The rows are the ``claims`` of each ``train_configs/studies/*/study.yaml``, and every number is from
the ``results.json`` beside it. A row has an anchor, ``<study>-<arm>-<control>-<metric>``, to which
sentences about it link.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo.experiments.study_config import StudyConfig, load_study
from mmemo.experiments.study_table import (
    covered,
    markdown,
    number,
    span,
    title,
    yes_no,
)
from mmemo.formats import p_value

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "train_configs" / "studies"
PAGE = ROOT / "docs" / "studies" / "methods.md"
BEGIN, END = "<!-- methods: made by docs/methods_table.py -->", "<!-- /methods -->"


@dataclass(frozen=True)
class Row:
    """One difference between a method and its control."""

    anchor: str
    first: bool
    """Whether it is the first metric of its claim, the one that the README shows."""
    cells: dict[str, str]
    found: bool
    """Whether the results hold it."""


def rows() -> Iterator[tuple[str, Row]]:
    """Every row with the name of its study's folder."""
    for file in sorted(STUDIES.glob("*/study.yaml")):
        study = load_study(file, [])
        path = file.parent / "results.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        # Results of other seeds are those of an earlier design, whatever its arms are called.
        if results is not None and results["config"]["seeds"] != study.seeds:
            results = None
        under_way = _under_way(results)
        for claim in study.claims:
            for place, metric in enumerate(claim.metrics):
                anchor = f"{file.parent.name}-{claim.arm}-{claim.control}-{metric}"
                row = under_way or _row(study, results, claim.arm, claim.control, metric)
                shown = {
                    "Method": claim.method,
                    "Arm": f"`{claim.arm}`",
                    "Control": f"`{claim.control}`",
                    "Metric": title(metric, study.metrics[metric].model_dump()),
                }
                found = row not in (_NONE, under_way)
                yield file.parent.name, Row(anchor, place == 0, {**shown, **row}, found)


_NONE = {
    "Difference": "not run yet",
    "95% interval": "–",
    "p (Holm)": "–",
    "Seeds": "–",
    "Kept": "–",
}


def _under_way(results: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What stands in the place of numbers while runs are still to come; None if none are. A look at
    half of the seeds must not be taken for the result, nor tempt anyone to end there."""
    runs: Sequence[Mapping[str, Any]] = results["runs"] if results else []
    left = sum(run["status"] == "waiting" for run in runs)
    if not left:
        return None
    return {**_NONE, "Difference": f"{len(runs) - left} of {len(runs)} runs made"}


def _row(
    study: StudyConfig, results: Mapping[str, Any] | None, arm: str, control: str, metric: str
) -> dict[str, str]:
    row = _comparison(results, arm, control, metric)
    if results is None or row is None or row["n"] == 0:
        return _NONE
    shown = results["config"]["metrics"][metric]
    kept: list[str] = []
    for name, one in study.metrics.items():
        guard = _comparison(results, arm, control, name) if one.margin is not None else None
        if guard is not None and guard.get("kept") is not None:
            kept.append(f"{name}: {yes_no(guard['kept'])}")
    return {
        "Difference": number(row["mean"], shown, sign=True),
        "95% interval": span(row, shown, sign=True) or "–",
        "p (Holm)": p_value(row["p_holm"]),
        "Seeds": f"{row['n']} ({covered(results)})",
        "Kept": ", ".join(kept) or "–",
    }


def _comparison(
    results: Mapping[str, Any] | None, arm: str, control: str, metric: str
) -> Mapping[str, Any] | None:
    found: Sequence[Mapping[str, Any]] = (
        results["summary"].get(metric, {}).get("comparisons", []) if results else []
    )
    return next((row for row in found if (row["arm"], row["reference"]) == (arm, control)), None)


def page_block() -> str:
    """All rows, a table for each study."""
    parts: list[str] = []
    found = list(rows())
    for study in dict.fromkeys(name for name, _ in found):
        mine = [row for name, row in found if name == study]
        head = list(mine[0].cells)
        lines = [
            [f'<a id="{row.anchor}"></a>{row.cells["Method"]}', *[row.cells[k] for k in head[1:]]]
            for row in mine
        ]
        name = study.replace("_", " ").capitalize()
        link = f"[The study]({study}.md), with its arms and all comparisons."
        parts += [f"## {name}", "", link, "", *markdown(head, lines), ""]
    return "\n".join(parts).strip()


def readme_block() -> str:
    """The first metric of each claim, each linked to its row."""
    head = ["Method", "beside", "Metric", "Difference", "95% interval", "p (Holm)", "Seeds"]
    lines: list[list[str]] = []
    for _, row in rows():
        if row.first and row.found:
            cells = row.cells
            method = f"[{cells['Method']}](docs/studies/methods.md#{row.anchor})"
            keys = ("Control", "Metric", "Difference", "95% interval", "p (Holm)")
            lines.append([method, *(cells[key] for key in keys), cells["Seeds"].partition(" ")[0]])
    return "\n".join(markdown(head, lines)) if lines else _NO_RESULTS


_NO_RESULTS = (
    "No study has been run with the present code yet. What earlier versions gave is on the pages "
    "of the studies."
)


def filled(text: str, block: str) -> str:
    """A file's text with the block between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the marks {BEGIN} and {END} are missing; put them back")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """What the two files should hold."""
    blocks = {PAGE: page_block(), ROOT / "README.md": readme_block()}
    return {path: filled(path.read_text(encoding="utf-8"), b) for path, b in blocks.items()}


def main(arguments: Sequence[str]) -> int:
    """Write or check the pages."""
    stale = [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: run python docs/methods_table.py")
        return len(stale)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
