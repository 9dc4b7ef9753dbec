"""The text of prompts and completions, whichever of TRL's two forms they come in.

TRL gives rewards strings, or for chat data lists of ``{"role": ..., "content": ...}`` messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|\Z)", re.IGNORECASE | re.DOTALL)
_SPACE = re.compile(r"\s+")

Chat = str | Sequence[Mapping[str, Any]]
"""A prompt or a completion: plain text or messages."""


def completion_text(completion: Chat) -> str:
    """What the model wrote: the text of its messages, one after the other."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(turn) for turn in completion if turn.get("role") == "assistant")


def prompt_text(prompt: Chat) -> str:
    """What the model was shown, without the roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(_content(turn) for turn in prompt)


def think_text(text: str) -> str:
    """The first ``<think>`` span; where its end tag is missing, up to the answer or the end."""
    found = _THINK.search(text)
    return found.group(1).strip() if found else ""


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space."""
    return _SPACE.sub(" ", text).strip()


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        parts = cast("list[Mapping[str, Any]]", content)
        return "".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
    return "" if content is None else str(content)
