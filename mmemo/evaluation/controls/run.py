"""Runs the controls of an evaluation: each is an evaluation of its own in a subfolder, with the
model that is loaded already, and can be repeated from the ``config.yaml`` there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.console import console
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Benchmark, Question
from mmemo.evaluation.config import ControlsConfig, EvalConfig, RelianceConfig
from mmemo.evaluation.controls import nbest
from mmemo.evaluation.controls.baselines import streams_to_try, summarise_baselines
from mmemo.evaluation.controls.robustness import edits_to_try, summarise_robustness
from mmemo.evaluation.controls.summary import COLUMNS, csv_rows
from mmemo.evaluation.controls.tables import control_table, paraphrase_table, robustness_table
from mmemo.evaluation.controls.wording import WORDINGS, reword, summarise_wordings
from mmemo.evaluation.reliance.sidecar import Sidecar, answers_key
from mmemo.evaluation.results import EvalResult
from mmemo.media.config import store_place

Ask = Callable[[EvalConfig], EvalResult]
"""Carries out an evaluation with the model that is loaded."""

BASELINES, PARAPHRASES, ROBUSTNESS = "baselines", "paraphrases", "robustness"
NBEST = "nbest"
FILES: Mapping[str, Sidecar] = {
    name: Sidecar(
        file=f"{name}.json",
        table=f"{name}.csv",
        schema=1,
        columns=COLUMNS,
        remedy=f"run the evaluation again with --{name}",
    )
    for name in (BASELINES, PARAPHRASES, ROBUSTNESS)
}
"""The files that each control writes beside the evaluation's results."""


def check_controls(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Check before any answer that the controls can be run.

    Raises:
        ConfigError: there is nothing to edit, or ``nbest`` needs labels.
        EvaluationError: a paraphrase is wrong.
    """
    own = config.controls
    if own.paraphrases:
        for wording in range(1, WORDINGS):
            reword(benchmark, questions, wording)
    if own.robustness and not edits_to_try(questions, own.edits):
        raise ConfigError(
            "controls.robustness: no question shows a sound or picture that the edits change; "
            "leave --robustness out"
        )
    if own.nbest and questions[0].labels is None:
        raise ConfigError("controls.nbest: the headline task has no labels; leave --nbest out")


def run_controls(
    config: EvalConfig,
    benchmark: Benchmark,
    questions: Sequence[Question],
    result: EvalResult,
    ask: Ask,
) -> None:
    """Run what ``controls`` asks for, write ``baselines``, ``paraphrases`` and ``robustness`` as
    JSON and CSV, and print their tables. Those of other answers are removed.

    Args:
        questions: those that ``result`` answers.
        ask: carries out one more evaluation.
    """
    own = config.controls
    if own.baselines:
        _baselines(config, questions, result, ask)
    if own.paraphrases:
        _paraphrases(config, result, ask)
    if own.robustness:
        _robustness(config, benchmark, questions, result, ask)
    rows = result.rows()
    for name in (BASELINES, PARAPHRASES, ROBUSTNESS):
        FILES[name].drop_other(result.folder, rows)


def read_controls(result: EvalResult) -> dict[str, Mapping[str, Any]]:
    """The contents of the files that controls wrote beside an evaluation, by the control's name.

    Raises:
        EvaluationError: one is damaged, or belongs to other answers.
    """
    found = {name: one.read(result) for name, one in {**FILES, NBEST: nbest.FILE}.items()}
    return {name: values for name, values in found.items() if values is not None}


def variant(config: EvalConfig, folder: str, name: str, **changes: Any) -> EvalConfig:
    """The config of a control: the evaluation's own with ``changes``, without its other controls.
    It shares the evaluation's feature store."""
    out = Path(config.output_dir)
    path = store_place(config.store, config.output_dir)
    kept: dict[str, Any] = {
        "output_dir": (out / folder / name.replace(" ", "_")).as_posix(),
        "name": name,
        "role": "baseline",
        "scores": [],
        "store": config.store.model_copy(update={"path": path}),
        "reliance": RelianceConfig(),
        "controls": ControlsConfig(wording=config.controls.wording, simulations=0),
    }
    return config.model_copy(update={**kept, **changes})


def _baselines(
    config: EvalConfig, questions: Sequence[Question], result: EvalResult, ask: Ask
) -> None:
    found: dict[str, EvalResult] = {}
    for name, streams in streams_to_try(questions).items():
        data = config.data.model_copy(update={"modalities": streams})
        found[name] = ask(variant(config, BASELINES, name, data=data))
    values = summarise_baselines(result, found, config.majority_from)
    _write(result, BASELINES, values)
    if not found:
        console.print("No question shows a clip, so no stream can be left out.")
    for task, block in values["tasks"].items():
        console.print(control_table(task, block, values["tests"]))


def _paraphrases(config: EvalConfig, result: EvalResult, ask: Ask) -> None:
    found: dict[str, EvalResult] = {}
    for wording in range(WORDINGS):
        if wording != config.controls.wording:
            name = f"wording {wording}"
            controls = ControlsConfig(wording=wording, simulations=0)
            found[name] = ask(variant(config, PARAPHRASES, name, controls=controls))
    values = summarise_wordings(result, found)
    _write(result, PARAPHRASES, values)
    for task, block in values["tasks"].items():
        console.print(paraphrase_table(task, block, values["tests"]))


def _robustness(
    config: EvalConfig,
    benchmark: Benchmark,
    questions: Sequence[Question],
    result: EvalResult,
    ask: Ask,
) -> None:
    found: dict[str, EvalResult] = {}
    for edit in edits_to_try(questions, config.controls.edits):
        decode = config.decode.model_copy(update={"edit": edit})
        found[edit] = ask(variant(config, ROBUSTNESS, edit, decode=decode))
    values = summarise_robustness(result, found, benchmark)
    _write(result, ROBUSTNESS, values)
    for task, block in values["tasks"].items():
        console.print(robustness_table(task, block, values["tests"]))


def _write(result: EvalResult, name: str, values: dict[str, Any]) -> None:
    answers = answers_key(result.rows())
    found = {"schema": FILES[name].schema, "answers": answers, **values}
    FILES[name].write(result.folder, found, csv_rows(values["tasks"]))
