"""Whatever is printed stands on the screen as it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

import mmemo
from mmemo.console import console, errors, progress

ODD = (
    "[a]/#1 [bold]x[/bold]",
    "[/]",
    "[red]",
    "a :smile: b",
    "C:\\clips\\",
    "[a]\\",
    "\\[b]",
    "{0} %s 悲伤",
)
TAG = re.compile(r"\[/?(bold|dim|italic|red|green|yellow|blue|cyan|magenta)\]|\[/\]")
ROOT = Path(mmemo.__file__).parent


@pytest.mark.parametrize("text", ODD)
def test_text_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=text)
    table.add_column(text)
    table.add_row(f"cell {text}")
    console.print(text, soft_wrap=True)
    console.print(text, style="yellow", soft_wrap=True)
    console.print(table)
    console.rule(text)
    errors.print(text, soft_wrap=True)
    captured = capsys.readouterr()
    assert captured.out.count(text) == 6
    assert captured.err == text + "\n"


@pytest.mark.parametrize("text", ODD)
def test_progress_bars_show_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(f"<{text}>", 1, unit=text) as bar:
        bar.note(f"note {text}")
        bar.advance()
    shown = capsys.readouterr().out
    # The width of the terminal may cut the line, never the beginning of it.
    assert f"<{text}>" in shown


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node


def test_no_module_writes_markup_or_a_console_of_its_own() -> None:
    """Markup would be printed as text. Only typer's help, which has no user's text, reads it."""
    found: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT)
        if str(name) != "cli.py":
            found += [f"{name}:{one.lineno}" for one in strings(tree) if TAG.search(one.value)]
        if str(name) != "console.py":
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            called = {call.id for call in calls if isinstance(call, ast.Name)}
            found += [f"{name}: Console()"] if "Console" in called else []
    assert found == []
