"""Format: is the completion ``<think>...</think><answer>...</answer>`` and nothing else?

EmotionThinker's R_f in {0, 1} (arXiv 2601.15668), as in R1-Omni and DeepSeek-R1. Each tag must
stand exactly once, with a word between each pair, so that an empty shell earns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text

FORM_ONLY = True
"""Well-formed nonsense scores: what is inside the tags is for other rewards to judge."""


def tags(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    order: Sequence[str] = ("think", "answer"),
    **_: Any,
) -> list[float | None]:
    """1 or 0 per completion.

    Args:
        order: the tags, in the order in which they must come.
    """
    return [float(_well_formed(completion_text(one), order)) for one in completions]


def gold(row: Mapping[str, Any]) -> str:
    """A completion of the right form."""
    return f"<think>The face and the voice agree.</think><answer>{row.get('label')}</answer>"


def _well_formed(text: str, order: Sequence[str]) -> bool:
    spans = r"\s*".join(rf"<{tag}>(.*?)</{tag}>" for tag in order)
    found = re.fullmatch(rf"\s*{spans}\s*", text, re.DOTALL)
    if found is None:
        return False
    marks = [mark for tag in order for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.lower().count(mark) != 1 for mark in marks):
        return False
    return all(re.search(r"\w", span) for span in found.groups())
