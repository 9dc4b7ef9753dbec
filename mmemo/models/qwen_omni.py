"""Qwen2.5-Omni's Thinker behind the backbone protocol, its own towers kept.

The towers are frozen up to and including the vision merger and the audio projection, so what is
stored has the language model's width already. Tokens of a clip are as many as its pixels and its
seconds ask for: :meth:`QwenOmniBackbone.expand` writes placeholders out from the features.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps = LM tokens of a clip, E
the LM's width, V vocabulary, (t, h, w) the grid of vision patches, S mel frames.

Source: Xu et al., Qwen2.5-Omni Technical Report, arXiv 2503.20215, sections 2.1 and 2.2.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from mmemo.config import Config, dump
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError, DataError, MediaError
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig
from mmemo.media.image import ImageSpec, patchify_qwen, smart_resize, to_pixels
from mmemo.models.backbone import AUDIO, TEXT, VIDEO, Backbone, FeatureBatch, Features
from mmemo.models.encoders import MIN_AUDIO_SECONDS, hash_weights

ENCODE_VERSION = 1
"""Part of every fingerprint. Raise it when this file computes something else than before."""

_PLACEHOLDER = re.compile(r"<(video|audio)>")
_VALUE = {"video": VIDEO, "audio": AUDIO}


class QwenOmniSettings(Config):
    """What the towers are fed. The defaults are the released processor's."""

    min_pixels: int = Field(default=128 * 28 * 28, ge=28 * 28)
    """Smallest area of a resized frame, in pixels."""
    max_pixels: int = Field(default=768 * 28 * 28, ge=28 * 28)
    """Largest area of a resized frame, in pixels."""
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_seconds: int = Field(default=300, ge=1)
    """Longest sound. A longer one is refused; the released processor cuts it off."""


class QwenOmniBackbone(nn.Module):
    """A Thinker that implements :class:`~mmemo.models.backbone.Backbone`.

    Features of a video: ``x`` (T, E), ``grid`` (3,) int64, ``seconds_per_grid`` () float32. Of
    sound: ``x`` (T, E), ``mel_frames`` () int64.
    """

    modalities: tuple[Modality, ...] = ("video", "audio")

    def __init__(
        self,
        thinker: Qwen2_5OmniThinkerForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        settings: QwenOmniSettings | None = None,
    ) -> None:
        super().__init__()
        self.thinker, self.tokenizer = thinker, tokenizer
        self.sampling = sampling or SamplingConfig()
        self.settings = settings or QwenOmniSettings()
        self._inner: Any = thinker.model
        self._config: Any = thinker.config
        for tower in (self._inner.visual, self._inner.audio_tower):
            tower.requires_grad_(False).eval()
        self._extractor = WhisperFeatureExtractor(
            feature_size=self._config.audio_config.num_mel_bins,
            sampling_rate=self.sampling.sample_rate,
            chunk_length=self.settings.max_seconds,
        )
        self._fingerprints: dict[str, str] = {}

    def train(self, mode: bool = True) -> QwenOmniBackbone:
        """As ``nn.Module.train``; the frozen towers stay in eval mode."""
        super().train(mode)
        self._inner.visual.eval()
        self._inner.audio_tower.eval()
        return self

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack; position ids are (3, B, L)."""
        return self._inner.language_model

    @property
    def lm_head(self) -> nn.Module:
        return self.thinker.lm_head

    def feature_fingerprint(self, modality: Modality) -> str:
        """See :class:`~mmemo.models.backbone.Backbone`. The weights are hashed once."""
        if modality not in self._fingerprints:
            tower = self._tower(modality)
            identity = {
                "version": ENCODE_VERSION,
                "config": tower.config.to_dict(),
                "settings": dump(self.settings),
                "extractor": self._extractor.to_dict() if modality == "audio" else None,
                "weights": hash_weights(tower),
            }
            text = json.dumps(identity, sort_keys=True, default=str)
            self._fingerprints[modality] = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprints[modality]

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """See the class for what is in the features; one clip at a time.

        Raises:
            MediaError: a clip has no such stream, or more sound than the tower takes.
        """
        self._tower(modality)
        with torch.inference_mode():
            make = self._encode_video if modality == "video" else self._encode_audio
            return [{name: t.cpu().clone() for name, t in make(clip).items()} for clip in clips]

    def pixels(self, clip: DecodedClip) -> tuple[Tensor, Tensor, float]:
        """What the vision tower sees: patches (t h w, C tp p p), grid (3,) and the seconds
        between two rows of the grid."""
        frames, times = clip.frames, clip.times
        if frames is None or times is None or len(frames) == 0:
            raise MediaError(clip.name, "no_video", "there are no video frames to encode")
        config = self._config.vision_config
        factor = config.patch_size * config.spatial_merge_size
        settings = self.settings
        height, width = frames.shape[1], frames.shape[2]
        spec = ImageSpec(
            size=smart_resize(height, width, factor, settings.min_pixels, settings.max_pixels),
            mean=settings.image_mean,
            std=settings.image_std,
        )
        patches, grid = patchify_qwen(
            to_pixels(frames, spec),
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
        )
        between = float(np.mean(np.diff(times))) if len(times) > 1 else clip.duration
        seconds = between * config.temporal_patch_size
        return torch.from_numpy(patches), torch.from_numpy(grid), seconds

    def mel(self, clip: DecodedClip) -> Tensor:
        """What the audio tower hears: log-mel (M, S), without the padding to a full window."""
        waveform = clip.waveform
        if waveform is None or len(waveform) == 0:
            raise MediaError(clip.name, "no_audio", "there is no sound to encode")
        rate = self.sampling.sample_rate
        if len(waveform) > self.settings.max_seconds * rate:
            raise MediaError(
                clip.name,
                "too_long",
                f"has {len(waveform) / rate:.0f} s of sound, at most {self.settings.max_seconds} "
                "s fit; set start and end",
            )
        shortest = int(MIN_AUDIO_SECONDS * rate)
        samples = max(len(waveform), shortest)
        hop = self._extractor.hop_length
        frames = -(-samples // hop)
        # Silence after the end, as a padded window has it, and a whole number of hops.
        total = frames * hop + self._extractor.n_fft
        padded = np.pad(waveform, (0, total - len(waveform)))
        found = self._extractor(
            padded, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="pt"
        )
        return found["input_features"][0, :, :frames]

    def _encode_video(self, clip: DecodedClip) -> Features:
        tower = self._inner.visual
        patches, grid, seconds = self.pixels(clip)
        inputs = patches.to(tower.device, tower.dtype)
        merged = tower(inputs, grid_thw=grid[None].to(tower.device)).pooler_output
        return {"x": merged, "grid": grid, "seconds_per_grid": torch.tensor(seconds)}

    def _encode_audio(self, clip: DecodedClip) -> Features:
        tower = self._inner.audio_tower
        mel = self.mel(clip).to(tower.device, tower.dtype)
        frames = torch.tensor([mel.shape[1]], device=tower.device)
        x = tower(mel, feature_lens=frames).last_hidden_state
        return {"x": x, "mel_frames": frames[0]}

    def _tower(self, modality: Modality) -> Any:
        if modality not in self.modalities:
            raise ConfigError(
                f"Qwen2.5-Omni has no {modality} branch; set data.modalities to video and audio"
            )
        return self._inner.visual if modality == "video" else self._inner.audio_tower

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Modality -> (N, T, E): the towers' outputs are embeddings already."""
        return {
            name: features[f"{name}_features"]
            for name in self.modalities
            if f"{name}_features" in features
        }

    def embed(self, input_ids: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """(B, L, E), video and audio tokens filled from each row's clip in order.

        Raises:
            DataError: a row's tokens are not as many as its clip's features.
        """
        embeds = self._inner.get_input_embeddings()(input_ids)
        connected = self.connect(features)
        for name in self.modalities:
            where = modality_ids == _VALUE[name]
            rows = where.any(1).nonzero().flatten().tolist()
            if not rows:
                continue
            values: list[Tensor] = []
            for row in rows:
                clip = self._clip_of(row, name, features)
                steps = features[f"{name}_features_mask"][clip].bool()
                found, given = int(where[row].sum()), int(steps.sum())
                if found != given:
                    raise DataError(
                        f"row {row} has {found} {name} tokens but its clip has {given} {name} "
                        "features; expand the text with this clip's features and never cut it"
                    )
                values.append(connected[name][clip][steps])
            embeds = embeds.masked_scatter(where[..., None], torch.cat(values).to(embeds))
        return embeds

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, features: FeatureBatch
    ) -> Tensor:
        """(3, B, L): the Thinker's time-aligned M-RoPE, row by row.

        The Thinker's own index takes one ``use_audio_in_video`` for a whole batch and counts
        media over its rows; one row at a time, batches may mix anything. Nothing is cached.
        """
        config = self._config
        found: list[Tensor] = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            given: dict[str, Any] = {}
            if bool((ids == config.video_token_id).any()):
                clip = self._clip_of(row, "video", features)
                given["video_grid_thw"] = features["video_grid"][clip][None].cpu()
                given["second_per_grids"] = features["video_seconds_per_grid"][clip][None].cpu()
            if bool((ids == config.audio_token_id).any()):
                clip = self._clip_of(row, "audio", features)
                given["audio_seqlens"] = features["audio_mel_frames"][clip][None].cpu()
            starts = ids[:-1] == config.vision_start_token_id
            inside = bool((starts & (ids[1:] == config.audio_start_token_id)).any())
            positions, _ = self._inner.get_rope_index(
                ids[None].cpu(),
                attention_mask=mask[None].cpu(),
                use_audio_in_video=inside,
                **given,
            )
            found.append(positions)
        return torch.cat(found, 1).to(input_ids.device)

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = self._inner.language_model(
            inputs_embeds=self.embed(ids, batch["modality_ids"], batch),
            attention_mask=mask,
            position_ids=self.positions(ids, mask, batch),
            use_cache=False,
        ).last_hidden_state
        return self.thinker.lm_head(hidden)

    def expand(
        self,
        text: str,
        features: Mapping[Modality, Features],
        *,
        audio_in_video: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Token ids and modality ids of a text, with ``<video>`` and ``<audio>`` written out to
        as many tokens as the clip's features have steps.

        ``audio_in_video`` interleaves the two in chunks of time at ``<video>``, as the Thinker
        was trained for films; ``<audio>`` then writes nothing.

        Raises:
            DataError: a placeholder without features.
        """
        names = set(_PLACEHOLDER.findall(text))
        missing = sorted(names - features.keys())
        if missing:
            raise DataError(f"<{missing[0]}> has no {missing[0]} features; encode the clip first")
        interleave = audio_in_video and names == {"video", "audio"}
        ids: list[int] = []
        for piece in re.split(r"(<video>|<audio>)", text):
            if piece == "<video>" and interleave:
                ids += self._interleaved(features)
            elif piece == "<video>":
                ids += self._block("vision", self._config.video_token_id, features["video"])
            elif piece == "<audio>":
                if not interleave:
                    ids += self._block("audio", self._config.audio_token_id, features["audio"])
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        kinds = {self._config.video_token_id: VIDEO, self._config.audio_token_id: AUDIO}
        return ids, [kinds.get(token, TEXT) for token in ids]

    def _block(self, kind: str, token: int, features: Features) -> list[int]:
        begin, end = self._marks(kind)
        return [begin, *[token] * features["x"].shape[0], end]

    def _marks(self, kind: str) -> tuple[int, int]:
        convert: Any = self.tokenizer.convert_tokens_to_ids
        return convert(f"<|{kind}_bos|>"), convert(f"<|{kind}_eos|>")

    def _interleaved(self, features: Mapping[Modality, Features]) -> list[int]:
        """Chunks of equal time, video before audio in each, inside both pairs of marks."""
        config, video = self._config, features["video"]
        times, height, width = (int(size) for size in video["grid"])
        per_step = height * width // config.vision_config.spatial_merge_size**2
        step = float(video["seconds_per_grid"]) * config.position_id_per_seconds
        video_at = (torch.arange(times).float() * step).long().repeat_interleave(per_step)
        audio_at = torch.arange(features["audio"]["x"].shape[0])
        size = int(config.position_id_per_seconds * config.seconds_per_chunk)
        chunks = [self._inner.get_chunked_index(at, size, 0) for at in (video_at, audio_at)]
        tokens = (config.video_token_id, config.audio_token_id)
        (see, unsee), (hear, unhear) = self._marks("vision"), self._marks("audio")
        ids = [see, hear]
        for place in range(max(map(len, chunks))):
            for found, token in zip(chunks, tokens, strict=True):
                if place < len(found):
                    start, end = found[place]
                    ids += [token] * (end - start)
        return [*ids, unhear, unsee]

    def _clip_of(self, row: int, name: str, features: FeatureBatch) -> int:
        clip = int(features["clip_index"][row])
        if clip < 0 or f"{name}_features" not in features:
            raise DataError(f"row {row} has {name} tokens but no clip with {name}; check the batch")
        return clip


if TYPE_CHECKING:
    _: type[Backbone] = QwenOmniBackbone
