"""The tiny random Qwen2.5-VL for the benchmarks of whole training steps, in TRL's form and in
mmemo's, and its training data: four images of 128 tokens each, a question, and answers of C
tokens.

Shape A has a language model 256 wide with 6 layers and a vision encoder 160 wide with 8 (encoder
to prefill 1.9 : 1, as in R1-Omni). Shape B has a language model 512 wide with 8 layers (0.4 : 1,
nearer a 7B model).
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

SHAPES = {"A": (256, 6), "B": (512, 8), "tiny": (64, 2)}
"""Width and layers of the language model."""
TOWER = {"hidden_size": 160, "depth": 8}
IMAGES, HEIGHT, WIDTH, VISUAL = 4, 224, 448, 128
ANSWER = 64
"""C, the token that ends an answer among them."""
QUESTION = "Which emotion does the person show? " + "Look and say what moves and why. " * 4
BOUNDS = (56 * 56, 28 * 28 * 1280)
ADAPTED = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' }}"
    "{% if m['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""An answer ends with the token that ends it: TRL would learn what comes after, too."""


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


def answer_text(tokenizer: Any, seed: int, tokens: int = ANSWER) -> str:
    """Words that are, with the token that ends them, so many tokens."""
    rng, text = random.Random(seed), ""
    for _ in range(100_000):
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 6)))
        longer = f"{text} {word}".strip()
        size = len(tokenizer(longer, add_special_tokens=False)["input_ids"]) + 1
        if size == tokens:
            return longer
        text = longer if size < tokens else text
    raise ValueError(f"no words are {tokens} tokens long")


def shake(model: Any) -> None:
    """Adapters that change something, the same wherever they have the same names: a new one
    changes nothing, and then every preference loss is log 2."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_" in name:
            name = name[name.index("language_model") :]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            weight.data.normal_(std=0.05, generator=generator)


def load_ours(shape: str, folder: Path) -> Any:
    """A :class:`~mmemo.models.build.Loaded`, as from a checkpoint of the model with a new LoRA that
    was shaken."""
    from mmemo.media.config import SamplingConfig
    from mmemo.models.adapters.lora import add_lora
    from mmemo.models.build import AdapterConfig, Loaded, set_trainable
    from mmemo.models.qwen.processing import NativeProcessor, Notes
    from mmemo.models.qwen.vl import NativeVL, QwenVLConfig

    model, tokenizer = make_model(shape)
    settings = QwenVLConfig(min_pixels=BOUNDS[0], max_pixels=BOUNDS[1], stills=True)
    native: Any = NativeVL(model.config)
    native.load_state_dict(model.state_dict())
    native.attach(tokenizer, SamplingConfig(frames=IMAGES), settings)
    processor = NativeProcessor(native.backbone, TEMPLATE, str(folder), Notes())
    loaded = Loaded(add_lora(native, AdapterConfig(r=16, lora_dropout=0.0)), processor)
    set_trainable(loaded.model, ["lm"])
    shake(loaded.model)
    return loaded


class Pictures:
    """Where batches get the images' features from: the tower each time or, if ``cached``, memory,
    as in a run whose clips have been encoded."""

    def __init__(self, backbone: Any, *, cached: bool) -> None:
        import numpy as np

        from mmemo.media.clip import DecodedClip

        times = np.arange(IMAGES) / IMAGES
        self._clip = DecodedClip("a", "0", 1.0, frames=make_frames(), times=times)
        self._backbone, self._kept = backbone, None
        if cached:
            self._kept = self.get(None)

    def get(self, sample: Any) -> Any:
        return self._kept or {"video": self._backbone.encode("video", [self._clip])[0]}

    def keys(self, sample: Any) -> dict[str, str]:
        return {"video": "a"}


def pictures() -> list[Any]:
    """The images as TRL takes them."""
    from PIL import Image

    return [Image.fromarray(one) for one in make_frames()]


def tower_cost() -> int:
    """Multiplications of the linear layers of the tower for all images."""
    return TOWER["depth"] * 16 * TOWER["hidden_size"] ** 2 * 4 * IMAGES * VISUAL
