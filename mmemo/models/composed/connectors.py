"""Trainable connectors, which map features of a frozen encoder to a fixed number of LM tokens.

Shapes: N clips, T feature steps, D the encoder's width, K tokens of the branch, E the LM's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmemo.data.collate import pad_features
from mmemo.data.sample import MODALITIES, Modality
from mmemo.errors import DataError
from mmemo.models.backbone import FeatureBatch, Features
from mmemo.models.composed.configuration import MmemoConfig, SavedBranchConfig
from mmemo.models.composed.fusion import Stream, build_fusion, part_weights


class Connector(nn.Module):
    """Pools the feature steps of a clip into K tokens and projects them to the LM's width."""

    def __init__(self, spec: SavedBranchConfig, out: int) -> None:
        super().__init__()
        self.tokens, self.score = spec.tokens, spec.score
        self.entrance = Stream(spec.feature_size, spec.feature_layers, spec.norm)
        attention = spec.pooling == "attention"
        self.scores = nn.Linear(spec.feature_size, spec.tokens) if attention else None
        if spec.connector == "linear":
            self.proj = nn.Sequential(nn.Linear(spec.feature_size, out))
        else:
            self.proj = nn.Sequential(
                nn.Linear(spec.feature_size, out), nn.GELU(), nn.Linear(out, out)
            )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.proj.parameters()).dtype

    def pooling_weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """The weight of each step in each token: (N, T, D), (N, T) -> (N, K, T)."""
        if self.scores is None:
            return part_weights(mask, self.tokens).to(x.dtype)
        scores = self.scores(x).transpose(1, 2)  # (N, K, T)
        valid = mask.unsqueeze(1)
        if self.score == "softmax":
            # Not -inf, because a clip without a valid step would become NaN.
            scores = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1)
        # The linear score knows no mask, and the softmax of a clip without a valid step is uniform.
        return scores * valid

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, [layers,] T, D) and (N, T) with the valid steps first -> (N, K, E)."""
        # Features may be stored in half precision, but connectors are float32.
        x = self.entrance(x.to(self.dtype))
        return self.proj(torch.einsum("nkt,ntd->nkd", self.pooling_weights(x, mask), x))


class Connectors(nn.Module):
    """The connectors of all branches, in one module so that PEFT can save them together."""

    def __init__(self, config: MmemoConfig, out: int) -> None:
        super().__init__()
        self.modalities = config.modalities
        for name in self.modalities:
            # `set_trainable` reads the modality from the names of the weights.
            self.add_module(name, Connector(config.branch(name), out))

    def forward(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Map each modality that has features in the batch to its tokens (N, K, E)."""
        return {
            name: self.get_submodule(name)(*streams(features, name))
            for name in self.modalities
            if f"{name}_features" in features
        }


class Fusion(nn.Module):
    """The pre-fusion branch of a model, which reads a feature batch."""

    def __init__(self, config: MmemoConfig, out: int) -> None:
        super().__init__()
        settings, visual = config.fusion_settings, config.fusion_visual
        if settings is None or visual is None:
            raise ValueError("the config has no fusion branch")
        self.visual: Modality = visual
        sizes = [
            (spec.feature_size, spec.feature_layers)
            for spec in (config.branch(visual), config.branch("audio"))
        ]
        self.fuse = build_fusion(settings, sizes[0], sizes[1], out)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.fuse.proj.parameters()).dtype

    def forward(self, features: FeatureBatch) -> Tensor:
        """Tokens (N, K, E) for every clip. They are only meaningful for clips with both streams."""
        visual, v_mask = streams(features, self.visual)
        audio, a_mask = streams(features, "audio")
        return self.fuse(visual.to(self.dtype), v_mask, audio.to(self.dtype), a_mask)


def streams(features: FeatureBatch, modality: str) -> tuple[Tensor, Tensor]:
    """The features and mask (N, T) bool of one modality. Without a mask, all steps are valid."""
    x = features[f"{modality}_features"]
    mask = features.get(f"{modality}_features_mask")
    if mask is None:
        mask = torch.ones((x.shape[0], x.shape[-2]), dtype=torch.bool, device=x.device)
    return x, mask.bool()


def dummy_features(config: MmemoConfig, like: Tensor, present: FeatureBatch) -> dict[str, Tensor]:
    """One masked step of zeros for each modality that the batch lacks.

    Every rank must run every connector: under ZeRO-3 and DDP, a rank that skips one would make the
    other ranks wait forever.
    """
    found: dict[str, Tensor] = {}
    clips = next(
        (len(present[f"{m}_features"]) for m in MODALITIES if f"{m}_features" in present), 1
    )
    for name in config.modalities:
        if f"{name}_features" in present:
            continue
        spec = config.branch(name)
        layers = (spec.feature_layers,) if spec.feature_layers else ()
        shape = (clips, *layers, 1, spec.feature_size)
        found[f"{name}_features"] = torch.zeros(shape, device=like.device, dtype=like.dtype)
        found[f"{name}_features_mask"] = torch.zeros(
            (clips, 1), dtype=torch.bool, device=like.device
        )
    return found


def collate_features(clips: Sequence[Mapping[Modality, Features]]) -> dict[str, Tensor]:
    """Pad the features of N clips to one batch.

    Returns:
        ``{modality}_features`` (N, [layers,] T, D) and ``{modality}_features_mask`` (N, T) bool
        for each modality that any clip has. A clip without it is zero and fully masked.

    Raises:
        DataError: the features of two clips have different widths for the same modality.
    """
    batch: dict[str, Tensor] = {}
    for name in MODALITIES:
        found = [clip[name]["x"] if name in clip else None for clip in clips]
        if all(x is None for x in found):
            continue
        try:
            features, mask = pad_features(found)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        batch[f"{name}_features"], batch[f"{name}_features_mask"] = features, mask
    return batch
