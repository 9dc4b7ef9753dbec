"""``mmemo eval``: answers the questions of a benchmark with a model, and scores the answers."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from mmemo import content, files
from mmemo.config import save_resolved
from mmemo.console import console
from mmemo.data.adapter import Excluded
from mmemo.data.manifest import load_samples
from mmemo.errors import EvaluationError
from mmemo.evaluation.benchmark import (
    Benchmark,
    Question,
    Selected,
    load_benchmark,
    tell_excluded,
    validate,
)
from mmemo.evaluation.cache import CachedEvaluator
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.controls.groups import balanced_groups
from mmemo.evaluation.controls.made import made_of
from mmemo.evaluation.controls.nbest import measure_nbest
from mmemo.evaluation.controls.run import check_controls, run_controls
from mmemo.evaluation.controls.tables import groups_table
from mmemo.evaluation.controls.training import training_sentence
from mmemo.evaluation.controls.wording import reword
from mmemo.evaluation.generate import (
    AnswerGenerator,
    check_generation,
    model_fingerprint,
    serve,
)
from mmemo.evaluation.predictions import PARTS, Row
from mmemo.evaluation.reliance.gates import record_gates
from mmemo.evaluation.reliance.measure import check_reliance, measure_reliance
from mmemo.evaluation.reliance.summary import drop_other_reliance
from mmemo.evaluation.results import (
    EXCLUDED,
    PREDICTIONS,
    SCORES,
    EvalResult,
    evaluated_runs,
    write_results,
)
from mmemo.evaluation.reward_scores import describe_scores, load_scores, score_answers
from mmemo.evaluation.scorer import Spec
from mmemo.evaluation.scorers.judging import judged
from mmemo.evaluation.scorers.measured import MEASURED
from mmemo.evaluation.scorers.set_scores import read_sets, set_means
from mmemo.evaluation.scoring import (
    Block,
    ScoreValues,
    constant_rows,
    score_readings,
    score_rows,
    score_task,
    task_means,
)
from mmemo.evaluation.summary import print_summary, summary_of
from mmemo.evaluation.tables import print_results, reliance_tables
from mmemo.features.ingest import IngestReport, ensure_features
from mmemo.features.store import FeatureStore, open_store
from mmemo.formats import counted
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, load_model
from mmemo.run_log import RunRecord

__all__ = ["EvalConfig", "EvalResult", "check_eval", "run_eval"]


def check_eval(config: EvalConfig) -> tuple[Benchmark, Selected, list[Question]]:
    """The benchmark, its selected samples and its questions, after checking that it scores right
    and wrong answers as it should, and that the scores can be computed.

    Raises:
        EvaluationError, ConfigError, DataError: the benchmark, the config or a manifest is wrong.
    """
    benchmark = load_benchmark(config.benchmark.path, config.benchmark.params)
    selected = benchmark.select(config.data)
    questions = benchmark.ask(selected, config.data)
    validate(benchmark, questions)
    questions = reword(benchmark, questions, config.controls.wording)
    load_scores(config.scores, questions)
    check_generation(config.generation, questions)
    if config.reliance.enabled:
        check_reliance(questions)
    check_controls(config, benchmark, questions)
    return benchmark, selected, questions


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """What an evaluation leaves to its controls: the model, its fingerprint, and what it asked."""

    loaded: Loaded
    fingerprint: str
    benchmark: Benchmark
    questions: list[Question]
    result: EvalResult


def run_eval(config: EvalConfig) -> EvalResult:
    """Generate and score the answers, write ``predictions.jsonl`` and ``results.json``, and print
    the table. Expert routing is recorded if the model has experts, and reliance is measured and
    controls are run if the config asks for it.

    A killed evaluation resumes after its last whole batch. A finished one whose inputs have not
    changed is only scored again.

    Raises:
        EvaluationError: there is nothing to answer, or the benchmark's scoring is wrong.
        MmemoError: any other part fails.
    """
    done = _evaluate(config)
    run_controls(
        config,
        done.benchmark,
        done.questions,
        done.result,
        lambda other: _evaluate(other, done).result,
    )
    return done.result


def _evaluate(config: EvalConfig, held: _Evaluated | None = None) -> _Evaluated:
    """One evaluation; with the model of ``held``, and without tables, for a control of it."""
    started = time.monotonic()
    folder = Path(config.output_dir)
    record = RunRecord(folder)
    # Checked before the model is loaded, which takes longer than any of the checks.
    benchmark, selected, questions = check_eval(config)
    save_resolved(config, folder / "config.yaml")
    record.event("benchmark", file=benchmark.file, sha256=benchmark.sha256, n=len(questions))
    _write_excluded(selected, record, folder, tell=held is None)
    loaded = _load(config, questions) if held is None else held.loaded
    fingerprint = model_fingerprint(loaded.model) if held is None else held.fingerprint
    asked = _ask(config, benchmark, questions, loaded, fingerprint, record)
    kept, ingest, made, evaluator, rows = (
        asked.questions,
        asked.ingest,
        asked.made,
        asked.evaluator,
        asked.rows,
    )
    rows, specs = judged(rows, benchmark.specs(), folder, config.benchmark.judge)
    values = _score_answers(config, kept, rows, loaded, record, made)
    found = _results(config, benchmark, specs, questions, rows, ingest, made)
    found["excluded"]["rows"] = selected.reasons
    for task, means in task_means(rows, values, config.bootstrap).items():
        own = [row for row in rows if row["task"] == task]
        official = set_means(own, read_sets(folder / SCORES, own), config.bootstrap)
        found["tasks"][task]["scores"] = means | official
    found["summary"] = summary_of(benchmark, found["tasks"])
    result = write_results(folder, found)
    seconds = round(time.monotonic() - started, 2)
    record.event("eval_done", seconds=seconds, average=result.main.get("average"))
    if held is None:
        print_results(evaluated_runs([result]))
        print_summary(found["summary"])
        groups = groups_table(result.tasks)
        if groups is not None:
            console.print(groups)
        console.print(training_sentence(result.made["training"]), soft_wrap=True)
        # The results are on the disk by now, so a kill during these measurements costs none of
        # them.
        _measure(config, evaluator, kept, result)
    return _Evaluated(loaded, fingerprint, benchmark, kept, result)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The questions whose clips can be read, their answers, and how they were made."""

    questions: list[Question]
    ingest: IngestReport
    made: dict[str, Any]
    evaluator: CachedEvaluator
    rows: list[Row]


def _ask(
    config: EvalConfig,
    benchmark: Benchmark,
    questions: Sequence[Question],
    loaded: Loaded,
    fingerprint: str,
    record: RunRecord,
    share: tuple[int, int] | None = None,
) -> _Asked:
    """Ask the questions, or those of one process."""
    folder = Path(config.output_dir)
    store = open_store(config.store, folder)
    kept, ingest = _ingest(config, questions, loaded, store, record)
    with _generator(config, loaded, kept, store) as generator:
        prompts = [generator.prompt_text(q) for q in kept]
        made = made_of(config, benchmark, loaded, fingerprint, kept, prompts)
        evaluator = CachedEvaluator(
            benchmark,
            generator,
            identity=_identity(config, made),
            batch_size=config.per_device_eval_batch_size,
            record=record,
            share=share,
        )
        noted = _measured(benchmark, generator, kept)
        rows = evaluator.ask(config.name, folder / PREDICTIONS, kept, noted=noted)
    return _Asked(kept, ingest, made, evaluator, rows)


def run_eval_stage(config: EvalConfig) -> EvalResult | None:
    """:func:`run_eval`; or, in one of several processes, its share of the answers, which are kept
    in ``parts`` until :func:`run_eval` scores them.

    Raises:
        EvaluationError, MmemoError: as :func:`run_eval`.
    """
    size, rank = (
        int(os.environ.get(name, one)) for name, one in (("WORLD_SIZE", "1"), ("RANK", "0"))
    )
    if size == 1:
        return run_eval(config)
    # What each process notes, of its clips too, stays out of the others' files.
    record = RunRecord(Path(config.output_dir) / PARTS / f"rank-{rank}")
    benchmark, _, questions = check_eval(config)
    loaded = _load(config, questions)
    _ask(
        config, benchmark, questions, loaded, model_fingerprint(loaded.model), record, (rank, size)
    )
    return None


def _measured(
    benchmark: Benchmark, generator: AnswerGenerator, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """What the tasks measure on each question's clips; empty if none does."""
    measures = {name: task.measure for name, task in benchmark.tasks.items()}
    if not any(measures.values()):
        return []
    found: list[dict[str, Any]] = []
    for question in questions:
        measure = measures[question.task]
        own = measure and dict(measure(generator.source.get, question.sample))
        found.append({MEASURED: own} if own else {})
    return found


def _load(config: EvalConfig, questions: Sequence[Question]) -> Loaded:
    """The model, on the device that it runs on."""
    texts = [turn.text for question in questions for turn in question.sample.turns]
    loaded = load_model(config.model, texts)
    model: Any = loaded.model
    gpus, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    model.to(torch.device("cuda", place % gpus) if torch.cuda.is_available() else "cpu")
    return loaded


def _ingest(
    config: EvalConfig,
    questions: Sequence[Question],
    loaded: Loaded,
    store: FeatureStore | None,
    record: RunRecord,
) -> tuple[list[Question], IngestReport]:
    """The questions whose clips can be read, after encoding these.

    Raises:
        EvaluationError: there is none.
    """
    ingest = ensure_features(
        [question.sample for question in questions],
        unwrap(loaded.model),
        store,
        media_root=Path(config.data.media_root),
        limits=config.decode,
        record=record,
        out_dir=record.path.parent,
    )
    _print_bad(ingest)
    kept_ids = {sample.sample_id for sample in ingest.kept}
    kept = [question for question in questions if question.sample.sample_id in kept_ids]
    if not kept:
        raise EvaluationError(
            f"no question has a clip that can be read; {ingest.bad_list} lists what is wrong"
        )
    return kept, ingest


def _write_excluded(selected: Selected, record: RunRecord, folder: Path, *, tell: bool) -> None:
    """Write ``excluded_rows.jsonl``, the rows that are not asked about, if there are any."""
    path = folder / EXCLUDED
    if not selected.excluded:
        # The list of an earlier evaluation would be taken for this one's.
        path.unlink(missing_ok=True)
        return
    rows = map(Excluded.record, selected.excluded)
    files.write_rows(path, rows, ensure_ascii=False)
    record.event("excluded_rows", reasons=selected.reasons, file=str(path))
    if tell:
        tell_excluded(selected)


def _print_bad(ingest: IngestReport) -> None:
    """Print how many clips could not be read, and where they are listed."""
    if ingest.bad:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in ingest.kinds.items())
        console.print(
            Text.assemble(
                (f"{counted(len(ingest.bad), 'bad clip')} left out", "yellow"),
                f" ({kinds}), together with their questions; see {ingest.bad_list}",
            ),
            soft_wrap=True,
        )


def _measure(
    config: EvalConfig,
    evaluator: CachedEvaluator,
    questions: Sequence[Question],
    result: EvalResult,
) -> None:
    """Record expert routing, count n-best answers and measure reliance, if the config asks for it;
    if not, remove the reliance of other answers."""
    with evaluator.generator:
        record_gates(config, evaluator, questions, result)
        measure_nbest(config, evaluator, questions, result)
    if not config.reliance.enabled:
        drop_other_reliance(result.folder, result.rows())
        return
    with evaluator.generator:
        values = measure_reliance(config, evaluator, questions, result)
    for table in reliance_tables(values):
        console.print(table)


def _generator(
    config: EvalConfig, loaded: Loaded, questions: Sequence[Question], store: FeatureStore | None
) -> AnswerGenerator:
    samples, root = [question.sample for question in questions], Path(config.data.media_root)
    rank = os.environ.get("RANK", "0")
    served = serve(
        loaded,
        samples,
        Path(config.output_dir) / f"vllm-{rank}",
        generation=config.generation,
        run=config.run,
        media_root=root,
        decode=config.decode,
        max_length=config.data.max_length,
    )
    return AnswerGenerator(
        loaded,
        samples,
        store,
        root,
        config.decode,
        generation=config.generation,
        seed=config.seed,
        max_length=config.data.max_length,
        run=config.run,
        served=served,
    )


def _identity(config: EvalConfig, made: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the questions that affects the answers."""
    return {
        "model": made["model"]["fingerprint"],
        "benchmark": made["benchmark"]["sha256"],
        "generation": made["generation"],
        # Greedy answers do not depend on the seed, so another one keeps them.
        "seed": config.seed if config.generation.do_sample else None,
        **({"engine": "vllm"} if config.run.engine == "vllm" else {}),
    }


def _score_answers(
    config: EvalConfig,
    questions: Sequence[Question],
    rows: Sequence[Row],
    loaded: Loaded,
    record: RunRecord,
    made: dict[str, Any],
) -> ScoreValues:
    """The scores of each answer. How they are computed is added to ``made``."""
    tokenizer: Any = loaded.processor.tokenizer

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores = load_scores(config.scores, questions)
    values, failed = score_answers(
        scores, questions, rows, tokenize, record, Path(config.output_dir)
    )
    made["scores"] = {
        name: {**how, "failed": failed.get(name, 0)}
        for name, how in describe_scores(scores).items()
    }
    return values


def _results(
    config: EvalConfig,
    benchmark: Benchmark,
    specs: Mapping[str, Sequence[Spec]],
    questions: Sequence[Question],
    rows: Sequence[Row],
    ingest: IngestReport,
    made: Mapping[str, Any],
) -> dict[str, Any]:
    tasks = score_rows(rows, config.bootstrap, specs, benchmark.slices())
    for name, task in benchmark.tasks.items():
        if task.official is not None and name in tasks:
            found = task.official([row for row in rows if row["task"] == name])
            # JSON has no NaN, which a released scorer may give where no answer can be read.
            tasks[name]["official"] = {
                key: value if math.isfinite(value) else None for key, value in found.items()
            }
    for name, block in tasks.items():
        own = [row for row in rows if row["task"] == name]
        balanced = balanced_groups(own, config)
        if balanced:
            block["balanced_groups"] = balanced
    main = next(iter(tasks))
    asked = sum(question.task == main for question in questions)
    answered = [row for row in rows if row["task"] == main]
    return {
        "name": config.name,
        "role": config.role,
        "n": len(rows),
        "excluded": {
            "questions": len(questions) - len(rows),
            "clips": len(ingest.bad),
            "kinds": ingest.kinds,
        },
        "bounds": _bounds(answered, asked),
        "tasks": tasks,
        "readings": score_readings(benchmark.readings, questions, rows, config.bootstrap),
        "baselines": _majority(config, benchmark, answered),
        "made": made,
    }


def _bounds(rows: Sequence[Row], asked: int) -> dict[str, float]:
    """Accuracy on all questions if those without a valid answer were all wrong, or all right."""
    right = sum(row["answer"] == row["truth"] for row in rows)
    invalid = sum(row["status"] != "ok" for row in rows)
    excluded = asked - len(rows)
    return {
        "asked": asked,
        "worst": round(right / asked, 6),
        "best": round((right + invalid + excluded) / asked, 6),
    }


def _majority(config: EvalConfig, benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, Block]:
    """The score of always answering with the most common training label (the first by name in a
    tie)."""
    if config.majority_from is None:
        return {}
    known: set[str] = set(rows[0]["labels"] or ())
    if not known:
        raise EvaluationError("majority_from needs a headline task with labels; leave it out")
    labels = [sample.truth.label for sample in load_samples(config.majority_from)]
    counts = Counter(label for label in labels if label is not None and label in known)
    if not counts:
        raise EvaluationError(
            f"no row of majority_from has a label of {benchmark.file}; give the manifest of the "
            "emotion tier there"
        )
    label = min(counts, key=lambda name: (-counts[name], name))
    block = score_task(constant_rows(rows, label), config.bootstrap)
    manifests = config.majority_from.manifests
    majority = {
        "label": label,
        "counts": dict(sorted(counts.items())),
        "manifests": {name: content.sha256(Path(name)) for name in manifests},
        "block": block,
    }
    return {"majority": majority}
