"""What a stage reads: rows of clips and the model that encodes them.

``mmemo check`` and ``mmemo encode`` work on these, whatever stage the config is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmemo.data.manifest import DataConfig
from mmemo.data.sample import Sample
from mmemo.media.config import DecodeConfig, StoreConfig
from mmemo.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ClipRows:
    """Rows of one section of a config, and what is needed to find their clips."""

    data: DataConfig
    samples: Sequence[Sample]
    title: str = ""
    """Names the section where it is not ``data`` itself: ``eval_data``."""


@dataclass(frozen=True, slots=True)
class StageInputs:
    """Everything that a stage reads through an encoder. ``parts`` begins with the rows of the
    config's ``data``."""

    output_dir: str
    """The stage's folder. The feature store lies beside it unless ``store.path`` says otherwise."""
    model: ModelConfig
    parts: Sequence[ClipRows]
    texts: Sequence[str]
    """What the stage trains a tokenizer on, if it makes one from scratch."""
    decode: DecodeConfig
    store: StoreConfig
