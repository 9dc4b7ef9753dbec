"""Numbers in the text of an answer: which one number, or one for each name, does it give?

Numbers are read as people and models write them: ``-0.5``, ``−1``, ``.5``, ``1,5``, ``负0.5``,
``minus one``, in full-width or other digits. What names the scale is no answer: "on a scale from -1
to 1", "7/10" on a scale up to 10. A range ("0.5-0.7"), a fraction of anything else, or numbers that
disagree leave open which one was meant, so they are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# CJK characters are letters to \w, but stand right beside a number: 得分是0.5分.
_LETTER = r"A-Za-z\u00c0-\u024f\u0370-\u052f"
NUMBER = (
    rf"(?<![{_LETTER}\d.,_])(?<![{_LETTER}]-)"
    r"[-+]?(?:\d+(?:[.,]\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
    rf"(?![{_LETTER}\d_]|[.,]\d)"
)
_NUMBER = re.compile(NUMBER)
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
_OPEN = re.compile(r"±|\+/-|[≤≥]|(?<![-=<>\w/\"'])[<>]=?\s*(?=[-+.\d])")  # ±0.5, > 0.5
_PERCENT = re.compile(rf"{NUMBER}\s*%")
_MINUS = re.compile(r"(?:(?:\bminus|\bnegative|负)\s*|(?<=[:=])\s*-\s+)(?=[.\d])", re.IGNORECASE)
_DASHES = str.maketrans(dict.fromkeys("−﹣‐‑", "-") | {"⁄": "/", "–": "-", "—": "-"})
_RANGE = re.compile(
    rf"({NUMBER})\s*(?:\([^()]{{0,40}}\)\s*)?(?:to|and|through|-|~|,|;|\.\.\.?|到|至|与|和)\s*({NUMBER})"
)
_TIGHT = re.compile(r"(?<=\d)\s*[-~]\s*(?=[-+.\d])")
_OUT_OF = re.compile(rf"({NUMBER})\s*(?:/|out of|of)\s*({NUMBER})", re.IGNORECASE)
_HEAD = re.compile(
    r"(?:answer|score|rating|value|intensity|sentiment|valence|arousal|答案|得分|分数|评分|数值|强度)"
    rf"\W{{0,4}}?(?:\b(?:is|of)\b|[=:]|是|为)[^\w.+-]{{0,4}}({NUMBER})",
    re.IGNORECASE,
)
_SIGN = re.compile(
    r"\W*(?:(?P<minus>negative|消极|负面|负向|负性)|positive|积极|正面|正向)\W*?"
    rf"(?P<number>{NUMBER})\W*",
    re.IGNORECASE,
)
_WORDS = (
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九", "十"),
)
_DIGITS = {word: value for words in _WORDS for value, word in enumerate(words)} | {"两": 2}
_WORD = re.compile(rf"\W*(minus|negative|负)?\s*({'|'.join(_DIGITS)})分?\W*", re.IGNORECASE)


def read_number(text: str, low: float, high: float) -> float | None:
    """The one number of a text, on a scale from ``low`` to ``high``; None if there is none or it is
    open which one is meant."""
    plain = _plain(text)
    word = _WORD.fullmatch(plain)
    if word is not None:
        value = float(_DIGITS[word[2].lower()])
        return _signed(-value if word[1] else value)
    signed = _SIGN.fullmatch(plain)
    if signed is not None and low < 0:
        value = _value(signed["number"])
        # "negative: 0.8" is -0.8 to one writer and a slip to another.
        return value if value is not None and (value < 0) == bool(signed["minus"]) else None
    plain = _scale_removed(_minus(plain), low, high)
    # "- 2" may be a minus, or the mark of a list.
    if _OPEN.search(plain) or (low < 0 and re.match(r"\s*-\s+[.\d]", plain)):
        return None
    named = set(_HEAD.findall(plain)) if not _TIGHT.search(plain) else set[str]()
    found = {_value(one) for one in named or _numbers(plain)}
    return found.pop() if len(found) == 1 else None


def read_numbers(text: str, low: float, high: float, names: Sequence[str]) -> list[float] | None:
    """One number for each name: the one after the name, or else as many numbers in order. None if
    there are others."""
    plain = _scale_removed(_minus(_plain(text)), low, high)
    found: list[float | None] = []
    for name in names:
        pattern = rf"(?<!\w){re.escape(name)}(?![{_LETTER}\d_])(?:[^\w.+-]|is\b|of\b|是|为){{0,8}}"
        values = set(map(_value, re.findall(rf"{pattern}({NUMBER})", plain, re.IGNORECASE)))
        found.append(values.pop() if len(values) == 1 else None)
    if None in found:
        found = [_value(one) for one in _numbers(plain)]
    read = [value for value in found if value is not None]
    return read if len(read) == len(found) == len(names) else None


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_DASHES)


def _minus(text: str) -> str:
    return _MINUS.sub("-", text)


def _numbers(text: str) -> list[str]:
    """All numbers; both ends of a range."""
    return _NUMBER.findall(_TIGHT.sub(" | ", text))


def _scale_removed(text: str, low: float, high: float) -> str:
    """The text without the ends of its scale, where it names them beside a number."""

    def ends(found: re.Match[str]) -> str:
        return "" if (_value(found[1]), _value(found[2])) == (low, high) else found[0]

    def top(found: re.Match[str]) -> str:
        return found[1] if _value(found[2]) == high else found[0]

    text = _OUT_OF.sub(top, _RANGE.sub(ends, text))
    return text if high >= 100 else _PERCENT.sub("", text)


def _value(text: str) -> float | None:
    """None for a number whose comma may be of thousands."""
    if _THOUSANDS.fullmatch(text):
        return None
    return _signed(float(text.replace(",", ".")))


def _signed(value: float) -> float:
    return 0.0 if value == 0 else value  # -0.0 would be another key in JSON
