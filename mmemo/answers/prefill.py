"""What a chat template's generation prompt already opens for the model: ``<think>``.

The templates of Qwen3-Thinking, DeepSeek-R1 and others end the generation prompt with ``<think>``,
so a completion holds only ``</think>``. Whatever reads completions needs the whole text. Templates
of this family also rewrite the reasoning of assistant turns or remove it, so an answer to train on
is compared with what the template made of it, and is written out here if the template lost it.
"""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|reasoning|reason|answer"
_TAG = re.compile(rf"<(/?)({_NAMES})>", re.IGNORECASE)
_LAST_TAG = re.compile(rf"<({_NAMES})>\s*\Z", re.IGNORECASE)
_SPACED_TAG = re.compile(rf"\s*(</?(?:{_NAMES})>)\s*", re.IGNORECASE)


def opened_tag(text: str) -> str | None:
    """The last tag of reasoning or answer that ``text`` opens and does not close, as written."""
    opened: list[str] = []
    for found in _TAG.finditer(text):
        if not found.group(1):
            opened.append(found.group())
        elif opened and opened[-1].lower() == f"<{found.group(2).lower()}>":
            opened.pop()
    return opened[-1] if opened else None


def opened_part(generation_prompt: str) -> str:
    """The end of a generation prompt from its first tag on, if it leaves a tag open; else empty.

    Args:
        generation_prompt: what the template appends to a chat that asks for an answer.
    """
    first = _TAG.search(generation_prompt)
    if first is None or opened_tag(generation_prompt) is None:
        return ""
    return generation_prompt[first.start() :]


def behind(prompt: str, completion: str) -> str:
    """A completion with the tag that its prompt ends with, unless it begins with that tag itself.

    For prompts as TRL passes them to rewards. A tag that the prompt only speaks of is not at its
    end.
    """
    found = _LAST_TAG.search(prompt)
    if found is None or completion.lstrip().lower().startswith(f"<{found.group(1).lower()}>"):
        return completion
    return found.group() + completion


def has_reasoning(text: str) -> bool:
    """Whether a text holds a tag of reasoning or answer."""
    return _TAG.search(text) is not None


def says_all(rendered: str, content: str) -> bool:
    """Whether a rendered turn holds the content, apart from whitespace around tags."""
    return _squeezed(content) in _squeezed(rendered)


def continuation(content: str, opened: str) -> str:
    """An answer as the model has to write it after ``opened``.

    The tags that ``opened`` has written already are left out. An answer without reasoning closes
    it at once, as Qwen's own templates do.
    """
    tag = opened_tag(opened)
    if tag is None:
        return content
    body = content.lstrip()
    # `opened` may be a closed <think> and an <answer>, and the answer may repeat both or neither.
    for written in re.findall(_TAG, opened):
        mark = f"<{written[0]}{written[1]}>"
        if body.lower().startswith(mark.lower()):
            body = body[len(mark) :].lstrip()
    close = f"</{tag[1:]}"
    if close.lower() not in body.lower():
        body = f"{body}{close}" if tag.lower() == "<answer>" else f"\n{close}\n\n{body}"
    return body


def _squeezed(text: str) -> str:
    return _SPACED_TAG.sub(lambda found: found.group(1).lower(), text.strip())
