"""Proves on real rows that a reward pays for what it should, and not for what is easy to write.

A reward file defines

- ``gold(row) -> str | None``: a completion that must score ``MAXIMUM``; None for a row to which the
  reward does not apply. ``row`` has the columns of :func:`mmemo.rewards.rewards.columns_of`;

and may define

- ``MAXIMUM`` and ``MINIMUM`` (default 1 and 0): the range of its scores;
- ``FORM_ONLY = True``: the reward judges the form alone, so well-formed nonsense may score;
- ``PARTIAL_CREDIT = True``: the reward compares sets of labels, so an answer that names a right and
  a wrong one may score, if less than the right one alone;
- ``PROOF_TOLERANCE`` (default 0): how far a gold answer may fall short of the maximum, and a
  worthless answer exceed the minimum, for rewards whose scores come from a judge. Wrong answers
  must then score less than the right ones on average, not in every row;
- ``truth(row)``: what the reward takes for the row's truth, for one that pays alike for some
  labels, such as all negative ones. Default: the label, if the function takes ``label``;
- ``attacks(row) -> Mapping[str, str]``: further wrong answers by name, beside those of
  :mod:`mmemo.rewards.attacks`;
- ``wrong_on_purpose(params) -> str | None``: why the reward, with these parameters, is known to pay
  for the wrong thing. This is for studies of bad scorers: such a reward is not proved, and every
  check and run record says why.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from mmemo import content
from mmemo.answers.parsing import base_form
from mmemo.data.sample import Sample
from mmemo.errors import RewardError
from mmemo.rewards import attacks as known
from mmemo.rewards.attacks import Attack, Row, Rule
from mmemo.rewards.rewards import (
    RewardConfig,
    RewardSet,
    columns_of,
    distinct_labels,
    is_class,
    prompt_of,
    wrong_on_purpose,
)

NEAR_MAXIMUM = 0.9
"""Share of the maximum up to which one constant text may score, on average, on rows of other
truths."""

JUDGED_ROWS = 16
"""Most rows on which a reward with a ``PROOF_TOLERANCE`` is proved: a judge is slow or costs
money."""

JUDGED_SECONDS = 300.0
"""Time in seconds for the attacks on a reward with a ``PROOF_TOLERANCE``. Those that are left
untried by then are named."""

# Scores pass through float32, whose rounding must not fail a proof.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of :func:`prove`.

    ``rows``: number of rows to which the reward applies, of ``asked`` ones. ``proved`` is False
    where the file has no ``gold`` or is wrong on purpose; then nothing was checked, and ``note``
    says why. With ``proved`` it says what was proved, if not all.
    """

    reward: str
    rows: int
    asked: int
    proved: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a reward file declares about its scores."""

    maximum: float
    minimum: float
    tolerance: float
    form_only: bool
    partial: bool

    @property
    def judged(self) -> bool:
        """Whether scores are inexact, so that wrong answers are compared on average."""
        return self.tolerance > _ROUNDING


@dataclass(frozen=True, slots=True)
class _Case:
    """A reward on the rows to which it applies, with its right answers and their scores."""

    rewards: RewardSet
    module: Any
    terms: Terms
    rows: Sequence[Row]
    golds: Sequence[str]
    scores: Sequence[float]
    labels: Sequence[str]


def prove(config: RewardConfig, rows: Sequence[Row], labels: Sequence[str] | None = None) -> Proof:
    """Check one reward on rows.

    Each row's gold answer must score the maximum. What says nothing must score the minimum, both
    bare and (unless ``FORM_ONLY``) inside ``<think>`` and ``<answer>``: the empty answer, a list of
    all labels or of two of them, a copy of the prompt, master keys, and orders to a judge. What is
    wrong must score less than the gold answer: another clip's gold answer, cues that are not in the
    clip, denials of those that are, and the file's own ``attacks``. No constant answer may come
    near the maximum on the rows of other truths. An attack may stay unscored; a gold answer and the
    empty one may not.

    Args:
        config: the reward.
        rows: columns of each row, including its ``prompt`` (:func:`proof_rows`).
        labels: the label set of the data, of which the rows may be a part; None: that of the rows.

    Raises:
        RewardError: an answer scores what it must not; the message names the reward, the answer,
            the row and the score.
        ConfigError: the reward cannot be loaded.
    """
    if labels is None:
        labels = distinct_labels(row.get("label") for row in rows)
    rewards = RewardSet([config], labels)
    module: Any = content.load_module(config.path.rpartition(":")[0])
    reason = wrong_on_purpose(config)
    if reason is not None:
        note = f"it is wrong on purpose: {reason}"
        return Proof(config.title, 0, len(rows), proved=False, note=note)
    if not hasattr(module, "gold"):
        note = "its file has no gold(row), so it is not known what it should pay for"
        return Proof(config.title, 0, len(rows), proved=False, note=note)
    terms = terms_of(module)
    usable = [(row, gold) for row in rows if (gold := _gold(rewards, module, row)) is not None]
    if not usable:
        raise RewardError(
            f"reward '{config.title}' applies to none of the {len(rows)} rows; "
            "add the columns that it reads, or remove the reward"
        )
    if terms.judged:
        usable = usable[:JUDGED_ROWS]
    applied, golds = [row for row, _ in usable], [gold for _, gold in usable]
    started = time.monotonic()
    scores = _check_gold(rewards, terms, applied, golds)
    case = _Case(rewards, module, terms, applied, golds, scores, labels)
    untried = _check_all(case, started)
    note = "the form alone, not what the tags hold" if terms.form_only else ""
    if untried:
        note = f"not all: after {JUDGED_SECONDS:g} s these were left: {', '.join(untried)}"
    return Proof(config.title, len(applied), len(rows), proved=True, note=note)


def terms_of(module: Any) -> Terms:
    """What a reward file declares about its scores."""
    return Terms(
        maximum=getattr(module, "MAXIMUM", 1.0),
        minimum=getattr(module, "MINIMUM", 0.0),
        tolerance=getattr(module, "PROOF_TOLERANCE", 0.0) + _ROUNDING,
        form_only=getattr(module, "FORM_ONLY", False),
        partial=getattr(module, "PARTIAL_CREDIT", False),
    )


def is_judged(config: RewardConfig) -> bool:
    """Whether a judge gives a reward's scores, so that its proof takes time."""
    return terms_of(content.load_module(config.path.rpartition(":")[0])).judged


def prove_samples(
    config: RewardConfig, samples: Sequence[Sample], labels: Sequence[str], most: int
) -> Proof:
    """:func:`prove` on at most ``most`` rows: of every label some, as far as the reward applies to
    them.

    Raises:
        RewardError, ConfigError: as :func:`prove` does; none of *all* rows has what it reads.
    """
    chosen = proof_rows(spread(samples, most))
    module: Any = content.load_module(config.path.rpartition(":")[0])
    gold: Callable[[Row], str | None] | None = getattr(module, "gold", None)
    if gold is not None and not any(gold(row) is not None for row in chosen):
        # Where few rows have what the reward reads, those few are looked for.
        applied = [one for one in samples if gold(proof_rows([one])[0]) is not None]
        chosen = proof_rows(spread(applied, most)) if applied else proof_rows(samples)
    return prove(config, chosen, labels)


def spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` samples, as many of each label as there is room for, evenly spaced."""
    by_label: dict[str, list[Sample]] = {}
    for sample in samples:
        by_label.setdefault(base_form(sample.truth.label or ""), []).append(sample)
    room = -(-most // max(1, len(by_label)))
    spaced = [listed[:: max(1, len(listed) // room)] for listed in by_label.values()]
    turns = (one for turn in zip_longest(*spaced) for one in turn if one is not None)
    return [one for one, _ in zip(turns, range(most), strict=False)]


def proof_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples as the rows that :func:`prove` takes."""
    return [{"prompt": prompt_of(sample), **columns_of(sample)} for sample in samples]


def score_rows(
    rewards: RewardSet, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]
) -> list[float]:
    """Score one completion per row by the first reward, as in training; NaN where unscored.

    Raises:
        RewardError: the reward failed.
    """
    if not rows:
        return []
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    scores = rewards.score(
        [row.get("prompt", "") for row in rows],
        [[{"role": "assistant", "content": text}] for text in completions],
        # There is no tokenizer here; one id per word lets rewards of length measure something.
        [[0] * len(text.split()) for text in completions],
        {name: [row.get(name) for row in rows] for name in names},
    )
    for failure in scores.failures:
        raise RewardError(f"reward '{failure.reward}' failed ({failure.reason}): {failure.detail}")
    return scores.values[:, 0].tolist()


def _gold(rewards: RewardSet, module: Any, row: Row) -> str | None:
    """The row's right answer; None where the reward does not apply, as for a label outside the
    classes that its params give."""
    gold: str | None = module.gold(row)
    loaded, label = rewards.rewards[0], row.get("label")
    classes = loaded.config.params.get("classes")
    if gold is None or not (loaded.takes_classes and classes and isinstance(label, str)):
        return gold
    return gold if is_class(label, classes) else None


def _check_all(case: _Case, started: float) -> list[str]:
    """Try all attacks, and name those that a slow judge left no time for."""
    untried: dict[str, None] = {}

    def late() -> bool:
        return case.terms.judged and time.monotonic() - started > JUDGED_SECONDS

    for attack in _attacks(case):
        if late():
            untried[attack.name] = None
        else:
            _check_attack(case, attack)
    for text in () if case.terms.form_only else known.constant_answers(case.golds):
        if late():
            untried["constant"] = None
        else:
            _check_constant(case, text)
    return list(untried)


def _attacks(case: _Case) -> Iterator[Attack]:
    """All attacks on a reward, first those that need least explanation."""
    rows, terms = case.rows, case.terms
    yield from known.empty_attacks(rows, form_only=terms.form_only)
    rule: Rule = "wrong" if terms.partial else "worthless"
    for attack in (
        *known.label_lists(rows, case.labels, rule),
        *known.empty_of_content(rows, case.labels, judged=terms.judged),
    ):
        yield attack
        if not terms.form_only:
            inside = [None if one is None else known.tagged(one) for one in attack.answers]
            yield Attack(f"tagged {attack.name}", inside, attack.rule)
    if terms.form_only:
        return
    others = [_another(case, place) for place in range(len(rows))]
    yield Attack("other-clip", others, "wrong")
    if _asks_for(case, "label"):
        yield from known.misnamed(rows, case.labels, _unlike(case))
        shouted = [_shouted(one) for one in others]
        yield Attack("other-clip in capitals", shouted, "wrong")
    if _asks_for(case, "modality_labels"):
        yield known.swapped_channels(rows, case.golds)
    if _asks_for(case, "cues") or _asks_for(case, "aus"):
        yield from known.untrue_cues(rows)
    own: list[Mapping[str, str]] = []
    if hasattr(case.module, "attacks"):
        own = [case.module.attacks(row) for row in rows]
    for name in dict.fromkeys(name for listed in own for name in listed):
        yield Attack(name, [listed.get(name) for listed in own], "wrong")


def _shouted(gold: str | None) -> str | None:
    """An answer in capital letters, with its tags as they are."""
    return None if gold is None else re.sub(r"<[^>]*>|[^<]+", _capitals, gold)


def _capitals(part: re.Match[str]) -> str:
    return part[0] if part[0].startswith("<") else part[0].upper()


def _asks_for(case: _Case, column: str) -> bool:
    return column in inspect.signature(case.rewards.rewards[0].function).parameters


def _truth(case: _Case, row: Row) -> Hashable:
    """What the reward takes for the row's truth; None where that is not known."""
    if hasattr(case.module, "truth"):
        return case.module.truth(row)
    label = row.get("label")
    return base_form(label) if _asks_for(case, "label") and label is not None else None


def _unlike(case: _Case) -> Callable[[str, str], bool]:
    """Whether the reward takes two labels for different truths. With a ``truth`` of its own, that
    is known of the labels of rows alone."""
    if not hasattr(case.module, "truth"):
        return lambda one, other: base_form(one) != base_form(other)
    truths = {base_form(str(row.get("label"))): _truth(case, row) for row in case.rows}

    def unlike(one: str, other: str) -> bool:
        found = truths.get(base_form(one)), truths.get(base_form(other))
        return None not in found and found[0] != found[1]

    return unlike


def _another(case: _Case, place: int) -> str | None:
    """The right answer of a row of another truth; None without one."""
    truth = _truth(case, case.rows[place])
    if truth is None:
        return None
    number = len(case.rows)
    # The next row in turn, so that every right answer is tried on some other row.
    for step in range(1, number):
        other = (place + step) % number
        if _truth(case, case.rows[other]) not in (truth, None):
            return case.golds[other]
    return None


def _check_gold(
    rewards: RewardSet, terms: Terms, rows: Sequence[Row], golds: Sequence[str]
) -> list[float]:
    scores = score_rows(rewards, rows, golds)
    for row, gold, score in zip(rows, golds, scores, strict=True):
        if math.isnan(score):
            raise RewardError(f"{_named(rewards, 'gold', row, gold)} could not be scored")
        if not terms.maximum - terms.tolerance <= score <= terms.maximum + _ROUNDING:
            raise RewardError(
                f"{_named(rewards, 'gold', row, gold)} scores {score:g}, not {terms.maximum:g} "
                "(a reward of another range declares MAXIMUM and MINIMUM in its file)"
            )
    return scores


def _check_attack(case: _Case, attack: Attack) -> None:
    rewards, terms = case.rewards, case.terms
    tried = [
        (row, answer, right)
        for row, answer, gold, right in zip(
            case.rows, attack.answers, case.golds, case.scores, strict=True
        )
        if answer is not None and answer != gold
    ]
    if not tried:
        return
    found = score_rows(rewards, [row for row, _, _ in tried], [text for _, text, _ in tried])
    if attack.rule == "wrong" and terms.judged:
        _check_means(case, attack, tried, found)
        return
    for (row, answer, right), score in zip(tried, found, strict=True):
        where = _named(rewards, attack.name, row, answer)
        # An unscored answer has an advantage of 0, so that saying nothing would cost nothing.
        if attack.name == "empty" and math.isnan(score):
            raise RewardError(f"{where} is unscored, not {terms.minimum:g}")
        # All comparisons are False for NaN, so an attack may stay unscored.
        if score < terms.minimum - _ROUNDING or (
            attack.rule == "worthless" and score > terms.minimum + terms.tolerance
        ):
            below = score < terms.minimum - _ROUNDING
            hint = " (a reward of another range declares MINIMUM in its file)" if below else ""
            raise RewardError(f"{where} scores {score:g}, not {terms.minimum:g}{hint}")
        if attack.rule == "wrong" and score > right - _ROUNDING:
            raise RewardError(
                f"{where} scores {score:g}, no less than the right answer's {right:g}"
            )


def _check_means(
    case: _Case, attack: Attack, tried: Sequence[tuple[Row, str, float]], found: Sequence[float]
) -> None:
    """A judge's scores are inexact: what is wrong must score less on average."""
    pairs = [(score, one) for score, one in zip(found, tried, strict=True) if score == score]
    if not pairs:
        return
    wrong = sum(score for score, _ in pairs) / len(pairs)
    right = sum(one[2] for _, one in pairs) / len(pairs)
    if wrong >= right:
        row, answer, _ = max(pairs, key=lambda pair: pair[0])[1]
        raise RewardError(
            f"{_named(case.rewards, attack.name, row, answer)} and its like score {wrong:.3g} on "
            f"average over {len(pairs)} rows, no less than the right answers' {right:.3g}"
        )


def _check_constant(case: _Case, text: str) -> None:
    """No constant answer may come near the maximum on the rows whose truth is another one. What it
    earns on the rows whose right answer it is, is its share."""
    terms = case.terms
    limit = terms.minimum + NEAR_MAXIMUM * (terms.maximum - terms.minimum)
    at = case.golds.index(text)
    rows = [row for place, row in enumerate(case.rows) if _differs(case, at, place)]
    scores = [one for one in score_rows(case.rewards, rows, [text] * len(rows)) if one == one]
    # A single row may happen to be described by another one's answer.
    if len(scores) < 2:
        return
    mean = sum(scores) / len(scores)
    if mean > limit:
        raise RewardError(
            f"{_named(case.rewards, 'constant', case.rows[at], text)} scores {mean:.3g} on "
            f"average on {len(scores)} rows of other truths, above {limit:.3g}"
        )


def _differs(case: _Case, one: int, other: int) -> bool:
    truths = _truth(case, case.rows[one]), _truth(case, case.rows[other])
    if None in truths:
        return case.golds[one] != case.golds[other]
    return truths[0] != truths[1]


def _named(rewards: RewardSet, name: str, row: Mapping[str, Any], answer: str) -> str:
    shown = answer if len(answer) <= 120 else answer[:117] + "..."
    config = rewards.rewards[0].config
    return (
        f"reward '{config.title}' ({config.path}): the {name} answer {shown!r} "
        f"of {row.get('sample_id', 'a row')}"
    )
