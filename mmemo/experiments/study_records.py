"""What a study has finished: values read from a run's folder, or from results that were published.

A run is known by its label and the fingerprint of its config, so that a study goes on from a
committed ``results.json`` on another machine, or after its large files were deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mmemo
from mmemo.errors import MmemoError
from mmemo.experiments.study_config import MetricConfig, StudyConfig
from mmemo.experiments.study_plan import Cell

_SMALL = {".json", ".jsonl", ".yaml", ".md", ".txt", ".html", ".png", ".lock"}
"""Files that are kept when large ones are deleted: settings, logs, answers and results."""
Metrics = dict[str, float | None]


class Records:
    """The finished runs that result files hold.

    Args:
        files: ``results.json`` or ``tuning.json`` files; of two records of a run, that of the first
            file counts. A file that is not there holds none.
    """

    def __init__(self, study: StudyConfig, files: Sequence[Path]) -> None:
        self._study = study
        self._found: dict[str, list[dict[str, Any]]] = {}
        for file in files:
            try:
                values: Any = json.loads(file.read_text(encoding="utf-8"))
                runs = list(values["runs"])
                defined = values["config"]["metrics"]
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MmemoError(
                    f"{file}: cannot be read as the results of a study; delete it, or repair it"
                ) from error
            for run in runs:
                if run.get("status") == "done":
                    entry = {**run, "defined": defined, "file": str(file)}
                    self._found.setdefault(label_of(run), []).append(entry)

    def __len__(self) -> int:
        return len(self._found)

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a run with the same config, holding every metric of the study."""
        for entry in self._found.get(cell.label, []):
            if entry.get("fingerprint") != cell.fingerprint:
                continue
            metrics: Metrics = entry["metrics"]
            wanted = {n: m for n, m in self._study.metrics.items() if not m.sources}
            if all(n in metrics and _same(m, entry["defined"].get(n)) for n, m in wanted.items()):
                kept = {key: entry.get(key) for key in ("seconds", "code")}
                values = with_derived(self._study, {name: metrics[name] for name in wanted})
                return {**kept, "metrics": values}
        return None

    def is_stale(self, cell: Cell) -> bool:
        """Whether there is a record of a run of this name, but of no use."""
        return cell.label in self._found and self.get(cell) is None


def label_of(run: Mapping[str, Any]) -> str:
    """The label of the pipeline whose record this is."""
    if run.get("point") is not None:
        return f"tuning seed {run['seed']}, arm {run['arm']}, point {run['point']}"
    return f"seed {run['seed']}, arm {run['arm']}"


def _same(metric: MetricConfig, defined: Any) -> bool:
    """Whether a metric is read from the same place as when the record was made."""
    try:
        before = MetricConfig.model_validate(defined)
    except ValueError:
        return False
    return all(getattr(before, key) == getattr(metric, key) for key in ("stage", "path", "file"))


def read_metrics(study: StudyConfig, cell: Cell) -> Metrics:
    """The metrics of a finished run, from its files.

    Raises:
        MmemoError: a file does not have the number.
    """
    found: Metrics = {}
    for name, metric in study.metrics.items():
        if metric.stage is None or metric.path is None:
            continue
        file = cell.places[metric.stage] / metric.file
        try:
            value: Any = json.loads(file.read_text(encoding="utf-8"))
            for key in metric.path.split("."):
                value = value[int(key) if isinstance(value, list) else key]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            # None is a value too, that of an undefined number, so a missing number is marked by
            # "...".
            value = ...
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not number:
            raise MmemoError(
                f"metric '{name}': {metric.stage}/{metric.file} has no number at "
                f"'{metric.path}'; look up the right keys in that file"
            )
        found[name] = value if value is not None and math.isfinite(value) else None
    return with_derived(study, found)


def with_derived(study: StudyConfig, read: Metrics) -> Metrics:
    """The metrics in the study's order, with those that are made of others. Where one of these is
    undefined, so is what is made of it."""
    found: Metrics = {}
    for name, metric in study.metrics.items():
        sources = [read.get(source) for source in metric.sources]
        values = [value for value in sources if value is not None]
        if not metric.sources:
            found[name] = read[name]
        elif len(values) < len(sources):
            found[name] = None
        elif metric.min_of:
            found[name] = min(values)
        else:
            weights = metric.sum_of.values()
            found[name] = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    return found


def seconds_of(cell: Cell) -> float | None:
    """Seconds that the stages of a run took; None before it is done."""
    try:
        made: Any = json.loads((cell.folder / "state.json").read_text())["stages"]
        return round(sum(made[name]["seconds"] for name in cell.stages), 1)
    except (OSError, ValueError, KeyError):
        return None


def strip(folder: Path) -> int:
    """Delete the large files of a folder: media, features, weights. Returns the bytes freed."""
    freed = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink() and path.suffix not in _SMALL:
            freed += path.stat().st_size
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return freed


def delete(folder: Path) -> None:
    """Delete a folder with all that it holds, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)


@cache
def code() -> str:
    """Hash of mmemo's source, so that results say which runs were made by the same program."""
    root = Path(mmemo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
