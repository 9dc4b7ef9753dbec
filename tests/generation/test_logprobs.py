"""Sharing the prompt changes the time it takes, and no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.generation.logprobs import Scores, naive_logps, packed_logps
from mmemo.generation.packing import block_mask, pack, plan_packs
from mmemo.models.adapters.lora import unwrap
from mmemo.models.attention.shared_prefix import NAME, poison_mask
from mmemo.models.backbone import AUDIO, TEXT, VIDEO
from mmemo.models.build import Loaded, set_trainable
from mmemo.train.distributed import leave
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

LENGTHS = [7, 1, 0, 5, 3, 2, 7, 4, 6]
INDEX = [3, 0, 0, 1, 1, 2, 3, 0, 3]
NO_MEDIA = {"video": None, "audio": None, "face": None, "fusion": None}


def continuations(
    lengths: list[int] = LENGTHS, index: list[int] = INDEX
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, C), mask (N, C) and prompt index (N,); junk ids where there is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, 300, (len(lengths), max(*lengths, 1)), generator=generator)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return ids, mask.long(), torch.tensor(index)


def learn(
    score: Callable[..., Scores], model: nn.Module, batch: Any, parts: Any, **values: Any
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores, and the gradients of a loss that every log-probability moves in its own way."""
    model.zero_grad()
    found = score(model, batch, *parts, **values)
    weights = torch.linspace(-1, 1, found.logps.numel()).view_as(found.logps)
    (found.logps * weights).mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found, gradients


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Some weights move nothing (a bias before a softmax): their gradient is rounding alone.
        allowed = 1e-5 * max(float(value.abs().max()), 2e-2)
        assert float((ours[name] - value).abs().max()) <= allowed, name
    assert sum(bool(value.abs().max() > 1e-3) for value in theirs.values()) > len(theirs) / 2


def check(model: nn.Module, batch: Any, parts: Any, **values: Any) -> None:
    """Packed equals naive: log-probabilities, entropies, gradients."""
    naive, wanted = learn(naive_logps, model, batch, parts, entropies=True, **values)
    packed, found = learn(packed_logps, model, batch, parts, entropies=True, **values)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(packed.logps, naive.logps, **close)
    torch.testing.assert_close(packed.entropies, naive.entropies, **close)
    empty = parts[1] == 0
    assert packed.logps[empty].abs().sum() == 0
    assert packed.logps[~empty].abs().min() > 0
    same(found, wanted)


def fresh(attention: str = "sdpa", **changes: Any) -> Loaded:
    loaded = tiny(**changes)
    set_trainable(loaded.model, ["lm", *([] if "video" in changes else ["connectors", "fusion"])])
    shake(loaded.model, 0.1)
    loaded.model.eval()
    unwrap(loaded.model).language_model.set_attn_implementation(attention)
    return loaded


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_video_audio_face_and_fusion(attention: str) -> None:
    """Four prompts of different lengths, with and without media, padded on the left."""
    loaded = fresh(attention)
    batch = batch_of(loaded, [0, 1, 2, 3])
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4
    assert not bool(batch["attention_mask"][:, 0].all())
    check(loaded.model, batch, continuations(), temperature=0.7)
    whole = continuations([5] * 8, [0, 0, 1, 1, 2, 2, 3, 3])  # as many for each, none padded
    check(loaded.model, batch, whole)
    used = unwrap(loaded.model).language_model.config._attn_implementation
    assert used == (NAME if attention == "sdpa" else "eager")


def test_naive_is_the_models_own_forward() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    ids, mask, index = continuations([4, 2], [1, 0])
    row = {
        **{name: x for name, x in batch.items() if "features" in name},
        "input_ids": torch.cat([batch["input_ids"][index], ids], 1),
        "attention_mask": torch.cat([batch["attention_mask"][index], mask], 1),
        "clip_index": batch["clip_index"][index],
    }
    spread = (model(**row).logits[:, -5:-1] / 0.5).log_softmax(-1)
    expected = spread.gather(-1, ids[..., None])[..., 0] * mask
    given = (model, batch, ids, mask, index)
    found = naive_logps(*given, temperature=0.5, entropies=True)
    torch.testing.assert_close(found.logps, expected, atol=1e-5, rtol=1e-5)
    entropy = -(spread.exp() * spread).sum(-1) * mask
    torch.testing.assert_close(found.entropies, entropy, atol=1e-5, rtol=1e-5)
    assert naive_logps(*given).entropies is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_alone(attention: str) -> None:
    loaded = fresh(attention, **NO_MEDIA)
    ids = torch.randint(50, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    parts = continuations([3, 5, 1, 4], [0, 0, 1, 1])
    check(loaded.model, {"input_ids": ids}, parts)  # no padding: no mask
    left = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    check(loaded.model, left, parts)
    one = {"input_ids": ids[:, :1]}  # a prompt of one token
    check(loaded.model, one, parts)


def test_the_side_of_the_padding_and_a_missing_index_change_nothing() -> None:
    loaded = fresh()
    parts = continuations([3, 2, 4], [0, 1, 1])
    left = batch_of(loaded, [0, 1])
    right = batch_of(loaded, [0, 1], padding_side="right")
    del right["clip_index"]  # row i is clip i
    for score in (packed_logps, naive_logps):
        wanted = score(loaded.model, left, *parts).logps
        found = score(loaded.model, right, *parts).logps
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    _, plain = learn(packed_logps, model, batch, continuations())
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, batch, continuations())
    _, saved = learn(packed_logps, model, batch, continuations())
    same(saved, plain)


def test_lora_and_its_reference() -> None:
    """With an adapter, and with it switched off, as the reference is computed."""
    loaded = fresh(lora={"r": 4, "lora_dropout": 0.0})
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    check(model, batch, continuations())
    with torch.no_grad(), model.disable_adapter():
        reference = packed_logps(model, batch, *continuations()).logps
        naive = naive_logps(model, batch, *continuations()).logps
    torch.testing.assert_close(reference, naive, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (packed_logps(model, batch, *continuations()).logps - reference).abs().max() > 1e-3


def test_chunks_bound_the_logits_and_change_nothing() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    whole, wanted = learn(packed_logps, model, batch, continuations(), entropies=True)
    sizes: list[int] = []
    head = model.lm_head.forward

    def counted(hidden: Tensor) -> Tensor:
        sizes.append(hidden.numel() // hidden.shape[-1] * model.lm_head.out_features)
        return head(hidden)

    model.lm_head.forward = counted  # no hook, with which the head is called once
    limit = 10 * model.lm_head.out_features
    cut, found = learn(
        packed_logps, model, batch, continuations(), entropies=True, max_logits=limit
    )
    assert max(sizes) <= limit
    # Once more in the backward pass, and once with one token to see whether the head learns.
    assert len(sizes) == 1 + 2 * -(-sum(LENGTHS) // 10)
    torch.testing.assert_close(cut.logps, whole.logps)
    torch.testing.assert_close(cut.entropies, whole.entropies)
    same(found, wanted)


def test_logits_that_the_model_caps_are_capped() -> None:
    loaded = fresh(**NO_MEDIA)
    model: Any = loaded.model
    prompts, parts = {"input_ids": torch.tensor([[60, 61, 62]])}, continuations([2, 3], [0, 0])
    before = packed_logps(model, prompts, *parts).logps
    model.config.text_config.final_logit_softcapping = 0.5
    found = packed_logps(model, prompts, *parts).logps
    assert (found - before).abs().max() > 1e-3
    row = torch.cat([prompts["input_ids"], parts[0][1:]], 1)
    expected = model(input_ids=row).logits[:, 2:-1].log_softmax(-1).gather(-1, row[:, 3:, None])
    torch.testing.assert_close(found[1:], expected[..., 0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def omni() -> QwenOmniBackbone:
    tokenizer = train_tokenizer()
    return QwenOmniBackbone(tiny_thinker(tokenizer), tokenizer, settings=SETTINGS).eval()


@pytest.mark.parametrize("interleave", [False, True])
def test_the_thinker_and_its_three_positions(omni: QwenOmniBackbone, interleave: bool) -> None:
    clips = {one.name: one for one in (clip(1), clip(2, seconds=1.3, size=(64, 40)))}
    samples = [
        sample("<video><audio>", "1.mp4"),
        sample("", "1.mp4"),
        sample("<audio>", "2.mp4", "Listen! {media}Which?"),
        sample("<video>", "2.mp4"),
    ]
    batch = make_batch(omni, clips, samples, interleave=interleave)
    parts = continuations()
    packed = pack(omni, batch, *parts)
    assert packed.position_ids.shape == (3, 1, packed.modality_ids.shape[1])
    check(omni, batch, parts)


def test_continuations_do_not_see_each_other() -> None:
    loaded = fresh()
    batch = batch_of(loaded, [0, 1, 2, 3])
    ids, mask, index = continuations()
    changed = ids.clone()
    changed[0] = 49  # of prompt 3, which has four continuations
    found = [packed_logps(loaded.model, batch, x, mask, index).logps for x in (ids, changed)]
    assert torch.equal(found[0][1:], found[1][1:])
    assert (found[0][0] - found[1][0]).abs().max() > 1e-3


def test_nothing_but_empty_continuations() -> None:
    loaded = fresh()
    batch = batch_of(loaded, [0, 1])
    for score in (packed_logps, naive_logps):
        found, gradients = learn(
            score, loaded.model, batch, continuations([0, 0], [0, 1]), entropies=True
        )
        assert found.logps.tolist() == [[0.0], [0.0]]
        assert all(value.abs().sum() == 0 for value in gradients.values())
        assert gradients  # every rank's backward pass reaches the weights


def test_what_is_packed() -> None:
    loaded = fresh()
    batch = batch_of(loaded, [0, 1])
    lengths = batch["attention_mask"].sum(1).tolist()
    ids, mask, index = continuations([3, 1, 2], [1, 0, 1])
    packed = pack(unwrap(loaded.model), batch, ids, mask, index)
    longest = max(lengths)
    # Prompts padded to the longest; of each continuation all but its last token.
    assert packed.modality_ids.shape == (1, 2 * longest + 2 + 0 + 1)
    assert packed.continuation_ids.tolist() == [[*ids[0, :2].tolist(), int(ids[2, 0])]]
    kinds = packed.modality_ids[0]
    assert kinds[2 * longest :].tolist() == [TEXT] * 3
    assert {VIDEO, AUDIO} <= set(kinds[:longest].tolist())
    after = lengths[1]
    assert packed.position_ids[0, 2 * longest :].tolist() == [after, after + 1, after]
    mask = block_mask(packed)[0, 0]
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    sees = mask[-1].nonzero().flatten().tolist()  # the one token of the last continuation
    assert sees == [*range(longest, longest + lengths[1]), len(mask) - 1]


def test_the_ordinary_forward_is_untouched() -> None:
    loaded = fresh()
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    before = model(**batch).logits
    packed_logps(model, batch, *continuations([2, 3], [0, 1]))
    assert torch.equal(model(**batch).logits, before)
    assert "forward" not in vars(model)
    assert NAME not in json.dumps(model.config.to_dict(), default=str)
    model.generate(**batch, max_new_tokens=3)


def test_a_layer_that_loses_the_layout_fails() -> None:
    model: Any = fresh(**NO_MEDIA).model
    packed_logps(model, {"input_ids": torch.tensor([[60, 61]])}, *continuations([2, 3], [0, 0]))
    embeds = torch.randn(1, 7, 32)
    with pytest.raises(RuntimeError, match="must match the size"):
        model.language_model(inputs_embeds=embeds, attention_mask=poison_mask(embeds))


class Wrapper(nn.Module):
    """As an engine around the model: it counts forward passes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.passes = module, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        return self.module(*args, **kwargs)


def test_wrappers_see_a_forward_pass() -> None:
    loaded = fresh()
    batch, parts = batch_of(loaded, [0, 1]), continuations([2, 3], [0, 1])
    wanted = packed_logps(loaded.model, batch, *parts).logps
    wrapper = Wrapper(loaded.model)
    assert torch.equal(packed_logps(wrapper, batch, *parts).logps, wanted)
    naive_logps(wrapper, batch, *parts)
    assert wrapper.passes == 2
    original: Any = loaded.model.forward
    loaded.model.forward = original  # patched, as TRL does
    packed_logps(wrapper, batch, *parts)
    assert loaded.model.forward is original
    with pytest.raises(ValueError, match="padding comes last"):
        packed_logps(wrapper, batch, parts[0], parts[1].flip(1), parts[2])


@pytest.mark.distributed
def test_deepspeed_adds_micro_batches_up() -> None:
    """Stage 3 keeps only the last micro-batch if its engine is not the one that is called."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.generation.test_logprobs"],
        env={**os.environ, **rank, "MASTER_PORT": "29617", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    norms = json.loads(done.stdout.splitlines()[-1])
    assert norms["zero3"] == pytest.approx(norms["plain"], rel=1e-4)
    assert norms["zero3 in chunks"] == pytest.approx(norms["plain"], rel=1e-4)
    assert norms["zero2"] == pytest.approx(norms["plain"], rel=1e-4)


def norms_of_a_step() -> dict[str, float]:
    """Gradient norm of one step of two micro-batches, with plain torch and with DeepSpeed."""
    from mmemo.train.config import TrainConfig
    from mmemo.train.distributed import Ranks
    from mmemo.train.engine import PlainEngine
    from mmemo.train.zero.engine import DeepSpeedEngine

    config = TrainConfig(gradient_accumulation_steps=2, max_grad_norm=1e9)
    norms: dict[str, float] = {}
    for name in ("plain", "zero2", "zero3", "zero3 in chunks"):
        stage, limit = name.partition(" ")[0], 800 if "chunks" in name else 0
        loaded, ranks = fresh(), Ranks(cpu=True)
        engine: Any = (
            PlainEngine(loaded.model, config, ranks)
            if stage == "plain"
            else DeepSpeedEngine(loaded.model, config, f"ds_configs/{stage}.json", ranks, 32)
        )
        for rows in ([0, 1], [2, 3]):
            batch, parts = batch_of_plain(rows), continuations([5, 2, 3], [0, 1, 1])
            with torch.no_grad():
                # As old log-probabilities are.
                packed_logps(engine.model, batch, *parts, max_logits=limit)
            found = packed_logps(engine.model, batch, *parts, max_logits=limit)
            engine.backward(found.logps.sum())
        norms[name] = engine.update(0.0).norm
    return norms


def batch_of_plain(rows: list[int]) -> Any:
    return batch_of(tiny(), rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": torch.tensor([[0, 1], [1, 1]])}, "padding comes last"),
        ({"mask": torch.ones(2, 3)}, "do not match"),
        ({"index": torch.tensor([0, 2])}, "one of 1 prompts"),
        ({"index": torch.tensor([0])}, "do not match"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, Tensor], says: str) -> None:
    loaded = fresh(**NO_MEDIA)
    ids = torch.tensor([[60, 61], [62, 63]])
    mask = change.get("mask", torch.ones_like(ids))
    index = change.get("index", torch.tensor([0, 0]))
    for score in (packed_logps, naive_logps):
        with pytest.raises(ValueError, match=says):
            score(loaded.model, {"input_ids": torch.tensor([[60]])}, ids, mask, index)


def test_models_that_cannot_share_a_prompt_say_so() -> None:
    loaded = fresh(**NO_MEDIA)
    config: Any = unwrap(loaded.model).language_model.config
    given = ({"input_ids": torch.tensor([[60, 61, 62]])}, *continuations([4, 3], [0, 0]))
    config.sliding_window = 4
    with pytest.raises(ConfigError, match="do not attend to all positions"):
        packed_logps(loaded.model, *given)
    config.sliding_window = 64
    packed_logps(loaded.model, *given)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        packed_logps(loaded.model, *given)
    config.layer_types, config._attn_implementation_internal = None, "flash_attention_2"
    with pytest.raises(ConfigError, match="supports no block mask"):
        packed_logps(loaded.model, *given)


@settings(max_examples=50)
@given(
    groups=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 80)), max_size=12),
    budget=st.integers(1, 300),
)
def test_plans_hold_every_group_once_and_keep_to_the_budget(
    groups: list[tuple[int, int]], budget: int
) -> None:
    prompts, counts = [p for p, _ in groups], [c for _, c in groups]
    plan = plan_packs(prompts, counts, budget)
    assert sorted(group for pack in plan for group in pack) == list(range(len(groups)))
    for one in plan:
        tokens = len(one) * max(prompts[g] for g in one) + sum(counts[g] for g in one)
        assert tokens <= budget or len(one) == 1
    assert plan == plan_packs(prompts, counts, budget)


if __name__ == "__main__":
    print(json.dumps(norms_of_a_step()))
    leave()
