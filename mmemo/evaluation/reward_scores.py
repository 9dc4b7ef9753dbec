"""Reward functions as scores of an evaluation: how good the reasoning on unseen clips is.

A score is a function with TRL's reward signature, as in :mod:`mmemo.rewards.rewards`, asked about
the finished answers. It sees the row's truth; ``label`` is the question's own right answer.
``None`` means that it could not score an answer, and is never 0. Nothing a score does stops an
evaluation: what it fails on is unscored, counted and named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import Field

from mmemo import content, files
from mmemo.config import Config
from mmemo.console import console, progress
from mmemo.errors import ConfigError, MmemoError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import SCORES
from mmemo.evaluation.scoring import Block, ScoreValues
from mmemo.rewards.rewards import (
    Failure,
    Reward,
    RewardConfig,
    RewardSet,
    columns_asked_for,
    columns_of,
)
from mmemo.run_log import RunRecord

PORTION = 64
"""Answers that a score is asked about in one call."""


class ScoreConfig(Config):
    """One score of an evaluation."""

    path: str
    """The function: ``reward/grounding.py:grounding``."""
    name: str | None = Field(default=None, min_length=1)
    """What results call it; the file's name without ``.py`` unless given."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments for the function. They win over a column of the same name."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one call on up to 64 answers may take; then they are unscored."""

    def reward(self) -> RewardConfig:
        """The same function as a reward."""
        return RewardConfig(
            path=self.path, name=self.name, params=self.params, timeout_s=self.timeout_s
        )


def load_scores(configs: Sequence[ScoreConfig], questions: Sequence[Question] = ()) -> RewardSet:
    """The functions, after proving that each exists and that the rows have what it asks for.

    Raises:
        ConfigError: names the entry of ``scores`` that is wrong.
    """
    if not configs and any(question.labels is None for question in questions):
        raise ConfigError(
            "'scores': the benchmark asks open questions, whose answers only scores can mark; list "
            "one here, or ask none"
        )
    columns = {name for question in questions for name in columns_of(question.sample)}
    names: list[str] = []
    for place, config in enumerate(configs):
        where = f"scores[{place}] ('{config.path}')"
        try:
            loaded = Reward(config.reward())
        except MmemoError as error:
            raise ConfigError(f"{where}: {error}") from error
        except Exception as error:  # the file is a user's: it may raise anything
            raise ConfigError(
                f"{where}: cannot be loaded, {type(error).__name__}: {error}; fix the file"
            ) from error
        if loaded.name in names:
            raise ConfigError(
                f"{where}: another score is called '{loaded.name}'; give this one a 'name'"
            )
        missing = sorted(columns_asked_for(loaded.function) - columns - set(config.params))
        if questions and missing:
            raise ConfigError(
                f"{where}: asks for '{missing[0]}', which no row has; name that column in "
                "data.columns, or give it in params"
            )
        names.append(loaded.name)
    return RewardSet([config.reward() for config in configs])


def describe_scores(scores: RewardSet) -> dict[str, Block]:
    """How each score is made: the function, the hash of its file, its parameters."""
    return {
        one.name: {
            "path": one.config.path,
            "sha256": content.sha256(content.find(one.config.path.rpartition(":")[0])),
            "params": one.config.params,
        }
        for one in scores.rewards
    }


def score_answers(
    scores: RewardSet,
    questions: Sequence[Question],
    rows: Sequence[Row],
    tokenize: Callable[[str], list[int]],
    record: RunRecord,
    folder: Path,
) -> tuple[ScoreValues, Counter[str]]:
    """Ask every score about every answer, and write ``scores.jsonl``: one line an answer, in the
    order of ``predictions.jsonl``, with its ``key`` and its ``scores``. That file is whole or is
    as it was; without scores there is none.

    Args:
        rows: the answers to ``questions``, in their order.
        tokenize: an answer's text to the token ids that a score sees as ``completion_ids``.

    Returns:
        Score to one value an answer, None where unscored; and how many answers each failed on.
    """
    path = folder / SCORES
    if not scores.names:
        path.unlink(missing_ok=True)
        return {}, Counter()
    values: dict[str, list[float | None]] = {name: [] for name in scores.names}
    failures: list[Failure] = []
    with progress("scores", len(rows), unit="answers") as bar:
        for start in range(0, len(rows), PORTION):
            part = slice(start, start + PORTION)
            found, wrong = _ask(scores, questions[part], rows[part], tokenize)
            for name, some in found.items():
                values[name] += some
            failures += wrong
            bar.advance(len(rows[part]))
    failed = _tell(failures, len(rows), record)
    scored = [
        {
            "key": row["key"],
            "sample_id": row["sample_id"],
            "task": row["task"],
            "scores": {name: values[name][place] for name in scores.names},
        }
        for place, row in enumerate(rows)
    ]
    files.write_rows(path, scored, ensure_ascii=False, allow_nan=False)
    return values, failed


def _ask(
    scores: RewardSet,
    questions: Sequence[Question],
    rows: Sequence[Row],
    tokenize: Callable[[str], list[int]],
) -> tuple[dict[str, list[float | None]], list[Failure]]:
    columns = [{**columns_of(one.sample), "label": one.truth} for one in questions]
    names = dict.fromkeys(name for column in columns for name in column)
    raws = [str(row["raw"]) for row in rows]
    said = scores.score(
        [[{"role": turn.role, "content": turn.text} for turn in one.turns] for one in questions],
        [[{"role": "assistant", "content": raw}] for raw in raws],
        [tokenize(raw) for raw in raws],
        {name: [column.get(name) for column in columns] for name in names},
        trainer_state=SimpleNamespace(global_step=1, max_steps=1),  # as at the end of training
    )
    found: dict[str, list[float | None]] = {}
    for place, name in enumerate(scores.names):
        listed: list[float] = said.values[:, place].tolist()
        found[name] = [None if math.isnan(value) else round(value, 6) for value in listed]
    return found, said.failures


def _tell(failures: Sequence[Failure], asked: int, record: RunRecord) -> Counter[str]:
    """Name what failed, once for each score and reason; the failed answers of each score."""
    counts: Counter[tuple[str, str]] = Counter()
    details: dict[tuple[str, str], str] = {}
    for failure in failures:
        kind = (failure.reward, failure.reason)
        counts[kind] += failure.count
        details.setdefault(kind, failure.detail)
    for (name, reason), count in counts.items():
        detail = details[name, reason]
        record.event("score_failed", score=name, reason=reason, answers=count, detail=detail)
        console.print(
            f"[yellow]score '{name}' failed on {count} of {asked} answers ({reason}), which stay "
            f"unscored:[/yellow] {detail}"
        )
    total: Counter[str] = Counter()
    for (name, _), count in counts.items():
        total[name] += count
    return total
