"""The text of prompts and completions in either of TRL's two formats.

TRL passes strings to reward functions or, for conversational data, lists of messages
``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|\Z)", re.IGNORECASE | re.DOTALL)
_OPENED_BEFORE = re.compile(r"((?:(?!<think>).)*?)</think>", re.IGNORECASE | re.DOTALL)
"""Reasoning whose ``<think>`` stands in the prompt, as TRL hands it to rewards."""
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


def think_text(text: str) -> str:
    """The first ``<think>`` span. Without an end tag it ends at the answer or with the text.

    Text before a ``</think>`` that nothing opens is such a span: the prompt has opened it.
    """
    found = _OPENED_BEFORE.match(text) or _THINK.search(text)
    return found.group(1).strip() if found else ""


def one_line(text: str) -> str:
    """``text`` with every run of whitespace replaced by one space."""
    return _SPACE.sub(" ", text).strip()


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        parts = cast("list[Mapping[str, Any]]", content)
        return "".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
    return "" if content is None else str(content)
