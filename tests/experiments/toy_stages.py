"""Toy stages for pipelines and studies: one that makes, one that evaluates and keeps answers."""

from __future__ import annotations

from mmemo.config import Config
from mmemo.stages import Stage


class ToyConfig(Config):
    output_dir: str
    source: str | None = None
    value: float = 0
    mood: str = ""
    """``fail`` until ``<log>.mended`` is there; ``sleep`` until ``<log>.awake`` is."""


def unused(config: ToyConfig) -> None:
    """The tests hand in a runner of their own."""
    raise AssertionError(config)


MAKE = Stage("toy-make", config=ToyConfig, run=unused)
EVAL = Stage("toy-eval", config=ToyConfig, run=unused, keeps_answers=True)
