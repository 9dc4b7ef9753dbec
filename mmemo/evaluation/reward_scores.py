"""Reward functions as scores of an evaluation, for example of the reasoning on unseen clips.

A score is a function with TRL's reward signature, as in :mod:`mmemo.rewards.rewards`, that is
called on the finished answers. It sees the truth of each row; ``label`` is the right answer to the
question. ``None`` means that it could not score an answer, and never counts as 0. A score that
fails does not stop the evaluation: the answers it fails on are unscored, counted and reported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import Field
from rich.text import Text

from mmemo import content, files
from mmemo.config import Config
from mmemo.console import console, progress
from mmemo.errors import ConfigError, MmemoError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import SCORES
from mmemo.evaluation.scorers.set_scores import LOGGED
from mmemo.evaluation.scoring import Block, ScoreValues
from mmemo.rewards.rewards import (
    Failure,
    Reward,
    RewardConfig,
    RewardSet,
    columns_asked_for,
    columns_of,
    distinct_labels,
)
from mmemo.run_log import RunRecord

PORTION = 64
"""Number of answers that a score is given in one call."""


class ScoreConfig(Config):
    """One score of an evaluation."""

    path: str
    """The function, such as ``reward/grounding.py:grounding``."""
    name: str | None = Field(default=None, min_length=1)
    """Name of the score in results. None uses the file's name without ``.py``."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments for the function. They take precedence over columns of the same name."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit in seconds for one call on up to 64 answers, which stay unscored after it."""

    def reward(self) -> RewardConfig:
        """The config of the same function as a reward."""
        return RewardConfig(
            path=self.path, name=self.name, params=self.params, timeout_s=self.timeout_s
        )


def load_scores(configs: Sequence[ScoreConfig], questions: Sequence[Question] = ()) -> RewardSet:
    """Load the functions, and check that the rows have the columns that each one takes.

    Raises:
        ConfigError: an entry of ``scores`` is wrong; the message names it.
    """
    if not configs and any(one.labels is None and one.kind is None for one in questions):
        raise ConfigError(
            "'scores': the benchmark asks open questions, whose answers only scores can rate; list "
            "a score here, or turn the open questions off"
        )
    columns = {name for question in questions for name in columns_of(question.sample)}
    names: list[str] = []
    # The functions are loaded one by one first, so that an error can name its entry.
    for place, config in enumerate(configs):
        where = f"scores[{place}] ('{config.path}')"
        try:
            loaded = Reward(config.reward())
        except MmemoError as error:
            raise ConfigError(f"{where}: {error}") from error
        except Exception as error:  # the file is a user's: it may raise anything
            raise ConfigError(
                f"{where}: cannot be loaded ({type(error).__name__}: {error}); fix the file"
            ) from error
        if loaded.name in names:
            raise ConfigError(
                f"{where}: another score is also called '{loaded.name}'; give this one a 'name'"
            )
        missing = sorted(columns_asked_for(loaded.function) - columns - set(config.params))
        if questions and missing:
            raise ConfigError(
                f"{where}: takes '{missing[0]}', which no row has; add that column to "
                "data.columns, or give a value in params"
            )
        names.append(loaded.name)
    labels = [label for one in questions if one.labels for label in one.labels.labels]
    labels += [one.truth for one in questions if isinstance(one.truth, str)]
    return RewardSet([config.reward() for config in configs], distinct_labels(labels))


def describe_scores(scores: RewardSet) -> dict[str, Block]:
    """How each score is computed: its function, the hash of the file, and its parameters."""
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
    """Compute every score of every answer, and write ``scores.jsonl`` in one step: one line per
    answer, in the order of ``predictions.jsonl``, with its ``key``, its ``scores`` and what scores
    of sets log (:mod:`mmemo.evaluation.scorers.set_scores`). Without scores, the file is removed.

    Args:
        rows: the answers to ``questions``, in their order.
        tokenize: maps the text of an answer to the token ids that a score gets as
            ``completion_ids``.

    Returns:
        Name of each score to one value per answer, None where unscored; and the number of answers
        that each score failed on.
    """
    path = folder / SCORES
    if not scores.names:
        path.unlink(missing_ok=True)
        return {}, Counter()
    values: dict[str, list[float | None]] = {name: [] for name in scores.names}
    logged: dict[str, list[Any]] = {name: [] for name in scores.names}
    failures: list[Failure] = []
    with progress("scores", len(rows), unit="answers") as bar:
        for start in range(0, len(rows), PORTION):
            part = slice(start, start + PORTION)
            found, pairs, wrong = _score_portion(scores, questions[part], rows[part], tokenize)
            for name, some in found.items():
                values[name] += some
                logged[name] += pairs[name]
            failures += wrong
            bar.advance(len(rows[part]))
    failed = _report_failures(failures, len(rows), record)
    scored = [
        {
            "key": row["key"],
            "sample_id": row["sample_id"],
            "task": row["task"],
            "scores": {name: values[name][place] for name in scores.names},
            **_logged(logged, place),
        }
        for place, row in enumerate(rows)
    ]
    files.write_rows(path, scored, ensure_ascii=False, allow_nan=False)
    return values, failed


def _score_portion(
    scores: RewardSet,
    questions: Sequence[Question],
    rows: Sequence[Row],
    tokenize: Callable[[str], list[int]],
) -> tuple[dict[str, list[float | None]], dict[str, list[Any]], list[Failure]]:
    columns = [{**columns_of(one.sample), "label": one.truth} for one in questions]
    names = dict.fromkeys(name for column in columns for name in column)
    raws = [str(row["raw"]) for row in rows]
    scored = scores.score(
        [[{"role": turn.role, "content": turn.text} for turn in one.turns] for one in questions],
        [[{"role": "assistant", "content": raw}] for raw in raws],
        [tokenize(raw) for raw in raws],
        {name: [column.get(name) for column in columns] for name in names},
        trainer_state=SimpleNamespace(global_step=1, max_steps=1),  # as at the end of training
    )
    found: dict[str, list[float | None]] = {}
    for place, name in enumerate(scores.names):
        listed: list[float] = scored.values[:, place].tolist()
        found[name] = [None if math.isnan(value) else round(value, 6) for value in listed]
    nothing: list[Any] = [None] * len(rows)
    pairs = {name: scored.extras.get(f"{name}/{LOGGED}", nothing) for name in scores.names}
    return found, pairs, scored.failures


def _logged(columns: dict[str, list[Any]], place: int) -> dict[str, dict[str, Any]]:
    """What scores of sets logged for one answer, if any did."""
    found = {name: column[place] for name, column in columns.items() if column[place] is not None}
    return {LOGGED: found} if found else {}


def _report_failures(failures: Sequence[Failure], total: int, record: RunRecord) -> Counter[str]:
    """Report what failed, once for each score and reason; returns the number of failed answers of
    each score."""
    counts: Counter[tuple[str, str]] = Counter()
    details: dict[tuple[str, str], str] = {}
    for failure in failures:
        kind = (failure.reward, failure.reason)
        counts[kind] += failure.count
        details.setdefault(kind, failure.detail)
    for (name, reason), count in counts.items():
        detail = details[name, reason]
        record.event("score_failed", score=name, reason=reason, answers=count, detail=detail)
        told = (
            f"Score '{name}' failed on {count} of {total} answers ({reason}), which stay unscored:"
        )
        console.print(Text.assemble((told, "yellow"), f" {detail}"))
    by_score: Counter[str] = Counter()
    for (name, _), count in counts.items():
        by_score[name] += count
    return by_score
