"""Seconds of one GRPO update with a shared prompt, compared with a copy of the prompt per answer.

    python benchmarks/grpo_update.py [--rounds 5] [--width 256] [--layers 6] [--prompt 512] ...

The setting is one process, one thread, float32. A composed model (video, audio, face and fusion
tokens of one clip in the prompt, LoRA of rank 16 on the language model, connectors trained) does
what a GRPO step does after its rollouts: old log-probabilities, reference log-probabilities with
the adapter off, and forward, loss, backward and optimizer step. There is one prompt of P tokens
with G answers of C tokens. Both arms are the same model and the same code except for how the
prompt enters: ``packed_logps`` and ``naive_logps``. The vocabulary head, which neither arm can
share, has 8% of the language model's weights, as in a 7B model.

The script prints one JSON line. ``ours`` and ``baseline`` are in seconds (medians of alternating
runs) with their ``ratio``. ``limit`` is G(P + C) / (P + GC), which the number of tokens sets, and
``share_of_limit`` the share of it that is reached. ``cpu_ratio`` is by computing time, which other
work on the machine disturbs less. ``peak_mb`` is the peak resident memory of a process that does
one update, and ``update_mb`` what the update added to it. Log-probabilities and gradients of both
arms are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor

from mmemo import console
from mmemo.config import parse
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.losses.grpo import grpo_loss, grpo_weight
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable

ARMS = {"ours": packed_logps, "baseline": naive_logps}
VISION: dict[str, Any] = {
    "encoder_config": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    },
    "preprocessor": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
SOUND: dict[str, Any] = {
    "encoder_config": {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "num_mel_bins": 16,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "preprocessor": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 16,
        "sampling_rate": 16000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
    },
}
STEPS = {"video": 256, "audio": 128, "face": 16}
"""Tokens of each branch in the prompt."""


def build(options: argparse.Namespace) -> Loaded:
    """The composed model with random weights."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(4000)]
    text = {
        "hidden_size": options.width,
        "layers": options.layers,
        "heads": options.width // 32,
        "vocab_size": 8 * options.width,
        "max_length": options.prompt + options.answer,
    }
    values = {
        "text": {"scratch": text},
        "video": {**VISION, "tokens": STEPS["video"]},
        "audio": {**SOUND, "tokens": STEPS["audio"]},
        "face": {**VISION, "tokens": STEPS["face"]},
        "fusion": {"kind": "attention"},
        "lora": {"r": 16, "lora_dropout": 0.0},
        "sampling": {"frames": 4, "face": {"detector": "none", "size": 32}},
    }
    loaded = load_model(parse(ModelConfig, values), [" ".join(words)])
    set_trainable(loaded.model, ["lm", "connectors", "fusion"])
    generator = torch.Generator().manual_seed(0)
    for name, weight in loaded.model.named_parameters():
        if "lora_B" in name:  # else the adapter does nothing and is its own reference
            weight.data.normal_(std=0.02, generator=generator)
    return loaded


def make_batch(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """One prompt of exactly P tokens, and G answers of C."""
    generator = torch.Generator().manual_seed(1)
    features: dict[Any, Any] = {
        name: {"x": torch.randn(steps, 32, generator=generator)} for name, steps in STEPS.items()
    }
    features["face"]["found"] = torch.tensor(True)
    question = "<video><audio><face>" + " which" * options.prompt
    batch: Any = dict(loaded.processor([question], [features]))
    for name in ("input_ids", "attention_mask", "modality_ids"):
        batch[name] = batch[name][:, : options.prompt]
    if batch["input_ids"].shape[1] != options.prompt or not bool(batch["attention_mask"].all()):
        raise SystemExit(f"--prompt {options.prompt} is too short for the media tokens")
    shape = (options.group, options.answer)
    mask = torch.ones(shape, dtype=torch.long)
    if options.ragged:
        lengths = torch.linspace(options.answer / 4, options.answer, options.group).long()
        mask = (torch.arange(options.answer) < lengths[:, None]).long()
    return {
        "prompts": batch,
        "ids": torch.randint(300, 7 * options.width, shape, generator=generator),
        "mask": mask,
        "index": torch.zeros(options.group, dtype=torch.long),
        "advantages": torch.randn(options.group, generator=generator),
    }


class Training:
    """GRPO updates on one batch."""

    def __init__(self, loaded: Loaded, batch: dict[str, Any]) -> None:
        self.model: Any = loaded.model.train()
        self.batch = batch
        learnt = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(learnt, lr=0.0)

    def score(self, arm: str) -> Tensor:
        batch = self.batch
        given = (batch["prompts"], batch["ids"], batch["mask"], batch["index"])
        return ARMS[arm](self.model, *given).logps

    def update(self, arm: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities and gradients."""
        with torch.no_grad():
            old = self.score(arm)
            with self.model.disable_adapter():
                ref = self.score(arm)
        now, mask = self.score(arm), self.batch["mask"]
        out = grpo_loss(now, old, ref, self.batch["advantages"], mask, beta=0.04)
        (out.rows.sum() / grpo_weight(mask, "dapo")).backward()
        named = self.model.named_parameters()
        gradients = {name: x.grad for name, x in named if x.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now.detach(), gradients


def difference(training: Training) -> tuple[float, float]:
    """Largest of the log-probabilities, and of the gradients relative to each one's largest."""
    (ours, mine), (naive, theirs) = (training.update(arm) for arm in ARMS)
    largest = max(float(x.abs().max()) for x in theirs.values())
    apart = max(
        float((mine[name] - x).abs().max()) / max(float(x.abs().max()), 1e-6 * largest)
        for name, x in theirs.items()
    )
    return float((ours - naive).abs().max()), apart


def measure(training: Training, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, computing) seconds of each arm's updates, the arms taking turns."""
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            began, computing = time.perf_counter(), time.process_time()
            training.update(arm)
            took = (time.perf_counter() - began, time.process_time() - computing)
            times[arm].append(took)
            print(f"round {number + 1}: {arm} {took[0]:.2f} s", file=sys.stderr, flush=True)
    return times


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(arguments: list[str]) -> dict[str, dict[str, float]]:
    """Peak memory of one update of each arm, in a process of its own."""
    # Freed blocks go back at once, so that the peak is what was needed and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, dict[str, float]] = {"peak_mb": {}, "update_mb": {}}
    for arm in ARMS:
        command = [sys.executable, __file__, *arguments, "--peak", arm]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        before, after = json.loads(done.stdout.splitlines()[-1])
        found["peak_mb"][arm] = round(after)
        found["update_mb"][arm] = round(after - before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=512, help="P")
    parser.add_argument("--answer", type=int, default=64, help="C")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--ragged", action="store_true", help="answers of C/4 to C tokens")
    parser.add_argument("--peak", choices=[*ARMS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console.console.quiet = True  # the JSON line is all of standard output
    # Before this process grows: a child's peak begins at its parent's.
    memory = {} if options.peak else peaks(sys.argv[1:])
    loaded = build(options)
    batch = make_batch(loaded, options)
    training = Training(loaded, batch)
    if options.peak:
        before = peak_mb()
        training.update(options.peak)
        print(json.dumps([before, peak_mb()]))
        return
    logps, gradients = difference(training)
    times = measure(training, options.rounds)
    wall, cpu = (
        {arm: statistics.median(x[clock] for x in found) for arm, found in times.items()}
        for clock in (0, 1)
    )
    tokens = options.group * options.prompt + int(batch["mask"].sum())
    limit = tokens / (options.prompt + int(batch["mask"].sum()))
    ratio = wall["baseline"] / wall["ours"]
    lm = unwrap(loaded.model).language_model
    result = {
        "ours": round(wall["ours"], 3),
        "baseline": round(wall["baseline"], 3),
        "ratio": round(ratio, 2),
        "limit": round(limit, 2),
        "share_of_limit": round(ratio / limit, 3),
        "unit": "s/update",
        "rounds": options.rounds,
        "cpu_ratio": round(cpu["baseline"] / cpu["ours"], 2),
        **memory,
        "logps_differ_by": logps,
        "gradients_differ_by": gradients,
        "shape": f"P={options.prompt}, C={options.answer}, G={options.group}"
        + (", ragged" if options.ragged else ""),
        "parameters": sum(weight.numel() for weight in lm.parameters()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
