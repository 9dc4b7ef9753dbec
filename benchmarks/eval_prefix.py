"""Seconds to answer several questions about one clip, compared with ``generate`` on whole prompts.

    python benchmarks/eval_prefix.py [--rounds 5] [--questions 8] [--prompt 512] ...

The setting is one process, one thread, float32. The composed model of ``grpo_update.py`` (video,
audio, face and fusion tokens in the prompt, LoRA of rank 16) answers K questions greedily. Prompts
begin with P - S common tokens, the clip among them, and end with S tokens of their own. Nothing
ends an answer before C tokens. ``ours`` is
:func:`mmemo.generation.questions.answer_greedily`, with which ``mmemo eval`` answers.
``baseline`` is transformers' ``generate`` on all K prompts as one batch, as with
``run.share_prefixes: false``, and ``loop`` on one prompt after the other.

The ``limit`` is the ratio of floating-point operations of the linear layers, of attention and of
the head, without adapters and norms: ``generate`` computes K (P + C - 1) tokens, ours P - S +
K (S + C - 1).

The script prints one JSON line. ``ours``, ``baseline`` and ``loop`` are in seconds (medians of
alternating runs), ``ratio`` is to the baseline. The names with ``cpu`` are by computing time, which
other work on the machine disturbs less. ``same`` says whether all give the same answers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from grpo_update import build, make_batch
from rollout import clocked

from mmemo import console
from mmemo.generation.questions import answer_greedily, can_share
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded


class Arms:
    """Ways to answer K questions with C tokens each."""

    def __init__(self, loaded: Loaded, options: argparse.Namespace) -> None:
        self.model: Any = loaded.model.eval()
        unwrap(self.model).generation_config.eos_token_id = None
        self.options, self.pad = options, loaded.processor.tokenizer.pad_token_id
        one: dict[str, Any] = make_batch(loaded, options)["prompts"]
        rows = {
            name: one[name].expand(options.questions, -1).clone()
            for name in ("input_ids", "attention_mask", "modality_ids")
        }
        words = torch.randint(
            100,
            8 * options.width - 10,
            (options.questions, options.own),
            generator=torch.Generator().manual_seed(2),
        )
        rows["input_ids"][:, -options.own :] = words
        clips = torch.zeros(options.questions, dtype=torch.long)
        self.prompts = {**one, **rows, "clip_index": clips}
        self.single = [
            {**one, **{k: v[at : at + 1] for k, v in rows.items()}, "clip_index": clips[:1]}
            for at in range(options.questions)
        ]
        if not can_share(self.model):
            raise SystemExit("this model cannot share prefixes")

    def ours(self) -> list[list[int]]:
        return answer_greedily(
            self.model, self.prompts, stops=[], max_new_tokens=self.options.answer
        )

    def generated(self, prompts: dict[str, Any]) -> list[list[int]]:
        with torch.no_grad():
            found = self.model.generate(
                **prompts,
                do_sample=False,
                max_new_tokens=self.options.answer,
                pad_token_id=self.pad,
            )
        return found[:, self.options.prompt :].tolist()

    def baseline(self) -> list[list[int]]:
        return self.generated(self.prompts)

    def loop(self) -> list[list[int]]:
        return [self.generated(one)[0] for one in self.single]


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

    P, S, C, K = options.prompt, options.own, options.answer, options.questions
    own = tokens(P - S, P + C - 1) + C * head
    begin = tokens(0, P - S)
    return K * (begin + own) / (begin + K * own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512, help="P")
    parser.add_argument("--own", type=int, default=24, help="S")
    parser.add_argument("--answer", type=int, default=16, help="C")
    parser.add_argument("--questions", type=int, default=8, help="K")
    options = parser.parse_args()
    options.ragged, options.group = False, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console.console.quiet = True  # the JSON line is all of standard output
    loaded = build(options)
    arms = Arms(loaded, options)
    names = ("ours", "baseline", "loop")
    answers = [getattr(arms, name)() for name in names]  # warms up, too
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(clocked(getattr(arms, name)))
            print(f"round {number + 1}: {name} {times[name][-1]}", file=sys.stderr, flush=True)
    wall, cpu = (
        {name: statistics.median(one[at] for one in times[name]) for name in names} for at in (0, 1)
    )
    most = limit(loaded, options)
    result = {
        **{name: round(wall[name], 3) for name in names},
        "ratio": round(wall["baseline"] / wall["ours"], 2),
        "limit": round(most, 2),
        "share_of_limit": round(wall["baseline"] / wall["ours"] / most, 3),
        "unit": "s",
        "cpu_ratio": round(cpu["baseline"] / cpu["ours"], 2),
        "cpu_loop_ratio": round(cpu["loop"] / cpu["ours"], 2),
        "cpu_share_of_limit": round(cpu["baseline"] / cpu["ours"] / most, 3),
        "rounds": options.rounds,
        "same": answers[0] == answers[1] == answers[2],
        "shape": f"P={options.prompt}, S={options.own}, C={options.answer}, K={options.questions}",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
