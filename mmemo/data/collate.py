"""Samples to one batch of tensors.

B rows, L tokens of the longest row, N distinct clips, T feature steps of the longest clip, D the
tower's width, ``layers`` of a learned layer mix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmemo.data.sample import MODALITIES, Modality, Sample, Turn
from mmemo.errors import DataError

IGNORE_INDEX = -100
"""The label of tokens that are read and not trained on: prompt, media, padding."""
NO_CLIP = -1
"""``clip_index`` of a row without media."""


Streams = Mapping[Modality, Mapping[str, Tensor] | None]
"""The streams of a row, and the features of each as far as they are there."""


class Rendered(Protocol):
    """A prompt as the model sees it; the three lists have one entry for each token."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...
    @property
    def modality_ids(self) -> list[int]: ...
    @property
    def text(self) -> str: ...


class Renderer(Protocol):
    """The part of a processor that batches need."""

    @property
    def tokenizer(self) -> Any: ...

    def render(self, turns: Sequence[Turn], *, generation: bool, modalities: Streams) -> Rendered:
        """``modalities`` are the row's streams. In a batch each comes with its features, as models
        need them whose tokens follow the clip's size and length; before it is encoded, with None,
        which such models refuse by a ``DataError``."""
        ...


def sized_by_clip(processor: Renderer) -> bool:
    """Whether a row has as many media tokens as its clip's features ask for."""
    return bool(getattr(processor, "sized_by_clip", False))


class Source(Protocol):
    """Where a sample's features come from."""

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, Tensor]]: ...


Outline = Callable[[Sample], Mapping[Modality, Mapping[str, Tensor]]]
"""A sample's features, as far as their sizes go."""


class Collator:
    """Batches of rendered rows and the features of their clips, each clip once.

    Nothing is ever truncated: a row over ``max_length`` tokens is an error.
    """

    def __init__(self, processor: Renderer, source: Source, max_length: int | None = None) -> None:
        self.processor, self.source, self.max_length = processor, source, max_length

    def __call__(self, samples: Sequence[Sample], *, generation: bool = False) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``, ``modality_ids`` (B, L); ``clip_index``
        (B,), -1 for a row without media; ``{modality}_features`` (N, T, D) or (N, layers, T, D)
        and ``{modality}_features_mask`` (N, T) bool for each modality of any clip, all False for
        a clip that lacks it; ``{modality}_{name}`` (N, ...) for the towers' further tensors;
        ``sample_ids``.

        Rows are padded on the right for training and on the left for generation. ``labels`` are
        -100 outside the answer.

        Raises:
            DataError: a row is too long, or has no answer to train on.
        """
        clip_index, clips = self._clips(samples)
        return self.assemble(samples, clip_index, clips, generation=generation)

    def assemble(
        self,
        samples: Sequence[Sample],
        clip_index: Sequence[int],
        clips: Sequence[Mapping[Modality, Mapping[str, Tensor]]],
        *,
        generation: bool,
    ) -> dict[str, Any]:
        """As calling it, with features that are at hand: row i sees ``clips[clip_index[i]]``."""
        rows = [
            render(
                self.processor,
                sample,
                generation=generation,
                clip=clips[index] if index >= 0 else None,
            )
            for sample, index in zip(samples, clip_index, strict=True)
        ]
        for sample, row in zip(samples, rows, strict=True):
            check_length(sample, len(row.input_ids), self.max_length)
        batch: dict[str, Any] = self._tokens(rows, left=generation)
        batch["clip_index"] = torch.tensor(list(clip_index), dtype=torch.long)
        for modality in MODALITIES:
            batch.update(_stack(modality, [clip.get(modality) for clip in clips]))
        batch["sample_ids"] = [sample.sample_id for sample in samples]
        return batch

    def _tokens(self, rows: Sequence[Rendered], *, left: bool) -> dict[str, Tensor]:
        pad = self.processor.tokenizer.pad_token_id
        if pad is None:
            raise DataError("the tokenizer has no pad token; set tokenizer.pad_token")
        lists = {
            "input_ids": ([row.input_ids for row in rows], pad),
            "attention_mask": ([[1] * len(row.input_ids) for row in rows], 0),
            "labels": ([row.labels for row in rows], IGNORE_INDEX),
            "modality_ids": ([row.modality_ids for row in rows], 0),
        }
        return {name: _pad(values, fill, left=left) for name, (values, fill) in lists.items()}

    def _clips(
        self, samples: Sequence[Sample]
    ) -> tuple[list[int], list[Mapping[Modality, Mapping[str, Tensor]]]]:
        # Rows share a clip only if all their streams are the same: the fusion branch sees every
        # stream of the clip it is given.
        places: dict[object, int] = {}
        clips: list[Mapping[Modality, Mapping[str, Tensor]]] = []
        index: list[int] = []
        for sample in samples:
            if not sample.media:
                index.append(NO_CLIP)
                continue
            key = frozenset(sample.media.items())
            if key not in places:
                places[key] = len(clips)
                clips.append(self.source.get(sample))
            index.append(places[key])
        return index, clips


def render(
    processor: Renderer,
    sample: Sample,
    *,
    generation: bool,
    clip: Mapping[Modality, Mapping[str, Tensor]] | None = None,
) -> Rendered:
    """The sample's prompt (generation) or its prompt and answer (training) as tokens. ``clip`` are
    the sample's features, where they are at hand."""
    file, line = sample.source
    if not generation and sample.answer is None:
        raise DataError("the row has no answer to train on", file=file, line=line)
    turns = sample.prompt if generation else sample.turns
    streams: Streams = {name: clip.get(name) if clip else None for name in sample.media}
    try:
        return processor.render(turns, generation=generation, modalities=streams)
    except DataError as error:
        if error.file or not file:
            raise
        raise DataError(f"row '{sample.sample_id}': {error}", file=file, line=line) from error


def measure_lengths(
    samples: Sequence[Sample],
    processor: Renderer,
    *,
    generation: bool = False,
    outline: Outline | None = None,
) -> list[int]:
    """Tokens of each rendered row, media tokens included. ``outline`` is for models whose media
    tokens are as many as the clip's features ask for; it need give no values of ``x``."""
    lengths: list[int] = []
    for sample in samples:
        clip = outline(sample) if outline is not None and sample.media else None
        lengths.append(len(render(processor, sample, generation=generation, clip=clip).input_ids))
    return lengths


def check_length(sample: Sample, length: int, max_length: int | None) -> None:
    """Raises:
    DataError: the row has more than ``max_length`` tokens.
    """
    if max_length is not None and length > max_length:
        file, line = sample.source
        raise DataError(
            f"row '{sample.sample_id}' has {length} tokens but at most {max_length} fit; nothing "
            "is truncated, so shorten the text, use fewer media tokens, or raise data.max_length "
            "as far as the model goes",
            file=file,
            line=line,
        )


def check_lengths(
    samples: Sequence[Sample], lengths: Sequence[int], max_length: int | None
) -> None:
    """Raises:
    DataError: naming the longest row that does not fit, and how many do not.
    """
    if max_length is None or not lengths or max(lengths) <= max_length:
        return
    over = sum(length > max_length for length in lengths)
    worst = max(range(len(lengths)), key=lengths.__getitem__)
    try:
        check_length(samples[worst], lengths[worst], max_length)
    except DataError as error:
        raise DataError(f"{over} of {len(lengths)} rows do not fit; the longest: {error}") from None


def _pad(rows: Sequence[list[int]], fill: int, *, left: bool) -> Tensor:
    width = max(len(row) for row in rows)
    padded = [
        [fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long)


def pad_features(clips: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Pad the features of N clips over time, each ([layers,] T, D) or None for a clip without.

    Returns:
        Features (N, [layers,] T, D), zero where there are none, and their mask (N, T) bool.

    Raises:
        ValueError: no clip has features.
        DataError: two clips' features differ in more than their length.
    """
    present = [x for x in clips if x is not None]
    if not present:
        raise ValueError("at least one clip must have features")
    like, steps = present[0], max(x.shape[-2] for x in present)
    sizes = (*like.shape[:-2], like.shape[-1])
    if any((*x.shape[:-2], x.shape[-1]) != sizes for x in present):
        raise DataError("the features come from different encoders; encode them again")
    shape = (len(clips), *like.shape[:-2], steps, like.shape[-1])
    features = torch.zeros(shape, dtype=like.dtype)
    mask = torch.zeros((len(clips), steps), dtype=torch.bool)
    for place, x in enumerate(clips):
        if x is not None:
            features[place, ..., : x.shape[-2], :] = x
            mask[place, : x.shape[-2]] = True
    return features, mask


def _stack(modality: Modality, clips: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """One modality's features of all clips, padded over time with zeros."""
    present = [clip for clip in clips if clip is not None]
    if not present:
        return {}
    features, mask = pad_features([None if clip is None else clip["x"] for clip in clips])
    batch = {f"{modality}_features": features, f"{modality}_features_mask": mask}
    for name in sorted(set(present[0]) - {"x"}):
        batch[f"{modality}_{name}"] = _stack_extra([clip[name] for clip in present], name, clips)
    return batch


def _stack_extra(
    tensors: Sequence[Tensor], name: str, clips: Sequence[Mapping[str, Tensor] | None]
) -> Tensor:
    """(N, ...) of a small tensor, padded with zeros to the largest in every dimension."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    out = torch.zeros((len(clips), *shape), dtype=tensors[0].dtype)
    for place, clip in enumerate(clips):
        if clip is not None:
            tensor = clip[name]
            out[(place, *(slice(0, size) for size in tensor.shape))] = tensor
    return out
