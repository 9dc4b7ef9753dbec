"""Proves on real rows that a reward pays for what it should, and not for what is easy to write.

A reward file defines

- ``gold(row) -> str | None``: a completion that must score ``MAXIMUM``; None for a row to which the
  reward does not apply. ``row`` has the columns of :func:`mmemo.rewards.rewards.columns_of`;

and may define

- ``MAXIMUM`` and ``MINIMUM`` (default 1 and 0): the range of its scores;
- ``FORM_ONLY = True``: the reward judges the form alone, so well-formed nonsense may score;
- ``PROOF_TOLERANCE`` (default 0): how far a gold answer may fall short of the maximum, and an
  attack exceed the minimum, for rewards whose scores come from a judge;
- ``wrong_on_purpose(params) -> str | None``: why the reward, with these parameters, is known to pay
  for the wrong thing. This is for studies of bad scorers: such a reward is not proved, and every
  check and run record says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmemo import content
from mmemo.answers.messages import prompt_text
from mmemo.answers.parsing import EMOTIONS
from mmemo.data.sample import Sample
from mmemo.errors import RewardError
from mmemo.rewards.rewards import RewardConfig, RewardSet, columns_of, prompt_of, wrong_on_purpose

MASTER_KEYS: tuple[str, ...] = (":", "Thought process:", "Let's solve this problem step by step.")
"""Answers without content that judges are known to reward (One Token to Fool LLM-as-a-Judge,
arXiv 2507.08794)."""

# Scores pass through float32, whose rounding must not fail a proof.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of :func:`prove`.

    ``rows``: number of rows to which the reward applies, of ``asked`` ones. ``proved`` is False
    where the file has no ``gold`` or is wrong on purpose; then nothing was checked, and ``note``
    says why.
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


def prove(config: RewardConfig, rows: Sequence[Mapping[str, Any]]) -> Proof:
    """Check one reward on rows.

    Each row's gold answer must score the maximum. The empty answer, a list of all emotions, a copy
    of the prompt and the master keys must score the minimum, both bare and (unless ``FORM_ONLY``)
    inside ``<think>`` and ``<answer>``. An attack may stay unscored; a gold answer may not.

    Args:
        config: the reward.
        rows: columns of each row, including its ``prompt`` (:func:`proof_rows`).

    Raises:
        RewardError: an answer scores what it must not; the message names the reward, the answer,
            the row and the score.
        ConfigError: the reward cannot be loaded.
    """
    rewards = RewardSet([config])
    module: Any = content.load_module(config.path.rpartition(":")[0])
    reason = wrong_on_purpose(config)
    if reason is not None:
        note = f"it is wrong on purpose: {reason}"
        return Proof(config.title, 0, len(rows), proved=False, note=note)
    if not hasattr(module, "gold"):
        note = "its file has no gold(row), so it is not known what it should pay for"
        return Proof(config.title, 0, len(rows), proved=False, note=note)
    terms = Terms(
        maximum=getattr(module, "MAXIMUM", 1.0),
        minimum=getattr(module, "MINIMUM", 0.0),
        tolerance=getattr(module, "PROOF_TOLERANCE", 0.0) + _ROUNDING,
        form_only=getattr(module, "FORM_ONLY", False),
    )
    golds = [(row, module.gold(row)) for row in rows]
    usable = [(row, gold) for row, gold in golds if gold is not None]
    if not usable:
        raise RewardError(
            f"reward '{config.title}' applies to none of the {len(rows)} rows; "
            "add the columns that it reads, or remove the reward"
        )
    applied = [row for row, _ in usable]
    _check_gold(rewards, terms, applied, [gold for _, gold in usable])
    # Data sets with labels of their own are attacked with a listing of these as well.
    labels = {str(row["label"]): None for row in rows if row.get("label") is not None}
    listing = ", ".join(dict.fromkeys((*EMOTIONS, *labels)))
    _check_attack(rewards, terms, applied, "empty", [""] * len(applied))
    attacks = {
        "label-listing": [listing] * len(applied),
        "copied-prompt": [prompt_text(row.get("prompt", "")) for row in applied],
        **{f"master-key {key!r}": [key] * len(applied) for key in MASTER_KEYS},
    }
    for name, answers in attacks.items():
        _check_attack(rewards, terms, applied, name, answers)
        if not terms.form_only:
            _check_attack(
                rewards, terms, applied, f"tagged {name}", [_tagged(one) for one in answers]
            )
    return Proof(config.title, len(applied), len(rows), proved=True)


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


def _check_gold(
    rewards: RewardSet, terms: Terms, rows: Sequence[Mapping[str, Any]], golds: Sequence[str]
) -> None:
    for row, gold, score in zip(rows, golds, score_rows(rewards, rows, golds), strict=True):
        if math.isnan(score):
            raise RewardError(f"{_named(rewards, 'gold', row, gold)} could not be scored")
        if not terms.maximum - terms.tolerance <= score <= terms.maximum + _ROUNDING:
            raise RewardError(
                f"{_named(rewards, 'gold', row, gold)} scores {score:g}, not {terms.maximum:g}"
            )


def _check_attack(
    rewards: RewardSet,
    terms: Terms,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    answers: Sequence[str],
) -> None:
    for row, answer, score in zip(rows, answers, score_rows(rewards, rows, answers), strict=True):
        # An unscored answer has an advantage of 0, so that saying nothing would cost nothing.
        if name == "empty" and math.isnan(score):
            raise RewardError(
                f"{_named(rewards, name, row, answer)} is unscored, not {terms.minimum:g}"
            )
        # Both comparisons are False for NaN, so an attack may stay unscored.
        if score > terms.minimum + terms.tolerance or score < terms.minimum - _ROUNDING:
            raise RewardError(
                f"{_named(rewards, name, row, answer)} scores {score:g}, not {terms.minimum:g}"
            )


def _named(rewards: RewardSet, name: str, row: Mapping[str, Any], answer: str) -> str:
    shown = answer if len(answer) <= 120 else answer[:117] + "..."
    config = rewards.rewards[0].config
    return (
        f"reward '{config.title}' ({config.path}): the {name} answer {shown!r} "
        f"of {row.get('sample_id', 'a row')}"
    )


def _tagged(text: str) -> str:
    return f"<think>{text}</think><answer>{text}</answer>"
