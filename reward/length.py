"""Length: pays for the number of words, whatever they say. Deliberately hackable, for studies only.

Range: 0 to 1. None: never.
Source: none; the most common failure of learned judges is to favour long answers. This reward has
that failure and nothing else, so that a study can show what happens to a policy under it, and what
trust (``trust`` in a GRPO config) does about it. Never use it to train a model for real use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text


def length(
    prompts: Sequence[Chat], completions: Sequence[Chat], *, full_words: int = 60, **_: Any
) -> list[float]:
    """0 to 1 per completion: its number of words divided by ``full_words``, at most 1."""
    return [min(1.0, len(completion_text(one).split()) / full_words) for one in completions]


def wrong_on_purpose(params: Mapping[str, Any]) -> str:
    """Always wrong: any filler of ``full_words`` words gets the maximum score."""
    return "it pays for the number of words alone, so any filler gets the maximum score"
