"""A face branch on a native model: a frozen encoder of face crops, and a trained connector.

The encoder and the connector are those of a model that is built from parts
(:mod:`mmemo.models.composed`); the place of the tokens is that of every branch
(:mod:`mmemo.models.qwen.branch`).

A face encoder beside a video MLLM is the form of Omni-Emotion (arXiv 2501.09502), whose details are
not public; the place of the tokens and the zero start are ours.

Shapes: N clips in the batch, K tokens of the branch, E the LM's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmemo.config import dump, parse
from mmemo.data.sample import Modality
from mmemo.media.clip import DecodedClip
from mmemo.models.backbone import FeatureBatch, Features
from mmemo.models.composed import encoders
from mmemo.models.composed.configuration import BranchBaseConfig, SavedBranchConfig
from mmemo.models.composed.connectors import Connector, streams
from mmemo.models.config import BranchConfig
from mmemo.models.qwen.branch import Branch

TOWER = "face_tower"


class FaceConnectors(nn.Module):
    """The trained part of the branch, by the name under which PEFT saves a model's connectors."""

    def __init__(self, spec: SavedBranchConfig, width: int) -> None:
        super().__init__()
        self.face = Connector(spec, width)
        last: Any = self.face.proj[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: FeatureBatch) -> Tensor:
        """(N, K, E)."""
        return self.face(*streams(features, "face"))


class FaceBranch(Branch):
    """The face of a clip."""

    name = "face"
    part = "connectors"
    frozen = (TOWER,)

    def __init__(
        self,
        model: Any,
        token: str,
        loaded: encoders.LoadedEncoder,
        source: Mapping[str, str | None],
    ) -> None:
        """``source``: where the encoder came from (:func:`~mmemo.models.saved.part_source`)."""
        super().__init__(model, token)
        self.spec, self.source = loaded.spec, source
        width = model.get_input_embeddings().weight.shape[1]
        setattr(model, TOWER, loaded.model)
        setattr(model, self.part, FaceConnectors(loaded.spec, width))

    @classmethod
    def load(
        cls, model: Any, token: str, record: Mapping[str, Any], place: Path, dtype: torch.dtype
    ) -> FaceBranch:
        """The branch that was saved in ``place``, with a new connector."""
        spec = parse(SavedBranchConfig, record["spec"], where=str(place))
        settings = {key: getattr(spec, key) for key in BranchBaseConfig.model_fields}
        own = {"encoder": str(place / TOWER), "preprocessor": spec.preprocessor}
        branch = parse(BranchConfig, {**settings, **own}, where=str(place))
        loaded = encoders.load_encoder("face", branch, model.sampling, dtype)
        return cls(model, token, loaded, dict(record["source"]))

    @property
    def tokens(self) -> int:
        return self.spec.tokens

    @property
    def needs(self) -> tuple[Modality, ...]:
        return ("face",)

    def sizes(self) -> Mapping[Modality, tuple[int, int]]:
        return {"face": (self.spec.feature_size, self.spec.feature_layers)}

    def record(self) -> dict[str, Any]:
        return {"spec": dump(self.spec), "source": dict(self.source)}

    @property
    def encoder(self) -> Any:
        """The frozen encoder."""
        return getattr(self.model, TOWER)

    def fingerprint(self) -> str:
        """See :meth:`~mmemo.models.backbone.Backbone.feature_fingerprint`."""
        return encoders.fingerprint(self.encoder, self.spec, "face")

    def encode(self, clips: Sequence[DecodedClip]) -> list[Features]:
        """See :func:`mmemo.models.composed.encoders.encode`."""
        return [encoders.encode(self.encoder, self.spec, "face", clip) for clip in clips]
