"""Seconds of a GRPO step against the number of completions: a line whose slope is their cost
alone.

    python benchmarks/grpo_cost.py [--shape A] [--rounds 5] [--plot docs/grpo_cost.png]

The step is that of ``grpo_step.py`` (vision encoder, rollouts, reference, loss, backward,
optimizer; one thread, float32), with G = 2, 4, 8 and 16 completions of C = 64 tokens, alternating
in one process. A line is fitted to the medians. Its intercept is the cost of a step however many
completions there are (vision encoder, prompt, optimizer), and its slope the cost of one more
completion.

``alone`` is what a completion would cost if nothing but the completion were computed: the slope of
the same step with a prompt of one word and without images. The rest of the slope is attention to
the prompt, and the effect of the larger step on the processor's caches.

The script prints one JSON line. ``ours`` is the slope and ``baseline`` is ``alone``, with their
``ratio`` and the ``limit`` 1; ``share_of_limit`` is the share of it that is reached; ``fixed`` is
the intercept; ``worst`` is the largest distance of a median from the line, as a share of the
median; ``seconds`` are by G. Times are computing time, which other work on the machine disturbs
less than the clock. ``peak_mb`` is the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from grpo_step import Ours
from timing import peak_mb
from tiny_vlm import SHAPES

from mmemo import console

SIZES = (2, 4, 8, 16)


def measure(shape: str, rounds: int, folder: Path, *, bare: bool) -> dict[int, float]:
    """Median computing seconds of a step, by G."""
    made = {G: Ours(shape, folder / f"{bare}-{G}", group=G, bare=bare) for G in SIZES}
    times: dict[int, list[float]] = {G: [] for G in SIZES}
    for number in range(rounds + 1):  # the first warms up
        for G in SIZES if number % 2 else reversed(SIZES):
            began = time.process_time()
            made[G].step()
            took = time.process_time() - began
            if number:
                times[G].append(took)
            what = "bare" if bare else "whole"
            print(f"round {number}: {what} G={G} {took:.2f} s", file=sys.stderr, flush=True)
    return {G: statistics.median(found) for G, found in times.items()}


def line(seconds: dict[int, float]) -> tuple[float, float]:
    """Slope and intercept by least squares."""
    fit = statistics.linear_regression(list(seconds), list(seconds.values()))
    return fit.slope, fit.intercept


def plot(path: Path, shape: str, whole: dict[int, float], bare: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    for seconds, colour, name in (
        (whole, "tab:blue", "long prompt with images"),
        (bare, "tab:gray", "completions alone"),
    ):
        slope, fixed = line(seconds)
        axes.plot(list(seconds), list(seconds.values()), "o", color=colour)
        ends = [0, max(SIZES)]
        label = f"{name}: {fixed:.2f} s + {slope:.3f} s a completion"
        axes.plot(ends, [fixed + slope * G for G in ends], color=colour, label=label)
    axes.set(xlabel="completions of a prompt, G", ylabel="computing seconds of a step")
    axes.set(xlim=(0, None), ylim=(0, None), title=f"A GRPO step, shape {shape}")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], default="A")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="write the figure here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console.console.quiet = True  # the JSON line is all of standard output
    with tempfile.TemporaryDirectory() as folder:
        given: Any = (options.shape, options.rounds, Path(folder))
        whole, bare = (measure(*given, bare=bare) for bare in (False, True))
    slope, fixed = line(whole)
    alone = line(bare)[0]
    if options.plot:
        plot(options.plot, options.shape, whole, bare)
    result = {
        "ours": round(slope, 4),
        "baseline": round(alone, 4),
        "ratio": round(alone / slope, 3),
        "limit": 1.0,
        "share_of_limit": round(alone / slope, 3),
        "unit": "s/completion",
        "fixed": round(fixed, 3),
        "worst": round(max(abs(fixed + slope * G - t) / t for G, t in whole.items()), 3),
        "seconds": {str(G): round(t, 3) for G, t in whole.items()},
        "alone": {str(G): round(t, 3) for G, t in bare.items()},
        "peak_mb": round(peak_mb()),
        "shape": options.shape,
        "rounds": options.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
