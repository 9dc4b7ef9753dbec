"""The native backbones: which ``model_type`` of a checkpoint loads as which class.

A model that is built from parts (:mod:`mmemo.models.composed`) needs no entry: it takes any causal
LM. To add a native backbone, write one file beside :mod:`mmemo.models.qwen.vl`, the shortest
example, with

- a config of what its encoders are fed (``settings_kind``),
- a class that encodes clips, writes placeholders and counts positions (``backbone_kind``),
- a class of :class:`~mmemo.models.qwen.native.NativeModel` and transformers' own model,

and add a row to :data:`BACKBONES`. Inputs per clip beside ``{modality}_features`` that its
positions need are listed in :data:`mmemo.models.generation.NATIVE`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mmemo.models.composed.configuration import TOWER
from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.omni import NativeThinker
from mmemo.models.qwen.qwen2_audio import NativeQwen2Audio
from mmemo.models.qwen.qwen2_vl import NativeQwen2VL
from mmemo.models.qwen.qwen3_omni import NativeQwen3Omni
from mmemo.models.qwen.qwen3_vl import NativeQwen3VL
from mmemo.models.qwen.vl import NativeVL

BACKBONES: Mapping[str, type[NativeModel]] = {
    "qwen2_5_omni": NativeThinker,
    "qwen2_5_omni_thinker": NativeThinker,
    "qwen2_5_vl": NativeVL,
    "qwen2_audio": NativeQwen2Audio,
    "qwen2_vl": NativeQwen2VL,
    "qwen3_omni_moe": NativeQwen3Omni,
    "qwen3_omni_moe_thinker": NativeQwen3Omni,
    "qwen3_vl": NativeQwen3VL,
}
"""``model_type`` of a checkpoint to the class that loads it. The Omni models are loaded from the
whole checkpoint or from that of their Thinker alone."""

ENCODER_NAMES: frozenset[str] = frozenset(
    {*TOWER.values(), *(name for kind in BACKBONES.values() for name in kind.encoder_names)}
)
"""Attribute names of frozen encoders, in composed and native models."""
