"""What each rank of the distributed tests runs: ``python -m tests.train.rank_job FOLDER NAME...``

All scenarios share one start of the ranks, since importing torch and DeepSpeed takes longer than
any of them. Each writes ``FOLDER/<name>.<rank>.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmemo.errors import MmemoError
from mmemo.models.composed.modeling import MmemoForConditionalGeneration
from mmemo.train.dataloader import Batch
from mmemo.train.distributed import Ranks, leave
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import SftConfig, run_sft
from tests.train import toy
from tests.train.grpo.tiny import grpo_config, lora_model, reward
from tests.train.tiny import sft_config

STAGES = {"plain": None, "zero2": "ds_configs/zero2.json", "zero3": "ds_configs/zero3.json"}


def collectives(folder: Path, ranks: Ranks) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad = torch.full((3,), 1.0 + ranks.rank)
    if ranks.rank == 1:
        parameters[1].grad = torch.full((3,), 5.0)
    ranks.sum_gradients(parameters)
    return {
        "sum": ranks.sum([1.0, ranks.rank]),
        "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
        "texts": ranks.all_gather_text(["", "Grüße 🙂"][ranks.rank]),
        "from_main": ranks.broadcast_text(f"rank {ranks.rank}"),
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
    }


def encodes(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """How many clips each rank encodes into one fresh store."""
    count: list[str] = []
    real = MmemoForConditionalGeneration.encode

    def counted(self: Any, modality: Any, clips: Any) -> Any:
        count.extend(f"{modality}/{clip.name}" for clip in clips)
        return real(self, modality, clips)

    MmemoForConditionalGeneration.encode = counted  # type: ignore[method-assign]
    try:
        config = sft_config(
            folder / "rows",
            folder / "encodes",
            store={"path": str(folder / "fresh")},
            train={"max_steps": 1},
        )
        run_sft(config)
    finally:
        MmemoForConditionalGeneration.encode = real  # type: ignore[method-assign]
    return {"encoded": count}


def sft(stage: str, name: str = "sft", **changes: Any) -> Callable[[Path, Ranks], dict[str, Any]]:
    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        out = folder / f"{name}-{stage}"
        config = sft_config(folder / "rows", out, run={"deepspeed": STAGES[stage]}, **changes)
        return {"final": str(run_sft(config))}

    return job


def packed(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    """Ranks have other numbers of tokens, and so of chunks of logits."""
    return sft(stage, "packed", packing={"max_tokens": 90}, train={"max_logits": 1500})


def bf16(folder: Path, ranks: Ranks) -> dict[str, Any]:
    config = sft_config(
        folder / "rows", folder / "bf16", train={"bf16": True}, run={"deepspeed": STAGES["zero2"]}
    )
    return {"final": str(run_sft(config))}


def adapter(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """LoRA under ZeRO-3: the gathered adapter is written whole."""
    from tests.models.parts import values

    config = sft_config(
        folder / "rows",
        folder / "adapter",
        model={**values(), "lora": {"r": 4, "lora_dropout": 0.0}},
        run={"deepspeed": STAGES["zero3"]},
    )
    return {"final": str(run_sft(config))}


def experts(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        out = folder / f"experts-{stage}"
        config = experts_config(folder / "rows", out, run={"deepspeed": STAGES[stage]})
        return {"final": str(run_sft(config))}

    return job


def experts_config(rows: Path, out: Path, **changes: Any) -> SftConfig:
    """With penalties that have a large part in the gradient. Soft, since a rounding error could
    pick another expert."""
    from tests.models.parts import values

    strong = {"weight_penalty": 3.0, "load_penalty": 0.5, "routing": "soft"}
    lora = {"r": 4, "lora_dropout": 0.0, "experts": strong}
    return sft_config(rows, out, model={**values(), "lora": lora}, **changes)


def bad_rows(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A bad clip leaves both ranks with the same rows and the same number of steps."""
    config = sft_config(
        folder / "bad",
        folder / "bad_rows",
        store={"path": str(folder / "bad" / "features")},
        decode={"max_bad_share": 0.5},
        train={"max_steps": -1, "per_device_train_batch_size": 2},
    )
    run_sft(config)
    return {}


def grpo(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    """A run, and the same run again from its second step. Groups that are flat are left out and
    the others split by their tokens, so that ranks have other numbers of micro-batches."""

    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        out = folder / f"grpo-{stage}"
        config = grpo_config(
            folder / "rows",
            out,
            model=lora_model(lora={"r": 4, "lora_dropout": 0.0}),
            rewards=[reward("right")],
            grpo={
                "beta": 0.04,
                "num_iterations": 2,
                "max_tokens_per_batch": 48,
                "filter_zero_variance": True,
                "max_resample_times": 2,
            },
            train={"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 3},
            watch={"groups": 8},
            run={"deepspeed": STAGES[stage], "save_steps": 2},
        )
        final = run_grpo(config)
        first = folder / f"grpo-{stage}-first"
        if ranks.is_main:
            final.rename(first)
            shutil.rmtree(out / "checkpoint-4")
        ranks.barrier()
        resumed = run_grpo(config)
        return {"final": str(first), "resumed": str(resumed)}

    return job


def full(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    """GRPO of all weights against a copy of them, which DeepSpeed does not shard, and again from
    its second step."""

    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        from tests.models.parts import values

        out = folder / f"full-{stage}"
        config = grpo_config(
            folder / "rows",
            out,
            model=values(),
            trainable=["lm"],
            rewards=[reward("right")],
            grpo={"beta": 0.5, "reference": "copy_cpu" if stage == "plain" else "copy"},
            train={"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
            run={"deepspeed": STAGES[stage], "save_steps": 2},
        )
        final = run_grpo(config)
        first = folder / f"full-{stage}-first"
        if ranks.is_main:
            final.rename(first)
            shutil.rmtree(out / "checkpoint-3")
        ranks.barrier()
        resumed = run_grpo(config)
        return {"final": str(first), "resumed": str(resumed)}

    return job


def stopped(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    """SIGTERM on the second rank alone, then the same run again."""

    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        out = folder / f"stopped-{stage}"
        config = sft_config(
            folder / "rows", out, run={"deepspeed": STAGES[stage], "save_steps": 100}
        )
        from mmemo.train import trainer

        real, calls = trainer.Trainer._step, 0

        def step(self: Any, item: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 4 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            real(self, item)

        trainer.Trainer._step = step  # type: ignore[method-assign]
        code: object = None
        try:
            run_sft(config)
        except SystemExit as stop:
            code = stop.code
        finally:
            trainer.Trainer._step = real  # type: ignore[method-assign]
        saved = sorted(path.name for path in out.glob("checkpoint-*"))
        return {"code": code, "saved": saved, "final": str(run_sft(config))}

    return job


def one_sided(stage: str) -> Callable[[Path, Ranks], dict[str, Any]]:
    """Only the second rank's rows of the third step are broken."""

    def job(folder: Path, ranks: Ranks) -> dict[str, Any]:
        made = 0

        def hook(batch: Batch) -> None:
            nonlocal made
            made += 1
            if made == 3 and ranks.rank == 1:
                batch["y"][0] = float("nan")

        torch.manual_seed(0)
        loop = toy.loop(
            folder / f"one-sided-{stage}",
            model=toy.Model(dropout=0.0),
            data=toy.Rows(hook=hook),
            train={"max_steps": 4, "per_device_train_batch_size": 2},
            run={"prefetch": 0, "deepspeed": STAGES[stage], "save_steps": 100},
            ranks=ranks,
        )
        digests: list[str] = []
        step = loop._step

        def watched(item: Any) -> None:
            step(item)
            digests.append(whole(loop))

        loop._step = watched  # type: ignore[method-assign]
        result = loop.run()
        return {"digests": digests, "skipped": result.state.skipped, "steps": result.state.step}

    return job


def whole(loop: Any) -> str:
    """SHA-256 of the weights, gathered from their shards."""
    found = hashlib.sha256()
    state = loop.engine.whole_state()
    if state is None:
        module = getattr(loop.engine.model, "module", loop.engine.model)
        state = dict(module.named_parameters())
    for name, weight in sorted(state.items()):
        found.update(name.encode() + weight.detach().numpy().tobytes())
    return found.hexdigest()


def full_disk(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A full disk during a save is the same error on both ranks."""
    loop = toy.loop(folder / "full", ranks=ranks, run={"prefetch": 0})
    loop.engine.bytes_to_save = lambda: 1 << 60  # type: ignore[method-assign]
    try:
        loop.run()
    except MmemoError as error:
        return {"error": str(error)}
    return {"error": None}


JOBS: dict[str, Callable[[Path, Ranks], dict[str, Any]]] = {
    "collectives": collectives,
    "encodes": encodes,
    "bf16": bf16,
    "adapter": adapter,
    "bad_rows": bad_rows,
    "full_disk": full_disk,
    **{f"sft-{stage}": sft(stage) for stage in STAGES},
    **{f"packed-{stage}": packed(stage) for stage in STAGES},
    **{f"grpo-{stage}": grpo(stage) for stage in STAGES},
    **{f"full-{stage}": full(stage) for stage in STAGES},
    **{f"experts-{stage}": experts(stage) for stage in STAGES},
    **{f"stopped-{stage}": stopped(stage) for stage in STAGES},
    **{f"one-sided-{stage}": one_sided(stage) for stage in STAGES},
}


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = Ranks(cpu=True)
    for name in sys.argv[2:]:
        found = JOBS[name](folder, ranks)
        (folder / f"{name}.{ranks.rank}.json").write_text(json.dumps(found))
        ranks.barrier()
    leave()


if __name__ == "__main__":
    main()
