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
from mmemo.models.qwen.vl import NativeVL

BACKBONES: Mapping[str, type[NativeModel]] = {
    "qwen2_5_omni": NativeThinker,
    "qwen2_5_omni_thinker": NativeThinker,
    "qwen2_5_vl": NativeVL,
}
"""``model_type`` of a checkpoint to the class that loads it. Qwen2.5-Omni is loaded from the whole
checkpoint or from that of its Thinker alone."""

ENCODER_NAMES: frozenset[str] = frozenset(
    {*TOWER.values(), *(name for kind in BACKBONES.values() for name in kind.encoder_names)}
)
"""Attribute names of frozen encoders, in composed and native models."""
