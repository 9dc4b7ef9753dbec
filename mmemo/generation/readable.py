"""Whether sampled answers read as language: bytes that are no text, tokens that the model itself
finds next to impossible, words that no answer of the data holds.

Greedy answers hide a language model that is unsure of single tokens, because the right one stays
the most likely. Samples show it: a token that gets 2% where it is certain is replaced by a random
one 49 times in 50. That happens to tokens that were new in a stage in which the head was frozen. A
policy that learns from such samples learns to write around them.

Three signs, each of which has few false alarms on an honest model:

- **invalid UTF-8**: the bytes of the tokens do not decode (byte-level and byte-fallback tokens).
- **outside the nucleus**: a token of the reference's extreme tail. The tail of a token is the
  probability of all tokens that are as unlikely as it or less likely, at temperature 1. It is a
  p-value: a model that samples from its own distribution draws a token with a tail of at most ``a``
  with a probability of at most ``a``, whatever its vocabulary and however flat its distribution. An
  answer of n tokens is flagged if one of them has a tail below ``RARE / n``, so by Bonferroni's
  inequality an honest answer is flagged with a probability of at most ``RARE`` at temperature 1 and
  less below it. No threshold on the probability itself has this property: in a flat distribution
  every token is unlikely.
- **unknown words**: words that neither an answer nor a question of the data holds. This is used
  only where the data's own answers repeat their words (:class:`Vocabulary`).

Shapes: N answers, C tokens of the longest.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmemo.answers.completion import without_tags
from mmemo.data.sample import Sample

RARE = 0.01
"""Bound on the probability that an answer of an honest model counts as outside the nucleus."""
MOST_NEW = 0.01
"""Largest share of the data's answers with a word of their own at which words are checked."""
FEWEST_ANSWERS = 30
"""Fewest answers whose words say anything about other answers."""
KINDS = ("invalid_utf8", "outside_nucleus", "unknown_words")
"""The signs, as metrics and logs name them."""
TITLES: Mapping[str, str] = {
    "invalid_utf8": "hold invalid UTF-8",
    "outside_nucleus": "hold tokens far outside the reference's nucleus",
    "unknown_words": "hold words that no answer of the data holds",
}

_REPLACEMENT = "\ufffd"
_JOINERS = "'’\u200c\u200d"
# Scripts that put no spaces between words, of which single characters are compared.
_SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def words(text: str) -> list[str]:
    """The words of a text in any script, case-folded; numbers and punctuation are none. Of scripts
    without spaces between words, each character with its marks is one."""
    found: list[str] = []
    open_word = False
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(char)[0]
        if kind == "M" and found and open_word:
            found[-1] += char
        elif kind == "L":
            alone = any(low <= ord(char) <= high for low, high in _SPACELESS)
            if open_word and not alone and not _is_alone(found[-1]):
                found[-1] += char
            else:
                found.append(char)
            open_word = True
        elif char in _JOINERS and open_word:
            found[-1] += char
        else:
            open_word = False
    return [one for word in found if (one := word.strip(_JOINERS).replace("’", "'"))]


def _is_alone(word: str) -> bool:
    return any(low <= ord(word[0]) <= high for low, high in _SPACELESS)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of a data set.

    ``new_share`` estimates how often one more honest answer brings a word that is in none so far:
    the share of answers that have a word of their own. Unknown words are a sign only where that is
    rare, as with answers of one form. Free prose always has new words, and so does a handful of
    answers.

    Source: Good, Biometrika 1953 (Turing's estimate of unseen kinds).
    """

    known: frozenset[str]
    answers: int
    new_share: float

    @property
    def is_closed(self) -> bool:
        """Whether an unknown word is a sign of anything."""
        return self.answers >= FEWEST_ANSWERS and self.new_share <= MOST_NEW


def vocabulary(answers: Sequence[str], others: Iterable[str] = ()) -> Vocabulary:
    """The words of ``answers``, and of ``others``: questions, labels and what else may be cited."""
    cited = {word for text in others for word in words(text)}
    each = [set(words(text)) for text in answers]
    count = Counter(word for one in each for word in one)
    new = sum(any(count[word] == 1 and word not in cited for word in one) for one in each)
    share = new / len(each) if each else 1.0
    return Vocabulary(frozenset(cited | count.keys()), len(each), share)


def vocabulary_of(rows: Sequence[Sample], told: Sequence[Sample] = ()) -> Vocabulary:
    """The words of rows and of further rows ``told``, whose answers and questions count as well.
    What is known of the clips of ``rows``, labels, transcripts and cues, may be cited."""
    both = [*rows, *told]
    answers = [row.answer for row in both if row.answer is not None]
    others = [turn.text for row in both for turn in row.prompt]
    for row in rows:
        truth = row.truth
        others += [truth.label or "", *truth.labels, row.transcript or ""]
        others += [cue for cues in truth.cues.values() for cue in cues]
    return vocabulary(answers, dict.fromkeys(others))


@dataclass(frozen=True, slots=True)
class Reading:
    """What is wrong with one answer. ``outside`` is None where no distribution is known,
    ``unknown`` where words are not checked."""

    invalid: bool
    outside: bool | None
    unknown: tuple[str, ...] | None

    @property
    def flags(self) -> list[str]:
        """The signs that the answer shows, of :data:`KINDS`."""
        shown = (self.invalid, bool(self.outside), bool(self.unknown))
        return [kind for kind, on in zip(KINDS, shown, strict=True) if on]


def read_answer(
    text: str,
    known: Vocabulary | None = None,
    *,
    ended: bool = True,
    tails: Sequence[float] | None = None,
) -> Reading:
    """Read one sampled answer.

    Args:
        text: the decoded answer; bytes that are no text are U+FFFD in it, as tokenizers decode
            them.
        known: the data's words; None: words are not checked. Tags of reasoning and answer are no
            words.
        ended: whether the answer ended by itself. One that the length limit cut may end within a
            word or a character, which is no fault of the model.
        tails: the tail of each token under the reference; None: not checked.
    """
    # A format that a reward or a chat template asks for need not be in the data's answers.
    said = words(without_tags(text))
    if not ended:
        text = text.rstrip(_REPLACEMENT)
        # Its last word may be half a word; a spaceless character is whole.
        said = said[:-1] if said and not _is_alone(said[-1]) else said
    unknown = None
    if known is not None and known.is_closed:
        unknown = tuple(dict.fromkeys(word for word in said if word not in known.known))
    outside = None if tails is None else any(tail < RARE / len(tails) for tail in tails)
    return Reading(_REPLACEMENT in text, outside, unknown)


def shares(readings: Sequence[Reading]) -> dict[str, float]:
    """``readable`` and the share of answers with each sign that was looked for."""
    if not readings:
        return {}
    looked = {
        "invalid_utf8": True,
        "outside_nucleus": readings[0].outside is not None,
        "unknown_words": readings[0].unknown is not None,
    }
    found = {"readable": sum(not one.flags for one in readings) / len(readings)}
    for kind in KINDS:
        if looked[kind]:
            found[kind] = sum(kind in one.flags for one in readings) / len(readings)
    return found


def token_name(tokenizer: Any, token: int) -> str:
    """A token as ``lora.trainable_tokens`` takes it: its text, or its entry in the vocabulary where
    the text alone would be split otherwise, as a lone byte is."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    if tokenizer.encode(text, add_special_tokens=False) == [token]:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))
