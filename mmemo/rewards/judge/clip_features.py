"""What a reward model reads of a clip: features of frozen encoders, turned into tokens.

The parts are those of the composed model: the same encoders, the same feature store, the same
connectors. The features that an earlier stage stored are therefore read, not made again. What is
trained are the connectors; the encoders are named in the reward model's settings, with the
fingerprints of the features that it was trained on.

B rows, L tokens of a row, K tokens of a branch, T feature steps, D an encoder's width, E the text
model's width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmemo.config import Config
from mmemo.data.sample import MediaRef, Modality, Sample
from mmemo.errors import ConfigError, MediaError
from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore
from mmemo.media.clip import DecodedClip
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.models.backbone import MODALITY_ID, Backbone, Features
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.connectors import Connector, streams
from mmemo.models.config import BranchConfig
from mmemo.rewards.judge.rubric import ClipMedia, ClipSpan


class ClipSettings(Config):
    """The branches of a reward model, as saved with it."""

    branches: dict[Modality, BranchConfig]
    sampling: SamplingConfig = SamplingConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the encoders."""
    seed: int = 0
    """Seed of encoders with random weights."""
    fingerprints: dict[Modality, str] = {}
    """Of the features that it was trained on; empty before it is saved."""


class ClipEncoders:
    """The frozen encoders of a reward model: the part of a
    :class:`~mmemo.models.backbone.Backbone` that the feature store needs.

    Raises:
        ConfigError: an encoder cannot be loaded, does not fit its branch, or gives other features
            than those that the settings name.
    """

    def __init__(self, settings: ClipSettings) -> None:
        if "face" in settings.branches and settings.sampling.face.detector == "boxes":
            raise ConfigError(
                "a reward gets no face boxes of a row, so a reward model cannot use them; set "
                "sampling.face.detector to yunet, mediapipe or none"
            )
        self.settings, self.sampling = settings, settings.sampling
        self.modalities: tuple[Modality, ...] = tuple(
            name for name in MODALITY_ID if name in settings.branches
        )
        self._models: dict[Modality, PreTrainedModel] = {}
        self.specs: dict[Modality, SavedBranchConfig] = {}
        for name in self.modalities:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                branch, dtype = settings.branches[name], getattr(torch, settings.dtype)
                found = encoders.load_encoder(name, branch, settings.sampling, dtype)
            self._models[name], self.specs[name] = found.model, found.spec
        self._fingerprints = {
            name: encoders.fingerprint(model, self.specs[name], name)
            for name, model in self._models.items()
        }
        for name, known in settings.fingerprints.items():
            if self._fingerprints.get(name) != known:
                raise ConfigError(
                    f"the {name} encoder '{settings.branches[name].encoder or 'of its config'}' "
                    "gives other features than those that the reward model was trained on; name "
                    f"the right one in encoders.{name}, or train the reward model again"
                )

    @property
    def saved(self) -> ClipSettings:
        """The settings with the fingerprints of the features."""
        return self.settings.model_copy(update={"fingerprints": dict(self._fingerprints)})

    def to(self, device: torch.device | str) -> ClipEncoders:
        """Move the encoders."""
        for model in self._models.values():
            cast("nn.Module", model).to(device)
        return self

    def feature_fingerprint(self, modality: Modality) -> str:
        """See :class:`~mmemo.models.backbone.Backbone`."""
        return self._fingerprints[modality]

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """See :class:`~mmemo.models.backbone.Backbone`.

        Raises:
            MediaError: a clip has no such stream.
        """
        model, spec = self._models[modality], self.specs[modality]
        return [encoders.encode(model, spec, modality, clip) for clip in clips]


class ClipTokens(nn.Module):
    """The connectors, which write a clip's tokens into the places that wait for them."""

    def __init__(self, specs: Mapping[Modality, SavedBranchConfig], width: int) -> None:
        super().__init__()
        self.specs = specs
        self.connectors = nn.ModuleDict(
            {name: Connector(spec, width) for name, spec in specs.items()}
        )

    def forward(self, embeds: Tensor, clip: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """
        Args:
            embeds: (B, L, E) embeddings of the text.
            clip: (B, L) the modality id of each place of a clip's token, K for each modality that a
                row has; 0 for text.
            features: ``{modality}_features`` (B, T, D) and ``{modality}_features_mask`` (B, T).

        Returns:
            (B, L, E) with the clips' tokens.
        """
        for name, spec in self.specs.items():
            if f"{name}_features" not in features:
                layers = (spec.feature_layers,) if spec.feature_layers else ()
                empty = embeds.new_zeros((len(embeds), *layers, 1, spec.feature_size))
                mask = torch.zeros((len(embeds), 1), dtype=torch.bool, device=embeds.device)
                features = {
                    **features,
                    f"{name}_features": empty,
                    f"{name}_features_mask": mask,
                }
            tokens: Tensor = self.connectors[name](*streams(features, name))  # (B, K, E)
            here = clip == MODALITY_ID[name]
            rows = here.any(1)
            filled = embeds.masked_scatter(here[..., None], tokens[rows].to(embeds.dtype))
            # Every rank has a gradient for each weight, whatever its rows have.
            embeds = filled + (tokens * 0).sum().to(embeds.dtype)
        return embeds


def stream_samples(samples: Sequence[Sample], modalities: Sequence[Modality]) -> list[Sample]:
    """The rows with those streams only that the branches read, for the feature store."""
    return [
        Sample(
            sample_id=sample.sample_id,
            turns=sample.turns,
            media={name: sample.media[name] for name in modalities if name in sample.media},
            source=sample.source,
        )
        for sample in samples
    ]


class ClipFeatures:
    """The features of the clips of items: from the store, or else decoded, encoded and stored.

    ``counts``: ``no_clip`` (the item names none that a branch reads) and ``bad_clip`` (its features
    cannot be made), once for each item that asks.
    """

    def __init__(
        self,
        encoders: ClipEncoders,
        store: FeatureStore | None,
        limits: DecodeConfig,
        counts: Counter[str],
    ) -> None:
        self.encoders, self.counts = encoders, counts
        self._store, self._limits = store, limits
        self._sources: dict[str, FeatureSource] = {}
        # A clip that cannot be decoded may take until its time limit, for each of its completions.
        self._bad: set[ClipMedia] = set()

    def modalities(self, clip: ClipMedia | None) -> tuple[Modality, ...]:
        """The branches that the clip has a stream for."""
        return tuple(one for one in self.encoders.modalities if clip and getattr(clip, one))

    def get(self, clip: ClipMedia | None) -> dict[Modality, Features] | None:
        """The features of each modality; None, counted, where there is no clip or a bad one."""
        names = self.modalities(clip)
        if clip is None or not names:
            self.counts["no_clip"] += 1
            return None
        if clip not in self._bad:
            media: dict[Modality, MediaRef] = {}
            for name in names:
                span: ClipSpan = getattr(clip, name)
                media[name] = MediaRef(span.path, span.start, span.end)
            try:
                return self._source(clip.root).get(Sample("", (), media))
            except MediaError:
                self._bad.add(clip)
        self.counts["bad_clip"] += 1
        return None

    def flush(self) -> None:
        """Write the new features, which other runs can then read."""
        if self._store is not None:
            self._store.flush()

    def close(self) -> None:
        """End the decoding processes and flush the store."""
        for source in self._sources.values():
            source.close()

    def _source(self, root: str) -> FeatureSource:
        if root not in self._sources:
            backbone = cast("Backbone", self.encoders)
            made = FeatureSource((), backbone, self._store, Path(root), self._limits)
            self._sources[root] = made
        return self._sources[root]
