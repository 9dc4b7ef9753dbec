"""Seconds and memory of a whole GRPO step, rollouts included, against TRL's own trainer.

    python tests/perf/grpo_step.py --shape A [--rounds 3]

Both train the same random Qwen2.5-VL on the same prompt: four images of 128 tokens each and a
question. LoRA of rank 16 on the language model, tower frozen, G = 8 completions of C = 64 tokens
that nothing ends earlier, ``beta`` above 0 (so there is a reference pass), float32, one thread, no
gradient checkpointing, one prompt a step. Shape A: LM 256 wide with 6 layers, tower 160 wide with 8
(tower to prefill 1.9 : 1, as in R1-Omni); B: LM 512 x 8 (0.4 : 1, nearer a 7B).

``ours`` is what the loop does in a step, :class:`mmemo.train.grpo_objective.GrpoObjective` with
:class:`mmemo.rl.rollout.HFRollouts`: images to patches, the tower once, rollouts, reward,
advantages, reference, loss, backward, optimizer. There is no feature store: the tower runs in
every step. ``cached`` is the same with the features there, as in a run after its first epoch.
``baseline`` is ``trl.GRPOTrainer.train``, which sees images only; its image processor is
transformers' own that needs no torchvision, in a processor without the one for video.

The ``limit`` is the ratio of floating-point operations of linear layers (attention and adapters not
counted; a backward pass costs a forward pass, since the weights are frozen, and gradients of the
inputs are needed everywhere but below the first adapter). TRL runs the tower 3 G times (generation,
reference, training) and copies the prompt G times for each of generation, reference, training and
its backward; here the tower runs once and the prompt once in each.

Each run is a process of its own, arms alternating; it takes a step to warm up and two that count.
Prints one JSON line: medians of the steps, ``ratio`` by the clock and ``cpu_ratio`` in computing
time, which other work on the machine disturbs less; ``peak_mb``, the peak resident memory of a
process, and ``memory_share``, ours of theirs; ``idle_mb``, before the first step, so that
``step_mb`` is what steps add. ``tokens`` are each side's prompt tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

SHAPES = {"A": (256, 6), "B": (512, 8), "tiny": (64, 2)}
"""Width and layers of the language model."""
TOWER = {"hidden_size": 160, "depth": 8}
IMAGES, HEIGHT, WIDTH, VISUAL = 4, 224, 448, 128
GROUP, ANSWER, BETA = 8, 64, 0.04
QUESTION = "Which emotion does the person show? " + "Look and say what moves and why. " * 4
BOUNDS = (56 * 56, 28 * 28 * 1280)
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def even(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """The reward: the share of tokens with an even id."""
    return [sum(x % 2 == 0 for x in ids) / max(1, len(ids)) for ids in completion_ids]


def make_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(4000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, " ".join(words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
    )


def make_model(shape: str) -> tuple[Any, Any]:
    """The same random weights each time, and the tokenizer."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    width, layers = SHAPES[shape]
    tokenizer = make_tokenizer(8 * width)
    token: Any = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        vision_config={
            **TOWER,
            "intermediate_size": 4 * TOWER["hidden_size"],
            "num_heads": 4,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64 or 1,
            "num_key_value_heads": width // 64 or 1,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.model.visual.requires_grad_(False)
    return model, tokenizer


def make_frames() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (IMAGES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=ADAPTED)


class Ours:
    """Steps of the objective as the loop takes them. It is its collator's renderer and source."""

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
        import numpy as np
        from peft import get_peft_model

        from mmemo.config import parse
        from mmemo.data.sample import MediaRef, Sample, Turn
        from mmemo.media.clip import DecodedClip
        from mmemo.models.qwen_vl import QwenVLBackbone, QwenVLSettings
        from mmemo.record import RunRecord
        from mmemo.rl.group_rewards import GroupRewards
        from mmemo.rl.rollout import HFRollouts
        from mmemo.train.distributed import Ranks
        from mmemo.train.engine import PlainEngine
        from mmemo.train.grpo_config import GrpoConfig
        from mmemo.train.grpo_objective import GrpoObjective

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
        settings = QwenVLSettings(min_pixels=BOUNDS[0], max_pixels=BOUNDS[1], stills=True)
        model, tokenizer = make_model(shape)
        self.tokenizer = tokenizer
        self.backbone = QwenVLBackbone(model, tokenizer, settings=settings)
        ranks, record = Ranks(cpu=True), RunRecord(folder)
        rollouts = HFRollouts(tokenizer, self.backbone, config.rollout)
        rollouts.stops = []  # nothing ends before C tokens
        rewards = GroupRewards(config.rewards, None, group, "group", record)
        self.clip = DecodedClip(
            "a", "0", 1.0, frames=make_frames(), times=np.arange(IMAGES) / IMAGES
        )
        text = f"<|im_start|>user\n<video>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        self.sample = Sample("a", (Turn("user", text),), {"video": MediaRef("a")})
        if bare:
            self.sample = Sample("a", (Turn("user", "Why"),), {})
        samples = {"a": self.sample}
        self.objective = GrpoObjective(config, rollouts, rewards, samples, ranks, folder, 0)
        peft: Any = get_peft_model(self.backbone, lora())  # pyright: ignore
        self.engine = PlainEngine(peft.train(), config.train, ranks)
        self.features = self.backbone.encode("video", [self.clip])[0] if cached else None
        self.done = 0

    def get(self, sample: Any) -> dict[str, Any]:
        """The collator's source: the tower, unless its output is there."""
        return {"video": self.features or self.backbone.encode("video", [self.clip])[0]}

    def render(self, turns: Sequence[Any], *, generation: bool, modalities: Any) -> Any:
        """The collator's renderer."""
        ids, kinds = self.backbone.expand(turns[0].text, modalities)
        return SimpleNamespace(input_ids=ids, labels=[-100] * len(ids), modality_ids=kinds, text="")

    def step(self) -> int:
        """A step; the prompt's tokens."""
        from mmemo.data.collate import Collator
        from mmemo.train.feed import Micro, Work
        from mmemo.train.loop import take_step

        batch = Collator(self, self)([self.sample], generation=True)  # type: ignore[arg-type]
        work = Work(0, self.done, [Micro(batch, 0, False)])
        work = self.objective.prepare(self.engine, work, self.done, 100)
        batches = [micro.batch for micro in work.micros]
        assert batches[0]["completion_mask"].sum() == batches[0]["completion_mask"].numel()
        take_step(self.engine, self.objective, batches, 1e-5)
        self.done += 1
        return int(batch["input_ids"].shape[1])


Times = list[tuple[float, float]]


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run_ours(shape: str, steps: int, folder: Path, *, cached: bool) -> tuple[Times, int]:
    ours, marks, tokens = Ours(shape, folder, cached=cached), [clock()], 0
    mark_idle()
    for _ in range(steps):
        tokens = ours.step()
        marks.append(clock())
    return between(marks), tokens


def images_only(tokenizer: Any) -> Any:
    """Qwen2.5-VL's processor with the image processor that needs no torchvision, and none for
    video."""
    from transformers import ProcessorMixin
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen2_5_VLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            ids: Any = tokenizer.convert_tokens_to_ids
            self.image_token_id, self.video_token_id = ids(self.image_token), ids(self.video_token)
            self.video_processor = None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    size: Any = {"shortest_edge": BOUNDS[0], "longest_edge": BOUNDS[1]}
    return ImagesOnly(Qwen2VLImageProcessorPil(size=size), tokenizer, TEMPLATE)


def run_trl(shape: str, steps: int, folder: Path) -> tuple[Times, int]:
    from datasets import Dataset
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = make_model(shape)
    pictures = [Image.fromarray(one) for one in make_frames()]
    marks: list[tuple[float, float]] = []
    tokens: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            mark_idle()
            marks.append(clock())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(clock())

    class Trainer(GRPOTrainer):
        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            tokens.append(int(inputs["prompt_mask"].sum(1).max()))
            assert inputs["completion_mask"].shape == (GROUP, ANSWER)
            assert bool(inputs["completion_mask"].all())
            return super()._compute_loss(model, inputs)

    def with_pictures(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        # As they are: a data set would write them as PNG and read them again in each step.
        return {**rows, "images": [pictures] * len(next(iter(rows.values())))}

    prompt = [{"role": "user", "content": QUESTION}]
    data = Dataset.from_dict({"prompt": [prompt] * 8, "images": [None] * 8})
    data.set_transform(with_pictures)
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
            learning_rate=1e-5,
            max_steps=steps,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=images_only(tokenizer),
        peft_config=lora(),
        callbacks=[Watch()],
    )
    trainer.train()
    return between(marks), tokens[-1]


def between(marks: Times) -> Times:
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


IDLE: list[float] = []


def mark_idle() -> None:
    IDLE.append(peak_mb())


def peak_mb() -> float:
    """Of this process alone; a child's ``ru_maxrss`` begins at its parent's."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def child(arm: str, shape: str, steps: int) -> None:
    import torch

    from mmemo import console

    torch.set_num_threads(1)
    console.console.quiet = True
    with tempfile.TemporaryDirectory() as folder:
        if arm == "baseline":
            times, tokens = run_trl(shape, 1 + steps, Path(folder))
        else:
            times, tokens = run_ours(shape, 1 + steps, Path(folder), cached=arm == "cached")
    found = {"times": times[1:], "peak": peak_mb(), "idle": IDLE[0], "tokens": tokens}
    print(json.dumps(found))


def limit(shape: str, prompt: int) -> float:
    """Operations of TRL's step to ours."""
    width, layers = SHAPES[shape]
    lm = layers * 16 * width**2
    tower = TOWER["depth"] * 16 * TOWER["hidden_size"] ** 2 * 4 * IMAGES * VISUAL
    head, answers = 8 * width**2, GROUP * ANSWER
    # Draw, reference, forward and backward: the prompts and the answers of each; answers' head.
    passes = 4 * (lm + head) * answers
    theirs = 3 * GROUP * tower + 4 * lm * GROUP * prompt + passes
    return theirs / (tower + 4 * lm * prompt + passes)


def measure(shape: str, rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    # Freed blocks go back at once, so that the peak is what was needed and not what was kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    arms = ("ours", "baseline", "cached")
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number in range(rounds):
        for arm in arms if number % 2 == 0 else reversed(arms):
            command = [sys.executable, __file__, "--shape", shape, "--child", arm]
            command += ["--steps", str(steps)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm} failed:\n{done.stderr[-4000:]}")
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            took = ", ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in found[arm][-1]["times"])
            print(f"round {number + 1}: {arm} {took} s", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES], default="A")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each arm")
    parser.add_argument("--steps", type=int, default=2, help="that count, in each process")
    parser.add_argument("--child", choices=["ours", "baseline", "cached"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.shape, options.steps)
        return
    found = measure(options.shape, options.rounds, options.steps)

    def middle(arm: str, at: int) -> float:
        return statistics.median(x[at] for one in found[arm] for x in one["times"])

    def most(arm: str, key: str) -> float:
        return statistics.median(one[key] for one in found[arm])

    tokens = {arm: found[arm][0]["tokens"] for arm in ("ours", "baseline")}
    highest = limit(options.shape, tokens["ours"])
    ratio = middle("baseline", 0) / middle("ours", 0)
    cpu = middle("baseline", 1) / middle("ours", 1)
    peaks = {arm: round(most(arm, "peak")) for arm in ("ours", "baseline")}
    result = {
        "ours": round(middle("ours", 0), 2),
        "baseline": round(middle("baseline", 0), 2),
        "ratio": round(ratio, 2),
        "limit": round(highest, 2),
        "share_of_limit": round(ratio / highest, 3),
        "unit": "s/step",
        "cpu": {arm: round(middle(arm, 1), 2) for arm in found},
        "cpu_ratio": round(cpu, 2),
        "cpu_share_of_limit": round(cpu / highest, 3),
        "cached": round(middle("cached", 0), 2),
        "cached_cpu_ratio": round(middle("baseline", 1) / middle("cached", 1), 2),
        "peak_mb": peaks,
        "memory_share": round(peaks["ours"] / peaks["baseline"], 3),
        "step_mb": {arm: round(peaks[arm] - most(arm, "idle")) for arm in peaks},
        "tokens": tokens,
        "shape": options.shape,
        "rounds": options.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
