"""Seconds and memory of an SFT step with packed rows, compared with padded ones.

    python benchmarks/sft_packing.py --shape shuffled [--rounds 3]

Both arms train the same random Llama (256 wide, 6 layers, LoRA of rank 16) on the same rows, 16 in
each optimizer step: text of 16 to 480 tokens, half of them below 64, with an answer of 8 tokens. In
the shape ``shuffled`` a step's rows are drawn at random, as under ``curriculum.order: difficulty``;
in the shape ``grouped`` rows of similar length make a step, as by default
(``curriculum.group_by_length``). The setting is float32, one thread.

``ours`` packs the rows into sequences of at most 2048 tokens (``packing.max_tokens``).
``baseline`` pads the rows of a step to its longest. The ``limit`` is the ratio of the median step's
tokens, padding included: linear layers compute nothing else.

The script prints one JSON line with medians of the steps. ``ratio`` is by the clock and
``cpu_ratio`` by computing time, which other work on the machine disturbs less. It ends with an
error if the losses of the first step, whose weights are the same, are not equal to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from timing import Watch, check_same_work, child, compare, measure, run_loop

ARMS = ("ours", "baseline")
SHAPES = ("shuffled", "grouped")
ROWS, BUDGET = 16, 2048


def lengths_of(count: int) -> list[int]:
    """Words of each question: few are long, as in a mix of tasks."""
    drawn = random.Random(0)
    return [min(460, 8 + round(drawn.lognormvariate(3.6, 1.0))) for _ in range(count)]


def build(shape: str, steps: int, *, packed: bool, width: int = 256, layers: int = 6) -> Any:
    """The loaded model and its data."""
    from mmemo.config import parse
    from mmemo.data.collate import Collator, measure_lengths
    from mmemo.data.curriculum import CurriculumConfig
    from mmemo.data.sample import Sample, Turn
    from mmemo.models.build import ModelConfig, load_model, set_trainable
    from mmemo.train.sft import SftData

    words = ["joy", "fear", "calm", "rage", "hope", "envy"]
    drawn = random.Random(1)
    rows = [
        Sample(
            f"row-{number}",
            (
                Turn("user", " ".join(drawn.choices(words, k=length))),
                Turn("assistant", " ".join(drawn.choices(words, k=6))),
            ),
            {},
        )
        for number, length in enumerate(lengths_of(ROWS * steps))
    ]
    scratch = {"hidden_size": width, "layers": layers, "heads": 4, "vocab_size": 512}
    values = {"text": {"scratch": scratch}, "lora": {"r": 16, "lora_dropout": 0.0}}
    loaded = load_model(parse(ModelConfig, values), [t.text for row in rows for t in row.turns])
    set_trainable(loaded.model, ["lm"])
    lengths = measure_lengths(rows, loaded.processor)
    source: Any = None  # there are no clips
    collator = Collator(loaded.processor, source)
    plan = CurriculumConfig(group_by_length=shape == "grouped", longest_first=False)
    data = SftData(rows, lengths, collator, plan, ROWS, 0, max_tokens=BUDGET if packed else None)
    return loaded, data


def run(shape: str, steps: int, folder: Path, *, packed: bool, **sizes: int) -> tuple[Watch, int]:
    from mmemo.train.sft import SftObjective

    loaded, data = build(shape, steps, packed=packed, **sizes)
    watch = run_loop(loaded, SftObjective(), data, folder, steps)
    return watch, sum(data.lengths)


def limit(shape: str, steps: int) -> float:
    """Tokens of the median padded step to those of the median step's rows, without the first step,
    which warms up."""
    _, data = build(shape, 1 + steps, packed=False, width=8, layers=1)
    measured = [[data.lengths[row] for row in rows] for rows in data.plan(0)[1:]]
    padded = statistics.median(len(sizes) * max(sizes) for sizes in measured)
    return padded / statistics.median(map(sum, measured))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="shuffled")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=6, help="that count, in each process")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        packed = options.child == "ours"
        child(lambda folder: run(options.shape, 1 + options.steps, folder, packed=packed))
        return
    found = measure(__file__, ARMS, options.shape, options.rounds, options.steps)
    losses = check_same_work(found)
    result = compare(found, "ours", limit(options.shape, options.steps))
    print(json.dumps({**result, "losses": losses, "shape": options.shape}))


if __name__ == "__main__":
    main()
