"""``mmemo eval --reliance``: what a model's answers hang on.

The headline task's questions are asked again about clips with streams blanked or swapped; the
attention of the answers' tokens is noted by modality; and Shapley values share out the
log-probability of the right answer. All of it goes on where a killed run stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmemo.config import dump
from mmemo.console import console
from mmemo.data.sample import CONFLICTS
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.cache import CachedEvaluator
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.perturb import Change, changed, changes_of
from mmemo.evaluation.reliance.shapley import Valuer
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
"""Of the answers about changed clips, and of what was measured of single questions."""


def check_reliance(questions: Sequence[Question]) -> None:
    """Raises:
    ConfigError: no question of the headline task shows a clip.
    """
    if not any(one.sample.media for one in questions if one.task == questions[0].task):
        raise ConfigError(
            "reliance: no question shows a clip, so that there is nothing to rely on; widen "
            "data.modalities, or leave --reliance out"
        )


def measure_reliance(
    config: EvalConfig, asker: CachedEvaluator, questions: Sequence[Question], result: EvalResult
) -> dict[str, Any]:
    """Measure, and write ``reliance.json``, ``reliance.csv`` and the folder ``reliance``.

    Args:
        questions: those that ``result`` has answers to, in their order.

    Returns:
        What ``reliance.json`` holds.
    """
    task = next(iter(result.tasks))
    rows = result.rows()
    asked = [one for one in questions if one.task == task and one.labels is not None]
    plain = {row["sample_id"]: row for row in rows if row["task"] == task}
    part = _Part(config, asker)
    wanted = changes_of(config.reliance.change, asked)
    changes = {one.name: part.changed(one, asked, plain) for one in wanted}
    attention, missing = part.attention(asked)
    values: dict[str, Any] = {
        "task": task,
        "answers": answers_key(rows),
        "changes": changes,
        "attention": attention,
        "attention_missing": missing,
        "shapley": part.shapley(asked),
        "made": {**dump(config.reliance), "bootstrap": dump(config.bootstrap)},
    }
    write_reliance(result.folder, values, result.tasks)
    return values


def drawn(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """Up to ``count`` questions in their order, equally many of each conflict subset as far as it
    goes. A hash of names chooses: a larger draw holds a smaller one."""
    if count is None or count >= len(questions):
        return list(questions)

    def mark(question: Question) -> bytes:
        return hashlib.sha256(f"{seed}/{question.sample.sample_id}".encode()).digest()

    kinds: dict[str | None, list[Question]] = {name: [] for name in (*CONFLICTS, None)}
    for question in sorted(questions, key=mark):
        kinds[question.sample.truth.conflict].append(question)
    ranked = sorted(
        (rank, place, question.sample.sample_id)
        for place, kind in enumerate(kinds.values())
        for rank, question in enumerate(kind)
    )
    chosen = {name for _, _, name in ranked[:count]}
    return [question for question in questions if question.sample.sample_id in chosen]


class _Part:
    """The three measurements."""

    def __init__(self, config: EvalConfig, asker: CachedEvaluator) -> None:
        self._config, self._own, self._asker = config, config.reliance, asker
        self._folder = Path(config.output_dir) / FOLDER

    def changed(self, one: Change, questions: Sequence[Question], plain: dict[str, Row]) -> Block:
        """Questions asked again about changed clips."""
        asked = drawn(questions, self._own.questions, self._own.seed)
        made = changed(one, asked, questions, self._own.seed)
        rows = self._asker.ask(
            f"{spoken(one.streams)} {one.kind}",
            self._folder / f"{one.name}.jsonl",
            made.questions,
            answerer=self._asker.answerer.blanked(one.streams) if one.kind == "blanked" else None,
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
        """Where answers look; None and the reason where that cannot be seen."""
        asked = drawn(questions, self._own.attention_questions, self._own.seed)
        if not asked:
            return None, None
        moved = self._config.generation.change is not None

        def look(batch: Sequence[Question], draw: str) -> list[Row]:
            rows: list[Row] = []
            for found in self._asker.answerer.attention(batch, draw):
                mass = {"mass": found.after, **({"unchanged": found.before} if moved else {})}
                listed = {key: x.double().numpy().round(6).tolist() for key, x in mass.items()}
                prompt = list(found.prompt)
                rows.append({"layers": list(found.layers), "prompt_tokens": prompt, **listed})
            return rows

        noted = [{"measure": "attention"}] * len(asked)
        path = self._folder / "attention.jsonl"
        try:
            rows = self._asker.each("attention", path, asked, look, noted=noted, kind=FOLDER)
        except ConfigError as error:  # of a model whose attention is its own
            console.print(f"[yellow]attention is left out:[/yellow] {error}")
            return None, str(error)
        return attention_numbers(rows, self._config.bootstrap), None

    def shapley(self, questions: Sequence[Question]) -> Block | None:
        """What each modality adds to the right answer."""
        own = self._own
        asked = drawn(questions, own.shapley_questions, own.seed)
        if not asked:
            return None
        valuer = Valuer(
            self._asker.answerer,
            instruction=own.instruction,
            answer=own.answer,
            batch_size=self._config.per_device_eval_batch_size,
        )
        note = {"measure": "shapley", "instruction": own.instruction, "answer": own.answer}
        rows = self._asker.each(
            "Shapley values",
            self._folder / "shapley.jsonl",
            asked,
            lambda batch, draw: [valuer.value(question, draw) for question in batch],
            noted=[note] * len(asked),
            kind=FOLDER,
            batch_size=1,
        )
        return shapley_numbers(rows, self._config.bootstrap)
