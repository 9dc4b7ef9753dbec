"""Preference objectives: a weighted mix of terms, from a config.

What terms are and what they read stands in :mod:`mmemo.losses.base`; its names can be
had from here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.losses.avem_dpo import AvemDpo
from mmemo.losses.base import (
    REJECTED,
    Answer,
    AnswerKey,
    Branch,
    Needed,
    PreferenceLogps,
    PreferenceTerm,
    Term,
    TermLoss,
)
from mmemo.losses.ddpo import Ddpo
from mmemo.losses.dpo import Dpo
from mmemo.losses.ipo import Ipo
from mmemo.losses.mdpo import Anchor, Mdpo
from mmemo.losses.mod_dpo import ModDpo
from mmemo.losses.sft_on_chosen import SftOnChosen

__all__ = [
    "REJECTED",
    "Answer",
    "AnswerKey",
    "Branch",
    "BuiltTerm",
    "Needed",
    "ObjectiveConfig",
    "PreferenceLogps",
    "PreferenceTerm",
    "Term",
    "TermConfig",
    "TermLoss",
    "build_terms",
    "needed",
]

TermConfig = Annotated[
    AvemDpo | ModDpo | Mdpo | Dpo | Ipo | Ddpo | Anchor | SftOnChosen, Field(discriminator="kind")
]


class BuiltTerm(NamedTuple):
    """A term of a run: what logs call it, its factor, and the term."""

    name: str
    weight: float
    term: Term


class ObjectiveConfig(Config):
    """What a preference run minimises: the sum of its terms, each times its weight."""

    terms: list[TermConfig] = Field(min_length=1)
    """Each with its ``kind``."""

    @model_validator(mode="after")
    def _terms_can_be_told_apart(self) -> ObjectiveConfig:
        names = [name_of(term) for term in self.terms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two terms are called '{twice}'; give one of them a 'name'")
        if not any(term.weight > 0 for term in self.terms):
            raise ValueError("every term has weight 0, so nothing is learnt; raise one")
        return self


def name_of(term: TermConfig) -> str:
    """What logs call a term."""
    return term.name or term.kind


def build_terms(terms: Sequence[TermConfig]) -> list[BuiltTerm]:
    """The terms of a run with their names and weights, in the config's order."""
    return [BuiltTerm(name_of(term), term.weight, term) for term in terms]


def needed(terms: Sequence[BuiltTerm]) -> tuple[Needed, ...]:
    """Everything that the terms read, each place once.

    A place has a gradient if any term with a weight above 0 wants one, and the reference's (the
    policy's) log-probabilities if any term reads them.
    """
    merged: dict[AnswerKey, Needed] = {}
    for built in terms:
        for one in built.term.needs():
            grad = one.grad and one.policy and built.weight > 0
            before = merged.get(one.place, Needed(*one.place, False, False, False))
            merged[one.place] = Needed(
                *one.place,
                grad=grad or before.grad,
                reference=one.reference or before.reference,
                policy=one.policy or before.policy,
            )
    return tuple(merged.values())
