"""Collated prompts as vLLM takes them: token ids, and the media at the placeholders among them.

The ids are the trainer's own, placeholders written out, so that vLLM and the trainer read the same
prompt. A video is sent as its stored features with the grid that positions depend on. Sound is sent
as its mel spectrogram, because vLLM's audio encoders take nothing else; and so are the videos of
Qwen2.5-Omni as pixels, because vLLM 0.32 ends on their features. Embeddings of the whole prompt
would be simpler, but vLLM gives them the positions of text.

Shapes: B prompts, P tokens of the longest, N clips, T feature steps of a clip, E the LM's width, M
mel bins, S mel frames.

Source: ``MultiModalFeatures`` and ``MsgpackEncoder`` of vLLM 0.32, and
``create_qwen2_5_omni_thinker_field_factory``.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
import torch
import xxhash
from torch import Tensor

from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError, DataError
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig
from mmemo.media.decode import decode
from mmemo.media.paths import resolve
from mmemo.models.backbone import AUDIO, VIDEO

_RAW = 3
"""Number of msgpack's extension type in which vLLM holds the bytes of a tensor."""

BY_FEATURES = frozenset({"qwen2_vl", "qwen2_5_vl"})
BY_PIXELS = frozenset({"qwen2_5_omni_thinker"})
HEARING = frozenset({"qwen2_5_omni_thinker"})
"""``model_type`` of the models whose videos and sounds are known to be sent as vLLM reads them."""

_KEPT_BYTES = 1 << 29


class Clips:
    """Inputs of the encoders by sample id, made again from the clips."""

    def __init__(
        self, samples: Sequence[Sample], backbone: Any, root: Path, limits: DecodeConfig
    ) -> None:
        self._samples = {sample.sample_id: sample for sample in samples}
        self._backbone, self._root, self._limits = backbone, root, limits
        self._known: OrderedDict[object, Tensor] = OrderedDict()

    def know(self, samples: Sequence[Sample]) -> None:
        """Take the media of these rows, also where a row of the same id had others."""
        self._samples |= {sample.sample_id: sample for sample in samples}

    def mel(self, sample_id: str) -> Tensor:
        """Log-mel (M, S) float32 of the row's sound.

        Raises:
            MediaError: the clip has become unreadable.
        """
        return self._get(sample_id, "audio", lambda clip: self._backbone.mel(clip).float())

    def pixels(self, sample_id: str) -> Tensor:
        """Patches (t h w, C tp p p) of the row's video, as precise as the trainer's encoder takes
        them.

        Raises:
            MediaError: the clip has become unreadable.
        """
        dtype = next(self._backbone.model.model.visual.parameters()).dtype
        return self._get(sample_id, "video", lambda clip: self._backbone.pixels(clip)[0].to(dtype))

    def _get(
        self, sample_id: str, modality: Modality, make: Callable[[DecodedClip], Tensor]
    ) -> Tensor:
        ref = self._samples[sample_id].media[modality]
        key = (modality, ref)
        if key not in self._known:
            job = DecodeJob(
                path=resolve(self._root, ref.path),
                name=ref.path,
                want=frozenset({modality}),
                sampling=self._backbone.sampling,
                limits=self._limits,
                start=ref.start,
                end=ref.end,
            )
            self._known[key] = make(decode(job))
            while (
                len(self._known) > 1 and sum(x.nbytes for x in self._known.values()) > _KEPT_BYTES
            ):
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Item:
    """One medium of a prompt, which stands at ``length`` tokens from ``offset`` on. ``fields`` are
    vLLM's keyword arguments: name to tensor and to how vLLM batches it."""

    modality: str
    offset: int
    length: int
    fields: Mapping[str, tuple[Tensor, Sequence[Any]]]

    @property
    def digest(self) -> str:
        """What vLLM's caches know it by: the same for the same content alone."""
        found = xxhash.xxh3_128(self.modality.encode())
        for name, (x, _) in sorted(self.fields.items()):
            found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
            found.update(_bytes(x))
        return found.hexdigest()

    def packed(self) -> str:
        """The fields as vLLM reads them: msgpack in base64."""
        values = {
            name: {"data": _tensor(x), "field": list(field)}
            for name, (x, field) in self.fields.items()
        }
        raw: Any = msgpack.packb(values)
        return base64.b64encode(raw).decode("ascii")


@dataclass(frozen=True)
class Prompt:
    """A prompt without padding, and its media."""

    ids: list[int]
    items: Sequence[Item] = ()

    @cached_property
    def features(self) -> dict[str, Any] | None:
        """``features`` of a request; None for a prompt of text."""
        if not self.items:
            return None
        hashes: dict[str, list[str]] = {}
        places: dict[str, list[dict[str, int]]] = {}
        values: dict[str, list[str]] = {}
        for one in self.items:
            place = {"offset": one.offset, "length": one.length}
            hashes.setdefault(one.modality, []).append(one.digest)
            places.setdefault(one.modality, []).append(place)
            values.setdefault(one.modality, []).append(one.packed())
        return {"mm_hashes": hashes, "mm_placeholders": places, "kwargs_data": values}


def read_prompts(prompts: Mapping[str, Any], backbone: Any, media: Clips | None) -> list[Prompt]:
    """The B prompts of a collated batch.

    Args:
        prompts: as for :meth:`mmemo.generation.rollout.RolloutEngine.generate`.
        backbone: of the native model, which says what its placeholders are; None if it has none.
        media: inputs of the encoders; None if there are none.

    Raises:
        ConfigError: a row has media that cannot be sent to vLLM.
        DataError, MediaError: a clip has changed or become unreadable.
    """
    ids, mask = prompts["input_ids"].cpu(), prompts["attention_mask"].cpu().bool()
    kinds: Mapping[int, int] = {} if backbone is None else backbone.kinds
    found: list[Prompt] = []
    for row in range(len(ids)):
        own: list[int] = ids[row][mask[row]].tolist()
        items: list[Item] = []
        there = {token: runs for token in kinds if (runs := _runs(own, token))}
        # Of a short clip both may be one run each, and yet have the positions of one block.
        if len(there) > 1 and getattr(getattr(backbone, "settings", None), "audio_in_video", False):
            raise _interleaved()
        for token, runs in there.items():
            kind = kinds[token]
            if kind == VIDEO:
                items += _seen(prompts, row, runs, token, backbone, media)
            elif kind == AUDIO:
                items.append(_heard(prompts, row, runs, backbone, media))
        found.append(Prompt(own, items))
    return found


def _runs(ids: Sequence[int], token: int) -> list[tuple[int, int]]:
    """Begin and length of each run of a token."""
    found: list[tuple[int, int]] = []
    for at, one in enumerate(ids):
        if one != token:
            continue
        if found and sum(found[-1]) == at:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((at, 1))
    return found


def _seen(
    prompts: Mapping[str, Any],
    row: int,
    runs: Sequence[tuple[int, int]],
    token: int,
    backbone: Any,
    media: Clips | None,
) -> list[Item]:
    """The video of a row, or its stills."""
    config, clip = backbone.model.config, int(prompts["clip_index"][row])
    kept = prompts["video_features_mask"][clip]
    x: Tensor = prompts["video_features"][clip][kept].cpu()
    grid: Tensor = prompts["video_grid"][clip].cpu()
    name = "image" if token == getattr(config, "image_token_id", None) else "video"
    parts = [grid]
    if name == "image":  # each still is one of its own
        parts = [torch.cat([torch.ones_like(grid[:1]), grid[1:]])] * int(grid[0])
    if config.model_type in BY_PIXELS and name == "video" and media is not None:
        x = media.pixels(prompts["sample_ids"][row])
        kind, sizes = "pixel_values_videos", [len(x)]
        if len(x) != int(grid.prod()):
            raise _changed(prompts["sample_ids"][row])
    elif config.model_type in BY_FEATURES:
        kind, sizes = f"{name}_embeds", [len(x) // len(parts)] * len(parts)
    else:
        raise _cannot(f"videos of a '{config.model_type}'")
    if len(runs) != len(parts):
        raise _interleaved()
    items: list[Item] = []
    for run, part, size in zip(runs, parts, sizes, strict=True):
        own, x = x[:size], x[size:]
        fields: dict[str, tuple[Tensor, Sequence[Any]]] = {
            kind: (own, _flat(size, 0)),
            f"{name}_grid_thw": (part, _BATCHED),
        }
        if name == "video":
            seconds: Tensor = prompts["video_seconds_per_grid"][clip].cpu().float()
            fields["second_per_grid_ts"] = (seconds, _BATCHED)
        items.append(Item(name, *run, fields))
    return items


def _heard(
    prompts: Mapping[str, Any],
    row: int,
    runs: Sequence[tuple[int, int]],
    backbone: Any,
    media: Clips | None,
) -> Item:
    """The sound of a row."""
    kind = backbone.model.config.model_type
    if kind not in HEARING or media is None:
        raise _cannot(f"sounds of a '{kind}'")
    if len(runs) != 1:
        raise _interleaved()
    mel = media.mel(prompts["sample_ids"][row])
    frames = mel.shape[1]
    if frames != int(prompts["audio_mel_frames"][int(prompts["clip_index"][row])]):
        raise _changed(prompts["sample_ids"][row])
    return Item(
        "audio",
        *runs[0],
        {
            "input_audio_features": (mel, _flat(frames, 1)),
            "feature_attention_mask": (torch.ones(frames, dtype=torch.long), _BATCHED),
            "audio_feature_lengths": (torch.tensor(frames), _BATCHED),
        },
    )


def _changed(sample_id: str) -> DataError:
    return DataError(
        f"the clip of row '{sample_id}' is no longer the one that was encoded; start the run again"
    )


def _interleaved() -> ConfigError:
    return ConfigError(
        "vLLM is sent a clip's video and its sound as one block each; set "
        "model.native.audio_in_video: false, or rollout.engine: hf"
    )


def _cannot(what: str) -> ConfigError:
    return ConfigError(f"{what} cannot be sent to vLLM; set rollout.engine: hf")


_BATCHED: Sequence[Any] = ("batched", {"keep_on_cpu": True})


def _flat(size: int, dim: int) -> Sequence[Any]:
    """Items of a batch lie one behind the other in dimension ``dim``."""
    whole = [[None, None, None]] * dim + [[0, size, None]]
    return ("flat", {"keep_on_cpu": False, "slices": [whole], "dim": dim})


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(x: Tensor) -> list[Any]:
    return [str(x.dtype).removeprefix("torch."), list(x.shape), msgpack.ExtType(_RAW, _bytes(x))]
