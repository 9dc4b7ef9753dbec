from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models import MmemoForConditionalGeneration
from mmemo.models.adapters import lora
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.composed.scratch import train_tokenizer
from tests.models.parts import TEXTS, clip, features, tiny, values

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4, "lora_dropout": 0.0}},
    "dora": {"lora": {"r": 4, "lora_dropout": 0.0, "use_dora": True}},
    "qlora": {"lora": {"r": 4, "lora_dropout": 0.0}, "quantization": "nf4"},
    "int8": {"lora": {"r": 4, "lora_dropout": 0.0}, "quantization": "int8"},
}
WIDE = {"scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "vocab_size": 400}}
for _kind in KINDS.values():
    _kind["text"] = WIDE


def batch_of(loaded: Loaded) -> Any:
    found = [features_of(loaded, seed) for seed in range(2)]
    return loaded.processor(["<video><audio><face>Which?", "How loud is <audio>?"], found)


def features_of(loaded: Loaded, seed: int) -> Any:
    return features(Loaded(lora.unwrap(loaded.model), loaded.processor), clip(seed))


def train(loaded: Loaded, steps: int = 2) -> Any:
    """A few steps, so that adapters and connectors are not what they began as."""
    model: Any = loaded.model
    model.train()
    names = set(set_trainable(model, ["lm", "connectors", "fusion"]))
    weights = [p for n, p in model.named_parameters() if n in names]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    batch = batch_of(loaded)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def saved(tmp_path: Path, kind: str) -> tuple[Path, Any, Any]:
    """An adapter trained and saved: its folder, the batch, the logits."""
    loaded = tiny(base_dir=tmp_path / "base", **KINDS[kind])
    logits = train(loaded)
    folder = tmp_path / "final"
    lora.save_model(loaded.model, loaded.processor, folder, base=loaded.base)
    return folder, batch_of(loaded), logits


def again(folder: Path, **changes: Any) -> Loaded:
    return load_model(parse(ModelConfig, {"path": str(folder), **changes}))


def logits_of(loaded: Loaded, batch: Any) -> torch.Tensor:
    model: Any = loaded.model
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora", "int8"])
def test_adapters_save_and_load(tmp_path: Path, kind: str) -> None:
    folder, batch, expected = saved(tmp_path, kind)
    files = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    assert config["use_dora"] is (kind == "dora")
    loaded = again(folder)
    assert isinstance(loaded.model, PeftModel)
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-6, rtol=0)
    assert loaded.base == tmp_path / "base"
    # The base alone answers otherwise: the adapter and the connectors are what was learnt.
    changes = {name: x for name, x in KINDS[kind].items() if name == "quantization"}
    base = again(tmp_path / "base", **changes)
    assert (logits_of(base, batch) - expected).abs().max() > 1e-2


def test_only_the_language_model_is_adapted(tmp_path: Path) -> None:
    model: Any = tiny(base_dir=tmp_path / "base", lora={"r": 2}).model
    adapted = {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(adapted) == 2 * 2 * 7  # A and B, two layers, seven linear layers each
    assert all(".language_model.layers." in name for name in adapted)
    saved_too = {n for n, _ in model.named_parameters() if "modules_to_save" in n}
    assert any("connectors" in n for n in saved_too)
    assert any("fusion" in n for n in saved_too)


def test_a_run_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _, batch, expected = saved(tmp_path / "run", "lora")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    loaded = again(tmp_path / "elsewhere" / "final")
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-6, rtol=0)
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    with pytest.raises(ConfigError, match="is not there"):
        again(tmp_path / "elsewhere" / "final")


def test_plain_peft_loads_the_folder(tmp_path: Path) -> None:
    folder, batch, expected = saved(tmp_path, "lora")
    base = MmemoForConditionalGeneration.from_pretrained(tmp_path / "base")
    model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=0)
        ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
    ours: Any = again(folder).model
    assert torch.equal(ids, ours.generate(**batch, max_new_tokens=4, do_sample=False))


def test_the_next_stage_goes_on_with_the_adapter(tmp_path: Path) -> None:
    folder, batch, expected = saved(tmp_path, "lora")
    loaded = again(folder, lora=KINDS["lora"]["lora"])
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-6, rtol=0)
    later = train(loaded)
    assert (later - expected).abs().max() > 1e-2
    second = tmp_path / "deeper" / "second"
    second.parent.mkdir()
    lora.save_model(loaded.model, loaded.processor, second, base=loaded.base)
    torch.testing.assert_close(logits_of(again(second), batch), later, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match=r"lora\.r is 8"):
        again(folder, lora={"r": 8, "lora_dropout": 0.0})


def test_the_next_stage_merges_the_adapter(tmp_path: Path) -> None:
    folder, batch, expected = saved(tmp_path, "lora")
    merged = again(folder, adapter="merge")
    assert isinstance(merged.model, MmemoForConditionalGeneration)
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-4, rtol=0)
    lora.save_model(merged.model, merged.processor, tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(again(tmp_path / "merged"), batch), expected, atol=1e-4, rtol=0
    )
    config = parse(ModelConfig, {"path": str(folder), "adapter": "merge", "lora": {"r": 2}})
    fresh = load_model(config, base_dir=tmp_path / "second" / "base")
    assert fresh.base == tmp_path / "second" / "base"
    torch.testing.assert_close(logits_of(fresh, batch), expected, atol=1e-4, rtol=0)


def test_an_adapter_needs_a_saved_base(tmp_path: Path) -> None:
    loaded = tiny(lora={"r": 2})
    with pytest.raises(ConfigError, match="base_dir"):
        lora.save_model(loaded.model, loaded.processor, tmp_path, base=loaded.base)


def test_the_base_is_made_once_and_guarded(tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = parse(ModelConfig, values(lora={"r": 2}))
    load_model(config, TEXTS, base)
    before = (base / "model.safetensors").stat().st_mtime_ns
    load_model(config, TEXTS, base)
    assert (base / "model.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "base.lock"]
    other = parse(ModelConfig, values(lora={"r": 2}, seed=3))
    with pytest.raises(ConfigError, match="other settings"):
        load_model(other, TEXTS, base)
    with pytest.raises(ConfigError, match="other settings or parts"):
        load_model(config, [*TEXTS, "surprised surprised surprised joy joy joy"], base)


def test_a_saved_model_is_its_own_base(tmp_path: Path) -> None:
    plain = tiny()
    lora.save_model(plain.model, plain.processor, tmp_path / "full")
    config = parse(ModelConfig, {"path": str(tmp_path / "full"), "lora": {"r": 2}})
    loaded = load_model(config, base_dir=tmp_path / "base")
    assert loaded.base == tmp_path / "full"
    assert not (tmp_path / "base").exists()


def test_nf4_refuses_widths_that_its_blocks_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="multiple of 64"):
        tiny(quantization="nf4")


def test_nf4_refuses_a_model_without_linear_layers(tmp_path: Path) -> None:
    """GPT-2's layers are ``Conv1D``: nothing would be any smaller."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    train_tokenizer(TEXTS, 400).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'gpt2' language model has none"):
        tiny(text=str(tmp_path), quantization="nf4")


def test_nf4_holds_the_language_model_only() -> None:
    import bitsandbytes as bnb

    plain, small = tiny(text=WIDE), tiny(text=WIDE, quantization="nf4")
    batch = batch_of(plain)
    model: Any = small.model
    kinds = {n: type(m) for n, m in model.named_modules()}
    packed = [n for n, kind in kinds.items() if kind is bnb.nn.Linear4bit]
    assert len(packed) == 14
    assert all(".language_model.layers." in n for n in packed)
    weight = model.language_model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    before = logits_of(plain, batch)
    layers: Any = lora.unwrap(plain.model).language_model
    for name, module in model.language_model.named_modules():
        if type(module) is bnb.nn.Linear4bit:
            weight, state = module.weight, module.weight.quant_state
            whole = bnb.functional.dequantize_4bit(weight, state)
            old = layers.get_submodule(name).weight
            assert (whole - old).norm() / old.norm() < 0.12
            old.data.copy_(whole)
    assert (logits_of(plain, batch) - before).abs().max() > 0
    torch.testing.assert_close(logits_of(small, batch), logits_of(plain, batch))
    fingerprints = [lora.unwrap(m.model).feature_fingerprint("audio") for m in (plain, small)]
    assert fingerprints[0] == fingerprints[1]


def test_int8_holds_the_language_model_only_and_learns(tmp_path: Path) -> None:
    import bitsandbytes as bnb

    plain = tiny(text=WIDE)
    small = tiny(text=WIDE, quantization="int8", lora={"r": 4}, base_dir=tmp_path / "base")
    model: Any = lora.unwrap(small.model)
    packed = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len({name.removesuffix(".base_layer") for name in packed}) == 14
    assert all(".language_model.layers." in name for name in packed)
    assert lora.quantized_as(small.model) == "int8"
    batch = batch_of(plain)
    near = (logits_of(small, batch) - logits_of(plain, batch)).abs().max()
    assert 0 < near < 0.05
    set_trainable(small.model, ["lm"])
    small.model(**batch).logits.square().sum().backward()
    grads = {n: p.grad for n, p in small.model.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None for grad in grads.values())
    with pytest.raises(ConfigError, match="add lora"):
        set_trainable(tiny(text=WIDE, quantization="int8").model, ["lm"])


def test_int8_is_merged_into_the_rounded_weights(tmp_path: Path) -> None:
    folder, batch, expected = saved(tmp_path, "int8")
    merged = again(folder, adapter="merge")
    assert lora.quantized_as(merged.model) is None
    # int8 layers round their inputs too, which plain ones do not.
    assert (logits_of(merged, batch) - expected).abs().max() < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_quantized_on_cuda_are_those_of_the_cpu(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmemo.models.adapters import quantization

    on_cuda = tiny(text=WIDE, quantization=kind)
    monkeypatch.setattr(quantization, "_fastest", lambda: torch.device("cpu"))
    both: list[Any] = [on_cuda.model, tiny(text=WIDE, quantization=kind).model]
    for one in both:
        quantization.dequantize(one)
    found, wanted = (dict(one.language_model.named_parameters()) for one in both)
    for name, weight in wanted.items():
        assert found[name].device.type == "cpu"
        # Values that lie between two levels may be rounded to either.
        assert (found[name] != weight).float().mean() < 0.01, name


@pytest.mark.parametrize("kind", ["lora", "qlora", "int8"])
def test_gradient_checkpointing_under_an_adapter(tmp_path: Path, kind: str) -> None:
    loaded = tiny(base_dir=tmp_path / "base", **KINDS[kind])
    model: Any = loaded.model.train()
    names = set_trainable(model, ["lm", "connectors", "fusion"])
    batch = batch_of(loaded)
    found: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if n in set(names)})
    for name in names:
        torch.testing.assert_close(found[1][name], found[0][name])


def adapted(wanted: Any) -> set[str]:
    model = tiny(lora={"r": 2, "target_modules": wanted}).model
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        (["q_proj", "v_proj"], 4),  # the audio encoder has layers of these names too
        (["layers.1.self_attn.q_proj"], 1),
        ("all-linear", 14),
        (r".*\.language_model\..*\.k_proj", 2),
        (r".*language_model.*(up|down)_proj", 4),
    ],
)
def test_targets_keep_to_the_language_model(wanted: Any, layers: int) -> None:
    found = adapted(wanted)
    assert len(found) == layers
    assert all(".language_model." in name for name in found)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["nowhere"], "no linear layer 'nowhere'; use some of down_proj"),
        (["q_proj", "proj.0"], "no linear layer 'proj.0'"),  # a connector's
        (r".*\.q_proj", r"matches 'model.audio_tower\..*', which is no linear layer"),
        (r".*\.proj\.0", r"matches 'model.connectors\."),
        (r".*language_model.*", r"matches 'model\.language_model'"),
        (r".*language_model.*q_proj|lm_head", "matches 'lm_head'"),
        ("(", "no regular expression"),
        ("nothing", "target_modules"),
    ],
)
def test_wrong_targets_are_refused(wanted: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        adapted(wanted)


def test_unwrap_peels_every_wrapper(tmp_path: Path) -> None:
    loaded = tiny(lora={"r": 2})

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = lora.unwrap(Wrapper(Wrapper(loaded.model)))
    assert isinstance(inner, MmemoForConditionalGeneration)
    with pytest.raises(TypeError, match="no mmemo model"):
        lora.unwrap(torch.nn.Linear(1, 1))
