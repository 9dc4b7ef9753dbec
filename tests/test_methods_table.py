"""The table of methods is what the results give, and no sentence about a method goes beyond it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmemo.config import read_yaml
from mmemo.experiments.study_config import VARIABLES, load_study
from mmemo.experiments.study_table import summary

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STUDIES = sorted((ROOT / "train_configs" / "studies").glob("*/study.yaml"))
CLAIMING = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "papers.md",
    DOCS / "studies" / "index.md",
]
CLAIMING += sorted((DOCS / "concepts").glob("*.md"))


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", DOCS / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = load()


def test_the_pages_hold_what_the_results_give() -> None:
    stale = [path.name for path, text in TABLE.pages().items() if path.read_text() != text]
    assert not stale, "run python docs/methods_table.py"


def test_no_seed_serves_two_studies_or_the_quickstart() -> None:
    """The seeds that worlds are rendered with; those of EmoDB are its folds."""
    used = [0, 1, 2]  # launch/seeds.sh
    for path in STUDIES:
        study = read_yaml(path, later=VARIABLES)
        if not any(stage["stage"] == "world" for stage in study["start"]):
            continue
        used += [*study["seeds"], *study.get("tuning", {}).get("seeds", [])]
    assert len(used) == len(set(used))


STUDY = """
name: toy
output_dir: out
seeds: [1, 2, 3]
start: [{name: world, stage: world}, {name: pairs, stage: pairs}]
stages: [{name: evaluation, stage: eval}]
arms: {plain: {}, better: {}, other: {}}
reference: plain
metrics:
  hallucinated: {stage: evaluation, path: a, better: lower, percent: true}
  accuracy: {stage: evaluation, path: b, better: higher, percent: true, margin: 0.02}
claims:
  - {method: The method, arm: better, control: plain, metrics: [hallucinated, accuracy]}
  - {method: Another, arm: other, control: plain, metrics: [accuracy]}
"""
VALUES = {  # hallucinated and accuracy; by seed, `better` is 0.10, 0.11, 0.12 below `plain`
    "plain": [(0.4, 0.7), (0.5, 0.8), (0.3, 0.6)],
    "better": [(0.3, 0.71), (0.39, 0.8), (0.18, 0.59)],
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my_study"
    folder.mkdir()
    (folder / "study.yaml").write_text(STUDY)
    study = load_study(folder / "study.yaml", [])
    config = study.model_dump(mode="json")
    runs: list[dict[str, Any]] = [
        {
            "arm": arm,
            "seed": seed,
            "status": "done",
            "metrics": {"hallucinated": values[0], "accuracy": values[1]},
        }
        for arm, found in VALUES.items()
        for seed, values in enumerate(found, start=1)
    ]
    results = {
        "runs": runs,
        "seed_has": ["world", "pairs"],
        "config": config,
        "summary": summary(runs, list(study.arms), config["metrics"], study.pairs),
    }
    (folder / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(TABLE, "STUDIES", tmp_path)
    return folder


def test_a_row_gives_the_difference_with_what_carries_it(toy: Path) -> None:
    rows = {row.anchor: row.cells for _, row in TABLE.rows()}
    cells = rows["my_study-better-plain-hallucinated"]
    # -0.10, -0.11, -0.12: mean -0.11, standard error 0.01 / sqrt(3), t(2) = 4.303
    assert cells["Difference"] == "−11.0"
    assert cells["95% interval"] == "−13.5 to −8.5"
    assert cells["Seeds"] == "3 (data, preference pairs and training)"
    assert cells["p (Holm)"] == "0.003"  # the only comparison with numbers
    # Accuracy: +0.01, 0, -0.01, so -2.5 points cannot be excluded.
    assert cells["Kept"] == "accuracy: no"
    assert rows["my_study-other-plain-accuracy"]["Difference"] == "not run yet"
    text = TABLE.readme_block()
    assert "[The method](docs/studies/methods.md#my_study-better-plain-hallucinated)" in text
    assert "Another" not in text


def test_a_study_under_way_shows_no_numbers(toy: Path) -> None:
    path = toy / "results.json"
    results = json.loads(path.read_text())
    results["runs"].append({"arm": "other", "seed": 1, "status": "waiting", "metrics": {}})
    path.write_text(json.dumps(results))
    assert {row.cells["Difference"] for _, row in TABLE.rows()} == {"6 of 7 runs made"}
    assert "The method" not in TABLE.readme_block()


def test_a_result_that_changes_makes_the_page_stale(toy: Path) -> None:
    before = TABLE.page_block()
    path = toy / "results.json"
    path.write_text(path.read_text().replace('"mean": -0.11', '"mean": -0.12'))
    assert TABLE.page_block() != before


def test_a_file_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="marks"):
        TABLE.filled("nothing", "block")


# Sentences. A number about a method stands in the table, links to the row that carries it, or is in
# a paragraph that links to the page of its measurement.

NAMES = re.compile(
    r"\b(GRPO|trust|\w*DPO|MoSE|MoKA|Hydra|experts?|reallocation|TPD|PMP|ERP|VCD|PAI|VAR|study|studies"
    r"|text prior)\b",
    re.IGNORECASE,
)
MEASURE = re.compile(r"\d(?:\.\d+)?\s?(?:%|points?\b)")
NUMBER = re.compile(r"\d+\.\d+|\d+(?=\s?(?:%|points?\b))")
ROW = re.compile(r"methods\.md#([\w+-]+)")
MEASURED = re.compile(r"\]\([\w./]*(?:quickstart\.md#results|performance\.md)")


def sentences(text: str) -> Iterator[tuple[str, str]]:
    """The sentences of a page, each with its paragraph, without code and generated tables."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- methods: .*?<!-- /methods -->", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*|] )", text):
        for sentence in re.split(r"(?<=[.:;?])\s+(?=[A-Z])", paragraph):
            yield " ".join(sentence.split()), paragraph


def beyond(text: str, rows: dict[str, str]) -> list[str]:
    """The sentences with a number about a method that no linked row carries."""
    found: list[str] = []
    for sentence, paragraph in sentences(text):
        claims = NAMES.search(sentence) and MEASURE.search(sentence)
        if not claims or MEASURED.search(paragraph):
            continue
        cited = " ".join(rows.get(anchor, "") for anchor in ROW.findall(sentence))
        plain = re.sub(r"\]\([^)]*\)", "]", sentence)  # without the numbers of an address
        if not cited or set(NUMBER.findall(plain)) - set(NUMBER.findall(cited)):
            found.append(sentence)
    return found


@pytest.mark.parametrize("page", CLAIMING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_number_about_a_method_is_carried_by_a_row(page: Path) -> None:
    rows = {
        row.anchor: " | ".join(f"{cell}%" if "%" in row.cells["Metric"] else cell for cell in cells)
        for _, row in TABLE.rows()
        for cells in [[row.cells["Difference"], row.cells["95% interval"], row.cells["p (Holm)"]]]
    }
    assert not beyond(page.read_text(), rows)


def test_sentences_that_go_beyond_a_row_are_found() -> None:
    rows = {"a-b": "−11.0% | −13.5 to −8.5% | 0.003%"}
    link = "[row](docs/studies/methods.md#a-b)"
    good = f"DPO lowers it by 11.0 points (8.5 to 13.5, {link})."
    assert beyond(good, rows) == []
    assert beyond("The world has 60% of its clips so. SFT takes 3 epochs.", rows) == []
    for text in (
        "DPO lowers it by 11.0 points.",  # no link
        f"DPO lowers it by 12.0 points ({link}).",  # another number
        "DPO lowers it by 11.0 points ([row](docs/studies/methods.md#gone)).",
        f"See {link}. DPO lowers it by 11.0 points.",  # the link is in another sentence
        "| Does DPO help? | It does, by 11.0 points. |",
    ):
        assert len(beyond(text, rows)) == 1, text
