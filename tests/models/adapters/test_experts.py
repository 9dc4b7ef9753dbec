"""Experts answer alike in every way of computing, and change nothing when they are off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from mmemo.config import parse
from mmemo.errors import ConfigError, DataError
from mmemo.generation.decoder import Decoder
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.models.adapters.expert_layers import ExpertsLinear
from mmemo.models.adapters.experts import ExpertsConfig, gates_of
from mmemo.models.adapters.lora import equal_rank, in_adapter, save_model, unwrap
from mmemo.models.adapters.merging import merged
from mmemo.models.adapters.routing import routed
from mmemo.models.attention.fused import fuse
from mmemo.models.build import AdapterConfig, Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.composed.modeling import MmemoForConditionalGeneration
from tests.generation.test_logprobs import check, continuations, learn, same
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import shake, tiny

KINDS: dict[str, dict[str, Any]] = {
    "mose": {},
    "soft": {"routing": "soft", "temperature": 0.5},
    "embedding": {"gate_input": "embedding"},
    "gate": {"variant": "gate"},
    "moka": {"variant": "moka"},
    "hydra": {"variant": "hydra"},
}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def lora(kind: str, **changes: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "experts": KINDS[kind], **changes}


def fresh(kind: str = "mose", **changes: Any) -> Loaded:
    """A tiny model whose every expert and gate says something."""
    values: dict[str, Any] = {"lora": lora(kind), **changes}
    loaded = tiny(None, **values)
    set_trainable(loaded.model, ["lm", "connectors", "fusion"])
    shake(loaded.model, 0.15)
    loaded.model.eval()
    return loaded


def logits_of(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


each = pytest.mark.parametrize("kind", list(KINDS))


@each
def test_off_is_the_base_to_the_bit_and_so_is_a_new_adapter(kind: str) -> None:
    plain: Any = tiny().model
    loaded = tiny(lora=lora(kind))
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    wanted = logits_of(plain, batch)
    torch.testing.assert_close(logits_of(model, batch), wanted, atol=1e-6, rtol=0)
    for weight in (p for n, p in model.named_parameters() if in_adapter(n)):
        torch.nn.init.normal_(weight, std=0.3)
    assert (logits_of(model, batch) - wanted).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), wanted)
    assert torch.equal(logits_of(model.unload(), batch), wanted)
    assert not gates_of(model)


@each
def test_cached_decoding_is_the_full_forward(kind: str) -> None:
    loaded = fresh(kind)
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    words = torch.randint(50, 300, (4, 5), generator=torch.Generator().manual_seed(3))
    whole = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], words], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(words)], 1),
        "modality_ids": torch.cat([batch["modality_ids"], torch.zeros_like(words)], 1),
    }
    wanted = logits_of(model, whole)[:, -5:]
    told = logits_of(model, {k: v for k, v in whole.items() if k != "modality_ids"})[:, -5:]
    assert torch.equal(told, wanted)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        for step in range(5):
            mask = whole["attention_mask"][:, : batch["input_ids"].shape[1] + step + 1]
            out = model(
                input_ids=words[:, step : step + 1], attention_mask=mask, past_key_values=cache
            )
            torch.testing.assert_close(out.logits[:, 0], wanted[:, step], **CLOSE)
        for shared in (True, False):
            decoder = Decoder(unwrap(model), batch, 2, 8, shared=shared)
            twice = wanted.repeat_interleave(2, 0)
            kept = torch.tensor([0, 3, 4, 5, 7])
            for step in range(5):
                found = decoder.advance(
                    words.repeat_interleave(2, 0)[kept, step]
                    if step > 1
                    else words.repeat_interleave(2, 0)[:, step]
                )
                rows = kept if step > 1 else torch.arange(8)
                torch.testing.assert_close(found, twice[rows, step], **CLOSE)
                if step == 1:
                    decoder.keep(kept)


@pytest.mark.parametrize("kind", ["mose", "gate", "moka"])
@pytest.mark.parametrize("values", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_and_without_a_cache(kind: str, values: dict[str, Any]) -> None:
    loaded = fresh(kind)
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2])
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **values}
    with_cache = model.generate(**batch, **given)
    assert torch.equal(with_cache, model.generate(**batch, **given, use_cache=False))


@each
def test_shared_prefix_is_naive(kind: str) -> None:
    """Values and gradients, through gates and experts."""
    loaded = fresh(kind)
    model: Any = loaded.model
    check(model, batch_of(loaded, [0, 1, 2, 3]), continuations(), temperature=0.7)
    with torch.no_grad(), model.disable_adapter():
        off = naive_logps(model, batch_of(loaded, [0, 1, 2, 3]), *continuations()).logps
    on = packed_logps(model, batch_of(loaded, [0, 1, 2, 3]), *continuations()).logps
    assert (on - off).abs().max() > 1e-2


@each
def test_recomputed_activations_see_their_own_tokens(kind: str) -> None:
    """Two forwards before their backward passes: the first must not see the second's media."""
    loaded = fresh(kind)
    model: Any = loaded.model
    one, two = batch_of(loaded, [0, 1]), batch_of(loaded, [3, 2])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        losses = [model(**b, labels=b["input_ids"], use_cache=False).loss for b in (one, two)]
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    wanted = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(gradients(), wanted)
    batch = batch_of(loaded, [0, 1, 2, 3])
    _, packed = learn(packed_logps, model, batch, continuations())
    model.gradient_checkpointing_disable()
    _, plain = learn(packed_logps, model, batch, continuations())
    same(packed, plain)


@pytest.mark.parametrize("kind", ["mose", "soft", "embedding"])
def test_gradient_reaches_every_gate_and_expert(kind: str) -> None:
    loaded = fresh(kind)
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    seen = {n: p.grad for n, p in model.named_parameters() if in_adapter(n)}
    assert all(g is not None and g.abs().max() > 0 for g in seen.values())
    gates = gates_of(model)
    for name, grad in seen.items():
        if ".experts_B." not in name:
            continue
        place = name.removeprefix("base_model.model.").partition(".experts_B.")[0]
        use = gates[place].use
        blocks = grad.unflatten(1, (1 + 4 * 3, 4)).abs().amax((0, 2))  # type: ignore[union-attr]
        assert use is not None
        # An expert that was not used learns nothing; text's and all that were used do.
        used = torch.cat([torch.tensor([True]), (use.detach() > 0).any(0).flatten()])
        assert torch.equal(blocks > 0, used)


def test_what_is_chosen_is_the_prompts_media_alone() -> None:
    """Rows do not choose for each other, and neither the answer nor the padding chooses."""
    loaded = fresh()
    model: Any = loaded.model
    logits_of(model, batch_of(loaded, [0, 1, 2, 3]))
    together = model.gates()
    assert len(together) == 2 * 7
    for row in range(4):
        logits_of(model, batch_of(loaded, [row]))
        for place, gates in model.gates().items():
            torch.testing.assert_close(gates.weights[0], together[place].weights[row], **CLOSE)
            torch.testing.assert_close(gates.use[0], together[place].use[row], **CLOSE)
    gates = next(iter(together.values()))
    assert gates.weights is not None
    assert gates.use is not None
    torch.testing.assert_close(gates.weights.sum(1), torch.ones(4))
    has = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert torch.equal(gates.use.sum(-1), has.float())  # one expert of each medium that is there
    assert torch.equal(gates.weights[:, 1:] > 0, has.bool())
    assert set(gates.use.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_medium_is_treated_otherwise(kind: str) -> None:
    """With the weights of two media swapped, swapping the media swaps what is chosen: the adapter
    adds the same."""
    loaded = fresh(kind)
    model: Any = loaded.model
    lm, width = unwrap(model).language_model, 32
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(2, 9, width, generator=generator)
    kinds = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 0, 0], [1, 0, 2, 2, 0, 4, 0, 0, 0]])
    turned = kinds.clone()
    turned[kinds == 1], turned[kinds == 2] = 2, 1

    def states() -> Tensor:
        given, keywords = routed(lm, embeds, kinds_now)
        return lm(inputs_embeds=given, **keywords).last_hidden_state

    with torch.no_grad():
        kinds_now = kinds
        wanted = states()
        kinds_now = turned
        assert kind == "hydra" or (states() - wanted).abs().max() > 1e-3
        _swap(model, kind)
        torch.testing.assert_close(states(), wanted, **CLOSE)


def _swap(model: Any, kind: str) -> None:
    """Exchange all weights of video and audio, the first and second of four media."""
    if kind == "hydra":
        return
    order, text = torch.tensor([1, 0, 2, 3]), torch.tensor([0, 2, 1, 3, 4])
    for name, weight in model.named_parameters():
        piece = next((p for p in name.split(".") if p.startswith("experts_")), "")
        value = weight.data
        if piece == "experts_A" and kind == "moka":
            value = value.unflatten(0, (5, 4))[text].flatten(0, 1)
        elif piece == "experts_B" and kind not in ("moka", "gate"):
            slots = value.unflatten(1, (13, 4))
            media = slots[:, 1:].unflatten(1, (4, 3))[:, order].flatten(1, 2)
            value = torch.cat([slots[:, :1], media], 1).flatten(1)
        elif piece == "experts_gate" and kind == "gate":
            value = value[order]
            value = value.unflatten(1, (4, -1))[:, order].flatten(1) if value.ndim == 2 else value
        elif piece == "experts_gate":
            value = value.unflatten(0, (4, 3))[order].flatten(0, 1)
        elif piece == "experts_weigh":
            value = value[text]
            value = value.unflatten(1, (4, -1))[:, order].flatten(1) if value.ndim == 2 else value
        weight.data = value.contiguous()


@pytest.mark.parametrize("kind", ["mose", "soft"])
def test_matrices_added_up_first_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fresh(kind)
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    assert batch["input_ids"].shape[1] > 4  # the rank
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for first in (True, False):
        monkeypatch.setattr(ExpertsLinear, "sums_first", first)
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), grads))
    (ours, mine), (each_token, theirs) = found
    assert not torch.equal(ours, each_token)  # another order of sums
    torch.testing.assert_close(ours, each_token, **CLOSE)
    torch.testing.assert_close(mine, theirs, **CLOSE)


@each
def test_peft_saves_and_loads(tmp_path: Path, kind: str) -> None:
    loaded = fresh(kind)
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    wanted = logits_of(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base: Any = tiny().model
    again: Any = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits_of(again, batch), wanted)
    # A second adapter beside it, and back.
    again.load_adapter(str(tmp_path), "other")
    for name, weight in again.named_parameters():
        if in_adapter(name) and ".other" in name:
            torch.nn.init.normal_(weight, std=0.3)
    assert torch.equal(logits_of(again, batch), wanted)
    again.set_adapter("other")
    again.eval()
    assert (logits_of(again, batch) - wanted).abs().max() > 1e-2
    again.set_adapter("default")
    again.delete_adapter("other")
    again.eval()
    assert torch.equal(logits_of(again, batch), wanted)


def test_a_copy_keeps_its_own_tokens() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    wanted = logits_of(model, batch)
    twin: Any = copy.deepcopy(model)
    logits_of(model, batch_of(loaded, [3, 2]))
    assert torch.equal(logits_of(twin, batch), wanted)
    assert gates_of(twin) is not gates_of(model)


def test_nothing_that_merges_touches_experts() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    wanted = logits_of(model, batch)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="cannot be merged"):
            act()
    assert fuse(unwrap(model).language_model) is None
    with merged(model):
        assert torch.equal(logits_of(model, batch), wanted)
    assert torch.equal(logits_of(model, batch), wanted)


def test_what_experts_cannot_know_is_asked_for() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    inner = unwrap(model)
    embeds = inner.embed(batch["input_ids"], batch["modality_ids"], batch)
    with pytest.raises(DataError, match="pass modality_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(DataError, match="which tokens are media"):
        inner.language_model(inputs_embeds=embeds)
    with torch.no_grad():
        told = model(inputs_embeds=embeds, modality_ids=batch["modality_ids"], use_cache=True)
        with pytest.raises(DataError, match="more media follow"):
            model(
                **batch_of(loaded, [0, 1]) | {"attention_mask": None},
                past_key_values=told.past_key_values,
            )
        with model.disable_adapter():
            off = model(**batch, use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="without the adapter"):
            model(input_ids=torch.tensor([[60], [61]]), past_key_values=off)
    with pytest.raises(ValueError, match="need a model with media"):
        ExpertsConfig(modalities=[])


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("kind", ["mose", "embedding", "gate", "moka", "hydra"])
def test_equal_rank_has_as_many_weights(kind: str, targets: Any) -> None:
    """Within half a rank of plain LoRA on the same layers."""

    def count(model: Any) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if in_adapter(n))

    section: Any = fresh_section(kind, targets)
    plain: Any = tiny().model
    rank = equal_rank(plain, section)
    ours = count(tiny(lora=lora(kind, target_modules=targets)).model)
    theirs = count(tiny(lora={"r": rank, "target_modules": targets}).model)
    one = count(tiny(lora={"r": 1, "target_modules": targets}).model)
    assert abs(ours - theirs) <= one / 2


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_lora_of_equal_size_is_one_switch(tmp_path: Path, rslora: bool) -> None:
    section = lora("mose", use_rslora=rslora)
    asked = {**section, "experts": {"variant": "lora", "per_modality": 2}}
    made = tiny(tmp_path / "base", lora=asked)
    config: Any = made.model.peft_config["default"]
    wanted = {**section, "experts": {"per_modality": 2}}
    rank = equal_rank(tiny().model, parse(AdapterConfig, wanted))
    assert (type(config), config.r) == (LoraConfig, rank)
    assert rank > 4
    scale = 8 / 4**0.5 if rslora else 8 / 4
    assert config.lora_alpha / (rank**0.5 if rslora else rank) == pytest.approx(scale)
    save_model(made.model, made.processor, tmp_path / "adapter", base=made.base)
    again = load_model(parse(ModelConfig, {"path": str(tmp_path / "adapter"), "lora": asked}))
    assert isinstance(again.model, PeftModel)  # it is the same adapter


def fresh_section(kind: str, targets: Any) -> Any:
    return parse(AdapterConfig, lora(kind, target_modules=targets))


def test_settings_that_would_do_nothing_are_refused() -> None:
    for name, value, variant in (("per_modality", 9, "gate"), ("routing", "soft", "moka")):
        with pytest.raises(ConfigError, match=f"{name} has no effect with the variant '{variant}'"):
            parse(AdapterConfig, {"experts": {"variant": variant, name: value}})


@each
def test_bf16(kind: str) -> None:
    """The model in bf16 with float32 adapters, and under autocast."""
    loaded = fresh(kind, dtype="bfloat16")
    model: Any = loaded.model
    adapters = [p for n, p in model.named_parameters() if in_adapter(n)]
    assert {p.dtype for p in adapters} == {torch.float32}
    batch = batch_of(loaded, [0, 1, 2, 3])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in adapters)
    whole = fresh(kind)
    wide: Any = whole.model
    wanted = logits_of(wide, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide(**batch, labels=batch["input_ids"]).loss.backward()
        off = (logits_of(wide, batch).float() - wanted).abs().mean()
    assert off < 0.2 * wanted.abs().mean()


def test_registered_once_and_beside_lora() -> None:
    """PEFT still knows its own methods by their names, and ours like one of them."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    assert PeftType("MMEMO_EXPERTS").value == "MMEMO_EXPERTS"
    assert PeftType.LORA in PEFT_TYPE_TO_TUNER_MAPPING
    assert len({str(kind.value) for kind in PeftType}) == len(list(PeftType))
    inner = unwrap(tiny().model)
    assert isinstance(inner, MmemoForConditionalGeneration)
    assert get_peft_model(inner, LoraConfig(target_modules=["q_proj"])) is not None
