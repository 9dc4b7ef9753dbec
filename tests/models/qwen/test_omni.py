"""Features, token ids and modality ids give the logits of the untouched Thinker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor

from mmemo.data.collate import Collator, Streams, measure_lengths
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.errors import ConfigError, DataError, MediaError
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import AUDIO, TEXT, VIDEO, Backbone, Features
from mmemo.models.qwen.omni import QwenOmniBackbone, QwenOmniConfig

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>"),
)
QUESTION = "<|im_start|>user\n{media}Which emotion does the person show?<|im_end|>\n"
SETTINGS = QwenOmniConfig(min_pixels=28 * 28, max_pixels=3 * 28 * 28, max_seconds=30)


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


def tiny_thinker(
    tokenizer: PreTrainedTokenizerFast, inner: int = 96
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """``inner``: width inside the LM's MLP."""

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "output_dim": 64,
            "n_window": 20,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
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
        },
        audio_token_index=token("<|AUDIO|>"),
        image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        vision_end_token_id=token("<|vision_eos|>"),
        initializer_range=0.2,  # so that a wrong position or feature moves the logits
    )
    torch.manual_seed(3)
    return Qwen2_5OmniThinkerForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def backbone() -> QwenOmniBackbone:
    tokenizer = train_tokenizer()
    return QwenOmniBackbone(
        tiny_thinker(tokenizer), tokenizer, SamplingConfig(frames=6), SETTINGS
    ).eval()


def clip(
    seed: int, seconds: float = 3.1, frames: int = 6, size: tuple[int, int] = (40, 64)
) -> DecodedClip:
    rng = np.random.default_rng(seed)
    return DecodedClip(
        name=f"{seed}.mp4",
        digest=f"{seed:064d}",
        duration=seconds,
        frames=rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8),
        times=(np.arange(frames) + 0.5) * seconds / frames,
        waveform=(0.1 * rng.standard_normal(int(16000 * seconds))).astype(np.float32),
    )


def encoded(backbone: QwenOmniBackbone, one: DecodedClip) -> dict[Modality, Features]:
    return {name: backbone.encode(name, [one])[0] for name in backbone.modalities}


class Rows:
    """The collator's source of features, from clips in memory."""

    def __init__(self, backbone: QwenOmniBackbone, clips: Mapping[str, DecodedClip]) -> None:
        self.features = {name: encoded(backbone, one) for name, one in clips.items()}

    def get(self, sample: Sample) -> dict[Modality, Features]:
        return {name: self.features[ref.path][name] for name, ref in sample.media.items()}


class Written:
    """The collator's renderer. All it knows of a clip is what the collator gives it."""

    def __init__(self, backbone: QwenOmniBackbone, *, interleave: bool = False) -> None:
        self.backbone, self.tokenizer = backbone, backbone.tokenizer
        self.interleave = interleave

    def render(self, turns: Sequence[Turn], *, generation: bool, modalities: Streams) -> Any:
        spoken = turns if generation else turns[:-1]
        features: Any = {name: x for name, x in modalities.items() if x is not None}
        ids, kinds = self.backbone.expand(
            "".join(turn.text for turn in spoken), features, audio_in_video=self.interleave
        )
        labels = [-100] * len(ids)
        if not generation:
            answer = self.tokenizer(turns[-1].text + "<|im_end|>")["input_ids"]
            ids, labels = ids + answer, labels + answer
            kinds = kinds + [TEXT] * len(answer)
        return SimpleNamespace(input_ids=ids, labels=labels, modality_ids=kinds, text="")


def sample(media: str, path: str, text: str = QUESTION) -> Sample:
    refs: dict[Any, MediaRef] = {
        name: MediaRef(path) for name in ("video", "audio") if f"<{name}>" in media
    }
    return Sample(f"{path}-{media}", (Turn("user", text.format(media=media)),), refs)


def make_batch(
    backbone: QwenOmniBackbone,
    clips: Mapping[str, DecodedClip],
    samples: Sequence[Sample],
    *,
    interleave: bool = False,
) -> dict[str, Any]:
    renderer = Written(backbone, interleave=interleave)
    return Collator(renderer, Rows(backbone, clips))(samples, generation=True)


def untouched(
    backbone: QwenOmniBackbone,
    batch: Mapping[str, Any],
    clips: Sequence[DecodedClip],
    media: str,
    *,
    interleave: bool = False,
    new_tokens: int = 0,
) -> Tensor:
    """The released forward, from pixels and padded mel windows; one clip for each row. With
    ``new_tokens``, the ids that the released ``generate`` goes on to."""
    given: dict[str, Any] = {}
    if "<video>" in media:
        made = [backbone.pixels(one) for one in clips]
        given["pixel_values_videos"] = torch.cat([patches for patches, _, _ in made])
        given["video_grid_thw"] = torch.stack([grid for _, grid, _ in made])
        given["video_second_per_grid"] = torch.tensor([seconds for _, _, seconds in made])
    if "<audio>" in media:
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=30)
        found = extractor(
            [one.waveform for one in clips],
            sampling_rate=16000,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        given["input_features"] = found["input_features"]
        given["feature_attention_mask"] = found["attention_mask"]
    if interleave:
        given["use_audio_in_video"] = True
    given |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    thinker: Any = backbone.thinker
    with torch.no_grad():
        if not new_tokens:
            return thinker(**given).logits
        words = thinker.generate(**given, max_new_tokens=new_tokens, do_sample=False)
    thinker.model.rope_deltas = None  # which it leaves behind
    return words


def close(ours: Tensor, theirs: Tensor, batch: Mapping[str, Any]) -> None:
    """Equal on all real tokens; what stands at padding is nobody's."""
    real = batch["attention_mask"].bool()
    assert theirs[real].abs().max() > 0.5
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("media", ["<video>", "<audio>", "<video><audio>", "<audio><video>", ""])
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_are_the_untouched_forward(
    backbone: QwenOmniBackbone, media: str, rows: int
) -> None:
    clips = [clip(1), clip(2, seconds=1.3, size=(64, 40))][:rows]
    samples = [sample(media, one.name) for one in clips]
    samples[0] = sample(media, clips[0].name, "Look. " + QUESTION)  # different lengths
    batch = make_batch(backbone, {one.name: one for one in clips}, samples)
    with torch.no_grad():
        ours = backbone.logits(batch)
    close(ours, untouched(backbone, batch, clips, media), batch)


@pytest.mark.parametrize("lengths", [[1.3], [3.1], [7.9], [7.9, 1.3, 3.1]])
def test_sound_inside_the_video_is_the_untouched_forward(
    backbone: QwenOmniBackbone, lengths: list[float]
) -> None:
    clips = [clip(4 + number, seconds=seconds) for number, seconds in enumerate(lengths)]
    media = "<video><audio>"
    batch = make_batch(
        backbone,
        {one.name: one for one in clips},
        [sample(media, one.name) for one in clips],
        interleave=True,
    )
    with torch.no_grad():
        ours = backbone.logits(batch)
    close(ours, untouched(backbone, batch, clips, media, interleave=True), batch)
    # The layout is the released processor's.
    for row, one in enumerate(clips):
        assert written(backbone, one) in backbone.tokenizer.decode(batch["input_ids"][row])


def test_the_collator_drives_it_to_train_and_to_answer(backbone: QwenOmniBackbone) -> None:
    """Rows of clips of several sizes, with no knowledge of the clips but their features."""
    clips = {one.name: one for one in (clip(1), clip(2, seconds=1.3, size=(64, 40)))}
    samples = [
        replace(one, turns=(*one.turns, Turn("assistant", answer)))
        for one, answer in (
            (sample("<video><audio>", "1.mp4"), "angry"),
            (sample("<audio>", "2.mp4"), "happy"),
            (sample("", "1.mp4"), "sad"),
        )
    ]
    renderer, source = Written(backbone), Rows(backbone, clips)
    batch = Collator(renderer, source)(samples)
    learnt = batch["labels"][batch["labels"] != -100]
    assert renderer.tokenizer.decode(learnt) == "angry<|im_end|>happy<|im_end|>sad<|im_end|>"
    with torch.no_grad():
        assert backbone.logits(batch)[batch["attention_mask"].bool()].isfinite().all()
    assert measure_lengths(samples, renderer, outline=source.get) == (
        batch["attention_mask"].sum(1).tolist()
    )
    with pytest.raises(DataError, match="encode the clip first"):
        measure_lengths(samples, renderer)


def test_its_words_are_the_untouched_models(backbone: QwenOmniBackbone) -> None:
    """Greedy, a token at a time, against the Thinker's own ``generate`` with its cache."""
    one, media = clip(1), "<video><audio>"
    batch = make_batch(backbone, {one.name: one}, [sample(media, one.name)])
    start = batch["input_ids"].shape[1]
    with torch.no_grad():
        theirs = untouched(backbone, batch, [one], media, new_tokens=6)
        grown = dict(batch)
        for _ in range(theirs.shape[1] - start):
            word = backbone.logits(grown)[:, -1:].argmax(-1)
            more = {"input_ids": word, "attention_mask": 1, "modality_ids": TEXT}
            for name, value in more.items():
                grown[name] = torch.cat([grown[name], torch.full_like(word, 1) * value], 1)
    assert torch.equal(grown["input_ids"], theirs)


def written(backbone: QwenOmniBackbone, one: DecodedClip) -> str:
    """What the released processor writes for a video with sound."""
    found = encoded(backbone, one)
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        audio_bos_token="<|audio_bos|>",
        audio_eos_token="<|audio_eos|>",
        audio_token="<|AUDIO|>",
        video_token="<|VIDEO|>",
    )
    processor.get_chunked_index = lambda at, size: Qwen2_5OmniProcessor.get_chunked_index(
        processor, at, size
    )
    inside = Qwen2_5OmniProcessor.replace_video_with_audio_token(
        processor,
        {
            "video_grid_thw": [found["video"]["grid"].numpy()],
            "video_second_per_grid": [float(found["video"]["seconds_per_grid"])],
        },
        0,
        {"num_audio_tokens": [len(found["audio"]["x"])]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    return f"<|vision_bos|>{inside}<|vision_eos|>"


def test_rows_of_a_mixed_batch_equal_rows_alone(backbone: QwenOmniBackbone) -> None:
    clips = {one.name: one for one in (clip(1), clip(2, seconds=1.3, size=(64, 40)))}
    samples = [
        sample("", "1.mp4"),
        sample("<video>", "1.mp4"),
        sample("<audio>", "2.mp4", "Listen! " + QUESTION),
        sample("<video><audio>", "2.mp4"),
        sample("<video>", "1.mp4", "Again: " + QUESTION),
        sample("<audio><video>", "1.mp4"),
    ]
    batch = make_batch(backbone, clips, samples)
    # The same video alone and with sound are different clips; rows 1 and 4 share one.
    assert batch["clip_index"].tolist() == [-1, 0, 1, 2, 0, 3]
    with torch.no_grad():
        together = backbone.logits(batch)
        for row, one in enumerate(samples):
            alone = backbone.logits(make_batch(backbone, clips, [one]))[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [16000, 16001, 20799, 48130, 2000])
def test_mel_frames_are_those_of_a_padded_window(backbone: QwenOmniBackbone, samples: int) -> None:
    tone = np.sin(np.arange(samples) * 0.3).astype(np.float32)  # loud up to the very end
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=30)
    found = extractor(
        tone,
        sampling_rate=16000,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    window = found["input_features"][0][:, found["attention_mask"][0].bool()]
    ours = backbone.mel(DecodedClip("a.mp4", "0", samples / 16000, waveform=tone))
    torch.testing.assert_close(ours, window, atol=1e-5, rtol=0)


def test_positions_keep_no_state(backbone: QwenOmniBackbone) -> None:
    one = clip(1)
    batch = make_batch(backbone, {one.name: one}, [sample("<video>", one.name)])
    inner: Any = backbone.thinker.model
    with torch.no_grad():
        first = backbone.logits(batch)
        inner.rope_deltas = torch.tensor([[1000]])  # as an earlier generation leaves it
        second = backbone.logits(batch)
    assert torch.equal(first, second)
    assert inner.rope_deltas.item() == 1000
    inner.rope_deltas = None


def test_time_goes_into_positions(backbone: QwenOmniBackbone) -> None:
    """The same pixels, played slower, are other positions and hence other logits."""
    slow, fast = clip(1, seconds=6.0), clip(1, seconds=1.0)
    found = []
    for one in (slow, fast):
        batch = make_batch(backbone, {one.name: one}, [sample("<video>", one.name)])
        found.append((backbone.positions(batch["input_ids"], batch["attention_mask"], batch), one))
        assert found[-1][0].shape == (3, 1, batch["input_ids"].shape[1])
    # Three rows of the grid, 25 positions a second: the last begins after 2/3 of the time.
    spans = [int((positions[0] - positions[1]).max()) for positions, _ in found]
    assert spans == [100, 16]


def test_features_do_not_depend_on_the_other_clips(backbone: QwenOmniBackbone) -> None:
    clips = [clip(1), clip(2, seconds=0.4), clip(3, frames=5)]
    for modality in backbone.modalities:
        together = backbone.encode(modality, clips)
        for one, found in zip(clips, together, strict=True):
            alone = backbone.encode(modality, [one])[0]
            assert found.keys() == alone.keys()
            assert all(torch.equal(found[name], alone[name]) for name in found)
            assert not found["x"].requires_grad
    assert backbone.encode("video", [clips[2]])[0]["grid"].tolist() == [3, 2, 4]


def test_gradients_reach_the_language_model_and_not_the_towers(backbone: QwenOmniBackbone) -> None:
    one = clip(1)
    batch = make_batch(backbone, {one.name: one}, [sample("<video><audio>", one.name)])
    backbone.logits(batch).logsumexp(-1).sum().backward()
    with_gradient = {name for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    assert any("language_model" in name for name in with_gradient)
    assert not [name for name in with_gradient if "visual" in name or "audio_tower" in name]
    backbone.train()
    assert not backbone.thinker.model.visual.training
    backbone.eval()


def test_the_protocol_is_met(backbone: QwenOmniBackbone) -> None:
    as_protocol: Backbone = backbone
    members = [name for name in vars(Backbone) if not name.startswith("_")]
    members += list(Backbone.__annotations__)
    assert {name for name in members if not hasattr(as_protocol, name)} == set()
    one = clip(1)
    batch = make_batch(backbone, {one.name: one}, [sample("<video><audio>", one.name)])
    connected = backbone.connect(batch)
    assert connected["video"].shape == (1, len(encoded(backbone, one)["video"]["x"]), 64)
    hidden = backbone.language_model(
        inputs_embeds=backbone.embed(batch["input_ids"], batch["modality_ids"], batch),
        position_ids=backbone.positions(batch["input_ids"], batch["attention_mask"], batch),
        attention_mask=batch["attention_mask"],
    ).last_hidden_state
    assert torch.equal(backbone.lm_head(hidden), backbone.logits(batch))
    assert set(batch["modality_ids"].flatten().tolist()) == {TEXT, VIDEO, AUDIO}


def test_fingerprints_follow_settings_and_weights(backbone: QwenOmniBackbone) -> None:
    thinker, tokenizer = backbone.thinker, backbone.tokenizer
    first = [backbone.feature_fingerprint(name) for name in backbone.modalities]
    larger = SETTINGS.model_copy(update={"max_pixels": 28 * 28 * 9})
    other = QwenOmniBackbone(thinker, tokenizer, backbone.sampling, larger)
    assert other.feature_fingerprint("video") != first[0]
    again = QwenOmniBackbone(thinker, tokenizer, backbone.sampling, SETTINGS)
    assert [again.feature_fingerprint(name) for name in backbone.modalities] == first
    bias: Any = thinker.model.audio_tower.proj.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias.add_(1e-3)
        changed = QwenOmniBackbone(thinker, tokenizer, backbone.sampling, SETTINGS)
        assert changed.feature_fingerprint("audio") != first[1]
        assert changed.feature_fingerprint("video") == first[0]
        bias.copy_(before)


def test_what_cannot_be_is_an_error(backbone: QwenOmniBackbone) -> None:
    one = clip(1)
    silent = DecodedClip("x.mp4", "0", 1.0, frames=one.frames, times=one.times)
    with pytest.raises(MediaError, match=r"x.mp4: no_audio"):
        backbone.encode("audio", [silent])
    with pytest.raises(MediaError, match="no_video"):
        backbone.encode("video", [DecodedClip("y.mp4", "0", 1.0, waveform=one.waveform)])
    with pytest.raises(MediaError, match=r"too_long: has 31 s of sound, at most 30 s"):
        backbone.encode("audio", [clip(1, seconds=31.0)])
    with pytest.raises(ConfigError, match="no face branch"):
        backbone.encode("face", [one])
    with pytest.raises(DataError, match="<audio> has no audio features"):
        backbone.expand("<audio>", {})
    batch = make_batch(backbone, {one.name: one}, [sample("<video>", one.name)])
    first = int((batch["modality_ids"][0] == VIDEO).nonzero()[0])
    names = ("input_ids", "attention_mask", "modality_ids")
    cut = batch | {name: batch[name][:, first + 1 :] for name in names}
    with pytest.raises(DataError, match=r"row 0 has \d+ video tokens but its clip has"):
        backbone.logits(cut)
    lost = batch | {"clip_index": torch.tensor([-1])}
    with pytest.raises(DataError, match="row 0 has video tokens but no clip"):
        backbone.logits(lost)
