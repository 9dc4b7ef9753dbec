"""Seconds to decode with attention reallocation, compared with eager attention.

    python benchmarks/reallocation.py [--rounds 7] [--width 512] [--layers 8] [--prompt 1024] ...

The setting is one process, one thread, float32. A Llama with random weights continues a prompt of
P tokens, most of them video and audio, one token at a time for C tokens, from a cache. ``ours`` is
:func:`mmemo.models.attention.reallocation.reallocating` with the default config. ``baseline`` is
the same model with transformers' eager attention, which computes the same products. There are as
many query heads as key heads unless ``--keys`` says otherwise, because eager attention copies the
keys of shared heads and ours does not.

The ``limit`` is 1: no slower than eager attention, as if changing weights cost nothing.

The script prints one JSON line. ``ours`` and ``baseline`` are in seconds for C tokens (medians of
alternating runs) with their ``ratio`` (baseline / ours), ``limit`` and ``share_of_limit``.
``extra`` is the additional cost of ours as a share of the baseline, and ``allowed`` the most that
it may be. ``cpu_extra`` is by computing time, which other work on the machine disturbs less.
``recorded`` is ``cpu_extra`` with the attention mass of every layer recorded too, ``sdpa`` that of
torch's SDPA without any change, and ``off`` that of the baseline after the switch was on and off
again. ``peak_mb`` is the peak resident memory of a process that decodes once, and ``decode_mb``
what that added. ``changed`` says whether any logits changed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from mmemo.models.attention.reallocation import ReallocationConfig, reallocating
from mmemo.models.backbone import AUDIO, TEXT, VIDEO

ALLOWED = 0.10


class Arms:
    """A model, a prompt and an answer, and the ways of attention to decode it with."""

    def __init__(self, options: argparse.Namespace) -> None:
        heads = options.width // 64
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=options.keys or heads,
            max_position_embeddings=options.prompt + options.answer,
        )
        self.model: Any = LlamaForCausalLM(config).eval()
        self.model.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1024, (1, options.prompt), generator=generator)
        self.answer = torch.randint(1024, (options.answer, 1, 1), generator=generator)
        self.kinds = torch.full_like(self.ids, TEXT)
        size = options.prompt
        self.kinds[:, size // 16 : size * 3 // 4] = VIDEO
        self.kinds[:, size * 3 // 4 : size * 15 // 16] = AUDIO

    @contextmanager
    def way(self, name: str) -> Generator[None]:
        """``ours``, ``recorded``, ``sdpa``, or eager."""
        if name in ("ours", "recorded"):
            change, note = ReallocationConfig(), name == "recorded"
            with reallocating(self.model, change, self.kinds, record=note):
                yield
        elif name == "sdpa":
            self.model.set_attn_implementation("sdpa")
            yield
            self.model.set_attn_implementation("eager")
        else:
            yield

    @torch.no_grad()
    def decode(self, name: str) -> tuple[float, float, Tensor]:
        """Wall and computing seconds of all answer tokens, the prompt's not counted, and the last
        logits."""
        with self.way(name):
            cache = DynamicCache(config=self.model.config)
            out = self.model(self.ids, past_key_values=cache, logits_to_keep=1)
            began, computing = time.perf_counter(), time.process_time()
            for token in self.answer:
                out = self.model(token, past_key_values=cache)
            took = time.perf_counter() - began, time.process_time() - computing
        return *took, out.logits


def measure(arms: Arms, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of every way, by clock, taking turns."""
    names = ["ours", "baseline", "recorded", "sdpa", "off"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first warms up
        for name in names if number % 2 else reversed(names):
            wall, cpu, _ = arms.decode(name)
            if number:
                times[name].append((wall, cpu))
            print(f"round {number}: {name} {wall:.2f} s", file=sys.stderr, flush=True)
    return {
        clock: {name: statistics.median(one[i] for one in found) for name, found in times.items()}
        for i, clock in enumerate(("wall", "cpu"))
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Peak memory of each arm, in a process of its own."""
    # Freed blocks go back at once, so that the peak is what was needed and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, dict[str, float]] = {"peak_mb": {}, "decode_mb": {}}
    for arm in ("ours", "baseline"):
        command = [sys.executable, __file__, *arguments, "--peak", arm]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        before, after = json.loads(done.stdout.splitlines()[-1])
        found["peak_mb"][arm] = round(after)
        found["decode_mb"][arm] = round(after - before)
    return found


def summary(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    wall, cpu = times["wall"], times["cpu"]
    ratio = wall["baseline"] / wall["ours"]

    def extra(of: dict[str, float], name: str) -> float:
        return round(of[name] / of["baseline"] - 1, 3)

    return {
        "ours": round(wall["ours"], 3),
        "baseline": round(wall["baseline"], 3),
        "ratio": round(ratio, 3),
        "limit": 1.0,
        "share_of_limit": round(ratio, 3),
        "unit": "s",
        "extra": extra(wall, "ours"),
        "allowed": ALLOWED,
        "cpu_extra": extra(cpu, "ours"),
        **{name: extra(cpu, name) for name in ("recorded", "sdpa", "off")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=512, help="of the language model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--keys", type=int, default=0, help="heads of keys; 0: as many as queries")
    parser.add_argument("--prompt", type=int, default=1024, help="P")
    parser.add_argument("--answer", type=int, default=32, help="C")
    parser.add_argument("--peak", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Before this process grows: a child's peak begins at its parent's.
    memory = {} if options.peak else peaks(sys.argv[1:])
    arms = Arms(options)
    if options.peak:
        before = peak_mb()
        arms.decode(options.peak)
        print(json.dumps([before, peak_mb()]))
        return
    logits = {name: arms.decode(name)[2] for name in ("ours", "baseline", "off")}
    assert torch.equal(logits["off"], logits["baseline"])
    result = {
        **summary(measure(arms, options.rounds)),
        "rounds": options.rounds,
        **memory,
        "changed": not torch.allclose(logits["ours"], logits["baseline"]),
        "shape": f"P={options.prompt}, C={options.answer}, keys={options.keys or 'queries'}",
        "parameters": sum(p.numel() for p in arms.model.parameters()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
