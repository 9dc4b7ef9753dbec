"""Batches: each clip once, masks where there is padding, nothing truncated."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmemo.data.collate import (
    IGNORE_INDEX,
    NO_CLIP,
    Collator,
    check_lengths,
    measure_lengths,
    pad_features,
)
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.errors import DataError

PAD = 9


@dataclass
class FakeRendered:
    input_ids: list[int]
    labels: list[int]
    modality_ids: list[int]
    text: str


class FakeProcessor:
    """One token per character; a placeholder is three tokens of modality 1."""

    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)

    def render(
        self, turns: Sequence[Turn], *, generation: bool, modalities: Container[Modality]
    ) -> FakeRendered:
        prompt = "".join(turn.text for turn in turns if turn.role == "user")
        media = 3 * prompt.count("<video>")
        text = prompt.replace("<video>", "")
        answer = "" if generation else turns[-1].text
        ids = [1] * media + [2] * len(text) + [3] * len(answer)
        labels = [IGNORE_INDEX] * (media + len(text)) + [3] * len(answer)
        return FakeRendered(ids, labels, [1] * media + [0] * len(text + answer), prompt + answer)


class FakeSource:
    """Features that say which clip they are of; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, torch.Tensor]]:
        self.asked.append(sample.sample_id)
        found: dict[Modality, Mapping[str, torch.Tensor]] = {}
        for modality, ref in sample.media.items():
            number = int(ref.path)
            x = torch.full((number, 4), number, dtype=torch.bfloat16)
            if modality == "audio":
                x = torch.full((2, number, 4), number, dtype=torch.float32)
            found[modality] = {"x": x, "grid": torch.tensor([number, 1])}
        return found


def sample(name: str, answer: str = "yes", **paths: str) -> Sample:
    media: dict[Any, MediaRef] = {modality: MediaRef(path) for modality, path in paths.items()}
    mark = "<video>" if "video" in paths else ""
    return Sample(name, (Turn("user", mark + name), Turn("assistant", answer)), media)


def test_each_clip_stands_once_and_rows_point_at_it() -> None:
    source = FakeSource()
    rows = [
        sample("a", video="2"),
        sample("text"),
        sample("b", video="3", audio="3"),
        sample("c", video="2"),
        sample("d", audio="4"),
    ]
    batch = Collator(FakeProcessor(), source)(rows)
    assert source.asked == ["a", "b", "d"]
    assert batch["clip_index"].tolist() == [0, NO_CLIP, 1, 0, 2]
    assert batch["sample_ids"] == ["a", "text", "b", "c", "d"]
    video, mask = batch["video_features"], batch["video_features_mask"]
    assert video.shape == (3, 3, 4)
    assert video.dtype == torch.bfloat16
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert video[0, :, 0].tolist() == [2, 2, 0]
    assert batch["video_grid"].tolist() == [[2, 1], [3, 1], [0, 0]]
    audio = batch["audio_features"]  # a layer mix
    assert audio.shape == (3, 2, 4, 4)
    assert batch["audio_features_mask"].sum(1).tolist() == [0, 3, 4]
    assert audio[1, 1, :, 0].tolist() == [3, 3, 3, 0]
    assert "face_features" not in batch


def test_rows_with_different_streams_of_a_file_are_different_clips() -> None:
    batch = Collator(FakeProcessor(), FakeSource())(
        [sample("a", video="2", audio="2"), sample("b", video="2")]
    )
    assert batch["clip_index"].tolist() == [0, 1]
    assert batch["audio_features_mask"].sum(1).tolist() == [2, 0]


@pytest.mark.parametrize("generation", [False, True])
def test_padding_side_and_labels(generation: bool) -> None:
    rows = [sample("abcd", video="1"), sample("a", answer="y")]
    batch = Collator(FakeProcessor(), FakeSource())(rows, generation=generation)
    if generation:
        assert batch["input_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2], [PAD] * 6 + [2]]
        assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 6 + [1]]
        assert set(batch["labels"].flatten().tolist()) == {IGNORE_INDEX}
    else:
        assert batch["input_ids"].tolist() == [[1] * 3 + [2] * 4 + [3] * 3, [2, 3] + [PAD] * 8]
        assert batch["attention_mask"].tolist() == [[1] * 10, [1] * 2 + [0] * 8]
        assert batch["labels"][1].tolist() == [IGNORE_INDEX, 3] + [IGNORE_INDEX] * 8
    assert batch["modality_ids"].shape == batch["input_ids"].shape
    assert batch["modality_ids"][0].sum() == 3


def test_text_only_batches_have_no_features() -> None:
    batch = Collator(FakeProcessor(), FakeSource())([sample("a"), sample("b")])
    assert batch["clip_index"].tolist() == [NO_CLIP, NO_CLIP]
    assert not [name for name in batch if "features" in name]


def test_nothing_is_truncated() -> None:
    rows = [sample("a"), sample("abcdefgh", video="1")]
    lengths = measure_lengths(rows, FakeProcessor())
    assert lengths == [4, 14]
    Collator(FakeProcessor(), FakeSource(), max_length=14)(rows)
    with pytest.raises(DataError, match=r"row 'abcdefgh' has 14 tokens but at most 13 fit"):
        Collator(FakeProcessor(), FakeSource(), max_length=13)(rows)
    check_lengths(rows, lengths, 14)
    with pytest.raises(DataError, match="1 of 2 rows do not fit"):
        check_lengths(rows, lengths, 13)


def test_training_needs_answers() -> None:
    prompt_only = Sample("a", (Turn("user", "q"),), {}, source=("rows.jsonl", 3))
    with pytest.raises(DataError, match=r"rows.jsonl:3: the row has no answer"):
        Collator(FakeProcessor(), FakeSource())([prompt_only])
    assert Collator(FakeProcessor(), FakeSource())([prompt_only], generation=True)


@pytest.mark.parametrize("generation", [False, True])
def test_a_row_that_cannot_be_rendered_is_named(generation: bool) -> None:
    class Refusing(FakeProcessor):
        def render(self, *_: Any, **__: Any) -> FakeRendered:
            raise DataError("the text holds the reserved token '<|video|>'; remove it")

    row = replace(sample("a"), source=("rows.jsonl", 3))
    with pytest.raises(DataError, match=r"^rows.jsonl:3: row 'a': the text holds") as caught:
        Collator(Refusing(), FakeSource())([row], generation=generation)
    assert (caught.value.file, caught.value.line) == ("rows.jsonl", 3)


def test_a_tokenizer_without_padding_is_refused() -> None:
    processor = FakeProcessor()
    processor.tokenizer = SimpleNamespace(pad_token_id=None)
    with pytest.raises(DataError, match="pad token"):
        Collator(processor, FakeSource())([sample("a")])


def test_features_are_padded_over_time_and_of_one_kind() -> None:
    short, long = torch.ones(2, 3), torch.full((4, 3), 2.0)
    features, mask = pad_features([short, None, long])
    assert features.shape == (3, 4, 3)
    assert features[0, 2:].abs().sum() == 0
    assert mask.tolist() == [[True, True, False, False], [False] * 4, [True] * 4]
    with pytest.raises(DataError, match="different encoders"):
        pad_features([short, torch.ones(2, 5)])
    with pytest.raises(ValueError, match="at least one clip"):
        pad_features([None])
