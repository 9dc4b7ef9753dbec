"""Questions about one clip share their beginning, and are answered as if each were alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.generation import questions
from mmemo.generation.questions import answer_greedily, can_share, common_beginnings
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded
from tests.models.parts import clip, features, shake, tiny
from tests.models.qwen import test_omni as omni

STOPS = list(range(60, 90))
ASKED = (
    ("a", "Which emotion does the person show?"),
    ("b", "How loud is the voice?"),
    ("a", "How loud is the voice? quiet calm neutral"),
    ("a", "Which emotion does the person show? Which emotion?"),
    ("", "How loud? quiet calm neutral sad"),
    ("b", "The lip corners rise. Which emotion?"),
    ("c", "Which?"),
)
"""The clip, if any, and the question."""


class Source:
    """Features of clips that are noise."""

    def __init__(self, loaded: Loaded) -> None:
        self._found: dict[str, Any] = {
            name: features(loaded, clip(seed)) for seed, name in enumerate("abc")
        }

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, Tensor]]:
        found = self._found[next(iter(sample.media.values())).path]
        return {kind: found[kind] for kind in sample.media}


def composed(**changes: Any) -> tuple[nn.Module, Collator]:
    loaded = tiny(**changes)
    shake(loaded.model, 0.3)
    loaded.model.eval()
    return loaded.model, Collator(loaded.processor, Source(loaded))


def row(path: str, text: str, index: int) -> Sample:
    shown = ("video", "audio", "face") if path else ()
    media: Any = {kind: MediaRef(path) for kind in shown}
    tags = "".join(f"<{kind}>" for kind in shown)
    return Sample(f"{index}", (Turn("user", tags + text),), media)


ROWS = [row(path, text, index) for index, (path, text) in enumerate(ASKED)]


def shared(
    model: nn.Module, batch: Any, longest: int = 20, stops: Sequence[int] = STOPS
) -> list[list[int]]:
    assert can_share(model)
    return answer_greedily(model, batch, stops=stops, max_new_tokens=longest)


def generated(
    model: Any, batch: Any, longest: int = 20, stops: Sequence[int] = STOPS
) -> list[list[int]]:
    """What ``generate`` says to each row, up to its end."""
    known = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    with torch.no_grad():
        said = model.generate(
            **known,
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=list(stops),
            pad_token_id=0,
        )[:, batch["input_ids"].shape[1] :].tolist()
    return [
        ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids)) + 1]
        for ids in said
    ]


@pytest.mark.parametrize("lora", [None, {"r": 4}, {"r": 4, "use_dora": True}])
def test_answers_are_those_of_generate(lora: dict[str, Any] | None) -> None:
    """With LoRA the modules decode, without it a fused copy does."""
    model, collate = composed(lora=lora)
    batch = collate(ROWS, generation=True)
    endless = generated(model, batch, stops=[366])
    # The newest token of some answers, so that each of them ends at another step.
    stops = [max(ids, key=lambda token, ids=ids: ids.index(token)) for ids in endless[:3]]
    wanted = generated(model, batch, stops=stops)
    assert len({len(ids) for ids in wanted}) > 1
    assert len({tuple(ids) for ids in endless}) > 3
    assert shared(model, batch, stops=stops) == wanted


def test_answers_depend_on_no_other_question() -> None:
    """Any batch size and any order gives the same answers."""
    model, collate = composed(lora={"r": 4})
    whole = shared(model, collate(ROWS, generation=True))
    for order, sizes in ((range(7), (1, 2)), ([3, 6, 1, 0, 5, 4, 2], (3, 5, 7))):
        for size in sizes:
            for start in range(0, len(ROWS), size):
                rows = list(order)[start : start + size]
                batch = collate([ROWS[at] for at in rows], generation=True)
                assert shared(model, batch) == [whole[at] for at in rows]


@pytest.mark.parametrize("poll", [1, 3, 100])
def test_polls_change_nothing(poll: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, collate = composed()
    batch = collate(ROWS, generation=True)
    wanted = shared(model, batch)
    monkeypatch.setattr(questions, "poll_of", lambda _: poll)
    assert shared(model, batch) == wanted


def test_mrope_prompts_share_their_beginning() -> None:
    tokenizer = omni.train_tokenizer()
    torch.manual_seed(0)
    backbone = omni.QwenOmniBackbone(
        omni.tiny_thinker(tokenizer), tokenizer, settings=omni.SETTINGS
    ).eval()
    clips = {"a": omni.clip(1), "b": omni.clip(2, seconds=1.3, size=(64, 40))}
    rows = [
        omni.sample("<video><audio>", "a", "{media} What do you see?"),
        omni.sample("<audio>", "b", "{media} What do you hear?"),
        omni.sample("<video><audio>", "a", "{media} What do you hear in this clip?"),
        omni.sample("<video>", "a", "{media} What do you see?"),
        omni.sample("", "b", "What is it?"),
    ]
    batch = omni.make_batch(backbone, clips, rows)
    section = parse(
        RolloutConfig, {"max_completion_length": 20, "top_k": 1, "merge_adapter": False}
    )
    engine = HFRollouts(tokenizer, backbone, section)
    engine.stops = STOPS
    drawn = engine.generate(backbone, batch, range(len(rows)))
    wanted = [ids[keep].tolist() for ids, keep in zip(drawn.ids, drawn.mask.bool(), strict=True)]
    assert len({tuple(ids) for ids in wanted}) > 2
    assert shared(backbone, batch) == wanted


def test_a_beginning_is_common_to_all_and_never_a_whole_prompt() -> None:
    prompts = [[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 4, 5], [7, 8], [7, 8], [5]]
    assert common_beginnings(prompts, ["a", "a", "a", "b", "b", "c"]) == [2, 2, 2, 1, 1, 0]
    assert common_beginnings(prompts[::2], ["a", "b", "b"]) == [3, 0, 0]


def test_a_beginning_is_computed_once() -> None:
    model, collate = composed()
    lm: Any = unwrap(model).language_model
    lengths: list[int] = []
    lm.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = collate([ROWS[0], ROWS[2], ROWS[3]], generation=True)
    sizes = batch["attention_mask"].sum(1).tolist()
    shared(model, batch, 1)
    begun = int(batch["modality_ids"].ne(0).sum(1).max())
    assert lengths[0] <= sum(sizes) - 2 * begun


def test_what_cannot_share_is_left_to_generate() -> None:
    model, _ = composed()
    assert can_share(model)
    config: Any = unwrap(model).generation_config
    config.suppress_tokens = [*(config.suppress_tokens or []), 99]
    assert can_share(model)
    config.min_new_tokens = 3
    assert not can_share(model)
    experts, _ = composed(lora={"r": 4, "experts": {}})
    assert not can_share(experts)
