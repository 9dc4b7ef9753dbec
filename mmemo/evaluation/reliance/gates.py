"""Expert routing: what a model's experts choose, recorded during ``mmemo eval``.

Wherever a model has experts with a gate, the prompts of the headline task are computed once more,
without an answer, which takes a small part of the time that answering takes. The choices of each
question go to ``gates.jsonl``, which a killed run resumes; their means go to ``gates.json``, and to
``gates.csv`` as a long table.

Shapes: n questions, A decoder layers, J linear layers with experts (of one decoder layer in
``gates.jsonl``, of all of them in the means), M media, K experts per linear layer and medium.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmemo.config import dump
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.cache import CachedEvaluator
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.sidecar import Sidecar, answers_key
from mmemo.evaluation.reliance.summary import ALL, by_name, differences_of, means_of, rows_by_subset
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.scoring import Block
from mmemo.models.adapters.experts import choosing
from mmemo.models.adapters.routing import Gates
from mmemo.statistics import BootstrapConfig

NOTES = "gates.jsonl"
"""One line per question, as :func:`gate_rows` describes."""

SCHEMA = 1

_FILES = Sidecar(
    file="gates.json",
    table="gates.csv",
    schema=SCHEMA,
    columns=(
        *("measure", "of", "expert", "subset", "emotion", "layer"),
        *("value", "low", "high", "n"),
    ),
    remedy="run the evaluation again; it only repeats the recording of the gates",
)


def record_gates(
    config: EvalConfig,
    evaluator: CachedEvaluator,
    questions: Sequence[Question],
    result: EvalResult,
) -> None:
    """Write ``gates.jsonl``, ``gates.json`` and ``gates.csv``; or remove them, where the model has
    no experts with a gate or no question shows a clip.

    Args:
        questions: the questions that ``result`` has answers to, in their order.
    """
    task, generator = next(iter(result.tasks)), evaluator.generator
    media = choosing(generator.model)
    asked = [one for one in questions if one.task == task]
    if not media or not any(one.sample.media for one in asked):
        drop_gates(result.folder)
        (result.folder / NOTES).unlink(missing_ok=True)
        return
    rows = evaluator.each(
        "gates",
        Path(result.folder / NOTES),
        asked,
        lambda batch, _: gate_rows(generator.gates(batch)),
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
    """The choices of each prompt.

    ``layers`` (A) has the numbers of the decoder layers, or a single None for a choice made before
    them. Depending on the adapter, there are ``weights`` (A, 1 + M) of text and each medium,
    averaged over a layer's linear layers, and ``use`` (A, J, M, K) of the experts, for each linear
    layer separately, since expert 1 of one has nothing in common with expert 1 of another.
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
            # (n, J, M, K)
            parts.setdefault("use", []).append(np.stack(use, 1).round(4).tolist())
    number = len(next(iter(parts.values()))[0])
    layers = [layer for layer, _ in ordered]
    return [
        {"layers": layers, **{name: [layer[at] for layer in part] for name, part in parts.items()}}
        for at in range(number)
    ]


def _layer(place: str) -> int | None:
    """Number of the decoder layer of a linear layer: the first number in its name."""
    return next((int(piece) for piece in place.split(".") if piece.isdigit()), None)


def _plain(values: Tensor) -> Any:
    return values.double().cpu().numpy()


def gate_numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """Means of :func:`gate_rows` over questions.

    ``weights`` or ``use`` is None where the adapter has no such choice; ``layers`` is None where
    the only choice is made before the decoder layers. ``sizes`` has the number of questions of each
    conflict subset and emotion.
    """
    media: list[str] = rows[0]["modalities"]
    layers = [layer for layer in rows[0]["layers"] if layer is not None]
    places, emotions = rows_by_subset(rows), _emotions(rows)
    return {
        "n": len(rows),
        "modalities": media,
        "layers": layers or None,
        "sizes": {
            "subsets": {name: len(some) for name, some in places.items()},
            "emotions": {name: len(some) for name, some in emotions.items()},
        },
        "weights": _weights(rows, ["text", *media], config) if "weights" in rows[0] else None,
        "use": _use(rows, media) if "use" in rows[0] else None,
    }


def _weights(rows: Sequence[Row], names: list[str], config: BootstrapConfig) -> Block:
    """Mean weights: over layers on each conflict subset (``subsets``, with intervals) and for each
    emotion (``emotions``), audio-aligned minus video-aligned clips (``shift``), and (A) on each
    subset (``by_layer``). A medium that a prompt lacks has weight 0; one whose weight is 0 in every
    prompt is left out."""
    weights = np.array([row["weights"] for row in rows])  # (n, A, 1 + M)
    there = [at for at in range(len(names)) if weights[..., at].any()]
    names, weights = [names[at] for at in there], weights[..., there]
    whole, places = weights.mean(1), rows_by_subset(rows)
    both = {"video_aligned", "audio_aligned"} <= set(places)
    return {
        "subsets": means_of(rows, names, whole, config, (0, 1)),
        "shift": differences_of(rows, names, whole, config) if both else {},
        "emotions": {
            name: by_name(names, whole[some].mean(0)) for name, some in _emotions(rows).items()
        },
        "by_layer": {name: by_name(names, weights[some].mean(0)) for name, some in places.items()},
    }


def _use(rows: Sequence[Row], media: Sequence[str]) -> Block:
    """Mean use of the experts of each medium, over the questions whose clip has it.

    ``subsets`` and ``emotions`` (K) and ``by_layer`` (A, K) are shares. Each linear layer's experts
    are ordered from the most used one, since a mean over layers has no meaning otherwise. ``alike``
    is how often two clips of the ``same`` emotion, and two of ``other`` emotions, use the same
    expert.
    """
    sizes = [len(layer) for layer in rows[0]["use"]]
    each = np.concatenate(
        [np.array([row["use"][at] for row in rows]) for at in range(len(sizes))], axis=1
    )  # (n, J, M, K)
    block: Block = {name: {} for name in ("subsets", "emotions", "by_layer", "alike")}
    emotions, first = _emotions(rows), _first_of_clips(rows)
    groups = {"subsets": rows_by_subset(rows), "emotions": emotions}
    for at, medium in enumerate(media):
        use = each[:, :, at]  # (n, J, K)
        # A clip without the medium uses none of its experts.
        here = use.sum((1, 2)) > 0
        if not here.any():
            continue
        order = np.argsort(-use[here].mean(0), axis=-1, kind="stable")
        use = np.take_along_axis(use, order[None], -1)
        for name, places in groups.items():
            found = {place: [i for i in some if here[i]] for place, some in places.items()}
            block[name][medium] = {
                place: _rounded(use[some].mean((0, 1))) for place, some in found.items() if some
            }
        ends = np.cumsum(sizes)[:-1]
        block["by_layer"][medium] = [
            _rounded(layer.mean((0, 1))) for layer in np.split(use[here], ends, axis=1)
        ]
        single = [[i for i in some if here[i] and i in first] for some in emotions.values()]
        block["alike"][medium] = _alike([use[some] for some in single if some])
    return block


def _alike(emotions: Sequence[NDArray[np.float64]]) -> dict[str, float | None]:
    """Probability that two clips use the same expert, averaged over linear layers; from the use of
    each emotion's clips, (n, J, K) each."""
    counts = np.array([len(use) for use in emotions], dtype=np.float64)
    sums = np.array([use.sum(0) for use in emotions])  # (E, J, K)
    if not len(emotions):
        return {"same": None, "other": None}
    # (Σu)² - Σu² sums the products of all ordered pairs of different clips without forming them.
    of_one = (sums**2).sum() - sum((use**2).sum() for use in emotions)
    of_all = (sums.sum(0) ** 2).sum() - (sums**2).sum()
    pairs = (counts * (counts - 1)).sum(), counts.sum() ** 2 - (counts**2).sum()
    linear = sums.shape[1]
    shares = [
        None if number == 0 else round(float(found / number / linear), 6)
        for found, number in zip((of_one, of_all), pairs, strict=True)
    ]
    return dict(zip(("same", "other"), shares, strict=True))


def write_gates(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``gates.json`` and ``gates.csv``, each in one step."""
    found = {"schema": SCHEMA, **values}
    _FILES.write(folder, found, [*_of_weights(found), *_of_use(found)])


def drop_gates(folder: Path) -> None:
    """Remove the files of an earlier model."""
    _FILES.drop(folder)


def read_gates(result: EvalResult) -> Mapping[str, Any] | None:
    """The routing recorded beside an evaluation; None if there is none.

    Raises:
        EvaluationError: the file is damaged, or belongs to other answers.
    """
    return _FILES.read(result)


def _emotions(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Indices of the questions of each emotion that is the truth of at least one."""
    labels = dict.fromkeys(label for row in rows for label in row["labels"])
    found = {
        label: [index for index, row in enumerate(rows) if row["truth"] == label]
        for label in labels
    }
    return {label: some for label, some in found.items() if some}


def _first_of_clips(rows: Sequence[Row]) -> set[int]:
    """Index of the first question about each clip: questions about one clip would be alike for
    that reason alone."""
    clips: dict[tuple[Any, ...], int] = {}
    for index, row in enumerate(rows):
        clips.setdefault((*sorted(row["media"].items()), row["start"], row["end"]), index)
    return set(clips.values())


def _rounded(values: Values) -> list[float]:
    return np.round(values, 6).tolist()


def _of_weights(values: Mapping[str, Any]) -> Iterator[Row]:
    block, sizes = values["weights"] or {}, values["sizes"]
    for subset, found in block.get("subsets", {}).items():
        for of, number in found.items():
            yield {"measure": "weight", "of": of, "subset": subset, **number}
    for of, number in block.get("shift", {}).items():
        subset = "audio_aligned minus video_aligned"
        yield {"measure": "weight", "of": of, "subset": subset, **number}
    for emotion, found in block.get("emotions", {}).items():
        n = sizes["emotions"][emotion]
        for of, value in found.items():
            row = {"subset": ALL, "emotion": emotion, "value": value, "n": n}
            yield {"measure": "weight", "of": of, **row}
    for subset, found in block.get("by_layer", {}).items() if values["layers"] else ():
        for of, by_layer in found.items():
            for layer, value in zip(values["layers"], by_layer, strict=True):
                row = {"layer": layer, "value": value, "n": sizes["subsets"][subset]}
                yield {"measure": "weight", "of": of, "subset": subset, **row}


def _of_use(values: Mapping[str, Any]) -> Iterator[Row]:
    block = values["use"] or {}
    for name, column in (("subsets", "subset"), ("emotions", "emotion")):
        for of, places in block.get(name, {}).items():
            for place, shares in places.items():
                row = {"measure": "use", "of": of, "subset": ALL, column: place}
                for expert, value in enumerate(shares, start=1):
                    yield {**row, "expert": expert, "value": value}
    for of, by_layer in block.get("by_layer", {}).items():
        for layer, shares in zip(values["layers"], by_layer, strict=True):
            for expert, value in enumerate(shares, start=1):
                row = {"expert": expert, "subset": ALL, "layer": layer, "value": value}
                yield {"measure": "use", "of": of, **row}
    for of, found in block.get("alike", {}).items():
        for emotion, value in found.items():
            yield {"measure": "alike", "of": of, "subset": ALL, "emotion": emotion, "value": value}
