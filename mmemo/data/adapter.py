"""Data set adapters: a short content file turns a released folder into a manifest.

An adapter is a Python file with a function

    def rows(root: Path, *, split: str = "all") -> Iterator[dict[str, Any]]

that yields manifest rows, in any format of :mod:`mmemo.data.rows`, with media paths relative to
``root``. Its keyword arguments are the adapter's options, which the command line passes as text.
``COLUMNS``, if the file has it, names row keys beyond the known ones. ``LABELS`` names the
registered label set (``mmemo labels``) that every row's label must be of; an option ``labels``
replaces it by the set that the adapter maps to. The docstring says what the data are: the licence,
where to get them, and the layout of the folder.

In place of a row that cannot be used, an adapter yields an :class:`Excluded`, which is counted and
named. ``PUBLISHED``, if the file has it, maps options as on the command line, ``split=test``, to
the published number of rows by label, ``{"happy": 489, ...}``, or ``{"": 2341}`` for their sum.
``counts(root)``, if the file has it, gives numbers that the tables tell without the clips, by name;
a dry run prints them.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

from rich.text import Text

from mmemo import content, files
from mmemo.answers.label_sets import EmotionSet, LabelMapping, mapping
from mmemo.config import nearest
from mmemo.console import console
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, DataError, MmemoError
from mmemo.formats import counted

_SHOWN = 5  # file names printed of each list


@dataclass(frozen=True, slots=True)
class Excluded:
    """A row that is left out: its name, a short reason to count by, and the details."""

    row: str
    reason: str
    detail: str = ""
    expected: bool = False
    """Every copy of the release has it: the set's own choice of rows, or a known bad clip."""

    def record(self) -> dict[str, Any]:
        """The row as a JSON value; ``expected`` only where it is."""
        found = {"row": self.row, "reason": self.reason, "detail": self.detail}
        return found | ({"expected": True} if self.expected else {})


@dataclass(frozen=True, slots=True)
class AdaptedManifest:
    """What :func:`write_manifest` wrote, and what did not fit together.

    Paths are relative to the data set's root. ``missing``: files that the adapter names and the
    folder lacks; their rows are not written. ``unused``: files of the same kinds that no row names.
    ``labelled``: how the data set's labels become those of the rows, where the adapter says it.
    ``excluded``: rows that the adapter leaves out. ``published``: the published number of rows by
    label under the options, where the adapter knows it.
    """

    samples: tuple[Sample, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    labelled: LabelMapping | None = None
    excluded: tuple[Excluded, ...] = ()
    published: Mapping[str, int] | None = None

    @property
    def labels(self) -> Counter[str]:
        """Rows per label; ``(none)`` counts rows without one."""
        return Counter(sample.truth.label or "(none)" for sample in self.samples)

    @property
    def speakers(self) -> Counter[str]:
        """Rows per speaker."""
        return Counter(s.group["speaker"] for s in self.samples if "speaker" in s.group)

    def unlike_published(self) -> list[str]:
        """One sentence for each published number of rows that this copy does not have."""
        if self.published is None:
            return []
        here = {**self.labels, "": len(self.samples)}
        return [
            f"{f'{label}: ' if label else ''}{here.get(label, 0)} rows here, {count} published"
            for label, count in self.published.items()
            if here.get(label, 0) != count
        ]


def need_option(name: str, value: str, known: Sequence[str]) -> None:
    """Check an adapter's option.

    Raises:
        ConfigError: ``value`` is none of ``known``.
    """
    if value not in known:
        guess = nearest(value, known)
        hint = f"did you mean '{guess}'?" if guess else f"use one of {', '.join(known)}"
        raise ConfigError(f"{name} is '{value}'; {hint}")


def write_manifest(
    adapter: str,
    root: Path,
    output: Path,
    options: Mapping[str, str] | None = None,
    need_clips: bool = True,
) -> AdaptedManifest:
    """Write the rows of ``adapter`` for the data set in ``root`` as a JSONL manifest. Rows whose
    files are not in ``root`` are left out if ``need_clips``.

    Every row is read back as training reads it. ``output`` is written whole or not at all. When a
    row is wrong, all rows stay in ``NAME.partial.jsonl`` beside it, whose line the error names.

    Raises:
        ConfigError: the adapter cannot be loaded or has no such option.
        DataError: a row is wrong, a media path leaves ``root``, or nothing fits the folder.
    """
    options = options or {}
    lines, excluded = _found(adapter, root, output, options)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.stem}.partial.jsonl")
    # The rows are checked in a file, so that an error can name a line that exists.
    samples = _validated(adapter, partial, lines)
    labelled = _labelled(adapter, options)
    if labelled is not None:
        _check_labels(adapter, samples, labelled.target)
    named = set[str]().union(*map(_paths, samples))
    missing = sorted(path for path in named if need_clips and not _is_inside(root, path))
    kept = [not _paths(sample).intersection(missing) for sample in samples]
    if not any(kept):
        partial.unlink()
        raise DataError(
            f"none of the {len(named)} files that {adapter} names is in {root}, such as "
            f"'{missing[0]}'; check --root, or fetch the clips"
        )
    # Written beside the output and renamed, so that a kill leaves no half manifest.
    partial.write_text("".join(compress(lines, kept)), encoding="utf-8")
    partial.replace(output)
    # Files of the other splits, and of labels that are left out, are not unused.
    whole = {key: value for key, value in options.items() if key not in ("split", "labels")}
    unused = _files(root, {Path(path).suffix for path in named}) - named
    if named and whole != options:
        try:
            others = _validated(adapter, partial, _lines(adapter, root, whole)[0])
            unused = unused.difference(*map(_paths, others))
        except DataError:  # a copy without the other splits, whose files cannot be told apart
            unused = set[str]()
        partial.unlink(missing_ok=True)
    return AdaptedManifest(
        tuple(compress(samples, kept)),
        tuple(missing),
        tuple(sorted(unused)),
        labelled,
        tuple(excluded),
        _published(adapter, options),
    )


def _found(
    adapter: str, root: Path, output: Path, options: Mapping[str, str]
) -> tuple[list[str], list[Excluded]]:
    """The lines of a manifest, at least one, and the rows that the adapter leaves out."""
    if output.suffix != ".jsonl":
        raise ConfigError(f"output '{output}' must end in .jsonl")
    if not root.is_dir():
        raise DataError("is not a folder; give the data set's root", file=str(root))
    lines, excluded = _lines(adapter, root, options)
    if not lines:
        left = f" ({excluded[0].row}: {excluded[0].reason})" if excluded else ""
        raise DataError(
            f"{adapter} finds nothing in {root}{left}; its docstring shows the layout of --root"
        )
    return lines, excluded


def run_manifest(
    adapter: str,
    root: Path,
    output: Path,
    options: Mapping[str, str] | None = None,
    need_clips: bool = True,
) -> AdaptedManifest:
    """Write a manifest and print what it holds. See :func:`write_manifest`. The adapter and its
    options are kept beside it, see :func:`adapter_of_manifest`."""
    made = write_manifest(adapter, root, output, options, need_clips)
    record = {
        "adapter": adapter,
        "sha256": content.sha256(content.find(adapter)),
        "options": dict(options or {}),
    }
    files.write_whole(_record_of(output), json.dumps(record, ensure_ascii=False) + "\n")
    people = f" of {len(made.speakers)} speakers" if made.speakers else ""
    console.print(
        Text.assemble(f"{len(made.samples)} rows{people}: ", (str(output), "bold")), soft_wrap=True
    )
    if made.labelled is not None:
        written = [f"{code} is {name}" for code, name in made.labelled.by_code.items()]
        codes = f" ({', '.join(written)})" if written else ""
        console.print(f"{made.labelled.describe()}{codes}")
    for label, count in sorted(made.labels.items()):
        console.print(f"  {label}: {count}")
    for reason, count in Counter(one.reason for one in made.excluded).items():
        first = next(one for one in made.excluded if one.reason == reason)
        told = f" {first.row}: {first.detail}" if first.detail else f" {first.row}"
        console.print(f"{counted(count, 'row')} left out ({reason}):{told}", soft_wrap=True)
    for line in made.unlike_published():
        console.print(line, style="yellow", soft_wrap=True)
    for names, what in (
        (made.missing, "named by the data set but not in its folder; their rows are left out"),
        (made.unused, "in the folder but named by no row"),
    ):
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            console.print(f"{len(names)} files {what}: {', '.join(names[:_SHOWN])}{more}")
    return made


def adapter_of_manifest(manifest: Path) -> dict[str, Any] | None:
    """``adapter``, its ``sha256`` and the ``options`` that a manifest was made with, from
    ``NAME.adapter.json`` beside it; None where that is missing or damaged."""
    try:
        found: Any = json.loads(_record_of(manifest).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("adapter", "sha256", "options")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_of(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}.adapter.json")


def parse_options(pairs: Sequence[str], split: str | None = None) -> dict[str, str]:
    """``KEY=VALUE`` texts of the command line as an adapter's options.

    Raises:
        ConfigError: a text has no ``=``.
    """
    options = {} if split is None else {"split": split}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"option '{pair}' must look like KEY=VALUE")
        options[key] = value
    return options


def _published(adapter: str, options: Mapping[str, str]) -> Mapping[str, int] | None:
    """The published counts that stand for just these options, in any order. An option that is not
    named has its default."""
    known: Mapping[str, Mapping[str, int]] = getattr(content.load_module(adapter), "PUBLISHED", {})
    parameters = inspect.signature(content.load(f"{adapter}:rows")).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.name != "root"}
    for key, counts in known.items():
        named = parse_options([pair for pair in key.split(",") if pair])
        if {**defaults, **named} == {**defaults, **options}:
            return counts
    return None


def _lines(
    adapter: str, root: Path, options: Mapping[str, str]
) -> tuple[list[str], list[Excluded]]:
    """The adapter's rows as lines of JSON, and the rows that it leaves out."""
    function: Callable[..., Iterable[dict[str, Any] | Excluded]] = content.load(f"{adapter}:rows")
    if not callable(function):
        raise ConfigError(f"{adapter}: 'rows' is no function; see an adapter such as data/emodb.py")
    known = [name for name in inspect.signature(function).parameters if name != "root"]
    for name in options:
        if name not in known:
            guess = nearest(name, known)
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            hint = f"did you mean '{guess}'?" if guess else has
            raise ConfigError(f"{adapter} has no option '{name}'; {hint}")
    lines: list[str] = []
    excluded: list[Excluded] = []
    try:
        for row in function(root, **options):
            if isinstance(row, Excluded):
                excluded.append(row)
                continue
            # json writes NaN by default, which is not JSON.
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except MmemoError:
        raise
    except OSError as error:
        what = f"{error.filename} ({error.strerror})"
        raise DataError(f"{adapter} cannot read {what}; check --root") from error
    except Exception as error:  # whatever an adapter raises on a file that it does not expect
        where = f"row {len(lines) + 1}"
        message = f"{adapter}: {where} cannot be made ({error!r}); correct the adapter, or the data"
        raise DataError(message) from error
    return lines, excluded


def _validated(adapter: str, partial: Path, lines: Sequence[str]) -> list[Sample]:
    """The samples of ``lines``, one for each, read as training reads them."""
    columns: list[str] = [*getattr(content.load_module(adapter), "COLUMNS", ())]
    partial.write_text("".join(lines), encoding="utf-8")
    return load_samples(DataConfig(manifests=[str(partial)], columns=columns))


def _check_labels(adapter: str, samples: Sequence[Sample], known: EmotionSet) -> None:
    for sample in samples:
        if sample.truth.label not in (None, *known.names):
            file, line = sample.source
            raise DataError(
                f"'{sample.truth.label}' is no label of {known.name}, which the rows of {adapter} "
                f"are of; write one of {', '.join(known.names)}",
                file=file,
                line=line,
                field="label",
            )


def _labelled(adapter: str, options: Mapping[str, str]) -> LabelMapping | None:
    """From the label set that the adapter's ``LABELS`` names to that of the option ``labels``."""
    own: str | None = getattr(content.load_module(adapter), "LABELS", None)
    return None if own is None else mapping(own, options.get("labels", own))


def _paths(sample: Sample) -> set[str]:
    refs = [*sample.media.values(), *sample.rejected_media.values()]
    return {ref.path for ref in refs}


def _is_inside(root: Path, path: str) -> bool:
    """Whether the file is there.

    Raises:
        DataError: the path leads out of ``root``.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(f"the media path '{path}' must be relative to the data set's root")
    return (root / path).is_file()


def _files(root: Path, suffixes: set[str]) -> set[str]:
    """All files under ``root`` with one of these suffixes."""
    return {
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if file.suffix in suffixes and file.is_file()
    }
