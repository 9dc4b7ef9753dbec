"""Which cues a text claims: cues that it asserts, denies or hedges.

Facial-R1 (arXiv 2511.10254) counts every mention of an action unit as a claim, and therefore
forbids "no", "not" and "maybe" in its prompt. Here, each mention is read in its clause instead, in
English and Chinese. Where a text can be read both ways, a cue counts as denied: what is paid for
must be claimed plainly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mmemo.answers.parsing import normalise

# A full stop inside a number, as in 0.8, ends no clause. "X rather than Y" denies Y.
_CLAUSE = re.compile(
    r"\.+(?=\s|$)|[;!?。；！？]+|\n+"
    # "It was expected but is missing" goes on about the same cue.
    r"|\b(?:(?<!anything )(?<!nothing )(?<!all )but(?! (?:is|are|was|were|has|have|remains?)\b)"
    r"|however|although|though|while|whereas|yet|instead(?! of)|rather(?! than))\b"
    r"|但是|但|然而|不过|而是"
)
# "No doubt" and "not only" assert what follows them.
_NO = r"\b(?:no(?! doubt| question)|none|never|neither|nor|cannot|hardly|barely|scarcely)\b"
_NOT = r"\bnot(?! only| just| merely)\b|n't\b"
_CHINESE_NO = (
    r"没有?|(?:不(?!仅|但|只|过))|未|毫?无(?!论|疑)|并?非|否|缺|别(?!的)|难以"
    r"|隐藏|掩饰|掩盖|排除|消失"
)
_DENIED_BEFORE = re.compile(
    rf"{_NO}|{_NOT}|{_CHINESE_NO}|\b(?:without|lacks?|lacking|absence|absent|missing|inactive)\b"
    r"|\b(?:rather than|instead of|free (?:of|from)|devoid of|far from|anything but|all but"
    r"|except(?: for)?"
    r"|apart from|other than|unlike|minus|sans|zero|non|nobody|nowhere|(?<!a )little|false|untrue"
    r"|fail(?:s|ed|ing)? to|ceas\w+ to|stop(?:s|ped)|rul(?:e|es|ed|ing) out|exclud\w+"
    r"|hid(?:e|es|ing|den)"
    r"|suppress\w*|conceal\w*|(?<!no )(?<!without )doubt\w*)\b|\bw/o\b"
)
_DENIED_AFTER = re.compile(
    rf"{_NO}|{_NOT}|{_CHINESE_NO}"
    r"|\b(?:absent|missing|inactive|lacking|undetected|unseen|invisible|nonexistent"
    r"|deactivated|zero|fail(?:s|ed)? to|disappear\w*|vanish\w*|fad(?:es?|ed)|stop(?:s|ped)"
    r"|gone|nowhere|far from"
    r"|ruled out|excluded|unlikely|doubtful|false|hidden|suppressed|ceas\w+)\b"
)
# Two negations make none.
_DOUBLE = re.compile(
    r"(?:\b(?:not|never)|n't) (?:absent|missing|inactive|lacking|invisible|without|hidden)\b"
    r"|\bno (?:lack|absence|shortage) of\b|\bnothing but\b|\bno (?:reason to )?doubt\w*"
    r"|(?:\b(?:cannot|can not|could not|not|never|unable to)|n't) "
    r"(?:hide|conceal|suppress|contain|stop\w*)\b"
    r"|\bnever (?:stops|hides|fails to)\b"
    r"|(?:不是|并非)没有|忍不住|止不住|不禁|不由得?|(?:掩|藏|遮)不住"
)
# "AU12? No." answers its own question.
_ANSWERED = re.compile(r"\?+\s*(?=(?:no|not|none|never)\b|没|无|不|否)")
_STRUCK = re.compile(r"~~[^~\n]{1,200}~~")
# A mark in front of a cue, where the line begins with one; else the marks stand behind the cues.
_MARKED = re.compile(r"\s*(?:[-*•]\s*)?(?:[✗✘❌×✓✔✅☐☑☒]|\[[ xX]?\]\s)")
_CROSSED = re.compile(r"[✗✘❌×☐☒]\ufe0f?|\[ ?\](?=\s)")
_TICKED = re.compile(r"[✓✔✅☑]\ufe0f?|\[[xX]\](?=\s)")
_CELL = re.compile(
    r"\d+(?:\.\d+)?%?|yes|no|true|false|present|absent|(?:in)?active|none|[✗✘❌×✓✔✅]|有|无|是|否",
    re.IGNORECASE,
)
_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*")
# A table or a list of values: "AU12 | 0", "AU12=0", "AU12 (no)", "AU12: ✗".
_VALUE = re.compile(
    r"[\s:=|,(\[\])>–—→为是]*"
    r"(?:(?:intensity|level|score|value|activation|strength|presence)[\s:=]*(?:is |of )?)?"
    r"(?:0+(?:\.0+)?%?(?![\d.]*\d)"
    r"|(?:is |are )?(?:off|false|nil|null|n/a|na|negative)\b|[✗✘❌×])"
)
# Reasons and conclusions say nothing about the cue before them.
_REASON = re.compile(
    r"\b(?:because|since|so|therefore|thus|hence|which means|meaning|suggest\w*|indicat\w*|that"
    r"|and (?:she|he|they|it|the (?:person|man|woman|speaker)))\b"
    r"|因为|所以|说明|表明"
)
_SINGULAR = re.compile(r"\s*(?:\(|\[|=|(?:is|was|does|has|isn't|wasn't|doesn't|hasn't)\b)")
_PRESENCE = re.compile(
    r"\b(?:active|activated|present|visible|seen|shown|observed|detected|found|there|evident)\b"
)
_SHORT_HEADER = 4  # words: "absent action units", "none of these", "no"
_HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibl[ey]|might|may|could|unclear|unsure|uncertain|unlikely|whether|if)\b"
    r"|\bnot (?:sure|clear|certain)\b|\bhard to (?:tell|say|see)\b|可能|也许|或许|不确定"
)
_EITHER = re.compile(r"\beither\b")
_OPEN_LIST = re.compile(r"\b(?:or|nor)\b|或")
_JOINED = re.compile(r"\b(?:and|or|nor|plus)\b|[&+/]|和|与|及|或|跟")
# What stands between the items of one list.
_GLUE = re.compile(
    r"[\s,/&+|()\[\]\"、]*(?:(?:and|or|nor|plus|as well as|以及|和|与|及|或者|或|跟)[\s,]*)?"
    r"(?:(?:the|a|an|any|both|also)\s+)*[\s(\[\"]*"
)
_BOUNDARY = re.compile(r"[,|、]|\b(?:and|or|with)\b|[和与或]")
_NEXT_DENIED = re.compile(
    r"\b(?:no|not|without|nor|neither|never|lacks?|lacking|rather than|instead of|minus|w/o|sans"
    r"|unlike|except(?: for)?|apart from)\b"
    r"(?:\s+(?:a|an|any|the|of|signs?|clear|visible))*\s*$"
    r"|[也且并又](?:没有?|无|未|不)(?:见|看到|出现|有)?\s*$"
)
_FIRST_CJK = 0x2E80
_LONGEST = 12_000  # characters; what follows is not read
_SCRIPTS = re.compile(r"(?<=[\u2e80-\uffff])(?=[0-9a-z])|(?<=[0-9a-z])(?=[\u2e80-\uffff])")
_BULLET = re.compile(r"^\s*(?:[-*•·]|\d{1,2}[.)])\s+")
# Marks of formatting; brackets, colons and bars say which value belongs to which cue.
_MARKUP = re.compile(r"[*`#\"“”]")


@dataclass(frozen=True, slots=True)
class Claims:
    """Names of cues, by what the text says about them. The three sets are disjoint."""

    asserted: frozenset[str]
    denied: frozenset[str]
    """Cues that the text denies, or both asserts and denies: a contradiction is not a claim."""
    hedged: frozenset[str]


def read_claims(text: str, phrases: Mapping[str, Iterable[str]]) -> Claims:
    """Find the cues that ``text`` mentions, and whether it asserts, denies or hedges them.

    - A negation before a list denies all of it, if the list is joined by "and" or "or", follows a
      colon ("Not active: ..."), or has single words as its items: "no frown, raised cheeks" still
      asserts the cheeks.
    - A negation after a list denies all of it ("AU4 and AU12 are not active", "AU4, AU12: none"),
      one in brackets or after "=" only the last item.
    - A hedge applies to its whole clause.

    Args:
        phrases: the name of a cue -> the wordings that express it, matched as whole words and
            case-insensitively. If one wording is part of another, the longest one wins.
    """
    # Wordings are normalised like the text, or "Raised brow" would never match.
    owner = {_wording(wording): name for name, listed in phrases.items() for wording in listed}
    # An alternation takes the first branch that matches, so the longest wordings come first.
    wordings = sorted((wording for wording in owner if wording), key=len, reverse=True)
    if not wordings:
        return Claims(frozenset(), frozenset(), frozenset())
    mention = _mention_pattern(tuple(wordings))
    found: dict[str, set[str]] = {"asserted": set(), "denied": set(), "hedged": set()}
    if len(text) > _LONGEST:
        # Cut between lines or clauses: half a clause may have lost its negation.
        ends = [one.end() for one in _CLAUSE.finditer(text, 0, _LONGEST)]
        text = text[: ends[-1] if ends else 0]
    for clause, denied in _clauses(text, mention):
        for one, kind in _read_clause(clause, mention, denied):
            found[kind].add(owner[one.group()])
    asserted = found["asserted"] - found["denied"]
    denied_cues = found["denied"]
    # A cue that is hedged here and asserted or denied there is not hedged.
    return Claims(
        frozenset(asserted),
        frozenset(denied_cues),
        frozenset(found["hedged"] - asserted - denied_cues),
    )


def denies(text: str) -> bool:
    """Whether a short text, such as an item of a list, denies what it names."""
    return _DENIED_BEFORE.search(_plain(text)) is not None


@lru_cache(maxsize=1024)
def _mention_pattern(wordings: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(whole_word, wordings)))


def whole_word(wording: str) -> str:
    """A pattern for a wording as whole words, in a text of the same case."""
    # Scripts without spaces between words have no word boundaries to match.
    edges = (wording[0], wording[-1])
    left, right = (char.isalnum() and ord(char) < _FIRST_CJK for char in edges)
    return ("(?<!\\w)" if left else "") + re.escape(wording) + ("(?!\\w)" if right else "")


def _wording(text: str) -> str:
    return _SCRIPTS.sub(" ", normalise(text))


def _plain(line: str) -> str:
    """``line`` as :func:`~mmemo.answers.parsing.normalise` leaves it, with its ends, and with a
    space wherever a script without spaces meets another one: 没有AU12."""
    if _MARKED.match(line):
        line = _TICKED.sub("; ", _CROSSED.sub("; no ", line))
    line = unicodedata.normalize("NFKC", _MARKUP.sub("", _STRUCK.sub(" ", line)))
    line = _ANSWERED.sub(": ", _DOUBLE.sub(" ", line.casefold().replace("’", "'")))
    return _SCRIPTS.sub(" ", re.sub(r"[\s_\-]+", " ", line))


def _rows(text: str, mention: re.Pattern[str]) -> Iterator[str]:
    """The lines of a text. A table with a row of cues and rows of values becomes "cue: value"."""
    names: list[str] = []
    header = ""  # its row, until rows of values turn up
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"[|,;\t]", line.strip().strip("|"))]
        if names and _RULE.fullmatch(line):
            continue
        if len(cells) == len(names) and all(map(_CELL.fullmatch, cells[1:])):
            pairs = zip(names, cells, strict=True)
            yield from (f"{name}: {cell}" for name, cell in pairs if _CELL.fullmatch(cell))
            header = ""
            continue
        if header:
            yield header
        names, header = [], ""
        cues = [cell for cell in cells if mention.search(_plain(cell))]
        if len(cues) > 1 and len(cues) >= len(cells) - 1 and not re.search("[.:=!?]", line):
            names, header = cells, line
        else:
            yield line
    if header:
        yield header


def _clauses(text: str, mention: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Each clause, and whether a heading above it denies what it lists."""
    denied = listed = False
    for raw in _rows(text, mention):
        line = _plain(_BULLET.sub("", raw)).strip()
        if not line:
            denied, listed = denied and not listed, False
            continue
        first = mention.search(line)
        if first is None and (line.endswith(":") or raw.lstrip().startswith(("#", "**"))):
            denied, listed = _denying_header(line.rstrip(": ")), False
            continue
        # Only a list belongs to the heading above it, not the text that follows the list.
        denied = denied and first is not None and bool(_BULLET.match(raw) or first.start() == 0)
        listed = True
        for clause in _CLAUSE.split(line):
            yield clause, denied


def _read_clause(
    clause: str, mention: re.Pattern[str], header: bool
) -> Iterator[tuple[re.Match[str], str]]:
    """Each mention of a clause, with ``asserted``, ``denied`` or ``hedged``."""
    groups = _groups(clause, list(mention.finditer(clause)))
    hedged = _HEDGES.search(clause) is not None
    before = clause[: groups[0][0].start()] if groups else ""
    listed_denied = False
    for number, group in enumerate(groups):
        end, start = group[-1].end(), group[0].start() - len(before)
        last = number + 1 == len(groups)
        between = clause[end:] if last else clause[end : groups[number + 1][0].start()]
        after, following = (between, "") if last else _split(between)
        if ":" in before:
            heading, _, before = before.rpartition(":")
            header = _denying_header(heading)
            ahead = header or _denied_ahead(before)
            whole = header
        else:
            ahead, whole = header or _denied_ahead(before), header
            # "No frown, tears in the eyes or a broad smile": the list goes on up to its "or".
            ahead = ahead or (listed_denied and _OPEN_LIST.search(clause, start) is not None)
        behind = _denied_behind(after)
        listed_denied = ahead and not whole
        for place, one in enumerate(group):
            either = _EITHER.search(clause, 0, one.start()) and " or " in clause
            denied = (ahead and (whole or _reaches(clause, group, place))) or (
                behind and _reached(clause, group, place, after)
            )
            yield one, "hedged" if hedged or either else "denied" if denied else "asserted"
        before = following


def _groups(clause: str, mentions: Sequence[re.Match[str]]) -> list[list[re.Match[str]]]:
    """The mentions by the list that they stand in."""
    groups: list[list[re.Match[str]]] = []
    for one in mentions:
        if groups and _GLUE.fullmatch(clause, groups[-1][-1].end(), one.start()):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _split(between: str) -> tuple[str, str]:
    """The text between two lists: what belongs to the one before it, and to the one after it."""
    if not between.lstrip().startswith((":", "=", "(", "|")):
        ahead = _NEXT_DENIED.search(between)
        if ahead is not None:
            return between[: ahead.start()], between[ahead.start() :]
    boundaries = list(_BOUNDARY.finditer(between))
    if not boundaries:
        return between, ""
    at = boundaries[-1]
    # "Or" stays with what follows it: it continues the list before it.
    return between[: at.start()], between[at.start() :].lstrip(",|、 ")


def _denied_ahead(before: str) -> bool:
    """Whether the text before a list denies it; a comma ends what a negation governs."""
    return _DENIED_BEFORE.search(re.split(r"[,|]", before)[-1]) is not None


def _denied_behind(after: str) -> bool:
    """Whether the text after a list denies it."""
    if _VALUE.match(after):
        return True
    # "AU12, absent" is a value like "AU12: absent"; other commas end what is said of the list.
    part = re.sub(r"^[\s,:=|(\[\])]+", "", after)
    part = _REASON.split(re.split(r"[,|)\]]", part)[0])[0]
    return _DENIED_AFTER.search(_DOUBLE.sub(" ", part)) is not None


def _denying_header(heading: str) -> bool:
    """Whether a heading, such as "Not active", says that what follows it is not there. "She is not
    happy" does not."""
    heading = re.split(r"[,|]", heading)[-1]
    if not _DENIED_BEFORE.search(_DOUBLE.sub(" ", heading)):
        return False
    words = heading.split()
    negated_word = re.search(rf"(?:{_NOT})\s*\w+", heading) and not _PRESENCE.search(heading)
    return bool(_PRESENCE.search(heading)) or (len(words) <= _SHORT_HEADER and not negated_word)


def _reaches(clause: str, group: Sequence[re.Match[str]], place: int) -> bool:
    """Whether a negation before a list reaches the item at ``place``."""
    if place == 0 or _OPEN_LIST.search(clause, group[0].end()):
        return True
    joined = _JOINED.search(clause, group[0].end(), group[-1].start()) is not None
    return joined or all(" " not in one.group() for one in group[: place + 1])


def _reached(clause: str, group: Sequence[re.Match[str]], place: int, after: str) -> bool:
    """Whether a negation after a list reaches back to the item at ``place``."""
    rest = clause[group[place].end() : group[-1].start()]
    if (
        rest.count("(") > rest.count(")")
        and _denied_behind(after.partition(")")[0])
        and ")" in after
    ):
        return False  # "AU4 (AU12 absent)"
    if place + 1 == len(group) or not _SINGULAR.match(after):
        return True
    joined = _JOINED.search(clause, group[place].end(), group[-1].start()) is not None
    return joined and not re.match(r"\s*[(\[=]", after)
