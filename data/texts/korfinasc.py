"""KorFinASC: the sentiment that Korean financial news gives to a company or another aspect.

8,818 rows with positive, negative or neutral sentiment (arXiv 2301.03136, which claims 12,613),
under CC BY-SA 4.0. Get them from https://huggingface.co/datasets/amphora/korfin-asc and save the
one split as CSV (or TSV, or JSON Lines). Layout of the folder::

    *.csv       SID,TYPE,SRC,ASPECT,SENTIMENT; TYPE says whether the text has several entities

``file`` names one of several files. That SID is the same for all aspects of a text, so that
intervals are over texts, is an assumption.

``mask`` is the paper's test of knowledge about companies from elsewhere:

- ``none``: the question names the aspect, as in the paper's baseline;
- ``target``: every occurrence of the aspect in the text is ``[TGT]``, and the question asks for it;
- ``other``: every occurrence is the aspect of another row, and the question asks for that one.

An aspect need not occur in its text ("LG U+", "LGU＋"). Such rows have ``group.verbatim`` no, and
are left out, named, where they should be masked. The release has no split.

    mmemo manifest data/texts/korfinasc.py --root KorFinASC --output korfin.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import find_file, read_table

LABELS_3 = ("positive", "negative", "neutral")
FIELDS = ("SID", "TYPE", "SRC", "ASPECT", "SENTIMENT")
TARGET = "[TGT]"
PUBLISHED = {"": {"": 8_818}}
QUESTION = (
    "다음 금융 뉴스 문장을 읽으세요.\n\n{}\n\n이 문장에서 {}에 대한 감성은 무엇입니까? "
    "positive, negative, neutral 중 하나로 답하세요."
)


def rows(root: Path, *, mask: str = "none", file: str = "") -> Iterator[dict[str, Any] | Excluded]:
    """One row per text and aspect. ``mask``: none, target or other."""
    need_option("mask", mask, ("none", "target", "other"))
    path = find_file(root, *([file] if file else ("*.csv", "*.tsv", "*.jsonl", "*.json")))
    table = read_table(path, FIELDS)
    found = list(table)
    aspects = [str(one.get("ASPECT", "")) for one in found if isinstance(one, dict)]
    for place, cells in enumerate(found):
        if isinstance(cells, Excluded):
            yield cells
            continue
        values = {field: str(cells.get(field) or "").strip() for field in FIELDS}
        name = f"korfin-{place + 1}"
        yield _row(values, name, mask, _another(aspects, place, values))


def _row(values: dict[str, str], name: str, mask: str, other: str) -> dict[str, Any] | Excluded:
    text, aspect, label = values["SRC"], values["ASPECT"], values["SENTIMENT"].casefold()
    if not text or not aspect:
        return Excluded(name, "no text or no aspect")
    if label not in LABELS_3:
        return Excluded(name, "label outside the set", values["SENTIMENT"])
    verbatim = aspect in text
    if mask != "none":
        if not verbatim:
            return Excluded(name, "aspect not in the text", aspect)
        stand_in = TARGET if mask == "target" else other
        text, aspect = text.replace(aspect, stand_in), stand_in
    kind = values["TYPE"].casefold() or "unknown"
    return {
        "sample_id": name,
        "prompt": QUESTION.format(text, aspect),
        "completion": f"<answer>{label}</answer>",
        "label": label,
        "group": {
            "speaker": f"text {values['SID'] or name}",
            "entities": next((one for one in ("single", "multi") if one in kind), kind),
            "verbatim": "yes" if verbatim else "no",
        },
    }


def _another(aspects: list[str], place: int, values: dict[str, str]) -> str:
    """The aspect of a row half-way round the file that is another one and not in the text."""
    count = len(aspects)
    for step in range(count):
        one = aspects[(place + count // 2 + step) % count].strip()
        if one and one != values["ASPECT"] and one not in values["SRC"]:
            return one
    return TARGET
