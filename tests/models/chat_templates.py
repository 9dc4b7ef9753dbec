"""Chat templates of the kinds that reasoning models come with, in the special tokens of the tests.

They do what the published templates do with reasoning, in words of our own.
"""

from __future__ import annotations

_TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
_END = "{{ '<|im_end|>\\n' }}"
_SPLIT = (
    "{% set parts = m.content.split('</think>') %}"
    "{% set said = parts[-1].lstrip('\\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
)


def _template(turn: str, opens: str) -> str:
    prompt = (
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + opens + "' }}{% endif %}"
    )
    return "{% for m in messages %}" + turn + "{% endfor %}" + prompt


_QWEN3 = (
    _TURN + "{% if m.role == 'assistant' and loop.last %}" + _SPLIT + "{{ '<think>\\n' + thought + "
    "'\\n</think>\\n\\n' + said }}{% elif m.role == 'assistant' %}" + _SPLIT + "{{ said }}"
    "{% else %}{{ m.content }}{% endif %}" + _END
)
QWEN3 = _template(_QWEN3, "")
"""Writes reasoning of the last turn on lines of its own, and opens nothing."""
QWEN3_THINKING = _template(_QWEN3, "<think>\\n")
QWEN3_NOT_THINKING = _template(_QWEN3, "<think>\\n\\n</think>\\n\\n")
R1 = _template(_TURN + _SPLIT + "{{ said }}" + _END, "<think>\\n")
"""Removes the reasoning of every assistant turn, and opens it in the generation prompt."""
DOUBLED = _template(
    _TURN + "{{ ('<think>\\n' if m.role == 'assistant' else '') + m.content }}" + _END,
    "<think>\\n",
)
"""Writes the opened tag before every answer, also one that has it."""
PREFILLED = _template(_TURN + "{{ m.content }}" + _END, "<think>\\n")
"""Opens the tag in the generation prompt alone."""
PLAIN = _template(_TURN + "{{ m.content }}" + _END, "")
