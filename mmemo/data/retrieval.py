"""Passages of a long text that are most like a question: BM25 (Robertson and Zaragoza, 2009).

It needs no model and no download, so that prompts with retrieved passages can be made anywhere.
Words stand for tokens. Scripts without spaces are taken apart by character.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_K1, _B = 1.5, 0.75


def passages(text: str, size: int = 128, overlap: int = 0) -> list[str]:
    """The text in passages of ``size`` words, each of which begins ``overlap`` words before the
    end of the one before. Together they hold the whole text.

    Raises:
        ValueError: ``size`` is not above ``overlap``.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap is {overlap} and size {size}; size must be larger")
    starts = [word.start() for word in _WORD.finditer(text)]
    found: list[str] = []
    for first in range(0, len(starts), size - overlap):
        begin = starts[first] if first else 0
        end = starts[first + size] if first + size < len(starts) else len(text)
        found.append(text[begin:end].strip())
        if first + size >= len(starts):
            break
    return found or ([text.strip()] if text.strip() else [])


def best(parts: Sequence[str], query: str, top: int) -> list[int]:
    """Places of the ``top`` parts that are most like the query, in the order of the text. Ties go
    to the earlier part."""
    counts = [Counter(_words(part)) for part in parts]
    lengths = [sum(one.values()) for one in counts]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    scores = [0.0] * len(parts)
    for word in set(_words(query)):
        having = sum(word in one for one in counts)
        rarity = math.log(1 + (len(parts) - having + 0.5) / (having + 0.5))
        for place, one in enumerate(counts):
            often = one[word]
            norm = _K1 * (1 - _B + _B * lengths[place] / mean)
            scores[place] += rarity * often * (_K1 + 1) / (often + norm)
    order = sorted(range(len(parts)), key=lambda place: (-scores[place], place))
    return sorted(order[:top])


def retrieved(text: str, query: str, top: int = 4, size: int = 128, overlap: int = 0) -> str:
    """The passages of a text that are most like the query, in its order, a blank line apart."""
    parts = passages(text, size, overlap)
    return "\n\n".join(parts[place] for place in best(parts, query, top))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
