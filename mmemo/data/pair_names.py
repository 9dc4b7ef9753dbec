"""The names of other data sets' preference rows, and the names here that they are read as.

Sources: AVERE's DPO records (``rejected_2``, ``video_l``, ``audio_l``), VistaDPO's (the same, and
finer annotations that no loss here reads), short forms (``rejected_halluc``, ``video_neg``,
``neg_type``), and the ``_w`` and ``_l`` of the DPO papers' formulas for what is preferred and what
is not. TRL's and ms-swift's names are read by :mod:`mmemo.data.rows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from mmemo.config import nearest
from mmemo.data.row_models import IMAGE_KEYS, KNOWN_KEYS, Row
from mmemo.data.sample import MODALITIES

Query = Literal["audio", "video", "joint"]

QUERY_NAMES: Mapping[str, Query] = {
    "audio": "audio",
    "video": "video",
    "joint": "joint",
    "visual": "video",
    "vision": "video",
    **dict.fromkeys(("audiovisual", "audio-visual", "av", "both"), "joint"),
}
"""Name of a ``query_modality`` -> the query that it stands for."""

NAMES: Mapping[str, str] = {
    "rejected_halluc": "rejected_hallucinated",
    "neg_type": "negative_kind",
    **{f"{m}_w": m for m in MODALITIES},
    **{f"chosen_{m}": m for m in MODALITIES},
    **{
        name: f"{m}_negative"
        for m in MODALITIES
        for name in (f"{m}_l", f"{m}_neg", f"{m}_rejected", f"rejected_{m}")
    },
}
"""Another data set's key -> the key here."""

UNREAD = ("bbox", "clip", "clip_w", "clip_l", "frame", "frame_w", "frame_l", "has_X")
"""VistaDPO's keys that have no counterpart here; their rows are read without them."""

_TWO: Mapping[str, tuple[str, str]] = {
    "spurious": ("rejected_spurious", "rejected_hallucinated"),
    "hallucinated": ("rejected_hallucinated", "rejected_spurious"),
}
"""Kind of ``rejected`` -> what ``rejected`` and ``rejected_2`` are. AVERE's first rejected answer
relies on what is there but beside the point, the second on what is not there."""


def query_named(value: object) -> Query | None:
    """The query that a ``query_modality`` names, or None."""
    return QUERY_NAMES.get(value.strip().lower()) if isinstance(value, str) else None


def rename(row: Row, own: Sequence[str], columns: Sequence[str]) -> tuple[Row, dict[str, str]]:
    """The row under this package's names. Problems are added to the row.

    Args:
        own: the keys of a pair beyond those of any row.
        columns: keys that are passed through unread, whatever they are called.

    Returns:
        The row, which shares the list of problems, and how its keys were read: key -> key here,
        which is empty for a key that is not read.
    """
    values: dict[str, Any] = {}
    read: dict[str, str] = {}
    for key, value in row.values.items():
        name = key if key in columns else NAMES.get(key, key)
        if key in UNREAD and key not in columns:
            read[key] = ""
        elif name == key:
            values[key] = value
        elif value is not None:
            earlier = next((k for k, n in read.items() if n == name), name)
            if row.has(name) or earlier != name:
                row.bad(key, f"cannot be combined with '{earlier}'; keep one of them")
            read[key] = name
            values[name] = value
    if row.has("rejected_2") and "rejected_2" not in columns:
        read |= _split(row, values)
    if "rejected_2" not in columns:
        values.pop("rejected_2", None)
    known = (*KNOWN_KEYS, *own, *NAMES, "rejected_2", "AUs", *columns)
    for key in values:
        if key not in known and key not in IMAGE_KEYS:
            guess = nearest(key, known)
            hint = f"did you mean '{guess}'?" if guess else "remove it"
            row.bad(key, f"is unknown; {hint} (to pass it through, list it in data.columns)")
    written = {name: key for key, name in read.items() if name}
    return Row(values, row.file, row.line, row.problems, written), read


def _split(row: Row, values: dict[str, Any]) -> dict[str, str]:
    """Give ``rejected`` and ``rejected_2`` the names of their kinds."""
    other = next((k for k in values if k in _TWO["spurious"] and values[k] is not None), None)
    kind = values.get("rejected_kind") or "spurious"
    if other is not None:
        row.bad("rejected_2", f"cannot be combined with '{other}'; keep one of them")
    elif not row.has("rejected"):
        row.bad("rejected_2", "needs 'rejected', the first rejected answer; add it")
    elif not isinstance(kind, str) or kind not in _TWO:
        return {}  # the error of rejected_kind says it
    else:
        first, second = _TWO[kind]
        values[first], values[second] = values.pop("rejected"), values["rejected_2"]
        values.pop("rejected_kind", None)
        return {"rejected": first, "rejected_2": second}
    return {}


def reading(found: Iterable[Mapping[str, str]]) -> list[str]:
    """How the keys of pairs were read, a sentence for each key that has another name here."""
    counts = Counter((key, name) for read in found for key, name in read.items())
    sentences: list[str] = []
    for (key, name), count in sorted(counts.items()):
        what = f"is read as '{name}'" if name else "is not read"
        sentences.append(f"'{key}' {what} ({count:,} pairs)")
    return sentences
