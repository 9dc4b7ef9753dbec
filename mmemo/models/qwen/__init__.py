"""Qwen2.5-Omni and Qwen2.5-VL as backbones."""
