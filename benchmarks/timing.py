"""Whole training steps, timed as mmemo's loop and as TRL's trainers take them.

Each run is a process of its own, and the arms alternate. A step of either side is timed from the
end of one step to the end of the next.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_vlm import images_only, lora, make_model, pictures, shake

Times = list[tuple[float, float]]
"""(wall, computing) seconds."""
Found = dict[str, list[dict[str, Any]]]
"""By arm, what each of its processes found."""
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
"""Of TRL's configs."""
TOLERANCE = 1e-4
"""How far the losses of the first step may be apart, in nats."""


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def between(marks: Times) -> Times:
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def peak_mb() -> float:
    """Of this process alone; a child's ``ru_maxrss`` begins at its parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


class Watch:
    """Notes the time at the end of each step, and losses. ``idle``: peak memory before the first
    step. It is a ``LineWatch`` of mmemo's loop, and makes a callback of TRL's."""

    def __init__(self) -> None:
        self.marks: Times = []
        self.losses: list[float] = []
        self.idle = 0.0

    def begin(self) -> None:
        self.idle = peak_mb()
        self.mark()

    def mark(self) -> None:
        self.marks.append(clock())

    def restore(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: no run goes on with another."""

    def see(self, line: Mapping[str, Any]) -> None:
        self.mark()
        self.losses.append(line["loss"])

    def callback(self) -> Any:
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                watch.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                watch.mark()

        return Callback()


def run_loop(
    loaded: Any,
    objective: Any,
    data: Any,
    folder: Path,
    steps: int,
    before: Callable[[Any], None] | None = None,
) -> Watch:
    """Steps of mmemo's loop, in which one thread does everything. ``before`` gets the loop."""
    from mmemo.config import parse
    from mmemo.run_log import RunRecord
    from mmemo.train.config import RunConfig, TrainConfig
    from mmemo.train.resume import Identity
    from mmemo.train.trainer import Trainer

    watch = Watch()
    train = {"learning_rate": 1e-5, "max_steps": steps, "per_device_train_batch_size": 1}
    run = {"use_cpu": True, "threads": 1, "prefetch": 0, "logging_steps": 1}
    loop = Trainer(
        model=loaded.model,
        objective=objective,
        data=data,
        folder=folder,
        train=parse(TrainConfig, train),
        run=parse(RunConfig, run),
        identity=Identity({}),
        record=RunRecord(folder),
        watch=watch,
    )
    if before is not None:
        before(loop)
    watch.begin()
    loop.run()
    return watch


def run_trl(
    trainer: type[Any],
    config: type[Any],
    row: Mapping[str, Any],
    shape: str,
    folder: Path,
    steps: int,
) -> tuple[Watch, int]:
    """Steps of one of TRL's trainers on ``row`` and the images, and the tokens of a sequence."""
    from datasets import Dataset

    watch, tokens = Watch(), list[int]()
    model, tokenizer = make_model(shape)

    class Quiet(trainer):
        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens.append(int(inputs["attention_mask"][0].sum()))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            watch.losses.append(float(loss.detach()))
            return loss

    given = {**OPTIONS, "per_device_train_batch_size": 1, "max_steps": steps, "max_length": None}
    made = Quiet(
        model=model,
        args=config(output_dir=str(folder), **given),
        train_dataset=with_images(Dataset.from_list([{**row, "images": None}] * 8)),
        processing_class=images_only(tokenizer),
        peft_config=lora(),
        callbacks=[watch.callback()],
    )
    shake(made.model)
    made.train()
    return watch, tokens[0]


def with_images(data: Any) -> Any:
    """Each row with the images as they are: a data set would write them as PNG and read them again
    in each step."""
    images = pictures()

    def shown(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**rows, "images": [images] * len(next(iter(rows.values())))}

    data.set_transform(shown)
    return data


def child(run: Callable[[Path], tuple[Watch, int]]) -> None:
    """What an arm's process does: prints the times of all steps but the first, which warms up."""
    import torch

    from mmemo import console

    torch.set_num_threads(1)
    console.console.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        watch, tokens = run(Path(folder))
    times = between(watch.marks)[1:]
    found = {"times": times, "peak": peak_mb(), "idle": watch.idle, "tokens": tokens}
    print(json.dumps({**found, "losses": watch.losses}))


def measure(script: str, arms: Sequence[str], shape: str, rounds: int, steps: int) -> Found:
    """Run ``script --child ARM`` for each arm, so often."""
    # Freed blocks go back at once, so that the peak is what was needed and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: Found = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            command = [sys.executable, script, "--shape", shape, "--child", arm]
            command += ["--steps", str(steps)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm} failed:\n{done.stderr[-4000:]}")
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            took = ", ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in found[arm][-1]["times"])
            print(f"round {number + 1}: {arm} {took} s", file=sys.stderr, flush=True)
    return found


def middle(found: Found, arm: str, at: int) -> float:
    """Median seconds of the steps: 0 by the clock, 1 of computing."""
    return statistics.median(x[at] for one in found[arm] for x in one["times"])


def compare(found: Found, arm: str, highest: float) -> dict[str, Any]:
    """``arm`` against the baseline; ``highest``: the limit of their ratio."""
    wall, cpu = (middle(found, "baseline", at) / middle(found, arm, at) for at in (0, 1))
    most = {
        key: {one: statistics.median(x[key] for x in found[one]) for one in (arm, "baseline")}
        for key in ("peak", "idle")
    }
    peaks = {one: round(peak) for one, peak in most["peak"].items()}
    steps = {one: round(peaks[one] - most["idle"][one]) for one in peaks}
    return {
        arm: round(middle(found, arm, 0), 2),
        "baseline": round(middle(found, "baseline", 0), 2),
        "ratio": round(wall, 2),
        "limit": round(highest, 2),
        "share_of_limit": round(wall / highest, 3),
        "unit": "s/step",
        "cpu": {one: round(middle(found, one, 1), 2) for one in (arm, "baseline")},
        "cpu_ratio": round(cpu, 2),
        "cpu_share_of_limit": round(cpu / highest, 3),
        "peak_mb": peaks,
        "memory_share": round(peaks[arm] / peaks["baseline"], 3),
        "step_mb": steps,
        "step_share": round(steps[arm] / max(steps["baseline"], 1), 3),
    }


def check_same_work(found: Found) -> dict[str, float]:
    """Each arm's loss in the first step.

    Raises:
        SystemExit: sequences or losses differ, so that not the same is compared.
    """
    firsts = {arm: runs[0] for arm, runs in found.items()}
    losses = {arm: one["losses"][0] for arm, one in firsts.items()}
    tokens = {arm: one["tokens"] for arm, one in firsts.items()}
    if max(losses.values()) - min(losses.values()) > TOLERANCE or len(set(tokens.values())) > 1:
        raise SystemExit(f"the arms do different work: losses {losses}, tokens {tokens}")
    return losses
