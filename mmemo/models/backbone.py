"""The protocol through which the rest of mmemo uses a multimodal LLM.

Shapes: N clips in the batch, B rows, L tokens of a row, T feature steps, D the encoder's width,
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
"""Features of one clip and modality, from the frozen encoder. ``x`` is (T, D), or (layers, T, D)
for a learned layer mix; small extra tensors, such as a patch grid, have other names."""

FeatureBatch = Mapping[str, Tensor]
"""The collated features of a batch: ``{modality}_features`` (N, T, D) and
``{modality}_features_mask`` (N, T) for each modality, and ``clip_index`` (B,) from row to clip.
A native backbone adds further names (grids, lengths)."""

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
    """A model with frozen encoders, trainable connectors and a language model."""

    sampling: SamplingConfig

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What prompts may contain."""
        ...

    def feature_fingerprint(self, modality: Modality) -> str:
        """Hash of everything but the clip that determines this modality's features: settings of the
        preprocessor, layer, pooling, encoder weights, dtype."""
        ...

    def encode(self, modality: Modality, clips: Sequence[DecodedClip]) -> list[Features]:
        """Outputs of the frozen encoder, one per clip, on the CPU and without gradient. They are
        bit-identical whatever else is in ``clips``, so stored features never depend on batching."""
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
        """Position ids for the language model: (B, L), or (3, B, L) for M-RoPE."""
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


def prompt_positions(backbone: Backbone, batch: Mapping[str, Any]) -> Tensor:
    """Position ids of a collated batch: (B, L), or (3, B, L) for M-RoPE.

    They never change, so every pass uses those that the collator made, ``mrope_positions``
    (B, 3, L). They are counted anew without these, and where rows have grown since.
    """
    ids: Tensor = batch["input_ids"]
    given: Tensor | None = batch.get("mrope_positions")
    if given is not None and (len(given), given.shape[-1]) == tuple(ids.shape):
        return given.transpose(0, 1)
    mask: Tensor | None = batch.get("attention_mask")
    return backbone.positions(ids, ids.new_ones(ids.shape) if mask is None else mask, batch)


def layer_inputs(
    backbone: Backbone, modality_ids: Tensor, features: FeatureBatch
) -> dict[str, Any]:
    """Keyword arguments of the language model for features that enter it behind its first layers.

    They are empty for most models. ``modality_ids`` (B, L) are those of the tokens of the pass.
    """
    made: Any = getattr(backbone, "layer_inputs", None)
    return {} if made is None else made(modality_ids, features)
