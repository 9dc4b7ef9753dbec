"""Read manifests (JSONL, JSON or CSV files of rows) into samples.

The problems of all files are collected, up to ``max_errors``, and reported together.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from mmemo.config import Config, nearest
from mmemo.data.row_models import KNOWN_KEYS, Row
from mmemo.data.rows import read_row, restrict
from mmemo.data.sample import Modality, Sample
from mmemo.errors import DataError


class DataConfig(Config):
    """The manifests of a stage, and which of their rows, streams and columns it uses."""

    manifests: list[str] = Field(min_length=1)
    """JSONL, JSON, CSV or TSV files, relative to the working directory."""
    media_root: str = "."
    """Folder that the media paths of the manifests are relative to."""
    modalities: list[Modality] | None = None
    """Streams to keep of each row; ``[]`` makes text-only rows. None keeps all."""
    tiers: list[str] | None = None
    """Curriculum tiers of the rows to keep. None keeps all."""
    groups: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """Values of group fields, such as ``gender: [f]``; only rows with one of them are kept."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of rows; the first ones are kept."""
    columns: list[str] = Field(default_factory=list[str])
    """Row keys beyond the known ones, passed through to rewards and reports."""
    video_key_means: list[Modality] = Field(default=["video", "audio"], min_length=1)
    """Streams that the single ``video`` key of a ShareGPT row stands for. In R1-Omni's emotion data
    it means picture and sound of the file, although the text may name ``<video>`` alone."""
    max_length: int | None = Field(default=None, ge=1)
    """Maximum tokens of a rendered row. A longer row is an error; nothing is truncated."""
    max_errors: int = Field(default=20, ge=1)
    """Number of problems after which reading stops and all of them are reported."""


def load_samples(
    config: DataConfig,
    prepare: Callable[[Row], Row] | None = None,
    *,
    rows: Callable[[Path], Iterable[Row]] | None = None,
) -> list[Sample]:
    """Load the rows of the manifests that the config keeps, in file order.

    Args:
        config: the manifests and the filters.
        prepare: called with every row; returns the row to read, and may add problems to it.
        rows: the rows of a manifest by its path, where they have been read already; None:
            :func:`read_rows`.

    Raises:
        DataError: names file, line, field and the nearest known name of each problem.
    """
    problems: list[DataError] = []
    samples: list[Sample] = []
    ids: dict[str, tuple[str, int]] = {}
    anonymous: dict[str, int] = {}
    for name in config.manifests:
        whole = _WholeNumbers()
        for found in (rows or read_rows)(Path(name)):
            row = prepare(found) if prepare else found
            sample = _read(row, config, anonymous)
            problems += row.problems
            if sample is not None:
                whole.look(row)
            if sample is not None:
                first = ids.get(sample.sample_id)
                # Rows of bad clips, for example, are left out by their ids.
                ids.setdefault(sample.sample_id, sample.source)
                if first is not None:
                    message = (
                        f"'{sample.sample_id}' is the id of {first[0]}:{first[1]} too; rename it"
                    )
                    problems.append(
                        DataError(message, file=row.file, line=row.line, field="sample_id")
                    )
                samples.append(replace(sample, media_root=config.media_root))
            if len(problems) >= config.max_errors:
                _report(problems, config.max_errors)
        problems += whole.problems()
    _report(problems, config.max_errors)
    kept = _filter(_scale_units(samples), config)
    if config.modalities is not None:
        kept = [restrict(sample, config.modalities) for sample in kept]
    return kept


def _scale_units(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with intensities of action units from 0 to 1. Those of a manifest are on one
    scale, which its largest value tells."""
    from_0_to_5 = {s.source[0] for s in samples if any(x > 1 for x in s.truth.aus.values())}
    return [
        replace(
            sample,
            truth=replace(sample.truth, aus={unit: x / 5 for unit, x in sample.truth.aus.items()}),
        )
        if sample.source[0] in from_0_to_5
        else sample
        for sample in samples
    ]


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of one manifest as plain values, with their line numbers."""
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        table = path.suffix.lower() in _TABLES
        hint = "; save the table as CSV UTF-8" if table else ""
        raise DataError(f"must end in .jsonl, .json, .csv or .tsv{hint}", file=str(path))
    try:
        # read_text() would change line endings inside CSV cells.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror}); check the path", file=str(path)
        ) from error
    except UnicodeDecodeError as error:
        hint = " (in Excel: CSV UTF-8)" if path.suffix.lower() in (".csv", ".tsv") else ""
        raise DataError(f"is not UTF-8; save it as UTF-8{hint}", file=str(path)) from error
    rows = reader(text, str(path))
    # Only an escape can make a half, so other files are spared a second pass over their rows.
    return map(_refuse_halves, rows) if _ESCAPED_HALF.search(text) else rows


def _refuse_halves(row: Row) -> Row:
    """Refuse lone surrogates, which JSON escapes can express but UTF-8 cannot."""
    for key, value in row.values.items():
        try:
            text = json.dumps([key, value], ensure_ascii=False, default=str)
        except RecursionError:
            row.bad("", _TOO_DEEP)
            break
        if _HALF.search(text):
            row.bad(ascii(key)[1:-1], "holds half of a character (\\ud800 to \\udfff); remove it")
    return row


def _read(row: Row, config: DataConfig, anonymous: dict[str, int]) -> Sample | None:
    if row.problems:
        return None

    def default_id() -> str:
        # The id is a hash of the content, not the line number, so that inserting a row does not
        # rename any other row.
        canonical = json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=str)
        name = Path(row.file).name
        digest = hashlib.sha256(f"{name}\n{canonical}".encode()).hexdigest()[:16]
        count = anonymous[digest] = anonymous.get(digest, 0) + 1
        return f"{Path(row.file).stem}-{digest}" + (f"-{count}" if count > 1 else "")

    try:
        return read_row(
            row,
            columns=config.columns,
            video_key_means=config.video_key_means,
            default_id=default_id,
        )
    except RecursionError:
        row.bad("", _TOO_DEEP)
        return None


def _report(problems: list[DataError], most: int) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    count = f"the first {most}" if len(problems) >= most else str(len(problems))
    shown = "\n".join(f"  {problem}" for problem in problems[:most])
    first = problems[0]
    error = DataError(f"the manifests have problems ({count} shown); correct these rows:\n{shown}")
    error.file, error.line, error.field = first.file, first.line, first.field
    raise error


def _filter(samples: Sequence[Sample], config: DataConfig) -> list[Sample]:
    kept = list(samples)
    if not kept:
        raise DataError("has no rows; add at least one", file=", ".join(config.manifests))
    if config.tiers is not None:
        known = sorted({sample.tier for sample in kept if sample.tier})
        _need_known("data.tiers", config.tiers, known)
        kept = [sample for sample in kept if sample.tier in config.tiers]
    for key, values in config.groups.items():
        names = sorted({name for sample in samples for name in sample.group})
        _need_known("data.groups", [key], names)
        _need_known(f"data.groups.{key}", values, sorted({s.group.get(key, "") for s in samples}))
        kept = [sample for sample in kept if sample.group.get(key) in values]
    if not kept:
        raise DataError("the filters keep no row; widen data.tiers or data.groups")
    return kept[: config.limit]


def _need_known(field: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            guess = nearest(value, known)
            hint = f"did you mean '{guess}'?" if guess else f"the rows have {', '.join(known)}"
            raise DataError(f"no row has '{value}'; {hint or 'the rows have none'}", field=field)


_TABLES = (".xlsx", ".xls", ".ods", ".parquet", ".feather", ".txt", ".tab")
_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
_WHOLE_FLOAT = re.compile(r"[-+]?\d+\.0+")
_NAMES = ("sample_id", "id", "label", "tier")
"""Keys whose values name something, for which ``3`` and ``3.0`` are two names."""


class _WholeNumbers:
    """Notices a column of integers that a program has written as 3.0, as pandas does beside missing
    values. A column that has other numbers too, such as 1.4, holds measurements."""

    def __init__(self) -> None:
        self._first: dict[str, DataError] = {}
        self._other: set[str] = set()

    def look(self, row: Row) -> None:
        """Take notice of one row's names."""
        group = row.get("group")
        names = {key: row.get(key) for key in _NAMES}
        if isinstance(group, dict):
            inside = cast("dict[str, object]", group)
            names |= {f"group.{key}": value for key, value in inside.items()}
        for key, value in names.items():
            if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
                continue
            if not _WHOLE_FLOAT.fullmatch(value.strip()):
                self._other.add(key)
            elif key not in self._first:
                plain = value.strip().partition(".")[0]
                self._first[key] = DataError(
                    f"is '{value}', as pandas writes the integer {plain} in a column with missing "
                    f"values; write '{plain}', or the name that it stands for",
                    file=row.file,
                    line=row.line,
                    field=key,
                )

    def problems(self) -> list[DataError]:
        """One for each key whose numbers are all of them whole and written as floats."""
        return [error for key, error in self._first.items() if key not in self._other]


_TOO_DEEP = "is nested too deeply; use at most a few levels"
_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _NotJsonError(ValueError):
    """The message completes a sentence whose subject is the row."""


class _RepeatedKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"key '{repeated}' is given twice; keep one")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json(text: str) -> Any:
    return _json_at(text, None)


def _json_at(text: str, start: int | None) -> Any:
    """Decode the value at ``start`` and return it with the index where it ends.

    With None, the whole text is decoded and only the value is returned.

    Raises:
        _NotJsonError: the text is not JSON, or exceeds Python's limits.
    """
    try:
        return _DECODER.decode(text) if start is None else _DECODER.raw_decode(text, start)
    except RecursionError:
        raise _NotJsonError(_TOO_DEEP) from None
    except (json.JSONDecodeError, _RepeatedKeyError) as error:
        raise _NotJsonError(f"is not valid JSON: {error}") from error
    except ValueError:  # Python limits the digits of a number
        raise _NotJsonError("has a number with thousands of digits; correct it") from None


def _row(value: object, file: str, line: int) -> Row:
    if isinstance(value, dict):
        return Row(cast("dict[str, Any]", value), file, line)
    row = Row({}, file, line)
    row.bad("", "must be a JSON object, one for each row")
    return row


def _jsonl_rows(text: str, file: str) -> Iterator[Row]:
    # splitlines() would also split at U+2028 and others, which JSON allows inside a string.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            yield _row(_json(content), file, line)
        except _NotJsonError as error:
            row = Row({}, file, line)
            row.bad("", str(error))
            yield row


def _json_rows(text: str, file: str) -> Iterator[Row]:
    """Read a JSON list of objects one by one, so that every row knows its line number."""

    def line(position: int) -> int:
        return text.count("\n", 0, position) + 1

    def skip(position: int, expected: str) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        if position >= len(text) or text[position] not in expected:
            message = f"is not a JSON list of rows: expected {' or '.join(expected)} here"
            raise DataError(message, file=file, line=line(position))
        return position + 1

    position, last = skip(0, "["), "["
    while last != "]":
        while position < len(text) and text[position].isspace():
            position += 1
        if text[position : position + 1] == "]" and last == "[":
            position += 1
            break
        start = position
        try:
            value, position = _json_at(text, position)
        except _NotJsonError as error:
            raise DataError(str(error), file=file, line=line(start)) from error
        yield _row(value, file, line(start))
        position = skip(position, ",]")
        last = text[position - 1]
    rest = text[position:]
    if rest.strip():
        where = line(position + len(rest) - len(rest.lstrip()))
        message = "continues after the list of rows; put all rows into one list"
        raise DataError(message, file=file, line=where)


_LONGEST_CELL = 2**24
_NUMBERS = ("start", "end", "difficulty")
_TEXTS = ("sample_id", "id", "label", "conflict", "tier", "transcript", "system")
_ANSWERS = ("prompt", "completion", "chosen", "rejected", "rejected_response")
_PATHS = (
    *("video", "audio", "face", "videos", "audios", "faces"),
    *("rejected_videos", "rejected_audios", "rejected_faces"),
)
_EXAMPLES = {
    "labels": '["happy", "surprised"]',
    "aus": '{"AU12": 0.8}',
    "cues": '{"present": ["raised brows"]}',
    "attributes": '{"audio": {"pitch": 0.7}}',
    "modality_labels": '{"audio": "sad"}',
    "group": '{"speaker": "s1"}',
    "face_boxes": '[{"time": 0, "box": [10, 10, 60, 60]}]',
}


def _csv_rows(text: str, file: str) -> Iterator[Row]:
    """Read CSV with a header. The cells are separated by commas, semicolons or tabs.

    A cell holds a list or an object as JSON, the column ``group.speaker`` sets ``speaker`` inside
    ``group``, and an empty cell means that the row does not have the key.
    """
    csv.field_size_limit(_LONGEST_CELL)  # of the whole process; the default is 131,072
    # newline="" leaves line ends inside quoted cells to the csv module.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    line = 1
    try:
        header = next(reader, [])
        repeated = [name for name in header if header.count(name) > 1]
        if not header or repeated or "" in header:
            what = f"'{repeated[0]}' twice" if repeated else "a column without a name"
            hint = "" if repeated else " (pandas: to_csv(index=False))"
            raise DataError(
                f"the header has {what}; name every column once{hint}", file=file, line=1
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(header, cells, file, line)
            # A quoted cell may hold line ends, so rows and lines do not count alike.
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"is not valid CSV: {error}", file=file, line=line) from error


def _delimiter(text: str) -> str:
    """What separates the cells, which the names in the header tell."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]

    def known(delimiter: str) -> int:
        names = (name.strip().strip('"') for name in header.split(delimiter))
        return sum(name.partition(".")[0] in KNOWN_KEYS for name in names)

    return max(",;\t", key=known)  # the comma where they are equal


def _csv_row(header: list[str], cells: list[str], file: str, line: int) -> Row:
    values: dict[str, Any] = {}
    row = Row(values, file, line)
    if len(cells) != len(header):
        row.bad("", f"has {len(cells)} cells under {len(header)} columns; quote cells with commas")
        return row
    for name, cell in zip(header, cells, strict=True):
        if cell == "":
            continue
        parent, _, child = name.partition(".")
        if not child:
            values[name] = _csv_value(row, name, cell)
        elif parent in ("aus", "attributes", "cues"):
            example = _EXAMPLES[parent]
            row.bad(name, f"write {parent} as JSON in one column '{parent}', such as {example}")
        else:
            inside = values.setdefault(parent, {})
            if isinstance(inside, dict):
                cast("dict[str, Any]", inside)[child] = cell
            else:
                row.bad(name, f"cannot be combined with a column '{parent}'; keep one of them")
    return row


def _csv_value(row: Row, name: str, cell: str) -> Any:
    if name in _NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return math.nan if cell.lower() == "nan" else cell
    if name in _TEXTS or name not in (*KNOWN_KEYS, "AUs"):
        return cell
    try:
        value: Any = _json(cell)
    except _NotJsonError as error:
        if name in _ANSWERS or name in _PATHS or name in ("aus", "AUs"):
            return cell
        example = f", such as {_EXAMPLES[name]}" if name in _EXAMPLES else ""
        row.bad(name, f"must hold JSON in its cell{example}; its text {error}")
        return None
    if name in _ANSWERS or name in _PATHS:
        inside = dict if name in _ANSWERS else str
        items = cast("list[object]", value if isinstance(value, list) else [])
        # A text that only looks like JSON, such as "[1]", stays a text.
        return items if items and all(isinstance(item, inside) for item in items) else cell
    return value
