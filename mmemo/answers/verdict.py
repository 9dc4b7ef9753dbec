"""The verdict reading: the label that a person takes from an answer in free form.

What a text says explicitly goes before what it says in passing. In this order:

1. JSON with a key for the answer, or ``\\boxed{...}``; a number behind every label;
2. "Final answer: X", then "Answer: X" or "the answer is X", the last one of a text;
3. a first line or sentence that is nothing but a label;
4. "Emotion: X" or "the emotion is X", where all such places agree;
5. a conclusion ("therefore X", "overall: X"), the last one of a text;
6. what is said of the person or the emotion, not of the face, the voice or the words;
7. all that the text asserts.

At each step labels that the text denies do not count (:mod:`mmemo.answers.negation`), nor do those
in a list of options or in quoted speech; those in an explanation, after "although", or called
secondary count only where there are no others. What a text corrects ("actually, no: X") or concedes
("despite the X, ...") does not count. The first step that finds labels decides: one label
is the verdict, and several are none.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

from mmemo.answers.completion import clean
from mmemo.answers.label_set import LabelSet, Mention, normalise
from mmemo.answers.negation import blanked, denied, masked
from mmemo.answers.scores import highest, highest_value
from mmemo.answers.words import LABEL, Span, lower, pattern, rules_for

Status = Literal["ok", "refused", "malformed"]
Found = tuple[Status, str | None]

ANSWER_KEYS: tuple[tuple[str, ...], ...] = (
    ("finalanswer", "finalemotion", "finallabel", "最终答案", "最终情绪"),
    (
        *("answer", "verdict", "prediction", "conclusion", "choice", "option", "response"),
        *("result", "答案", "结论", "选项", "结果"),
    ),
    (
        *("emotion", "label", "primaryemotion", "mainemotion", "dominantemotion", "mood"),
        *("overallemotion", "predictedemotion", "emotionlabel", "sentiment", "class", "category"),
        *("emotions", "情绪", "情感", "标签", "类别", "主要情绪", "心情"),
    ),
)
"""Keys of JSON answers, lower case without spaces; the first row that occurs decides."""

_MOST = 40  # mentions at either end of a text that are looked at
_MALFORMED: Found = ("malformed", None)
_LIST_MARK = r"(?:[-*•>+]+\s+|\(?\d{1,2}[.)、]\s*|step \d+\W{1,4}){0,4}"
_MARKUP = re.compile(r"\*+|(?<!\w)_+|_+(?!\w)|^\s*#+\s*|\$+|~~|```\w*|^\s*[>|]\s*", re.MULTILINE)
_MARKS = re.compile(r"[*_#$~`>|]")
_TAG = re.compile(r"<\s*(/?)\s*([a-zA-Z][\w-]{1,30})\s*>")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_LATEX = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|emph|bf|rm|mbox)\s*(?=\{)")
_JSON_START = re.compile(r"[{\[]")
_PAIR = re.compile(r"""["']([\w ]{1,40})["']\s*:\s*["']([^"'\n]{0,400})["']""")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|[。！？；]|\n+")
_HEDGED_END = re.compile(r"[.!?;,](?=\s|$)|[。！？；，]|\n+|\bbut\b")
_COLON_END = re.compile(r"[:：]")
_LEAD_END = re.compile(r"[.!?;:](?=\s|$)|[。！？；：]|\n+|\s[-–—]+\s|—")
_QUOTE = re.compile(r'"[^"\n]{1,400}"')
_FIRST_PERSON = re.compile(r"\"(?:i|i'm|i've|i'll|we)\s|\"我")
_SPEAKER = re.compile(r"[,，\s]*(?:(?:he|she|they|(?:the )?\w+) |他|她)?")
_COLON = r"\s*(?:[:：=]+>?|→|->|=>|\||\s[-–—]\s)\s*"
# "4 out of 7" names one digit, and "a scale of 1 to 7" none.
_SCALE = re.compile(r"\bout of \d+|\b(?:scale|range|from)(?: (?:of|from))? \d+\s*(?:to|-|–)\s*\d+")
_JOINING = re.compile(r"^\W*(?:and|or|but|maybe|also)\W+")
_WORD_START = re.compile(r"\W*(?=\w)")
_SEVERAL = re.compile(r"[,，:;?]|[.!。]\s*\S")
_PIECE_END = re.compile(r"\s*(?:[.,!;:。，！；：\n]|\s[-–—]|\Z)")
_ALONE = re.compile(rf"\s*(?:[^\w\s]|\Z|(?:and|or|和|或者?)\s*{LABEL})|\s*\n")


@dataclass(frozen=True, slots=True)
class _Label:
    """A mention with what its place says about it."""

    mention: Mention
    weak: bool
    place: Literal["person", "channel", ""]

    @property
    def label(self) -> str:
        return self.mention.label


def read_verdict(answer: str, labels: LabelSet) -> Found:
    """The status and label of an answer without its reasoning and tags."""
    text = clean(answer)
    exact = labels.whole(text)
    if exact is not None:
        return "ok", exact
    found = _structured(text, labels)
    if found is not None:
        return found
    return _Reader(_plain_lines(text), labels).read()


class _Reader:
    """Reads one text without markup."""

    def __init__(self, text: str, labels: LabelSet) -> None:
        self.text, self.labels = text, labels
        low = lower(text)
        named = labels.find(text)
        # The labels may be of another language than the text around them.
        self.rules = rules_for(blanked(low, named))
        if not self.rules.codes:
            self.rules = rules_for(low)
        spans = [one.span() for one in self.rules.find("refusal.over", low)]
        spans += (one.span() for one in _SCALE.finditer(low))
        found = [one for one in named if not _within(one, spans)]
        self.mentions = [*found[:_MOST], *found[_MOST:][-_MOST:]]
        self.blank = blanked(low, self.mentions)
        # Only sentences that name a label are looked at closely, and the ones before them, which
        # may end in a head or conclusion of theirs.
        self.near, self.wide = _windows(self.blank)
        self.masked = masked(self.blank, self.rules, self.near)

    def read(self) -> Found:
        exact = self.labels.whole(self.text)
        if exact is not None:
            return "ok", exact
        refused = self._refusals()
        usable = self._usable(refused)
        scored = highest(self.masked, [one.mention for one in usable])
        opening = self._agreement(usable) if scored is None else None
        if scored or opening:
            return "ok", scored or opening
        if usable:
            for step in (self._answers, self._lead, self._emotions, self._conclusions):
                found = step(usable)
                if found is not None:
                    return found if found[0] == "ok" or not refused else ("refused", None)
            found = self._all(usable)
            if found[0] == "ok" or not refused:
                return found
        refused = refused or self.rules.search("refusal.patterns", self.blank)
        if refused:
            return "refused", None
        no = self._denying_sentence()
        return ("ok", no) if no is not None else _MALFORMED

    def _usable(self, refused: Sequence[Span]) -> list[_Label]:
        """The mentions that count at all."""
        rules, text = self.rules, self.masked
        off = denied(text, self.mentions, rules, self.near)
        dropped = [*refused, *self._quoted(), *self._listed(), *self._conceded()]
        weak = self._weak()
        found: list[_Label] = []
        for one, is_denied in zip(self.mentions, off, strict=True):
            if not is_denied and not _within(one, dropped):
                found.append(_Label(one, _within(one, weak), self._place(one)))
        return self._without_secondary(self._corrected(found))

    def _corrected(self, found: list[_Label]) -> list[_Label]:
        """The labels behind the last correction ("actually, no: ..."), where there are any."""
        if len({one.label for one in found}) < 2:
            return found
        for one in reversed(self.rules.find("verdict.correction", self.masked)):
            after = [label for label in found if label.mention.start >= one.end()]
            if after:
                return after
        return found

    def _conceded(self) -> list[Span]:
        """Clauses such as "despite the happy music", which a main clause follows."""
        spans: list[Span] = []
        for one in self.rules.find("verdict.although", self.masked, self.near):
            end = _end_of(_SENTENCE_END, self.text, one.end())
            comma = re.search("[,，]", self.masked[one.end() : end])
            if comma is not None:
                spans.append((one.start(), one.end() + comma.start()))
        return spans

    def _refusals(self) -> list[Span]:
        """Spans of refusals and of what they govern ("cannot tell whether she is happy or sad")."""
        spans: list[Span] = []
        for one in self.rules.find("refusal.patterns", self.blank, self.near):
            end = _end_of(_SENTENCE_END, self.text, one.end())
            governs = self.rules.search("refusal.governs", self.masked, one.end(), end)
            comma = re.search(r"[,，:：]|\b(?:but|yet|however)\b|但", self.masked[one.end() : end])
            if comma is not None:
                stop = one.end() + comma.start()
                listed = governs is not None and comma.group() in ",，" and governs.start() < stop
                end = end if listed and " or " in self.text[stop:end] else stop
            spans.append((one.start(), end))
        return spans

    def _quoted(self) -> list[Span]:
        """Quoted speech, which is what the person says and not what they feel."""
        spans: list[Span] = []
        found = self.rules.find("verdict.said", self.masked, self.near)
        said, says = {one.end() for one in found}, {one.start() for one in found}
        for one in _QUOTE.finditer(self.masked):
            before = len(self.masked[: one.start()].rstrip(" ,:，："))
            after = _SPEAKER.match(self.masked, one.end())
            own = _FIRST_PERSON.match(self.masked, one.start())
            if before in said or own or (after is not None and after.end() in says):
                spans.append(one.span())
        return spans

    def _listed(self) -> list[Span]:
        """Lists of options that the text only repeats."""
        spans: list[Span] = []
        runs: list[list[Mention]] = []
        for one in self.mentions:
            gap = self.masked[runs[-1][-1].end : one.start] if runs else "-"
            joined = re.fullmatch(r"\W*(?:(?:and|or|和|或者?|以及|与)\W*)?", gap)
            if runs and joined and len(gap) < 12 and not re.search("[.!?。]", gap):
                runs[-1].append(one)
            else:
                runs.append([one])
        for run in runs:
            if len({one.label for one in run}) < 2:
                continue
            start, end = run[0].start, run[-1].end
            opening = self.masked[max(0, start - 60) : start]
            lead = re.split(r"[.!?;。！？；\n]", opening)[-1]
            if self.rules.search("verdict.options", lead) and not self._is_answer(lead):
                spans.append((start, end))
        return spans

    def _is_answer(self, lead: str) -> bool:
        return any(self.rules.search(f"verdict.{name}", lead) for name in ("final", "answer"))

    def _weak(self) -> list[Span]:
        """Spans whose labels count only where there are no others."""
        text, rules = self.masked, self.rules
        spans: list[Span] = []
        if any(mark in text for mark in ":：\n"):
            spans += (one.span() for code in rules.codes for one in _sections(code).finditer(text))
        for name in ("because", "although"):
            for one in rules.find(f"verdict.{name}", text, self.near):
                end = _end_of(_SENTENCE_END, text, one.end())
                end = _end_of(_COLON_END, text, one.end(), end)
                comma = re.search("[,，]", text[one.end() : end])
                opening = re.search(r"(?:^|[.!?;:,\n。！？；：，]\s*)\Z", text[: one.start()])
                if comma is not None and (opening or name == "although"):
                    end = one.end() + comma.start()
                spans.append((one.start(), end))
        spans += [found.span() for found in rules.find("verdict.seeming", text, self.near)]
        for one in rules.find("verdict.hedge", text, self.near):
            spans.append((one.start(), _end_of(_HEDGED_END, text, one.end())))
        return spans

    def _place(self, one: Mention) -> Literal["person", "channel", ""]:
        begin = max(
            (found.end() for found in _SENTENCE_END.finditer(self.masked, 0, one.start)), default=0
        )
        begin = max(begin, self.masked.rfind(",", begin, one.start) + 1)
        before = self.masked[begin : one.start]
        if self.rules.search("verdict.channel", before):
            return "channel"
        return "person" if self.rules.search("verdict.person", before) else ""

    def _without_secondary(self, found: list[_Label]) -> list[_Label]:
        """The labels but those called secondary, where there are others."""
        if len({one.label for one in found}) < 2:
            return found
        ranks: list[int] = []
        for index, one in enumerate(found):
            start = found[index - 1].mention.end if index else 0
            stop = found[index + 1].mention.start if index + 1 < len(found) else len(self.masked)
            before = self.masked[start : one.mention.start]
            begin = max(before.rfind(mark) for mark in ",;.\n，；。") + 1
            tight = re.match(r"\s*[(（][^)）]{1,30}[)）]", self.masked[one.mention.end : stop])
            words = before[begin:] + " " + (tight.group() if tight else "")
            joined = re.fullmatch(r"\s*(?:,\s*)?(?:and|or|和|与|,|、)\s*", before)
            ranks.append(ranks[-1] if joined and ranks else self._rank(words))
        best = max(ranks)
        return [one for one, rank in zip(found, ranks, strict=True) if rank == best]

    def _rank(self, words: str) -> int:
        primary = self.rules.search("verdict.primary", words) is not None
        return primary - (self.rules.search("verdict.secondary", words) is not None)

    def _answers(self, usable: Sequence[_Label]) -> Found | None:
        """The last "answer: X" of a text; final answers first."""
        for name in ("final", "answer"):
            for start, end in reversed(list(self._heads(name))):
                found = self._decide(usable, start, end)
                if found is not None:
                    return found
        return None

    def _emotions(self, usable: Sequence[_Label]) -> Found | None:
        found = [
            one
            for start, end in self._heads("emotion")
            if (one := self._decide(usable, start, end)) is not None
        ]
        return found[0] if found and len(set(found)) == 1 else None

    def _heads(self, name: str) -> Iterator[Span]:
        """The span of each value behind a head such as "answer:" or "the answer is"."""
        heads = [
            one
            for code in self.rules.codes
            for span in self.wide
            for one in _head_pattern(code, name).finditer(self.masked, *span)
        ]
        for one in sorted(heads, key=lambda found: found.start()):
            # "Facial emotion: happy" is about the face alone.
            lead = self.masked[max(0, one.start() - 20) : one.start()].rstrip()
            last = re.split(r"[.,;:\n]", lead)[-1]
            if name == "emotion" and self.rules.search("verdict.channel", last):
                continue
            start = one.end()
            while start < len(self.text) and self.text[start] in " \n\t-*•(":
                start += 1
            yield start, _end_of(_SENTENCE_END, self.text, start)

    def _lead(self, usable: Sequence[_Label]) -> Found | None:
        """A first line or sentence that is only a label."""
        lines = [line for line in re.split(r"\n+", self.text) if line.strip()]
        pieces = [p for line in lines for p in _LEAD_END.split(line) if re.search(r"\w", p)]
        if not any(self.labels.exact(digit) for digit in string.digits):
            pieces = [re.sub(rf"^\s*{_LIST_MARK}", "", piece) for piece in pieces]
        first = self.labels.exact(normalise(pieces[0])) if pieces else None
        yes_no = self._yes_or_no(pieces[0]) if pieces and first is None else None
        if first is None and yes_no is None:
            return self._leading_letter()
        if first is not None and not any(one.label == first for one in usable):
            return None
        if first is not None and re.match(rf"\W*{LABEL}+\W*[:：-]", self.masked):
            # "Happy: 0.1, sad: 0.9" is a list and no verdict with its explanation.
            end = _end_of(_SENTENCE_END, self.masked, 0)
            if {one.label for one in usable if one.mention.start < end and not one.weak} - {first}:
                return None
        named = {self.labels.exact(normalise(piece)) for piece in pieces}
        others = (named & {one.label for one in usable}) - {first or yes_no}
        return _MALFORMED if others else ("ok", first or yes_no)

    def _yes_or_no(self, piece: str) -> str | None:
        """Yes or no in front of an explanation: "No, the person does not smile"."""
        if "no" not in self.labels.labels and self.labels.exact("no") is None:
            return None
        found = re.match(r"\W*(\w+)\s*[,，](?P<rest>.*)", piece, re.DOTALL)
        label = self.labels.exact(normalise(found.group(1))) if found else None
        if found is None or label is None:
            return None
        pieces = (_JOINING.sub("", piece) for piece in re.split("[,，]", found.group("rest")))
        others = [self.labels.exact(normalise(piece)) for piece in pieces]
        return label if not set(others) - {None, label} else None

    def _agreement(self, usable: Sequence[_Label]) -> str | None:
        """Yes or no in other words in front: "Correct, the brows are lowered", "Not at all"."""
        yes, no = self.labels.exact("yes"), self.labels.exact("no")
        if yes is None or no is None:
            return None
        text = lower(self.text)
        first = _WORD_START.match(text)
        start = first.end() if first else 0
        found = {
            label: one.end()
            for name, label in (("yes", yes), ("no", no))
            if (one := self.rules.match(f"verdict.{name}", text, start))
            and _PIECE_END.match(text, one.end())
        }
        if not found:
            return None
        label = max(found, key=lambda one: found[one])
        others = [
            one
            for one in usable
            if one.label != label and _ALONE.match(self.masked, one.mention.end)
        ]
        return None if others else label

    def _denying_sentence(self) -> str | None:
        """No, as said by one plain denial: "The person does not smile"."""
        no = self.labels.exact("no")
        text = self.masked.strip()
        if (
            no is None
            or self.mentions
            or self.labels.exact("yes") is None
            or re.search(r"[,，:;?]|[.!。]\s*\S", text)
        ):
            return None
        if any(self.rules.search(f"negation.{one}", text) for one in ("ends", "none")):
            return None
        return no if self.rules.search("negation.before", text) else None

    def _leading_letter(self) -> Found | None:
        """A letter in front of its choice: "B) the voice trembles"."""
        if not self.mentions:
            return None
        one = self.mentions[0]
        if one.end - one.start != 1 or re.search(r"\w", self.text[: one.start]):
            return None
        rest = self.text[one.end :]
        if not re.match(r"\s*(?:[).:,、，。]|[-–—]|because|since|as\b)", rest):
            return None
        letters = {m.label for m in self.mentions if m.end - m.start == 1}
        return ("ok", one.label) if letters == {one.label} else None

    def _conclusions(self, usable: Sequence[_Label]) -> Found | None:
        """The last sentence that draws a conclusion and names a label."""
        for one in reversed(self.rules.find("verdict.conclusion", self.masked, self.wide)):
            start = one.end()
            while start < len(self.text) and not self.text[start].isalnum():
                start += 1
            end = _end_of(_SENTENCE_END, self.text, start)
            found = self._decide(usable, start, end)
            if found is not None:
                return found
        return None

    def _decide(self, usable: Sequence[_Label], start: int, end: int) -> Found | None:
        """What a span says: None if it names no label."""
        inside = [one for one in usable if start <= one.mention.start < end]
        inside = [one for one in inside if not one.weak] or inside
        if not inside:
            return None
        if all(one.mention.end - one.mention.start == 1 for one in inside):
            # "Answer: B. a loud voice": a letter ends its own sentence, so look no further.
            inside = inside[:1] if inside[0].mention.start <= start + 1 < end - 1 else inside
        return _one({one.label for one in self._standing_alone(inside)})

    def _all(self, usable: Sequence[_Label]) -> Found:
        strong = [one for one in usable if not one.weak] or list(usable)
        if len({one.label for one in strong}) > 1:
            strong = self._standing_alone(strong)
            persons = [one for one in strong if one.place == "person"]
            channels = [one for one in strong if one.place == "channel"]
            if persons and len(persons) + len(channels) == len(strong):
                strong = persons
        return _one({one.label for one in strong})

    def _standing_alone(self, found: Sequence[_Label]) -> list[_Label]:
        """Without the "no" of "no smile", where another yes or no stands alone."""
        if self.labels.exact("no") is None:
            return list(found)
        alone = [one for one in found if _ALONE.match(self.masked, one.mention.end)]
        return alone or list(found)


def _structured(text: str, labels: LabelSet) -> Found | None:
    """What JSON or ``\\boxed{}`` says; None where there is neither."""
    boxed = list(_BOXED.finditer(text))
    if boxed:
        inside = _LATEX.sub("", _balanced(text, boxed[-1].end())).strip("{} \n")
        if inside:
            return _Reader(_plain_lines(inside.replace("{", "").replace("}", "")), labels).read()
    value = _json_value(text, labels)
    return None if value is None else _read_value(value, labels)


def _read_value(value: Any, labels: LabelSet) -> Found:
    if isinstance(value, Mapping):
        values = cast("Mapping[str, Any]", value)
        scored = highest_value(values, labels)
        if scored is not None:
            return "ok", scored
        inner = _answer_of(values)
        return _MALFORMED if inner is None else _read_value(inner, labels)
    if isinstance(value, list):
        found = {_read_value(one, labels) for one in cast("list[Any]", value)}
        return found.pop() if len(found) == 1 else _MALFORMED
    return _Reader(_plain_lines(str(value)), labels).read() if value != "" else _MALFORMED


def _json_value(text: str, labels: LabelSet) -> Any:
    """The answer in the last JSON object of ``text``, or a list that is all of it; None without."""
    decoder = json.JSONDecoder()
    found: Any = None
    at, tries = 0, 0
    while tries < 20 and (start := _JSON_START.search(text, at)) is not None:
        tries, at = tries + 1, start.end()
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        at = end
        if isinstance(value, dict):
            values = cast("dict[str, Any]", value)
            inner = _answer_of(values)
            if inner is None and highest_value(values, labels) is not None:
                inner = values
            found = found if inner is None else [inner]
        elif isinstance(value, list):
            outside = text[: start.start()] + text[end:]
            found = found if re.search(r"\w", _MARKUP.sub("", outside)) else value
    if found is None and "{" in text:
        found = _literal(text) or _pairs(text)
    return found


def _literal(text: str) -> Any:
    """The answer of a Python dict, as models write that mean JSON."""
    part = text[text.find("{") : text.rfind("}") + 1]
    if not 0 < len(part) < 4000 or part.count("{") > 20:
        return None
    try:
        value = ast.literal_eval(part)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    inner = _answer_of(value) if isinstance(value, dict) else None
    return None if inner is None else [inner]


def _pairs(text: str) -> Any:
    """The answer of JSON that was cut off."""
    inner = _answer_of(dict(_PAIR.findall(text)))
    return None if inner is None else [inner]


def _answer_of(values: Mapping[str, Any]) -> Any:
    """The value of the key that holds the answer; a list where several keys of one kind do."""
    plain = {re.sub(r"[\s_\-]+", "", str(key)).casefold(): value for key, value in values.items()}
    for row in ANSWER_KEYS:
        found = [plain[key] for key in row if key in plain]
        if found:
            # None is an answer that was left out.
            found = ["" if one is None else one for one in found]
            return found[0] if len(found) == 1 else found
    return None


def _balanced(text: str, start: int) -> str:
    depth = 1
    for at in range(start, min(len(text), start + 400)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return text[start : start + 400]


def _plain_lines(text: str) -> str:
    """``text`` without markdown, LaTeX and XML: a tag becomes a head ("emotion: sad")."""
    if "<" in text:
        text = _TAG.sub(lambda tag: "\n" if tag.group(1) else f"\n{tag.group(2)}: ", text)
    if "\\" in text:
        text = _LATEX.sub("", text)
    return _MARKUP.sub("", text).strip() if _MARKS.search(text) else text.strip()


@lru_cache(maxsize=64)
def _head_pattern(code: str, name: str) -> re.Pattern[str]:
    """A head and what links it to its value: a colon, "is", or the end of a line of its own."""
    head, link = (pattern(code, f"verdict.{one}").pattern for one in (name, "is"))
    alone = rf"(?:(?<=\n)|\A)\s*{_LIST_MARK}(?:{head})\s*\n"
    straight = rf"|(?:{head})(?=\W{{0,3}}{LABEL})" if name == "answer" else ""
    linked = rf"(?:{head})(?:{_COLON}|\s*(?:{link})(?:\s*[:：])?)"
    return re.compile(rf"{alone}|{linked}{straight}")


@lru_cache(maxsize=64)
def _sections(code: str) -> re.Pattern[str]:
    """An explanation under a head of its own, up to the next line with a head."""
    head = pattern(code, "verdict.explanation").pattern
    others = "|".join(
        pattern(code, f"verdict.{name}").pattern for name in ("final", "answer", "emotion")
    )
    begin = rf"(?:(?<=\n)|\A|(?<=[.。;；,，] ))\s*{_LIST_MARK}(?:{head})\s*(?:[:：]|\n)"
    return re.compile(
        rf"{begin}.*?(?=\n\s*{_LIST_MARK}(?:{others})\s*(?:[:：=]|\n)|\Z)",
        re.DOTALL,
    )


def _windows(blank: str) -> tuple[list[Span], list[Span]]:
    """The sentences of a text that have a label, and these together with the ones before them."""
    near: list[Span] = []
    wide: list[Span] = []
    start, before = 0, 0
    for end in (*(found.end() for found in _SENTENCE_END.finditer(blank)), len(blank)):
        if LABEL in blank[start:end]:
            near.append((start, end))
            joins = wide and wide[-1][1] >= before
            wide[-1:] = [(wide[-1][0], end)] if joins else [*wide[-1:], (before, end)]
        before, start = start, end
    return near, wide


def _end_of(pattern: re.Pattern[str], text: str, start: int, end: int | None = None) -> int:
    end = len(text) if end is None else end
    found = pattern.search(text, start, end)
    return found.start() if found else end


def _within(one: Mention, spans: Sequence[Span]) -> bool:
    return any(start <= one.start < end for start, end in spans)


def _one(labels: set[str]) -> Found:
    return ("ok", labels.pop()) if len(labels) == 1 else _MALFORMED
