"""The parts of a generated text: its reasoning, and the answer outside or behind it.

Reasoning stands in ``<think>`` or a tag of the same kind, of which models write several
(:data:`REASONING_TAGS`, and the channels and brackets of :data:`_SPELLINGS`). A chat template may
open the tag in the prompt, so a closing tag alone ends reasoning as well, and everything before it
is reasoning. Reasoning that is never closed is not read as an answer.
"""

from __future__ import annotations

import re
import unicodedata

from mmemo.answers.words import simplified

REASONING_TAGS = (
    *("think", "thinking", "thought", "thoughts", "reasoning", "reason", "reflection", "analysis"),
    *("rationale", "scratchpad", "seed:think"),
)
"""Tags whose contents are reasoning, in any case."""

_NAMES = "|".join(sorted(map(re.escape, REASONING_TAGS), key=len, reverse=True))
# Opened and closed: tags, Kimi's and Mistral's brackets, Cohere's tokens, and the channels of
# gpt-oss, whose last channel is the answer. Full-width brackets are the same tags.
_SPELLINGS = (
    (rf"[<＜]\s*(?:{_NAMES})\s*[>＞]", rf"[<＜]\s*[/／]\s*(?:{_NAMES})\s*[>＞]"),
    (r"◁think▷", r"◁/think▷"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (
        r"<\|channel\|>\s*(?:analysis|commentary)\s*<\|message\|>",
        r"<\|channel\|>\s*final\s*<\|message\|>",
    ),
)
_OPEN = "|".join(opened for opened, _ in _SPELLINGS)
_CLOSE = "|".join(closed for _, closed in _SPELLINGS)
_REASONING = re.compile(rf"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
_MARKS = "<＜◁["  # what every tag begins with
_ANSWER = re.compile(r"[<＜]\s*answer\s*[>＞]", re.IGNORECASE)
_ANSWER_END = re.compile(r"[<＜]\s*[/／]\s*answer\s*[>＞]", re.IGNORECASE)

_BOX = re.compile(r"<\|begin_of_box\|>(.*?)(?:<\|end_of_box\|>|\Z)", re.DOTALL)
_TOKENS = re.compile(r"<\|[\w/ :.-]{1,40}\|>|</?s>|\[/?INST\]|<(?:eos|bos|pad|end_of_turn)>")
_JOINED = re.compile(r"(?<=[^\W_])_+(?=[^\W_])")
_NOT = re.compile(r"(?:(?<=\s)|\A|(?<=>))[!¬](?=\w)")
_CROSSES = re.compile(r"[❌✗✘✖☐☒❎🚫⛔🙅⬜◻□🔲]|(?<!\w)\[ \](?=\s)")
_STRUCK = re.compile(r"~~[^~\n]{1,200}~~|<(del|s|strike)>[^<\n]{1,200}</\1>", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;。！？；\n]+")
_MINUS = re.compile(r"[−﹣－](?=\d)")
_LONGEST = 12_000  # characters; the middle of a longer answer is not read


def parts(text: str, *, reasoning_opened: bool = False) -> tuple[str, str | None]:
    """The reasoning of a generated text and what is outside it.

    Args:
        reasoning_opened: whether the prompt ended inside an opened reasoning tag, so that a text
            that closes none is cut-off reasoning.

    Returns:
        The reasoning, and the rest; None instead of the rest if reasoning was cut off and nothing
        stands before it.
    """
    if not reasoning_opened and not any(mark in text for mark in _MARKS):
        return "", text
    reasoning, rest, start, opened = "", "", 0, reasoning_opened
    for tag in _REASONING.finditer(text):
        piece = text[start : tag.start()]
        if tag.group("open") is not None:
            if opened:
                reasoning += piece
            else:
                rest += piece
            opened = True
        elif opened:
            reasoning, opened = reasoning + piece, False
        else:
            # Closed, but not opened here: the prompt opened it, and all so far is reasoning.
            reasoning, rest = reasoning + rest + piece, ""
        start = tag.end()
    if opened:
        reasoning += text[start:]
        return reasoning, rest if rest.strip() else None
    return reasoning, rest + text[start:]


def without_tags(text: str) -> str:
    """A text with a space in place of each tag of reasoning or answer."""
    for tag in (_REASONING, _ANSWER, _ANSWER_END):
        text = tag.sub(" ", text)
    return text


def answer_text(text: str, *, reasoning_opened: bool = False) -> str:
    """The answer inside a generation, without its reasoning and tags.

    The text in the last ``<answer>`` outside reasoning counts, up to its end tag, or to the end if
    the generation was cut off. Without the tag, all text outside reasoning counts.
    """
    reasoning, rest = parts(text, reasoning_opened=reasoning_opened)
    found = _in_tags(rest or "")
    if found is not None:
        return found
    if rest is not None and rest.strip():
        return rest.strip()
    # Some models answer before they close their reasoning, or never close it. This counts only at
    # the very end, because reasoning may also talk about the tag.
    ends = list(_ANSWER_END.finditer(reasoning))
    if ends and not reasoning[ends[-1].end() :].strip():
        return _in_tags(reasoning) or ""
    return ""


def answer_start(text: str) -> int | None:
    """The index where the answer of a generation begins: at its last ``<answer>`` tag, else after
    its reasoning. None if the reasoning was cut off."""
    tags = list(_ANSWER.finditer(text))
    if tags:
        return tags[-1].start()
    marks = list(_REASONING.finditer(text))
    if not marks:
        return 0
    return marks[-1].end() if marks[-1].group("close") is not None else None


def think_text(text: str, *, reasoning_opened: bool = False) -> str:
    """The first span of reasoning. Without an end tag it ends at the answer or with the text; an
    end tag that nothing opened ends what the prompt opened."""
    first = _REASONING.search(text)
    if first is None and not reasoning_opened:
        return ""
    start = 0
    if first is not None and first.group("open") is not None and not reasoning_opened:
        start = first.end()
    ends = [
        found.start()
        for pattern in (re.compile(_CLOSE, re.IGNORECASE), _ANSWER)
        if (found := pattern.search(text, start))
    ]
    return text[start : min(ends, default=len(text))].strip()


def has_answer_tag(text: str) -> bool:
    """Whether the text has an ``<answer>`` tag."""
    return _ANSWER.search(text) is not None


def clean(text: str) -> str:
    """``text`` with plain characters, and without the special tokens of chat templates, emoji and
    characters that are not seen. Letter case and lines stay."""
    if len(text) > _LONGEST:
        head, tail = text[: _LONGEST // 2], text[-_LONGEST // 2 :]
        # Cut between sentences: half a sentence may have lost its negation.
        ends = [found.end() for found in _SENTENCE_END.finditer(head)]
        first = _SENTENCE_END.search(tail)
        text = head[: ends[-1] if ends else 0] + "\n" + (tail[first.end() :] if first else "")
    # Most answers are plain, so each step first asks whether there is anything to do.
    if "<" in text or "~~" in text or "[" in text:
        text = _BOX.sub(r"\\boxed{\1}", text)
        text = _CROSSES.sub(" no ", _TOKENS.sub(" ", _STRUCK.sub(" ", text)))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = _MINUS.sub("-", _TOKENS.sub(" ", _CROSSES.sub(" no ", text)))
    if "_" in text:
        text = _JOINED.sub(" ", text)
    if "!" in text or "¬" in text:
        text = _NOT.sub("not ", text)
    text = re.sub("[‘’ʼ´`]", "'", re.sub("[“”„«»「」『』]", '"', text))
    return text if text.isascii() else simplified("".join(map(_plain, text)))


def _plain(char: str) -> str:
    if char.isascii():
        return char
    kind = unicodedata.category(char)
    if kind in ("Cf", "Co", "Cn", "Cs") or 0xFE00 <= ord(char) <= 0xFE0F:
        return ""
    return " " if kind in ("So", "Sk") else char


def _in_tags(text: str) -> str | None:
    """The text of the last ``<answer>``, because a model may name the tag while it reasons."""
    starts = list(_ANSWER.finditer(text))
    if not starts:
        return None
    tail = text[starts[-1].end() :]
    end = _ANSWER_END.search(tail)
    return (tail[: end.start()] if end else tail).strip()
