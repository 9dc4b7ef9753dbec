"""A synthetic audiovisual world whose truth is known: faces, voices, scenes, and who is right."""

from mmemo.world.config import WorldConfig

__all__ = ["WorldConfig"]
