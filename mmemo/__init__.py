"""mmemo: multimodal LLMs that see the face, hear the voice and understand emotion."""

__version__ = "0.2.0"
__all__ = ["__version__"]
