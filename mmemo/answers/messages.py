"""The text of prompts and completions in either of TRL's two formats.

TRL passes strings to reward functions or, for conversational data, lists of messages
``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mmemo.answers.completion import think_text

__all__ = ["Chat", "completion_text", "one_line", "prompt_text", "think_text"]

_SPACE = re.compile(r"\s+")

Chat = str | Sequence[Mapping[str, Any]]
"""A prompt or a completion: plain text or messages."""


def completion_text(completion: Chat) -> str:
    """The text that the model wrote: its messages, joined by newlines."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(turn) for turn in completion if turn.get("role") == "assistant")


def prompt_text(prompt: Chat) -> str:
    """The text that the model was shown, without the roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_content(turn) for turn in prompt)


def one_line(text: str) -> str:
    """``text`` with every run of whitespace replaced by one space."""
    return _SPACE.sub(" ", text).strip()


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        parts = cast("list[Mapping[str, Any]]", content)
        return "".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
    return "" if content is None else str(content)
