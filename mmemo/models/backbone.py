"""The small protocol through which the rest of the house knows a multimodal LLM.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps, D the tower's width,
E the language model's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from mmemo.data.sample import Modality
from mmemo.media.clip import DecodedClip
from mmemo.media.config import SamplingConfig

Features = dict[str, Tensor]
"""One clip and modality after the frozen tower. ``x`` is (T, D), or (layers, T, D) for a learned
layer mix; further small tensors (a grid, a face-found flag) sit beside it under other names."""

FeatureBatch = Mapping[str, Tensor]
"""The collated features of a batch: ``{modality}_features`` (N, T, D) and
``{modality}_features_mask`` (N, T) for each modality, and ``clip_index`` (B,) from row to clip.
A native backbone adds its own names (grids, lengths) beside them."""

TEXT, VIDEO, AUDIO, FACE, FUSION = range(5)
"""Values of ``modality_ids``, per token."""

MODALITY_ID: Mapping[str, int] = {
    "text": TEXT,
    "video": VIDEO,
    "audio": AUDIO,
    "face": FACE,
    "fusion": FUSION,
}


class Backbone(Protocol):
    """A model with frozen towers, trainable connectors and a language model."""

    sampling: SamplingConfig
    modalities: tuple[Modality, ...]

    def feature_fingerprint(self, modality: Modality) -> str:
        """Hash of all that makes this modality's features what they are, apart from the clip:
        processor settings, layer, pooling, tower weights, dtype."""
        ...

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """Frozen tower outputs, one per clip, on the CPU. No gradient. Bit-identical whatever
        else is in ``clips``, so that the store never depends on batching."""
        ...

    def connect(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Embeddings for the language model, modality -> (N, tokens, E). Trainable."""
        ...

    def embed(self, input_ids: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """Token embeddings (B, L, E) with the placeholders filled from ``connect``."""
        ...

    def positions(
        self, input_ids: Tensor, attention_mask: Tensor, features: FeatureBatch
    ) -> Tensor:
        """Position ids as the language model wants them: (B, L), or (3, B, L) for M-RoPE."""
        ...

    @property
    def language_model(self) -> nn.Module:
        """The decoder stack: ``inputs_embeds``, ``position_ids`` -> ``last_hidden_state``."""
        ...

    @property
    def lm_head(self) -> nn.Module:
        """One linear layer from hidden states to the vocabulary."""
        ...

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, V) from a collated batch."""
        ...
