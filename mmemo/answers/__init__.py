"""Text to an answer: parsing, labels, messages, claims and emotion wheels."""

from mmemo.answers.parsing import LabelSet, Parsed, parse

__all__ = ["LabelSet", "Parsed", "parse"]
