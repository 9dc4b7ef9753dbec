"""The training loop: steps, evaluation, checkpoints, resume and stops, for any objective.

An optimizer step sums the losses of the micro-batches of all ranks and accumulation steps and
divides by the sum of their weights. How a step is split over ranks therefore changes nothing but
rounding, which a mean of per-micro-batch means does not achieve. A loss that is not finite makes
the step's gradient norm NaN on every rank, and a step whose norm is not finite changes no weight.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmemo.console import Bar, console, progress
from mmemo.errors import RolloutError, TrainingError
from mmemo.run_log import RunRecord
from mmemo.train import resume, runtime
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.dataloader import (
    Batch,
    Data,
    MicroBatch,
    OptimizerStep,
    micro_batches,
    optimizer_steps,
    prefetch,
)
from mmemo.train.distributed import Ranks, StopRequest
from mmemo.train.engine import Engine, PlainEngine, Update, learning_rates
from mmemo.train.expert_balance import balance_of, count_prompts
from mmemo.train.metrics import LineWatch, MetricsLogger, Ratio, Sums, means
from mmemo.train.resume import CheckpointManager, Identity, TrainerState

__all__ = [
    "Identity",
    "Loss",
    "Objective",
    "Preparing",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "add_gradient",
    "take_step",
]


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro-batch of B rows.

    ``rows``: (B,) with gradient; the step minimises their sum divided by the weights of all of its
    micro-batches. ``metrics``: name -> (sum, count), without gradient. ``statistics``: the same of
    the step as a whole, which count even if the micro-batch is padding.
    """

    rows: Tensor
    metrics: Mapping[str, Ratio] = field(default_factory=dict[str, Ratio])
    statistics: Mapping[str, Ratio] = field(default_factory=dict[str, Ratio])


class Objective(Protocol):
    """What a stage trains on: the likelihood of answers, preferences, rewards."""

    def weight(self, batch: Batch) -> float:
        """What the micro-batch adds to the step's normaliser, such as its number of answer tokens.
        It is read from the batch alone, before any forward pass."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a micro-batch that is on the model's device."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """An :class:`Objective` that makes a step's batches with the current model, as GRPO generates
    its completions, and that has a state of its own.

    ``boundary``: for how many steps of an epoch what it made is used. Checkpoints and stops wait
    until it is used up, so that a resumed run makes the same again.
    """

    boundary: int

    def prepare(self, engine: Engine, item: OptimizerStep, step: int, total: int) -> OptimizerStep:
        """The step number ``step`` of ``total`` with the batches to train on. Called on every
        rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after ``step`` steps from a :meth:`state_dict`, which is empty at the start of a
        run."""
        ...


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended. ``metrics`` holds the last value of each logged and evaluated metric."""

    state: TrainerState
    metrics: Mapping[str, float]


def add_gradient(engine: Engine, objective: Objective, batch: Batch, share: float) -> Loss:
    """Forward and backward pass of one micro-batch.

    Args:
        share: what its loss is multiplied by, 1 / (the weights of the whole step).
    """
    with engine.autocast():
        out = objective(engine.model, batch)
    total = out.rows.sum()
    # An infinite loss can have a finite gradient. NaN in its place makes every rank skip the step.
    poison = torch.where(torch.isfinite(total), 1.0, float("nan"))
    engine.backward(total * (poison * share))
    return out


def take_step(
    engine: Engine, objective: Objective, batches: Sequence[Batch], learning_rate: float
) -> Update:
    """One optimizer step of a single process, on batches that are on the model's device: the core
    of the loop, for benchmarks and tests."""
    weight, balance = sum(objective.weight(batch) for batch in batches), balance_of(engine.model)
    if balance is not None:
        balance.begin(weight, sum(map(count_prompts, batches)))
    for batch in batches:
        add_gradient(engine, objective, batch, 1.0 / max(weight, 1e-12))
        if balance is not None:
            balance.keep()
    update = engine.update(learning_rate)
    if balance is not None:
        balance.finish(update.applied)
    return update


class Trainer:
    """Trains ``model`` on ``data`` in ``folder``; call :meth:`run` once."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        data: Data,
        folder: Path,
        train: TrainConfig,
        run: RunConfig,
        identity: Identity,
        record: RunRecord,
        ranks: Ranks | None = None,
        eval_data: Data | None = None,
        stop: StopRequest | None = None,
        watch: LineWatch | None = None,
    ) -> None:
        """
        Args:
            identity: what a resumed run must have in common with the one that made the checkpoint.
            record: the run's event log.
            eval_data: rows to report the loss of, every ``run.eval_steps`` and at the end.
            stop: a stop request whose signal handlers are set already; None: one of its own.
            watch: reads the metrics as they are logged.
        """
        self.ranks = ranks or Ranks(cpu=run.use_cpu)
        self.objective, self.data, self.eval_data = objective, data, eval_data
        self._preparing = objective if isinstance(objective, Preparing) else None
        self.folder, self.train, self.config = folder, train, run
        self.identity, self.record = identity, record
        self.stop, self._stop_is_set = stop or StopRequest(), stop is not None
        self.state = TrainerState()
        self.metrics: dict[str, float] = {}
        runtime.prepare(train, run, self.ranks)
        if train.gradient_checkpointing:
            runtime.checkpoint_activations(model)
        resume.seed_all(train.seed)
        self.engine = self._engine(model)
        self.epoch_steps = len(data.plan(0))
        if self.epoch_steps == 0:
            raise TrainingError("there are no rows to train on; check data and curriculum.tiers")
        self.total = train.max_steps
        if self.total <= 0:
            self.total = math.ceil(train.num_train_epochs * self.epoch_steps)
        self.rate = learning_rates(train, self.total)
        self.checkpoints = CheckpointManager(folder, identity, run, self.engine, self.ranks, record)
        self.logger = MetricsLogger(folder, run, self.ranks, dict(identity.config), watch)
        self._window, self._norm = Sums(), float("nan")
        self._balance = balance_of(self.engine.model)

    def _engine(self, model: nn.Module) -> Engine:
        if self.config.deepspeed is None:  # as engine_kind says
            return PlainEngine(model, self.train, self.ranks)
        from mmemo.train.zero.engine import DeepSpeedEngine

        config: Any = getattr(model, "config", None)
        width = getattr(getattr(config, "get_text_config", lambda: None)(), "hidden_size", 1024)
        return DeepSpeedEngine(model, self.train, self.config.deepspeed, self.ranks, width)

    def run(self) -> TrainResult:
        """Train to the end, from the newest valid checkpoint if there is one.

        Raises:
            TrainingError: too many steps in a row were not finite.
            CheckpointError: a checkpoint could not be written, or does not fit the model.
            ConfigError: config or data changed since the checkpoint.
            RolloutError: a server gives no completions any more, with a checkpoint saved.
            SystemExit: 143 after SIGTERM and 130 after Ctrl-C, with a checkpoint saved.
        """
        self.state = self.checkpoints.resume() or TrainerState()
        if self._preparing is not None:
            self._preparing.restore(self.checkpoints.extra, self.state.step)
        if self._balance is not None:
            self._balance.load_state_dict(self.checkpoints.balance)
        self.logger.rewind(self.state.step)
        self.record.event(
            "train_start",
            identity=self.identity.saved,
            step=self.state.step,
            total=self.total,
            ranks=self.ranks.size,
            threads=torch.get_num_threads(),
            engine=self.engine.kind,
            device=str(self.ranks.device),
            **runtime.kernels(),
        )
        self.engine.model.train()
        bar = progress("training", self.total, done=self.state.step, unit="steps")
        with nullcontext() if self._stop_is_set else self.stop, bar as shown:
            self.stop.hold()
            try:
                self._steps(shown)
            finally:
                self.stop.hold(False)
                self.logger.close()
        self.record.event("train_done", state=asdict(self.state), metrics=self.metrics)
        return TrainResult(self.state, self.metrics)

    def _steps(self, bar: Bar) -> None:
        state, accumulation = self.state, self.train.gradient_accumulation_steps

        def make() -> Iterator[OptimizerStep]:
            where = (self.ranks.rank, self.ranks.size, state.epoch, state.batch)
            return optimizer_steps(self.data, accumulation, *where)

        self.logger.lap()
        due = False
        pin = self.ranks.device.type == "cuda"
        with prefetch(make, self.config.prefetch, pin=pin) as steps:
            while self.state.step < self.total:
                item = next(steps)
                self._step(item)
                bar.advance()
                step = self.state.step
                if step % self.config.logging_steps == 0 or step == self.total:
                    self._log(bar)
                every = self.config.eval_steps
                if self.eval_data and ((every and step % every == 0) or step == self.total):
                    self._evaluate(self.eval_data)
                # A save that falls between two boundaries is made at the next one.
                due = due or step % self.config.save_steps == 0
                # Always at the end, so that a finished run that is started again trains nothing.
                if step == self.total or (due and self._at_boundary()):
                    self._save()
                    due = False

    def _at_boundary(self) -> bool:
        # The last generation of an epoch may serve fewer steps.
        place = self.state.batch % self.epoch_steps
        return self._preparing is None or place % self._preparing.boundary == 0

    def _save(self, prepared: dict[str, Any] | None = None) -> None:
        """``prepared``: the objective's state, if it is not that of now."""
        if self._preparing is not None:
            state = self._preparing.state_dict() if prepared is None else prepared
            self.checkpoints.extra = state
        if self._balance is not None:
            self.checkpoints.balance = self._balance.state_dict()
        self.checkpoints.save(self.state)

    def _prepare(self, item: OptimizerStep) -> OptimizerStep:
        """The step with the batches that the objective makes for it. A stop must come before that:
        making them changes the objective's state, which is saved only after the step."""
        if self._preparing is None:
            return item
        if self.ranks.any(self.stop.signal is not None) and self._at_boundary():
            self._end_early()
        before = copy.deepcopy(self._preparing.state_dict())
        try:
            return self._preparing.prepare(self.engine, item, self.state.step, self.total)
        except RolloutError:
            # Raised on every rank at once, before a weight has changed: no step is lost.
            if self._at_boundary():
                self._save(before)
            raise

    def _step(self, item: OptimizerStep) -> None:
        item = self._prepare(item)
        # Known before any forward pass, so that each gradient is scaled once by the whole step's
        # weight.
        mine = [0.0 if m.padding else self.objective.weight(m.batch) for m in item.micro_batches]
        # The stop travels with the weights: all ranks stop at the same step, without another
        # collective.
        prompts = 0
        if self._balance is not None:
            prompts = sum(count_prompts(m.batch) for m in item.micro_batches if not m.padding)
        weight, stops, prompts = self.ranks.sum(
            [sum(mine), float(self.stop.signal is not None), float(prompts)]
        )
        if stops and self._preparing is None:
            self._end_early()
        step = self.state.step
        if self._balance is not None:
            self._balance.begin(weight, prompts)
        sums, finite = Sums(), list[tuple[Tensor, MicroBatch]]()
        for micro in item.micro_batches:
            resume.seed_micro_batch(self.train.seed, step, micro.index)
            rows = self._backward(micro, weight, sums)
            finite.append((rows, micro))
        update = self.engine.update(self.rate(step))
        if self._balance is not None:
            sums.add(self._balance.finish(update.applied, self.ranks))
        following = replace(self.state, step=step + 1, epoch=item.epoch, batch=item.batch + 1)
        if update.applied:
            self.state = replace(following, nonfinite=0)
            # Only here: the NaN of a skipped step would spoil the mean of the whole window.
            self._window.merge(sums)
            self._norm = update.norm
        else:
            self.state = replace(
                following,
                nonfinite=self.state.nonfinite + 1,
                skipped=self.state.skipped + 1,
            )
            self._record_skipped(finite)
        self.logger.tick()

    def _backward(self, micro: MicroBatch, weight: float, sums: Sums) -> Tensor:
        """Forward and backward pass of one micro-batch; (B,) True where a row's loss is finite."""
        batch = runtime.to_device(micro.batch, self.ranks.device)
        share = 0.0 if micro.padding else 1.0 / max(weight, 1e-12)
        out = add_gradient(self.engine, self.objective, batch, share)
        if self._balance is not None:
            self._balance.keep(not micro.padding)
        tokens = micro.batch.get("attention_mask")
        counted = {
            "loss": (out.rows.sum(), self.objective.weight(micro.batch)),
            "rows": (len(out.rows), 0),
            "tokens": (tokens.sum() if tokens is not None else 0, 0),
        }
        sums.add({**counted, **out.metrics}, keep=not micro.padding)
        sums.add(out.statistics)
        # A tensor, which is read only if the step is skipped: reading waits for the device.
        return torch.isfinite(out.rows.detach())

    def _record_skipped(self, finite: Sequence[tuple[Tensor, MicroBatch]]) -> None:
        """Record a skipped step with the ids of its rows; raise after too many in a row.

        The rows are those whose loss is not finite or, when all losses are and the gradient is not,
        all rows of the step.
        """
        every_id = [name for _, micro in finite for name in micro.batch["sample_ids"]]
        bad_ids = [
            name
            for rows, micro in finite
            for name, fine in zip(micro.batch["sample_ids"], rows.tolist(), strict=True)
            if not fine
        ]
        reports = self.ranks.all_gather_text(json.dumps([bad_ids, every_id]))
        gathered = [json.loads(report) for report in reports]
        what = "loss" if any(bad for bad, _ in gathered) else "gradient"
        ids = sorted({name for both in gathered for name in both[0 if what == "loss" else 1]})
        self.record.event(
            "nonfinite",
            step=self.state.step,
            what=what,
            sample_ids=ids,
            in_a_row=self.state.nonfinite,
        )
        if self.state.nonfinite >= self.config.max_nonfinite:
            raise TrainingError(
                f"the {what} was not finite in {self.state.nonfinite} steps in a row, most "
                f"recently with {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}; check these "
                "rows, or lower train.learning_rate"
            )

    def _log(self, bar: Bar) -> None:
        seconds, steps = self.logger.lap()
        sums = self._window.over(self.ranks)
        self._window = Sums()
        averages = means(sums)
        line = {
            "epoch": self.state.epoch + self.state.batch / self.epoch_steps,
            **averages,
            "learning_rate": self.rate(self.state.step - 1),
            "grad_norm": self._norm,
            "rows_per_step": sums.get("rows", (0.0, 0.0))[0] / max(steps, 1),
            "clips_per_second": sums.get("rows", (0.0, 0.0))[0] / seconds,
            "tokens_per_second": sums.get("tokens", (0.0, 0.0))[0] / seconds,
            "seconds_per_step": seconds / max(steps, 1),
            "seconds_left": (self.total - self.state.step) * seconds / max(steps, 1),
            "skipped_steps": float(self.state.skipped),
            **runtime.peak_memory(self.ranks.device),
        }
        self.metrics |= line
        self.logger.write(self.state.step, line)
        bar.note(f"loss {averages.get('loss', float('nan')):.4f}")

    def evaluate(self, data: Data) -> dict[str, float]:
        """Means of the objective's loss and metrics over ``data``, named ``eval_...``."""
        model, sums = self.engine.model, Sums()
        model.eval()
        with torch.no_grad(), self.engine.autocast():
            for rows in data.plan(0):
                for micro in micro_batches(data, rows, 1, self.ranks.rank, self.ranks.size):
                    out = self.objective(model, runtime.to_device(micro.batch, self.ranks.device))
                    counted = {"loss": (out.rows.sum(), self.objective.weight(micro.batch))}
                    sums.add({**counted, **out.metrics}, keep=not micro.padding)
        model.train()
        return {f"eval_{name}": value for name, value in means(sums.over(self.ranks)).items()}

    def _evaluate(self, data: Data) -> None:
        found = self.evaluate(data)
        self.metrics |= found
        self.logger.write(self.state.step, found)

    def _end_early(self) -> NoReturn:
        """Save, and end with the exit code of the signal that some rank received."""
        # The signal may have reached one rank only; the others have the code 0.
        code = max(int(text) for text in self.ranks.all_gather_text(str(self.stop.code)))
        self._save()
        self.record.event("stopped", step=self.state.step, code=code)
        if self.ranks.is_main:
            console.print(
                f"stopped and saved after step {self.state.step} of {self.total}; "
                "run the same command again to continue from there"
            )
        raise SystemExit(code)
