"""Qwen2.5-Omni at its released sizes, without weights: every name that mmemo uses is there.

The sizes are those of the released configs: of the language models Qwen2.5-7B and Qwen2.5-3B (arXiv
2412.15115), with a head of their own, and of the encoders (arXiv 2503.20215): the vision encoder of
Qwen2.5-VL and an audio encoder of Whisper-large-v3's size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedConfig, Qwen2_5OmniConfig

from mmemo.config import parse
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters import lora
from mmemo.models.backbones import BACKBONES
from mmemo.models.build import set_trainable
from mmemo.models.composed.configuration import FusionConfig
from mmemo.models.config import AdapterConfig, BranchConfig
from mmemo.models.layouts import LAYOUTS, extra_parts, vllm_name
from mmemo.models.qwen.branch import SPARE
from mmemo.models.qwen.branches import add_face, add_fusion, own_weight
from tests.models.qwen.kinds import KINDS, train_tokenizer
from tests.models.qwen.test_face import FACE_BRANCH


@dataclass(frozen=True)
class Size:
    """``lm`` is what the makers state of the language model with an untied head."""

    text: dict[str, int]
    lm: int


SIZES = {
    "7B": Size(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        lm=7_615_616_512,
    ),
    "3B": Size(
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        # Qwen2.5-3B has one table for both; this one has a head besides.
        lm=3_085_938_688 + 151936 * 2048,
    ),
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
AUDIO = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "n_window": 100,
}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config_of(size: Size) -> Any:
    width = size.text["hidden_size"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    thinker = {
        "text_config": {**size.text, "rope_parameters": rope, "tie_word_embeddings": False},
        "vision_config": {**VISION, "out_hidden_size": width},
        "audio_config": {**AUDIO, "output_dim": width},
        "tie_word_embeddings": False,
    }
    return Qwen2_5OmniConfig(thinker_config=thinker)


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    """The class that a whole checkpoint of this config loads as, with weights of no memory."""
    whole = config_of(SIZES[name])
    kind = BACKBONES[whole.model_type]
    config: PreTrainedConfig = whole.thinker_config
    assert BACKBONES[config.model_type] is kind
    with torch.device("meta"):
        made: Any = kind(config)  # pyright: ignore[reportArgumentType]
    spare = {token: token for token in SPARE}
    tokenizer = train_tokenizer({**KINDS["qwen2_5_omni"].names, **spare})
    settings = parse(kind.settings_kind, KINDS["qwen2_5_omni"].settings)
    return made.attach(tokenizer, SamplingConfig(), settings)


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_it_has_as_many_weights_as_released(name: str, model: Any) -> None:
    size, width = SIZES[name], SIZES[name].text["hidden_size"]
    assert count(model.model.language_model) + count(model.lm_head) == size.lm
    # By hand: patches; attention, MLP and norms of each layer; the merger.
    d, inner = VISION["hidden_size"], VISION["intermediate_size"]
    block = 4 * d * d + 4 * d + 3 * d * inner + 2 * inner + d + 2 * d
    merger = d + (4 * d) ** 2 + 4 * d + 4 * d * width + width
    assert count(model.model.visual) == 3 * 2 * 14 * 14 * d + 32 * block + merger
    # Two convolutions; attention whose keys have no bias, MLP and norms; the projection.
    d, inner = AUDIO["d_model"], AUDIO["encoder_ffn_dim"]
    block = 4 * d * d + 3 * d + 2 * d * inner + inner + d + 4 * d
    front = 3 * 128 * d + d + 3 * d * d + d
    # A start and an end of sound, which are not trained.
    ends = count(model.model.audio_tower) - (front + 32 * block + 2 * d + d * width + width)
    assert ends in (0, 2 * width)
    total = {"7B": 8.93e9, "3B": 4.70e9}[name]
    assert count(model) == pytest.approx(total, rel=1e-2)


def test_every_name_that_mmemo_uses_is_there(name: str, model: Any) -> None:
    layers = SIZES[name].text["num_hidden_layers"]
    pattern = re.compile(lora.targets(model, None))
    hit = [one for one, _ in model.named_modules() if pattern.fullmatch(one)]
    wanted = {
        f"model.language_model.layers.{number}.{part}.{layer}"
        for number in range(layers)
        for layer in LAYERS
        for part in ["self_attn" if layer in LAYERS[:4] else "mlp"]
    }
    assert set(hit) == wanted
    for encoder in model.encoder_names:
        assert count(getattr(model.model, encoder)) > 6e8
    assert extra_parts(model) == []
    begins = tuple(LAYOUTS[model.config.model_type].lora or ())
    assert all(any(f"{one}.".startswith(begin) for begin in begins) for one in hit)
    whole = LAYOUTS[model.config.model_type].whole
    assert whole is not None
    assert hasattr(config_of(SIZES[name]), whole.key)


def test_it_takes_branches_and_an_adapter(name: str, model: Any) -> None:
    width = SIZES[name].text["hidden_size"]
    face = parse(BranchConfig, FACE_BRANCH)
    add_face(model, face, {"hub": None, "folder": None, "license": None})
    add_fusion(model, FusionConfig(kind="attention"))
    assert model.connectors.face.proj[-1].weight.shape == (width, width)
    assert model.fusion.fuse.proj.weight.shape == (width, width)
    assert all(own_weight(n) for n, p in model.named_parameters() if not p.is_meta)
    adapted: Any = lora.add_lora(model, AdapterConfig(r=16, lora_dropout=0.0))
    chosen = set_trainable(adapted, ["lm", "connectors", "fusion"])
    matrices = [one for one in chosen if lora.in_adapter(one)]
    assert len(matrices) == 2 * len(LAYERS) * SIZES[name].text["num_hidden_layers"]
    names = list(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    inner = [one.removeprefix("base_model.model.") for one in names]
    mine = [one for one, short in zip(names, inner, strict=True) if not own_weight(short)]
    assert {vllm_name(model.config.model_type, one).split(".layers.")[0] for one in mine} == {
        "base_model.model.thinker.model"
    }
    assert len(mine) == len(matrices) < len(names)
