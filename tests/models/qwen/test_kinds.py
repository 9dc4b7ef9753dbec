"""Every native backbone says from stored features what the untouched model says from media."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.adapters import lora
from mmemo.models.adapters.lora import unwrap
from mmemo.models.backbone import prompt_positions
from mmemo.models.build import Loaded, set_trainable
from mmemo.train.sft import SftObjective, sft_batch
from tests.generation.test_logprobs import check, continuations
from tests.generation.test_rollout import PLAIN, SEEDS, frequent_stops, same
from tests.models.qwen.kinds import (
    ASK,
    CLIPS,
    DTYPES,
    KINDS,
    batch_of,
    differences,
    load,
    one_clip_at_a_time,
    ours,
    released_inputs,
    rows,
    untouched,
)
from tests.models.qwen.test_omni import clip, sample


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def released(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[name].save(tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def loaded(name: str, released: Path) -> Loaded:
    return load(name, released)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_untouched_forward(name: str, loaded: Loaded, dtype: torch.dtype) -> None:
    """Media x rows x padding x dtype: not one bit apart. What was done wrong would show."""
    cases = list(differences(name, loaded, dtype))
    assert {one.difference for one in cases} == {0.0}, cases
    assert min(least for one in cases for least in one.controls) > 0.02
    assert len(cases) == 3 * len(KINDS[name].media)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni"], scope="module", indirect=True)
@pytest.mark.parametrize("seconds", [(1.3, 0.7, 2.2), (7.9, 1.3, 3.1)])
def test_sound_inside_the_video_is_the_untouched_forward(
    name: str, released: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...]
) -> None:
    kind, media = KINDS[name], "<video><audio>"
    settings = {**kind.settings, "audio_in_video": True}
    loaded = load(name, released, native=settings)
    clips = tuple(clip(7 + number, seconds=one) for number, one in enumerate(seconds))
    monkeypatch.setattr("tests.models.qwen.kinds.CLIPS", clips)
    batch = batch_of(loaded, rows(media, 3))
    ids, config = batch["input_ids"][0].tolist(), loaded.model.config
    inside = ids[ids.index(config.audio_start_token_id) : ids.index(config.audio_end_token_id)]
    assert {config.video_token_id, config.audio_token_id} <= set(inside)
    assert torch.equal(ours(loaded.model, batch), untouched(kind, loaded.model, batch, media))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"], scope="module", indirect=True)
def test_stills_are_the_untouched_forward(name: str, released: Path) -> None:
    """Each frame an image of its own."""
    kind = KINDS[name]
    loaded = load(name, released, native={**kind.settings, "stills": True})
    model: Any = loaded.model
    batch = batch_of(loaded, rows("<video>", 3))
    given = released_inputs(kind, model, batch, "<video>")
    given["pixel_values"] = given.pop("pixel_values_videos")
    grids = given.pop("video_grid_thw").tolist()
    stills = [(1, height, width) for count, height, width in grids for _ in range(count)]
    given["image_grid_thw"] = torch.tensor(stills)
    given["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        found = kind.model.forward(model.double(), **given).logits
        model.model.rope_deltas = None
        batch = batch_of(loaded, rows("<video>", 3))
        # The released encoder batches all images of a call, which rounds differently.
        torch.testing.assert_close(
            model.logits(batch)[batch["attention_mask"].bool()],
            found[batch["attention_mask"].bool()],
            atol=1e-9,
            rtol=0,
        )


def test_its_words_are_those_of_the_untouched_generate(
    name: str, loaded: Loaded, released: Path
) -> None:
    kind, model = KINDS[name], cast(Any, loaded.model)
    plain: Any = kind.model.from_pretrained(released).eval()
    media = max(kind.media, key=len)
    batch = batch_of(loaded, rows(media, 3))
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    words["suppress_tokens"] = model.generation_config.suppress_tokens
    given = {k: x for k, x in batch.items() if isinstance(x, Tensor) and k != "labels"}
    with torch.no_grad(), one_clip_at_a_time(plain):
        theirs = plain.generate(**released_inputs(kind, model, batch, media), **words)
        for cache in (True, False):
            assert torch.equal(model.generate(**given, **words, use_cache=cache), theirs)
    assert theirs.shape[1] > batch["input_ids"].shape[1]


def test_a_lora_step_and_what_it_saves(name: str, released: Path, tmp_path: Path) -> None:
    """A step of SFT lowers the loss and moves the adapter alone, which plain PEFT then reads."""
    kind = KINDS[name]
    trained = load(name, released, lora={"r": 4, "lora_dropout": 0.0})
    set_trainable(trained.model, ["lm"])
    media = kind.media[0]
    batch = sft_batch(batch_of(trained, rows(media, 3, "angry"), left=False))
    objective = SftObjective()
    optimizer = torch.optim.AdamW([p for p in trained.model.parameters() if p.requires_grad], 1e-2)
    losses: list[float] = []
    for _ in range(3):
        loss = objective(trained.model, batch).rows.sum() / batch["answer_tokens"]
        loss.backward()
        losses.append(loss.item())
        moved = {n for n, p in trained.model.named_parameters() if p.grad is not None}
        assert all(".language_model." in n and "lora_" in n for n in moved)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    trained.model.eval()
    lora.save_model(trained.model, trained.processor, tmp_path / "adapter", base=trained.base)
    once = load(name, tmp_path / "adapter", native=None, sampling=None, adapter="merge")
    lora.save_model(once.model, once.processor, tmp_path / "merged")
    model = unwrap(trained.model)
    asked = batch_of(trained, rows(media, 3))
    wanted = ours(model, asked)
    assert (wanted - ours(load(name, released).model, asked)).abs().max() > 0.1
    adapted: Any = PeftModel.from_pretrained(
        kind.model.from_pretrained(released), tmp_path / "adapter"
    )
    bases = (adapted.get_base_model(), kind.model.from_pretrained(tmp_path / "merged"))
    for plain, close in zip(bases, (0.0, 1e-3), strict=True):
        found = untouched(kind, model, asked, media, plain.eval())
        torch.testing.assert_close(found, wanted, atol=close, rtol=0)


MIXED = ((0, 0), (1, -1), (2, 0), (0, 1))
"""Clip and media of each row; two rows share a clip."""


def mixed(name: str, loaded: Loaded, count: int = 4) -> dict[str, Any]:
    media = KINDS[name].media
    samples = [
        sample(media[kind], CLIPS[place].name, "Look. " * place + ASK) for place, kind in MIXED
    ]
    return batch_of(loaded, samples[:count])


def shaken(name: str, released: Path, **changes: Any) -> Loaded:
    loaded = load(name, released, lora={"r": 4, "lora_dropout": 0.0, **changes})
    set_trainable(loaded.model, ["lm"])
    torch.manual_seed(5)
    for weight_name, weight in loaded.model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.1)
    loaded.model.eval()
    return loaded


def test_sharing_prompts_and_drawing_fast_change_no_number(name: str, released: Path) -> None:
    """What DPO and GRPO score, and what GRPO draws."""
    loaded = shaken(name, released)
    batch = mixed(name, loaded)
    check(loaded.model, batch, continuations())
    prompts, found = mixed(name, loaded, 3), []
    for off in ({}, PLAIN):
        values = {"num_generations": 4, "max_completion_length": 8, **off}
        engine = HFRollouts(
            loaded.processor.tokenizer, unwrap(loaded.model), parse(RolloutConfig, values)
        )
        found.append(frequent_stops(engine).generate(loaded.model, prompts, SEEDS))
    same(*found)


class Reads(TorchFunctionMode):
    """Counts what would wait for a GPU: values that Python or the CPU asks of a tensor."""

    WAITS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.WAITS
        return func(*args, **(kwargs or {}))


def reads(what: Any) -> int:
    with torch.no_grad(), Reads() as counted:
        what()
    return counted.count


def test_positions_come_with_the_batch_and_cost_no_read(name: str, loaded: Loaded) -> None:
    """The collator's are those that the model counts itself, in any padding."""
    model: Any = loaded.model
    for left in (True, False):
        kind = KINDS[name].media[0]
        batch = batch_of(loaded, rows(kind, 3, None if left else "sad"), left=left)
        assert ("mrope_positions" in batch) == model.backbone.mrope
        bare = {key: x for key, x in batch.items() if key != "mrope_positions"}
        real = batch["attention_mask"].bool()
        assert torch.equal(
            prompt_positions(model, batch)[..., real], prompt_positions(model, bare)[..., real]
        )
    assert reads(lambda: prompt_positions(model, batch)) == 0
    if model.backbone.mrope:
        assert reads(lambda: prompt_positions(model, bare)) >= 3 * 8
        names = ("input_ids", "attention_mask")
        grown = {**batch, **{n: torch.cat([batch[n], batch[n].clamp(max=1)], 1) for n in names}}
        bare = {key: x for key, x in grown.items() if key != "mrope_positions"}
        assert torch.equal(prompt_positions(model, grown), prompt_positions(model, bare))
    # One check and one selection for each modality, however many rows there are.
    ids, kinds = batch["input_ids"], batch["modality_ids"]
    assert reads(lambda: model.embed(ids, kinds, batch)) <= 2 * len(model.modalities)


def test_experts_are_adapted_by_target_parameters(tmp_path: Path) -> None:
    """The stacked weights of a mixture of experts, beside attention; plain PEFT reads them."""
    name, kind = "qwen3_omni", KINDS["qwen3_omni"]
    released = kind.save(tmp_path / "released")
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    section = {"r": 2, "lora_dropout": 0.0}
    loaded = shaken(name, released, **experts)
    adapted = {n for n, _ in loaded.model.named_parameters() if "lora_B" in n}
    assert any("self_attn" in n for n in adapted)
    assert sum("mlp.experts" in n for n in adapted) == 2 * 3
    check(loaded.model, mixed(name, loaded), continuations())
    lora.save_model(loaded.model, loaded.processor, tmp_path / "adapter", base=loaded.base)
    plain: Any = kind.model.from_pretrained(released)
    again: Any = PeftModel.from_pretrained(plain, tmp_path / "adapter").get_base_model()
    batch = batch_of(loaded, rows("<video><audio>", 3))
    model = unwrap(loaded.model)
    wanted = ours(model, batch)
    assert torch.equal(untouched(kind, model, batch, "<video><audio>", again.eval()), wanted)
    once = load(name, tmp_path / "adapter", native=None, sampling=None, adapter="merge")
    torch.testing.assert_close(ours(once.model, batch), wanted, atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"target_parameters"):
        load(name, tmp_path / "adapter", native=None, sampling=None, lora={**section, "r": 4})
    for wrong, says in (
        (
            {"target_parameters": ["gate_up"]},
            r"use some of experts.down_proj, experts.gate_up_proj",
        ),
        ({"target_parameters": ["conv1.weight"]}, "no weights of experts"),
        ({**experts, "use_dora": True}, "neither use_dora nor experts"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(name, released, lora={**section, **wrong})
