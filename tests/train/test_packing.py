"""Packed rows learn what rows in a padded batch learn, without computing the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.generation.packing import fill_packs, pack_rows, rows_mask
from mmemo.models.adapters.lora import unwrap
from mmemo.models.attention.shared_prefix import row_slots, row_spans
from mmemo.models.build import Loaded, set_trainable
from mmemo.train.dataloader import micro_batches
from mmemo.train.sft import SftObjective, run_sft, sft_batch
from tests.generation.test_logprobs import fresh, same
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
from tests.train.test_sft import metrics
from tests.train.tiny import sft_config


def labelled(batch: dict[str, Tensor], answer: int = 4) -> dict[str, Tensor]:
    """The batch with padding on the right, and with its last tokens as the answer."""
    found = dict(batch)
    order = (1 - batch["attention_mask"]).argsort(dim=1, stable=True)
    for name in ("input_ids", "attention_mask", "modality_ids"):
        found[name] = batch[name].gather(1, order)
    mask = found["attention_mask"]
    at, lengths = torch.arange(mask.shape[1]), mask.sum(1, keepdim=True)
    asked = (at < lengths) & (at >= lengths - answer)
    return {**found, "labels": found["input_ids"].masked_fill(~asked, -100)}


def learn(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    rows = SftObjective()(model, batch).rows
    (rows * torch.linspace(1, 2, len(rows))).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return rows.detach(), grads


def check(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Packed equals padded: the loss of each row, and every gradient."""
    wanted, gradients = learn(model, sft_batch(batch))
    found, others = learn(model, sft_batch(batch, packed=True))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    same(others, gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_media_at_any_length(attention: str) -> None:
    loaded = fresh(attention)
    batch = labelled(batch_of(loaded, [0, 1, 2, 3]))
    assert len(set(batch["attention_mask"].sum(1).tolist())) == 4
    check(loaded.model, batch)
    same_length = labelled(batch_of(loaded, [0, 0, 0]))
    check(loaded.model, same_length)


def test_three_positions_of_a_native_model() -> None:
    tokenizer = train_tokenizer()
    omni = QwenOmniBackbone(tiny_thinker(tokenizer), tokenizer, settings=SETTINGS).eval()
    clips = {one.name: one for one in (clip(1), clip(2, seconds=1.3, size=(64, 40)))}
    samples = [
        sample("<video><audio>", "1.mp4"),
        sample("", "1.mp4"),
        sample("<audio>", "2.mp4", "Listen! {media}Which?"),
        sample("<video>", "2.mp4"),
    ]
    for interleave in (False, True):
        check(omni, labelled(make_batch(omni, clips, samples, interleave=interleave)))


@pytest.mark.parametrize("variant", ["mose", "gate", "hydra"])
def test_experts_choose_the_same(variant: str) -> None:
    loaded: Loaded = tiny(lora={"r": 2, "lora_dropout": 0.0, "experts": {"variant": variant}})
    set_trainable(loaded.model, ["lm", "connectors"])
    shake(loaded.model, 0.1)
    loaded.model.train()
    batch = labelled(batch_of(loaded, [0, 1, 2, 3]))
    wanted, gradients = learn(loaded.model, sft_batch(batch))
    found, others = learn(loaded.model, sft_batch(batch, packed=True))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert others.keys() == gradients.keys()
    for name, value in gradients.items():
        # A pick of experts turns rounding of the gates into more of it.
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=1e-3)


def test_rows_do_not_see_each_other_and_no_padding_is_computed() -> None:
    loaded = fresh()
    lm = unwrap(loaded.model).language_model
    shapes: set[tuple[int, ...]] = set()

    def note(_: nn.Module, args: Any) -> None:
        shapes.add(tuple(args[0].shape[:2]))

    lm.layers[0].register_forward_pre_hook(note)
    batch = labelled(batch_of(loaded, [0, 1, 2, 3]))
    before, _ = learn(loaded.model, sft_batch(batch, packed=True))
    assert shapes == {(1, int(batch["attention_mask"].sum()))}
    batch["input_ids"][2, 0] = 77
    after, _ = learn(loaded.model, sft_batch(batch, packed=True))
    changed = (after - before).abs() > 1e-6
    assert changed.tolist() == [False, False, True, False]


def test_recomputed_activations_know_the_rows() -> None:
    loaded = fresh()
    batch = labelled(batch_of(loaded, [0, 1, 2, 3]))
    loaded.model.train()
    wanted, gradients = learn(loaded.model, sft_batch(batch, packed=True))
    loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    found, others = learn(loaded.model, sft_batch(batch, packed=True))
    torch.testing.assert_close(found, wanted)
    same(others, gradients)


def test_attention_that_cannot_is_refused() -> None:
    loaded = fresh(video=None, audio=None, face=None, fusion=None)
    config: Any = unwrap(loaded.model).language_model.config
    ids = torch.tensor([[60, 61, 62, 63]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    packed = sft_batch({**batch, "modality_ids": torch.zeros_like(ids)}, packed=True)
    config.sliding_window = 3
    with pytest.raises(ConfigError, match="switch packing"):
        SftObjective()(loaded.model, packed)
    config.sliding_window, config._attn_implementation_internal = None, "flash_attention_2"
    with pytest.raises(ConfigError, match="supports no block mask"):
        SftObjective()(loaded.model, packed)


@pytest.mark.parametrize("budget", [1, 120])
def test_a_stage_ends_with_the_same_weights(rows: Path, tmp_path: Path, budget: int) -> None:
    """Whatever the budget, an optimizer step has the same rows."""
    train: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2}
    found: list[dict[str, Tensor]] = []
    lines: list[list[dict[str, Any]]] = []
    for name, packing in (("padded", None), ("packed", {"max_tokens": budget})):
        final = run_sft(sft_config(rows, tmp_path / name, train=train, packing=packing))
        found.append(load_file(final / "model.safetensors"))
        lines.append([line for line in metrics(tmp_path / name) if "loss" in line])
    for one, other in zip(*lines, strict=True):
        assert one["rows_per_step"] == other["rows_per_step"] == 8
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["token_accuracy"] == pytest.approx(other["token_accuracy"], abs=1e-6)
    for name, weight in found[0].items():
        # AdamW's first steps are signs, which rounding turns where a gradient is next to 0.
        assert (weight - found[1][name]).abs().mean() < 1e-4, name


class Counted:
    """Data whose rows are as long as their number."""

    def plan(self, epoch: int) -> list[list[int]]:
        return [list(range(1, 12))]

    def cut(self, rows: Any, shards: int) -> list[list[int]]:
        return [[rows[at] for at in pack] for pack in fill_packs(rows, 15)]

    def collate(self, rows: Any) -> dict[str, Any]:
        return {"rows": list(rows)}


def test_the_packs_of_a_step_do_not_depend_on_the_ranks() -> None:
    data = Counted()
    alone = micro_batches(data, data.plan(0)[0], 2, 0, 1)
    for ranks in (2, 3, 4):
        each = [micro_batches(data, data.plan(0)[0], 1, rank, ranks) for rank in range(ranks)]
        assert len({len(one) for one in each}) == 1
        together = sorted((m for one in each for m in one if not m.padding), key=lambda m: m.index)
        assert [(m.index, m.batch) for m in together] == [(m.index, m.batch) for m in alone]


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), budget=st.integers(1, 200))
def test_packs_hold_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = fill_packs(lengths, budget)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    for pack in packs:
        sizes = [lengths[row] for row in pack]
        assert sum(sizes) <= budget or len(pack) == 1
        assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_the_layout_of_rows(lengths: list[int]) -> None:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packed = pack_rows(mask.long())
    assert sorted(packed.places.tolist()) == mask.flatten().nonzero().flatten().tolist()
    sizes = packed.layout.lengths
    assert list(sizes) == sorted(lengths, reverse=True)
    spans = row_spans(sizes)
    assert sum(tokens for *_, tokens in spans) == sum(lengths)
    assert all(4 * tokens >= 3 * rows * width for rows, width, tokens in spans)
    at = 0
    for rows, width, tokens in spans:
        mine = row_slots(sizes)[at : at + tokens].tolist()
        assert len(set(mine)) == tokens
        assert max(mine) < rows * width
        at += tokens
    allowed = rows_mask(sizes, torch.device("cpu"))[0, 0]
    assert int(allowed.sum()) == sum(n * (n + 1) // 2 for n in sizes)
