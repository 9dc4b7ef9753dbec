"""Benchmarks as tasks of lmms-eval: what it asks, shows, and scores (``integrations/lmms_eval``).

lmms-eval runs the model. mmemo reads the release's folder, writes the questions, reads the answers
and computes the numbers, so that they are those of ``mmemo eval`` on the same answers.

A task's folder is named by an environment variable: ``MMEMO_DATA_CREMA_D=/data/CREMA-D`` for the
tasks of ``eval/crema_d.py`` (several paths, such as labels of voice and picture, are joined by
``:``). ``MMEMO_OPTIONS_CREMA_D="split=test"`` gives its adapter options, separated by spaces, and
``MMEMO_MEDIA_CREMA_D`` the folder of the clips where the benchmark needs one apart.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MODALITIES
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Benchmark, Question, load_benchmark, validate
from mmemo.evaluation.elsewhere.prediction import as_text
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import benchmark_inputs
from mmemo.statistics import BootstrapConfig

Doc = Mapping[str, Any]
Values = Sequence[Mapping[str, Any]]
CLOSED = ("average", "war", "uar", "weighted_f1", "invalid")
OPEN = ("official", "average", "invalid")
"""The functions below that aggregate the answers of a task with labels, and of any other task."""
_FEW = BootstrapConfig(resamples=100)  # only the values are used
_VIDEO = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".flv")


def docs_of(file: str, task: str) -> Callable[[Any], Any]:
    """The function that gives lmms-eval the questions of one task of a benchmark, in place of the
    placeholder that it loads."""

    def docs(placeholder: Any) -> Any:
        return _docs(file, task)

    return docs


def _docs(file: str, task: str) -> Any:
    """The questions as a data set of Hugging Face.

    Raises:
        ConfigError: the environment does not name the folder, or there is no such question.
    """
    import datasets  # lmms-eval brings it; nothing else here needs it

    found = [one for one in _questions(file, *_inputs(file)) if one.task == task]
    if not found:
        raise ConfigError(f"{file} has no question of task '{task}' in {_inputs(file)[0]}")
    return datasets.Dataset.from_list([_doc(one, file, _media_root(file)) for one in found])


def doc_to_visual(doc: Doc) -> list[Any]:
    """The clips of a question, each file once. Sound alone that is in a video file says so."""
    shown: list[Any] = []
    for path, kinds in json.loads(doc["media"]).items():
        sound = kinds == ["audio"] and Path(path).suffix.lower() in _VIDEO
        shown.append({"type": "audio", "url": path} if sound else path)
    return shown


def doc_to_text(doc: Doc, kwargs: Any = None) -> str:
    """What is asked."""
    given: Mapping[str, str] = kwargs or {}
    return f"{given.get('pre_prompt', '')}{doc['question']}{given.get('post_prompt', '')}"


def process_closed(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The answer to a question with labels, once for each metric."""
    return dict.fromkeys(CLOSED, _value(doc, results))


def process_open(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The answer to any other question, once for each metric."""
    return dict.fromkeys(OPEN, _value(doc, results))


def _value(doc: Doc, results: Sequence[str]) -> dict[str, str]:
    return {"benchmark": doc["benchmark"], "sample_id": doc["sample_id"], "raw": results[0]}


def average(values: Values) -> float:
    """The headline: accuracy, the mean over conflict subsets, or the task's first metric."""
    return _number(_block(values).get("average"))


def war(values: Values) -> float:
    """Accuracy."""
    return _number(_block(values).get("metrics", {}).get("war"))


def uar(values: Values) -> float:
    """Unweighted average recall."""
    return _number(_block(values).get("metrics", {}).get("uar"))


def weighted_f1(values: Values) -> float:
    """F1, weighted by support."""
    return _number(_block(values).get("metrics", {}).get("weighted_f1"))


def official(values: Values) -> float:
    """The first number of the benchmark's released scorer; NaN where it has none."""
    benchmark, rows = _rows(values)
    scorer = benchmark.tasks[rows[0]["task"]].official
    return math.nan if scorer is None else float(next(iter(scorer(rows).values())))


def invalid(values: Values) -> float:
    """The share of refused and unreadable answers."""
    return sum(row["status"] != "ok" for row in _rows(values)[1]) / len(values)


def _number(found: Mapping[str, Any] | None) -> float:
    return math.nan if found is None or found["value"] is None else float(found["value"])


def _key(file: str) -> str:
    return Path(file).stem.upper()


def _inputs(file: str) -> tuple[str, str, str]:
    """The values of the environment: data, options and media root."""
    names = [f"MMEMO_{what}_{_key(file)}" for what in ("DATA", "OPTIONS", "MEDIA")]
    data, options, media = (os.environ.get(name, "") for name in names)
    if not data:
        raise ConfigError(f"set {names[0]} to the folder of the release that {file} describes")
    return data, options, media


@lru_cache(maxsize=8)
def _read(file: str, data: str, options: str, media: str) -> tuple[Benchmark, DataConfig]:
    # The manifest is read once; the questions stay in memory.
    folder = Path(tempfile.mkdtemp(prefix="mmemo-lmms-eval-"))
    params, values = benchmark_inputs(
        file, data.split(os.pathsep), options.split(), folder, media or None
    )
    return load_benchmark(file, params), parse(DataConfig, values)


@lru_cache(maxsize=8)
def _questions(file: str, data: str, options: str, media: str) -> tuple[Question, ...]:
    benchmark, config = _read(file, data, options, media)
    found = benchmark.questions(config)
    validate(benchmark, found)
    return tuple(found)


@lru_cache(maxsize=8)
def _by_id(file: str, data: str, options: str, media: str) -> Mapping[str, Question]:
    return {one.sample.sample_id: one for one in _questions(file, data, options, media)}


def _media_root(file: str) -> Path:
    return Path(_read(file, *_inputs(file))[1].media_root).resolve()


def _doc(question: Question, file: str, root: Path) -> dict[str, str]:
    """One question as texts alone, so that all rows of a data set have the same types."""
    row, sample = question.row(), question.sample
    media: dict[str, list[str]] = {}
    for modality in MODALITIES:
        ref = sample.media.get(modality)
        if ref is not None and (ref.start is not None or ref.end is not None):
            raise ConfigError(
                f"{sample.sample_id} is a part of {ref.path}, which lmms-eval's models do not cut; "
                "cut the clips first"
            )
        if ref is not None:
            media.setdefault(str(root / ref.path), []).append(modality)
    return {
        "sample_id": sample.sample_id,
        "benchmark": file,
        "question": row["question"],
        "media": json.dumps(media),
        "target": as_text(row["truth"]),
        "speaker": sample.group.get("speaker", ""),
    }


def _rows(values: Values) -> tuple[Benchmark, list[dict[str, Any]]]:
    """The answers as ``predictions.jsonl`` has them."""
    file = values[0]["benchmark"]
    inputs = _inputs(file)
    benchmark, known = _read(file, *inputs)[0], _by_id(file, *inputs)
    rows: list[dict[str, Any]] = []
    for one in values:
        question = known[one["sample_id"]]
        rows.append({**question.row(), "raw": one["raw"], **benchmark.read(question, one["raw"])})
    return benchmark, rows


def _block(values: Values) -> Mapping[str, Any]:
    benchmark, rows = _rows(values)
    return next(iter(score_rows(rows, _FEW, benchmark.specs()).values()))
