"""mmemo: multimodal LLMs that see the face, hear the voice and understand emotion.

What a script needs is importable from here; :mod:`mmemo.api` documents it. Importing the package
alone is cheap: torch and transformers load with the first of these names that is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmemo.errors import MmemoError

if TYPE_CHECKING:
    from mmemo.api import answer, evaluate, load_model, process_clip, score, train_model

__version__ = "0.4.0"
__all__ = [
    "MmemoError",
    "__version__",
    "answer",
    "evaluate",
    "load_model",
    "process_clip",
    "score",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("mmemo.api"), name)
    raise AttributeError(f"module 'mmemo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
