"""Contrast is with the prompt that never had the modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models.attention.contrast import Contrast, ContrastConfig
from mmemo.models.attention.reallocation import ReallocationConfig, reallocating
from mmemo.models.backbone import AUDIO, FACE, FUSION, VIDEO
from mmemo.models.build import Loaded, set_trainable
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import shake, tiny

EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def without(batch: dict[str, Tensor], kinds: list[int]) -> dict[str, Tensor]:
    """A prompt of one row with the tokens taken out."""
    left = ~torch.isin(batch["modality_ids"], torch.tensor(kinds))[0]
    names = ("input_ids", "attention_mask", "modality_ids")
    return {**batch, **{name: batch[name][:, left] for name in names}}


def by_hand(loaded: Loaded, batch: dict[str, Tensor], groups: list[list[int]], alpha: float) -> Any:
    """Greedy tokens of one row from whole forwards, without caches or masks."""
    model: Any = loaded.model
    never = model.generation_config.suppress_tokens
    said: list[int] = []
    while len(said) < 6:
        logits: list[Tensor] = []
        for kinds in ([], *groups):
            one = without(batch, kinds)
            extra = torch.tensor([said], dtype=torch.long)
            ids = torch.cat([one["input_ids"], extra], 1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "modality_ids": None}
            logits.append(model(**{**one, **more}).logits[0, -1])
        whole, *rest = logits
        pushed = whole + alpha * torch.stack([whole - one for one in rest]).mean(0)
        pushed[whole.softmax(-1) < 0.1 * whole.softmax(-1).amax()] = -torch.inf
        pushed[never] = -torch.inf
        said.append(int(pushed.argmax()))
    return said


def answers(
    model: Any, batch: dict[str, Tensor], made: ContrastConfig | None, **more: Any
) -> Tensor:
    found = LogitsProcessorList([] if made is None else [Contrast(model, batch, made)])
    with torch.no_grad():
        words = model.generate(
            **batch, logits_processor=found, eos_token_id=None, pad_token_id=0, **GREEDY, **more
        )
    return words[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    ("remove", "groups"),
    [
        ([["audio"]], [[AUDIO, FUSION]]),
        ([["audio"], ["video", "face"]], [[AUDIO, FUSION], [VIDEO, FACE, FUSION]]),
    ],
)
def test_it_says_what_the_definition_says(
    loaded: Loaded, remove: list[list[str]], groups: list[list[int]]
) -> None:
    model: Any = loaded.model
    made = parse(ContrastConfig, {"remove": remove, "alpha": 2.0})
    batch = batch_of(loaded, [0])
    with torch.no_grad():
        wanted = by_hand(loaded, batch, groups, 2.0)
    found = answers(model, batch, made)
    assert found[0].tolist() == wanted
    assert found.tolist() != answers(model, batch, None).tolist()
    together = answers(model, batch_of(loaded, [1, 0, 3, 2]), made)  # padded on the left
    assert together[1].tolist() == wanted


def test_experts_choose_by_what_is_left() -> None:
    chosen = tiny(lora={"r": 4, "lora_dropout": 0.0, "experts": {}})
    set_trainable(chosen.model, ["lm", "connectors", "fusion"])
    shake(chosen.model)
    chosen.model.eval()
    batch = batch_of(chosen, [0])
    inner = Loaded(chosen.model, chosen.processor)
    with torch.no_grad():
        wanted = by_hand(inner, batch, [[AUDIO, FUSION]], 2.0)
    made = parse(ContrastConfig, {"remove": [["audio"]], "alpha": 2.0})
    assert answers(chosen.model, batch, made)[0].tolist() == wanted


def test_rows_without_the_modality_are_left_alone(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1, 2, 3])
    made = Contrast(model, batch, ContrastConfig(remove=[["audio"]], cutoff=0.5))
    scores = torch.randn(4, model.config.text_config.vocab_size)
    with torch.no_grad():
        found = made(batch["input_ids"], scores)
    same = [bool(torch.equal(a, b)) for a, b in zip(found, scores, strict=True)]
    assert same == [False, False, True, True]


def test_only_what_a_row_has_counts(loaded: Loaded) -> None:
    """A prompt with one stream is pushed by the contrast with that alone, at its full strength."""
    model: Any = loaded.model
    scores = torch.randn(4, model.config.text_config.vocab_size)
    found: list[Tensor] = []
    for remove in ([["audio"], ["video", "face"]], [["video", "face"]], [["audio"]]):
        batch = batch_of(loaded, [0, 1, 2, 3])
        made = Contrast(model, batch, parse(ContrastConfig, {"remove": remove, "cutoff": 0.0}))
        with torch.no_grad():
            found.append(made(batch["input_ids"], scores))
    both, picture, sound = found
    assert torch.equal(picture[1], scores[1])  # it has no picture
    assert (sound[1] - scores[1]).abs().max() > 1e-3
    torch.testing.assert_close(both[1], sound[1], atol=1e-5, rtol=1e-5)
    mean = (picture[0] + sound[0]) / 2
    torch.testing.assert_close(both[0], mean, atol=1e-5, rtol=1e-5)
    nobody = batch_of(loaded, [2, 3])
    none = Contrast(model, nobody, ContrastConfig(remove=[["audio"]]))
    with torch.no_grad():
        assert torch.equal(none(nobody["input_ids"], scores[2:]), scores[2:])


def test_cutoff_and_entropy(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    scores = torch.zeros(2, model.config.text_config.vocab_size)
    scores[0, 7], scores[1, 5:7] = 30.0, 3.0  # one row is sure
    with torch.no_grad():
        made = Contrast(model, batch, ContrastConfig(min_entropy=0.5))
        found = made(batch["input_ids"], scores)
        bare = Contrast(model, batch, ContrastConfig(cutoff=0.0))(batch["input_ids"], scores)
    assert torch.equal(found[0], scores[0])
    assert found[1].isfinite().nonzero().flatten().tolist() == [5, 6]
    torch.testing.assert_close(found[1, 5:7], bare[1, 5:7])
    assert bool(bare.isfinite().all())


def test_tokens_that_are_never_said_stay_so(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0])
    scores = torch.zeros(1, model.config.text_config.vocab_size)
    scores[0, 3] = -torch.inf
    found = Contrast(model, batch, ContrastConfig())(batch["input_ids"], scores)
    assert not bool(found.isnan().any())
    assert bool(found[0, 3].isneginf())


def test_with_reallocation(loaded: Loaded) -> None:
    """Both prompts know their own modalities; the one with a side hidden does not change."""
    model: Any = loaded.model
    batch = batch_of(loaded, [0])
    change = ReallocationConfig(layers=[0, 1], head_gate=0.0, threshold=1.0, share=0.9)
    with reallocating(model, change, record=True) as switch:
        both = answers(model, batch, ContrastConfig(remove=[["audio"]], alpha=2.0))
    whole, less = switch.take()
    assert whole.before.shape == less.before.shape
    assert bool((whole.before != whole.after).any())
    assert torch.equal(less.before, less.after)
    assert float(less.before[..., [AUDIO, FUSION]].amax()) == 0.0
    assert both.shape == (1, 6)


def test_what_is_refused(loaded: Loaded) -> None:
    model: Any = loaded.model
    batch = batch_of(loaded, [0, 1])
    with pytest.raises(ConfigError, match="num_beams"):
        answers(model, batch, ContrastConfig(), num_beams=2)
    with pytest.raises(ConfigError, match="modality_ids"):
        Contrast(model, {**batch, "modality_ids": None}, ContrastConfig())  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="greater than 0"):
        parse(ContrastConfig, {"alpha": 0})
