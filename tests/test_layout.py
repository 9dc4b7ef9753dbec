"""The design's budgets and promises, held by reading the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "mmemo").rglob("*.py"))
CONTENT = sorted(p for name in ("reward", "losses", "eval") for p in (ROOT / name).rglob("*.py"))
SOURCES = [*ENGINE, *CONTENT]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names(path: Path) -> list[str]:
    """Dotted names that are called or imported in a file."""
    found: list[str] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(f"{node.value.id}.{node.attr}")
    return found


def test_files_are_at_most_400_lines() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


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
        and node.name.endswith(("Config", "Section"))
        and any(isinstance(base, ast.Name) and base.id == "Config" for base in node.bases)
        and sum(isinstance(item, ast.AnnAssign) for item in node.body) > 15
    ]
    assert not large


def test_the_package_has_at_most_8_public_names() -> None:
    import mmemo

    assert len(mmemo.__all__) <= 8


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_imports_no_content_and_nothing_banned(path: Path) -> None:
    found = names(path)
    roots = {name.split(".")[0] for name in found}
    assert not roots & {"reward", "eval", "train_configs", "ds_configs", "tests", "pickle", "dill"}
    assert "torchvision" not in roots
    assert "torch.load" not in found
    if path.name != "config.py":  # its loader is a SafeLoader
        assert "yaml.load" not in found
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not (isinstance(node.value, ast.Constant) and node.value.value is True)


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
    for stage, path in ((2, "ds_configs/zero2.json"), (3, "ds_configs/zero3.json")):
        assert json.loads((ROOT / path).read_text())["zero_optimization"]["stage"] == stage
