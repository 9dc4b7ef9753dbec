"""The loop on a toy: resume to the bit, steps that are not finite, stops, refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmemo import checkpoint
from mmemo.config import parse
from mmemo.errors import CheckpointError, ConfigError, TrainingError
from mmemo.run_log import RunRecord
from mmemo.train import dataloader
from mmemo.train.config import RunConfig
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks
from mmemo.train.metrics import MetricsLogger
from tests.train.toy import Model, Rows, digest, loop


class Died(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


def at(count: int, action: Any) -> Any:
    """A hook that acts on the ``count``-th batch made."""
    seen = 0

    def hook(batch: Batch) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            action(batch)

    return hook


def die(_: Batch) -> None:
    raise Died


def trained(folder: Path, **options: Any) -> str:
    made = loop(folder, **options)
    made.run()
    return digest(made.engine.model)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@given(count=st.integers(1, 12), rows=st.lists(st.integers(), max_size=40))
def test_shards_keep_every_row_once_and_in_order(count: int, rows: list[int]) -> None:
    cut = dataloader.shards(rows, count)
    assert [row for piece in cut for row in piece] == rows
    assert len(cut) == count
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


@given(
    rows=st.integers(1, 24),
    split=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (3, 2)]),
)
def test_ranks_see_the_same_pieces_however_a_step_is_split(
    rows: int, split: tuple[int, int]
) -> None:
    accumulation, ranks = split
    data = Rows()
    chosen = list(range(rows))
    made = [
        micro
        for rank in range(ranks)
        for micro in dataloader.micro_batches(data, chosen, accumulation, rank, ranks)
    ]
    assert sorted(m.index for m in made) == list(range(accumulation * ranks))
    real = [
        name
        for micro in sorted(made, key=lambda m: m.index)
        if not micro.padding
        for name in micro.batch["sample_ids"]
    ]
    assert real == [f"row-{row}" for row in chosen]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("batch", [1, 4, 6, 7, 11])
def test_a_run_cut_anywhere_ends_with_the_same_bits(
    tmp_path: Path, batch: int, prefetch: int
) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Died):
        trained(tmp_path / "cut", data=Rows(hook=at(batch, die)), run={"prefetch": prefetch})
    assert trained(tmp_path / "cut") == whole
    drop = ("seconds", "clips_", "tokens_")
    kept = [
        [{k: v for k, v in line.items() if not k.startswith(drop)} for line in lines(tmp_path / n)]
        for n in ("whole", "cut")
    ]
    assert kept[0] == kept[1]
    assert [line["step"] for line in kept[0]] == list(range(1, 13))


def test_a_finished_run_trains_nothing_when_started_again(tmp_path: Path) -> None:
    first = trained(tmp_path)
    made = loop(tmp_path, data=Rows(hook=at(1, die)), run={"prefetch": 0})
    made.run()
    assert digest(made.engine.model) == first


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    """Rows weigh differently, so a mean of micro-batch means would be off."""
    results: list[dict[str, torch.Tensor]] = []
    for accumulation in (1, 2, 4):
        made = loop(
            tmp_path / str(accumulation),
            model=Model(dropout=0.0),
            train={"gradient_accumulation_steps": accumulation},
        )
        made.run()
        results.append(made.engine.model.state_dict())
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


def state_of(made: Any) -> dict[str, bytes]:
    """Weights and optimizer state, to the bit."""
    found = {name: w.detach().numpy().tobytes() for name, w in made.engine.parameters.items()}
    for name, parameter in made.engine.parameters.items():
        for entry, value in made.engine.optimizer.state.get(parameter, {}).items():
            found[f"{entry}/{name}"] = value.numpy().tobytes()
    return found


def break_x(value: float) -> Any:
    def action(batch: Batch) -> None:
        batch["x"][1] = value

    return action


@pytest.mark.parametrize(
    ("action", "what"),
    [(break_x(float("nan")), "loss"), (break_x(float("inf")), "loss")],
    ids=["nan", "inf"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_rows(
    tmp_path: Path, action: Any, what: str
) -> None:
    made = loop(tmp_path, data=Rows(hook=at(5, action)), run={"prefetch": 0})
    states: list[dict[str, bytes]] = []
    step = made._step

    def watched(item: Any) -> None:
        before = state_of(made)
        step(item)
        states.append(before)

    made._step = watched  # type: ignore[method-assign]
    result = made.run()
    assert states[4] == states[5]
    assert states[5] != states[6]
    assert result.state.skipped == 1
    assert result.state.nonfinite == 0
    (event,) = RunRecord(tmp_path).events("nonfinite")
    rows = Rows().plan(0)[4]
    assert event["what"] == what
    assert event["sample_ids"] == [f"row-{rows[1]}"]
    assert all(
        torch.isfinite(torch.tensor(line["loss"])) for line in lines(tmp_path) if "loss" in line
    )


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(tmp_path: Path) -> None:
    made = loop(tmp_path, data=Rows(), run={"prefetch": 0}, train={"max_steps": 4})
    hurt = made.engine.model.body[0].weight  # type: ignore[index,union-attr]
    calls = 0

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * float("inf") if calls == 2 else gradient

    hurt.register_hook(poison)
    result = made.run()
    assert result.state.skipped == 1
    (event,) = RunRecord(tmp_path).events("nonfinite")
    assert event["what"] == "gradient"
    assert event["sample_ids"] == sorted(f"row-{row}" for row in Rows().plan(0)[1])


def test_too_many_in_a_row_stop_the_run_with_the_ids(tmp_path: Path) -> None:
    def always(batch: Batch) -> None:
        batch["y"][0] = float("nan")

    with pytest.raises(TrainingError, match=r"3 steps in a row.*row-\d+"):
        trained(tmp_path, data=Rows(hook=always), run={"max_nonfinite": 3})
    assert len(RunRecord(tmp_path).events("nonfinite")) == 3


def test_skips_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    def hook(batch: Batch) -> None:
        batch["y"][0] = float("nan")

    run = {"max_nonfinite": 5, "save_steps": 1}
    with pytest.raises(TrainingError):
        trained(tmp_path, data=Rows(hook=hook), run=run)
    with pytest.raises(TrainingError, match="5 steps in a row"):
        trained(tmp_path, data=Rows(hook=hook), run=run)
    assert len(RunRecord(tmp_path).events("nonfinite")) == 6  # the fifth is tried once more


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_ends_with_its_code_and_leaves_the_handlers_alone(
    tmp_path: Path, number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    hook = at(6, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        trained(tmp_path / "cut", data=Rows(hook=hook), run={"prefetch": 0, "save_steps": 100})
    assert caught.value.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "run the same command again" in " ".join(capsys.readouterr().out.split())
    found = checkpoint.latest_valid(tmp_path / "cut").checkpoint
    assert found is not None
    assert found.step == 5
    whole = trained(tmp_path / "whole", run={"save_steps": 100})
    assert trained(tmp_path / "cut", run={"save_steps": 100}) == whole


def test_an_edited_config_is_refused_with_the_difference_unless_forced(tmp_path: Path) -> None:
    with pytest.raises(Died):
        trained(tmp_path, data=Rows(hook=at(8, die)))
    with pytest.raises(
        ConfigError,
        match=r"train\.learning_rate: 0\.01 -> 0\.02.*resume_from_checkpoint=force",
    ):
        trained(tmp_path, train={"learning_rate": 0.02})
    with pytest.raises(ConfigError, match=r'inputs\.rows: "abc" -> "abd"'):
        trained(tmp_path, inputs={"rows": "abd"})
    trained(tmp_path, train={"learning_rate": 0.02}, run={"resume_from_checkpoint": "force"})
    (event,) = RunRecord(tmp_path).events("resume_forced")
    assert event["differences"] == ["config.train.learning_rate: 0.01 -> 0.02"]


def test_what_does_not_decide_the_weights_may_be_edited(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Died):
        trained(tmp_path / "cut", data=Rows(hook=at(8, die)))
    assert trained(tmp_path / "cut", run={"save_steps": 4, "logging_steps": 2}) == whole


def test_a_damaged_checkpoint_is_passed_over_and_recorded(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Died):
        trained(tmp_path / "cut", data=Rows(hook=at(8, die)))
    path = tmp_path / "cut" / "checkpoint-6" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    assert trained(tmp_path / "cut") == whole
    record = RunRecord(tmp_path / "cut")
    assert str(path) in record.events("checkpoint_refused")[0]["reason"]
    assert record.events("resume")[0]["step"] == 3


def test_no_room_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loop(tmp_path)
    save = made.checkpoints.save

    def later_full(state: Any) -> None:
        if state.step == 6:
            monkeypatch.setattr(made.engine, "bytes_to_save", lambda: 1 << 60)
        save(state)

    monkeypatch.setattr(made.checkpoints, "save", later_full)
    with pytest.raises(CheckpointError, match="checkpoint-6: could not be saved"):
        made.run()
    found = checkpoint.latest_valid(tmp_path).checkpoint
    assert found is not None
    assert found.step == 3


def test_the_limit_of_kept_checkpoints_holds(tmp_path: Path) -> None:
    trained(tmp_path, run={"save_total_limit": 2})
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-9",
    ]


def test_a_checkpoint_has_no_pickle_and_restores_every_random_state(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw(batch: Batch) -> None:
        batch["y"] += random.random() + float(np.random.rand()) + random.gauss(0, 1)

    run = {"prefetch": 0}
    whole = trained(tmp_path / "whole", data=Rows(hook=draw), run=run)
    both = at(8, die)

    def draw_and_die(batch: Batch) -> None:
        both(batch)
        draw(batch)

    with pytest.raises(Died):
        trained(tmp_path / "cut", data=Rows(hook=draw_and_die), run=run)
    random.seed(99)
    np.random.seed(99)
    assert trained(tmp_path / "cut", data=Rows(hook=draw), run=run) == whole
    last = tmp_path / "cut" / "checkpoint-12"
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".json"}


def test_an_error_in_the_background_thread_is_raised_here(tmp_path: Path) -> None:
    def wrong(_: Batch) -> None:
        raise ValueError("row 7 is odd")

    with pytest.raises(ValueError, match="row 7 is odd"):
        trained(tmp_path, data=Rows(hook=at(3, wrong)))


def test_evaluation_is_a_mean_over_rows_and_changes_nothing(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone")
    made = loop(tmp_path / "both", eval_data=Rows(batch_size=5), run={"eval_steps": 4})
    result = made.run()
    assert digest(made.engine.model) == alone
    data = Rows()
    model = made.engine.model.eval()
    with torch.no_grad():
        weight = 1.0 + torch.arange(24) % 3
        expected = ((model(data.x) - data.y).square() * weight).sum() / weight.sum()
    assert result.metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert [line["step"] for line in lines(tmp_path / "both") if "eval_loss" in line] == [4, 8, 12]


def test_trackers_get_what_the_metrics_file_gets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trained(tmp_path, run={"report_to": ["tensorboard"], "run_name": "toy"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "toy"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 13))
    written = [line["loss"] for line in lines(tmp_path)]
    assert [event.value for event in losses] == pytest.approx(written, rel=1e-4)


class Seen:
    def __init__(self) -> None:
        self.old, self.new = list[Any](), list[Any]()

    def restore(self, lines: Any) -> None:
        self.old = list(lines)

    def see(self, line: Any) -> None:
        self.new.append(line)


def test_a_watch_sees_every_line_once_and_changes_no_bit(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    seen, again = Seen(), Seen()
    with pytest.raises(Died):
        trained(tmp_path / "cut", data=Rows(hook=at(9, die)), run={"prefetch": 0}, watch=seen)
    assert trained(tmp_path / "cut", watch=again) == plain
    assert seen.old == []
    assert [line["step"] for line in again.old] == [1, 2, 3, 4, 5, 6]
    assert again.old == seen.new[:6]
    assert again.old + again.new == lines(tmp_path / "cut")


def test_only_the_main_rank_watches(tmp_path: Path) -> None:
    seen, other = Seen(), SimpleNamespace(is_main=False)
    meter = MetricsLogger(tmp_path, parse(RunConfig, {}), cast(Ranks, other), {}, seen)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    meter.rewind(1)
    meter.write(2, {"loss": 1.0})
    assert seen.old == seen.new == []


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    train = {"max_steps": 60, "learning_rate": 0.05}
    trained(tmp_path, model=Model(dropout=0.0), train=train, run={"save_steps": 1000})
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-6:]) < 0.2 * sum(losses[:6])


def test_nothing_trainable_and_half_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no part of the model is trainable"):
        loop(tmp_path, model=Model().requires_grad_(False))
    with pytest.raises(ConfigError, match=r"set train\.bf16=true"):
        loop(tmp_path, model=Model().bfloat16())
