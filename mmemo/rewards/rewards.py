"""Rewards: content functions with TRL's signature, called so that no reward can stop a run.

    def name(prompts, completions, completion_ids, *, label, trainer_state, log_metric, **_)
        -> list[float | None]

plain or ``async``. Every column of a row comes as a keyword with a list of one value per completion
(:func:`columns_of`). ``None`` means "could not be scored" and is never 0. A reward that raises,
overruns its time limit, or returns something else than a finite number for a completion leaves
these completions unscored; that is counted and named, and stops the run only above a configured
share (:class:`FailureWatch`).

N completions, K rewards.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mmemo import content
from mmemo.answers.messages import Chat
from mmemo.config import Config, nearest
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, TrainingError
from mmemo.rewards.time_limit import Guard, Outcome, Problem

Reason = Literal[Problem, "not_finite", "not_a_number", "not_a_list", "wrong_length"]

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
_LARGEST = torch.finfo(torch.float32).max


class RewardConfig(Config):
    """One reward of a run."""

    path: str
    """The function: ``reward/outcome.py:outcome``."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Its factor in the sum. 0 only observes: the reward is logged and changes nothing."""
    name: str | None = Field(default=None, min_length=1)
    """What logs call it; the file's name without ``.py`` unless given."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments for the function. They win over a column of the same name."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that one call on all completions of a step may take."""
    max_failure_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when more than this share of the completions in the window failed."""
    failure_window: int = Field(default=20, ge=1)
    """Steps over which that share is taken."""

    @property
    def title(self) -> str:
        """The name in logs."""
        return self.name or Path(self.path.rpartition(":")[0]).stem


@dataclass(frozen=True, slots=True)
class Failure:
    """Completions that one reward failed on in one call, for one reason."""

    reward: str
    reason: Reason
    count: int
    detail: str

    def event(self) -> dict[str, Any]:
        """As fields of a run event."""
        return {
            "reward": self.reward,
            "reason": self.reason,
            "completions": self.count,
            "detail": self.detail,
        }


@dataclass(slots=True)
class RewardScores:
    """What the rewards said about N completions.

    ``values``: (N, K) float32, NaN where unscored. ``metrics``: what rewards logged, averaged over
    their calls to ``log_metric``. ``extras``: what they logged per completion with ``log_extra``.
    ``seconds``: time by reward.
    """

    names: tuple[str, ...]
    values: Tensor
    failures: list[Failure] = field(default_factory=list[Failure])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    extras: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def failed(self) -> Tensor:
        """(K,) int64: completions that each reward failed on; a returned None is no failure.
        Sum it over the ranks before it goes to :class:`FailureWatch`."""
        counts = dict.fromkeys(self.names, 0)
        for failure in self.failures:
            counts[failure.reward] += failure.count
        return torch.tensor(list(counts.values()), dtype=torch.int64)


class Reward:
    """A loaded reward. Raises ConfigError where the function or a parameter does not exist."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.name = config.title
        self.function: Callable[..., Any] = content.load(config.path)
        _check_params(config, self.function)
        self.guard = Guard(self.function, config.timeout_s)

    def describe(self) -> dict[str, Any]:
        """What the run record keeps: the spec and the hash of the file behind it."""
        file = content.find(self.config.path.rpartition(":")[0])
        reason = wrong_on_purpose(self.config)
        return {
            "name": self.name,
            "path": self.config.path,
            "file": str(file.resolve()),
            "sha256": content.sha256(file),
            "weight": self.config.weight,
            "params": self.config.params,
            **({} if reason is None else {"wrong_on_purpose": reason}),
        }


def wrong_on_purpose(config: RewardConfig) -> str | None:
    """Why a reward is known to pay for the wrong thing, where its file says so; see
    :mod:`mmemo.rewards.validate`."""
    module = content.load_module(config.path.rpartition(":")[0])
    ask = getattr(module, "wrong_on_purpose", None)
    return None if ask is None else ask(config.params)


class RewardSet:
    """The rewards of a run, in the order of their configs.

    Raises:
        ConfigError: a name is given twice, or a function or parameter does not exist.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self.rewards = [Reward(config) for config in configs]
        self.names = tuple(loaded.name for loaded in self.rewards)
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"two rewards are called '{name}'; give one of them a 'name'")
        self.weights = torch.tensor([config.weight for config in configs], dtype=torch.float32)

    def score(
        self,
        prompts: Sequence[Chat],
        completions: Sequence[Chat],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        trainer_state: Any = None,
        skip: Collection[str] = (),
    ) -> RewardScores:
        """Ask every reward about N completions. Never raises for what a reward does.

        Async rewards run beside the others; plain ones run one after the other.

        Args:
            columns: name -> N values.
            trainer_state: an object with ``global_step`` and ``max_steps``, as TRL passes it.
            skip: rewards that are not asked; their completions are unscored, without failure.
        """
        number = len(completions)
        scores = RewardScores(self.names, torch.full((number, len(self.names)), torch.nan))
        asked = [(k, one) for k, one in enumerate(self.rewards) if one.name not in skip]
        pending: dict[int, Any] = {}
        logs: dict[int, _Log] = {}
        for k, loaded in sorted(asked, key=lambda item: not item[1].guard.is_async):
            logs[k] = _Log()
            arguments = {
                "prompts": list(prompts),
                "completions": list(completions),
                "completion_ids": list(completion_ids),
                **{name: list(values) for name, values in columns.items()},
                "trainer_state": trainer_state,
                "log_metric": logs[k].metric,
                "log_extra": logs[k].extra,
                **loaded.config.params,
            }
            pending[k] = loaded.guard.start(arguments)
            if not loaded.guard.is_async:
                self._collect(scores, k, loaded, pending.pop(k), number)
        for k, waiting in pending.items():
            self._collect(scores, k, self.rewards[k], waiting, number)
        for k, log in sorted(logs.items()):
            log.add_to(scores, self.names[k], number)
        return scores

    def _collect(
        self, scores: RewardScores, k: int, loaded: Reward, waiting: Any, number: int
    ) -> None:
        values, failures = read_values(loaded.name, loaded.guard.wait(waiting), number)
        scores.values[:, k] = torch.tensor(values, dtype=torch.float32)
        scores.failures += failures
        scores.seconds[loaded.name] = time.monotonic() - waiting.started


def read_values(name: str, outcome: Outcome, number: int) -> tuple[list[float], list[Failure]]:
    """N floats, NaN for unscored, and what went wrong, from what a reward returned.

    Anything that converts to a finite float counts as a number, booleans and tensors of one element
    too; text does not.
    """
    nothing = [math.nan] * number
    if outcome.problem is not None:
        return nothing, [Failure(name, outcome.problem, number, outcome.detail)]
    try:
        if isinstance(outcome.value, str | bytes | Mapping):
            raise TypeError
        returned: list[Any] = list(outcome.value)
    except Exception:  # an iterator of the user's may raise anything
        kind = type(cast("object", outcome.value)).__name__
        return nothing, [Failure(name, "not_a_list", number, f"returned {kind}")]
    if len(returned) != number:
        detail = f"returned {len(returned)} values for {number} completions"
        return nothing, [Failure(name, "wrong_length", number, detail)]
    found: dict[Reason, list[str]] = defaultdict(list)
    values: list[float] = []
    for value in returned:
        number_or_none, reason = _number(value)
        values.append(math.nan if number_or_none is None else number_or_none)
        if reason is not None:
            found[reason].append(f"returned {value!r}"[:300])
    return values, [
        Failure(name, reason, len(details), details[0]) for reason, details in found.items()
    ]


class FailureWatch:
    """Stops a run in which a reward fails too often. Feed it the same counts on every rank."""

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self._configs = list(configs)
        self._windows = [deque[tuple[int, int]](maxlen=one.failure_window) for one in configs]

    def update(self, failed: Sequence[int] | Tensor, asked: int) -> None:
        """Take in one step: (K,) failed completions out of ``asked`` over all ranks.

        Raises:
            TrainingError: names the reward whose failures exceed its share.
        """
        for config, window, count in zip(self._configs, self._windows, failed, strict=True):
            window.append((int(count), asked))
            share = sum(bad for bad, _ in window) / max(1, sum(total for _, total in window))
            if share > config.max_failure_share:
                raise TrainingError(
                    f"reward '{config.title}' failed on {share:.0%} of the completions in the last "
                    f"{len(window)} steps, more than max_failure_share "
                    f"{config.max_failure_share:.0%}; the run record says why"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"windows": [[list(pair) for pair in window] for window in self._windows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        for window, pairs in zip(self._windows, state["windows"], strict=True):
            window.clear()
            window.extend((int(bad), int(total)) for bad, total in pairs)


def columns_of(sample: Sample) -> dict[str, Any]:
    """The columns of one row that rewards see: its truth and everything passed through.

    The trainer adds nothing to them but repeats each row's for its G completions.
    """
    truth = sample.truth
    return {
        "sample_id": sample.sample_id,
        "label": truth.label,
        "labels": list(truth.labels),
        "aus": dict(truth.aus),
        "cues": {kind: list(texts) for kind, texts in truth.cues.items()},
        "modality_labels": dict(truth.modality_labels),
        "conflict": truth.conflict,
        "transcript": sample.transcript,
        "difficulty": sample.difficulty,
        "group": dict(sample.group),
        **sample.columns,
    }


def columns_asked_for(function: Callable[..., Any]) -> set[str]:
    """The columns that a reward cannot be called without."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in _GIVEN
    }


def prompt_of(sample: Sample) -> list[dict[str, str]]:
    """A row's prompt as rewards see it: messages whose text holds the media placeholders."""
    return [{"role": turn.role, "content": turn.text} for turn in sample.prompt]


class _Log:
    """What one call logs. Kept apart, so that an abandoned call can no longer add to the run's."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extras: dict[str, list[Any]] = defaultdict(list)

    def metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras[column] += list(values)

    def add_to(self, scores: RewardScores, reward: str, number: int) -> None:
        for name, values in list(self.metrics.items()):
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                scores.metrics[f"{reward}/{name}"] = sum(finite) / len(finite)
        for name, values in list(self.extras.items()):
            if len(values) == number:
                scores.extras[f"{reward}/{name}"] = values


def _number(value: Any) -> tuple[float | None, Reason | None]:
    if value is None:
        return None, None
    if isinstance(value, str | bytes):
        return None, "not_a_number"
    try:
        number = float(value)
    except Exception:  # whatever a user's object raises
        return None, "not_a_number"
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return None, "not_finite"
    return number, None


def _check_params(config: RewardConfig, function: Callable[..., Any]) -> None:
    """Every parameter must be one of the function's own; ``**_`` would swallow a mistyped one."""
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in _GIVEN
    ]
    for name in config.params:
        if name not in known:
            guess = nearest(name, known)
            hint = f"did you mean '{guess}'?" if guess else f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"{config.path} has no parameter '{name}'; {hint}")
