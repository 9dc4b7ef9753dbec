"""What Qwen2.5's multimodal models share behind the backbone protocol.

The encoders are frozen up to and including the vision merger, so stored features already have the
language model's width. The number of tokens of a clip depends on its pixels: ``expand`` writes
placeholders out from the features.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps = LM tokens of a clip, E
the LM's width, V vocabulary, (t, h, w) the grid of vision patches.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mmemo.config import Config, dump
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError, DataError, MediaError
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.media.image import normalise, patchify_qwen, resize, smart_resize
from mmemo.models.adapters.routing import routed
from mmemo.models.backbone import (
    AUDIO,
    TEXT,
    VIDEO,
    FeatureBatch,
    Features,
    prompt_positions,
)
from mmemo.models.composed.encoders import hash_weights, stable_config
from mmemo.models.qwen.branch import Branch
from mmemo.models.qwen.face import FaceBranch

ENCODE_VERSION = 1
"""Part of every fingerprint. Raise it when features become other numbers than before."""

_PLACEHOLDER = re.compile(r"<(video|audio|face)>")
_VALUE = {"video": VIDEO, "audio": AUDIO}


class QwenConfig(Config):
    """What the encoders of a native model are fed: ``model.native``."""


class QwenVisionConfig(QwenConfig):
    """Inputs of the vision encoder. The defaults are those of the released video processors."""

    # One LM token covers 28 x 28 pixels: patches of 14, merged 2 x 2.
    min_pixels: int = Field(default=128 * 28 * 28, ge=28 * 28)
    """Minimum area of a resized frame, in pixels."""
    max_pixels: int = Field(default=768 * 28 * 28, ge=28 * 28)
    """Maximum area of a resized frame, in pixels."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class QwenBackbone(nn.Module, ABC):
    """A :class:`~mmemo.models.backbone.Backbone` without positions and placeholders.

    Features of a video: ``x`` (T, E), ``grid`` (3,) int64, ``seconds_per_grid`` () float32.
    """

    modalities: tuple[Modality, ...]
    name: str
    """Name of the model in messages."""
    vision_marks: tuple[str, str]
    """Tokens around a block of vision tokens."""
    placing: Mapping[Modality, tuple[str, ...]] = {"video": ("grid", "seconds_per_grid")}
    """Features beside ``x`` that positions depend on."""
    mrope: bool = True
    """Whether positions are (3, B, L) and depend on the clips."""
    deepstack: int = 0
    """Number of the LM's first layers that features of deeper layers of the encoder enter."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None,
        settings: QwenConfig,
        encoders: Mapping[Modality, str],
    ) -> None:
        """``model`` is transformers' own; ``encoders`` are attribute names in ``model.model``."""
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.settings: Any = settings
        self._config: Any = self.model.config
        self._encoders = dict(encoders)
        vision: Any = getattr(self._config, "vision_config", None)
        self.deepstack = len(getattr(vision, "deepstack_visual_indexes", ()))
        for modality in encoders:
            self._encoder(modality).requires_grad_(False).eval()
        self._fingerprints: dict[str, str] = {}
        self.branches: dict[str, Branch] = {}

    def add_branch(self, branch: Branch) -> None:
        """Take the branch's tokens in prompts, and what it says at them."""
        self.branches[branch.name] = branch
        if self.face is not None:
            self.modalities = (*type(self).modalities, "face")

    @property
    def face(self) -> FaceBranch | None:
        """The face branch, which brings an encoder of its own."""
        found = self.branches.get("face")
        return found if isinstance(found, FaceBranch) else None

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``; the frozen encoders stay in eval mode."""
        super().train(mode)
        self.freeze_encoders()
        return self

    def freeze_encoders(self) -> None:
        """Put the frozen encoders into eval mode."""
        for modality in self._encoders:
            self._encoder(modality).eval()
        for branch in self.branches.values():
            for name in branch.frozen:
                getattr(self.model, name).eval()

    @property
    def _inner(self) -> Any:
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack; position ids are (3, B, L)."""
        return self._inner.language_model

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head

    def feature_fingerprint(self, modality: Modality) -> str:
        """See :class:`~mmemo.models.backbone.Backbone`. The weights are hashed once."""
        if modality not in self._fingerprints and modality == "face" and self.face is not None:
            self._fingerprints[modality] = self.face.fingerprint()
        elif modality not in self._fingerprints:
            encoder = self._encoder(modality)
            identity = {
                "version": ENCODE_VERSION,
                "config": stable_config(encoder),
                # Interleaving decides where tokens go and changes no feature.
                "settings": {k: v for k, v in dump(self.settings).items() if k != "audio_in_video"},
                **self._identity(modality),
                "weights": hash_weights(encoder),
            }
            text = json.dumps(identity, sort_keys=True, default=str)
            self._fingerprints[modality] = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprints[modality]

    def _identity(self, modality: Modality) -> dict[str, Any]:
        """What else determines a modality's features."""
        return {}

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """Encode one clip after the other; the class says what is in the features.

        Raises:
            MediaError: a clip has no such stream, or more of it than the encoder takes.
        """
        if modality == "face" and self.face is not None:
            return self.face.encode(clips)
        self._encoder(modality)
        with torch.inference_mode():
            # Clips are encoded one by one, so that no bit depends on what else is in the batch.
            found = [self._encode(modality, clip) for clip in clips]
            return [{name: t.cpu().clone() for name, t in one.items()} for one in found]

    def _encode(self, modality: Modality, clip: DecodedClip) -> Features:
        encoder = self._encoder(modality)
        patches, grid, seconds = self.pixels(clip)
        inputs = patches.to(encoder.device, encoder.dtype)
        found = encoder(inputs, grid_thw=grid[None].to(encoder.device))
        x = [found.pooler_output, *(found.deepstack_features if self.deepstack else ())]
        return {"x": torch.cat(x, -1), "grid": grid, "seconds_per_grid": torch.tensor(seconds)}

    def pixels(self, clip: DecodedClip) -> tuple[Tensor, Tensor, float]:
        """Inputs of the vision encoder: patches (t h w, C tp p p), grid (3,), and seconds between
        two steps of time of the grid."""
        frames, times = clip.frames, clip.times
        if frames is None or times is None or len(frames) == 0:
            raise MediaError(clip.name, "no_video", "there are no video frames to encode")
        config = self._config.vision_config
        factor = config.patch_size * config.spatial_merge_size
        settings = self.settings
        height, width = frames.shape[1], frames.shape[2]
        size = smart_resize(height, width, factor, settings.min_pixels, settings.max_pixels)
        pixels = normalise(resize(frames, size), settings.image_mean, settings.image_std)
        patches, grid = patchify_qwen(
            self._in_time(pixels),
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
        )
        # A single frame stands for the whole clip.
        between = float(np.mean(np.diff(times))) if len(times) > 1 else clip.duration
        seconds = between * config.temporal_patch_size
        return torch.from_numpy(patches), torch.from_numpy(grid), seconds

    def _in_time(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """(F, C, h, w) as the encoder merges them, ``temporal_patch_size`` at a time."""
        return pixels

    def _encoder(self, modality: Modality) -> Any:
        if modality not in self._encoders:
            raise ConfigError(
                f"{self.name} has no {modality} branch; set data.modalities to "
                + " and ".join(self.modalities)
            )
        return getattr(self._inner, self._encoders[modality])

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Modality -> (N, T, E). The encoders' outputs are embeddings already; what a branch gives
        is added to those of its tokens."""
        given = self._streams(features)
        streams = {name.removesuffix("_features") for name in features}
        for name, branch in self.branches.items():
            if branch.shown(streams):
                given[name] = branch.connect(features)
        return given

    def _streams(self, features: FeatureBatch) -> dict[str, Tensor]:
        found = {name: features.get(f"{name}_features") for name in type(self).modalities}
        given = {name: x for name, x in found.items() if x is not None}
        if self.deepstack and "video" in given:
            video = given["video"]
            given["video"] = video[..., : video.shape[-1] // (1 + self.deepstack)]
        return given

    def embed(self, input_ids: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """(B, L, E) with video and audio tokens filled in order from each row's clip.

        Raises:
            DataError: a row does not have as many tokens as its clip has features.
        """
        embeds = self._inner.get_input_embeddings()(input_ids)
        connected = self._streams(features)
        for name in type(self).modalities:
            where = modality_ids == _VALUE[name]
            steps = self._steps(name, where, features)
            if name in connected:
                # masked_scatter fills row by row, the order in which the values are joined.
                values = connected[name][_clips(features)][steps].to(embeds)
                embeds = embeds.masked_scatter(where[..., None], values)
        for branch in self.branches.values():
            embeds = branch.add(embeds, modality_ids, features)
        return embeds

    def _steps(self, name: str, where: Tensor, features: FeatureBatch) -> Tensor:
        """(B, T) bool: the features that each row's tokens ``where`` (B, L) stand for.

        Raises:
            DataError: a row has tokens but no clip, or not as many as its clip has features.
        """
        found = where.sum(1)
        mask = features.get(f"{name}_features_mask")
        lost = (found > 0) & ((features["clip_index"] < 0) | (mask is None))
        steps = (
            where[:, :0] if mask is None else mask[_clips(features)].bool() & (found > 0)[:, None]
        )
        wrong = lost | (found != steps.sum(1))
        # One read for all rows, because each waits until a GPU has caught up.
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            if bool(lost[row]):
                raise DataError(_no_clip(f"row {row}", name))
            raise DataError(
                f"row {row} has {int(found[row])} {name} tokens but its clip has "
                f"{int(steps[row].sum())} {name} features; expand the text with this clip's "
                "features and never cut it"
            )
        return steps

    def layer_inputs(self, modality_ids: Tensor, features: FeatureBatch) -> dict[str, Any]:
        """See :func:`~mmemo.models.backbone.layer_inputs`. Features are wider than the LM where
        the vision encoder is a deepstack: E for the embeddings, then E for each of its layers.

        Source: Meng et al., DeepStack, arXiv 2406.04334.
        """
        stored = features.get("video_features")
        if not self.deepstack or stored is None:
            return {}
        where = modality_ids == VIDEO
        steps = self._steps("video", where, features)
        width = stored.shape[-1] // (1 + self.deepstack)
        deep = stored[..., width:][_clips(features)][steps].split(width, -1)
        return {"visual_pos_masks": where, "deepstack_visual_embeds": list(deep)}

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        kinds = batch["modality_ids"]
        embeds, routing = routed(self.language_model, self.embed(ids, kinds, batch), kinds)
        hidden = self._inner.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=prompt_positions(self, batch),
            use_cache=False,
            **self.layer_inputs(kinds, batch),
            **routing,
        ).last_hidden_state
        return self.model.lm_head(hidden)

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, features: FeatureBatch
    ) -> Tensor:
        """(3, B, L), row by row from the features of its clip, with zeros for padding.

        Raises:
            DataError: a row has media tokens but no clip.
        """
        # The rows are counted on the CPU, because that reads single values, each of which would
        # wait for a GPU.
        extras: dict[tuple[Modality, str], Tensor] = {
            (name, key): features[f"{name}_{key}"].cpu()
            for name, keys in self.placing.items()
            for key in keys
            if f"{name}_{key}" in features
        }
        clips = features["clip_index"].tolist()
        rows: list[Tensor] = []
        for ids, mask, clip in zip(
            input_ids.cpu(), attention_mask.cpu().bool(), clips, strict=True
        ):
            given: dict[Modality, Features] = {}
            for (name, key), values in extras.items() if clip >= 0 else ():
                given.setdefault(name, {})[key] = values[clip]
            found = self.row_positions(ids[mask], given)
            row = found.new_zeros(len(found), len(ids))
            row[:, mask] = found
            rows.append(row)
        return torch.stack(rows, 1).to(input_ids.device)

    @abstractmethod
    def row_positions(self, input_ids: Tensor, features: Mapping[Modality, Features]) -> Tensor:
        """(3, L) positions of one row's tokens (L,), without padding, all on the CPU. Of the
        features, only those of ``placing`` are read.

        Raises:
            DataError: the row has media tokens but no features of that kind.
        """

    @property
    @abstractmethod
    def kinds(self) -> Mapping[int, int]:
        """Placeholder token -> its value in ``modality_ids``."""

    @abstractmethod
    def spell(self, modality: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        """The text of one placeholder.

        Args:
            inside: whether sound is interleaved with the video, if the model supports it.
        """

    def modality_ids(self, input_ids: Sequence[int]) -> list[int]:
        """The modality of each token, as :data:`~mmemo.models.backbone.MODALITY_ID`."""
        kinds = {**self.kinds, **{one.token_id: one.kind for one in self.branches.values()}}
        return [kinds.get(token, TEXT) for token in input_ids]

    def write(self, text: str, features: Mapping[Modality, Features], *, inside: bool) -> str:
        """A text with its placeholders written out. A face comes before video and sound, and the
        pre-fusion of two streams before all.

        Args:
            inside: whether sound is interleaved with the video, if the model supports it.
        """
        names: list[str] = _PLACEHOLDER.findall(text)
        if "face" in names and names[0] != "face":
            first = f"<{names[0]}>"
            text = text.replace("<face>", "").replace(first, f"<face>{first}", 1)
        fusion = self.branches.get("fusion")
        if fusion is not None and fusion.shown(names):
            run = fusion.spell()
            text = _PLACEHOLDER.sub(lambda found: run + found.group(), text, count=1)

        def spelt(found: re.Match[str]) -> str:
            name = found.group(1)
            if name in self.branches:
                return self.branches[name].spell()
            return self.spell(name, features, inside=inside)

        return _PLACEHOLDER.sub(spelt, text)

    def _expand(
        self, text: str, features: Mapping[Modality, Features], *, inside: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids and modality ids of a text with its placeholders written out.

        Raises:
            DataError: a placeholder without features.
        """
        missing = sorted(set(_PLACEHOLDER.findall(text)) - features.keys())
        if missing:
            raise DataError(f"<{missing[0]}> has no {missing[0]} features; encode the clip first")
        spelt = self.write(text, features, inside=inside)
        ids = self.tokenizer(spelt, add_special_tokens=False)["input_ids"]
        return ids, self.modality_ids(ids)

    def _token(self, number: int) -> str:
        convert: Any = self.tokenizer.convert_ids_to_tokens
        return convert(number)

    def _block(self, marks: tuple[str, str], token: int, length: int) -> str:
        return f"{marks[0]}{self._token(token) * length}{marks[1]}"

    def _placed(self, name: Modality, features: Mapping[Modality, Features]) -> Features:
        """A modality's features for the positions of a row that has its tokens."""
        if not set(self.placing[name]) <= features.get(name, {}).keys():
            raise DataError(_no_clip("a row", name))
        return features[name]


def _clips(features: FeatureBatch) -> Tensor:
    """(B,) the clip of each row; any for a row without."""
    return features["clip_index"].clamp(min=0)


def _no_clip(row: str, name: str) -> str:
    return f"{row} has {name} tokens but no clip with {name}; check the batch"
