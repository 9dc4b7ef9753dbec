"""Seconds and memory of an SFT step, compared with TRL's own trainer.

    python benchmarks/sft_step.py --shape A [--rounds 3]

Both train the same random Qwen2.5-VL (``tiny_vlm.py``) on the same row: four images of 128 tokens
each, a question, and an answer of C = 64 tokens, which alone is learned. The language model has
LoRA of rank 16 and the vision encoder is frozen; the setting is float32, one thread, no gradient
checkpointing, one row per step.

``ours`` is what mmemo's loop does with :class:`mmemo.train.sft.SftObjective` without a feature
store: images to patches and the vision encoder in every step. ``cached`` is the same with stored
features, as in any run with a store. ``baseline`` is ``trl.SFTTrainer.train``.

The ``limit`` is the ratio of floating-point operations of linear layers (without attention and
adapters; a backward pass costs as much as a forward pass, because the weights are frozen). Both
sides compute one sequence forward and backward. TRL runs the vision encoder in each step and,
where there is no Triton, the vocabulary head on all tokens of the sequence, twice forward and once
backward. Here the head is computed at the positions that predict a token of the answer, once
forward and once backward.

The script prints one JSON line with medians of the steps. ``ratio`` is by the clock and
``cpu_ratio`` by computing time, which other work on the machine disturbs less. ``peak_mb`` is the
peak resident memory of a process, and ``memory_share`` ours divided by theirs. ``step_mb`` and
``step_share`` are the same for what the steps add to the memory before the first step. ``cached``
holds all of this for that arm. The script ends with an error if the losses of the first step
(``losses``), whose weights are the same, are not equal to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from timing import Watch, check_same_work, child, compare, measure, run_loop, run_trl
from tiny_vlm import ANSWER, QUESTION, SHAPES, Pictures, answer_text, load_ours, tower_cost

ARMS = ("ours", "baseline", "cached")


def run_ours(shape: str, steps: int, folder: Path, *, cached: bool) -> tuple[Watch, int]:
    from mmemo.data.collate import Collator, measure_lengths
    from mmemo.data.curriculum import CurriculumConfig
    from mmemo.data.sample import MediaRef, Sample, Turn
    from mmemo.models.adapters.lora import unwrap
    from mmemo.train.sft import SftData, SftObjective

    loaded = load_ours(shape, folder)
    source = Pictures(unwrap(loaded.model), cached=cached)
    answer = answer_text(loaded.processor.tokenizer, 1)
    turns = (Turn("user", f"<video>{QUESTION}"), Turn("assistant", answer))
    rows = [Sample("a", turns, {"video": MediaRef("a")})]
    lengths = measure_lengths(rows, loaded.processor, outline=source.get)
    collator = Collator(loaded.processor, source)
    data = SftData(rows, lengths, collator, CurriculumConfig(), 1, 0)
    return run_loop(loaded, SftObjective(), data, folder, steps), lengths[0]


def run_baseline(shape: str, steps: int, folder: Path) -> tuple[Watch, int]:
    from tiny_vlm import make_tokenizer
    from trl import SFTConfig, SFTTrainer

    answer = answer_text(make_tokenizer(8 * SHAPES[shape][0]), 1)
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    return run_trl(SFTTrainer, SFTConfig, row, shape, folder, steps)


def limits(shape: str, tokens: int) -> dict[str, float]:
    """Operations of TRL's step to those of each of our arms."""
    width, layers = SHAPES[shape]
    lm, head = layers * 16 * width**2, 8 * width**2
    theirs = tower_cost() + 2 * lm * tokens + 3 * head * (tokens - 1)
    cached = 2 * lm * tokens + 2 * head * ANSWER
    return {"ours": theirs / (tower_cost() + cached), "cached": theirs / cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], default="A")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=4, help="that count, in each process")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = (options.shape, 1 + options.steps)
    if options.child == "baseline":
        child(lambda folder: run_baseline(*given, folder))
        return
    if options.child:
        child(lambda folder: run_ours(*given, folder, cached=options.child == "cached"))
        return
    found = measure(__file__, ARMS, options.shape, options.rounds, options.steps)
    losses = check_same_work(found)
    tokens = found["ours"][0]["tokens"]
    highest = limits(options.shape, tokens)
    result = {
        **compare(found, "ours", highest["ours"]),
        "cached": compare(found, "cached", highest["cached"]),
        "losses": losses,
        "tokens": tokens,
        "shape": options.shape,
        "rounds": options.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
