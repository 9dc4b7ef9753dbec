"""Qwen2-VL behind the backbone protocol, its own vision encoder kept.

Source: Wang et al., Qwen2-VL, arXiv 2409.12191, section 2.
"""

from __future__ import annotations

from transformers import Qwen2VLForConditionalGeneration

from mmemo.models.qwen.native import NativeModel
from mmemo.models.qwen.vl import QwenVLBackbone, QwenVLConfig


class Qwen2VLBackbone(QwenVLBackbone):
    """How Qwen2-VL's clips are encoded, its placeholders written and its positions counted.

    Its positions count frames, not seconds: ``get_rope_index`` ignores the seconds per grid row.
    """

    name = "Qwen2-VL"


class NativeQwen2VL(NativeModel, Qwen2VLForConditionalGeneration):  # pyright: ignore
    """Qwen2-VL."""

    backbone_kind = Qwen2VLBackbone
    settings_kind = QwenVLConfig
    encoder_names = ("visual",)
