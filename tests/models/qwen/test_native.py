"""A native model named by path: loaded as released, saved as released, driven by features."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from mmemo.config import parse
from mmemo.data.collate import Collator, measure_lengths
from mmemo.data.sample import Sample, Turn
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.media.config import SamplingConfig
from mmemo.models.adapters import lora
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.qwen.base import QwenVisionConfig
from mmemo.models.qwen.omni import QwenOmniBackbone, QwenOmniConfig
from mmemo.models.qwen.processing import NOTES
from tests.models.native_files import FED, save_omni, save_vl
from tests.models.qwen.test_omni import Rows, clip, sample

ASK = "{media}Which emotion?"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_omni(tmp_path_factory.mktemp("omni"))


def load(path: Path, **changes: Any) -> Loaded:
    given = {"native": FED, "sampling": {"frames": 6}} | changes
    found = {name: value for name, value in given.items() if value is not None}
    return load_model(parse(ModelConfig, {"path": str(path), **found}))


@pytest.fixture(scope="module")
def loaded(released: Path) -> Loaded:
    return load(released)


def samples(*media: str) -> list[Sample]:
    return [sample(one, f"{number + 1}.mp4", ASK) for number, one in enumerate(media)]


def inputs(loaded: Loaded, *media: str) -> dict[str, Tensor]:
    """What ``forward`` and ``generate`` take, for one row of each kind of media."""
    model = lora.unwrap(loaded.model)
    clips = {f"{n + 1}.mp4": clip(n + 1, seconds=1.3 + n) for n in range(len(media))}
    known = set(model.modalities)
    rows = Rows(model, clips) if known == {"video", "audio"} else Seen(model, clips)
    batch = Collator(loaded.processor, rows)(samples(*media), generation=True)
    parameters = inspect.signature(type(model).forward).parameters
    return {name: batch[name] for name in parameters if isinstance(batch.get(name), Tensor)}


class Seen(Rows):
    """Of a model that only sees."""

    def __init__(self, backbone: Any, clips: Mapping[str, Any]) -> None:
        self.features = {
            name: {"video": backbone.encode("video", [one])[0]} for name, one in clips.items()
        }


def logits(loaded: Loaded, given: Mapping[str, Tensor]) -> Tensor:
    """Of real tokens, (tokens, V)."""
    model: Any = loaded.model
    with torch.no_grad():
        return model(**given, use_cache=False).logits[given["attention_mask"].bool()]


ROWS = ("<video><audio>", "<audio>", "")


def test_it_is_the_backbone_around_the_released_weights(released: Path, loaded: Loaded) -> None:
    plain: Any = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(released)
    settings = QwenOmniConfig(**FED)
    tokenizer: Any = loaded.processor.tokenizer
    around = QwenOmniBackbone(plain.eval(), tokenizer, SamplingConfig(frames=6), settings)
    given = inputs(loaded, *ROWS)
    with torch.no_grad():
        expected = around.logits(given)[given["attention_mask"].bool()]
    torch.testing.assert_close(logits(loaded, given), expected, atol=1e-5, rtol=0)
    for name in ("video", "audio"):  # features are found again, whoever loads the model
        assert loaded.model.feature_fingerprint(name) == around.feature_fingerprint(name)
    assert not [n for n, p in loaded.model.named_parameters() if "visual" in n and p.requires_grad]
    model: Any = loaded.model
    model.train()
    assert not model.model.audio_tower.training
    model.eval()


@pytest.mark.parametrize("cache", [True, False])
def test_generate_says_what_the_logits_say(loaded: Loaded, cache: bool) -> None:
    model: Any = loaded.model
    given = inputs(loaded, *ROWS)
    start = given["input_ids"].shape[1]
    silent = model.generation_config.suppress_tokens
    assert len(silent) == 3  # no placeholder may be spoken
    with torch.no_grad():
        said = model.generate(
            **given, max_new_tokens=5, do_sample=False, use_cache=cache, eos_token_id=[2]
        )
        grown = dict(given)
        for _ in range(said.shape[1] - start):
            last = model(**grown, use_cache=False).logits[:, -1]
            last[:, silent] = -torch.inf
            word = last.argmax(-1, keepdim=True)
            for name, value in (("attention_mask", 1), ("modality_ids", 0)):
                grown[name] = torch.cat([grown[name], torch.full_like(word, value)], 1)
            grown["input_ids"] = torch.cat([grown["input_ids"], word], 1)
    assert torch.equal(said, grown["input_ids"])


def test_the_whole_checkpoint_gives_its_thinker(tmp_path: Path, loaded: Loaded) -> None:
    found = load(save_omni(tmp_path, whole=True))
    given = inputs(found, *ROWS)
    assert torch.equal(logits(found, given), logits(loaded, given))


def test_adapters_and_merged_weights_are_anybodys(released: Path, tmp_path: Path) -> None:
    """They come back by path alone, and without mmemo, and say the same."""
    trained = load(released, lora={"r": 4})
    chosen = set_trainable(trained.model, ["lm"])
    assert chosen
    assert all(".language_model." in name and "lora_" in name for name in chosen)
    with torch.no_grad():
        for name, weight in trained.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    lora.save_model(trained.model, trained.processor, adapter, base=trained.base)
    once = load(adapter, native=None, sampling=None, adapter="merge")
    lora.save_model(once.model, once.processor, merged)
    given = inputs(trained, *ROWS)
    expected = logits(trained, given)
    assert (expected - logits(load(released), given)).abs().max() > 0.1
    for folder in (adapter, merged):
        again = load(folder, native=None, sampling=None)
        torch.testing.assert_close(logits(again, given), expected, atol=1e-3, rtol=0)
        model = lora.unwrap(again.model)
        assert again.processor.sampling.frames == 6
        assert model.backbone.settings.max_pixels == FED["max_pixels"]
        assert model.feature_fingerprint("video") == lora.unwrap(trained.model).feature_fingerprint(
            "video"
        )
    kind = Qwen2_5OmniThinkerForConditionalGeneration
    bases: Any = (PeftModel.from_pretrained(kind.from_pretrained(released), adapter), None)
    for plain in (bases[0].get_base_model(), kind.from_pretrained(merged)):
        tokenizer: Any = trained.processor.tokenizer
        around = QwenOmniBackbone(plain.eval(), tokenizer, None, QwenOmniConfig(**FED))
        with torch.no_grad():
            found = around.logits(given)[given["attention_mask"].bool()]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == [kind.__name__]


def test_the_eye_alone(tmp_path: Path) -> None:
    """Qwen2.5-VL by path: the same doors."""
    found = load(save_vl(tmp_path / "vl"))
    given = inputs(found, "<video>", "")
    model: Any = found.model
    said = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > given["input_ids"].shape[1]
    lora.save_model(model, found.processor, tmp_path / "again")
    again = load(tmp_path / "again", native=None, sampling=None)
    assert torch.equal(logits(again, given), logits(found, given))


def test_rows_are_rendered_with_their_clips(released: Path, loaded: Loaded) -> None:
    """A row is as long as its clip asks for; sound may stand inside the video."""
    rows = samples("<video><audio>", "<audio>")
    source = Rows(lora.unwrap(loaded.model), {"1.mp4": clip(1), "2.mp4": clip(2)})
    with pytest.raises(DataError, match="<video> has no video features; encode the clip first"):
        measure_lengths(rows, loaded.processor, generation=True)
    how: Any = {"generation": True, "outline": source.get}
    lengths = measure_lengths(rows, loaded.processor, **how)
    inside = load(released, native={**FED, "audio_in_video": True})
    turns, features = rows[0].turns, source.get(rows[0])
    text = inside.processor.render(turns, generation=True, modalities=features).text
    assert "<|vision_bos|><|audio_bos|><|VIDEO|>" in text
    # The same tokens in another order.
    assert measure_lengths(rows, inside.processor, **how) == lengths
    # What is stored does not depend on how it is written.
    assert inside.model.feature_fingerprint("audio") == loaded.model.feature_fingerprint("audio")
    answered = [*turns, Turn("assistant", "angry")]
    row = loaded.processor.render(answered, generation=False, modalities=features)
    learnt = [token for token in row.labels if token != -100]
    assert loaded.processor.tokenizer.decode(learnt) == "angry<|im_end|>"
    for bad, says in (("<video><video>", "2 <video> in one row"), ("<face>", "no face branch")):
        with pytest.raises(DataError, match=says):
            loaded.processor.render([Turn("user", bad)], generation=True, modalities=features)
    with pytest.raises(DataError, match=r"reserved token '<\|AUDIO\|>'"):
        loaded.processor.render([Turn("user", "<|AUDIO|>")], generation=True, modalities={})


def test_its_own_processor_is_heeded_and_handed_on(tmp_path: Path) -> None:
    folder = save_omni(tmp_path / "omni")
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "min_pixels": 3136}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    found = load(folder)
    settings: QwenVisionConfig = lora.unwrap(found.model).backbone.settings
    assert settings.image_mean == (0.1, 0.2, 0.3)
    assert settings.min_pixels == FED["min_pixels"]
    assert found.processor.chat_template == template
    lora.save_model(found.model, found.processor, tmp_path / "again")
    assert json.loads((tmp_path / "again/preprocessor_config.json").read_text()) == own
    again = load(tmp_path / "again", native=None, sampling=None)
    assert lora.unwrap(again.model).backbone.settings == settings


def test_what_does_not_fit_is_refused_by_name(
    released: Path, loaded: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'max_pixel'.*did you mean 'max_pixels'"):
        load(released, native={"max_pixel": 784})
    with pytest.raises(ConfigError, match="'connectors' is unknown; use lm"):
        set_trainable(loaded.model, ["lm", "connectors"])
    lora.save_model(loaded.model, loaded.processor, tmp_path / "saved")
    for changes, says in (
        ({"sampling": {"frames": 7}}, "leave model.sampling out"),
        ({"native": {"max_pixels": 28 * 28}}, "leave model.native.max_pixels out"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(tmp_path / "saved", **changes)
    notes = tmp_path / "saved" / NOTES
    notes.write_text("[]")
    with pytest.raises(CheckpointError, match=f"{NOTES}: is no JSON object"):
        load(tmp_path / "saved")
    with pytest.raises(ConfigError, match="native is for a model that is named by path"):
        parse(ModelConfig, {"text": "x", "native": {}})
