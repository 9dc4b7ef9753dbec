"""A face branch on every native model: nothing changes at the start, and then the face counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.models.adapters import lora
from mmemo.models.backbone import FACE, Features
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.qwen.branch import SPARE, home
from mmemo.train.sft import SftObjective, sft_batch
from tests.models.parts import IMAGES, VIT
from tests.models.qwen.kinds import KINDS, train_tokenizer
from tests.models.qwen.test_kinds import CLIPS, ours, untouched

TOKENS = 3
FACE_BRANCH = {"encoder_config": VIT, "preprocessor": IMAGES, "tokens": TOKENS, "layer": "mix"}


def with_face(seed: int, one: DecodedClip) -> DecodedClip:
    rng = np.random.default_rng(seed)
    crops = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    track = FaceTrack(crops, np.ones(4, np.bool_), np.ones(4, np.float32), "none")
    return replace(one, faces=track)


SHOWN = tuple(with_face(place, one) for place, one in enumerate(CLIPS))


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def release(name: str, folder: Path, spare: Sequence[str] = SPARE[1:3]) -> Path:
    """As the makers release it; their tokenizers have tokens that no text uses."""
    kind = KINDS[name]
    tokenizer = train_tokenizer({**kind.names, **{token: token for token in spare}})
    kind.make(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(name, tmp_path_factory.mktemp(name))


def load(name: str, folder: Path, **changes: Any) -> Loaded:
    values = {"path": str(folder), "native": KINDS[name].settings, "sampling": {"frames": 6}}
    found = {**values, "face": FACE_BRANCH, **changes}
    return load_model(parse(ModelConfig, {k: v for k, v in found.items() if v is not None}))


def again(name: str, folder: Path, **changes: Any) -> Loaded:
    return load(name, folder, native=None, sampling=None, face=None, **changes)


@pytest.fixture(scope="module")
def fresh(name: str, released: Path) -> Loaded:
    return load(name, released)


class Seen:
    def __init__(self, model: Any) -> None:
        self.features: dict[str, dict[Modality, Features]] = {
            one.name: {m: model.encode(m, [one])[0] for m in model.modalities} for one in SHOWN
        }

    def get(self, sample: Sample) -> Mapping[Modality, Features]:
        return {m: self.features[ref.path][m] for m, ref in sample.media.items()}


def rows(media: Sequence[str], answer: str | None = None) -> list[Sample]:
    """One row for each clip, with these placeholders."""
    made: list[Sample] = []
    for place, (one, placeholders) in enumerate(zip(SHOWN, media, strict=False)):
        refs: Any = {
            m: MediaRef(one.name) for m in ("video", "audio", "face") if f"<{m}>" in placeholders
        }
        turns = [Turn("user", "Look. " * place + placeholders + "Which emotion?")]
        turns += [] if answer is None else [Turn("assistant", answer)]
        made.append(Sample(f"{place}", tuple(turns), refs))
    return made


def batch_of(loaded: Loaded, samples: Sequence[Sample], *, left: bool = True) -> dict[str, Any]:
    source: Any = Seen(lora.unwrap(loaded.model))
    return Collator(loaded.processor, source)(samples, generation=left)


def moved(loaded: Loaded) -> Loaded:
    """With a connector that says something."""
    last: Any = lora.unwrap(loaded.model).connectors.face.proj[-1]
    torch.manual_seed(0)
    nn.init.normal_(last.weight)
    return loaded


def test_a_new_branch_changes_no_bit(name: str, fresh: Loaded) -> None:
    """The released forward on the same tokens, of which the face's are ordinary text to it."""
    kind, model = KINDS[name], fresh.model
    for media in kind.media:
        for count in (1, 3):
            samples = rows([f"{media}<face>"] * count)
            batch = batch_of(fresh, samples)
            assert int((batch["modality_ids"] == FACE).sum()) == TOKENS * count
            assert torch.equal(ours(model, batch), untouched(kind, model, batch, media))


def test_the_face_stands_before_video_and_sound(name: str, fresh: Loaded) -> None:
    media = max(KINDS[name].media, key=len)
    batch = batch_of(fresh, rows([f"{media}<face>"]))
    kinds = batch["modality_ids"][0].tolist()
    assert kinds.index(FACE) < min(kinds.index(k) for k in set(kinds) - {0, FACE})
    first = batch_of(fresh, rows([f"<face>{media}"]))
    assert torch.equal(batch["input_ids"], first["input_ids"])


def test_what_the_connector_says_counts_where_there_is_a_face(name: str, released: Path) -> None:
    loaded = moved(load(name, released))
    kind, model = KINDS[name], loaded.model
    media = max(kind.media, key=len)
    batch = batch_of(loaded, rows([f"{media}<face>", media, ""]))
    lengths = batch["attention_mask"].sum(1).tolist()
    said, plain = (x.split(lengths) for x in (ours(model, batch), untouched_mixed(model, batch)))
    assert not torch.allclose(said[0], plain[0], atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(said[1:], plain[1:], strict=True))
    # One clip's face is another's answer.
    other = {**batch, "face_features": torch.randn_like(batch["face_features"])}
    assert not torch.allclose(ours(model, other).split(lengths)[0], said[0], atol=1e-3)


def untouched_mixed(model: Any, batch: dict[str, Any]) -> Tensor:
    """The same batch without what the connector says."""
    backbone = model.backbone
    branches, backbone.branches = backbone.branches, {}
    try:
        return ours(model, batch)
    finally:
        backbone.branches = branches


def test_words_are_the_same_with_and_without_a_cache(name: str, released: Path) -> None:
    loaded = moved(load(name, released))
    model: Any = loaded.model
    media = max(KINDS[name].media, key=len)
    batch = batch_of(loaded, rows([f"<face>{media}", "<face>", media]))
    given = {k: x for k, x in batch.items() if isinstance(x, Tensor) and k != "labels"}
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    found = [model.generate(**given, **words, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*found)
    suppressed = model.generation_config.suppress_tokens
    assert model.backbone.face.token_id in suppressed


def test_it_is_trained_saved_and_merged(name: str, released: Path, tmp_path: Path) -> None:
    """LoRA and connector learn, the encoder does not; adapter, merged model and other programs."""
    kind = KINDS[name]
    trained = load(name, released, lora={"r": 4, "lora_dropout": 0.0})
    names = set_trainable(trained.model, ["lm", "connectors"])
    assert any("connectors" in one for one in names)
    adapted = [one for one, _ in trained.model.named_parameters() if "lora_" in one]
    assert adapted
    assert all(".language_model." in one for one in adapted)
    batch = sft_batch(batch_of(trained, rows(["<face>"] * 3, "angry"), left=False))
    chosen = [p for p in trained.model.parameters() if p.requires_grad]
    optimizer, objective = torch.optim.AdamW(chosen, 1e-2), SftObjective()
    for _ in range(3):
        loss = objective(trained.model, batch).rows.sum() / batch["answer_tokens"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inner = lora.unwrap(trained.model)
    assert not any(p.requires_grad for p in inner.face_tower.parameters())
    trained.model.eval()
    asked = batch_of(trained, rows([f"<face>{max(kind.media, key=len)}", "<face>"]))
    with torch.no_grad():
        wanted = inner.logits(asked)
    lora.save_model(trained.model, trained.processor, tmp_path / "adapter", base=trained.base)
    kept = again(name, tmp_path / "adapter")
    merged = again(name, tmp_path / "adapter", adapter="merge")
    assert torch.equal(lora.unwrap(kept.model).logits(asked), wanted)
    torch.testing.assert_close(lora.unwrap(merged.model).logits(asked), wanted, atol=1e-4, rtol=0)
    lora.save_model(merged.model, merged.processor, tmp_path / "whole")
    whole = again(name, tmp_path / "whole")
    assert torch.equal(whole.model.logits(asked), merged.model.logits(asked))
    _, info = kind.model.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Features of the saved encoder are found in the store under the same name.
    assert whole.model.feature_fingerprint("face") == inner.feature_fingerprint("face")


def test_what_does_not_fit_is_refused(
    name: str, released: Path, fresh: Loaded, tmp_path: Path
) -> None:
    if name != "qwen2_5_omni":
        pytest.skip("the same code for all kinds")
    model: Any = fresh.model
    batch = batch_of(fresh, rows(["<face>"] * 2))
    with pytest.raises(DataError, match="row 1 has face tokens but no clip with face"):
        model.logits({**batch, "clip_index": torch.tensor([0, -1])})
    short = batch["modality_ids"].clone()
    short[1][(short[1] == FACE).nonzero()[0]] = 0
    with pytest.raises(DataError, match="row 1 has 2 face tokens but the branch makes 3"):
        model.logits({**batch, "modality_ids": short})
    lora.save_model(model, fresh.processor, tmp_path / "whole")
    with pytest.raises(ConfigError, match="has a face branch already"):
        load(name, tmp_path / "whole", native=None, sampling=None)
    (tmp_path / "whole" / home("face") / "connectors.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"mmemo_face.*the branch cannot be loaded"):
        again(name, tmp_path / "whole")
    bare = KINDS[name].save(tmp_path / "bare")
    with pytest.raises(ConfigError, match="the tokenizer has none of"):
        load(name, bare)
