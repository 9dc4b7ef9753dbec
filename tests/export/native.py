"""Tiny native models as their makers release them, and runs that trained an adapter on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from mmemo import checkpoint
from mmemo.config import parse
from mmemo.models.adapters.lora import save_model
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.models.native_files import FED, TEMPLATE
from tests.models.parts import shake
from tests.models.qwen import test_omni as omni
from tests.models.qwen import test_vl as vl

# vLLM's attention on a CPU needs heads that are at least 32 wide.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
PROMPTS = ([30, 41, 52, 63, 74], [90, 20, 33, 44], [100, 101, 102, 103, 104, 105])


def release_omni(folder: Path, inner: int = 128, *, media: bool = False) -> Path:
    """Qwen2.5-Omni as released: the Thinker inside of the whole model's config and names.
    ``media``: with the files that vLLM makes a processor of."""
    tokenizer = omni.train_tokenizer()
    config = omni.tiny_thinker(tokenizer, inner).config
    _widen(config)
    if media:
        config.audio_config.encoder_attention_heads = config.vision_config.num_heads = 1
    torch.manual_seed(3)
    thinker: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
    thinker.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({f"thinker.{n}": x for n, x in load_file(file).items()}, file, {"format": "pt"})
    inside = json.loads((folder / "config.json").read_text())
    whole = AutoConfig.for_model("qwen2_5_omni", thinker_config=inside, enable_audio_output=False)
    whole.architectures = ["Qwen2_5OmniModel"]
    whole.save_pretrained(folder)
    _with_tokenizer(folder, tokenizer)
    if media:
        _with_processor(folder, config)
    return folder


def _with_processor(folder: Path, config: Any) -> None:
    values = WhisperFeatureExtractor(feature_size=config.audio_config.num_mel_bins).to_dict()
    values |= {
        "processor_class": "Qwen2_5OmniProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **FED,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    names = {f"{kind.lower()}_token": f"<|{kind}|>" for kind in ("IMAGE", "AUDIO", "VIDEO")}
    names |= {f"{x}_token": f"<|{x}|>" for x in ("vision_bos", "vision_eos")}
    names |= {f"{x}_token": f"<|{x}|>" for x in ("audio_bos", "audio_eos")}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": names}))


def release_vl(folder: Path) -> Path:
    """Qwen2.5-VL as released."""
    backbone = vl.tiny(stills=False)
    config: Any = backbone.model.config
    _widen(config)
    torch.manual_seed(3)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return _with_tokenizer(folder, backbone.tokenizer)


def _widen(config: Any) -> None:
    for name, value in {**HEADS, "rope_parameters": ROPE}.items():
        setattr(config.text_config, name, value)
    # The released models say so; the class's default is the opposite.
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False


def _with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def trained(run: Path, base: Path, **changes: Any) -> Loaded:
    """A run folder whose adapter has moved away from its initialisation."""
    values = {"path": str(base), "lora": LORA, "native": FED, "sampling": {"frames": 4}}
    loaded = load_model(parse(ModelConfig, {**values, **changes}), base_dir=run / "base")
    shake(loaded.model, 0.2)

    def write(staged: Path) -> None:
        save_model(loaded.model, loaded.processor, staged, base=loaded.base)

    checkpoint.save(run / "final", write)
    return loaded


def logits(model: Any, prompt: list[int] = PROMPTS[0]) -> torch.Tensor:
    """(V,) of the token after a prompt of text."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].float()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The most probable next tokens, without a cache and without any processing of logits."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, ids).argmax()))
    return ids[len(prompt) :]
