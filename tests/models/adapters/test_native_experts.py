"""Experts on native models, whole and in 4 bits: off they are not there, and every way of computing
says the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from mmemo.config import parse
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.generate import model_fingerprint
from mmemo.generation.decoder import Decoder
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.models.adapters.experts import ExpertsConfig, gates_of
from mmemo.models.adapters.lora import equal_rank, in_adapter, is_quantized, save_model, unwrap
from mmemo.models.attention.contrast import Contrast, ContrastConfig
from mmemo.models.attention.reallocation import ReallocationConfig, reallocating
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.config import AdapterConfig
from mmemo.train.expert_balance import expert_terms
from tests.generation.test_logprobs import check, continuations
from tests.models.native_files import FED, save_omni, save_vl
from tests.models.parts import shake
from tests.models.qwen.test_native import inputs

KINDS = {"omni": ("<video><audio>", "<audio>", "", "<video>"), "vl": ("<video>", "", "<video>")}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
NF4 = {"quantization": "nf4"}


def lora(**experts: Any) -> dict[str, Any]:
    return {"lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "experts": experts}}


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Released models whose layers fit nf4's blocks."""
    found = tmp_path_factory.mktemp("released")
    return {
        "omni": save_omni(found / "omni", inner=128),
        "vl": save_vl(found / "vl", inner=128),
    }


class Bench:
    """A model of a kind, and a prompt of each sort of media."""

    def __init__(self, path: Path, kind: str, **changes: Any) -> None:
        self.kind, self.path, self.changes = kind, path, changes
        self.loaded = load(path, **changes)
        self.model: Any = self.loaded.model
        self.batch = inputs(self.loaded, *KINDS[kind])

    def plain(self) -> Any:
        """The same without an adapter."""
        return load(self.path, **{n: x for n, x in self.changes.items() if n != "lora"}).model


def load(path: Path, **changes: Any) -> Loaded:
    own = {} if (path / "adapter_config.json").exists() else {"native": FED}
    sampling = {"sampling": {"frames": 6}} if own else {}
    return load_model(parse(ModelConfig, {"path": str(path), **own, **sampling, **changes}))


def trained(path: Path, kind: str, scale: float = 0.15, **changes: Any) -> Bench:
    """Every expert and gate says something."""
    bench = Bench(path, kind, **{**lora(), **changes})
    set_trainable(bench.model, ["lm"])
    shake(bench.model, scale)
    bench.model.eval()
    return bench


def near(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * max(float(wanted.abs().max()), 1.0)


def logits_of(model: Any, batch: Mapping[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more, use_cache=False).logits


each = pytest.mark.parametrize(
    ("kind", "changes"),
    [("omni", {}), ("omni", NF4), ("vl", {}), ("vl", NF4)],
    ids=["omni", "omni in 4 bits", "vl", "vl in 4 bits"],
)


@each
def test_off_is_the_base_to_the_bit(
    homes: dict[str, Path], kind: str, changes: dict[str, Any]
) -> None:
    bench = Bench(homes[kind], kind, **lora(), **changes)
    model, wanted = bench.model, logits_of(bench.plain(), bench.batch)
    config = model.peft_config["default"]
    assert isinstance(config, ExpertsConfig)
    assert config.modalities == (["video", "audio"] if kind == "omni" else ["video"])
    # New, it adds nothing.
    torch.testing.assert_close(logits_of(model, bench.batch), wanted, atol=1e-5, rtol=0)
    for name, weight in model.named_parameters():
        if in_adapter(name):
            torch.nn.init.normal_(weight, std=0.3)
    assert (logits_of(model, bench.batch) - wanted).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits_of(model, bench.batch), wanted)
    assert torch.equal(logits_of(model.unload(), bench.batch), wanted)


@each
def test_cached_decoding_is_the_full_forward(
    homes: dict[str, Path], kind: str, changes: dict[str, Any]
) -> None:
    bench = trained(homes[kind], kind, **changes)
    model, batch = bench.model, bench.batch
    rows, start = batch["input_ids"].shape
    words = torch.randint(50, 300, (rows, 4), generator=torch.Generator().manual_seed(3))
    grown = {
        "input_ids": torch.cat([batch["input_ids"], words], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(words)], 1),
        "modality_ids": torch.cat([batch["modality_ids"], torch.zeros_like(words)], 1),
    }
    wanted = logits_of(model, {**batch, **grown})[:, -4:]
    untold = {n: x for n, x in {**batch, **grown}.items() if n != "modality_ids"}
    assert torch.equal(logits_of(model, untold)[:, -4:], wanted)
    positions = unwrap(model).positions(grown["input_ids"], grown["attention_mask"], batch)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for step in range(4):
            out = model(
                input_ids=words[:, step : step + 1],
                attention_mask=grown["attention_mask"][:, : start + step + 1],
                position_ids=positions[..., start + step : start + step + 1],
                past_key_values=cache,
            )
            near(out.logits[:, 0], wanted[:, step])
        twice = words.repeat_interleave(2, 0)
        for shared in (True, False):
            decoder = Decoder(unwrap(model), batch, 2, 8, shared=shared)
            for step in range(4):
                found = decoder.advance(twice[:, step])
                near(found[::2], wanted[:, step])
                near(found[1::2], wanted[:, step])
        given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        said = model.generate(**batch, **given)
        assert torch.equal(said, model.generate(**batch, **given, use_cache=False))
        with reallocating(model, ReallocationConfig(layers=[0, 1, 2])):
            assert model.generate(**batch, **given).shape == said.shape


@each
def test_shared_prefix_is_naive(homes: dict[str, Path], kind: str, changes: dict[str, Any]) -> None:
    """Values, gradients and the penalty."""
    bench = trained(homes[kind], kind, 0.05, **changes)
    rows = len(bench.batch["input_ids"])
    lengths = [4, 1, 3, 2, 4, 2][: rows + 2]
    parts = continuations(lengths, [*range(rows), 0, 1])
    check(bench.model, bench.batch, parts)
    terms: list[Any] = []
    for way in (packed_logps, naive_logps):
        way(bench.model, bench.batch, *parts)
        terms.append(expert_terms(bench.model))
    torch.testing.assert_close(terms[0].penalty, terms[1].penalty, **CLOSE)
    gates = next(iter(gates_of(bench.model).values()))
    assert gates.use is not None
    has = torch.tensor([["<video>" in ask, "<audio>" in ask] for ask in KINDS[kind]]).float()
    assert torch.equal(gates.use.sum(-1)[:rows], has if kind == "omni" else has[:, :1])


@each
def test_adapters_save_and_load(
    homes: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    bench = trained(homes[kind], kind, **changes)
    wanted = logits_of(bench.model, bench.batch)
    loaded = bench.loaded
    save_model(loaded.model, loaded.processor, tmp_path / "made", base=loaded.base)
    again = load(tmp_path / "made")
    assert is_quantized(again.model) == ("quantization" in changes)
    assert torch.equal(logits_of(again.model, bench.batch), wanted)
    assert model_fingerprint(again.model) == model_fingerprint(loaded.model)
    assert load(tmp_path / "made", **lora()).base == homes[kind]
    with pytest.raises(ConfigError, match="cannot be merged"):
        load(tmp_path / "made", adapter="merge")
    with pytest.raises(ConfigError, match=r"lora\.temperature is 2"):
        load(tmp_path / "made", **lora(temperature=2))


def test_the_other_variants_are_there_too(homes: dict[str, Path]) -> None:
    for variant in ("gate", "moka", "hydra"):
        bench = trained(homes["omni"], "omni", **lora(variant=variant))
        check(bench.model, bench.batch, continuations([3, 2, 1, 2], [0, 1, 2, 3]))
    plain: Any = load(homes["omni"]).model
    section = parse(AdapterConfig, lora()["lora"])

    def count(**changes: Any) -> int:
        model: Any = load(homes["omni"], **changes).model
        return sum(p.numel() for n, p in model.named_parameters() if in_adapter(n))

    one = count(lora={"r": 1})
    assert abs(count(**lora()) - one * equal_rank(plain, section)) <= one / 2


def test_what_experts_cannot_know_is_asked_for(homes: dict[str, Path]) -> None:
    bench = trained(homes["omni"], "omni")
    model, batch = bench.model, bench.batch
    inner = unwrap(model)
    embeds = inner.embed(batch["input_ids"], batch["modality_ids"], batch)
    at = inner.positions(batch["input_ids"], batch["attention_mask"], batch)
    given = {"inputs_embeds": embeds, "position_ids": at, "attention_mask": batch["attention_mask"]}
    with pytest.raises(DataError, match="pass modality_ids"):
        model(**given)
    told = model(**given, modality_ids=batch["modality_ids"], use_cache=False).logits
    real = batch["attention_mask"].bool()
    near(told[real], logits_of(model, batch)[real])


@pytest.mark.parametrize("experts", [None, {}], ids=["plain", "experts"])
def test_contrast_is_with_a_prompt_whose_sound_is_hidden(
    homes: dict[str, Path], experts: dict[str, Any] | None
) -> None:
    """Cached as computed anew for each word; and nobody hears what is hidden."""
    lora = {"r": 4, "lora_dropout": 0.0, "experts": experts}
    bench = trained(homes["omni"], "omni", lora=lora)
    model, batch = bench.model, bench.batch
    made = ContrastConfig(remove=[["audio"]], alpha=2.0, cutoff=0.0)
    other = {**batch, "audio_features": torch.randn_like(batch["audio_features"])}
    with torch.no_grad():
        scores = torch.zeros_like(model(**batch).logits[:, -1])
        one, two = (Contrast(model, b, made)(batch["input_ids"], scores) for b in (batch, other))
        assert torch.equal(one, two)
        has = torch.tensor(["<audio>" in ask for ask in KINDS["omni"]])
        assert torch.equal((one != 0).any(1), has)

        processors = LogitsProcessorList([Contrast(model, batch, made)])
        given: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": [2]}
        said = model.generate(**batch, **given, logits_processor=processors)
        grown, silent = dict(batch), unwrap(model).generation_config.suppress_tokens
        for _ in range(said.shape[1] - batch["input_ids"].shape[1]):
            last = model(**grown, use_cache=False).logits[:, -1]
            last = Contrast(model, grown, made)(grown["input_ids"], last)
            last[:, silent] = -torch.inf
            word = last.argmax(-1, keepdim=True)
            for name, value in (("attention_mask", 1), ("modality_ids", 0)):
                grown[name] = torch.cat([grown[name], torch.full_like(word, value)], 1)
            grown["input_ids"] = torch.cat([grown["input_ids"], word], 1)
    assert torch.equal(said, grown["input_ids"])
