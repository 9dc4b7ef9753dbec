"""Per class, per speaker, per gender: how far the worst group is behind, and what chance gives.

After the fairness tests of audEERING's ser-tests (see :mod:`mmemo.media.edits`): groups are
balanced to equal size, each is compared with all groups together, and a difference counts only
beyond the largest one that 1000 simulations of a model without any such preference show. Groups
with fewer than 10 answers are left out and named.

Two models are simulated. ``random`` answers at random, as in ser-tests: each label with the same
probability, or a normal number with the mean and deviation of the truths. It knows nothing, so that
its accuracies vary less than those of a model that is right half of the time. ``exchanged`` is as
good as the evaluated model: the groups' answers to questions with the same right answer are
exchanged at random, which keeps its confusions and unties them from the groups. For classes, whole
answers are exchanged between all questions. A field is ``beyond_chance`` only where the gap between
its best and its worst group exceeds the gaps of both models.

Chance here is that of single answers. That the answers about one person are alike makes groups of
few people differ more; the interval of ``worst_gap`` over speakers (``groups``) allows for that.

Shapes: n answers, g groups of m answers each, S simulations, K labels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmemo.evaluation import metrics
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorers.numbers import concordance
from mmemo.evaluation.scoring import Block, label_order
from mmemo.statistics import rounded

CLASS = "class"
"""The key of the groups of questions with the same right answer."""
MOST = 1000
"""Answers of a group that are drawn at most, as in ser-tests."""

_CELLS = 1_000_000
"""Answers of simulations that are scored at once."""

Places = NDArray[np.intp]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of a task as arrays, and the metrics of some of them.

    ``truth`` and ``answer`` are (n,): places of labels, or numbers. ``metrics`` maps truths and
    answers (..., g, m) to each metric's values of every group and, last, of all together,
    (..., g + 1).
    """

    truth: Floats
    answer: Floats
    metrics: Callable[[Floats, Floats], dict[str, Floats]]
    guess: Callable[[np.random.Generator, tuple[int, ...]], Floats]


def balanced_groups(rows: Sequence[Row], config: EvalConfig) -> dict[str, Block]:
    """For each field of ``group``, and for the classes, the metrics of every group in a balanced
    sample, the ``worst`` group with its ``difference`` from all, the ``gap`` between the best and
    the worst one, and the level that chance gives to both.

    Labels have WAR and UAR, and numbers CCC, for each name apart where an answer has several; other
    kinds of answers have none. Fields with a single group of enough answers are left out.
    """
    own = config.controls
    if own.simulations == 0 or not rows:
        return {}
    fields: dict[str, list[str | None]] = {}
    for key in dict.fromkeys(key for row in rows for key in row.get("group", {})):
        fields[key] = [row.get("group", {}).get(key) for row in rows]
    if label_order(rows):
        fields[CLASS] = [str(row["truth"]) for row in rows]
    found: dict[str, Block] = {}
    for name, answers in _answers(rows).items():
        scored = np.flatnonzero(~np.isnan(answers.truth) & ~np.isnan(answers.answer)).tolist()
        for key, values in fields.items():
            title = f"{key} ({name})" if name else key
            members: dict[str, list[int]] = {}
            for place in scored:
                value = values[place]
                if value is not None:
                    members.setdefault(str(value), []).append(place)
            least = own.group_questions
            kept = {one: members[one] for one in sorted(members) if len(members[one]) >= least}
            left_out = {one: len(members[one]) for one in sorted(members) if one not in kept}
            if len(kept) > 1:
                seed = _seed(config.bootstrap.seed, title)
                block = _compare(answers, kept, key == CLASS, own.simulations, seed)
                found[title] = {**block, "left_out": left_out}
    return found


def _compare(
    answers: Answers,
    groups: Mapping[str, Sequence[int]],
    of_class: bool,
    simulations: int,
    seed: int,
) -> Block:
    """The numbers of one field. ``value`` and ``difference`` of a group are means over the draws of
    the balanced sample, one for each simulation."""
    names = list(groups)
    size = min(MOST, min(map(len, groups.values())))
    rng = np.random.default_rng(seed)
    pools = [np.asarray(members, dtype=np.intp) for members in groups.values()]
    found: dict[str, list[dict[str, Floats]]] = {"real": [], "random": [], "exchanged": []}
    step = max(1, _CELLS // (size * len(pools)))
    for start in range(0, simulations, step):
        drawn: dict[str, list[tuple[Floats, Floats]]] = {kind: [] for kind in found}
        for _ in range(start, min(start + step, simulations)):
            places = np.stack([rng.permutation(pool)[:size] for pool in pools])  # (g, m)
            truth, answer = answers.truth[places], answers.answer[places]
            drawn["real"].append((truth, answer))
            drawn["random"].append((truth, answers.guess(rng, truth.shape)))
            drawn["exchanged"].append(_exchanged(truth, answer, rng, of_class))
        for kind, pairs in drawn.items():
            truths, given = zip(*pairs, strict=True)
            found[kind].append(answers.metrics(np.stack(truths), np.stack(given)))
    block: Block = {"balanced_to": size, "simulations": simulations, "metrics": {}}
    # Within a class, UAR is no other number than WAR.
    for metric in ("war",) if of_class else found["real"][0]:
        # (S, g + 1), all groups last
        draws = {
            kind: np.concatenate([one[metric] for one in parts]) for kind, parts in found.items()
        }
        real = draws.pop("real")
        if np.isnan(real).all(0).any():  # where nothing varies there is no CCC
            continue
        block["metrics"][metric] = _numbers(names, np.nanmean(real, axis=0), draws)
    block["n"] = {name: len(members) for name, members in groups.items()}
    return block


def _numbers(names: Sequence[str], values: Floats, chance: Mapping[str, Floats]) -> Block:
    """The numbers of one metric.

    Args:
        values: (g + 1,) of the groups and of all.
        chance: (S, g + 1) of each simulated model.
    """
    differences = values[:-1] - values[-1]
    worst, best = int(np.argmin(differences)), int(np.argmax(differences))
    levels: dict[str, Block] = {}
    for kind, many in chance.items():
        gaps = many[:, :-1].max(1) - many[:, :-1].min(1)
        apart = np.abs(many[:, :-1] - many[:, -1:])
        levels[kind] = {
            "difference": rounded(float(np.nanmax(apart))) if not np.isnan(apart).all() else None,
            "gap": rounded(float(np.nanmax(gaps))) if not np.isnan(gaps).all() else None,
        }
    known = [one["gap"] for one in levels.values() if one["gap"] is not None]
    gap = float(values[best] - values[worst])
    return {
        "all": rounded(float(values[-1])),
        "groups": {
            name: {"value": rounded(float(value)), "difference": rounded(float(apart))}
            for name, value, apart in zip(names, values[:-1], differences, strict=True)
        },
        "worst": names[worst],
        "best": names[best],
        "difference": rounded(float(differences[worst])),
        "gap": rounded(gap),
        "chance": levels,
        "beyond_chance": bool(known) and gap > max(known),
    }


def _exchanged(
    truth: Floats, answer: Floats, rng: np.random.Generator, of_class: bool
) -> tuple[Floats, Floats]:
    """Truths and answers (g, m) of a model without a preference among the groups."""
    flat_truth, flat_answer = truth.ravel(), answer.ravel()
    if of_class:
        # Whether an answer is right is exchanged between all questions. Any other label is wrong.
        right = rng.permutation(flat_truth == flat_answer)
        return truth, np.where(right, flat_truth, -1.0).reshape(truth.shape)
    if np.unique(flat_truth).size > flat_truth.size // 2:
        # Hardly any two numbers are equal, so truth and answer move together.
        order = rng.permutation(flat_truth.size)
        return flat_truth[order].reshape(truth.shape), flat_answer[order].reshape(truth.shape)
    keys = rng.random(flat_truth.size)
    source, target = np.lexsort((keys, flat_truth)), np.argsort(flat_truth, kind="stable")
    moved = np.empty_like(flat_answer)
    moved[target] = flat_answer[source]
    return truth, moved.reshape(truth.shape)


def _answers(rows: Sequence[Row]) -> dict[str, Answers]:
    """The answers of labels or of numbers, by the name of the number where there are several; none
    for other kinds."""
    labels = label_order(rows)
    if labels:
        return {"": _of_labels(rows, labels)}
    truths = [row["truth"] for row in rows]
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in truths):
        return {"": _of_numbers([(row["truth"], row["answer"]) for row in rows])}
    if not all(isinstance(one, dict) for one in truths):
        return {}
    found: dict[str, Answers] = {}
    for name in dict.fromkeys(name for one in truths for name in one):
        answers = [row["answer"] if isinstance(row["answer"], dict) else {} for row in rows]
        pairs = zip(truths, answers, strict=True)
        found[str(name)] = _of_numbers([(one.get(name), two.get(name)) for one, two in pairs])
    return found


def _of_labels(rows: Sequence[Row], labels: Sequence[str]) -> Answers:
    place = {label: index for index, label in enumerate(labels)}
    truth = np.array([place[row["truth"]] for row in rows], dtype=np.float64)
    # An answer that cannot be read is wrong, and no label.
    read = [place[row["answer"]] if row["status"] == "ok" else -1 for row in rows]

    def of(truth: Floats, answer: Floats) -> dict[str, Floats]:
        shape = (*truth.shape[:-1], len(labels))  # (..., g, K)
        rows = np.arange(math.prod(truth.shape[:-1])) * len(labels)
        cells = (rows[:, None] + truth.reshape(len(rows), -1).astype(np.intp)).ravel()
        size = math.prod(shape)
        correct = np.bincount(cells, (truth == answer).ravel(), size)
        right = correct.astype(np.float64).reshape(shape)
        asked = np.bincount(cells, minlength=size).astype(np.float64).reshape(shape)
        right = np.concatenate([right, right.sum(-2, keepdims=True)], -2)  # (..., g + 1, K)
        asked = np.concatenate([asked, asked.sum(-2, keepdims=True)], -2)
        recalls = metrics.ratio(right, asked, 0.0).sum(-1)
        return {
            "war": right.sum(-1) / asked.sum(-1),
            "uar": recalls / (asked > 0).sum(-1),
        }

    def guess(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        return rng.integers(0, len(labels), size=shape).astype(np.float64)

    return Answers(truth, np.array(read, dtype=np.float64), of, guess)


def _of_numbers(pairs: Sequence[tuple[Any, Any]]) -> Answers:
    def number(value: Any) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if good else float("nan")

    truth = np.array([number(one) for one, _ in pairs])
    answer = np.array([number(other) for _, other in pairs])
    known = truth[~np.isnan(truth)]
    mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 1.0)

    def of(truth: Floats, answer: Floats) -> dict[str, Floats]:
        products = (np.ones_like(truth), truth, answer, truth**2, answer**2, truth * answer)
        sums = np.stack([one.sum(-1) for one in products], -1)
        sums = np.concatenate([sums, sums.sum(-2, keepdims=True)], -2)
        return {"ccc": concordance(np.pad(sums, [*[(0, 0)] * (sums.ndim - 1), (0, 2)]))}

    def guess(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        return rng.normal(mean, deviation, size=shape)

    return Answers(truth, answer, of, guess)


def _seed(seed: int, key: str) -> int:
    """A seed of its own for each field, so that one more field changes no other."""
    digest = hashlib.sha256(f"groups/{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
