"""``results.json``: every number of an evaluation, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.errors import EvaluationError
from mmemo.evaluation.clusters import claim_notes, cluster_of, cluster_words
from mmemo.evaluation.comparison import (
    Setting,
    compare_means,
    compare_rows,
    correct,
    unlike_settings,
)
from mmemo.evaluation.predictions import Row, read_predictions
from mmemo.evaluation.scorer import compare_with, specs_of
from mmemo.evaluation.scorers.judging import with_verdicts
from mmemo.evaluation.scorers.set_scores import compare_sets, read_sets
from mmemo.evaluation.scoring import Block, ScoreValues, constant_rows, label_order, open_task
from mmemo.statistics import BootstrapConfig

SCHEMA = 2
RESULTS, PREDICTIONS, SCORES = "results.json", "predictions.jsonl", "scores.jsonl"
EXCLUDED = "excluded_rows.jsonl"

ROLES = ("model", "baseline")


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A finished evaluation: its folder, and the contents of its ``results.json``."""

    folder: Path
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.values["name"]

    @property
    def role(self) -> str:
        """``model``, or ``baseline`` for a run that models are compared with."""
        return self.values["role"]

    @property
    def tasks(self) -> Mapping[str, Block]:
        """Task name to the numbers of that task. The first task is the headline."""
        return self.values["tasks"]

    @property
    def main(self) -> Block:
        """The numbers of the headline task."""
        return next(iter(self.tasks.values()))

    @property
    def readings(self) -> Mapping[str, Block]:
        """Name of each of the benchmark's readings to its numbers."""
        return self.values.get("readings", {})

    @property
    def made(self) -> Mapping[str, Any]:
        """How the numbers were made."""
        return self.values["made"]

    @property
    def bootstrap(self) -> BootstrapConfig:
        """How the intervals were made."""
        return BootstrapConfig.model_validate(self.made["bootstrap"])

    @property
    def cluster_words(self) -> str:
        """The clusters behind the headline's intervals, such as ``20 speakers``."""
        return cluster_words(self.rows(next(iter(self.tasks))), self.bootstrap)

    @property
    def old_intervals(self) -> bool:
        """Whether a version of mmemo made the intervals that resampled clusters (percentile
        bootstrap), which cover too rarely with few speakers."""
        return "intervals" not in self.made

    @property
    def excluded(self) -> int:
        """The number of questions left out because their clip could not be read."""
        return int(self.values["excluded"]["questions"])

    def rows(self, task: str | None = None) -> list[Row]:
        """The answers, of one task or of all, with the verdicts of judges."""
        rows = read_predictions(self.folder / PREDICTIONS)
        own = [row for row in rows if task in (None, row["task"])]
        specs = {name: specs_of(block) for name, block in self.tasks.items()}
        return with_verdicts(own, specs, self.folder)

    def scores(self, rows: Sequence[Row]) -> ScoreValues:
        """The scores of some of the answers, in their order.

        Raises:
            EvaluationError: ``scores.jsonl`` is missing or does not fit the answers.
        """
        names = list(self.made.get("scores", {}))
        if not names:
            return {}
        path = self.folder / SCORES
        # Looked up by key, so that scores of other answers are noticed.
        found = {line["key"]: line["scores"] for line in read_predictions(path)}
        try:
            return {name: [found[row["key"]][name] for row in rows] for name in names}
        except KeyError as error:
            raise EvaluationError(
                f"{path}: does not fit the answers beside it; run the evaluation again, which will "
                "only score them"
            ) from error


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """One row of the results table: an evaluation, or the majority baseline of one.

    ``block`` holds the numbers of the headline task. ``difference`` compares the first model with
    this run, paired; it is None for the first model itself. ``result`` is None for the majority
    baseline, which has no folder of its own.
    """

    name: str
    role: str
    block: Block
    result: EvalResult | None = None
    difference: Block | None = None


def claim_notes_of(results: Sequence[EvalResult], tests: int | None = None) -> list[str]:
    """What a reader of a table of evaluations must know, in whole sentences: how few clusters stand
    behind it, and which intervals an earlier version made."""
    first = results[0]
    rows, config = first.rows(next(iter(first.tasks))), first.bootstrap
    clusters = len({cluster_of(row, config) for row in rows})
    notes = claim_notes(clusters, cluster_words(rows, config), config, tests)
    old = [result.name for result in results if result.old_intervals]
    if old:
        notes.append(
            f"The intervals of {', '.join(old)} are an earlier version's, too narrow with few "
            "speakers; run these evaluations again."
        )
    return notes


def write_results(folder: Path, values: Mapping[str, Any]) -> EvalResult:
    """Write ``results.json`` in one step, and read it back."""
    path = folder / RESULTS
    # NaN is no JSON, and only Python would read it back.
    text = json.dumps({"schema": SCHEMA, **values}, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_whole(path, text + "\n")
    return read_results(folder)


def read_results(folder: Path) -> EvalResult:
    """The finished evaluation in ``folder``.

    Raises:
        EvaluationError: there is none, it is damaged, or another version of mmemo wrote it.
    """
    path = folder / RESULTS
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read ({error.strerror}); give the folder of a finished `mmemo eval`"
        ) from error
    except ValueError as error:  # not JSON, or not even text
        raise EvaluationError(f"{path}: is damaged; run the evaluation again") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:  # pyright: ignore[reportUnknownMemberType]
        raise EvaluationError(
            f"{path}: was written by another version of mmemo; run the evaluation again"
        )
    if not {"name", "role", "tasks", "made"} <= set(values):  # pyright: ignore[reportUnknownArgumentType]
        raise EvaluationError(f"{path}: is damaged; run the evaluation again")
    return EvalResult(folder, values)  # pyright: ignore[reportUnknownArgumentType]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations of one benchmark, compared on the questions that both answered.

    ``tasks``: task name to its numbers. ``differences`` compares the metrics, which open questions
    do not have, and ``scores`` the scores that both runs have; each difference has its interval,
    ``p``, ``p_holm``, n and number of clusters. ``unpaired`` counts the questions of one run alone.
    ``unlike_scores`` names the scores that are left out because the two runs computed them with
    different functions or parameters.

    ``unlike``: every setting in which the two runs differ, with both values. ``tests``: the number
    of p-values that ``p_holm`` corrects together, over all comparisons made at once. ``config``:
    how intervals and p-values were computed.
    """

    first: EvalResult
    other: EvalResult
    tasks: Mapping[str, Block]
    unlike: Sequence[Setting]
    tests: int
    config: BootstrapConfig

    def row(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "first": {"name": self.first.name, "folder": str(self.first.folder)},
            "other": {"name": self.other.name, "folder": str(self.other.folder)},
            "unlike": [{"setting": name, "first": a, "other": b} for name, a, b in self.unlike],
            "tests": self.tests,
            "bootstrap": self.config.model_dump(),
            "tasks": dict(self.tasks),
        }


def compare(*runs: Path | EvalResult, config: BootstrapConfig | None = None) -> list[Comparison]:
    """Paired comparisons of the first evaluation with each of the others, for each task that both
    have. Holm's correction is over all p-values of all of them.

    Args:
        config: how intervals and p-values are computed; by default as in the first run.

    Raises:
        EvaluationError: fewer than two runs, or two that cannot be compared: other benchmarks,
            truths, labels or parsers, or no question in common.
    """
    results = [run if isinstance(run, EvalResult) else read_results(run) for run in runs]
    if len(results) < 2:
        raise EvaluationError("nothing to compare; give the folders of two or more evaluations")
    first, *others = results
    config = config or first.bootstrap
    pairs = [(other, _compare(first, other, config)) for other in others]
    tests = correct([block for _, tasks in pairs for block in tasks.values()])
    return [
        Comparison(first, other, tasks, unlike_settings(first.made, other.made), tests, config)
        for other, tasks in pairs
    ]


def _compare(a: EvalResult, b: EvalResult, config: BootstrapConfig) -> dict[str, Block]:
    _refuse_unlike(a, b)
    blocks: dict[str, Block] = {}
    for task in a.tasks:
        if task not in b.tasks:
            continue
        first = {row["sample_id"]: row for row in a.rows(task)}
        second = {row["sample_id"]: row for row in b.rows(task)}
        common = [name for name in first if name in second]
        for name in common:
            _refuse_unlike_rows(first[name], second[name], a, b)
        if common:
            ours, theirs = [first[name] for name in common], [second[name] for name in common]
            closed = label_order([*ours, *theirs])
            block = compare_rows(ours, theirs, config) if closed else open_task(ours, config)
            block["cluster_words"] = cluster_words(ours, config)
            block["unpaired"] = len(first) + len(second) - 2 * len(common)
            block["reworded"] = sum(
                one.get("question") != other.get("question")
                for one, other in zip(ours, theirs, strict=True)
            )
            unlike = _unlike_scores(a, b)
            here = set(a.tasks[task].get("scores", {})) - set(unlike)
            one = {name: column for name, column in a.scores(ours).items() if name in here}
            block["scores"] = compare_means(ours, one, b.scores(theirs), config)
            pairs = read_sets(a.folder / SCORES, ours)
            logged = {name: column for name, column in pairs.items() if name in here}
            others = read_sets(b.folder / SCORES, theirs)
            block["scores"] |= compare_sets(ours, logged, others, config)
            block["scored"] = compare_with(specs_of(a.tasks[task]), ours, theirs, config)
            block["unlike_scores"] = unlike
            blocks[task] = block
    if not blocks:
        raise EvaluationError(
            f"{a.folder} and {b.folder} have no question in common; evaluate both on the same "
            "benchmark"
        )
    return blocks


def _refuse_unlike(a: EvalResult, b: EvalResult) -> None:
    """Raises EvaluationError for two runs whose difference would not be that of two models."""
    files_of = [Path(run.made.get("benchmark", {}).get("file", "")).name for run in (a, b)]
    if files_of[0] != files_of[1]:
        raise EvaluationError(
            f"{a.folder} and {b.folder} are evaluations of two benchmarks ({files_of[0]} and "
            f"{files_of[1]}); evaluate both on the same one"
        )
    parsers = [run.made.get("parser") for run in (a, b)]
    if parsers[0] != parsers[1]:
        raise EvaluationError(
            f"the answers of {a.folder} were read by parser {parsers[0]} and those of {b.folder} "
            f"by parser {parsers[1]}; run both evaluations again with this version of mmemo, so "
            "that one parser reads both"
        )


def _refuse_unlike_rows(one: Row, other: Row, a: EvalResult, b: EvalResult) -> None:
    name = one["sample_id"]
    if one["truth"] != other["truth"]:
        raise EvaluationError(
            f"'{name}' has different truths in {a.folder} and in {b.folder}; "
            "evaluate both on the same manifests"
        )
    if set(one["labels"] or ()) != set(other["labels"] or ()):
        raise EvaluationError(
            f"'{name}' has other labels to choose from in {a.folder} than in {b.folder}; evaluate "
            "both with the same labels"
        )


def evaluated_runs(results: Sequence[EvalResult]) -> list[EvaluatedRun]:
    """The rows of a results table: the evaluations, each compared with the first one, and then
    the first one's majority baseline. Holm's correction is over all these comparisons."""
    first = results[0]
    task = next(iter(first.tasks))
    runs: list[EvaluatedRun] = []
    for result in results:
        if task not in result.tasks:
            continue
        difference = None if result is first else _compare(first, result, first.bootstrap).get(task)
        runs.append(EvaluatedRun(result.name, result.role, result.tasks[task], result, difference))
    runs += _majority(first)
    correct([run.difference for run in runs if run.difference is not None])
    return runs


def _majority(first: EvalResult) -> list[EvaluatedRun]:
    majority = first.values.get("baselines", {}).get("majority")
    if not majority:
        return []
    task = next(iter(first.tasks))
    rows = first.rows(task)
    difference = compare_rows(rows, constant_rows(rows, majority["label"]), first.bootstrap)
    name = f"majority (always “{majority['label']}”)"
    return [EvaluatedRun(name, "baseline", majority["block"], None, difference)]


def _unlike_scores(a: EvalResult, b: EvalResult) -> list[str]:
    """Names of scores that the two runs computed in different ways."""
    ours, theirs = a.made.get("scores", {}), b.made.get("scores", {})
    how = ("path", "sha256", "params")
    return [
        name
        for name in ours
        if name in theirs and any(ours[name][key] != theirs[name][key] for key in how)
    ]
