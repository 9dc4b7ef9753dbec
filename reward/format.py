"""Format: pays for completions of the form ``<think>...</think><answer>...</answer>``.

Range: 0 or 1. None: never.
Source: EmotionThinker's R_f (arXiv 2601.15668), as in R1-Omni and DeepSeek-R1. Each tag must occur
exactly once, with at least one word between each pair and nothing around them, so that an empty
form, a second answer and text behind the answer earn nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text, prompt_text
from mmemo.answers.prefill import behind
from mmemo.rewards.judge.rubric import cleaned

FORM_ONLY = True
"""Well-formed nonsense scores, because the contents of the tags are judged by other rewards."""


def tags(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    order: Sequence[str] = ("think", "answer"),
    **_: Any,
) -> list[float | None]:
    """1 or 0 per completion, which is read with the tag that its prompt ends with.

    Prompts that are messages (or empty) do not show what the chat template opens after them. There
    the first tag may be missing: a text that closes what it has not opened was opened by its
    prompt.

    Args:
        order: the tags, in the order in which they must occur.
    """
    texts = [
        _whole(prompt, completion_text(completion), order)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    # What is invisible, or only looks like a tag, is taken for what it looks like.
    return [
        float(_well_formed(text, order) and _well_formed(cleaned(text), order)) for text in texts
    ]


def gold(row: Mapping[str, Any]) -> str:
    """A well-formed completion."""
    return f"<think>The face and the voice agree.</think><answer>{row.get('label')}</answer>"


def _whole(prompt: Chat, text: str, order: Sequence[str]) -> str:
    if isinstance(prompt, str) and prompt:
        return behind(prompt_text(prompt), text)
    return text if f"<{order[0]}>" in text else f"<{order[0]}>{text}"


def _well_formed(text: str, order: Sequence[str]) -> bool:
    spans = r"\s*".join(rf"<{tag}>(.*?)</{tag}>" for tag in order)
    found = re.fullmatch(rf"\s*{spans}\s*", text, re.DOTALL)
    if found is None:
        return False
    # However a tag is spelt, such as "< Answer >", it is one.
    spelt = re.findall(rf"<\s*/?\s*(?:{'|'.join(map(re.escape, order))})\b", text, re.IGNORECASE)
    if len(spelt) != 2 * len(order):
        return False
    return all(re.search(r"[^\W_]", span) for span in found.groups())
