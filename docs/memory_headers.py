"""The forecasts of memory in the headers of the configs for Qwen2.5-Omni-7B.

    python docs/memory_headers.py            forecasts and writes train_configs/qwen2_5_omni
    python docs/memory_headers.py --check    fails if a header is not what is forecast

Only the shapes of the released 7B are used: the numbers are those of its ``config.json``.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from transformers import Qwen2_5OmniThinkerConfig  # noqa: E402

from mmemo.check.fitting import Forecaster, parse_lengths  # noqa: E402
from mmemo.check.memory import MemoryEstimate  # noqa: E402
from mmemo.check.shapes import shapes_of  # noqa: E402
from mmemo.check.stages import plan_without_rows  # noqa: E402
from mmemo.check.view import memory_parts, size  # noqa: E402
from mmemo.config import load_config  # noqa: E402
from mmemo.stages import stage  # noqa: E402

FOLDER = ROOT / "train_configs" / "qwen2_5_omni"
BEGIN, END = "# memory: made by docs/memory_headers.py", "# /memory"
LENGTHS = "2048+256"
GB = 10**9


class Hardware(NamedTuple):
    """``memory``: of a GPU. ``ranks``: GPUs. ``overrides``: by the name of a config."""

    memory: int
    ranks: int
    overrides: Mapping[str, Sequence[str]]


SMALL = ["run.deepspeed=null", "model.lora={r: 8, lora_alpha: 32, lora_dropout: 0.0}"]
"""AVEm-DPO by an adapter instead of the whole language model."""
ONE = "train.per_device_train_batch_size=1"
HARDWARE: Mapping[str, Hardware] = {
    "one GPU of 24 GB (QLoRA)": Hardware(
        24 * GB,
        1,
        {
            "sft": ["model.quantization=nf4", ONE, "train.gradient_accumulation_steps=64"],
            "grpo_ptr": [
                "model.quantization=nf4",
                "train.max_logits=4194304",
                "train.gradient_accumulation_steps=8",
                "rollout.merge_adapter=false",
                "rollout.fused_steps=false",
            ],
            "avem_dpo": [
                *SMALL,
                "model.quantization=nf4",
                "train.max_logits=4194304",
                ONE,
                "train.gradient_accumulation_steps=64",
            ],
        },
    ),
    "one GPU of 80 GB (LoRA)": Hardware(
        80 * GB,
        1,
        {
            "sft": ["train.gradient_accumulation_steps=32"],
            "grpo_ptr": ["train.gradient_accumulation_steps=8"],
            "avem_dpo": [*SMALL, "train.gradient_accumulation_steps=32"],
        },
    ),
    "8 GPUs of 80 GB": Hardware(
        80 * GB, 8, {name: ["run.processes=8"] for name in ("sft", "grpo_ptr", "avem_dpo")}
    ),
    "two machines with 8 GPUs of 80 GB": Hardware(
        80 * GB,
        16,
        {
            "sft": ["train.gradient_accumulation_steps=2"],
            "grpo_ptr": [],
            "avem_dpo": ["train.gradient_accumulation_steps=2"],
        },
    ),
}
"""Two machines are started by torchrun, each with 8 processes. There a GRPO step has twice as many
prompts; of the others, a step has as many rows everywhere."""

STAGES = {"sft": "sft", "grpo_ptr": "grpo", "avem_dpo": "dpo"}
PIPELINE = {"attribute": "sft", "expression": "sft", "emotion": "sft", "grpo": "grpo_ptr"}
PIPELINE |= {"dpo": "avem_dpo"}
"""The stages of the pipeline that train, and their configs."""


def save_shapes(folder: Path) -> Path:
    """``config.json`` of a 7B Thinker."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            "mrope_section": [16, 24, 24],
        },
        "tie_word_embeddings": False,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    sound = {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "output_dim": 3584,
        "num_mel_bins": 128,
    }
    known = Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": 3584},
        audio_config=sound,
        dtype="bfloat16",
    )
    known.save_pretrained(folder)
    return folder


_MODELS: dict[str, Any] = {}
"""Models by what decides their shapes."""


def forecast_of(name: str, hardware: Hardware, shapes: Path) -> MemoryEstimate:
    """The forecast for a config on some hardware."""
    kind = stage(STAGES[name])
    overrides = [f"--{one}" for one in (*hardware.overrides[name], f"model.path={shapes}")]
    variables = {"run": "runs/x", "seed": "0"}
    config: Any = load_config(kind.config_class, FOLDER / f"{name}.yaml", overrides, variables)
    plan, lengths = plan_without_rows(config), parse_lengths(LENGTHS)
    if STAGES[name] != "grpo":  # a row holds its answer
        lengths = replace(lengths, longest=lengths.longest + lengths.answer)
    key = repr((config.model.path, config.model.lora, config.model.dtype, config.trainable))
    if key not in _MODELS:
        _MODELS[key] = shapes_of(config.model, list(config.trainable))
    again = Forecaster(
        config,
        _MODELS[key],
        plan,
        lengths,
        plan.training_of,
        hardware.ranks,
        hardware.memory,
    )
    return again()


def lines_of(name: str, shapes: Path) -> list[str]:
    """The header of a config."""
    found = [
        "Memory of a GPU for Qwen2.5-Omni-7B, as `mmemo check` forecasts it with",
        f"`--lengths {LENGTHS}`: prompts of 2048 tokens, and answers of 256 where rows have them.",
    ]
    for title, hardware in HARDWARE.items():
        estimate = forecast_of(name, hardware, shapes)
        if estimate.total > hardware.memory:
            raise SystemExit(f"{name} does not fit on {title}: {size(estimate.total)}")
        found.append(f"- {title}: {size(estimate.total)}")
        for phase, parts in memory_parts(estimate):
            shown = ", ".join(f"{part} {size(n)}" for part, n in parts.items() if n >= 10**7)
            found.append(f"    {phase}: {shown}")
        given = shlex.join(f"--{one}" for one in hardware.overrides[name])
        found += [f"    {given}"] if given else []
    return found


def of_pipeline(headers: Mapping[str, Sequence[str]]) -> list[str]:
    """The header of the pipeline: the total of each stage, by hardware."""
    found = [
        "Memory of a GPU in each stage, as in the headers of the stages' configs. For other",
        "hardware, add the overrides that stand there to the stage's `overrides` below.",
    ]
    for title in HARDWARE:
        start = f"- {title}: "
        totals = {
            config: next(line for line in lines if line.startswith(start)).removeprefix(start)
            for config, lines in headers.items()
        }
        shown = (f"{name} {totals[config]}" for name, config in PIPELINE.items())
        found.append(start + ", ".join(shown))
    return found


def filled(text: str, lines: Sequence[str]) -> str:
    """A config with these lines between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the marks {BEGIN} and {END} are missing; put them back")
    block = "\n".join(f"# {line}" for line in lines)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write or check the headers: of all configs, or of those that are named."""
    names = [name for name in STAGES if name in arguments] or list(STAGES)
    with tempfile.TemporaryDirectory() as folder:
        shapes = save_shapes(Path(folder))
        headers: dict[str, Sequence[str]] = {name: lines_of(name, shapes) for name in names}
    if len(names) == len(STAGES):
        headers["pipeline"] = of_pipeline(headers)
    stale = 0
    for name, lines in headers.items():
        file = FOLDER / f"{name}.yaml"
        text = file.read_text(encoding="utf-8")
        wanted = filled(text, lines)
        if "--check" not in arguments:
            file.write_text(wanted, encoding="utf-8")
        elif wanted != text:
            stale += 1
            print(f"{file.name}: run python docs/memory_headers.py")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
