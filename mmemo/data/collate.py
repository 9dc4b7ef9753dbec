"""Collate samples into one batch of tensors.

Shapes: B rows, L tokens of the longest row, N distinct clips, T feature steps of the longest clip,
D the encoder's width, ``layers`` hidden layers that a learned layer mix combines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mmemo.data.sample import MODALITIES, Modality, Sample, Turn
from mmemo.errors import DataError

IGNORE_INDEX = -100
"""The label of tokens that do not contribute to the loss: prompt, media and padding."""
NO_CLIP = -1
"""The ``clip_index`` of a row without media."""


Streams = Mapping[Modality, Mapping[str, Tensor] | None]
"""The streams of a row with their features, or None for features that are not available yet."""


class Rendered(Protocol):
    """A prompt as the model sees it. The three lists have one entry per token."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def labels(self) -> list[int]: ...
    @property
    def modality_ids(self) -> list[int]: ...
    @property
    def text(self) -> str: ...


class Renderer(Protocol):
    """The part of a processor that the collator uses."""

    @property
    def tokenizer(self) -> Any: ...

    def render(self, turns: Sequence[Turn], *, generation: bool, modalities: Streams) -> Rendered:
        """Render the turns of a row as tokens.

        ``modalities`` are the row's streams. In a batch, each stream comes with its features,
        because some models derive the number of media tokens from the clip's size and length.
        Before the clip is encoded, the value is None, and these models raise ``DataError``.
        """
        ...


def sized_by_clip(processor: Renderer) -> bool:
    """Whether the number of media tokens of a row depends on the features of its clip."""
    return bool(getattr(processor, "sized_by_clip", False))


class Source(Protocol):
    """Provides the features of samples."""

    def get(self, sample: Sample) -> Mapping[Modality, Mapping[str, Tensor]]: ...


Outline = Callable[[Sample], Mapping[Modality, Mapping[str, Tensor]]]
"""Returns a sample's features, of which only the shapes need to be valid."""


class Collator:
    """Collates rendered rows and the features of their clips, with each clip only once.

    Nothing is ever truncated: a row of more than ``max_length`` tokens is an error.
    """

    def __init__(self, processor: Renderer, source: Source, max_length: int | None = None) -> None:
        self.processor, self.source, self.max_length = processor, source, max_length

    def __call__(self, samples: Sequence[Sample], *, generation: bool = False) -> dict[str, Any]:
        """Collate samples into one batch, and load the features of their clips.

        Rows are padded on the right for training and on the left for generation.

        Returns:
            ``input_ids``, ``attention_mask``, ``modality_ids`` and ``labels`` (B, L), with labels
            of -100 outside the answer; ``clip_index`` (B,), -1 for a row without media;
            ``{modality}_features`` (N, T, D) or (N, layers, T, D) and ``{modality}_features_mask``
            (N, T) bool for each modality that any clip has, all False for a clip that lacks it;
            ``mrope_positions`` (B, 3, L) for models with M-RoPE, made here once for all passes;
            ``{modality}_{name}`` (N, ...) for further tensors of an encoder; ``sample_ids``.

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
        """Collate with features that are already loaded: row i uses ``clips[clip_index[i]]``."""
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
        places = self._positions(rows, [clips[i] if i >= 0 else {} for i in clip_index])
        if places:
            batch["mrope_positions"] = pad_positions(places, left=generation)
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

    def _positions(
        self, rows: Sequence[Rendered], clips: Sequence[Mapping[Modality, Mapping[str, Tensor]]]
    ) -> list[Tensor]:
        place: Any = getattr(self.processor, "row_positions", None)
        found = [
            None if place is None else place(row.input_ids, clip)
            for row, clip in zip(rows, clips, strict=True)
        ]
        return [one for one in found if one is not None]

    def _clips(
        self, samples: Sequence[Sample]
    ) -> tuple[list[int], list[Mapping[Modality, Mapping[str, Tensor]]]]:
        # Rows share a clip only if all their streams are the same, because the fusion branch reads
        # every stream of the clip that it is given.
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
    """Render the prompt (generation), or the prompt and the answer (training), as tokens.

    Args:
        clip: the sample's features, if they are loaded.

    Raises:
        DataError: the row has no answer to train on, or the processor refuses it.
    """
    file, line = sample.source
    if not generation and sample.answer is None:
        raise DataError("the row has no answer to train on", file=file, line=line)
    turns = sample.prompt if generation else sample.turns
    # A stream without features is named all the same, because its placeholder needs its tokens.
    streams: Streams = {name: clip.get(name) if clip else None for name in sample.media}
    try:
        return processor.render(turns, generation=generation, modalities=streams)
    except DataError as error:
        # An error that names a file already knows its row better.
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
    """Number of tokens of each rendered row, including media tokens.

    Args:
        outline: returns the features of a sample, for models whose number of media tokens depends
            on them. ``x`` needs a shape but no values.
    """
    lengths: list[int] = []
    for sample in samples:
        clip = outline(sample) if outline is not None and sample.media else None
        lengths.append(len(render(processor, sample, generation=generation, clip=clip).input_ids))
    return lengths


def check_length(sample: Sample, length: int, max_length: int | None) -> None:
    """Check that a row fits.

    Raises:
        DataError: the row has more than ``max_length`` tokens.
    """
    if max_length is not None and length > max_length:
        file, line = sample.source
        raise DataError(
            f"row '{sample.sample_id}' has {length} tokens but at most {max_length} fit; nothing "
            "is truncated, so shorten the text, use fewer media tokens, or raise data.max_length "
            "up to the model's limit",
            file=file,
            line=line,
        )


def check_lengths(
    samples: Sequence[Sample], lengths: Sequence[int], max_length: int | None
) -> None:
    """Check that all rows fit.

    Raises:
        DataError: rows have more than ``max_length`` tokens. The message gives their number and
            names the longest one.
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
    # Generation appends at the right end, so its prompts are padded on the left.
    width = max(len(row) for row in rows)
    padded = [
        [fill] * (width - len(row)) + row if left else row + [fill] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(padded, dtype=torch.long)


def pad_positions(rows: Sequence[Tensor], *, left: bool) -> Tensor:
    """Positions (3, L) of each row as (B, 3, L), padded with zeros."""
    width = max(row.shape[-1] for row in rows)
    spare = [width - row.shape[-1] for row in rows]
    sides = [(room, 0) if left else (0, room) for room in spare]
    return torch.stack([functional.pad(row, side) for row, side in zip(rows, sides, strict=True)])


def pad_features(clips: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Pad the features of N clips, each ([layers,] T, D) or None if a clip has none, over time.

    Returns:
        Features (N, [layers,] T, D), zero where a clip has none, and their mask (N, T) bool.

    Raises:
        ValueError: no clip has features.
        DataError: the features of two clips differ in more than their length.
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
    # (N, [layers,] T, D): the ellipsis covers the layers of a mix.
    for place, x in enumerate(clips):
        if x is not None:
            features[place, ..., : x.shape[-2], :] = x
            mask[place, : x.shape[-2]] = True
    return features, mask


def _stack(modality: Modality, clips: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """The features of one modality of all clips, padded over time with zeros."""
    present = [clip for clip in clips if clip is not None]
    if not present:
        return {}
    features, mask = pad_features([None if clip is None else clip["x"] for clip in clips])
    batch = {f"{modality}_features": features, f"{modality}_features_mask": mask}
    # Sorted, because the order of a set of strings differs from process to process.
    for name in sorted(set(present[0]) - {"x"}):
        batch[f"{modality}_{name}"] = _stack_extra([clip[name] for clip in present], name, clips)
    return batch


def _stack_extra(
    tensors: Sequence[Tensor], name: str, clips: Sequence[Mapping[str, Tensor] | None]
) -> Tensor:
    """Stack small tensors to (N, ...), padded with zeros to the largest size in every dimension."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    out = torch.zeros((len(clips), *shape), dtype=tensors[0].dtype)
    for place, clip in enumerate(clips):
        if clip is not None:
            tensor = clip[name]
            out[(place, *(slice(0, size) for size in tensor.shape))] = tensor
    return out
