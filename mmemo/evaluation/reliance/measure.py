"""``mmemo eval --reliance``: measures which modalities a model relies on.

The questions of the headline task are asked again about clips with streams blanked or swapped, the
attention of the answers' tokens is measured by modality, and Shapley values attribute the
log-probability of the right answer to the modalities. All three resume after a kill.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from mmemo.config import dump
from mmemo.console import console
from mmemo.data.sample import CONFLICTS
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.cache import CachedEvaluator
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.perturb import Perturbation, perturb, perturbations_of
from mmemo.evaluation.reliance.shapley import ShapleyEvaluator
from mmemo.evaluation.reliance.sidecar import answers_key
from mmemo.evaluation.reliance.summary import (
    attention_numbers,
    changed_numbers,
    shapley_numbers,
    write_reliance,
)
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.scoring import Block
from mmemo.formats import spoken

FOLDER = "reliance"
"""Folder for the answers about perturbed clips and the measurements of single questions."""


def check_reliance(questions: Sequence[Question]) -> None:
    """Check that reliance can be measured on a benchmark's questions.

    Raises:
        ConfigError: no question of the headline task shows a clip.
    """
    if not any(one.sample.media for one in questions if one.task == questions[0].task):
        raise ConfigError(
            "reliance: no question shows a clip, so there is no modality to measure; add "
            "modalities to data.modalities, or leave --reliance out"
        )


def measure_reliance(
    config: EvalConfig,
    evaluator: CachedEvaluator,
    questions: Sequence[Question],
    result: EvalResult,
) -> dict[str, Any]:
    """Measure reliance, and write ``reliance.json``, ``reliance.csv`` and the folder ``reliance``.

    Args:
        questions: the questions that ``result`` has answers to, in their order.

    Returns:
        The contents of ``reliance.json``.
    """
    task = next(iter(result.tasks))
    rows = result.rows()
    asked = [one for one in questions if one.task == task and one.labels is not None]
    plain = {row["sample_id"]: row for row in rows if row["task"] == task}
    measurements = _Measurements(config, evaluator)
    wanted = perturbations_of(config.reliance.change, asked)
    changes = {one.name: measurements.perturbed(one, asked, plain) for one in wanted}
    attention, missing = measurements.attention(asked)
    values: dict[str, Any] = {
        "task": task,
        "answers": answers_key(rows),
        "changes": changes,
        "attention": attention,
        "attention_missing": missing,
        "shapley": measurements.shapley(asked),
        "made": {**dump(config.reliance), "bootstrap": dump(config.bootstrap)},
    }
    write_reliance(result.folder, values, result.tasks)
    return values


def sample_questions(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """Up to ``count`` questions in their order, sampled evenly across the conflict subsets. A hash
    of the sample id ranks them, so a larger sample contains every smaller one."""
    if count is None or count >= len(questions):
        return list(questions)

    def rank_key(question: Question) -> bytes:
        # Python's own hash of a text differs from process to process.
        return hashlib.sha256(f"{seed}/{question.sample.sample_id}".encode()).digest()

    kinds: dict[str | None, list[Question]] = {name: [] for name in (*CONFLICTS, None)}
    for question in sorted(questions, key=rank_key):
        kinds[question.sample.truth.conflict].append(question)
    # The rank comes first, so that the subsets take turns.
    ranked = sorted(
        (rank, place, question.sample.sample_id)
        for place, kind in enumerate(kinds.values())
        for rank, question in enumerate(kind)
    )
    chosen = {name for _, _, name in ranked[:count]}
    return [question for question in questions if question.sample.sample_id in chosen]


class _Measurements:
    """The three measurements of one evaluation."""

    def __init__(self, config: EvalConfig, evaluator: CachedEvaluator) -> None:
        self._config, self._own, self._evaluator = config, config.reliance, evaluator
        self._folder = Path(config.output_dir) / FOLDER

    def perturbed(
        self, one: Perturbation, questions: Sequence[Question], plain: dict[str, Row]
    ) -> Block:
        """The effect of a perturbation: the questions asked again about perturbed clips."""
        asked = sample_questions(questions, self._own.questions, self._own.seed)
        made = perturb(one, asked, questions, self._own.seed)
        rows = self._evaluator.ask(
            f"{spoken(one.streams)} {one.kind}",
            self._folder / f"{one.name}.jsonl",
            made.questions,
            generator=self._evaluator.generator.blanked(one.streams)
            if one.kind == "blanked"
            else None,
            noted=made.noted,
            kind=FOLDER,
        )
        usual = [plain[row["sample_id"]] for row in rows]
        return {
            "kind": one.kind,
            "streams": list(one.streams),
            "n": len(rows),
            "left_out": made.left_out,
            "subsets": changed_numbers(rows, usual, self._config.bootstrap) if rows else {},
        }

    def attention(self, questions: Sequence[Question]) -> tuple[Block | None, str | None]:
        """Attention by modality while answering; or None, and why it cannot be measured."""
        asked = sample_questions(questions, self._own.attention_questions, self._own.seed)
        if not asked:
            return None, None
        moved = self._config.generation.change is not None

        def look(batch: Sequence[Question], draw: str) -> list[Row]:
            rows: list[Row] = []
            for found in self._evaluator.generator.attention(batch, draw):
                mass = {"mass": found.after, **({"unchanged": found.before} if moved else {})}
                listed = {key: x.double().numpy().round(6).tolist() for key, x in mass.items()}
                prompt = list(found.prompt)
                rows.append({"layers": list(found.layers), "prompt_tokens": prompt, **listed})
            return rows

        # The note enters the keys, so that rows of another measurement are not taken for these.
        noted = [{"measure": "attention"}] * len(asked)
        path = self._folder / "attention.jsonl"
        try:
            rows = self._evaluator.each("attention", path, asked, look, noted=noted, kind=FOLDER)
        except ConfigError as error:  # a model with its own attention implementation
            console.print(Text.assemble(("Attention is not measured:", "yellow"), f" {error}"))
            return None, str(error)
        return attention_numbers(rows, self._config.bootstrap), None

    def shapley(self, questions: Sequence[Question]) -> Block | None:
        """Shapley value of each modality for the log-probability of the right answer."""
        own = self._own
        asked = sample_questions(questions, own.shapley_questions, own.seed)
        if not asked:
            return None
        shapley_evaluator = ShapleyEvaluator(
            self._evaluator.generator,
            instruction=own.instruction,
            answer=own.answer,
            batch_size=self._config.per_device_eval_batch_size,
        )
        note = {"measure": "shapley", "instruction": own.instruction, "answer": own.answer}
        rows = self._evaluator.each(
            "Shapley values",
            self._folder / "shapley.jsonl",
            asked,
            lambda batch, draw: [shapley_evaluator.value(question, draw) for question in batch],
            noted=[note] * len(asked),
            kind=FOLDER,
            # ShapleyEvaluator batches the prompts of one question itself.
            batch_size=1,
        )
        return shapley_numbers(rows, self._config.bootstrap)
