"""A pre-fusion branch on native models: nothing changes at the start, then both streams count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList

from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.models.adapters import lora
from mmemo.models.attention.contrast import Contrast, ContrastConfig
from mmemo.models.attention.reallocation import ReallocationConfig, reallocating
from mmemo.models.backbone import AUDIO, FACE, FUSION, TEXT, VIDEO
from mmemo.models.build import Loaded, set_trainable
from mmemo.models.composed.fusion import AttentionFusion
from mmemo.models.qwen import branches
from mmemo.train.sft import SftObjective, sft_batch
from tests.models.parts import shake
from tests.models.qwen.kinds import KINDS
from tests.models.qwen.test_face import (
    FACE_BRANCH,
    again,
    batch_of,
    load,
    release,
    rows,
    untouched_mixed,
)
from tests.models.qwen.test_kinds import ours, untouched

ATTENTION = {"kind": "attention"}
QFORMER = {"kind": "qformer", "queries": 2, "hidden_size": 16, "heads": 2, "positions": 24}
SIDES = {"qwen2_5_omni": "video", "qwen3_omni": "video", "qwen2_audio": "face"}
"""The picture's side of the models that hear. Qwen2-Audio sees faces alone."""


@pytest.fixture(scope="module", params=SIDES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def released(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(name, tmp_path_factory.mktemp(name))


def fused(name: str, folder: Path, fusion: dict[str, Any] = ATTENTION, **changes: Any) -> Loaded:
    face = FACE_BRANCH if SIDES[name] == "face" else None
    return load(name, folder, **{"face": face, "fusion": fusion, **changes})


def moved(loaded: Loaded) -> Loaded:
    """With branches that say something."""
    model: Any = lora.unwrap(loaded.model)
    torch.manual_seed(0)
    nn.init.normal_(model.fusion.fuse.proj.weight)
    return loaded


def both(name: str) -> str:
    return f"<{SIDES[name]}><audio>"


@pytest.mark.parametrize("kind", ["attention", "qformer"])
def test_a_new_branch_changes_no_bit(name: str, released: Path, kind: str) -> None:
    """The released forward on the same tokens, of which the branch's are ordinary text to it."""
    settings = ATTENTION if kind == "attention" else QFORMER
    loaded = fused(name, released, settings)
    model: Any = loaded.model
    tokens = model.backbone.branches["fusion"].tokens
    for media in (*KINDS[name].media, *([both(name)] if SIDES[name] == "face" else [])):
        batch = batch_of(loaded, rows([media] * 3))
        here = all(f"<{side}>" in media for side in (SIDES[name], "audio"))
        assert int((batch["modality_ids"] == FUSION).sum()) == 3 * tokens * here
        shown = media.replace("<face>", "")
        assert torch.equal(ours(model, batch), untouched(KINDS[name], model, batch, shown))


def test_its_tokens_come_first(name: str, released: Path) -> None:
    loaded = fused(name, released, QFORMER, face=FACE_BRANCH)
    media = max(KINDS[name].media, key=len)
    batch = batch_of(loaded, rows([f"{media}<face>"]))
    kinds = [k for k in batch["modality_ids"][0].tolist() if k != TEXT]
    assert kinds[:3] == [FUSION, FUSION, FACE]
    assert set(kinds[5:]) == {VIDEO, AUDIO} & set(kinds)
    tokens = {one.token for one in lora.unwrap(loaded.model).backbone.branches.values()}
    assert len(tokens) == 2


def test_what_it_says_counts_where_both_streams_are(name: str, released: Path) -> None:
    loaded = moved(fused(name, released))
    model: Any = loaded.model
    batch = batch_of(loaded, rows([both(name), "<audio>", ""]))
    lengths = batch["attention_mask"].sum(1).tolist()
    said = ours(model, batch).split(lengths)
    plain = untouched_mixed(model, batch).split(lengths)
    assert not torch.allclose(said[0], plain[0], atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(said[1:], plain[1:], strict=True))
    # By hand, from the features at the language model's width.
    fuse: AttentionFusion = model.fusion.fuse
    place = int((batch["modality_ids"][0] == FUSION).nonzero()[0])
    embeds = model.embed(batch["input_ids"], batch["modality_ids"], batch)[0, place]
    token = model.get_input_embeddings()(batch["input_ids"][0, place])
    means: list[torch.Tensor] = []
    for side, stage in ((SIDES[name], fuse.visual), ("audio", fuse.audio)):
        x = batch[f"{side}_features"][0]
        x = x if x.ndim == 3 else x[:, :64]
        means.append(stage(x[None])[0][batch[f"{side}_features_mask"][0]].mean(0))
    v, a = fuse.visual_proj(means[0]), fuse.audio_proj(means[1])
    weights = fuse.attention(torch.cat([v, a])).softmax(-1)
    wanted = fuse.proj(weights[0] * v + weights[1] * a)
    torch.testing.assert_close(embeds - token, wanted, atol=1e-5, rtol=1e-4)


def test_a_batch_without_it_gives_gradients_all_the_same(name: str, released: Path) -> None:
    """Every rank needs one for each weight."""
    loaded = moved(fused(name, released))
    model: Any = loaded.model
    set_trainable(model, ["fusion"])
    model.logits(batch_of(loaded, rows(["<audio>", ""]))).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.fusion.parameters())


def test_it_is_trained_saved_and_merged(name: str, released: Path, tmp_path: Path) -> None:
    settings = QFORMER if name == "qwen2_5_omni" else ATTENTION
    trained = fused(name, released, settings, lora={"r": 4, "lora_dropout": 0.0})
    names = set_trainable(trained.model, ["lm", "fusion"])
    assert not any("connectors" in one for one in names)
    batch = sft_batch(batch_of(trained, rows([both(name)] * 3, "angry"), left=False))
    chosen = [p for p in trained.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in chosen]
    optimizer, objective, losses = torch.optim.AdamW(chosen, 1e-2), SftObjective(), list[float]()
    for _ in range(3):
        loss = objective(trained.model, batch).rows.sum() / batch["answer_tokens"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    kept = [n for n, p in trained.model.named_parameters() if p.requires_grad]
    still = [n for n, a, b in zip(kept, before, chosen, strict=True) if torch.equal(a, b)]
    assert not [n for n in still if "fusion" in n and "k_proj.bias" not in n]
    asked = batch_of(trained, rows([both(name), "<audio>"]))
    trained.model.eval()
    wanted = ours(lora.unwrap(trained.model), asked)
    lora.save_model(trained.model, trained.processor, tmp_path / "adapter", base=trained.base)
    loaded = again(name, tmp_path / "adapter")
    assert torch.equal(ours(lora.unwrap(loaded.model), asked), wanted)
    # It goes on as it began: the same weights train.
    assert set(set_trainable(loaded.model, ["lm", "fusion"])) == set(kept)
    merged: Any = again(name, tmp_path / "adapter", adapter="merge")
    lora.save_model(merged.model, merged.processor, tmp_path / "whole")
    whole: Any = again(name, tmp_path / "whole").model
    torch.testing.assert_close(ours(whole, asked), wanted, atol=1e-4, rtol=0)
    # A second stage begins with the branch of the first, which is its reference as well.
    second = again(name, tmp_path / "whole", lora={"r": 4, "lora_dropout": 0.0})
    shake(second.model, 0.3)
    with second.model.disable_adapter():  # pyright: ignore[reportCallIssue]
        start = ours(lora.unwrap(second.model), asked)
    torch.testing.assert_close(start, ours(whole, asked), atol=1e-5, rtol=0)
    lora.save_model(second.model, second.processor, tmp_path / "second", base=second.base)
    third = again(name, tmp_path / "second")
    found = ours(lora.unwrap(third.model), asked)
    assert torch.equal(found, ours(lora.unwrap(second.model), asked))


def test_answers_with_experts_contrast_and_reallocation(name: str, released: Path) -> None:
    """With and without a cache; a hidden stream hides what was fused of it."""
    loaded = moved(fused(name, released, lora={"r": 4, "lora_dropout": 0.0, "experts": {}}))
    shake(loaded.model, 0.2)
    model: Any = loaded.model.eval()
    batch = batch_of(loaded, rows([both(name), "<audio>", both(name)]))
    given = {k: x for k, x in batch.items() if isinstance(x, torch.Tensor) and k != "labels"}
    words = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = [model.generate(**given, **words, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*plain)
    token = lora.unwrap(model).backbone.branches["fusion"].token_id
    assert token in model.generation_config.suppress_tokens
    contrast = ContrastConfig(remove=[["audio"]], alpha=1.0)
    seen = model.generate(
        **given, **words, logits_processor=LogitsProcessorList([Contrast(model, given, contrast)])
    )
    assert seen.shape == plain[0].shape
    sides = ReallocationConfig(
        sides=(["audio"], ["fusion"]), layers=[0, 1, 2], threshold=1.0, head_gate=0.0, share=0.9
    )
    with reallocating(model, sides), torch.no_grad():
        changed = model(**given, use_cache=True).logits[:, -1]
    with torch.no_grad():
        unchanged = model(**given, use_cache=True).logits[:, -1]
    apart = (changed - unchanged).abs().amax(-1)
    assert apart[1] < 1e-4 < apart[[0, 2]].max()
    # Hiding the sound hides the fusion: whatever it says, the contrasted prompt is the same.
    made = [Contrast(model, given, contrast)._without(0, given["input_ids"]) for _ in range(2)]
    nn.init.normal_(lora.unwrap(model).fusion.modules_to_save["default"].fuse.proj.weight)
    made.append(Contrast(model, given, contrast)._without(0, given["input_ids"]))
    torch.testing.assert_close(made[0], made[2], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = release("qwen2_5_omni", tmp_path / "omni")
    loaded = fused("qwen2_5_omni", folder)
    model: Any = loaded.model
    batch = batch_of(loaded, rows(["<video><audio>"] * 2))
    gone = batch["audio_features_mask"].clone()
    gone[1] = False
    with pytest.raises(DataError, match="row 1 has fusion tokens but no clip with video and audio"):
        model.backbone.branches["fusion"].add(
            model.get_input_embeddings()(batch["input_ids"]),
            batch["modality_ids"],
            {**batch, "audio_features_mask": gone},
        )
    lora.save_model(model, loaded.processor, tmp_path / "whole")
    with pytest.raises(ConfigError, match="has a fusion branch already"):
        fused("qwen2_5_omni", tmp_path / "whole", native=None, sampling=None)
    adapted = load("qwen2_5_omni", folder, face=None, lora={"r": 2, "lora_dropout": 0.0})
    lora.save_model(adapted.model, adapted.processor, tmp_path / "adapter", base=folder)
    with pytest.raises(ConfigError, match="begins with or without a fusion branch"):
        again("qwen2_5_omni", tmp_path / "adapter", fusion=ATTENTION)
    one = release("qwen2_5_omni", tmp_path / "one", spare=["<|box_start|>"])
    with pytest.raises(ConfigError, match=r"fusion: the tokenizer has none of .* left"):
        load("qwen2_5_omni", one, fusion=ATTENTION)
    seen = release("qwen2_vl", tmp_path / "vl")
    with pytest.raises(ConfigError, match="fusion joins video and audio, but Qwen2-VL has video"):
        load("qwen2_vl", seen, face=None, fusion=ATTENTION)
    file = tmp_path / "whole/mmemo_native.json"
    file.write_text(file.read_text().replace('"fusion"', '"motion"'))
    with pytest.raises(CheckpointError, match="a branch 'motion', which this mmemo does not know"):
        again("qwen2_5_omni", tmp_path / "whole")


def test_branches_are_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = release("qwen2_5_omni", tmp_path / "omni")
    loaded = moved(load("qwen2_5_omni", folder, fusion=ATTENTION))
    whole: Any = loaded.model
    lora.save_model(whole, loaded.processor, tmp_path / "whole")
    asked: list[str] = []

    def cached(repository: str, file: str) -> str:
        assert repository == "Maker/Model"
        asked.append(file)
        return str(tmp_path / "whole" / file)

    monkeypatch.setattr(branches, "cached_file", cached)
    model: Any = load("qwen2_5_omni", folder, face=None).model
    for name in ("face", "fusion"):
        branches.load_branch(model, "Maker/Model", name, weights=True)
    assert len(asked) == 4 + 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert model.modalities == whole.modalities
