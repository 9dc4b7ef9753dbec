"""``mmemo leaderboard``: one self-contained page over all evaluations below a folder.

Each benchmark has one table, with one row for each evaluation, also of predictions that were made
elsewhere. A click on a column's title sorts by it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from mmemo import __version__, files, formats
from mmemo.errors import EvaluationError
from mmemo.evaluation.results import RESULTS, EvalResult, read_results
from mmemo.evaluation.scoring import Block
from mmemo.evaluation.tables import COLUMNS, metric_text, number
from mmemo.report.page import page_environment

_HEADLINES = ("average", "uar", "weighted_f1", "macro_f1", "conflict_average")
_OFFICIAL = 3  # numbers of a released scorer shown for a task; the details have all
_Asked = tuple[EvalResult, frozenset[str]]  # an evaluation and its questions
_SHARE = {"share": True, "lower_is_better": False}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers. ``official`` numbers have no interval."""

    key: tuple[str, str, str]
    """Task, kind (``metric``, ``mean``, ``summary`` or ``official``) and name."""
    title: str
    task: str = ""
    """Its task, where the benchmark has several."""
    lower_is_better: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as texts, and as the value to sort by, which is None where there is none."""

    value: float | None
    text: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One evaluation in a table. ``n``: its questions; ``of``: those of all evaluations in the
    table, 0 where its own are not known. ``invalid``: answers that could not be read;
    ``unanswered``: questions without a prediction. ``source``: its model or file."""

    result: EvalResult
    cells: Sequence[Cell]
    n: int
    of: int
    invalid: int
    unanswered: int
    training: str
    source: str
    link: str


@dataclass(frozen=True, slots=True)
class Board:
    """The table of one benchmark."""

    title: str
    anchor: str
    columns: Sequence[Column]
    entries: Sequence[Entry]
    questions: int
    notes: Sequence[str]


def build_leaderboard(folder: Path, out: Path, *, title: str | None = None) -> Path:
    """Write the page over all evaluations below ``folder`` to ``out``, and return ``out``.

    Raises:
        EvaluationError: there is no evaluation.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: is not a folder; give one that holds evaluations")
    results, unread = _evaluations(folder)
    if not results:
        why = f" ({unread[0]})" if unread else ""
        raise EvaluationError(
            f"{folder}: holds no evaluation that can be read{why}; run `mmemo eval` or "
            "`mmemo score` with an output_dir in it first"
        )
    boards = make_boards(results, out.parent)
    environment = page_environment()
    source = environment.loader
    assert source is not None
    script = source.get_source(environment, "leaderboard.js")[0]
    style = source.get_source(environment, "report.css")[0]
    more = source.get_source(environment, "leaderboard.css")[0]
    page = environment.get_template("leaderboard.html.j2").render(
        title=title or f"Evaluations in {folder.resolve().name}",
        version=__version__,
        # These are our own files, which autoescaping would break.
        script=Markup(script),
        style=Markup(style + more),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        boards=boards,
        unread=unread,
        counted=formats.counted,
        evaluations=len(results),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(out, page)
    return out


def make_boards(results: Sequence[EvalResult], page_folder: Path) -> list[Board]:
    """One table for each benchmark, by name; several where evaluations share no question. Links
    are relative to the page's folder."""
    groups: dict[str, list[_Asked]] = {}
    for result in results:
        groups.setdefault(_benchmark(result), []).append((result, _questions(result)))
    parts = [(name, part) for name in sorted(groups) for part in _with_shared(groups[name])]
    return [
        _board(_title(name, part, len(_with_shared(groups[name]))), place, part, page_folder)
        for place, (name, part) in enumerate(parts)
    ]


def _with_shared(asked: Sequence[_Asked]) -> list[list[_Asked]]:
    """The evaluations in parts that share questions, such as the folds of a cross-validation."""
    parts: list[list[_Asked]] = []
    for one in asked:
        near = [part for part in parts if any(one[1] & other[1] for other in part)]
        parts = [part for part in parts if part not in near]
        parts.append([*(each for part in near for each in part), one])
    return parts


def _title(name: str, part: Sequence[_Asked], parts: int) -> str:
    title = name.removesuffix(".py")
    if parts == 1:
        return title
    every = frozenset[str]().union(*(questions for _, questions in part))
    return f"{title}, {formats.counted(len(every), 'question')} of {part[0][0].name}"


def _evaluations(folder: Path) -> tuple[list[EvalResult], list[str]]:
    """The evaluations below a folder, and a sentence about each that cannot be read."""
    found: list[EvalResult] = []
    unread: list[str] = []
    for path in _results_files(folder):
        try:
            result = read_results(path.parent)
            _board(_benchmark(result), 0, [(result, frozenset())], folder)
            found.append(result)
        except EvaluationError as error:
            unread.append(str(error))
        except (LookupError, TypeError, AttributeError, ValueError):
            unread.append(f"{path}: is damaged; run the evaluation again")
    return found, unread


def _results_files(folder: Path) -> Iterator[Path]:
    # os.walk follows no links to folders, so a link to a parent ends nothing.
    for parent, folders, names in os.walk(folder):
        folders.sort()
        if RESULTS in names:
            yield Path(parent, RESULTS)


def _benchmark(result: EvalResult) -> str:
    file = str(result.made["benchmark"]["file"])
    return file if file.startswith("labels:") else Path(file).name


def _board(title: str, place: int, asked: Sequence[_Asked], page_folder: Path) -> Board:
    results = [result for result, _ in asked]
    columns = _columns(results)
    every = frozenset[str]().union(*(questions for _, questions in asked))
    entries = [_entry(result, columns, len(every), len(own), page_folder) for result, own in asked]
    lowest = columns[0].lower_is_better

    def rank(entry: Entry) -> tuple[bool, float, str]:
        value = entry.cells[0].value
        best = 0.0 if value is None else (value if lowest else -value)
        return value is None, best, entry.result.name

    return Board(
        title=title,
        anchor=f"board{place}",
        columns=columns,
        entries=sorted(entries, key=rank),
        questions=len(every),
        notes=_notes(results, entries),
    )


def _questions(result: EvalResult) -> frozenset[str]:
    """The questions that were asked, each with its truth; empty where the answers are gone."""
    try:
        rows = result.rows()
        return frozenset(f"{row['task']}\0{row['sample_id']}\0{row['truth']}" for row in rows)
    except (EvaluationError, KeyError, TypeError):
        return frozenset()


def _columns(results: Sequence[EvalResult]) -> list[Column]:
    tasks = dict.fromkeys(name for result in results for name in result.tasks)
    found: dict[tuple[str, str, str], Column] = {}
    for result in results:
        for reading in result.readings:
            key = ("", "mean", reading)
            found.setdefault(key, Column(key, f"Mean, {reading} reading"))
        for name, rows in result.values.get("summary", {}).items():
            if rows.get("mean") is None:  # not all tasks were asked
                continue
            key = ("", "summary", name)
            found.setdefault(key, Column(key, f"Mean ({name})"))
    for place, task in enumerate(tasks):
        for block in (result.tasks[task] for result in results if task in result.tasks):
            for column in _task_columns(task, block, whole=place == 0):
                named = task if len(tasks) > 1 else ""
                full = Column(column.key, column.title, named, column.lower_is_better)
                found.setdefault(column.key, full)
    order = list(tasks)
    # A stable sort, so that a column of one run alone stands beside its task's others.
    return sorted(found.values(), key=lambda one: order.index(one.key[0]) if one.key[0] else -1)


def _task_columns(task: str, block: Block, *, whole: bool) -> Iterator[Column]:
    """The columns of a task: all of the headline task, the headline alone of any other."""
    if block.get("labels"):
        for name in _HEADLINES if whole else ("average",):
            if number(block, name) is not None:
                accuracy = name == "average" and not block.get("subsets")
                yield Column((task, "metric", name), "Accuracy" if accuracy else COLUMNS[name])
    scored: Mapping[str, Any] = block.get("scored", {})
    for place, (name, found) in enumerate(scored.items()):
        if whole or (place == 0 and not block.get("labels")):
            yield Column(
                (task, "metric", name),
                name.replace("_", " "),
                lower_is_better=bool(found.get("lower_is_better")),
            )
    for name in [*block.get("official", {})][:_OFFICIAL]:
        yield Column((task, "official", name), f"{name.replace('_', ' ')} (official)")


def _entry(
    result: EvalResult, columns: Sequence[Column], questions: int, own: int, page_folder: Path
) -> Entry:
    elsewhere: Mapping[str, Any] = result.made.get("elsewhere", {})
    statuses = [block["statuses"] for block in result.tasks.values()]
    unread = sum(one.get("refused", 0) + one.get("malformed", 0) for one in statuses)
    unanswered = int(elsewhere.get("unanswered", 0))
    page = result.folder / "report.html"
    target = page if page.exists() else result.folder / RESULTS
    training: Any = result.made.get("training")
    status = training.get("status") if isinstance(training, Mapping) else None  # pyright: ignore[reportUnknownVariableType]
    model = result.made.get("model", {}).get("path")
    source = f"made elsewhere: {Path(str(elsewhere['file'])).name}" if elsewhere else model
    return Entry(
        result=result,
        cells=[_cell(result, column) for column in columns],
        n=sum(int(block["n"]) for block in result.tasks.values()),
        of=questions if own else 0,
        invalid=unread - unanswered,
        unanswered=unanswered,
        training=str(status or "unknown"),
        source=str(source or "built from parts"),
        # Quoted, so that no name of a folder is a scheme.
        link=quote(Path(os.path.relpath(target, page_folder)).as_posix()),
    )


def _cell(result: EvalResult, column: Column) -> Cell:
    task, kind, name = column.key
    if kind == "mean":
        found = result.readings.get(name, {}).get("mean")
    elif kind == "summary":
        value = result.values.get("summary", {}).get(name, {}).get("mean")
        return Cell(value, formats.percent(value))
    elif task not in result.tasks:
        found = None
    elif kind == "official":
        value = result.tasks[task].get("official", {}).get(name)
        return Cell(value, formats.plain(value))
    else:
        block = result.tasks[task]
        closed = number(block, name) if block.get("labels") else None
        found = closed if closed is not None else block.get("scored", {}).get(name)
    if found is None:
        return Cell(None, "–")
    value, interval = metric_text({**_SHARE, **found})
    return Cell(found["value"], value, interval)


def _notes(results: Sequence[EvalResult], entries: Sequence[Entry]) -> list[str]:
    """What a reader of one table must know, in whole sentences."""
    notes: list[str] = []
    if any(entry.of and entry.n < entry.of for entry in entries):
        notes.append(
            "Not every row answers all questions of this table; such rows do not compare with the "
            "others. mmemo compare pairs them on the questions that they share."
        )
    if len({str(result.made.get("parser")) for result in results}) > 1:
        notes.append("The answers were read by different versions of the parser.")
    if len({str(result.made["benchmark"].get("params", {})) for result in results}) > 1:
        notes.append("The benchmark was run with different parameters.")
    old = [result.name for result in results if result.old_intervals]
    if old:
        notes.append(
            f"The intervals of {', '.join(old)} are an earlier version's, too narrow with few "
            "speakers."
        )
    return notes
