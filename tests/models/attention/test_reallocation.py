from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from mmemo.config import parse
from mmemo.errors import ConfigError, DataError
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.attention.reallocation import (
    NAME,
    AmplificationConfig,
    Reallocation,
    ReallocationConfig,
    SinkConfig,
    reallocating,
)
from mmemo.models.attention.record import KINDS
from mmemo.models.attention.shared_prefix import use_prefixes
from mmemo.models.backbone import AUDIO, FACE, TEXT, VIDEO
from mmemo.models.build import Loaded
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import tiny
from tests.models.qwen.test_omni import tiny_thinker, train_tokenizer

LAYERS = [0, 1, 2]
EAGER: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
PROMPT = [TEXT, VIDEO, VIDEO, VIDEO, VIDEO, FACE, AUDIO, AUDIO, TEXT, TEXT]
LONG: dict[str, Any] = {"sides": [["audio"], ["video", "face"]], "head_gate": 0.0, "threshold": 1.0}


def config(**changes: Any) -> ReallocationConfig:
    """Everything that is not in perfect balance moves, in every layer."""
    return parse(ReallocationConfig, {**LONG, "layers": LAYERS, **changes})


def quiet() -> ReallocationConfig:
    """Nothing is ever out of balance."""
    return config(threshold=1e9)


def llama(attention: str = "eager", heads: int = 2, **changes: Any) -> Any:
    """Three layers of 4 query heads, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    values = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, **changes}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": heads}
    made = LlamaForCausalLM(LlamaConfig(**values, **sizes, initializer_range=0.2)).eval()
    made.set_attn_implementation(attention)
    return made


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompt(rows: int = 2, left: int = 3) -> dict[str, Tensor]:
    """``rows`` prompts; all but the first have ``left`` tokens of padding."""
    ids = torch.randint(0, 50, (rows, len(PROMPT)), generator=torch.Generator().manual_seed(1))
    kinds, mask = torch.tensor([PROMPT] * rows), torch.ones_like(ids)
    mask[1:, :left], kinds[1:, :left] = 0, TEXT
    kinds[1:, 3:6] = torch.tensor([AUDIO, AUDIO, VIDEO])
    return {"input_ids": ids, "attention_mask": mask, "modality_ids": kinds}


def run(model: Any, batch: dict[str, Tensor], **more: Any) -> Any:
    """A native model's forward, which knows no modality ids."""
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**given, **more)


def tokens(rows: int, count: int = 4) -> Tensor:
    return torch.randint(0, 50, (rows, count), generator=torch.Generator().manual_seed(2))


def longer(batch: dict[str, Tensor], extra: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([batch["input_ids"], extra], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(extra)], 1),
        "modality_ids": torch.cat([batch["modality_ids"], torch.zeros_like(extra)], 1),
    }


def stepped(model: Any, batch: dict[str, Tensor], extra: Tensor, cache: Any = None) -> Tensor:
    """Logits of the prompt's last token and of ``extra``, one token at a time."""
    out = run(model, batch, use_cache=True, past_key_values=cache)
    found, mask = [out.logits[:, -1:]], batch["attention_mask"]
    for place in range(extra.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            out = model(
                input_ids=extra[:, place : place + 1],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
        found.append(out.logits)
    return torch.cat(found, 1)


# What is done to a row


def by_hand(weights: Tensor, kinds: Tensor, made: ReallocationConfig) -> Tensor:
    """The definition, for one row of weights (S,)."""
    sides = [torch.isin(kinds, torch.tensor([KINDS.index(k) for k in s])) for s in made.sides]
    mass = [float(weights[side].sum()) for side in sides]
    level = [m / max(int(s.sum()), 1) ** made.eta for m, s in zip(mass, sides, strict=True)]
    strong = int(level[1] > level[0])
    weak = 1 - strong
    out = weights.clone()
    if (
        sum(mass) < made.head_gate
        or level[strong] <= made.threshold * level[weak]
        or not mass[weak]
    ):
        return out
    moved = made.share * mass[strong]
    out[sides[strong]] *= 1 - made.share
    out[sides[weak]] += moved * weights[sides[weak]] / mass[weak]
    return out


def applied(made: Any, weights: Tensor, kinds: Tensor) -> Tensor:
    """``made`` on one row (S,) of one head."""
    plain = weights.view(1, 1, 1, -1)
    members = [[float(KINDS[k] in group) for group in made.groups] for k in kinds.tolist()]
    return made.apply(plain.log(), plain, torch.tensor(members)[None]).flatten()


def test_a_small_example_by_hand() -> None:
    weights = torch.tensor([0.1, 0.3, 0.3, 0.05, 0.15, 0.1])
    kinds = torch.tensor([TEXT, VIDEO, VIDEO, AUDIO, AUDIO, TEXT])
    # 0.6 on what is seen and 0.2 on what is heard: three times as much. 0.4 of 0.6 moves, a
    # quarter of it to the first sound and three quarters to the second.
    found = applied(ReallocationConfig(), weights, kinds)
    wanted = torch.tensor([0.1, 0.18, 0.18, 0.05 + 0.06, 0.15 + 0.18, 0.1])
    torch.testing.assert_close(found, wanted)
    for untouched in ({"threshold": 3.1}, {"head_gate": 0.81}, {"share": 0.0}):
        assert torch.equal(applied(ReallocationConfig(**untouched), weights, kinds), weights)


def test_token_counts_decide_which_side_is_strong() -> None:
    """As they are, 0.6 against 0.3; a token of the second side has three times the weight."""
    weights = torch.tensor([0.1] * 6 + [0.3, 0.1])
    kinds = torch.tensor([VIDEO] * 6 + [AUDIO, TEXT])
    plain = applied(ReallocationConfig(threshold=1.5), weights, kinds)
    mean = applied(ReallocationConfig(threshold=1.5, eta=1.0), weights, kinds)
    assert plain[6] > weights[6] > mean[6]
    torch.testing.assert_close(mean[:6], torch.full((6,), 0.1 + 0.4 * 0.3 / 6))


rows_of_weights = st.lists(st.floats(0.0, 1.0, width=32), min_size=8, max_size=8).filter(
    lambda values: sum(values) > 0.1
)


@settings(max_examples=60)
@given(
    values=rows_of_weights,
    kinds=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    share=st.floats(0, 1),
    threshold=st.floats(1, 4),
    eta=st.floats(0, 1),
    gate=st.floats(0, 1),
)
def test_rows_follow_the_definition_and_add_up_to_one(
    values: list[float],
    kinds: list[int],
    share: float,
    threshold: float,
    eta: float,
    gate: float,
) -> None:
    weights = torch.tensor(values) / sum(values)
    made = config(share=share, threshold=threshold, eta=eta, head_gate=gate)
    given_kinds = torch.tensor(kinds)
    found = applied(made, weights, given_kinds)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))
    assert bool((found >= 0).all())
    assert bool((found[weights == 0] == 0).all())
    wanted = by_hand(weights, given_kinds, made)
    sides = [weights[torch.isin(given_kinds, torch.tensor(s))].sum() for s in ([2], [1, 3])]
    if min(sides) > 1e-3 and abs(float(sum(sides)) - gate) > 1e-5:  # not at a borderline
        changed, expected = ((x - weights).abs().amax() > 1e-6 for x in (found, wanted))
        if changed == expected:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        else:  # rounding may decide exactly at the threshold only
            eased = by_hand(weights, given_kinds, config(**{**made.model_dump(), "threshold": 1}))
            assert not torch.equal(eased, weights)
            level = [float(s) / max(n, 1) ** eta for s, n in zip(sides, counts(kinds), strict=True)]
            assert max(level) / min(level) == pytest.approx(threshold, rel=1e-4)


def counts(kinds: list[int]) -> list[int]:
    return [kinds.count(AUDIO), kinds.count(VIDEO) + kinds.count(FACE)]


@settings(max_examples=40)
@given(values=rows_of_weights, kinds=st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_neither_side_is_favoured(values: list[float], kinds: list[int]) -> None:
    """Exchange the modalities of the tokens: the same weights move."""
    weights = torch.tensor(values) / sum(values)
    swapped = [{AUDIO: VIDEO, VIDEO: AUDIO}.get(kind, kind) for kind in kinds]
    made = config(sides=[["audio"], ["video"]], eta=0.5, threshold=1.5)
    one, other = (applied(made, weights, torch.tensor(k)) for k in (kinds, swapped))
    torch.testing.assert_close(one, other)


# In a model


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("record", [False, True])
def test_nothing_out_of_balance_is_eager_attention(heads: int, record: bool) -> None:
    """With groups of queries, padding and a cache, in every layer."""
    made = llama(heads=heads)
    batch, extra = prompt(3), tokens(3)
    wanted = stepped(made, batch, extra)
    with reallocating(made, quiet(), batch["modality_ids"], record=record):
        torch.testing.assert_close(stepped(made, batch, extra), wanted, **EAGER)
    with reallocating(made, config(), batch["modality_ids"]):
        assert float((stepped(made, batch, extra) - wanted).abs().amax()) > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_off_is_the_base_bit_for_bit(attention: str) -> None:
    made = llama(attention)
    batch, extra = prompt(), tokens(2)
    wanted = stepped(made, batch, extra)
    with reallocating(made, config(), batch["modality_ids"]):
        assert made.model.config._attn_implementation == NAME
        stepped(made, batch, extra)
    with pytest.raises(DataError), reallocating(made, config()):  # left by an error
        stepped(made, batch, extra)
    assert made.model.config._attn_implementation == attention
    assert not made.model._forward_pre_hooks
    assert not made.model._forward_hooks
    assert torch.equal(stepped(made, batch, extra), wanted)


def test_layers_that_do_not_change_are_sdpa_bit_for_bit() -> None:
    made = llama("sdpa")
    batch, extra = prompt(), tokens(2)
    with reallocating(made, None, batch["modality_ids"]):
        found = stepped(made, batch, extra)
    assert torch.equal(found, stepped(made, batch, extra))


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("change", [config(), AmplificationConfig(), SinkConfig(sink=1.5)])
def test_cached_decoding_equals_the_full_forward(model: Any, phase: str, change: Any) -> None:
    batch, extra = prompt(3), tokens(3)
    made = type(change)(**{**change.model_dump(), "layers": LAYERS, "phase": phase})
    with reallocating(model, made, batch["modality_ids"]):
        cached = stepped(model, batch, extra)
        whole = run(model, longer(batch, extra)).logits[:, len(PROMPT) - 1 :]
    torch.testing.assert_close(cached, whole, **EXACT)
    plain = run(model, longer(batch, extra)).logits[:, len(PROMPT) - 1 :]
    differs = [(whole - plain)[:, at].abs().amax() > 1e-3 for at in (0, -1)]
    assert differs == [phase != "decode", True]  # a changed prompt row is in the cache


@pytest.mark.parametrize("change", [config(), quiet()])
def test_a_static_cache_equals_a_growing_one(model: Any, change: Any) -> None:
    batch, extra = prompt(), tokens(2)
    for rows in (batch, {name: x[:1] for name, x in batch.items()}):  # with padding, without
        more = extra[: len(rows["input_ids"])]
        with reallocating(model, change, rows["modality_ids"]):
            wanted = stepped(model, rows, more)
            static: Any = StaticCache(config=model.config, max_cache_len=20)
            torch.testing.assert_close(stepped(model, rows, more, static), wanted, **EXACT)


def test_padding_changes_nothing(model: Any) -> None:
    """Even were padding said to be media: a masked token has no weight and is not counted."""
    batch, extra = prompt(), tokens(2)
    alone = {name: x[1:, 3:] for name, x in batch.items()}
    kinds = batch["modality_ids"].clone()
    kinds[1, :3] = VIDEO
    made = config(eta=1.0, threshold=1.3)
    with reallocating(model, made, alone["modality_ids"]):
        wanted = stepped(model, alone, extra[1:])
    with reallocating(model, made, kinds):
        found = stepped(model, batch, extra)[1:]
    torch.testing.assert_close(found, wanted, **EXACT)


def test_only_the_last_row_changes_and_nothing_later_is_seen(model: Any) -> None:
    batch, extra = prompt(), tokens(2)
    plain = run(model, batch).logits
    with reallocating(model, config(), batch["modality_ids"]):
        first = run(model, batch).logits
        earlier = batch["attention_mask"].bool()
        earlier[:, -1] = False
        torch.testing.assert_close(first[earlier], plain[earlier], **EXACT)
        assert float((first - plain)[:, -1].abs().amax()) > 1e-3
        whole = run(model, longer(batch, extra)).logits
        other = run(model, longer(batch, (extra + 1) % 50)).logits
    real = batch["attention_mask"].bool()
    for found in (other, first):
        torch.testing.assert_close(
            whole[:, : len(PROMPT)][real], found[:, : len(PROMPT)][real], **EXACT
        )


def test_exchanging_the_sides_changes_nothing_in_a_model(model: Any) -> None:
    batch, extra = prompt(), tokens(2)
    found: list[Tensor] = []
    for sides in ([["audio"], ["video", "face"]], [["face", "video"], ["audio"]]):
        with reallocating(model, config(sides=sides, eta=0.5), batch["modality_ids"]):
            found.append(stepped(model, batch, extra))
    torch.testing.assert_close(found[0], found[1], **EAGER)


def test_a_clip_with_one_side_only_does_not_change(model: Any) -> None:
    batch = prompt()
    kinds = batch["modality_ids"].clone()
    kinds[kinds == AUDIO] = TEXT
    wanted = stepped(model, batch, tokens(2))
    with reallocating(model, config(), kinds):
        torch.testing.assert_close(stepped(model, batch, tokens(2)), wanted, **EXACT)


def test_half_precision() -> None:
    made = llama().to(torch.bfloat16)
    batch, extra = prompt(), tokens(2)
    wanted = stepped(made, batch, extra)
    with reallocating(made, quiet(), batch["modality_ids"]):
        torch.testing.assert_close(stepped(made, batch, extra), wanted, atol=0.1, rtol=0.05)
    with reallocating(made, config(), batch["modality_ids"]):
        assert bool(stepped(made, batch, extra).isfinite().all())


@pytest.mark.parametrize("change", [config(), AmplificationConfig(), SinkConfig(sink=1.5)])
def test_every_change_of_every_row_in_a_model_adds_up_to_one(model: Any, change: Any) -> None:
    batch, extra = prompt(), tokens(2)
    made = type(change)(**{**change.model_dump(), "layers": [1]})
    with reallocating(model, made, batch["modality_ids"], record=True) as switch:
        stepped(model, batch, extra)
    (mass,) = switch.take()
    assert mass.layers == (0, 1, 2)
    torch.testing.assert_close(mass.after.sum(-1), torch.ones(2, 5, 3, 4))
    torch.testing.assert_close(mass.before.sum(-1), torch.ones(2, 5, 3, 4))
    moved = (mass.after - mass.before).abs().amax((0, 1, 3, 4))
    assert (moved > 1e-3).tolist() == [False, True, False]
    assert not switch.take()


# What is noted


def test_mass_is_what_output_attentions_gives(model: Any) -> None:
    batch, extra = prompt(3), tokens(3)
    with reallocating(model, None, batch["modality_ids"], record=True) as switch:
        stepped(model, batch, extra)
    (mass,) = switch.take()
    full = longer(batch, extra)
    attentions = torch.stack(run(model, full, output_attentions=True).attentions, 1)
    seen = attentions[..., len(PROMPT) - 1 :, :]  # (B, A, Q, T, S)
    kinds = torch.nn.functional.one_hot(full["modality_ids"], len(KINDS)).float()
    wanted = torch.einsum("baqts,bsm->btaqm", seen, kinds)
    torch.testing.assert_close(mass.before, wanted, **EXACT)
    assert torch.equal(mass.before, mass.after)


def test_mass_of_a_changed_layer_moves_as_said(model: Any) -> None:
    batch = prompt()
    made = config(layers=[0], share=0.5)
    with reallocating(model, made, batch["modality_ids"], record=True) as switch:
        run(model, batch)
        run(model, batch)
    first, second = switch.take()
    assert torch.equal(first.after, second.after)
    before, after = first.before[:, 0, 0], first.after[:, 0, 0]  # (B, Q, M)
    side = [before[..., AUDIO], before[..., VIDEO] + before[..., FACE]]
    moved = 0.5 * torch.maximum(*side) * torch.where(side[0] > side[1], -1.0, 1.0)
    torch.testing.assert_close(after[..., AUDIO], side[0] + moved)
    torch.testing.assert_close(after[..., TEXT], before[..., TEXT])


# Ways to generate


def test_generate_of_a_native_model(model: Any) -> None:
    batch = prompt()
    given_ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with reallocating(model, config(), batch["modality_ids"]):
        cached = model.generate(**given_ids, **asked)
        whole = model.generate(**given_ids, **asked, use_cache=False)
        twice = model.generate(**given_ids, **asked, num_beams=2, num_return_sequences=2)
        beams = model.generate(**given_ids, **asked, num_beams=2, use_cache=False)
    assert torch.equal(cached, whole)
    assert torch.equal(twice[::2], beams)
    assert not torch.equal(cached, model.generate(**given_ids, **asked))


def test_modality_ids_may_come_with_the_forward(model: Any) -> None:
    batch = prompt()
    with reallocating(model, config(), batch["modality_ids"]):
        wanted = run(model, batch).logits
    with reallocating(model, config()):
        found = run(model, batch, modality_ids=batch["modality_ids"]).logits
    assert torch.equal(found, wanted)


def test_without_the_switch_the_defaults_apply() -> None:
    made = llama()
    deep = made.config.num_hidden_layers  # too few for the default layers, so one more
    made = LlamaForCausalLM(
        LlamaConfig(**{**made.config.to_dict(), "num_hidden_layers": deep + 1})
    ).eval()
    batch = prompt()
    with reallocating(made, ReallocationConfig(), batch["modality_ids"]):
        wanted = run(made, batch).logits
    made.set_attn_implementation(NAME)
    assert torch.equal(run(made, batch, modality_ids=batch["modality_ids"]).logits, wanted)
    with pytest.raises(DataError, match="modality of every key"):
        run(made, batch)


def test_the_composed_model_brings_its_own_ids(loaded: Loaded) -> None:
    """Two layers, four clips with what streams they have."""
    made: Any = copy.deepcopy(loaded.model)
    batch = batch_of(loaded, [0, 1, 2, 3])
    asked = {"max_new_tokens": 8, "do_sample": False}
    plain = made.generate(**batch, **asked)
    change = config(layers=[0, 1], share=0.9)
    with reallocating(made, change, record=True) as switch:
        carried = made.generate(**batch, **asked)
    (mass,) = switch.take()
    with reallocating(made, change, batch["modality_ids"]):
        assert torch.equal(made.generate(**batch, **asked), carried)
        assert torch.equal(made.generate(**batch, **asked, use_cache=False), carried)
    assert mass.before.shape == (4, carried.shape[1] - batch["input_ids"].shape[1], 2, 2, 5)
    has = mass.before.amax((1, 2, 3)) > 0
    kinds = [
        set(row[mask.bool()].tolist())
        for row, mask in zip(batch["modality_ids"], batch["attention_mask"], strict=True)
    ]
    assert [set(row.nonzero().flatten().tolist()) for row in has] == kinds
    both = (mass.before != mass.after).any(-1).flatten(1).any(1)
    assert both.tolist() == [True, False, False, False]  # only the first has both sides
    assert torch.equal(made.generate(**batch, **asked), plain)


def test_an_adapter_is_no_hindrance() -> None:
    fresh = tiny(lora={"r": 4})
    made: Any = fresh.model
    made.eval()
    batch = batch_of(fresh, [0])
    with reallocating(made, config(layers=[0, 1]), record=True) as switch:
        made(**batch)
        made.generate(**batch, max_new_tokens=2)
    assert [mass.before.shape[:3] for mass in switch.take()] == [(1, 1, 2), (1, 2, 2)]


def test_several_answers_to_each_prompt(model: Any) -> None:
    batch = prompt()
    twice = {name: x.repeat_interleave(2, 0) for name, x in batch.items()}
    with reallocating(model, config(), twice["modality_ids"]):
        wanted = run(model, twice).logits
    with reallocating(model, config(), batch["modality_ids"]):
        assert torch.equal(run(model, twice).logits, wanted)


def test_a_native_thinkers_decoder_only() -> None:
    thinker: Any = tiny_thinker(train_tokenizer()).eval()
    ids = torch.randint(50, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    kinds = torch.tensor([[TEXT, *[VIDEO] * 5, *[AUDIO] * 5, TEXT]])
    plain = thinker(input_ids=ids).logits
    layers = list(range(thinker.config.text_config.num_hidden_layers))
    with reallocating(thinker, config(layers=layers, threshold=1e9), kinds, record=True) as switch:
        torch.testing.assert_close(thinker(input_ids=ids).logits, plain, **EXACT)
        assert thinker.model.audio_tower.config._attn_implementation != NAME
    (mass,) = switch.take()
    torch.testing.assert_close(mass.before.sum(-1), torch.ones_like(mass.before[..., 0]))
    assert float(mass.before[..., AUDIO].amin()) > 0


# What is refused


def test_what_is_refused(model: Any) -> None:
    batch = prompt()
    kinds = batch["modality_ids"]
    with pytest.raises(DataError, match="give modality_ids"), reallocating(model, config()):
        run(model, batch)
    short = {name: x[:, :4] for name, x in batch.items()}
    with pytest.raises(DataError, match="of this prompt"), reallocating(model, config(), kinds):
        run(model, short)
    with reallocating(model, config()), pytest.raises(ConfigError, match="already"):
        reallocating(model, config()).__enter__()
    fresh: Any = llama().train()
    with pytest.raises(ConfigError, match="eval"), reallocating(fresh, config(), kinds):
        run(fresh, batch)
    with pytest.raises(ConfigError, match="no decoder"):
        reallocating(torch.nn.Linear(2, 2), config()).__enter__()
    for layers in ([3], [-1], []):
        with pytest.raises(ConfigError, match="layers 0 to 2"):
            reallocating(model, config(layers=layers)).__enter__()
    with pytest.raises(ConfigError, match="list the layers"):
        Reallocation(ReallocationConfig(), 2)
    assert model.model.config._attn_implementation == "eager"
    for wrong in ([["audio"], []], [["audio"], ["audio", "video"]]):
        with pytest.raises(ConfigError, match="each side"):
            parse(ReallocationConfig, {"sides": wrong})


def test_a_cache_whose_rows_changed_is_refused(model: Any) -> None:
    batch = prompt()
    with reallocating(model, config(), batch["modality_ids"]):
        cache = run(model, batch, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(DataError, match="which row is of which prompt"):
            model(input_ids=torch.tensor([[3]]), past_key_values=cache)


def test_shared_prefixes_are_not_used_meanwhile(model: Any) -> None:
    made = llama("sdpa")
    with reallocating(made, config(), prompt()["modality_ids"]):
        assert not use_prefixes(made.model)
    assert use_prefixes(made.model)


def test_training_rollouts_are_refused(loaded: Loaded) -> None:
    """They call the decoder themselves, with the rows of a prompt multiplied behind its prefill."""
    made: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    section = parse(RolloutConfig, {"num_generations": 2, "max_completion_length": 3})
    engine = HFRollouts(loaded.processor.tokenizer, made, section)
    change = config(layers=[0, 1])
    with pytest.raises(DataError, match="give modality_ids"), reallocating(made, change):
        engine.generate(made, batch, range(4))
    kinds = batch["modality_ids"]
    with pytest.raises(DataError, match="which row"), reallocating(made, change, kinds):
        engine.generate(made, batch, range(4))


MEDIA = torch.tensor([0.0, 1, 1, 1, 0])[None, :, None]


def on_heads(made: Any, *rows: list[float]) -> Tensor:
    """``made`` on heads with one row of weights each, (S,) -> (heads, S)."""
    plain = torch.tensor(rows)[None, :, None]
    return made.apply(plain.log(), plain, MEDIA)[0, :, 0]


def test_amplified_scores_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.0, torch.finfo(torch.float32).min])
    made = AmplificationConfig(alpha=0.5)
    found = made.apply(scores.view(1, 1, 1, -1), scores.softmax(-1).view(1, 1, 1, -1), MEDIA)
    wanted = torch.tensor([1.0, 3.0, -0.5, 0.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(found.flatten(), wanted)
    hidden = MEDIA.clone()
    hidden[0, 4] = 0.0
    assert float(made.apply(scores.view(1, 1, 1, -1), scores, hidden)[..., -1]) == 0.0


def test_sinks_by_hand() -> None:
    """The mean weight is 0.2, so that a sink has over 0.4: the first token is one."""
    made = SinkConfig(sink=2.0, keep=0.6)
    found = on_heads(made, [0.5, 0.1, 0.1, 0.2, 0.1])
    # 0.2 goes to the media tokens by their weights.
    torch.testing.assert_close(found[0], torch.tensor([0.3, 0.15, 0.15, 0.3, 0.1]))


def test_a_sink_among_the_media_only_gives() -> None:
    made = SinkConfig(sink=2.0, keep=0.5, most_sunk=0.9)
    found = on_heads(made, [0.2, 0.5, 0.1, 0.1, 0.1])
    torch.testing.assert_close(found[0], torch.tensor([0.2, 0.25, 0.225, 0.225, 0.1]))


def test_heads_that_do_not_change() -> None:
    elsewhere = [0.85, 0.05, 0.02, 0.03, 0.05]  # a tenth on media
    sunk = [0.1, 0.7, 0.05, 0.05, 0.1]  # most of it on a sink
    none = [0.2, 0.2, 0.2, 0.2, 0.2]
    for row in (elsewhere, sunk, none):
        assert torch.equal(on_heads(SinkConfig(sink=2.0), row)[0], torch.tensor(row))


def test_a_sink_is_one_for_all_heads_together() -> None:
    """A token that one head alone looks at is no sink."""
    rows = [0.45, 0.1, 0.15, 0.2, 0.1], [0.1, 0.3, 0.2, 0.2, 0.2]
    assert torch.equal(on_heads(SinkConfig(sink=2.0), *rows), torch.tensor(rows))
    assert not torch.equal(on_heads(SinkConfig(sink=2.0), rows[0])[0], torch.tensor(rows[0]))
