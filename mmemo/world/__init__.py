"""A synthetic audiovisual world with known truth: faces, voices and scenes."""

from mmemo.world.config import WorldConfig

__all__ = ["WorldConfig"]
