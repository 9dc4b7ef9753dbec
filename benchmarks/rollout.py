"""Seconds to draw G completions of one prompt, compared with ``generate`` with G return sequences.

    python benchmarks/rollout.py [--rounds 5] [--width 256] [--layers 6] [--prompt 512] ...

The setting is one process, one thread, float32. The composed model of ``grpo_update.py`` (video,
audio, face and fusion tokens in the prompt, LoRA of rank 16) completes one prompt of P tokens G
times. Nothing ends a completion before C tokens, so both arms sample G C tokens at temperature 1.
``ours`` is :class:`mmemo.generation.rollout.HFRollouts`. ``baseline`` is transformers'
``generate`` on the same model, with ``num_return_sequences=G`` and its own cache. Both compute one
row of logits per prompt.

The ``limit`` is the ratio of floating-point operations, without adapters and norms. A token at
position t costs 2 N + 4 L D t, with N the weights of the decoder's linear layers and L layers of
width D; the head costs 2 D V more where a token is drawn. ``generate`` computes each prompt G
times and ours once; the G (C - 1) tokens that are fed back cost both the same. At equal speed of
everything else, no engine that draws token by token can be further ahead. Two things are not equal
and pull in opposite directions. An operation on a single token costs about twice as much per token
as one on a long prompt, because its weights have to be fetched from memory; both arms pay for
that, so the ratio falls. And ``generate`` spends more calls and memory on each token than
necessary, so the ratio rises.

The script prints one JSON line. ``ours`` and ``baseline`` are in seconds (medians of alternating
runs) with their ``ratio``, ``limit`` and ``share_of_limit``. ``cpu_ratio`` is by computing time,
which other work on the machine disturbs less. ``first_token`` is the time for the prompt and one
token; the rest is decoding. ``off`` is the ratio with one speed-up after the other switched off.
``peak_mb`` is the peak resident memory of a process that draws once, and ``rollout_mb`` what that
added to it. ``same_greedy`` says whether both arms give the same text without sampling.
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
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from grpo_update import build, make_batch
from torch import Tensor

from mmemo import console
from mmemo.config import parse
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded

SWITCHES = ("fused_steps", "merge_adapter", "shared_cache", "shared_prefill")


class Arms:
    """Ways to draw G completions of C tokens."""

    def __init__(
        self, loaded: Loaded, prompts: dict[str, Any], options: argparse.Namespace
    ) -> None:
        self.model: Any = loaded.model.eval()
        self.loaded, self.prompts, self.options = loaded, prompts, options
        backbone: Any = unwrap(self.model)
        backbone.generation_config.eos_token_id = None  # nothing ends before its C tokens

    def ours(self, answer: int, **changes: Any) -> Tensor:
        values = {"num_generations": self.options.group, "max_completion_length": answer}
        section = parse(RolloutConfig, {**values, **changes})
        engine = HFRollouts(self.loaded.processor.tokenizer, unwrap(self.model), section)
        engine.stops = []
        return engine.generate(self.model, self.prompts, range(self.options.group)).ids

    def baseline(self, answer: int, **changes: Any) -> Tensor:
        with torch.no_grad():
            return self.model.generate(
                **self.prompts,
                num_return_sequences=self.options.group,
                max_new_tokens=answer,
                pad_token_id=self.loaded.processor.tokenizer.pad_token_id,
                **{"do_sample": True, "top_k": 0, **changes},
            )[:, self.options.prompt :]

    def same_greedy(self) -> bool:
        mine = self.ours(self.options.answer, top_k=1)
        changes = {"num_return_sequences": 1, "do_sample": False, "top_k": None}
        with torch.no_grad():
            wanted = self.model.generate(
                **self.prompts, max_new_tokens=self.options.answer, **changes
            )[:, self.options.prompt :]
        return bool((mine == wanted).all())


def limit(loaded: Loaded, options: argparse.Namespace) -> float:
    """Operations of ``generate`` to ours."""
    backbone: Any = unwrap(loaded.model)
    lm = backbone.language_model
    weights = sum(
        parameter.numel()
        for name, parameter in lm.layers.named_parameters()
        if parameter.ndim == 2 and "lora" not in name
    )
    width = lm.config.num_attention_heads * lm.config.head_dim
    head = 2 * backbone.lm_head.weight.numel()

    def tokens(start: int, end: int) -> float:
        places = (start + 1 + end) * (end - start) / 2
        return 2 * weights * (end - start) + 4 * len(lm.layers) * width * places

    P, C, G = options.prompt, options.answer, options.group
    prompt, answers = tokens(0, P) + head, G * (tokens(P, P + C - 1) + (C - 1) * head)
    return (G * prompt + answers) / (prompt + answers)


def clocked(call: Any) -> tuple[float, float]:
    """(wall, computing) seconds."""
    began, computing = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - computing


def measure(arms: Arms, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of everything that is compared, taking turns."""
    C = arms.options.answer
    calls: dict[str, Any] = {
        "ours": lambda: arms.ours(C),
        "baseline": lambda: arms.baseline(C),
        "ours first": lambda: arms.ours(1),
        "baseline first": lambda: arms.baseline(1),
    }
    off: dict[str, bool] = {}
    for name in SWITCHES:
        off[name] = False
        calls[f"off {name}"] = lambda given=dict(off): arms.ours(C, **given)
    for call in calls.values():
        call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in calls if number % 2 == 0 else reversed(calls):
            times[name].append(clocked(calls[name]))
            took = times[name][-1][0]
            print(f"round {number + 1}: {name} {took:.2f} s", file=sys.stderr, flush=True)
    return times


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Peak memory of each arm, in a process of its own."""
    # Freed blocks go back at once, so that the peak is what was needed and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, dict[str, float]] = {"peak_mb": {}, "rollout_mb": {}}
    for arm in ("ours", "baseline"):
        command = [sys.executable, __file__, *arguments, "--peak", arm]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        before, after = json.loads(done.stdout.splitlines()[-1])
        found["peak_mb"][arm] = round(after)
        found["rollout_mb"][arm] = round(after - before)
    return found


def summary(times: dict[str, list[tuple[float, float]]], most: float) -> dict[str, Any]:
    wall, cpu = (
        {name: statistics.median(one[clock] for one in found) for name, found in times.items()}
        for clock in (0, 1)
    )
    ratio = wall["baseline"] / wall["ours"]
    return {
        "ours": round(wall["ours"], 3),
        "baseline": round(wall["baseline"], 3),
        "ratio": round(ratio, 2),
        "limit": round(most, 2),
        "share_of_limit": round(ratio / most, 3),
        "unit": "s",
        "cpu_ratio": round(cpu["baseline"] / cpu["ours"], 2),
        "cpu_share_of_limit": round(cpu["baseline"] / cpu["ours"] / most, 3),
        "first_token": {arm: round(cpu[f"{arm} first"], 3) for arm in ("ours", "baseline")},
        "off": {name: round(cpu["baseline"] / cpu[f"off {name}"], 2) for name in SWITCHES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512, help="P")
    parser.add_argument("--answer", type=int, default=64, help="C")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--peak", choices=["ours", "baseline"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ragged = False
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console.console.quiet = True  # the JSON line is all of standard output
    # Before this process grows: a child's peak begins at its parent's.
    memory = {} if options.peak else peaks(sys.argv[1:])
    loaded = build(options)
    arms = Arms(loaded, make_batch(loaded, options)["prompts"], options)
    if options.peak:
        before = peak_mb()
        getattr(arms, options.peak)(options.answer)
        print(json.dumps([before, peak_mb()]))
        return
    same = arms.same_greedy()
    times = measure(arms, options.rounds)
    result = {
        **summary(times, limit(loaded, options)),
        "rounds": options.rounds,
        **memory,
        "same_greedy": same,
        "shape": f"P={options.prompt}, C={options.answer}, G={options.group}",
        "parameters": sum(p.numel() for p in unwrap(loaded.model).language_model.parameters()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
