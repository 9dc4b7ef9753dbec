"""The native backbones as tiny random models: what every one of them is tested with.

To add one, write how a tiny model of its class is configured and add a row to :data:`KINDS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import Sample, Turn
from mmemo.media.clip import DecodedClip
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.models.qwen.test_omni import Rows, clip, sample

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OLD = {
    "audio_token_id": "<|AUDIO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "image_token_id": "<|IMAGE|>",
    "video_token_id": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
}
"""Names of tokens in the config of Qwen2.5-Omni and Qwen2-Audio, and the tokens."""
NEW = {
    "audio_token_id": "<|audio_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "audio_end_token_id": "<|audio_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""The same of the other models."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": ROPE,
    "initializer_range": 0.2,  # so that a wrong position or feature moves the logits
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
WINDOWS = {"window_size": 56, "fullatt_block_indexes": [1]}
STACK: dict[str, Any] = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
"""Qwen3's vision encoder: features of two of its layers, which are other layers than the last."""
SOUND: dict[str, Any] = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
}
FRAMES = {"min_pixels": 28 * 28, "max_pixels": 3 * 32 * 32}


def train_tokenizer(names: dict[str, str]) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE with the released tokenizer's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL, *names.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ["<|im_start|>user\nWhich emotion does the person show?", "angry sad <1.0 seconds>"]
    tokenizer.train_from_iterator(texts * 4, trainer)
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=special,
    )
    made.chat_template = TEMPLATE
    return made


@dataclass(frozen=True)
class Kind:
    """A native backbone.

    ``model`` and ``config`` are transformers' classes; ``names`` the tokens of its config.
    ``seconds`` is how the released forward calls the seconds between a video's steps.
    """

    model: Any
    config: Any
    parts: dict[str, Any]
    names: dict[str, str]
    settings: dict[str, Any] = field(default_factory=lambda: dict(FRAMES))
    seconds: str | None = None
    types: bool = False
    """Whether the released forward takes ``mm_token_type_ids``."""

    @property
    def media(self) -> tuple[str, ...]:
        """What rows may contain."""
        both = "vision_config" in self.parts and "audio_config" in self.parts
        if both:
            return ("<video>", "<audio>", "<video><audio>", "<audio><video>", "")
        return ("<video>", "") if "vision_config" in self.parts else ("<audio>", "")

    def make(self, tokenizer: Any) -> Any:
        """The model with random weights."""
        ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in self.names.items()}
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        text = {**self.parts["text_config"], **sizes}
        parts = {**self.parts, "text_config": text}
        torch.manual_seed(3)
        config = self.config(**parts, **ids, initializer_range=0.2)
        return self.model(config).eval()

    def save(self, folder: Path) -> Path:
        """Weights, tokenizer and chat template as their makers release them."""
        tokenizer = train_tokenizer(self.names)
        self.make(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def released(
        self, backbone: Any, clips: Sequence[DecodedClip], media: str, ids: Tensor
    ) -> dict[str, Any]:
        """What the released forward takes for rows that show one clip each."""
        given: dict[str, Any] = {}
        config = backbone.model.config
        if "<video>" in media:
            made = [backbone.pixels(one) for one in clips]
            given["pixel_values_videos"] = torch.cat([patches for patches, _, _ in made])
            given["video_grid_thw"] = torch.stack([grid for _, grid, _ in made])
            if self.seconds:
                given[self.seconds] = torch.tensor([seconds for _, _, seconds in made])
        if "<audio>" in media:
            found = [windows(one.name, backbone._extractor.chunk_length, one) for one in clips]
            given["input_features"] = torch.cat([x for x, _ in found]).to(backbone.model.dtype)
            given["feature_attention_mask"] = torch.cat([mask for _, mask in found])
        if self.types:
            given["mm_token_type_ids"] = 2 * (ids == config.video_token_id).int()
        return given


_HELD: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
"""Mel windows by clip and length, since making them takes most of a test's time."""


def windows(clip_name: str, seconds: int, one: DecodedClip) -> tuple[Tensor, Tensor]:
    """Whisper's padded window of a clip and its mask, as the released processors make them."""
    sound: Any = one.waveform
    place = (clip_name, len(sound), seconds)
    if place not in _HELD:
        found = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)(
            sound,
            sampling_rate=16000,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        _HELD[place] = found["input_features"], found["attention_mask"]
    return _HELD[place]


def _vision(**more: Any) -> dict[str, Any]:
    return {**VISION, **more}


KINDS: dict[str, Kind] = {
    "qwen2_5_omni": Kind(
        model=hf.Qwen2_5OmniThinkerForConditionalGeneration,
        config=hf.Qwen2_5OmniThinkerConfig,
        parts={
            "vision_config": _vision(**WINDOWS),
            "audio_config": {**SOUND, "output_dim": 64, "n_window": 20},
            "text_config": {**TEXT, "intermediate_size": 96},
        },
        names={
            k.replace("o_token_id", "o_token_index").replace("e_token_id", "e_token_index")
            if k in ("audio_token_id", "image_token_id", "video_token_id")
            else k: v
            for k, v in OLD.items()
        },
        settings={**FRAMES, "max_seconds": 8},
        seconds="video_second_per_grid",
    ),
    "qwen2_5_vl": Kind(
        model=hf.Qwen2_5_VLForConditionalGeneration,
        config=hf.Qwen2_5_VLConfig,
        parts={
            "vision_config": _vision(**WINDOWS, tokens_per_second=4),
            "text_config": {**TEXT, "intermediate_size": 96},
        },
        names={k: v for k, v in NEW.items() if "audio" not in k},
        seconds="second_per_grid_ts",
        types=True,
    ),
    "qwen2_vl": Kind(
        model=hf.Qwen2VLForConditionalGeneration,
        config=hf.Qwen2VLConfig,
        parts={
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 2,
            },
            "text_config": {**TEXT, "intermediate_size": 96},
        },
        names={k: v for k, v in NEW.items() if "audio" not in k},
        types=True,
    ),
    "qwen2_audio": Kind(
        model=hf.Qwen2AudioForConditionalGeneration,
        config=hf.Qwen2AudioConfig,
        parts={
            # A window of four seconds.
            "audio_config": {**SOUND, "max_source_positions": 200},
            "text_config": {
                **{k: v for k, v in TEXT.items() if k != "rope_parameters"},
                "model_type": "qwen2",
                "intermediate_size": 96,
            },
        },
        names={
            "audio_token_index": "<|AUDIO|>",
            "audio_start": "<|audio_bos|>",
            "audio_end": "<|audio_eos|>",
        },
        settings={},
    ),
    "qwen3_vl": Kind(
        model=hf.Qwen3VLForConditionalGeneration,
        config=hf.Qwen3VLConfig,
        parts={
            "vision_config": _vision(**STACK),
            "text_config": {**TEXT, "intermediate_size": 96, "head_dim": 16},
        },
        names={k: v for k, v in NEW.items() if "audio" not in k},
        types=True,
    ),
    "qwen3_omni": Kind(
        model=hf.Qwen3OmniMoeThinkerForConditionalGeneration,
        config=hf.Qwen3OmniMoeThinkerConfig,
        parts={
            "vision_config": _vision(**STACK),
            "audio_config": {
                **SOUND,
                "output_dim": 64,
                "n_window_infer": 200,  # chunks of 100 frames, which give 13 tokens each
                "downsample_hidden_size": 8,
            },
            "text_config": {
                **TEXT,
                "intermediate_size": 96,
                "moe_intermediate_size": 24,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            },
            "position_id_per_seconds": 13,
        },
        names=NEW,
        settings={**FRAMES, "max_seconds": 8},
        seconds="video_second_per_grid",
    ),
}


@contextmanager
def one_clip_at_a_time(model: Any) -> Any:
    """The released encoders called once for each clip. Nothing else of the forward is touched.

    They batch all clips of a call, which rounds differently; stored features may not depend on it.
    """
    towers = [getattr(model.model, name, None) for name in ("visual", "audio_tower")]
    wrapped = [tower for tower in towers if tower is not None]
    for tower in wrapped:
        tower.forward = _split(tower, tower.forward)
    try:
        yield
    finally:
        for tower in wrapped:
            del tower.forward


def _split(tower: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def each(first: Tensor | None = None, **given: Any) -> Any:
        x: Tensor = given.pop("input_features") if first is None else first
        if "grid_thw" in given:
            grids = given.pop("grid_thw")
            parts = x.split(grids.prod(-1).tolist())
            found = [
                forward(p, grid_thw=g[None], **given) for p, g in zip(parts, grids, strict=True)
            ]
        elif "feature_lens" in given:
            lens = given.pop("feature_lens")
            given.pop("aftercnn_lens", None)
            parts = x.split(lens.tolist(), dim=1)
            found = [
                forward(p, feature_lens=n[None], **given) for p, n in zip(parts, lens, strict=True)
            ]
        else:
            masks = given.pop("attention_mask")
            each = [None] * len(x) if masks is None else masks.split(1)
            found = [
                forward(p, attention_mask=m, **given) for p, m in zip(x.split(1), each, strict=True)
            ]
            hidden = torch.cat([one.last_hidden_state for one in found])
            return BaseModelOutputWithPooling(last_hidden_state=hidden)
        joined = found[0]
        for name in ("last_hidden_state", "pooler_output"):
            values: list[Any] = [getattr(one, name, None) for one in found]
            if values[0] is not None:
                setattr(joined, name, torch.cat(values))
        deep = getattr(joined, "deepstack_features", None)
        if deep is not None:
            every = zip(*(one.deepstack_features for one in found), strict=True)
            joined.deepstack_features = [torch.cat(layers) for layers in every]
        return joined

    return each


ASK = "{media}Which emotion?"
CLIPS = (clip(1), clip(2, seconds=1.3, frames=4, size=(64, 40)), clip(3, seconds=2.2, frames=5))


class Seen(Rows):
    """Features of the streams that the model takes."""

    def __init__(self, backbone: Any, clips: Mapping[str, DecodedClip]) -> None:
        self.features = {
            name: {m: backbone.encode(m, [one])[0] for m in backbone.modalities}
            for name, one in clips.items()
        }


def load(name: str, folder: Path, **changes: Any) -> Loaded:
    values = {"path": str(folder), "native": KINDS[name].settings, "sampling": {"frames": 6}}
    found = {**values, **changes}
    return load_model(parse(ModelConfig, {k: v for k, v in found.items() if v is not None}))


def rows(media: str, count: int, answer: str | None = None) -> list[Sample]:
    """Rows of different lengths about different clips."""
    made = [
        sample(media, one.name, "Look. " * place + ASK) for place, one in enumerate(CLIPS[:count])
    ]
    if answer is None:
        return made
    return [replace(one, turns=(*one.turns, Turn("assistant", answer))) for one in made]


def collator(loaded: Loaded) -> Collator:
    source: Any = Seen(unwrap(loaded.model), {one.name: one for one in CLIPS})
    return Collator(loaded.processor, source)


def batch_of(loaded: Loaded, samples: Sequence[Sample], *, left: bool = True) -> dict[str, Any]:
    return collator(loaded)(samples, generation=left)


def released_inputs(kind: Kind, model: Any, batch: Mapping[str, Any], media: str) -> dict[str, Any]:
    """Pixels and mel windows for the released forward."""
    count = len(batch["input_ids"])
    given = kind.released(model.backbone, CLIPS[:count], media, batch["input_ids"])
    if model.backbone.settings.model_dump().get("audio_in_video") and "<video><audio>" in media:
        given["use_audio_in_video"] = True
    return {**given, **{name: batch[name] for name in ("input_ids", "attention_mask")}}


def untouched(
    kind: Kind, model: Any, batch: Mapping[str, Any], media: str, plain_model: Any = None
) -> Tensor:
    """The released forward, of ``plain_model`` if that is given."""
    given = released_inputs(kind, model, batch, media)
    plain = "rope_parameters" not in kind.parts["text_config"]
    if plain or not media:
        # Without M-RoPE transformers numbers padding too, except in its own generate.
        mask = batch["attention_mask"]
        places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        given["position_ids"] = places if plain else places.expand(3, -1, -1)
    run = model if plain_model is None else plain_model
    with torch.no_grad(), one_clip_at_a_time(run):
        found = kind.model.forward(run, **on_device(given, run.device)).logits.cpu()
    if hasattr(run.model, "rope_deltas"):
        run.model.rope_deltas = None  # which it leaves behind
    return found[batch["attention_mask"].bool()]


def ours(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model.logits(on_device(batch, model.device)).cpu()
    return found[batch["attention_mask"].bool()]


def on_device(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Logits of one batch from stored features, beside the released forward from media.

    ``difference``: the largest one. ``controls``: the largest ones of batches with a fault.
    """

    media: str
    rows: int
    left: bool
    difference: float
    controls: tuple[float, ...]


def differences(name: str, loaded: Loaded, dtype: torch.dtype) -> Iterator[Case]:
    """Media x rows x padding in one dtype."""
    kind, model = KINDS[name], cast(Any, loaded.model)
    if dtype is not torch.float32:
        model = copy.deepcopy(model).to(dtype)
    collate = collator(replace(loaded, model=model))
    for media in kind.media:
        for count, left in ((1, True), (3, True), (3, False)):
            batch = collate(rows(media, count, None if left else "angry"), generation=left)
            assert bool(batch["attention_mask"].all()) == (count == 1)
            wanted = untouched(kind, model, batch, media).float()
            assert wanted.abs().max() > 0.5
            apart = [
                float((ours(model, one).float() - wanted).abs().max())
                for one in (batch, *(faulty(model, batch) if count == 3 and left else ()))
            ]
            yield Case(media, count, left, apart[0], tuple(apart[1:]))


def faulty(model: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch with the clips of other rows, and with positions of plain text."""
    found = [{**batch, "clip_index": batch["clip_index"][:1].expand(3)}]
    sizes = {len(set(batch[x].sum(1).tolist())) for x in batch if x.endswith("_features_mask")}
    if sizes != {1}:  # clips of other lengths are refused
        found = []
    for name in [key for key in batch if key.endswith("_features")]:
        found.append({**batch, name: batch[name].roll(1, -1)})
    if "mrope_positions" in batch and "video_features" in batch:
        plain = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found.append({**batch, "mrope_positions": plain[:, None].expand(-1, 3, -1)})
    deep = model.backbone.deepstack
    if deep and "video_features" in batch:
        x = batch["video_features"].clone()
        x[..., x.shape[-1] // (1 + deep) :] = 0
        found.append({**batch, "video_features": x})
    return found
