"""Tries out a loss term from a content file on a small batch, before a run depends on it.

A mistake in a loss otherwise shows after the features are encoded, or never: a term that reads
padding, or that depends on the other pairs of its batch, trains without an error and makes the
result depend on the batch size. The trial takes a millisecond and draws no global random numbers.

Shapes: B pairs, C tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor

from mmemo.errors import ConfigError
from mmemo.losses.base import (
    Answer,
    AnswerKey,
    LogpRequest,
    PreferenceLogps,
    PreferenceTerm,
    TermLoss,
)

_PAIRS, _TOKENS = 4, 5
_ANSWERS: tuple[Answer, ...] = get_args(Answer)


def validate_term(term: PreferenceTerm) -> None:
    """Check that a term maps pairs to one finite loss each, and reads only what it asks for.

    The last pair of the batch lacks every answer, and padding holds NaN.

    Raises:
        ConfigError: one sentence that names the term and what is wrong with it.
    """
    requests = _requests(term)
    batch = _batch(requests)
    out = _call(term, batch)
    _check_shapes(term, out)
    complete = torch.arange(_PAIRS) < _PAIRS - 1
    if out.counted[-1] or not out.counted[complete].all():
        raise _error(
            term,
            f"counts {int(out.counted.sum())} of {_PAIRS} pairs, {_PAIRS - 1} of which have what "
            "it needs; take 'counted' from usable() or rejected_weights()",
        )
    if not torch.isfinite(out.rows).all():
        raise _error(
            term,
            "reads padding or absent answers, so its loss is not finite; sum tokens with "
            "token_sum() or log_ratio()",
        )
    if out.rows[-1] != 0:
        raise _error(term, "gives a loss to a pair that is not counted; set those rows to 0")
    _check_gradient(term, out, batch, requests)
    first = _call(term, _first(batch))
    if not torch.allclose(first.rows[0], out.rows[0], rtol=1e-4, atol=1e-6):
        raise _error(
            term,
            "gives a pair another loss when it is alone, so the result would depend on the batch "
            "size; compute each pair's loss from that pair only",
        )


def _error(term: PreferenceTerm, message: str) -> ConfigError:
    return ConfigError(f"{term.kind or type(term).__name__} {message}")


def _requests(term: PreferenceTerm) -> tuple[LogpRequest, ...]:
    try:
        requests: Any = term.needs()
    except Exception as error:  # whatever a user's method raises
        raise _error(term, f"fails in needs() ({_reason(error)})") from error
    listed = cast("tuple[Any, ...]", requests) if isinstance(requests, tuple | list) else ()
    if not listed or not all(isinstance(one, LogpRequest) for one in listed):
        raise _error(term, "must return a tuple of LogpRequest from needs()")
    found = cast("tuple[LogpRequest, ...]", listed)
    if len({request.key for request in found}) < len(found):
        raise _error(term, "lists the same branch and answer twice in needs()")
    return found


def _batch(requests: tuple[LogpRequest, ...]) -> PreferenceLogps:
    """Answers of different lengths; the policy's log-probabilities are leaves with a gradient."""
    generator = torch.Generator().manual_seed(0)
    mask: dict[Answer, Tensor] = {
        answer: torch.arange(_TOKENS) < torch.arange(1 + at, 1 + at + _PAIRS)[:, None]
        for at, answer in enumerate(_ANSWERS)
    }
    here = torch.arange(_PAIRS) < _PAIRS - 1

    def draw(key: AnswerKey) -> Tensor:
        values = -4 * torch.rand(_PAIRS, _TOKENS, generator=generator)
        # NaN shows in the loss or its gradient whenever a term reads what it must not.
        return torch.where(mask[key[1]] & here[:, None], values, torch.nan)

    return PreferenceLogps(
        policy={one.key: draw(one.key).requires_grad_(one.grad) for one in requests if one.policy},
        reference={one.key: draw(one.key) for one in requests if one.reference},
        mask=mask,
        changed={answer: torch.zeros_like(one) for answer, one in mask.items()},
        present={one.key: here for one in requests},
    )


def _first(batch: PreferenceLogps) -> PreferenceLogps:
    """The batch's first pair alone."""
    return PreferenceLogps(
        {key: x[:1].detach() for key, x in batch.policy.items()},
        {key: x[:1] for key, x in batch.reference.items()},
        {answer: x[:1] for answer, x in batch.mask.items()},
        {answer: x[:1] for answer, x in batch.changed.items()},
        {key: x[:1] for key, x in batch.present.items()},
    )


def _call(term: PreferenceTerm, batch: PreferenceLogps) -> TermLoss:
    try:
        with torch.enable_grad():
            out: Any = term(batch)
    except KeyError as error:
        key = error.args[0] if error.args else None
        raise _error(term, f"reads {key!r}, which its needs() does not ask for") from error
    except Exception as error:  # whatever a user's method raises
        raise _error(term, f"fails on {len(batch.mask['chosen'])} pairs ({_reason(error)})") from (
            error
        )
    if not isinstance(out, TermLoss):
        raise _error(term, f"returns {type(out).__name__}; it must return a TermLoss")
    return out


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _check_shapes(term: PreferenceTerm, out: TermLoss) -> None:
    for name, value in (("rows", cast("Any", out.rows)), ("counted", cast("Any", out.counted))):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (_PAIRS,):
            raise _error(
                term, f"returns {name} of shape {shape} for {_PAIRS} pairs, not ({_PAIRS},)"
            )
    if out.counted.dtype != torch.bool:
        raise _error(term, f"returns counted as {out.counted.dtype}; it must be torch.bool")
    metrics: Any = out.metrics
    if not isinstance(metrics, Mapping):
        raise _error(term, "must return metrics as a mapping of names to (sum, count)")
    for name, value in cast("Mapping[Any, Any]", metrics).items():
        parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else ()
        if len(parts) != 2 or not all(isinstance(x, Tensor) and x.ndim == 0 for x in parts):
            raise _error(term, f"returns metric '{name}' in another form than (sum, count)")


def _check_gradient(
    term: PreferenceTerm,
    out: TermLoss,
    batch: PreferenceLogps,
    requests: tuple[LogpRequest, ...],
) -> None:
    """The loss has a finite gradient for something that asked for one."""
    leaves = [batch.policy[one.key] for one in requests if one.policy and one.grad]
    if not leaves:  # a term that only observes
        return
    if not out.rows.requires_grad:
        raise _error(term, "returns a loss without a gradient; do not detach the policy")
    found = torch.autograd.grad(out.rows.sum(), leaves, allow_unused=True)
    grads = [one for one in cast("tuple[Tensor | None, ...]", found) if one is not None]
    if not all(torch.isfinite(one).all() for one in grads):
        raise _error(
            term, "has a gradient that is not finite; sum tokens with token_sum() or log_ratio()"
        )
