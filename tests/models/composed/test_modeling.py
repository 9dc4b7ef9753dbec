from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from mmemo.errors import ConfigError, DataError
from mmemo.models import MmemoConfig, MmemoForConditionalGeneration, MmemoModel
from mmemo.models.backbone import Backbone
from mmemo.models.build import Loaded, set_trainable
from tests.models.parts import clip, features, shake, tiny

EXACT = {"atol": 1e-5, "rtol": 0}
TEXTS = [
    "<video><audio><face>Which emotion does the person show?",
    "How loud is the <audio> voice?",
    "Which?",
    "<face> angry <video> or happy",
]


def given(loaded: Loaded, seconds: tuple[float, ...] = (0.6, 1.1, 0.5, 0.9)) -> list[Any]:
    """Features for :data:`TEXTS`: clips of different lengths, missing streams, no media."""
    whole = [features(loaded, clip(seed, length)) for seed, length in enumerate(seconds)]
    return [
        whole[0],
        {"audio": whole[1]["audio"]},
        {},
        {"face": whole[3]["face"], "video": whole[3]["video"]},
    ]


def batch_of(loaded: Loaded, rows: list[int], **values: Any) -> dict[str, Tensor]:
    found = given(loaded)
    return dict(loaded.processor([TEXTS[i] for i in rows], [found[i] for i in rows], **values))


def last(loaded: Loaded, batch: dict[str, Tensor]) -> Tensor:
    model: Any = loaded.model
    return model(**batch).logits[:, -1]


def test_it_is_a_backbone(loaded: Loaded) -> None:
    backbone: Backbone = loaded.model  # type: ignore[assignment]
    assert backbone.modalities == ("video", "audio", "face")
    assert backbone.sampling.frames == 4
    batch = batch_of(loaded, [0, 1])
    connected = backbone.connect(batch)
    assert {name: tuple(x.shape[1:]) for name, x in connected.items()} == {
        "video": (2, 32),
        "audio": (3, 32),
        "face": (1, 32),
        "fusion": (1, 32),
    }
    embeds = backbone.embed(batch["input_ids"], batch["modality_ids"], batch)
    where = batch["modality_ids"][0] == 2
    torch.testing.assert_close(embeds[0, where], connected["audio"][0])
    positions = backbone.positions(batch["input_ids"], batch["attention_mask"], batch)
    hidden: Any = backbone.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=batch["attention_mask"]
    )
    torch.testing.assert_close(
        backbone.lm_head(hidden.last_hidden_state),
        backbone.logits({**batch, "sample_ids": ["a", "b"], "labels": batch["input_ids"]}),
    )


def test_rows_do_not_see_each_other(loaded: Loaded) -> None:
    together = last(loaded, batch_of(loaded, [0, 1, 2, 3]))
    for row in range(4):
        alone = last(loaded, batch_of(loaded, [row]))
        torch.testing.assert_close(together[row : row + 1], alone, **EXACT)


def test_padding_side_does_not_matter(loaded: Loaded) -> None:
    model: Any = loaded.model
    left = batch_of(loaded, [0, 1])
    right = batch_of(loaded, [0, 1], padding_side="right")
    one, two = model(**left).logits, model(**right).logits
    for row in range(2):
        torch.testing.assert_close(
            one[row][left["attention_mask"][row].bool()],
            two[row][right["attention_mask"][row].bool()],
            **EXACT,
        )


def test_a_shared_clip_equals_a_duplicated_one(loaded: Loaded) -> None:
    model: Any = loaded.model
    found = given(loaded)
    texts = [TEXTS[0], TEXTS[1], "<video><audio><face>Is the voice quiet?"]
    doubled = dict(loaded.processor(texts, [found[0], found[1], found[0]]))
    shared = {**doubled, "clip_index": torch.tensor([1, 0, 1])}
    order = torch.tensor([1, 0])
    for name in [n for n in doubled if "features" in n]:
        shared[name] = doubled[name][order]
    torch.testing.assert_close(model(**shared).logits, model(**doubled).logits, **EXACT)


def test_a_row_without_media_may_point_anywhere(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0, 2])
    for index in (-1, 0, 99):
        moved = {**batch, "clip_index": torch.tensor([0, index])}
        assert torch.equal(last(loaded, moved), last(loaded, batch))


def test_features_reach_the_logits(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0])
    before = last(loaded, batch)
    for name in ("video", "audio", "face"):
        changed = {**batch, f"{name}_features": batch[f"{name}_features"].flip(-1)}
        assert (last(loaded, changed) - before).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"audio_features": None, "audio_features_mask": None}, "no features"),
        ({"clip_index": torch.tensor([5])}, "outside"),
        ({"clip_index": torch.tensor([-1])}, "outside"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    loaded: Loaded, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        last(loaded, {**batch_of(loaded, [0]), **change})


def test_cut_placeholders_are_refused(loaded: Loaded) -> None:
    batch = batch_of(loaded, [1])
    ids = batch["input_ids"].clone()
    ids[batch["modality_ids"] == 2] = ids[0, 0]
    ids[0, 3] = batch["input_ids"][batch["modality_ids"] == 2][0]
    with pytest.raises(DataError, match="has 1 audio placeholder tokens but the audio branch"):
        last(loaded, {**batch, "input_ids": ids})


def test_unequal_rows_and_clips_need_an_index(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0, 1])
    del batch["clip_index"]
    last(loaded, batch)
    short = {name: x[:1] if "features" in name else x for name, x in batch.items()}
    with pytest.raises(DataError, match="clip_index"):
        last(loaded, short)


def test_a_placeholder_for_an_empty_stream_is_refused(loaded: Loaded) -> None:
    """The batch has the modality, this row's clip does not: nothing is made up for it."""
    model: Any = loaded.model
    batch = batch_of(loaded, [1, 0])
    for name in ("video", "audio", "face"):
        mask = batch[f"{name}_features_mask"].clone()
        mask[1] = False
        with pytest.raises(DataError, match=f"row 1 has {name} placeholders but its clip has no"):
            last(loaded, {**batch, f"{name}_features_mask": mask})
    for name in ("video", "audio"):
        features = {key: x for key, x in batch.items() if "features" in key}
        features[f"{name}_features_mask"] = torch.zeros_like(features[f"{name}_features_mask"])
        ids = torch.full((2, 1), model.config.fusion_token_id)
        with pytest.raises(DataError, match=f"row 0 has fusion .* no {name}"):
            model.embed(ids, torch.full_like(ids, 4), {**features, "clip_index": torch.ones(2)})
    del features["audio_features"]
    with pytest.raises(DataError, match="pass audio_features"):
        model.embed(ids, torch.full_like(ids, 4), {**features, "clip_index": torch.ones(2)})


def test_branches_that_are_not_asked_cannot_spoil_half_precision(loaded: Loaded) -> None:
    """What a connector makes of a clip that no row reads may be beyond float16."""
    fresh = tiny(dtype="float16")
    model: Any = fresh.model
    torch.nn.init.constant_(model.model.connectors.audio.proj[-1].bias, 1e4)
    batch = batch_of(loaded, [2, 1])
    embeds = model.embed(batch["input_ids"][:1], batch["modality_ids"][:1], batch)
    assert embeds.dtype == torch.float16
    assert torch.isfinite(embeds).all()


def test_loss_is_the_mean_over_labels(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    out = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected)


def test_logits_to_keep(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    whole = model(**batch).logits
    assert torch.equal(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    some = torch.tensor([1, 4])
    torch.testing.assert_close(model(**batch, logits_to_keep=some).logits, whole[:, some])


def test_cached_decoding_equals_the_full_forward(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 3])
    extra = torch.randint(50, 300, (3, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    full = model(
        **{
            **batch,
            "input_ids": torch.cat([batch["input_ids"], extra], 1),
            "attention_mask": mask,
            "modality_ids": None,
        }
    ).logits
    length = batch["input_ids"].shape[1]
    out = model(**batch, use_cache=True)
    torch.testing.assert_close(out.logits, full[:, :length], **EXACT)
    for step in range(4):
        out = model(
            input_ids=extra[:, step : step + 1],
            attention_mask=mask[:, : length + step + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        torch.testing.assert_close(out.logits[:, 0], full[:, length + step], **EXACT)


def generate(loaded: Loaded, batch: dict[str, Tensor], **values: Any) -> Tensor:
    model: Any = loaded.model
    values = {"max_new_tokens": 8, "do_sample": False, **values}
    return model.generate(**batch, **values)[:, batch["input_ids"].shape[1] :]


def test_generate_with_and_without_cache(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0, 1, 2, 3])
    assert torch.equal(generate(loaded, batch), generate(loaded, batch, use_cache=False))


def test_batched_generate_equals_single(loaded: Loaded) -> None:
    together = generate(loaded, batch_of(loaded, [0, 1, 2, 3]))
    for row in range(4):
        alone = generate(loaded, batch_of(loaded, [row]))[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_several_answers_per_prompt(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0, 1])
    torch.manual_seed(0)
    sampled = generate(loaded, batch, do_sample=True, num_return_sequences=3, top_k=0)
    assert sampled.shape[0] == 6
    # The same rows written out by hand draw the same tokens from the same logits.
    spread = {n: x.repeat_interleave(3, 0) for n, x in batch.items() if "features" not in n}
    spread |= {name: x for name, x in batch.items() if "features" in name}
    torch.manual_seed(0)
    assert torch.equal(generate(loaded, spread, do_sample=True, top_k=0), sampled)
    del batch["clip_index"]
    torch.manual_seed(0)
    again = generate(loaded, batch, do_sample=True, num_return_sequences=3, top_k=0)
    assert torch.equal(again, sampled)


def test_beams(loaded: Loaded) -> None:
    batch = batch_of(loaded, [0, 1, 3])
    values: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    cached = generate(loaded, batch, **values)
    assert torch.equal(cached, generate(loaded, batch, use_cache=False, **values))
    alone = generate(loaded, batch_of(loaded, [1]), **values)
    assert torch.equal(cached[2:4, : alone.shape[1]], alone)


def test_features_go_in_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = loaded.model
    seen: list[set[str]] = []
    forward = MmemoModel.forward

    def spy(self: MmemoModel, **kwargs: Any) -> Any:
        seen.append({name for name, x in kwargs.items() if x is not None})
        return forward(self, **kwargs)

    monkeypatch.setattr(MmemoModel, "forward", spy)
    generate(loaded, batch_of(loaded, [0]), max_new_tokens=3, min_new_tokens=3)
    assert "audio_features" in seen[0]
    assert len(seen) == 3
    assert not any("features" in name or "clip" in name for step in seen[1:] for name in step)
    assert model.generation_config.suppress_tokens == sorted(model.config.token_ids.values())


def test_a_typing_error_in_generate_is_caught(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="audio_feature"):
        generate(loaded, {**batch_of(loaded, [0]), "audio_feature": torch.ones(1)})


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(loaded: Loaded) -> None:
    fresh = tiny()
    shake(fresh.model)
    model: Any = fresh.model
    batch = batch_of(loaded, [0, 1])
    labels = {**batch, "labels": batch["input_ids"]}
    set_trainable(model, ["lm", "connectors", "fusion"])
    model.train()
    plain = gradients(model, labels)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    saved = gradients(model, labels)
    assert plain.keys() == saved.keys()
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name])
    assert any("connectors.audio" in name for name in plain)
    assert any("fusion" in name for name in plain)
    assert not any("tower" in name for name in plain)


@pytest.mark.parametrize("rows", [[0], [1], [2], [3]])
def test_every_rank_touches_every_trainable_weight(loaded: Loaded, rows: list[int]) -> None:
    """Ranks whose rows lack a modality must still run its connector, to a gradient of zero."""
    fresh = tiny()
    names = set(set_trainable(fresh.model, ["lm", "connectors", "fusion"]))
    batch = batch_of(loaded, rows)
    for give_all in (True, False):
        kept = batch if give_all else {n: x for n, x in batch.items() if x.any() or "ids" in n}
        found = gradients(fresh.model, {**kept, "labels": batch["input_ids"]})
        assert names == set(found)
        if rows == [2]:
            assert all(g.abs().sum() == 0 for n, g in found.items() if "connectors" in n)


def test_towers_stay_in_eval_mode_and_frozen(loaded: Loaded) -> None:
    model: Any = tiny().model
    model.train()
    assert model.model.language_model.training
    for name in ("video", "audio", "face"):
        assert not any(module.training for module in model.encoder(name).modules())
        assert not any(p.requires_grad for p in model.encoder(name).parameters())


def test_the_way_trl_calls_it(loaded: Loaded) -> None:
    """TRL's trainers run ``base_model``, then the head's weight, and patch ``forward``."""
    from trl.trainer.utils import add_fused_lm_head

    fresh = tiny()
    shake(fresh.model)
    model: Any = fresh.model.eval()  # type: ignore[union-attr]
    batch = batch_of(loaded, [0, 1])
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    out = model(**batch, labels=labels)
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state
    assert hidden.shape[:2] == batch["input_ids"].shape
    head = model.get_output_embeddings()
    torch.testing.assert_close(hidden @ head.weight.T, out.logits)
    assert model.config.get_text_config().pad_token_id == fresh.processor.tokenizer.pad_token_id
    add_fused_lm_head(model)
    fused = model(**batch, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, out.loss)
    picked = out.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    kept = labels[:, 1:] != -100
    torch.testing.assert_close(fused.log_probs[kept], picked[kept])
    model.generate(**batch, max_new_tokens=2)


def test_trl_loads_a_saved_model(loaded: Loaded, tmp_path: Path) -> None:
    from trl.trainer.utils import create_model_from_path

    model: Any = loaded.model
    model.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    again: Any = create_model_from_path(str(tmp_path))
    assert isinstance(again, MmemoForConditionalGeneration)
    batch = batch_of(loaded, [0, 1])
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


def test_embeddings_in_place_of_ids(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    embeds = model.embed(batch["input_ids"], batch["modality_ids"], batch)
    out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(out.logits, model(**batch).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(attention_mask=batch["attention_mask"])


@pytest.mark.parametrize("values", [{}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_generate_from_embeddings(loaded: Loaded, values: dict[str, Any]) -> None:
    """A prompt that was embedded once is not embedded again: the words are the same."""
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    given = {
        "inputs_embeds": model.embed(batch["input_ids"], batch["modality_ids"], batch),
        "attention_mask": batch["attention_mask"],
        "modality_ids": batch["modality_ids"],
    }
    sample = "num_return_sequences" in values
    asked = {"max_new_tokens": 6, "do_sample": sample, "top_k": 0, **values}
    torch.manual_seed(0)
    words = model.generate(**given, **asked)
    torch.manual_seed(0)
    assert torch.equal(words, generate(loaded, batch, **asked))


def test_tuples_when_asked(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0])
    out = model(**batch, labels=batch["input_ids"], use_cache=False)
    loss, logits = model(**batch, labels=batch["input_ids"], use_cache=False, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    (hidden,) = model.base_model(**batch, use_cache=False, return_dict=False)
    assert torch.equal(model.lm_head(hidden), out.logits)


def test_a_block_mask_and_positions_pass_through(loaded: Loaded) -> None:
    """Two continuations packed behind one prompt equal two rows."""
    model: Any = loaded.model
    batch = batch_of(loaded, [0])
    prompt = batch["input_ids"].shape[1]
    parts = torch.tensor([[60, 61, 62], [70, 71, 72]])
    packed = torch.cat([batch["input_ids"], parts.reshape(1, -1)], 1)
    length = packed.shape[1]
    block = torch.tril(torch.ones(length, length, dtype=torch.bool))
    block[prompt + 3 :, prompt : prompt + 3] = False
    steps = torch.arange(prompt, prompt + 3)
    positions = torch.cat([torch.arange(prompt), steps, steps]).unsqueeze(0)
    values = {n: x for n, x in batch.items() if "features" in n or n == "clip_index"}
    logits = model(
        **values, input_ids=packed, position_ids=positions, attention_mask=block[None, None]
    ).logits[0]
    for part in range(2):
        row = torch.cat([batch["input_ids"], parts[part : part + 1]], 1)
        alone = model(**values, input_ids=row).logits[0, prompt:]
        start = prompt + 3 * part
        torch.testing.assert_close(logits[start : start + 3], alone, **EXACT)


@pytest.mark.parametrize(
    "fusion",
    [{"kind": "attention"}, {"kind": "qformer", "queries": 2, "hidden_size": 16, "heads": 2}, None],
)
def test_round_trip(tmp_path: Path, fusion: dict[str, Any] | None) -> None:
    found = tiny(fusion=fusion)
    shake(found.model)
    model: Any = found.model
    batch = batch_of(found, [0, 1])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert "model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    for auto in (
        MmemoForConditionalGeneration,
        AutoModelForMultimodalLM,
        AutoModelForImageTextToText,
        AutoModelForCausalLM,
    ):
        again: Any = auto.from_pretrained(tmp_path).eval()
        assert isinstance(again, MmemoForConditionalGeneration)
        assert torch.equal(again(**batch).logits, expected)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MmemoConfig)
    assert config.to_dict()["branches"] == model.config.to_dict()["branches"]
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, MmemoModel)
    assert torch.equal(
        base.eval()(**batch).last_hidden_state, model.base_model(**batch).last_hidden_state
    )


def test_fresh_weights_from_a_config_alone(loaded: Loaded) -> None:
    """``from_config`` gives every raw parameter a value (the meta device leaves garbage)."""
    torch.manual_seed(0)
    found = tiny(fusion={"kind": "qformer", "hidden_size": 16, "heads": 2})
    config: Any = found.model.config
    model: Any = AutoModelForMultimodalLM.from_config(config)
    assert model.model.fusion.fuse.queries.std().item() == pytest.approx(0.02, rel=0.5)
    assert model.model.connectors.audio.entrance.mix.scores.abs().sum() == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_encoders_are_found_by_their_usual_names(loaded: Loaded) -> None:
    model: Any = loaded.model
    assert model.get_encoder(modality="audio") is model.encoder("audio")
    assert model.get_encoder(modality="video") is model.encoder("video")
    with pytest.raises(ConfigError, match="no face branch"):
        tiny(face=None).model.encoder("face")  # type: ignore[operator, union-attr]


def test_half_precision_keeps_connectors_whole(loaded: Loaded, tmp_path: Path) -> None:
    model: Any = loaded.model
    model.save_pretrained(tmp_path)
    half: Any = MmemoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.connectors.audio.proj[0].weight.dtype == torch.float32
    assert half.lm_head.weight.dtype == torch.bfloat16
    logits = half(**batch_of(loaded, [0, 1])).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
