"""Seconds and memory of a preference step: the gain from encoding each clip once and computing
each prompt once, and a comparison with TRL's own trainer.

    python benchmarks/dpo_step.py [--rounds 5] [--width 256] [--layers 6] [--prompt 512] ...
    python benchmarks/dpo_step.py --shape A [--rounds 3]

The setting is plain DPO with one pair per step, a live reference (the adapter switched off), LoRA
of rank 16, float32 and one thread. A step is what mmemo's loop does, from the batch to the
optimizer.

Without ``--shape`` there is one process with the composed model of ``grpo_update.py``, a prompt of
P tokens and answers of C tokens: first a chosen answer with one rejected answer, then with two.
``ours`` encodes the clip once, and policy and reference score all answers after one copy of the
prompt. ``baseline`` is the same model with a separate pass for each answer, which begins with the
clip: four encodings and four copies of the prompt for a pair of two answers. The ``limit`` is the
ratio of the language model's tokens, K(P + C) / (P + KC) with K answers; the encoders are so small
that their part, ``encoding``, is negligible. The script prints one JSON line for each K.

With ``--shape`` the model is the tiny Qwen2.5-VL of ``tiny_vlm.py``, with four images of 128
tokens each, a question, and two answers of C = 64 tokens. ``ours`` runs the vision encoder once
per step, without a feature store. ``stored`` has the features and the reference's
log-probabilities on disk, as a run with mmemo's defaults has. ``baseline`` is
``trl.DPOTrainer.train``. Each run is a process of its own, and the arms alternate. The ``limit``
is the ratio of floating-point operations of linear layers (without attention and adapters; a
backward pass costs as much as a forward pass, because the weights are frozen). TRL runs the vision
encoder four times and two copies of the prompt through policy, reference and backward. Where there
is no Triton, it also runs the vocabulary head on all tokens of both sequences. The script prints
one JSON line that also holds ``stored`` against the baseline.

All numbers are medians of alternating runs. ``ratio`` is by the clock and ``cpu_ratio`` by
computing time, which other work on the machine disturbs less. ``peak_mb`` is the peak resident
memory of a process, and ``memory_share`` ours divided by theirs. ``step_mb`` and ``step_share``
are the same for what the steps add to the memory before the first step; the rest is Python, its
libraries and the model, which both arms have. The adapters are not freshly initialised, so that
the losses of the first step, ``losses``, are informative; the script ends with an error if they
are not equal to 1e-4.
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

ARMS = ("ours", "baseline", "stored")


def run_ours(shape: str, steps: int, folder: Path, *, stored: bool) -> tuple[Watch, int]:
    import dpo_passes

    from mmemo.data.sample import MediaRef, Sample, Turn
    from mmemo.models.adapters.lora import unwrap

    loaded = load_ours(shape, folder)
    source = Pictures(unwrap(loaded.model), cached=stored)
    sample = Sample("a", (Turn("user", f"<video>{QUESTION}"),), {"video": MediaRef("a")})
    answers = [answer_text(loaded.processor.tokenizer, seed) for seed in (1, 2)]
    references = dpo_passes.open_references(folder) if stored else None
    data, objective = dpo_passes.make_data(loaded, sample, answers, source, references=references)
    length = data.measured[0].longest

    def fill(loop: Any) -> None:
        if stored:
            dpo_passes.store_reference(data, objective, loop)

    return run_loop(loaded, objective, data, folder, steps, fill), length


def run_baseline(shape: str, steps: int, folder: Path) -> tuple[Watch, int]:
    from tiny_vlm import make_tokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = make_tokenizer(8 * SHAPES[shape][0])
    good, bad = ([{"role": "assistant", "content": answer_text(tokenizer, n)}] for n in (1, 2))
    prompt = [{"role": "user", "content": QUESTION}]
    row: dict[str, Any] = {"prompt": prompt, "chosen": good, "rejected": bad}
    return run_trl(DPOTrainer, DPOConfig, row, shape, folder, steps)


def limits(shape: str, tokens: int) -> dict[str, float]:
    """Operations of TRL's step to those of each of our arms."""
    width, layers = SHAPES[shape]
    lm, head = layers * 16 * width**2, 8 * width**2
    # The policy's forward and backward and the reference's forward; heads once more in the
    # backward pass, which computes the logits again.
    theirs = 4 * tower_cost() + 3 * lm * 2 * tokens + 4 * head * 2 * (tokens - 1)
    ours = lm * (tokens + ANSWER) + head * 2 * ANSWER
    return {"ours": theirs / (tower_cost() + 3 * ours), "stored": theirs / (2 * ours)}


def against_trl(options: argparse.Namespace) -> None:
    given = (options.shape, 1 + options.steps)
    if options.child == "baseline":
        child(lambda folder: run_baseline(*given, folder))
        return
    if options.child:
        child(lambda folder: run_ours(*given, folder, stored=options.child == "stored"))
        return
    found = measure(__file__, ARMS, options.shape, options.rounds or 3, options.steps)
    losses = check_same_work(found)
    tokens = found["ours"][0]["tokens"]
    highest = limits(options.shape, tokens)
    result = {
        **compare(found, "ours", highest["ours"]),
        "stored": compare(found, "stored", highest["stored"]),
        "losses": losses,
        "tokens": tokens,
        "shape": options.shape,
        "rounds": options.rounds or 3,
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], help="against TRL's trainer")
    parser.add_argument("--rounds", type=int, help="of each arm; 3 with --shape, else 5")
    parser.add_argument("--steps", type=int, default=4, help="that count, with --shape")
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512, help="P")
    parser.add_argument("--answer", type=int, default=64, help="C")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape:
        against_trl(options)
    else:
        import dpo_passes

        dpo_passes.main(options, options.rounds or 5)


if __name__ == "__main__":
    main()
