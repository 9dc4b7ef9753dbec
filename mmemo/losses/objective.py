"""The objective of a preference run: a weighted sum of terms, from a config.

    objective:
      terms:
        - {kind: avem_dpo, beta: 0.5}                                  # built in
        - {kind: losses/simpo.py:Simpo, weight: 0.5, beta: 2.0}        # a class in a content file

Everything but ``kind``, ``weight`` and ``name`` is a parameter of the term and is validated by the
term's own class. A class from a file is also tried out on a small batch when the objective is built
(:mod:`mmemo.losses.validate`), so ``mmemo check`` reports a wrong return shape before a run does.
The file is run when a config that names it is read.

:mod:`mmemo.losses.base` defines what a term is; its names can be imported from here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from mmemo import content
from mmemo.config import Config, nearest, parse
from mmemo.errors import ConfigError
from mmemo.losses.avem_dpo import AvemDpo
from mmemo.losses.base import (
    REJECTED,
    Answer,
    AnswerKey,
    Branch,
    LogpRequest,
    PreferenceLogps,
    PreferenceTerm,
    Term,
    TermLoss,
)
from mmemo.losses.ddpo import Ddpo
from mmemo.losses.dpo import Dpo
from mmemo.losses.ipo import Ipo
from mmemo.losses.mdpo import Anchor, Mdpo
from mmemo.losses.mod_dpo import ModDpo, ModDpoPlusPlus, renamed
from mmemo.losses.sft_on_chosen import SftOnChosen
from mmemo.losses.validate import validate_term

__all__ = [
    "REJECTED",
    "TERMS",
    "Answer",
    "AnswerKey",
    "Branch",
    "BuiltTerm",
    "LogpRequest",
    "ObjectiveConfig",
    "PreferenceLogps",
    "PreferenceTerm",
    "Term",
    "TermConfig",
    "TermLoss",
    "build_terms",
    "describe_terms",
    "merge_requests",
    "term_class",
]

TERMS: Mapping[str, type[PreferenceTerm]] = {
    "avem_dpo": AvemDpo,
    "mod_dpo": ModDpo,
    "mod_dpo_plus_plus": ModDpoPlusPlus,
    "mdpo": Mdpo,
    "dpo": Dpo,
    "ipo": Ipo,
    "ddpo": Ddpo,
    "anchor": Anchor,
    "sft": SftOnChosen,
}
"""The built-in terms by their ``kind``."""


def term_class(kind: str) -> type[PreferenceTerm]:
    """The class that ``kind`` names: a built-in term, or ``folder/file.py:Class``.

    Raises:
        ConfigError: there is no such term, file or class, the file fails when it is run, or the
            class is not a complete :class:`PreferenceTerm`.
    """
    if kind in TERMS:
        return TERMS[kind]
    if not _is_path(kind):
        guess = nearest(kind, list(TERMS))
        hint = f"did you mean '{guess}'?" if guess else f"use one of {', '.join(TERMS)}."
        raise ConfigError(
            f"no built-in loss is called '{kind}'; {hint} A loss of your own is named by its path, "
            "such as losses/simpo.py:Simpo"
        )
    found: Any = content.load(kind)
    if not (inspect.isclass(found) and issubclass(found, PreferenceTerm)):
        raise ConfigError(
            f"{kind} is not a loss term; derive the class from mmemo.losses.base.PreferenceTerm"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{kind} lacks {missing}; a loss term has to define it")
    return found


def _is_path(kind: str) -> bool:
    # Also what only looks like a path, so that a forgotten class or suffix is reported as such.
    return ":" in kind or "/" in kind or kind.endswith(".py")


def _read_term(value: Any) -> Any:
    """A mapping with ``kind`` as an instance of the class that it names."""
    if not isinstance(value, Mapping):
        return value  # pyright: ignore[reportUnknownVariableType] - pydantic names what it is
    values = renamed({**value})
    kind = values.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"needs a 'kind': {', '.join(TERMS)}, or a path, losses/file.py:Class")
    try:
        return parse(term_class(kind), values, where=kind)
    except ConfigError as error:
        # pydantic adds the field's place to a ValueError; any other exception would pass through
        # it.
        raise ValueError(str(error)) from None


_BuiltIn = Annotated[
    AvemDpo | ModDpo | ModDpoPlusPlus | Mdpo | Dpo | Ipo | Ddpo | Anchor | SftOnChosen,
    Field(discriminator="kind"),
]
# The union only documents the built-in terms in the JSON schema; it restricts nothing.
TermConfig = Annotated[
    # Else pydantic would dump only the fields of the base class.
    SerializeAsAny[PreferenceTerm],
    BeforeValidator(_read_term, json_schema_input_type=_BuiltIn | dict[str, Any]),
]


class BuiltTerm(NamedTuple):
    """A term of a run: the name it is logged under, its weight, and the term."""

    name: str
    weight: float
    term: Term


class ObjectiveConfig(Config):
    """The loss that a preference run minimises: the sum of its terms, each times its weight."""

    terms: list[TermConfig] = Field(min_length=1)
    """The terms. Each has a ``kind``: the name of a built-in loss, or the path of a class in a
    content file, ``losses/simpo.py:Simpo``. Its other keys are parameters of that loss."""

    @model_validator(mode="after")
    def _terms_can_be_told_apart(self) -> ObjectiveConfig:
        # Metrics and shares of the gradient are logged under these names.
        names = [term.title for term in self.terms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two terms are called '{twice}'; give one of them a 'name'")
        if not any(term.weight > 0 for term in self.terms):
            raise ValueError("every term has weight 0, so nothing is learnt; raise one")
        return self


def build_terms(terms: Sequence[PreferenceTerm]) -> list[BuiltTerm]:
    """The terms of a run with their names and weights, in the config's order.

    Raises:
        ConfigError: a term from a content file fails on a small batch, or returns something else
            than one finite loss per pair.
    """
    for term in terms:
        # The built-in terms pass the same trial in the test suite.
        if _is_path(term.kind):
            validate_term(term)
    return [BuiltTerm(term.title, term.weight, term) for term in terms]


def describe_terms(terms: Sequence[PreferenceTerm]) -> list[dict[str, str]]:
    """The content files behind the terms that are named by path, for the run record.

    Returns:
        For each such term its ``name``, ``path`` as configured, resolved ``file``, and the file's
        ``sha256``, which decides whether a checkpoint may be resumed.
    """
    described: list[dict[str, str]] = []
    for term in terms:
        if _is_path(term.kind):
            file = content.find(term.kind.rpartition(":")[0])
            described.append(
                {
                    "name": term.title,
                    "path": term.kind,
                    "file": str(file.resolve()),
                    "sha256": content.sha256(file),
                }
            )
    return described


def merge_requests(terms: Sequence[BuiltTerm]) -> tuple[LogpRequest, ...]:
    """Everything that the terms read, each key once.

    A key gets a gradient if any term with a weight above 0 asks for one, and it gets the
    reference's (the policy's) log-probabilities if any term asks for these.
    """
    merged: dict[AnswerKey, LogpRequest] = {}
    for built in terms:
        for request in built.term.needs():
            grad = request.grad and request.policy and built.weight > 0
            before = merged.get(request.key, LogpRequest(*request.key, False, False, False))
            merged[request.key] = LogpRequest(
                *request.key,
                grad=grad or before.grad,
                reference=request.reference or before.reference,
                policy=request.policy or before.policy,
            )
    return tuple(merged.values())
