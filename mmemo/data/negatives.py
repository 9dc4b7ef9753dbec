"""Corrupted inputs for preference pairs, made from a clip's stored features or from another clip.

Shapes: T feature steps in order of time, D width of the encoder, F frames. The features of a stream
are ``x`` (T, D), or (layers, T, D) for a learned mix of layers, and a few small tensors. A step of
video may be one of several patches of a frame: ``grid`` (t, h, w) gives their number for encoders
that have one, ``frame_tokens`` for the others.

Only the streams that a negative names change. The others are the same tensors, so a loss that
compares the two inputs sees no other difference. (AVERE's own loader replaces the sound whatever
the question is about; arXiv 2602.07054.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmemo.data.preference import Negative, Preference, Side
from mmemo.data.sample import Modality, Sample
from mmemo.errors import DataError

StreamFeatures = Mapping[Modality, Mapping[str, Tensor]]


def corrupt(
    features: StreamFeatures,
    negative: Negative,
    *,
    frame_tokens: Mapping[Modality, int] | None = None,
) -> dict[Modality, Mapping[str, Tensor]]:
    """The features with the negative's streams corrupted; a pure function of its arguments.

    ``muted`` and ``blank_face`` set the features to zero. That is not what an encoder makes of
    silence or of an empty picture, but it carries as little information and needs no decoding.
    ``noise`` adds Gaussian noise whose standard deviation is ``snr_db`` below that of ``x``.
    ``uniform_noise`` puts noise of the mean and standard deviation of ``x`` in its place.

    Args:
        frame_tokens: tokens per frame of each stream, where it is neither 1 nor given by a
            ``grid``.

    Raises:
        DataError: a stream is missing or too short to be corrupted in this way, or the negative is
            another clip (see :func:`negative_sample`).
    """
    if not negative.feature_level:
        raise DataError(
            f"'{negative.kind}' takes streams of another clip; read that clip's features instead"
        )
    sizes = frame_tokens or {}
    found = dict(features)
    for modality in negative.modalities:
        if modality not in features:
            raise DataError(f"there is no {modality} to make '{negative.kind}' of")
        stream = features[modality]
        x = _changed(stream, negative, modality, sizes.get(modality, 1))
        rest: dict[str, Tensor] = {"x": x}
        if negative.kind == "blank_face" and "found" in stream:
            rest["found"] = torch.zeros_like(stream["found"])
        found[modality] = {**stream, **rest}
    return found


def negative_sample(preference: Preference, side: Side = "negative") -> Sample:
    """The pair's sample with the negative's streams of another clip instead of its own.

    Raises:
        DataError: the pair has no negative on this side, or it is made from features.
    """
    negative = preference.negative if side == "negative" else preference.irrelevant
    sample = preference.sample
    if negative is None or negative.feature_level:
        kind = "none" if negative is None else f"'{negative.kind}'"
        file, line = sample.source
        message = f"row '{sample.sample_id}' has no {side} clip; its {side} is {kind}"
        raise DataError(message, file=file, line=line)
    media = {**sample.media, **negative.media}
    return replace(sample, sample_id=f"{sample.sample_id}#{side}", media=media)


def _changed(
    stream: Mapping[str, Tensor], negative: Negative, modality: Modality, tokens: int
) -> Tensor:
    """The corrupted ``x``, in the same shape and dtype."""
    x, kind = stream["x"], negative.kind
    if kind in ("muted", "blank_face"):
        return torch.zeros_like(x)
    if kind == "noise":
        return _noisy(x, negative, modality)
    if kind == "uniform_noise":
        return _uniform(x, negative, modality)
    if "grid" in stream:
        tokens = x.shape[-2] // int(stream["grid"][0])
    frames, rest = divmod(x.shape[-2], tokens)
    if rest or frames < 2:
        raise DataError(
            f"'{kind}' changes nothing in {modality} of {frames} "
            f"frame{'s' if frames != 1 else ''} of {tokens} tokens; use noise"
        )
    order = _order(kind, frames, negative.seed)
    framed = x.unflatten(-2, (frames, tokens))
    return framed.index_select(-3, order.to(x.device)).flatten(-3, -2).contiguous()


def _order(kind: str, frames: int, seed: int) -> Tensor:
    """(F,) the frame at each position, never in the clip's own order."""
    original = torch.arange(frames)
    if kind == "reversed":
        return original.flip(0)
    generator = torch.Generator().manual_seed(seed)
    if kind == "frozen_frame":
        return torch.randint(frames, (1,), generator=generator).expand(frames)
    order = original
    while torch.equal(order, original):
        order = torch.randperm(frames, generator=generator)
    return order


def _noisy(x: Tensor, negative: Negative, modality: Modality) -> Tensor:
    """``x`` with noise of its own, scaled by the standard deviation of each layer."""
    noise = torch.randn(x.shape, generator=_generator(negative, modality)).to(x.device)
    spread = x.float().std((-2, -1), correction=0, keepdim=True)
    return (x.float() + noise * spread * 10 ** (-negative.snr_db / 20)).to(x.dtype)


def _uniform(x: Tensor, negative: Negative, modality: Modality) -> Tensor:
    """Uniform noise with the mean and the standard deviation of each layer of ``x``."""
    noise = torch.rand(x.shape, generator=_generator(negative, modality)).to(x.device)
    whole = x.float()
    mean = whole.mean((-2, -1), keepdim=True)
    spread = whole.std((-2, -1), correction=0, keepdim=True)
    # Uniform on [0, 1) has the standard deviation 1 / sqrt(12).
    return (mean + (noise - 0.5) * 12**0.5 * spread).to(x.dtype)


def _generator(negative: Negative, modality: Modality) -> torch.Generator:
    """Random numbers of this stream of this negative."""
    text = f"{negative.seed}/{modality}".encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
    return torch.Generator().manual_seed(seed)
