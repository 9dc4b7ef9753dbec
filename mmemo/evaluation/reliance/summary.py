"""The numbers of ``reliance.json``, and the same numbers as a long table in ``reliance.csv``.

Shapes: n questions, G subsets (the conflict subsets, "none" and "all"), A layers, Q heads, M kinds
of token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo.evaluation.answer_source import SIDES
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.metrics import Values
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.sidecar import Sidecar
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.scoring import SUBSETS, Block
from mmemo.models.attention.record import KINDS
from mmemo.statistics import BootstrapConfig, ClusterSums, Statistic, rounded

SCHEMA = 1
ALL = "all"
_SUBSETS = (*SUBSETS, ALL)

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
    """The effect of a perturbation on the answers, over all questions and on each conflict subset.

    ``accuracy`` is that on the perturbed clips, ``plain`` that on the same clips unchanged, and
    ``difference`` lies between the two, with its p. For swaps, ``followed`` is how often the answer
    names what the swapped-in streams show, which is never right, and ``followed_plain`` how often
    it did so without the swap.

    Args:
        plain: the answers about the unchanged clips to the questions of ``rows``, in their order.
    """
    pairs = list(zip(rows, plain, strict=True))
    # (n, 5): right and followed, each with and without the perturbation, and a count of 1.
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
        part = drawn.part(_SUBSETS.index(place))
        difference = part.interval(_minus(0, 1), n, limits=(-1, 1)).row()
        p = part.p_two_sided(_minus(0, 1), _exchange)
        block[place] = {
            "accuracy": part.interval(_share(0), n, share=True).row(),
            "plain": part.interval(_share(1), n, share=True).row(),
            "difference": {**difference, "p": rounded(p)},
        }
        if swapped:
            block[place]["followed"] = part.interval(_share(2), n, share=True).row()
            block[place]["followed_plain"] = part.interval(_share(3), n, share=True).row()
    return block


def attention_numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """Shares of the attention of the answers' tokens, by kind of token.

    ``subsets`` has the mean share of each kind over questions, layers and heads, with its interval;
    ``tokens`` its mean share of the prompt's tokens; ``by_layer`` (A) and ``by_head`` (A, Q) its
    share in each of ``layers``; and ``by_subset`` has ``by_layer`` on each conflict subset. Where
    the config changes attention, ``unchanged`` is ``subsets`` without that change.
    """
    counted = np.array([row["prompt_tokens"] for row in rows], dtype=np.float64)
    there = [place for place in range(len(KINDS)) if counted[:, place].any()]
    names = [KINDS[place] for place in there]
    mass = np.array([row["mass"] for row in rows])[..., there]  # (n, A, Q, M)
    # Shares are averaged, not counts, so that long prompts do not weigh more.
    shares = (counted / counted.sum(1, keepdims=True)).mean(0)[there]
    block: Block = {
        "n": len(rows),
        "subsets": means_of(rows, names, mass.mean((1, 2)), config, (0, 1)),
        "tokens": by_name(names, shares),
        "layers": list(rows[0]["layers"]),
        "by_layer": by_name(names, mass.mean((0, 2))),
        "by_head": by_name(names, mass.mean(0)),
        "by_subset": {
            place: by_name(names, mass[some].mean((0, 2)))
            for place, some in rows_by_subset(rows).items()
        },
    }
    if all("unchanged" in row for row in rows):
        before = np.array([row["unchanged"] for row in rows])[..., there].mean((1, 2))
        block["unchanged"] = means_of(rows, names, before, config, (0, 1))
    return block


def shapley_numbers(rows: Sequence[Row], config: BootstrapConfig) -> Block:
    """Means over the questions, in nats, with intervals: the value of each player (``subsets``) and
    the worth of each set of players (``worth``). Questions without a stream are left out of the
    means that involve it."""
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
    """Write ``reliance.json`` and ``reliance.csv``, each in one step.

    Args:
        tasks: the tasks of the evaluation's results, whose subsets and signed reliance also go into
            the table.
    """
    found = {"schema": SCHEMA, **values}
    _FILES.write(folder, found, [*_of_answers(tasks[values["task"]]), *_of_measures(found)])


def drop_other_reliance(folder: Path, rows: Sequence[Row]) -> None:
    """Remove the measurements of other answers than ``rows``."""
    _FILES.drop_other(folder, rows)


def read_reliance(result: EvalResult) -> Mapping[str, Any] | None:
    """The reliance measurements of an evaluation; None if there are none.

    Raises:
        EvaluationError: they are damaged, or belong to other answers.
    """
    return _FILES.read(result)


def _by_subset(
    rows: Sequence[Row], values: Values, config: BootstrapConfig
) -> tuple[ClusterSums, dict[str, int]]:
    """Sums (G, ...) of values (n, ...), and the number of questions of each subset that has any."""
    spread = np.zeros((len(rows), len(_SUBSETS), *values.shape[1:]))
    places = rows_by_subset(rows)
    for place, some in places.items():
        spread[some, _SUBSETS.index(place)] = values[some]
    return clusters_of(rows, config).sums(spread), {
        place: len(some) for place, some in places.items()
    }


def rows_by_subset(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Indices of the questions of "all" and of each conflict subset that has any. "none" is left
    out where it would be the only subset."""
    names = [row.get("conflict") or "none" for row in rows]
    found = {
        name: [index for index, one in enumerate(names) if one == name]
        for name in SUBSETS
        if name in names
    }
    return {ALL: list(range(len(rows))), **({} if set(found) == {"none"} else found)}


def means_of(
    rows: Sequence[Row],
    names: Sequence[str],
    values: NDArray[np.float64],
    config: BootstrapConfig,
    limits: tuple[float, float] | None = None,
) -> Block:
    """Subset -> name -> mean of values (n, names) with its interval; NaN is left out. ``limits`` is
    the range of the values."""
    # NaN would spread through the sums; a value of 0 with a count of 0 adds nothing.
    known = ~np.isnan(values)
    drawn, sizes = _by_subset(rows, np.stack([np.where(known, values, 0.0), known], -1), config)
    block: Block = {}
    for place in sizes:
        part = drawn.part(_SUBSETS.index(place))
        block[place] = {
            name: part.part(at).interval(_mean, int(part.total[at, 1]), limits=limits).row()
            for at, name in enumerate(names)
            if part.total[at, 1] > 0
        }
    return block


def differences_of(
    rows: Sequence[Row], names: Sequence[str], values: NDArray[np.float64], config: BootstrapConfig
) -> Block:
    """Name -> mean of values (n, names) on audio-aligned clips minus the mean on video-aligned
    clips, with its interval."""
    drawn, sizes = _by_subset(rows, np.stack([values, np.ones_like(values)], -1), config)
    places = ["audio_aligned", "video_aligned"]
    part = drawn.part([_SUBSETS.index(place) for place in places])

    def difference(values: Values) -> Values:
        means = _mean(values)  # (..., 2)
        return means[..., 0] - means[..., 1]

    n = sum(sizes[place] for place in places)
    return {
        name: part.part((slice(None), at)).interval(difference, n).row()
        for at, name in enumerate(names)
    }


def by_name(names: Sequence[str], values: NDArray[np.float64]) -> dict[str, Any]:
    """Values (..., names) as lists by name, rounded."""
    return {name: np.round(values[..., at], 6).tolist() for at, name in enumerate(names)}


def _mean(values: Values) -> Values:
    return _over(values[..., 0], values[..., 1])


def _share(at: int) -> Statistic:
    return lambda values: _over(values[..., at], values[..., -1])


def _minus(one: int, other: int) -> Statistic:
    return lambda values: _over(values[..., one] - values[..., other], values[..., -1])


def _exchange(values: Values) -> Values:
    """The answers with the perturbation exchanged for those without it."""
    return values[..., [1, 0, 3, 2, 4]]


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
