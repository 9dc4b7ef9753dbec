"""Rewards that a random tiny model can earn from the first step, and rewards that fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def even(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> list[float]:
    """The share of tokens with an even id."""
    return [sum(x % 2 == 0 for x in ids) / max(1, len(ids)) for ids in completion_ids]


def right(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> list[float]:
    """1 where the first token has an even id: right or wrong."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def short(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> list[float]:
    """More for fewer tokens."""
    return [1 / len(ids) for ids in completion_ids]


def picky(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **_: Any,
) -> list[float | None]:
    """As ``even``; every second completion cannot be scored."""
    scores = even(prompts, completions, completion_ids)
    return [None if at % 2 else score for at, score in enumerate(scores)]


def broken(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Raises at once."""
    raise RuntimeError("no scorer today")


def constant(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """The same for all: no group teaches anything."""
    return [1.0 for _ in completions]
