"""The numbers of ``reliance.json``, and the same as a long table in ``reliance.csv``.

n questions, G places: the conflict subsets, "none" and "all"; A layers, Q heads, M kinds of token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo.evaluation.answer_source import SIDES
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.sidecar import Sidecar
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.scoring import SUBSETS, Block, cluster_of
from mmemo.models.attention.record import KINDS
from mmemo.statistics import Bootstrap, BootstrapConfig, Resampled, Statistic

SCHEMA = 1
ALL = "all"
_PLACES = (*SUBSETS, ALL)

_FILES = Sidecar(
    file="reliance.json",
    table="reliance.csv",
    schema=SCHEMA,
    columns=(
        *("measure", "change", "of", "subset", "layer", "head"),
        *("value", "low", "high", "n", "p"),
    ),
    remedy="run the evaluation again with --reliance",
)


def changed_numbers(rows: Sequence[Row], plain: Sequence[Row], config: BootstrapConfig) -> Block:
    """What a change does to the answers, over all and on each conflict subset.

    ``accuracy`` under the change and ``plain`` on the same clips as they are, ``difference`` of the
    two with its p. Of swaps also ``followed``: how often the answer is what the swapped-in streams
    show, which is never right, and ``followed_plain``: how often it was without the swap.

    Args:
        plain: the usual answers to the questions of ``rows``, in their order.
    """
    pairs = list(zip(rows, plain, strict=True))
    counts = np.array(
        [
            [
                *(float(one["answer"] == one["truth"]) for one in pair),
                *(float(one["answer"] in pair[0].get("shown", ())) for one in pair),
                1.0,
            ]
            for pair in pairs
        ]
    )
    drawn, sizes = _by_subset(rows, counts, config)
    swapped = bool(rows) and "shown" in rows[0]
    block: Block = {}
    for place, n in sizes.items():
        part = drawn.part(_PLACES.index(place))
        difference = part.interval(_minus(0, 1), n).row()
        p = part.p_two_sided(_minus(0, 1))
        block[place] = {
            "accuracy": part.interval(_share(0), n).row(),
            "plain": part.interval(_share(1), n).row(),
            "difference": {**difference, "p": None if p is None else round(p, 6)},
        }
        if swapped:
            block[place]["followed"] = part.interval(_share(2), n).row()
            block[place]["followed_plain"] = part.interval(_share(3), n).row()
    return block


def attention_numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """Shares of the attention of answers' tokens, by kind of token.

    ``subsets``: of each kind the mean over questions, layers and heads, with interval; ``tokens``:
    its mean share of the prompt's tokens; ``layers``, and of each kind ``by_layer`` (A) and
    ``by_head`` (A, Q); ``by_subset``: ``by_layer`` on each conflict subset. Where the config moves
    attention, ``unchanged`` is ``subsets`` without it.
    """
    counted = np.array([row["prompt_tokens"] for row in rows], dtype=np.float64)
    there = [place for place in range(len(KINDS)) if counted[:, place].any()]
    names = [KINDS[place] for place in there]
    mass = np.array([row["mass"] for row in rows])[..., there]  # (n, A, Q, M)
    shares = (counted / counted.sum(1, keepdims=True)).mean(0)[there]
    block: Block = {
        "n": len(rows),
        "subsets": means_of(rows, names, mass.mean((1, 2)), config),
        "tokens": listed(names, shares),
        "layers": list(rows[0]["layers"]),
        "by_layer": listed(names, mass.mean((0, 2))),
        "by_head": listed(names, mass.mean(0)),
        "by_subset": {
            place: listed(names, mass[some].mean((0, 2))) for place, some in places_of(rows).items()
        },
    }
    if all("unchanged" in row for row in rows):
        before = np.array([row["unchanged"] for row in rows])[..., there].mean((1, 2))
        block["unchanged"] = means_of(rows, names, before, config)
    return block


def shapley_numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """Means over the questions, in nats, with intervals: ``subsets`` of each player's value, and
    ``worth`` of each subset of players. A question without a stream counts in no mean of it."""
    players = list(dict.fromkeys(player for row in rows for player in row["players"]))
    parts = list(dict.fromkeys(name for row in rows for name in row["worth"]))
    values = np.array([[row["shapley"].get(name, np.nan) for name in players] for row in rows])
    worth = np.array([[row["worth"].get(name, np.nan) for name in parts] for row in rows])
    return {
        "n": len(rows),
        "subsets": means_of(rows, players, values, config),
        "worth": means_of(rows, parts, worth, config)[ALL],
    }


def write_reliance(folder: Path, values: Mapping[str, Any], tasks: Mapping[str, Block]) -> None:
    """Write ``reliance.json`` and ``reliance.csv``, each whole or not at all.

    Args:
        tasks: of the evaluation's results, whose subsets and signed reliance go into the table.
    """
    found = {"schema": SCHEMA, **values}
    _FILES.write(folder, found, [*_of_answers(tasks[values["task"]]), *_of_measures(found)])


def drop_other_reliance(folder: Path, rows: Sequence[Row]) -> None:
    """Remove what was measured beside other answers than ``rows``."""
    _FILES.drop_other(folder, rows)


def read_reliance(result: EvalResult) -> Mapping[str, Any] | None:
    """What was measured beside an evaluation; None where nothing was.

    Raises:
        EvaluationError: it is damaged, or of other answers.
    """
    return _FILES.read(result)


def _by_subset(
    rows: Sequence[Row], values: Values, config: BootstrapConfig
) -> tuple[Resampled, dict[str, int]]:
    """Sums of (n, ...) values, (G, ...), and the questions of each place that has some."""
    spread = np.zeros((len(rows), len(_PLACES), *values.shape[1:]))
    places = places_of(rows)
    for place, some in places.items():
        spread[some, _PLACES.index(place)] = values[some]
    bootstrap = Bootstrap([cluster_of(row, config) for row in rows], config)
    return bootstrap.resample(spread), {place: len(some) for place, some in places.items()}


def places_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The questions of "all" and of each conflict subset that has some, by index; "none" is none
    unless there are others."""
    names = [row.get("conflict") or "none" for row in rows]
    found = {
        name: [index for index, one in enumerate(names) if one == name]
        for name in SUBSETS
        if name in names
    }
    return {ALL: list(range(len(rows))), **({} if set(found) == {"none"} else found)}


def means_of(
    rows: Sequence[Row], names: Sequence[str], values: NDArray[np.float64], config: BootstrapConfig
) -> Block:
    """Place -> name -> mean of (n, names) values with its interval; NaN counts in none."""
    known = ~np.isnan(values)
    drawn, sizes = _by_subset(rows, np.stack([np.where(known, values, 0.0), known], -1), config)
    block: Block = {}
    for place in sizes:
        part = drawn.part(_PLACES.index(place))
        block[place] = {
            name: part.part(at).interval(_mean, int(part.total[at, 1])).row()
            for at, name in enumerate(names)
            if part.total[at, 1] > 0
        }
    return block


def differences_of(
    rows: Sequence[Row], names: Sequence[str], values: NDArray[np.float64], config: BootstrapConfig
) -> Block:
    """Name -> mean of (n, names) values on audio-aligned clips minus that on video-aligned ones,
    with its interval."""
    drawn, sizes = _by_subset(rows, np.stack([values, np.ones_like(values)], -1), config)
    places = ["audio_aligned", "video_aligned"]
    part = drawn.part([_PLACES.index(place) for place in places])

    def difference(values: Values) -> Values:
        means = _mean(values)  # (..., 2)
        return means[..., 0] - means[..., 1]

    n = sum(sizes[place] for place in places)
    return {
        name: part.part((slice(None), at)).interval(difference, n).row()
        for at, name in enumerate(names)
    }


def listed(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, Any]:
    """Values (..., names) by name, rounded."""
    return {name: np.round(values[..., at], 6).tolist() for at, name in enumerate(names)}


def _mean(values: Values) -> Values:
    return _over(values[..., 0], values[..., 1])


def _share(at: int) -> Statistic:
    return lambda values: _over(values[..., at], values[..., -1])


def _minus(one: int, other: int) -> Statistic:
    return lambda values: _over(values[..., one] - values[..., other], values[..., -1])


def _over(values: Values, counts: Values) -> Values:
    return np.divide(values, counts, out=np.full(values.shape, np.nan), where=counts > 0)


def _of_answers(block: Block) -> Iterator[Row]:
    yield {"measure": "accuracy", "subset": ALL, **block["metrics"]["war"]}
    for name, found in block["subsets"].items():
        yield {"measure": "accuracy", "subset": name, **found["war"]}
    for name, found in block.get("reliance", {}).items():
        if name != "left_out":
            measure = "wrong answers" if name == "errors" else "answers"
            subset = ALL if name == "errors" else name
            for side in (*SIDES, "signed"):
                yield {"measure": measure, "of": side, "subset": subset, **found[side]}


def _of_measures(values: Mapping[str, Any]) -> Iterator[Row]:
    for change in values["changes"].values():
        row = {"change": change["kind"], "of": "+".join(change["streams"])}
        for subset, found in change["subsets"].items():
            for measure, number in found.items():
                yield {"measure": measure, **row, "subset": subset, **number}
    for name in ("attention", "shapley"):
        block = values[name] or {}
        for subset, found in block.get("subsets", {}).items():
            for of, number in found.items():
                yield {"measure": name, "of": of, "subset": subset, **number}
    attention = values["attention"] or {}
    for subset, found in attention.get("by_subset", {}).items():
        for of, by_layer in found.items():
            for layer, value in zip(attention["layers"], by_layer, strict=True):
                row = {"layer": layer, "value": value}
                yield {"measure": "attention", "of": of, "subset": subset, **row}
    for of, by_head in attention.get("by_head", {}).items():
        for layer, heads in zip(attention["layers"], by_head, strict=True):
            for head, value in enumerate(heads):
                row = {"layer": layer, "head": head, "value": value}
                yield {"measure": "attention", "of": of, "subset": ALL, **row}
