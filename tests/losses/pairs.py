"""Pairs with random log-probabilities, and junk wherever nothing may be read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from mmemo.config import parse
from mmemo.losses.objective import (
    Answer,
    AnswerKey,
    Branch,
    ObjectiveConfig,
    PreferenceLogps,
    Term,
    build_terms,
)

ANSWERS: tuple[Answer, ...] = get_args(Answer)
BRANCHES: tuple[Branch, ...] = get_args(Branch)
KEYS: list[AnswerKey] = [(branch, answer) for branch in BRANCHES for answer in ANSWERS]
KINDS = ("avem_dpo", "mod_dpo", "mod_dpo_plus_plus", "mdpo", "dpo", "ipo", "ddpo", "anchor", "sft")
C = 5


def term(kind: str, **options: Any) -> Term:
    """A term as a config gives it."""
    config = parse(ObjectiveConfig, {"terms": [{"kind": kind, **options}]})
    return build_terms(config.terms)[0].term


def draw(seed: int, rows: int = 4, absent: Mapping[int, set[AnswerKey]] | None = None) -> Any:
    """``rows`` pairs in float64 with answers of 1 to C tokens; padding is NaN or infinite.

    Args:
        absent: places that a row lacks; they hold junk too.
    """
    generator = torch.Generator().manual_seed(seed)
    absent = absent or {}

    def lengths() -> Tensor:
        return torch.randint(1, C + 1, (rows, 1), generator=generator)

    mask: dict[Answer, Tensor] = {a: torch.arange(C) < lengths() for a in ANSWERS}
    changed: dict[Answer, Tensor] = {
        a: torch.rand(rows, C, generator=generator) < 0.5 for a in ANSWERS
    }
    present = {p: torch.tensor([p not in absent.get(i, ()) for i in range(rows)]) for p in KEYS}

    def logps(junk: float) -> dict[AnswerKey, Tensor]:
        found: dict[AnswerKey, Tensor] = {}
        for place in KEYS:
            values = -4 * torch.rand(rows, C, generator=generator, dtype=torch.float64)
            read = mask[place[1]] & present[place][:, None]
            found[place] = torch.where(read, values, junk)
        return found

    return PreferenceLogps(logps(torch.nan), logps(-torch.inf), mask, changed, present)


def flat(values: Mapping[AnswerKey, float], rows: int = 1) -> PreferenceLogps:
    """Answers of two tokens, each with log-probability ``values[place]`` / 2 under the policy, and
    -1 under the reference: a place's sum is its value, its rho the value + 2. Places that are not
    given are absent."""
    return PreferenceLogps(
        {p: torch.full((rows, 2), values.get(p, 0.0) / 2, dtype=torch.float64) for p in KEYS},
        {p: torch.full((rows, 2), -1.0, dtype=torch.float64) for p in KEYS},
        {a: torch.ones(rows, 2, dtype=torch.bool) for a in ANSWERS},
        {a: torch.zeros(rows, 2, dtype=torch.bool) for a in ANSWERS},
        {p: torch.full((rows,), p in values) for p in KEYS},
    )


def beside(*pairs: PreferenceLogps) -> PreferenceLogps:
    """Several batches as one."""

    def cat(parts: list[Any]) -> Any:
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    return PreferenceLogps(
        cat([one.policy for one in pairs]),
        cat([one.reference for one in pairs]),
        cat([one.mask for one in pairs]),
        cat([one.changed for one in pairs]),
        cat([one.present for one in pairs]),
    )


def row_of(logps: PreferenceLogps, row: int) -> PreferenceLogps:
    """One pair alone."""
    return PreferenceLogps(
        {p: x[row : row + 1] for p, x in logps.policy.items()},
        {p: x[row : row + 1] for p, x in logps.reference.items()},
        {a: x[row : row + 1] for a, x in logps.mask.items()},
        {a: x[row : row + 1] for a, x in logps.changed.items()},
        {p: x[row : row + 1] for p, x in logps.present.items()},
    )


def loss_of(margin: float) -> float:
    """-log sigmoid, written out."""
    return math.log(1 + math.exp(-margin))


def at_reference(logps: PreferenceLogps) -> PreferenceLogps:
    """The same pairs with a policy that is the reference."""
    policy = {p: x.clone() for p, x in logps.reference.items()}
    return PreferenceLogps(policy, logps.reference, logps.mask, logps.changed, logps.present)


def with_gradient(logps: PreferenceLogps) -> PreferenceLogps:
    """Fresh leaves that all ask for a gradient, the reference's too."""
    policy = {p: x.clone().requires_grad_() for p, x in logps.policy.items()}
    reference = {p: x.clone().requires_grad_() for p, x in logps.reference.items()}
    return PreferenceLogps(policy, reference, logps.mask, logps.changed, logps.present)


def metric(found: Any, name: str) -> float:
    """A metric's mean."""
    total, count = found.metrics[name]
    return float(total) / float(count)
