"""Seconds and memory of the loss of many tokens, from hidden states to gradients.

    python benchmarks/logprob_memory.py --shape frozen [--rounds 3]

K = 1024 hidden states of width 512 and a vocabulary of 32768: cross-entropy, token accuracy, and
the gradient. In the shape ``frozen`` only the hidden states have a gradient, as with LoRA; in the
shape ``trained`` the head's weight has one too. The setting is float32, one thread.

``ours`` is :func:`mmemo.generation.token_scores.token_scores` as shipped, except that at most 2**21
logits (64 tokens) are held at once: the same share of all logits as the shipped limit is of 7 rows
of 1000 tokens with Qwen2.5's vocabulary. ``baseline`` holds the logits of all tokens
(``train.max_logits: 0``).

The ``limit`` is the ratio of floating-point operations. With a frozen head both sides multiply
twice, once for the logits and once for the gradient. With a trained head the baseline multiplies
three times, and ours four times, because the backward pass computes the logits again.

The script prints one JSON line with medians. ``ratio`` is by the clock and ``cpu_ratio`` by
computing time, which other work on the machine disturbs less. ``step_mb`` is the memory that the
steps add to what the process holds before the first, and ``step_share`` ours divided by theirs. It
ends with an error if the losses of the first step are not equal to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from timing import Watch, check_same_work, child, compare, measure

ARMS = ("ours", "baseline")
SHAPES = {"frozen": 1.0, "trained": 0.75}
"""Shape -> the limit of the ratio."""
TOKENS, WIDTH, WORDS, HELD = 1024, 512, 1 << 15, 1 << 21


def run(shape: str, steps: int, limit: int, sizes: tuple[int, int, int]) -> tuple[Watch, int]:
    import torch
    from torch import nn

    from mmemo.generation.token_scores import token_scores

    torch.manual_seed(0)
    tokens, width, words = sizes
    head = nn.Linear(width, words, bias=False).requires_grad_(shape == "trained")
    backbone: Any = SimpleNamespace(lm_head=head)
    hidden = torch.randn(tokens, width).requires_grad_()
    targets = torch.randint(words, (tokens,))
    watch = Watch()
    watch.begin()
    for _ in range(steps):
        hidden.grad = head.weight.grad = None
        out = token_scores(backbone, hidden, targets, correct=True, max_logits=limit)
        loss = -out.logps.mean()
        loss.backward()
        watch.see({"loss": float(loss.detach())})
    return watch, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], default="frozen")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=3, help="that count, in each process")
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        limit = HELD if options.child == "ours" else 0
        sizes = (TOKENS, WIDTH, WORDS)
        steps = 1 + options.steps
        made: Any = lambda folder: run(options.shape, steps, limit, sizes)  # noqa: E731
        child(made)
        return
    found = measure(__file__, ARMS, options.shape, options.rounds, options.steps)
    losses = check_same_work(found)
    result = compare(found, "ours", SHAPES[options.shape])
    print(json.dumps({**result, "losses": losses, "shape": options.shape}))


if __name__ == "__main__":
    main()
