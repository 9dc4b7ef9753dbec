"""Features, token ids and modality ids give the logits of the untouched Qwen2.5-VL."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from mmemo.config import parse
from mmemo.data.collate import Collator, Streams
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError, DataError
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import TEXT, VIDEO, Backbone
from mmemo.models.qwen.vl import QwenVLBackbone, QwenVLConfig
from tests.generation.test_logprobs import check, continuations
from tests.generation.test_rollout import PLAIN, SEEDS, frequent_stops, same
from tests.models.qwen.test_omni import QUESTION, Rows, clip, close, sample

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the released tokenizer's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([QUESTION, "angry sad happy neutral"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL),
    )


def tiny(stills: bool, inner: int = 96) -> QwenVLBackbone:
    """``inner``: width inside the LM's MLP."""
    tokenizer = train_tokenizer()

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 4,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": inner,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,  # so that a wrong position or feature moves the logits
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    settings = QwenVLConfig(min_pixels=28 * 28, max_pixels=3 * 28 * 28, stills=stills)
    return QwenVLBackbone(model, tokenizer, SamplingConfig(frames=6), settings).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["film", "stills"])
def backbone(request: pytest.FixtureRequest) -> QwenVLBackbone:
    return tiny(request.param)


class Written:
    """The collator's renderer. All it knows of a clip is what the collator gives it."""

    def __init__(self, backbone: QwenVLBackbone) -> None:
        self.backbone, self.tokenizer = backbone, backbone.tokenizer

    def render(self, turns: Sequence[Turn], *, generation: bool, modalities: Streams) -> Any:
        features: Any = {name: x for name, x in modalities.items() if x is not None}
        ids, kinds = self.backbone.expand("".join(turn.text for turn in turns), features)
        return SimpleNamespace(input_ids=ids, labels=[-100] * len(ids), modality_ids=kinds, text="")


def make_batch(
    backbone: QwenVLBackbone, clips: Mapping[str, DecodedClip], samples: Sequence[Sample]
) -> dict[str, Any]:
    source: Any = Rows(backbone, clips)  # type: ignore[arg-type]
    return Collator(Written(backbone), source)(samples, generation=True)


CLIPS = {"a": clip(1), "b": clip(2, seconds=1.3, frames=4, size=(64, 40))}
MIXED = [
    sample("<video>", "a"),
    sample("", "b"),
    sample("<video>", "b", "Look. " + QUESTION),
    sample("<video>", "a", "Again: " + QUESTION),
]


def untouched(backbone: QwenVLBackbone, batch: dict[str, Any], clips: list[DecodedClip]) -> Tensor:
    """The released forward, from pixels, a clip for each row that has one."""
    ids, given = batch["input_ids"], {}
    made = [backbone.pixels(one) for one in clips]
    patches, grids = torch.cat([x for x, _, _ in made]), [grid for _, grid, _ in made]
    if backbone.settings.stills:  # type: ignore[attr-defined]
        stills = [torch.tensor([1, *grid[1:]]) for grid in grids for _ in range(int(grid[0]))]
        given = {"pixel_values": patches, "image_grid_thw": torch.stack(stills)}
    else:
        given = {"pixel_values_videos": patches, "video_grid_thw": torch.stack(grids)}
        given["second_per_grid_ts"] = torch.tensor([seconds for _, _, seconds in made])
    config: Any = backbone.model.config
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    with torch.no_grad():
        found = backbone.model(
            input_ids=ids, attention_mask=batch["attention_mask"], mm_token_type_ids=kinds, **given
        ).logits
    backbone.model.model.rope_deltas = None  # which it leaves behind
    return found


def test_logits_are_the_untouched_forward(backbone: QwenVLBackbone) -> None:
    """Rows of different lengths, one without media, two that share a clip. In float64: the two
    ways batch the tower differently, and in float32 that alone rounds by more than 1e-5 of the 7
    that logits reach here."""
    backbone = copy.deepcopy(backbone).double()
    batch = make_batch(backbone, CLIPS, MIXED)
    assert batch["clip_index"].tolist() == [0, -1, 1, 0]
    with torch.no_grad():
        ours = backbone.logits(batch)
    close(ours, untouched(backbone, batch, [CLIPS[name] for name in "aba"]), batch)


def test_a_still_is_what_the_released_processor_makes_of_an_image() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    stills, one = tiny(True), CLIPS["a"]
    assert one.frames is not None
    size: Any = {"shortest_edge": 28 * 28, "longest_edge": 3 * 28 * 28}
    found = Qwen2VLImageProcessorPil(size=size)(list(one.frames), return_tensors="pt")
    patches, grid, _ = stills.pixels(one)
    assert found["image_grid_thw"].tolist() == [[1, *grid[1:].tolist()]] * int(grid[0])
    torch.testing.assert_close(patches, found["pixel_values"], atol=0.02, rtol=0)
    encoded: Any = stills.encode("video", [one])[0]
    text, kinds = stills.expand("<video>", {"video": encoded})
    block = ["<|vision_start|>", *["<|image_pad|>"] * 2, "<|vision_end|>"]
    assert stills.tokenizer.convert_ids_to_tokens(text) == block * 6
    assert kinds == [TEXT, VIDEO, VIDEO, TEXT] * 6


def test_sharing_the_prompt_changes_no_number(backbone: QwenVLBackbone) -> None:
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
    model: Any = get_peft_model(tiny(bool(backbone.settings.stills)), lora)  # type: ignore
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    check(model.eval(), make_batch(backbone, CLIPS, MIXED), continuations())


def test_rollouts_are_those_of_plain_decoding(backbone: QwenVLBackbone) -> None:
    prompts = make_batch(backbone, CLIPS, MIXED[:3])
    found = []
    for off in ({}, PLAIN):
        values = {"num_generations": 4, "max_completion_length": 12, **off}
        engine = HFRollouts(backbone.tokenizer, backbone, parse(RolloutConfig, values))
        found.append(frequent_stops(engine).generate(backbone, prompts, SEEDS))
    same(*found)


def test_the_protocol_is_met(backbone: QwenVLBackbone) -> None:
    as_protocol: Backbone = backbone
    members = [name for name in vars(Backbone) if not name.startswith("_")]
    members += list(Backbone.__annotations__)
    assert {name for name in members if not hasattr(as_protocol, name)} == set()
    stills = not backbone.settings.stills  # type: ignore[attr-defined]
    assert tiny(stills).feature_fingerprint("video") != backbone.feature_fingerprint("video")
    with pytest.raises(ConfigError, match=r"Qwen2\.5-VL has no audio branch"):
        backbone.encode("audio", [CLIPS["a"]])
    with pytest.raises(DataError, match="<video> has no video features"):
        backbone.expand("<video>", {})
