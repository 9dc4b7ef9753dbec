"""Rollouts: shared, expanded, thinned out, and still what plain decoding says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from mmemo.config import parse
from mmemo.generation import rollout
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
from mmemo.models.adapters.merging import merged_bytes
from mmemo.models.attention.fused import fuse
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
    "poll_steps": 1,
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
    same(rolled(made, prompts, SEEDS, **{off: PLAIN[off]}), rolled(made, prompts, SEEDS))


@pytest.mark.parametrize(
    "changes",
    [
        {"poll_steps": 5},
        {"poll_steps": 16, "drop_finished": False},
        {"poll_steps": 1000},
        {"cuda_graphs": True},
        {"cuda_graphs": True, "poll_steps": 3},
    ],
)
def test_rows_that_end_between_polls_say_nothing_more(changes: dict[str, Any]) -> None:
    made = tiny(lora={"r": 4})
    shake(made.model, 0.1)
    made.model.eval()
    prompts = batch_of(made, [0, 1, 2])
    wanted = rolled(made, prompts, SEEDS)
    assert len(set(wanted.mask.sum(1).tolist())) > 2
    same(rolled(made, prompts, SEEDS, **changes), wanted)


def test_batches_drawn_together_say_what_each_says_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch has a longer prompt, and the third no clip."""
    batches = [batch_of(loaded, rows) for rows in ([0], [1, 2], [2])]
    given = list(zip(batches, (SEEDS[:4], SEEDS[4:], SEEDS[8:]), strict=True))
    wanted = [rolled(loaded, prompts, seeds) for prompts, seeds in given]
    decoders: list[int] = []

    class Counted(rollout.Decoder):
        def __init__(self, backbone: Any, prompts: Any, *args: Any, **kwargs: Any) -> None:
            decoders.append(len(prompts))
            super().__init__(backbone, prompts, *args, **kwargs)

    monkeypatch.setattr(rollout, "Decoder", Counted)

    def drawn(**changes: Any) -> list[int]:
        made = HFRollouts(loaded.processor.tokenizer, unwrap(loaded.model), section(**changes))
        for one, other in zip(
            frequent_stops(made).generate_all(loaded.model, given), wanted, strict=True
        ):
            same(one, other)
        found = decoders[:]
        decoders.clear()
        return found

    assert drawn() == [3]
    assert drawn(shared_cache=False) == drawn(shared_prefill=False) == [3]
    assert drawn(whole_steps=False) == [1, 1, 1]
    monkeypatch.setattr(rollout, "free_bytes", lambda device: 0)
    assert drawn() == [1, 1, 1]  # memory for none but the first
    uneven = [given[0], (given[1][0], SEEDS[:2])]
    engine = HFRollouts(loaded.processor.tokenizer, unwrap(loaded.model), section())
    with pytest.raises(ValueError, match="equal groups"):
        engine.generate_all(loaded.model, uneven)


def test_prompts_drawn_together_keep_their_experts() -> None:
    made = tiny(lora={"r": 4, "experts": {}})
    shake(made.model, 0.3)
    made.model.eval()
    batches = [batch_of(made, rows) for rows in ([0], [1, 2])]
    given = list(zip(batches, (SEEDS[:4], SEEDS[4:]), strict=True))
    engine = HFRollouts(made.processor.tokenizer, unwrap(made.model), section())
    together = frequent_stops(engine).generate_all(made.model, given)
    for (prompts, seeds), found in zip(given, together, strict=True):
        same(found, rolled(made, prompts, seeds))


def test_free_memory_decides_whether_weights_are_copied(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fits(size: int, device: torch.device) -> bool:
        asked.append(size)
        return size <= most

    fused: list[bool] = []

    def watched(lm: Any, *, adapter: bool) -> Any:
        fused.append(adapter)
        return fuse(lm, adapter=adapter)

    monkeypatch.setattr(rollout, "fits", fits)
    monkeypatch.setattr(rollout, "fuse", watched)
    lm, most = unwrap(loaded.model).language_model, 0
    prompts = batch_of(loaded, [0, 1, 2])
    plain = rolled(loaded, prompts, SEEDS)
    assert fused == []
    layer = DynamicCache(config=lm.config)
    lm(inputs_embeds=torch.zeros(1, 5, 32), past_key_values=layer, use_cache=True)
    each = sum(x.nbytes for one in layer.layers for x in (one.keys, one.values)) // 5
    tokens = prompts["input_ids"].numel() + len(SEEDS) * 24
    assert set(asked) == {merged_bytes(lm) + each * tokens}
    most = asked[0]
    same(rolled(loaded, prompts, SEEDS), plain)
    assert fused == [True]
    rolled(loaded, prompts, SEEDS, fused_steps=False, merge_adapter=False)
    assert fused == [True]


class Operations(TorchDispatchMode):
    """Counts operations that compute; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "_unsafe_view" in str(func))
        return func(*args, **(kwargs or {}))


def operations(changes: dict[str, Any]) -> float:
    """Operations a token of a LoRA model of three layers, as an accelerator would poll."""
    text = {"scratch": {"hidden_size": 32, "layers": 3, "heads": 2, "vocab_size": 400}}
    made = tiny(text=text, lora={"r": 4})
    made.model.eval()
    prompts, counts = batch_of(made, [0, 1, 2]), list[int]()
    for longest in (17, 33):
        values = {"max_completion_length": longest, "poll_steps": 16, **changes}
        engine = HFRollouts(made.processor.tokenizer, unwrap(made.model), section(**values))
        engine.stops = []
        with Operations() as counted:
            engine.generate(made.model, prompts, SEEDS)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / 16


def test_a_token_takes_few_operations() -> None:
    assert operations({}) <= 150
    assert operations({"cuda_graphs": True}) <= 160
    plain = operations({"fused_steps": False, "merge_adapter": False, "poll_steps": 1})
    assert plain > 230


def test_an_accelerator_is_not_asked_after_every_token() -> None:
    """Nothing but a poll waits for the device: between polls, no value is read."""
    made, read = tiny(lora={"r": 4}), list[int]()
    made.model.eval()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if str(func).split(".")[1] in ("_local_scalar_dense", "nonzero", "item"):
                read.append(1)
            return func(*args, **(kwargs or {}))

    prompts, counts = batch_of(made, [0, 1, 2]), list[int]()
    for longest in (16, 32, 48):
        values = {"max_completion_length": longest, "poll_steps": 16}
        engine = HFRollouts(made.processor.tokenizer, unwrap(made.model), section(**values))
        engine.stops = []
        read.clear()
        with Reads():
            engine.generate(made.model, prompts, SEEDS)
        counts.append(len(read))
    assert counts[2] - counts[1] == counts[1] - counts[0] == 1


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


def test_draws_are_those_of_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2000, 3000, generator=generator)
    uniforms = torch.rand(2000, generator=generator, dtype=torch.float64)
    tokens, _ = sample_tokens(logits, uniforms, section())
    mass = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)[:, 0]
    assert int((tokens != wanted).sum()) <= 1  # one may stand where rounding decides
    # Half the mass is on tokens too rare for a float32 sum that begins with the other half.
    rare = torch.zeros(1, 1 + 2**24)
    rare[0, 0] = math.log(2**24)
    token, _ = sample_tokens(rare, torch.tensor([0.75], dtype=torch.float64), section())
    assert abs(int(token) - 2**23) < 2**14


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
