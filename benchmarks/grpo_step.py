"""Seconds and memory of a whole GRPO step, rollouts included, compared with TRL's own trainer.

    python benchmarks/grpo_step.py --shape A [--rounds 3]

Both train the same random Qwen2.5-VL (``tiny_vlm.py``) on the same prompt: four images of 128
tokens each and a question. The language model has LoRA of rank 16 and the vision encoder is
frozen. There are G = 8 completions of C = 64 tokens that nothing ends earlier, ``beta`` is above 0
(so there is a reference pass), and the setting is float32, one thread, no gradient checkpointing,
one prompt per step.

``ours`` is what the loop does in a step, :class:`mmemo.train.grpo.objective.GrpoObjective` with
:class:`mmemo.generation.rollout.HFRollouts`: images to patches, one pass of the vision encoder,
rollouts, reward, advantages, reference, loss, backward, optimizer. There is no feature store: the
vision encoder runs in every step. ``cached`` is the same with stored features, as in a run after
its first epoch. ``baseline`` is ``trl.GRPOTrainer.train``, which supports images only; its image
processor is the one of transformers that needs no torchvision, in a processor without the one for
video.

The ``limit`` is the ratio of floating-point operations of linear layers (without attention and
adapters; a backward pass costs as much as a forward pass, because the weights are frozen, and
gradients of the inputs are needed everywhere but below the first adapter). TRL runs the vision
encoder 3 G times (generation, reference, training) and copies the prompt G times for each of
generation, reference, training and its backward pass. Here the vision encoder runs once, and the
prompt once in each of these.

Each run is a process of its own, and the arms alternate; a run takes one step to warm up and two
that count. The script prints one JSON line with medians of the steps. ``ratio`` is by the clock
and ``cpu_ratio`` by computing time, which other work on the machine disturbs less. ``peak_mb`` is
the peak resident memory of a process, and ``memory_share`` ours divided by theirs. ``step_mb`` and
``step_share`` are the same for what the steps add to the memory before the first step. ``cached``
holds all of this for that arm. ``tokens`` are the prompt tokens of each side.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from timing import OPTIONS, Watch, child, compare, measure, with_images
from tiny_vlm import (
    ANSWER,
    BOUNDS,
    QUESTION,
    SHAPES,
    Pictures,
    images_only,
    lora,
    make_model,
    tower_cost,
)

ARMS = ("ours", "baseline", "cached")
GROUP, BETA = 8, 0.04


def even(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """The reward: the share of tokens with an even id."""
    return [sum(x % 2 == 0 for x in ids) / max(1, len(ids)) for ids in completion_ids]


class Ours:
    """Steps of the objective as the loop takes them. It is its collator's renderer."""

    def __init__(
        self,
        shape: str,
        folder: Path,
        *,
        cached: bool = False,
        group: int = GROUP,
        bare: bool = False,
    ) -> None:
        """``bare``: a prompt of one word without images."""
        from peft import get_peft_model

        from mmemo.config import parse
        from mmemo.data.sample import MediaRef, Sample, Turn
        from mmemo.generation.rollout import HFRollouts
        from mmemo.models.qwen.vl import QwenVLBackbone, QwenVLConfig
        from mmemo.rewards.score_rollouts import GroupRewards
        from mmemo.run_log import RunRecord
        from mmemo.train.distributed import Ranks
        from mmemo.train.engine import PlainEngine
        from mmemo.train.grpo.config import GrpoConfig
        from mmemo.train.grpo.objective import GrpoObjective

        values = {
            "output_dir": str(folder),
            "model": {"path": "unused", "lora": {"r": 16}},
            "data": {"manifests": ["unused"]},
            "rewards": [{"path": f"{Path(__file__).resolve()}:even", "name": "even"}],
            "rollout": {"num_generations": group, "max_completion_length": ANSWER},
            "grpo": {"beta": BETA},
            "train": {"learning_rate": 1e-5},
        }
        config = parse(GrpoConfig, values)
        settings = QwenVLConfig(min_pixels=BOUNDS[0], max_pixels=BOUNDS[1], stills=True)
        model, tokenizer = make_model(shape)
        self.tokenizer = tokenizer
        self.backbone = QwenVLBackbone(model, tokenizer, settings=settings)
        ranks, record = Ranks(cpu=True), RunRecord(folder)
        rollouts = HFRollouts(tokenizer, self.backbone, config.rollout)
        rollouts.stops = []  # nothing ends before C tokens
        rewards = GroupRewards(config.rewards, None, group, "group", record)
        self.source = Pictures(self.backbone, cached=cached)
        text = f"<|im_start|>user\n<video>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        self.sample = Sample("a", (Turn("user", text),), {"video": MediaRef("a")})
        if bare:
            self.sample = Sample("a", (Turn("user", "Why"),), {})
        samples = {"a": self.sample}
        self.objective = GrpoObjective(config, rollouts, rewards, samples, ranks, folder, 0)
        peft: Any = get_peft_model(self.backbone, lora())  # pyright: ignore
        self.engine = PlainEngine(peft.train(), config.train, ranks)
        self.done = 0

    def render(self, turns: Sequence[Any], *, generation: bool, modalities: Any) -> Any:
        """The collator's renderer."""
        ids, kinds = self.backbone.expand(turns[0].text, modalities)
        return SimpleNamespace(input_ids=ids, labels=[-100] * len(ids), modality_ids=kinds, text="")

    def step(self) -> int:
        """A step; the prompt's tokens."""
        from mmemo.data.collate import Collator
        from mmemo.train.dataloader import MicroBatch, OptimizerStep
        from mmemo.train.trainer import take_step

        batch = Collator(self, self.source)([self.sample], generation=True)
        made = OptimizerStep(0, self.done, [MicroBatch(batch, 0)])
        made = self.objective.prepare(self.engine, made, self.done, 100)
        batches = [micro.batch for micro in made.micro_batches]
        assert batches[0]["completion_mask"].sum() == batches[0]["completion_mask"].numel()
        take_step(self.engine, self.objective, batches, 1e-5)
        self.done += 1
        return int(batch["input_ids"].shape[1])


def run_ours(shape: str, steps: int, folder: Path, *, cached: bool) -> tuple[Watch, int]:
    ours, watch, tokens = Ours(shape, folder, cached=cached), Watch(), 0
    watch.begin()
    for _ in range(steps):
        tokens = ours.step()
        watch.mark()
    return watch, tokens


def run_baseline(shape: str, steps: int, folder: Path) -> tuple[Watch, int]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = make_model(shape)
    watch, tokens = Watch(), list[int]()

    class Trainer(GRPOTrainer):
        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            tokens.append(int(inputs["prompt_mask"].sum(1).max()))
            assert inputs["completion_mask"].shape == (GROUP, ANSWER)
            assert bool(inputs["completion_mask"].all())
            return super()._compute_loss(model, inputs)

    prompt = [{"role": "user", "content": QUESTION}]
    trainer = Trainer(
        model=model,
        reward_funcs=even,
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            max_completion_length=ANSWER,
            generation_kwargs={"min_new_tokens": ANSWER},
            beta=BETA,
            max_steps=steps,
            **OPTIONS,
        ),
        train_dataset=with_images(Dataset.from_list([{"prompt": prompt, "images": None}] * 8)),
        processing_class=images_only(tokenizer),
        peft_config=lora(),
        callbacks=[watch.callback()],
    )
    trainer.train()
    return watch, tokens[-1]


def limits(shape: str, prompt: int) -> dict[str, float]:
    """Operations of TRL's step to those of each of our arms."""
    width, layers = SHAPES[shape]
    lm, head, tower = layers * 16 * width**2, 8 * width**2, tower_cost()
    # Draw, reference, forward and backward: the prompts and the answers of each; answers' head.
    passes = 4 * (lm + head) * GROUP * ANSWER
    theirs = 3 * GROUP * tower + 4 * lm * GROUP * prompt + passes
    ours = 4 * lm * prompt + passes
    return {"ours": theirs / (tower + ours), "cached": theirs / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], default="A")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=2, help="that count, in each process")
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
    tokens = {arm: found[arm][0]["tokens"] for arm in ("ours", "baseline")}
    highest = limits(options.shape, tokens["ours"])
    result = {
        **compare(found, "ours", highest["ours"]),
        "cached": compare(found, "cached", highest["cached"]),
        "tokens": tokens,
        "shape": options.shape,
        "rounds": options.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
