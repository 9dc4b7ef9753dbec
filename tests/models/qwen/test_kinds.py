"""Every native backbone says from stored features what the untouched model says from media."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import Sample, Turn
from mmemo.media.clip import DecodedClip
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.models.qwen.kinds import KINDS, Kind, one_clip_at_a_time
from tests.models.qwen.test_omni import Rows, clip, sample

ASK = "{media}Which emotion?"
CLIPS = (clip(1), clip(2, seconds=1.3, frames=4, size=(64, 40)), clip(3, seconds=2.2, frames=5))


class Seen(Rows):
    """Features of the streams that the model takes."""

    def __init__(self, backbone: Any, clips: Mapping[str, DecodedClip]) -> None:
        self.features = {
            name: {m: backbone.encode(m, [one])[0] for m in backbone.modalities}
            for name, one in clips.items()
        }


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(name: str, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(name, KINDS[name].save(tmp_path_factory.mktemp(name)))


def load(name: str, folder: Path, **changes: Any) -> Loaded:
    values = {"path": str(folder), "native": KINDS[name].settings, "sampling": {"frames": 6}}
    return load_model(parse(ModelConfig, values | changes))


def rows(media: str, count: int, answer: str | None = None) -> list[Sample]:
    """Rows of different lengths about different clips."""
    made = [
        sample(media, one.name, "Look. " * place + ASK) for place, one in enumerate(CLIPS[:count])
    ]
    if answer is None:
        return made
    return [replace(one, turns=(*one.turns, Turn("assistant", answer))) for one in made]


def batch_of(loaded: Loaded, samples: Sequence[Sample], *, left: bool = True) -> dict[str, Any]:
    source = Seen(loaded.model, {one.name: one for one in CLIPS})
    return Collator(loaded.processor, source)(samples, generation=left)


def in_dtype(loaded: Loaded, dtype: torch.dtype) -> Loaded:
    if dtype is torch.float32:
        return loaded
    model = copy.deepcopy(loaded.model).to(dtype)
    return replace(loaded, model=model)


def untouched(kind: Kind, model: Any, batch: Mapping[str, Any], media: str, **more: Any) -> Tensor:
    """The released forward, from pixels and mel windows."""
    count = len(batch["input_ids"])
    given = kind.released(model.backbone, CLIPS[:count], media, batch["input_ids"])
    given |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = "rope_parameters" not in kind.parts["text_config"]
    if plain or not media:
        # Without M-RoPE transformers numbers padding too, except in its own generate.
        mask = batch["attention_mask"]
        places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        given["position_ids"] = places if plain else places.expand(3, -1, -1)
    released = kind.model
    with torch.no_grad(), one_clip_at_a_time(model):
        found = released.forward(model, **given, **more).logits
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # which it leaves behind
    return found[batch["attention_mask"].bool()]


def ours(model: Any, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.logits(batch)[batch["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_the_untouched_forward(name: str, loaded: Loaded, dtype: torch.dtype) -> None:
    """Media x rows x padding x dtype: not one bit apart."""
    kind, cast = KINDS[name], in_dtype(loaded, dtype)
    for media in kind.media:
        for count, left in ((1, True), (3, True), (3, False)):
            batch = batch_of(cast, rows(media, count, None if left else "angry"), left=left)
            assert bool(batch["attention_mask"].all()) == (count == 1)
            found = ours(cast.model, batch)
            assert found.isfinite().all()
            assert found.float().abs().max() > 0.5
            assert torch.equal(found, untouched(kind, cast.model, batch, media)), (media, count)
