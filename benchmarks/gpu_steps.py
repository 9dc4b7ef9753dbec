"""Tokens a second, share of the matrix-multiply ceiling and peak memory of SFT, DPO and GRPO steps.

    python benchmarks/gpu_steps.py --shape 0.5B 7B --output gpu_steps.json

Whole stages run with the shipped configs of Qwen2.5-Omni (``train_configs/qwen2_5_omni``) in
bfloat16, on drawn clips and a Thinker with random weights: ``0.5B`` and ``7B`` have the language
models of Qwen2.5-0.5B and Qwen2.5-Omni-7B, ``tiny`` is for a machine without a GPU. The encoders
are small, because their features are stored before the first step. A prompt has 16 frames of 224 x
224 (512 tokens) and the clip's sound; GRPO draws 8 answers of 256 tokens.

``ceiling`` is what the device reaches in a product of two square bfloat16 matrices, measured in the
same run. ``flop`` counts the operations of a step as torch's counter does, recomputed activations
included; ``share`` is ``flop`` by the seconds of a step, divided by the ceiling. Steps are medians
of those after the first two. Drawing reads all weights for every token and is bound by memory, so a
GRPO step has a small share by its nature. ``peak_gib`` is the largest memory that torch held. The
script prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "train_configs" / "qwen2_5_omni"
STAGES = {"sft": "sft.yaml", "dpo": "avem_dpo.yaml", "grpo": "grpo_ptr.yaml"}
HALF = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
SEVEN = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "vocab_size": 1024,
}
SHAPES = {"tiny": (TINY, [6, 5, 5]), "0.5B": (HALF, [16, 24, 24]), "7B": (SEVEN, [16, 24, 24])}
"""The language model, and how its positions divide the rotated pairs."""
TOKENS = {
    "audio_token_id": "<|AUDIO|>",
    "image_token_id": "<|IMAGE|>",
    "video_token_id": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}
CLIPS, FRAMES, SIDE = 8, 16, 224
REASONS = "the brows are lowered and the voice rises, and " * 40
"""An answer of about 200 tokens, of which the tiny shape takes a part."""


def tokenizer_of(words: int) -> Any:
    from tiny_vlm import TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKENS.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([REASONS], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=special,
    )
    made.chat_template = TEMPLATE
    return made


def save_model(shape: str, folder: Path, device: str) -> Path:
    """A Thinker with random weights in bfloat16."""
    import torch
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    tokenizer = tokenizer_of(600)
    text, sections = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    width = text["hidden_size"]
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            **text,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "intermediate_size": 128,
            "out_hidden_size": width,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "output_dim": width,
        },
        **{key: tokenizer.convert_tokens_to_ids(name) for key, name in TOKENS.items()},
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    return folder


def write_rows(folder: Path) -> None:
    """Drawn clips, and a manifest for each stage."""
    from mmemo.config import parse
    from mmemo.world.config import WorldConfig
    from mmemo.world.render import run_world

    size = {"train_clips": CLIPS, "val_clips": 6, "test_clips": 6, "test_speakers": 3}
    world = run_world(parse(WorldConfig, {"output_dir": str(folder / "world"), "size": size}))
    clips = sorted((world / "clips").rglob("*.mp4"))[:CLIPS]
    rows: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
    for number, clip in enumerate(clips):
        path, other = (str(x.relative_to(folder)) for x in (clip, clips[number - 1]))
        media = {"video": path, "audio": path}
        asked = [{"role": "user", "content": f"<video><audio>Which emotion is it ({number})?"}]
        good, bad = (f"<think>{REASONS}</think><answer>{x}</answer>" for x in ("angry", "sad"))
        one = {"sample_id": f"row-{number}"}
        told = [*asked, {"role": "assistant", "content": good}]
        rows["sft"].append({**one, "messages": told, "videos": [path], "audios": [path]})
        rows["grpo"].append({**rows["sft"][-1], "label": "angry"})
        rows["dpo"].append(
            {
                **one,
                **media,
                "prompt": asked,
                "query_modality": "joint",
                "chosen": good,
                "rejected_spurious": bad,
                "rejected_hallucinated": bad.replace("brows", "hands"),
                "video_negative": other,
                "audio_negative": other,
            }
        )
    for stage, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{stage}.jsonl").write_text(text, encoding="utf-8")


def values_of(stage: str, folder: Path, model: Path, out: Path, steps: int, cpu: bool) -> Any:
    """The shipped config of a stage, on the random model and the drawn clips."""
    from mmemo.config import parse, read_yaml
    from mmemo.stages import config_class

    values = read_yaml(CONFIGS / STAGES[stage], {"run": str(out), "seed": "0"})
    side = SIDE if not cpu else 56
    values["output_dir"] = str(out)
    values["model"].pop("adapter", None)
    values["model"] |= {
        "path": str(model),
        "lora": {"r": 64, "lora_alpha": 128, "lora_dropout": 0.0},
        "native": {"min_pixels": side * side, "max_pixels": side * side},
        "sampling": {"frames": FRAMES if not cpu else 4},
    }
    values["data"] = {"manifests": [str(folder / f"{stage}.jsonl")], "media_root": str(folder)}
    values["train"] |= {"max_steps": steps, "gradient_accumulation_steps": 1, "learning_rate": 1e-5}
    values["run"] = {"logging_steps": 1, "save_steps": 10**6, "use_cpu": cpu}
    values["store"] = {"path": str(folder / f"store-{model.name}")}
    if stage == "grpo":
        values["rewards"] = [{"path": f"{Path(__file__).resolve()}:even", "name": "even"}]
        values["trust"] = None
        values["rollout"]["max_completion_length"] = 16 if cpu else 256
    return parse(config_class(stage), {k: v for k, v in values.items() if v is not None})


def even(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
    """The reward: the share of tokens with an even id."""
    return [sum(x % 2 == 0 for x in ids) / max(1, len(ids)) for ids in completion_ids]


def run_stage(stage: str, config: Any) -> list[dict[str, Any]]:
    """The logged steps of a stage."""
    from mmemo import stages

    stages.stage(stage).runner(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "seconds_per_step" in line]


class Whole:
    """In place of torch's tracker of modules, which does not work under ``inference_mode``."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing is tracked."""

    def __exit__(self, *error: object) -> None:
        """Nothing was tracked."""


def operations(stage: str, config_of: Any) -> int:
    """Floating-point operations of one step: those of two steps less those of one."""
    from torch.utils.flop_counter import FlopCounterMode

    counted: list[int] = []
    for steps in (1, 2):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Whole()  # pyright: ignore
        with counter:
            run_stage(stage, config_of(f"count-{steps}", steps))
        counted.append(counter.get_total_flops())
    return counted[1] - counted[0]


def ceiling(device: str, size: int) -> float:
    """Floating-point operations a second in bfloat16 products: the best of five rounds."""
    import torch

    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            one @ one
        wait(device)
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * size**3 / best


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def measure(shape: str, stages: list[str], device: str, steps: int) -> list[dict[str, Any]]:
    import torch

    from mmemo import console

    console.console.quiet = True
    cpu, found = device == "cpu", list[dict[str, Any]]()
    highest = ceiling(device, 512 if cpu else 8192)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        model = save_model(shape, folder / f"model-{shape}", device)
        for stage in stages:

            def config_of(run: str, steps: int, stage: str = stage) -> Any:
                return values_of(stage, folder, model, folder / f"{stage}-{run}", steps, cpu)

            if not cpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            timed = run_stage(stage, config_of("timed", steps))[2:]
            seconds = statistics.median(line["seconds_per_step"] for line in timed)
            flop = operations(stage, config_of)
            found.append(
                {
                    "shape": shape,
                    "stage": stage,
                    "seconds": seconds,
                    "tokens_per_second": statistics.median(x["tokens_per_second"] for x in timed),
                    "flop": flop,
                    "share": flop / seconds / highest,
                    "peak_gib": timed[-1].get("peak_memory_gib", 0.0),
                    "ceiling": highest,
                    "device": "cpu" if cpu else torch.cuda.get_device_name(),
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| model | stage | seconds a step | tokens a second | share of ceiling | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {x['shape']} | {x['stage']} | {x['seconds']:.2f} | {x['tokens_per_second']:.0f} | "
        f"{100 * x['share']:.1f}% | {x['peak_gib']:.1f} GiB |"
        for x in found
    ]
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES], default=["0.5B", "7B"])
    parser.add_argument("--stage", nargs="+", choices=[*STAGES], default=[*STAGES])
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=8, help="of each stage; the first two warm up")
    parser.add_argument("--output", type=Path, default=Path("gpu_steps.json"))
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        line
        for shape in options.shape
        for line in measure(shape, options.stage, device, options.steps)
    ]
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
