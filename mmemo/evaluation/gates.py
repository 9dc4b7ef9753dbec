"""What a model's experts choose, noted during ``mmemo eval`` wherever it has some that choose.

The prompts of the headline task are computed once more, without an answer: a small part of what
answering costs. It goes on where a killed run stopped.

Shapes: N prompts, A decoder layers, J linear layers with experts in one of them, M media, K experts
of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmemo.config import dump
from mmemo.evaluation.asking import Asker
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.beside import answers_key
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.gate_numbers import drop_gates, gate_numbers, write_gates
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvalResult
from mmemo.models.experts import choosing
from mmemo.models.routing import Gates

NOTES = "gates.jsonl"
"""A line for each question; :func:`gate_rows` says what it holds."""


def note_gates(
    config: EvalConfig, asker: Asker, questions: Sequence[Question], result: EvalResult
) -> None:
    """Write ``gates.jsonl``, ``gates.json`` and ``gates.csv``; without experts that choose, or
    clips to choose from, remove them.

    Args:
        questions: those that ``result`` has answers to, in their order.
    """
    task, answerer = next(iter(result.tasks)), asker.answerer
    media = choosing(answerer.model)
    asked = [one for one in questions if one.task == task]
    if not media or not any(one.sample.media for one in asked):
        drop_gates(result.folder)
        (result.folder / NOTES).unlink(missing_ok=True)
        return
    rows = asker.each(
        "gates",
        Path(result.folder / NOTES),
        asked,
        lambda batch, _: gate_rows(answerer.gates(batch)),
        noted=[{"measure": "gates", "modalities": list(media)}] * len(asked),
        kind="gates",
    )
    values = {
        "task": task,
        "answers": answers_key(result.rows()),
        **gate_numbers(rows, config.bootstrap),
        "made": {"bootstrap": dump(config.bootstrap)},
    }
    write_gates(result.folder, values)


def gate_rows(gates: Mapping[str, Gates]) -> list[Row]:
    """Of each prompt, what the layers chose.

    ``layers`` (A): decoder layers by number, or one None for what happens before them. Of each,
    where there is such a thing: ``weights`` (A, 1 + M) of text and each medium, means over its
    linear layers; ``use`` (A, J, M, K) of experts, each linear layer apart, since expert 1 of one
    has nothing to do with expert 1 of another.
    """
    found: dict[int | None, list[Gates]] = {}
    for place, one in gates.items():
        found.setdefault(_layer(place), []).append(one)
    ordered = sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0])
    parts: dict[str, list[list[Any]]] = {}
    for _, layer in ordered:
        weights = [_plain(one.weights) for one in layer if one.weights is not None]
        use = [_plain(one.use) for one in layer if one.use is not None]
        if weights:
            parts.setdefault("weights", []).append(np.mean(weights, 0).round(6).tolist())
        if use:
            parts.setdefault("use", []).append(np.stack(use, 1).round(4).tolist())
    number = len(next(iter(parts.values()))[0])
    layers = [layer for layer, _ in ordered]
    return [
        {"layers": layers, **{name: [layer[at] for layer in part] for name, part in parts.items()}}
        for at in range(number)
    ]


def _layer(place: str) -> int | None:
    """The first number in the name of a linear layer is its decoder layer's."""
    return next((int(piece) for piece in place.split(".") if piece.isdigit()), None)


def _plain(values: Tensor) -> Any:
    return values.double().cpu().numpy()
