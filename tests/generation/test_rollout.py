"""Rollouts: shared, expanded, thinned out, and still what plain decoding says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.config import parse
from mmemo.generation.decoder import PreallocatedLayer
from mmemo.generation.logprobs import naive_logps
from mmemo.generation.rollout import (
    HFRollouts,
    RolloutConfig,
    Rollouts,
    filter_logits,
    rollout_seed,
    sample_tokens,
    token_mask,
)
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import shake, tiny
from tests.models.qwen.test_omni import (
    SETTINGS,
    QwenOmniBackbone,
    clip,
    make_batch,
    sample,
    tiny_thinker,
    train_tokenizer,
)

PLAIN = {
    "shared_prefill": False,
    "shared_cache": False,
    "merge_adapter": False,
    "fused_steps": False,
    "drop_finished": False,
}
"""Every speed-up off."""
SEEDS = [rollout_seed(3, 7, f"row-{row}", index) for row in range(3) for index in range(4)]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    made = tiny()
    shake(made.model, 0.1)
    made.model.eval()
    return made


def section(**changes: Any) -> RolloutConfig:
    return parse(RolloutConfig, {"num_generations": 4, "max_completion_length": 24, **changes})


def frequent_stops(engine: HFRollouts) -> HFRollouts:
    """Rows end early and at different steps, as they do with a trained model."""
    engine.stops = sorted({*engine.stops, *range(60, 100)})
    return engine


def rolled(loaded: Loaded, prompts: Any, seeds: list[int], **changes: Any) -> Rollouts:
    engine = HFRollouts(loaded.processor.tokenizer, unwrap(loaded.model), section(**changes))
    return frequent_stops(engine).generate(loaded.model, prompts, seeds)


def same(found: Rollouts, wanted: Rollouts) -> None:
    assert torch.equal(found.ids * found.mask, wanted.ids * wanted.mask)
    assert torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.ended, wanted.ended)
    assert found.texts == wanted.texts
    torch.testing.assert_close(found.logps, wanted.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.8, "min_p": 0.05}])
def test_sharing_the_prompt_and_dropping_rows_change_no_token(
    loaded: Loaded, filters: dict[str, Any]
) -> None:
    prompts = batch_of(loaded, [0, 1, 2])
    assert not bool(prompts["attention_mask"].all())
    found = rolled(loaded, prompts, SEEDS, **filters)
    lengths = found.mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    plain = rolled(loaded, prompts, SEEDS, **PLAIN, **filters)
    same(found, plain)


@pytest.mark.parametrize("off", [*PLAIN])
@pytest.mark.parametrize("adapter", [{"r": 4}, {"r": 4, "use_dora": True}, None])
def test_no_switch_changes_a_token(off: str, adapter: dict[str, Any] | None) -> None:
    made = tiny(lora=adapter)
    shake(made.model, 0.1)
    made.model.eval()
    prompts = batch_of(made, [0, 1, 2])
    same(rolled(made, prompts, SEEDS, **{off: False}), rolled(made, prompts, SEEDS))


def test_texts_begin_with_what_the_prompt_opened_and_ids_do_not(loaded: Loaded) -> None:
    prompts, tokenizer = batch_of(loaded, [0, 1, 2]), loaded.processor.tokenizer
    plain = rolled(loaded, prompts, SEEDS)
    engine = HFRollouts(tokenizer, unwrap(loaded.model), section(), opened="<think>\n")
    found = frequent_stops(engine).generate(loaded.model, prompts, SEEDS)
    assert torch.equal(found.ids, plain.ids)
    assert torch.equal(found.logps, plain.logps)
    for text, other in zip(found.texts, plain.texts, strict=True):
        assert text.startswith("<think>")
        assert "".join(text.split()) == "<think>" + "".join(other.split())


def test_a_completion_does_not_depend_on_its_batch(loaded: Loaded) -> None:
    together = rolled(loaded, batch_of(loaded, [0, 1, 2]), SEEDS)
    for row in range(3):
        group = slice(4 * row, 4 * row + 4)
        alone = rolled(loaded, batch_of(loaded, [row]), SEEDS[group])
        assert alone.texts == together.texts[group]
    assert len(set(together.texts)) > 6


def test_greedy_is_what_generate_says(loaded: Loaded) -> None:
    model: Any = loaded.model
    prompts = batch_of(loaded, [0, 1, 2])
    engine = frequent_stops(
        HFRollouts(loaded.processor.tokenizer, model, section(top_k=1, num_generations=2))
    )
    found = engine.generate(model, prompts, SEEDS[:6])
    said: Tensor = model.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=engine.stops,
        pad_token_id=loaded.processor.tokenizer.pad_token_id,
    )[:, prompts["input_ids"].shape[1] :]
    for row in range(3):
        for copy in (2 * row, 2 * row + 1):
            length = int(found.mask[copy].sum())
            assert found.ids[copy, :length].tolist() == said[row, :length].tolist()


def test_log_probabilities_are_those_that_training_sees(loaded: Loaded) -> None:
    prompts = batch_of(loaded, [0, 1, 2])
    found = rolled(loaded, prompts, SEEDS, temperature=0.7)
    index = torch.arange(3).repeat_interleave(4)
    scored = naive_logps(loaded.model, prompts, found.ids, found.mask, index, temperature=0.7)
    torch.testing.assert_close(found.logps, scored.logps, atol=1e-5, rtol=1e-5)


def test_mrope_positions_go_on_after_the_prompt() -> None:
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    backbone = QwenOmniBackbone(tiny_thinker(tokenizer), tokenizer, settings=SETTINGS).eval()
    clips = {"a": clip(1), "b": clip(2, seconds=1.3, size=(64, 40))}
    rows = [sample("<video><audio>", "a"), sample("<audio>", "b"), sample("", "b")]
    prompts = make_batch(backbone, clips, rows)
    engine = frequent_stops(HFRollouts(tokenizer, backbone, section()))
    found = engine.generate(backbone, prompts, SEEDS)
    index = torch.arange(3).repeat_interleave(4)
    scored = naive_logps(backbone, prompts, found.ids, found.mask, index)
    torch.testing.assert_close(found.logps, scored.logps, atol=1e-5, rtol=1e-5)


def test_ends_and_limits(loaded: Loaded) -> None:
    found = rolled(loaded, batch_of(loaded, [0, 1, 2]), SEEDS, max_completion_length=6)
    assert found.ids.shape == found.mask.shape == found.logps.shape
    assert found.ids.shape[1] <= 6
    stops = {*range(60, 100), loaded.processor.tokenizer.eos_token_id}
    for row, ended in enumerate(found.ended.tolist()):
        said = found.ids[row, : int(found.mask[row].sum())].tolist()
        assert ended == (said[-1] in stops)
        assert not stops & set(said[:-1])
        assert ended or len(said) == 6
    assert {True, False} == set(found.ended.tolist())


def test_placeholders_are_never_spoken(loaded: Loaded) -> None:
    never = unwrap(loaded.model).config.token_ids.values()
    found = rolled(loaded, batch_of(loaded, [0]), SEEDS[:4], temperature=50.0)
    assert not set(never) & set(found.ids.flatten().tolist())


def test_groups_must_be_whole_and_padding_on_the_left(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        rolled(loaded, batch_of(loaded, [0, 1, 2]), SEEDS[:4])
    with pytest.raises(ValueError, match="padded on the left"):
        rolled(loaded, batch_of(loaded, [0, 1, 2], padding_side="right"), SEEDS)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20000, 4)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logps = sample_tokens(logits, uniforms, section(temperature=0.5))
    wanted = (logits[0] / 0.5).softmax(-1)
    shares = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(shares, wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(logps.exp(), wanted[tokens])
    none, _ = sample_tokens(logits, uniforms, section(), token_mask([2], 4, logits.device))
    assert set(none.tolist()) == {0, 1, 3}
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ends, _ = sample_tokens(logits[:2], edges, section(top_k=2))
    assert ends.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["top_k", "top_p", "min_p"])
def test_filters_are_those_of_transformers(kind: str) -> None:
    from transformers import generation

    value: Any = {"top_k": 5, "top_p": 0.6, "min_p": 0.2}[kind]
    warper = {
        "top_k": generation.TopKLogitsWarper,
        "top_p": generation.TopPLogitsWarper,
        "min_p": generation.MinPLogitsWarper,
    }[kind]
    logits = 2 * torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    theirs: Tensor = warper(value)(torch.zeros(9, 1, dtype=torch.long), logits)  # type: ignore[assignment]
    assert torch.equal(filter_logits(logits, section(**{kind: value})), theirs)


def test_the_cache_has_the_room_it_was_given_and_no_more() -> None:
    states = torch.randn(2, 1, 3, 4)
    layer = PreallocatedLayer(states, states, room=1)
    keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert torch.equal(keys, torch.cat([states, states[:, :, :1]], 2))
    assert layer.get_seq_length() == 4
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.keys, keys[1:])
    with pytest.raises(ValueError, match="room for 4"):
        layer.update(states[1:, :, :1], states[1:, :, :1])
