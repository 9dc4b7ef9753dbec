"""A pre-fusion branch on a native model: picture and sound are combined before the LM reads them.

The module is that of a model that is built from parts (:mod:`mmemo.models.composed.fusion`). It
reads what the model's own frozen encoders say, at the LM's width, or the face's features in place
of the picture's.

Source: AffectGPT (ICML 2025), which pre-fuses the encoders' outputs in a model of its own; on a
native model, the place of the tokens and the zero start are ours.

Shapes: N clips in the batch, K tokens of the branch, E the LM's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmemo.config import dump
from mmemo.data.sample import Modality
from mmemo.errors import ConfigError
from mmemo.models.backbone import FeatureBatch
from mmemo.models.composed.configuration import FusionConfig
from mmemo.models.composed.connectors import streams
from mmemo.models.composed.fusion import QFormerFusion, build_fusion
from mmemo.models.qwen.branch import Branch


class NativeFusion(nn.Module):
    """The trained part of the branch."""

    def __init__(
        self,
        settings: FusionConfig,
        side: Modality,
        sizes: Mapping[Modality, tuple[int, int]],
        width: int,
    ) -> None:
        super().__init__()
        self.side: Modality = side
        self.fuse = build_fusion(settings, sizes[side], sizes["audio"], width)
        if isinstance(self.fuse, QFormerFusion):
            nn.init.normal_(self.fuse.queries, std=0.02)
            nn.init.normal_(self.fuse.positions, std=0.02)
        nn.init.zeros_(self.fuse.proj.weight)
        nn.init.zeros_(self.fuse.proj.bias)

    def forward(self, features: FeatureBatch) -> Tensor:
        """(N, K, E); only meaningful for clips with both streams."""
        dtype = self.fuse.proj.weight.dtype
        visual, v_mask = streams(features, self.side)
        audio, a_mask = streams(features, "audio")
        return self.fuse(visual.to(dtype), v_mask, audio.to(dtype), a_mask)


class FusionBranch(Branch):
    """Picture, or face, and sound of a clip."""

    name = "fusion"
    part = "fusion"

    def __init__(self, model: Any, token: str, settings: FusionConfig) -> None:
        """
        Raises:
            ConfigError: the model does not have both streams.
        """
        super().__init__(model, token)
        known: tuple[Modality, ...] = model.modalities
        self.side: Modality = settings.visual or ("video" if "video" in known else "face")
        if not {self.side, "audio"} <= set(known):
            raise ConfigError(
                f"fusion joins {self.side} and audio, but {model.backbone.name} has "
                f"{' and '.join(known)}; leave fusion out, or use a model with both"
            )
        self.settings = settings
        width = model.get_input_embeddings().weight.shape[1]
        setattr(model, self.part, NativeFusion(settings, self.side, self.sizes(), width))

    @property
    def tokens(self) -> int:
        return self.settings.tokens

    @property
    def needs(self) -> tuple[Modality, ...]:
        return (self.side, "audio")

    def sizes(self) -> Mapping[Modality, tuple[int, int]]:
        width = self.model.get_input_embeddings().weight.shape[1]
        face = self.model.backbone.face
        own = (width, 0)
        side = face.sizes()["face"] if self.side == "face" else own
        return {self.side: side, "audio": own}

    def record(self) -> dict[str, Any]:
        return {"settings": dump(self.settings)}
