"""The design's budgets and promises, held by reading the source.

Which room may import which is held by import-linter (`lint-imports`, contracts in pyproject.toml),
and banned calls (`torch.load`, `yaml.load`, `pickle`) by ruff.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "mmemo").rglob("*.py"))
CONTENT = sorted(
    path for name in ("reward", "eval", "losses", "data") for path in (ROOT / name).rglob("*.py")
)
SOURCES = [*ENGINE, *CONTENT]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_files_are_at_most_600_lines() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long


def test_folders_hold_at_most_20_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    assert not {name: count for name, count in counts.items() if count > 20}


def test_functions_are_at_most_60_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert not long


def test_config_classes_have_at_most_15_fields() -> None:
    large = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in ENGINE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
        and node.name.endswith("Config")
        and any(isinstance(base, ast.Name) and base.id == "Config" for base in node.bases)
        and sum(isinstance(item, ast.AnnAssign) for item in node.body) > 15
    ]
    assert not large


def test_the_package_has_at_most_8_public_names() -> None:
    import mmemo

    assert len(mmemo.__all__) <= 8


def test_remote_code_is_never_trusted_by_a_literal() -> None:
    trusted = [
        f"{path.relative_to(ROOT)}:{node.value.lineno}"
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and isinstance(node.value, ast.Constant)
        and node.value.value is True
    ]
    assert not trusted


def test_public_functions_and_classes_have_docstrings() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in ENGINE
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare


def test_help_starts_without_torch() -> None:
    code = "import sys, mmemo.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_deepspeed_configs_are_json() -> None:
    for name, stage in (("zero2", 2), ("zero3", 3), ("zero3_offload", 3)):
        values = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        assert values["zero_optimization"]["stage"] == stage
