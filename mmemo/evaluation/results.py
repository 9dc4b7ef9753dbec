"""``results.json``: every number of an evaluation, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.errors import EvaluationError
from mmemo.evaluation.predictions import Row, read_predictions
from mmemo.evaluation.scoring import (
    Block,
    ScoreValues,
    cluster_words,
    compare_means,
    compare_rows,
    constant_rows,
    label_order,
    open_task,
)
from mmemo.evaluation.set_scores import compare_sets, read_sets
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
        """The clusters that the headline's intervals resample, such as ``20 speakers``."""
        return cluster_words(self.rows(next(iter(self.tasks))), self.bootstrap)

    @property
    def excluded(self) -> int:
        """The number of questions left out because their clip could not be read."""
        return int(self.values["excluded"]["questions"])

    def rows(self, task: str | None = None) -> list[Row]:
        """The answers, of one task or of all."""
        rows = read_predictions(self.folder / PREDICTIONS)
        return [row for row in rows if task in (None, row["task"])]

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


def compare(
    run_a: Path | EvalResult, run_b: Path | EvalResult, config: BootstrapConfig | None = None
) -> dict[str, Block]:
    """Paired comparison of two evaluations of one benchmark, for each task that both have.

    Only questions that both answered are compared; ``unpaired`` counts the others. ``differences``
    compares the metrics, which open questions do not have. ``scores`` compares the scores that both
    have; ``unlike_scores`` names those that are left out because the two runs computed them with
    different functions or parameters.

    Raises:
        EvaluationError: no question in common, or the truths differ.
    """
    a = run_a if isinstance(run_a, EvalResult) else read_results(run_a)
    b = run_b if isinstance(run_b, EvalResult) else read_results(run_b)
    config = config or a.bootstrap
    blocks: dict[str, Block] = {}
    for task in a.tasks:
        if task not in b.tasks:
            continue
        first = {row["sample_id"]: row for row in a.rows(task)}
        second = {row["sample_id"]: row for row in b.rows(task)}
        common = [name for name in first if name in second]
        for name in common:
            if first[name]["truth"] != second[name]["truth"]:
                raise EvaluationError(
                    f"'{name}' has different truths in {a.folder} and in {b.folder}; "
                    "evaluate both on the same manifests"
                )
        if common:
            ours, theirs = [first[name] for name in common], [second[name] for name in common]
            closed = label_order([*ours, *theirs])
            block = compare_rows(ours, theirs, config) if closed else open_task(ours, config)
            block["unpaired"] = len(first) + len(second) - 2 * len(common)
            unlike = _unlike_scores(a, b)
            here = set(a.tasks[task].get("scores", {})) - set(unlike)
            one = {name: column for name, column in a.scores(ours).items() if name in here}
            block["scores"] = compare_means(ours, one, b.scores(theirs), config)
            pairs = read_sets(a.folder / SCORES, ours)
            logged = {name: column for name, column in pairs.items() if name in here}
            others = read_sets(b.folder / SCORES, theirs)
            block["scores"] |= compare_sets(ours, logged, others, config)
            block["unlike_scores"] = unlike
            blocks[task] = block
    if not blocks:
        raise EvaluationError(
            f"{a.folder} and {b.folder} have no question in common; evaluate both on the same "
            "benchmark"
        )
    return blocks


def evaluated_runs(results: Sequence[EvalResult]) -> list[EvaluatedRun]:
    """The rows of a results table: the evaluations, each compared with the first one, and then
    the first one's majority baseline."""
    first = results[0]
    task = next(iter(first.tasks))
    runs: list[EvaluatedRun] = []
    for result in results:
        if task not in result.tasks:
            continue
        difference = None if result is first else compare(first, result).get(task)
        runs.append(EvaluatedRun(result.name, result.role, result.tasks[task], result, difference))
    return [*runs, *_majority(first)]


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
