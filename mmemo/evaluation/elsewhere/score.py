"""``mmemo score``: predictions that were made elsewhere become a finished evaluation.

A question without a prediction counts as a wrong answer that could not be read, in every number but
those of the released scorer (``official``), which sees what the file holds, as it would have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from mmemo import content, files
from mmemo.answers.parsing import PARSER_VERSION, normalise
from mmemo.config import parse
from mmemo.console import console
from mmemo.data.manifest import DataConfig
from mmemo.errors import ConfigError, DataError, EvaluationError
from mmemo.evaluation.benchmark import (
    Benchmark,
    Question,
    Selected,
    load_benchmark,
    tell_excluded,
    validate,
)
from mmemo.evaluation.elsewhere.formats import read_predictions_file
from mmemo.evaluation.elsewhere.labelled import labelled_benchmark
from mmemo.evaluation.elsewhere.match import Matching, match, match_by_position
from mmemo.evaluation.elsewhere.prediction import Columns, Prediction
from mmemo.evaluation.predictions import Row, key_of
from mmemo.evaluation.results import (
    EXCLUDED,
    PREDICTIONS,
    RESULTS,
    EvalResult,
    evaluated_runs,
    read_results,
    write_results,
)
from mmemo.evaluation.scorer import Spec
from mmemo.evaluation.scorers.judging import judged
from mmemo.evaluation.scoring import score_readings, score_rows
from mmemo.evaluation.script import MANIFEST, benchmark_inputs
from mmemo.evaluation.summary import print_summary, summary_of
from mmemo.evaluation.tables import print_results
from mmemo.evaluation.task import LETTERS
from mmemo.formats import counted
from mmemo.rewards.judge.openai_client import EndpointConfig
from mmemo.run_log import RunRecord, versions
from mmemo.statistics import INTERVALS, BootstrapConfig

UNMATCHED = "unmatched.jsonl"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Predictions:
    """A file of predictions, and how it is read and matched."""

    file: Path
    format: str | None = None
    columns: Columns = field(default_factory=Columns)
    by_position: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What the predictions answer: a benchmark and its release's folder or manifests, or, with
    ``labels``, the truths in the file itself."""

    benchmark: str | None = None
    data: Sequence[str] = ()
    options: Sequence[str] = ()
    media_root: str | None = None
    labels: str | None = None
    judge: EndpointConfig | None = None
    """The judge of generated texts."""


def score_file(
    given: Predictions,
    asked: Asked,
    output: Path | None = None,
    name: str | None = None,
    config: BootstrapConfig | None = None,
) -> EvalResult:
    """Write ``predictions.jsonl`` and ``results.json`` to a folder, and print the table.

    Args:
        output: the folder; ``runs/BENCHMARK/FILE`` unless given.
        name: the run's name in reports; that of the file unless given.

    Raises:
        ConfigError, DataError, EvaluationError: the file does not fit the benchmark.
    """
    _check(asked)
    kind = Path(asked.benchmark).stem if asked.benchmark else f"labels-{asked.labels}"
    name = name or given.file.stem
    parts = (re.sub(r"[^\w.-]+", "-", part).strip("-.") for part in (kind, name))
    folder = output or Path("runs", *parts)
    _refuse_other(folder)
    format_name, predictions = read_predictions_file(given.file, given.format, given.columns)
    benchmark, selected, data, predictions = _open(given, asked, folder, predictions)
    questions = benchmark.ask(selected, data)
    validate(benchmark, questions)
    matcher = match_by_position if given.by_position else match
    found = matcher(questions, predictions, str(given.file))
    unlike = _unlike_truths(benchmark, questions, found)
    _refuse_wrong(given, questions, found, unlike)
    rows = [_row(benchmark, question, found.answers.get(place))
            for place, question in enumerate(questions)]  # fmt: skip
    elsewhere = {
        "file": str(given.file),
        "sha256": content.sha256(given.file),
        "format": format_name,
        "predictions": len(predictions),
        **_counts(questions, found, unlike),
    }
    config = config or BootstrapConfig()
    folder.mkdir(parents=True, exist_ok=True)
    verdicts, specs = judged(rows, benchmark.specs(), folder, asked.judge)
    values = _results(benchmark, specs, questions, verdicts, config)
    values["excluded"]["rows"] = selected.reasons
    values["made"] = _made(benchmark, data, elsewhere, config)
    _write(folder, selected, questions, found, rows)
    result = write_results(folder, {"name": name, **values})
    RunRecord(folder).event("elsewhere", **elsewhere, benchmark=benchmark.file)
    if data.manifests != [(folder / MANIFEST).as_posix()]:
        tell_excluded(selected)  # else they were told when the manifest was written
    _tell(questions, found, elsewhere, unlike)
    print_results(evaluated_runs([result]))
    print_summary(values["summary"])
    console.print(Text.assemble("\nResults: ", (str(folder / RESULTS), "bold")), soft_wrap=True)
    return result


def _open(
    given: Predictions, asked: Asked, folder: Path, predictions: list[Prediction]
) -> tuple[Benchmark, Selected, DataConfig, list[Prediction]]:
    """The benchmark, its samples, where they are, and the predictions about them."""
    if asked.labels is not None:
        benchmark, selected, kept = labelled_benchmark(given.file, asked.labels, predictions)
        return benchmark, selected, DataConfig(manifests=[str(given.file)]), kept
    assert asked.benchmark is not None
    params, values = benchmark_inputs(
        *(asked.benchmark, asked.data, asked.options, folder, asked.media_root), need_clips=False
    )
    data = parse(DataConfig, values, where="data")
    benchmark = load_benchmark(asked.benchmark, params)
    return benchmark, benchmark.select(data), data, predictions


def _counts(
    questions: Sequence[Question], found: Matching, unlike: Sequence[Prediction]
) -> dict[str, Any]:
    return {
        "matched": dict(found.ways),
        "unmatched": len(found.unmatched),
        "repeated": found.repeated,
        "unanswered": len(questions) - len(found.answers),
        "empty": sum(not one.text.strip() for one in found.answers.values()),
        "unlike_truths": len(unlike),
    }


def _check(asked: Asked) -> None:
    if (asked.benchmark is None) == (asked.labels is None):
        raise ConfigError(
            "give either --benchmark with its --data or --manifest, or --labels for a file that "
            "holds the truths"
        )
    if asked.benchmark is not None and not asked.data:
        raise ConfigError(
            f"give the questions of {asked.benchmark}: --data with the release's folder, or "
            "--manifest"
        )
    if asked.labels is not None and (asked.data or asked.options):
        raise ConfigError("--labels reads the truths of the file; leave out --data and --option")


def _refuse_other(folder: Path) -> None:
    """Raises ConfigError for a folder with the evaluation of a model, which would be lost."""
    if not (folder / RESULTS).exists():
        return
    try:
        other = read_results(folder).made
    except EvaluationError:
        other = {}
    if "elsewhere" not in other:
        raise ConfigError(f"{folder} holds the evaluation of a model; give another --output-dir")


def _refuse_wrong(
    given: Predictions,
    questions: Sequence[Question],
    found: Matching,
    unlike: Sequence[Prediction],
) -> None:
    """Raises DataError where nothing fits, or where a match by position is plainly wrong."""
    if not found.answers:
        one = found.unmatched[0][0]
        raise DataError(
            f"no prediction has the id of a question: {one.name} against "
            f"'{questions[0].sample.sample_id}'; name the column of ids with --id, or use "
            "--by-position if the file has the benchmark's order",
            file=str(given.file),
        )
    if given.by_position and unlike:
        raise DataError(
            f"{unlike[0].name} has another truth than the question at its position, and so have "
            f"{len(unlike) - 1} others; the file has another order than the benchmark",
            file=str(given.file),
        )


def _row(benchmark: Benchmark, question: Question, one: Prediction | None) -> Row:
    row, text = question.row(), "" if one is None else one.text
    return {
        "key": key_of(["elsewhere", row, text, one is None]),
        **row,
        "raw": text,
        **benchmark.read(question, _letter(question, text)),
        **({"unanswered": True} if one is None else {}),
    }


def _letter(question: Question, text: str) -> str:
    """The letter of the choice that the text repeats as a whole; any other text unchanged."""
    choices: Sequence[Any] = question.extra.get("choices") or ()
    if question.labels is None or not normalise(text):
        return text
    same = [place for place, one in enumerate(choices) if normalise(str(one)) == normalise(text)]
    return LETTERS[same[0]] if len(same) == 1 else text


def _unlike_truths(
    benchmark: Benchmark, questions: Sequence[Question], found: Matching
) -> list[Prediction]:
    """The predictions whose file gives another right answer than the benchmark. Only labels are
    compared, which can be read either way."""
    unlike: list[Prediction] = []
    for place, one in found.answers.items():
        question = questions[place]
        if question.labels is None or one.truth is None:
            continue
        read = benchmark.read(question, _letter(question, one.truth))
        if read["status"] == "ok" and read["answer"] != question.truth:
            unlike.append(one)
    return unlike


def _results(
    benchmark: Benchmark,
    specs: Mapping[str, Sequence[Spec]],
    questions: Sequence[Question],
    rows: Sequence[Row],
    config: BootstrapConfig,
) -> dict[str, Any]:
    tasks = score_rows(rows, config, specs, benchmark.slices())
    answered = [row for row in rows if not row.get("unanswered")]
    for block in tasks.values():
        block["scores"] = {}  # no reward function rates these answers
    for name, task in benchmark.tasks.items():
        own = [row for row in answered if row["task"] == name]
        if task.official is not None and own:
            tasks[name]["official"] = dict(task.official(own))
    main = [row for row in rows if row["task"] == next(iter(tasks))]
    right = sum(row["status"] == "ok" and row["answer"] == row["truth"] for row in main)
    unread = sum(row["status"] != "ok" for row in main)
    return {
        "role": "model",
        "n": len(rows),
        "excluded": {"questions": 0, "clips": 0, "kinds": {}},
        "bounds": {
            "asked": len(main),
            "worst": round(right / len(main), 6),
            "best": round((right + unread) / len(main), 6),
        },
        "tasks": tasks,
        "summary": summary_of(benchmark, tasks),
        "readings": score_readings(benchmark.readings, questions, answered, config),
        "baselines": {},
    }


def _made(
    benchmark: Benchmark, data: DataConfig, elsewhere: Mapping[str, Any], config: BootstrapConfig
) -> dict[str, Any]:
    """How the numbers were made. What is not known of the model's run is not there."""
    return {
        "elsewhere": dict(elsewhere),
        "model": {"path": None},
        "data": {
            "manifests": data.manifests,
            "sha256": {name: content.sha256(Path(name)) for name in data.manifests},
            "media_root": data.media_root,
            "modalities": None,
        },
        "benchmark": {
            "file": benchmark.file,
            "sha256": benchmark.sha256,
            "params": dict(benchmark.params),
        },
        "parser": PARSER_VERSION,
        "bootstrap": config.model_dump(),
        "intervals": INTERVALS,
        "versions": versions(),
    }


def _write(
    folder: Path,
    selected: Selected,
    questions: Sequence[Question],
    found: Matching,
    rows: Sequence[Row],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_rows(folder / PREDICTIONS, rows, ensure_ascii=False, allow_nan=False)
    unmatched = [
        {"prediction": one.where, "ids": list(one.ids), "reason": reason}
        for one, reason in found.unmatched
    ]
    unanswered = [
        {"question": question.sample.sample_id, "reason": "has no prediction"}
        for place, question in enumerate(questions)
        if place not in found.answers
    ]
    excluded = [asdict(one) for one in selected.excluded]
    for name, listed in ((UNMATCHED, [*unmatched, *unanswered]), (EXCLUDED, excluded)):
        if listed:
            files.write_rows(folder / name, listed, ensure_ascii=False)
        else:
            # The list of an earlier file would be taken for this one's.
            (folder / name).unlink(missing_ok=True)


def _tell(
    questions: Sequence[Question],
    found: Matching,
    elsewhere: Mapping[str, Any],
    unlike: Sequence[Prediction],
) -> None:
    """Print how the predictions were matched, and what is left over on either side."""
    ways = ", ".join(f"{n} by {way}" for way, n in found.ways.items())
    console.print(
        f"{counted(elsewhere['predictions'], 'prediction')} ({elsewhere['format']}) for "
        f"{counted(len(questions), 'question')}: {ways}"
    )
    missing = [
        q.sample.sample_id for place, q in enumerate(questions) if place not in found.answers
    ]
    lists = {
        "without a prediction, which count as wrong": ("question", missing),
        "without a question, which count nowhere": (
            "prediction",
            [f"{one.name} {reason}" for one, reason in found.unmatched],
        ),
        "whose file gives another right answer than the benchmark": (
            "prediction",
            [one.name for one in unlike],
        ),
        "without any text, which count as unreadable": (
            "prediction",
            [one.name for one in found.answers.values() if not one.text.strip()],
        ),
    }
    for what, (noun, listed) in lists.items():
        if listed:
            more = ", ..." if len(listed) > _SHOWN else ""
            shown = f" {', '.join(listed[:_SHOWN])}{more}"
            told = f"{counted(len(listed), noun)} {what}:"
            console.print(Text.assemble((told, "yellow"), shown), soft_wrap=True)
    if found.repeated:
        console.print(f"{counted(found.repeated, 'prediction')} said the same again.")
