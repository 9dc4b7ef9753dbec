"""Tiny native models on disk, as their makers release them: weights, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniConfig

from tests.models.qwen import test_omni as omni
from tests.models.qwen import test_vl as vl

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FED: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 3 * 28 * 28}
"""``model.native`` that keeps clips small."""


def save_omni(folder: Path, *, whole: bool = False, inner: int = 96) -> Path:
    """A Thinker; ``whole``: in the layout of the full released checkpoint, with more beside it.
    ``inner``: width inside the LM's MLP."""
    tokenizer = omni.train_tokenizer()
    tokenizer.chat_template = TEMPLATE
    thinker: Any = omni.tiny_thinker(tokenizer, inner)
    thinker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if whole:
        inside = load_file(folder / "model.safetensors")
        state = {f"thinker.{name.removeprefix('thinker.')}": x for name, x in inside.items()}
        first = next(iter(state.values()))
        save_file(
            {**state, "talker.codec_head.weight": first.clone()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        config = Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict())
        config.save_pretrained(folder)
    return folder


def save_vl(folder: Path, *, inner: int = 96) -> Path:
    backbone = vl.tiny(stills=False, inner=inner)
    backbone.tokenizer.chat_template = TEMPLATE
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder
