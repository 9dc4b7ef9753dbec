"""What is read back from a folder is whole and as it was saved, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mmemo import checkpoint
from mmemo.config import parse
from mmemo.errors import CheckpointError, ConfigError
from mmemo.models.adapters import lora
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.saved import saved_sampling
from tests.models.parts import TEXTS, clip, features, shake, tiny, values

LORA = {"r": 2, "lora_dropout": 0.0}
WIDE = {"scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "vocab_size": 400}}


def again(folder: Path, **changes: Any) -> Loaded:
    return load_model(parse(ModelConfig, {"path": str(folder), **changes}))


def adapter(folder: Path, **changes: Any) -> Path:
    """A run's ``final`` folder, on the ``base`` beside it, without a manifest."""
    loaded = tiny(folder / "base", **{"lora": LORA, **changes})
    shake(loaded.model, 0.1)
    lora.save_model(loaded.model, loaded.processor, folder / "final", base=loaded.base)
    return folder / "final"


def whole(folder: Path, **changes: Any) -> Path:
    loaded = tiny(**changes)
    lora.save_model(loaded.model, loaded.processor, folder)
    return folder


def edit(file: Path, drop: str) -> None:
    """Take the tensors out whose name holds ``drop``."""
    kept = {name: x for name, x in load_file(file).items() if drop not in name}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})


def flip(file: Path) -> None:
    """One bit of the last number."""
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def seal(folder: Path) -> None:
    """Give a folder its manifest."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write(staged: Path) -> None:
        for name, data in files.items():
            (staged / name).write_bytes(data)

    checkpoint.save(folder, write)


def test_a_flipped_bit_is_refused_by_file_name(tmp_path: Path) -> None:
    final = adapter(tmp_path)
    seal(final)
    again(final)
    (final / "notes.txt").write_text("added by hand")  # no harm
    again(final)
    flip(final / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"final/adapter_model\.safetensors: its content"):
        again(final)
    full = whole(tmp_path / "full")
    seal(full)
    flip(full / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"full/model\.safetensors: its content"):
        again(full)


def test_a_damaged_base_is_refused_when_loading_and_when_going_on(tmp_path: Path) -> None:
    final = adapter(tmp_path)
    flip(tmp_path / "base/model.safetensors")
    for load in (lambda: again(final), lambda: tiny(tmp_path / "base", lora=LORA)):
        with pytest.raises(CheckpointError, match=r"base/model\.safetensors: its content"):
            load()


@pytest.mark.parametrize("part", ["connectors.audio", "language_model.layers.1.", "vision_tower"])
def test_a_model_without_some_of_its_weights_is_refused(tmp_path: Path, part: str) -> None:
    full = whole(tmp_path)
    edit(full / "model.safetensors", part)
    with pytest.raises(CheckpointError, match=f"lacks the weights of .*{part}"):
        again(full)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    full, other = whole(tmp_path / "full"), whole(tmp_path / "other", text=WIDE)
    (other / "model.safetensors").rename(full / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        again(full)
    (full / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        again(full)


@pytest.mark.parametrize("part", ["connectors.audio", "fusion", "layers.1.mlp.up_proj.lora_A"])
def test_an_adapter_without_some_of_its_weights_is_refused(tmp_path: Path, part: str) -> None:
    final = adapter(tmp_path)
    edit(final / "adapter_model.safetensors", part)
    with pytest.raises(CheckpointError, match=f"lacks the weights of .*{part}"):
        again(final)
    with pytest.raises(CheckpointError, match="lacks the weights"):
        again(final, adapter="merge")


def pickle_only(file: Path) -> None:
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()


@pytest.mark.parametrize("damage", [pickle_only, lambda file: file.write_bytes(b"{}")])
def test_an_adapter_that_is_no_safetensors_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    final = adapter(tmp_path)
    damage(final / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: does not fit"):
        again(final)


def test_the_sampling_of_a_saved_model_is_read_without_loading_it(tmp_path: Path) -> None:
    """``mmemo check`` notes the track that the model will hear."""
    sampling = {"frames": 3, "audio_track": "deu"}
    final = adapter(tmp_path, sampling=sampling)
    for folder in (final, tmp_path / "base"):
        assert saved_sampling(str(folder)) == again(folder).processor.sampling
        assert saved_sampling(str(folder)).audio_track == "deu"  # type: ignore[union-attr]
    for file in (final / "processor_config.json", final / "mmemo_native.json"):
        file.unlink(missing_ok=True)
    assert saved_sampling(str(final)).audio_track == "deu"  # type: ignore[union-attr]
    (tmp_path / "base" / "processor_config.json").unlink()
    assert saved_sampling(str(tmp_path / "base")) is None


def test_a_loaded_adapter_answers_without_dropout(tmp_path: Path) -> None:
    dropout = {"r": 2, "lora_dropout": 0.5}
    final = adapter(tmp_path, lora=dropout)
    batch = again(final).processor("Which?")
    for loaded in (again(final), tiny(lora=dropout)):
        model: Any = loaded.model
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, model(**batch).logits)
        assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in model.modules())
    assert lora.read_record(final) == {"dtype": "float32", "quantization": None}


def test_another_rank_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def lost(final: Path, write: Any) -> None:
        save(final, write)
        raise CheckpointError("the folder is not empty")

    monkeypatch.setattr(checkpoint, "save", lost)
    assert tiny(tmp_path / "base", lora=LORA).base == tmp_path / "base"

    def full(*_: Any) -> None:
        raise CheckpointError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(CheckpointError, match="no space"):
        tiny(tmp_path / "other", lora=LORA)


def dtypes(loaded: Loaded) -> set[torch.dtype]:
    """Of the frozen encoders and the language model."""
    model = lora.unwrap(loaded.model)
    parts = [model.language_model, model.encoder("audio"), model.encoder("video")]
    return {p.dtype for x in parts for n, p in x.named_parameters() if "lora_" not in n}


HALF, FULL = {torch.bfloat16}, {torch.float32}


def test_a_whole_model_comes_back_in_its_own_number_type(tmp_path: Path) -> None:
    assert parse(ModelConfig, values()).dtype == "float32"
    assert dtypes(again(whole(tmp_path / "float32"))) == FULL
    loaded = tiny(dtype="bfloat16")
    fingerprint = lora.unwrap(loaded.model).feature_fingerprint("audio")
    # As a run in bfloat16 holds the weights that learn.
    lora.unwrap(loaded.model).language_model.float()
    lora.save_model(loaded.model, loaded.processor, tmp_path / "half")
    half = again(tmp_path / "half")
    assert dtypes(half) == HALF
    assert lora.unwrap(half.model).feature_fingerprint("audio") == fingerprint
    assert dtypes(again(tmp_path / "half", dtype="float32")) == FULL


def test_an_adapter_comes_back_in_the_number_type_of_its_run(tmp_path: Path) -> None:
    base = whole(tmp_path / "base")  # float32; the run is not
    loaded = again(base, dtype="bfloat16", lora=LORA)
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    half = again(tmp_path / "final")
    assert dtypes(half) == HALF
    learns = set_trainable(half.model, ["lm", "connectors"])
    assert {p.dtype for n, p in half.model.named_parameters() if n in set(learns)} == FULL
    assert dtypes(again(tmp_path / "final", adapter="merge")) == HALF
    assert dtypes(again(tmp_path / "final", dtype="float32")) == FULL


def answers(loaded: Loaded) -> torch.Tensor:
    found = features(Loaded(lora.unwrap(loaded.model), loaded.processor), clip(0))
    batch = loaded.processor("<video><audio><face>Which?", found)
    model: Any = loaded.model
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_quantization_comes_back_with_the_adapter(tmp_path: Path) -> None:
    final = adapter(tmp_path, text=WIDE, quantization="nf4")
    first = again(final)
    assert isinstance(first.model, PeftModel)
    assert lora.is_quantized(first.model)
    expected = answers(first)
    torch.testing.assert_close(answers(again(final, lora=LORA)), expected, atol=1e-6, rtol=0)
    merged = again(final, adapter="merge")
    assert not lora.is_quantized(merged.model)
    torch.testing.assert_close(answers(merged), expected, atol=1e-4, rtol=0)
    # A next stage of its own adapters may quantize the merged weights once more.
    config = {"path": str(final), "adapter": "merge", "quantization": "nf4", "lora": LORA}
    second = load_model(parse(ModelConfig, config), base_dir=tmp_path / "second")
    assert lora.is_quantized(second.model)
    # An adapter whose record is lost, as one written elsewhere, is taken as plain.
    (final / "mmemo_adapter.json").unlink()
    assert not lora.is_quantized(again(final).model)


def test_four_bits_without_an_adapter_answer_but_do_not_learn(tmp_path: Path) -> None:
    loaded = tiny(text=WIDE, quantization="nf4")
    assert answers(loaded).isfinite().all()
    for parts in (["lm"], ["connectors"]):
        with pytest.raises(ConfigError, match="add lora or leave quantization out"):
            set_trainable(loaded.model, parts)
    with pytest.raises(ConfigError, match="cannot be saved whole"):
        lora.save_model(loaded.model, loaded.processor, tmp_path)


def test_the_processor_is_the_adapters_own(tmp_path: Path) -> None:
    """A chat template and an end of answers given to a stage hold wherever its adapter goes."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_start|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    base = whole(tmp_path / "base")
    changes = {"chat_template_path": str(template), "eos_token": "<|im_start|>"}
    loaded = again(base, lora=LORA, **changes)
    lora.save_model(loaded.model, loaded.processor, tmp_path / "final", base=loaded.base)
    merged = again(tmp_path / "final", adapter="merge")
    lora.save_model(merged.model, merged.processor, tmp_path / "merged")
    start = loaded.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    template.unlink()
    for folder in ("final", "merged"):
        found = again(tmp_path / folder)
        assert found.processor.tokenizer.eos_token_id == start
        assert "m['role'] + ': '" in str(found.processor.chat_template)
        generation: Any = lora.unwrap(found.model).generation_config
        assert start in generation.eos_token_id
    with pytest.raises(ConfigError, match=r"chat_template_path: .* give a Jinja file"):
        tiny(chat_template_path=str(template))
    with pytest.raises(ConfigError, match=r"eos_token: '<\|im_stop\|>' is not one token"):
        tiny(eos_token="<|im_stop|>")


def test_a_stage_never_changes_the_lora_it_goes_on_with(tmp_path: Path) -> None:
    final = adapter(tmp_path, lora={**LORA, "target_modules": ["q_proj", "v_proj"]})
    again(final, lora={**LORA, "target_modules": ["v_proj", "q_proj"]})
    for change, says in (
        ({}, r"lora\.target_modules"),
        ({"target_modules": ["q_proj"]}, r"lora\.target_modules"),
        ({"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}, r"lora\.lora_dropout"),
        ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, r"lora\.use_dora"),
    ):
        with pytest.raises(ConfigError, match=says):
            again(final, lora={**LORA, **change})


def test_the_base_is_sealed(tmp_path: Path) -> None:
    load_model(parse(ModelConfig, values(lora=LORA)), TEXTS, tmp_path / "base")
    files = checkpoint.verify(tmp_path / "base").files
    assert {"model.safetensors", "config.json", "processor_config.json"} <= set(files)
