"""Reward functions with TRL's signature, loaded by path and called so that none can stop a run.

    def name(prompts, completions, completion_ids, *, label, trainer_state, log_metric, **_)
        -> list[float | None]

Functions are plain or ``async``. Every column of a row is passed as a keyword argument with one
value per completion (:func:`columns_of`). ``None`` means "could not be scored" and is never taken
as 0. A reward that raises, exceeds its time limit, or returns anything but a finite number for a
completion leaves that completion unscored. Such failures are counted and logged, and stop the run
only above a configured share (:class:`FailureWatch`).

A function that has a parameter ``classes`` receives the labels of the data there
(:func:`label_set`), unless the config's ``params`` give others: one row does not tell which labels
an answer may name.

N completions, K rewards.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmemo import content
from mmemo.answers.label_sets import emotion_set
from mmemo.answers.messages import Chat
from mmemo.answers.parsing import base_form, labels_for, normalise
from mmemo.config import Config, nearest
from mmemo.console import console
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, TrainingError
from mmemo.rewards.time_limit import CallProblem, CallResult, Pending, TimeLimitedFunction

Reason = Literal[CallProblem, "not_finite", "not_a_number", "not_a_list", "wrong_length"]

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
# Scores become float32, in which a larger number would be infinite.
_LARGEST = torch.finfo(torch.float32).max


class RewardConfig(Config):
    """One reward of a run."""

    path: str
    """Path of the reward function: ``reward/outcome.py:outcome``."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Weight of the reward in the sum. A reward of weight 0 is logged but changes nothing."""
    name: str | None = Field(default=None, min_length=1)
    """Name of the reward in logs. None uses the file's name without ``.py``."""
    params: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments of the function. They take precedence over columns of the same name.
    ``classes`` may be the name of a registered label set, such as ``dfew`` (``mmemo labels``)."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit in seconds of one call, which scores all completions of a step."""
    max_failure_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when the reward failed on more than this share of the window's completions."""
    failure_window: int = Field(default=20, ge=1)
    """Number of steps over which that share is measured."""

    @field_validator("params")
    @classmethod
    def _name_classes(cls, params: dict[str, Any]) -> dict[str, Any]:
        # A reward would take the letters of a name for the classes.
        named = params.get("classes")
        if not isinstance(named, str):
            return params
        return params | {"classes": list(emotion_set(named).names)}

    @property
    def title(self) -> str:
        """The name in logs."""
        return self.name or Path(self.path.rpartition(":")[0]).stem


@dataclass(frozen=True, slots=True)
class Failure:
    """Completions on which one reward failed in one call, for one reason."""

    reward: str
    reason: Reason
    count: int
    detail: str

    def event(self) -> dict[str, Any]:
        """The fields of a run event."""
        return {
            "reward": self.reward,
            "reason": self.reason,
            "completions": self.count,
            "detail": self.detail,
        }


@dataclass(slots=True)
class RewardScores:
    """Scores of N completions.

    ``values``: (N, K) float32, NaN where unscored. ``metrics``: what rewards logged with
    ``log_metric``, averaged over its calls. ``extras``: what they logged per completion with
    ``log_extra``. ``seconds``: duration by reward.
    """

    names: tuple[str, ...]
    values: Tensor
    failures: list[Failure] = field(default_factory=list[Failure])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    extras: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def failed(self) -> Tensor:
        """(K,) int64 number of completions on which each reward failed; a returned None is no
        failure. Sum over the ranks before passing it to :class:`FailureWatch`."""
        counts = dict.fromkeys(self.names, 0)
        for failure in self.failures:
            counts[failure.reward] += failure.count
        return torch.tensor(list(counts.values()), dtype=torch.int64)


class Reward:
    """A loaded reward function.

    Raises:
        ConfigError: the function or one of its parameters does not exist.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.name = config.title
        self.function: Callable[..., Any] = content.load(config.path)
        _check_params(config, self.function)
        self.takes_classes = "classes" in inspect.signature(self.function).parameters
        self.limited = TimeLimitedFunction(self.function, config.timeout_s)

    def describe(self) -> dict[str, Any]:
        """The reward as the run record keeps it: its config and the hash of its file."""
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
    """Why a reward is known to pay for the wrong thing, if its file says so; None otherwise. See
    :mod:`mmemo.rewards.validate`."""
    module = content.load_module(config.path.rpartition(":")[0])
    ask = getattr(module, "wrong_on_purpose", None)
    return None if ask is None else ask(config.params)


class RewardSet:
    """The rewards of a run, in the order of their configs.

    Args:
        labels: the label set of the data (:func:`label_set`), which rewards that take ``classes``
            receive. Empty: they receive none, as in TRL's trainers.

    Raises:
        ConfigError: a name is given twice, or a function or parameter does not exist.
    """

    def __init__(self, configs: Sequence[RewardConfig], labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)
        self._outside: set[tuple[str, str]] = set()
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
        """Score N completions with every reward. Raises nothing that a reward raises.

        Plain rewards run one after the other, async ones concurrently with them.

        Args:
            prompts: N prompts.
            completions: N completions, as messages.
            completion_ids: N lists of token ids.
            columns: name -> N values.
            trainer_state: an object with ``global_step`` and ``max_steps``, as TRL passes it.
            skip: names of rewards that are not called. Their completions are unscored, which is
                no failure.
        """
        number = len(completions)
        scores = RewardScores(self.names, torch.full((number, len(self.names)), torch.nan))
        called = [(k, one) for k, one in enumerate(self.rewards) if one.name not in skip]
        pending: dict[int, Pending] = {}
        logs: dict[int, _Log] = {}
        # Async rewards start first, so that they wait for their servers while the plain ones
        # compute.
        for k, loaded in sorted(called, key=lambda item: not item[1].limited.is_async):
            logs[k] = _Log()
            # Each reward gets lists of its own, so that one that changes them changes no other's.
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
            if loaded.takes_classes and self.labels:
                arguments.setdefault("classes", self.labels)
            self._count_outside(loaded, arguments, logs[k])
            pending[k] = loaded.limited.start(arguments)
            if not loaded.limited.is_async:
                self._collect(scores, k, loaded, pending.pop(k), number)
        for k, call in pending.items():
            self._collect(scores, k, self.rewards[k], call, number)
        for k, log in sorted(logs.items()):
            log.add_to(scores, self.names[k], number)
        return scores

    def _count_outside(self, loaded: Reward, arguments: Mapping[str, Any], log: _Log) -> None:
        """Log the share of completions whose row has a label outside ``classes``, which such a
        reward leaves unscored, and warn once of each such label."""
        classes, labels = arguments.get("classes"), arguments.get("label")
        if not loaded.takes_classes or not classes or not labels:
            return
        outside = [one for one in labels if isinstance(one, str) and not is_class(one, classes)]
        if not outside:
            return
        log.metric("outside_classes", len(outside) / len(labels))
        for label in dict.fromkeys(outside):
            if (loaded.name, label) not in self._outside:
                self._outside.add((loaded.name, label))
                console.print(
                    f"warning: reward '{loaded.name}' does not score rows with the label "
                    f"'{label}', which is none of its classes; add it to the reward's classes, or "
                    "correct the rows",
                    style="yellow",
                    soft_wrap=True,
                )

    def _collect(
        self, scores: RewardScores, k: int, loaded: Reward, call: Pending, number: int
    ) -> None:
        values, failures = read_values(loaded.name, loaded.limited.wait(call), number)
        scores.values[:, k] = torch.tensor(values, dtype=torch.float32)
        scores.failures += failures
        scores.seconds[loaded.name] = time.monotonic() - call.started


def read_values(name: str, result: CallResult, number: int) -> tuple[list[float], list[Failure]]:
    """N scores, NaN for unscored, and the failures, from what a reward returned.

    Anything that converts to a finite float counts as a number, including booleans and tensors of
    one element; text does not.
    """
    unscored = [math.nan] * number
    if result.problem is not None:
        return unscored, [Failure(name, result.problem, number, result.detail)]
    try:
        # Text and mappings can be iterated too, but their characters and keys are no scores.
        if isinstance(result.value, str | bytes | Mapping):
            raise TypeError
        returned: list[Any] = list(result.value)
    except Exception:  # an iterator of the user's may raise anything
        kind = type(cast("object", result.value)).__name__
        return unscored, [Failure(name, "not_a_list", number, f"returned {kind}")]
    if len(returned) != number:
        detail = f"returned {len(returned)} values for {number} completions"
        return unscored, [Failure(name, "wrong_length", number, detail)]
    details: dict[Reason, list[str]] = defaultdict(list)
    values: list[float] = []
    for value in returned:
        score, reason = _number(value)
        values.append(math.nan if score is None else score)
        if reason is not None:
            # A value may be a whole tensor or text, of which the record keeps the beginning.
            details[reason].append(f"returned {value!r}"[:300])
    return values, [
        Failure(name, reason, len(listed), listed[0]) for reason, listed in details.items()
    ]


class FailureWatch:
    """Stops a run in which a reward fails too often. Every rank must pass it the same counts."""

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self._configs = list(configs)
        self._windows = [deque[tuple[int, int]](maxlen=one.failure_window) for one in configs]

    def update(self, failed: Sequence[int] | Tensor, asked: int) -> None:
        """Add one step.

        Args:
            failed: (K,) completions on which each reward failed, over all ranks.
            asked: completions of the step, over all ranks.

        Raises:
            TrainingError: a reward failed on more than its ``max_failure_share``.
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
        """Continue from :meth:`state_dict`."""
        for window, pairs in zip(self._windows, state["windows"], strict=True):
            window.clear()
            window.extend((int(bad), int(total)) for bad, total in pairs)


UNSCORED_STEPS = 20
"""Consecutive steps without a single score after which a run stops; a run that is shorter than
twice that stops after half of its steps."""


class UnscoredWatch:
    """Stops a run that trains on nothing, because no reward scores any completion. Every rank must
    pass it the same totals."""

    def __init__(self) -> None:
        self._since: int | None = None  # the first of the steps in a row without a score

    def update(self, totals: Tensor, step: int, total: int) -> None:
        """Add one step.

        Args:
            totals: (N,) combined rewards over all ranks; NaN where unscored.
            step: steps taken so far.
            total: steps of the whole run.

        Raises:
            TrainingError: nothing was scored in the last ``UNSCORED_STEPS`` steps, or in half of a
                run that is shorter than twice that.
        """
        if not bool(totals.isnan().all()):
            self._since = None
            return
        self._since = step if self._since is None else self._since
        dry = step + 1 - self._since
        # A generation may serve several steps, so the last call may come well before the last step.
        if dry >= min(UNSCORED_STEPS, (total + 1) // 2):
            raise TrainingError(
                f"no reward scored any completion in the last {dry} steps, so there is nothing to "
                "train on; give the rows the columns that the rewards read (rows without a "
                "'label', for example, leave reward/outcome.py unscored), or change the rewards"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._since = state["since"]


def label_set(samples: Iterable[Sample]) -> tuple[str, ...]:
    """The labels that the rows have, sorted; forms of one label, such as "happy" and "Happiness",
    count once."""
    return distinct_labels(sample.truth.label for sample in samples)


def distinct_labels(labels: Iterable[str | None]) -> tuple[str, ...]:
    """The distinct labels among ``labels``, sorted: of several forms of one, the first."""
    found: dict[str, str] = {}
    for label in sorted({label for label in labels if label is not None}):
        if normalise(label):
            found.setdefault(base_form(label), label)
    return tuple(found.values())


def is_class(label: str, classes: Sequence[str]) -> bool:
    """Whether ``label`` is a form of one of ``classes``."""
    return labels_for(label, tuple(classes))[1] is not None


def columns_of(sample: Sample) -> dict[str, Any]:
    """The columns of one row that rewards receive: its truth and all columns passed through.

    The trainer repeats each row's columns for its G completions and adds nothing.
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
        "media": _media_of(sample),
        **sample.columns,
    }


def _media_of(sample: Sample) -> dict[str, Any]:
    """Where the row's streams are: ``root``, the media root, and for each stream its path under it
    and its span in seconds."""
    spans = {
        name: {"path": ref.path, "start": ref.start, "end": ref.end}
        for name, ref in sample.media.items()
    }
    return {"root": sample.media_root, **spans}


def columns_asked_for(function: Callable[..., Any]) -> set[str]:
    """The columns that a reward function requires: its parameters without a default."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in _GIVEN
    }


def prompt_of(sample: Sample) -> list[dict[str, str]]:
    """A row's prompt as rewards receive it: messages whose text holds the media placeholders."""
    return [{"role": turn.role, "content": turn.text} for turn in sample.prompt]


class _Log:
    """What one call logs. Each call has its own, so that one that was abandoned after its time
    limit can no longer add to the run's log."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.extras: dict[str, list[Any]] = defaultdict(list)

    def metric(self, name: str, value: float) -> None:
        self.metrics[name].append(float(value))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.extras[column] += list(values)

    def add_to(self, scores: RewardScores, reward: str, number: int) -> None:
        # A copy, because a call that was abandoned may still add to it from its own thread.
        for name, values in list(self.metrics.items()):
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                scores.metrics[f"{reward}/{name}"] = sum(finite) / len(finite)
        for name, values in list(self.extras.items()):
            # Values of another number cannot be assigned to their completions.
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
    """Refuse params that the function does not name; its ``**_`` would swallow a mistyped one."""
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
