"""BERSt: nonsense phrases spoken, raised and shouted by actors, at 19 places of the phone.

4,526 clips of 98 actors (Tuttösí et al., arXiv 2505.00059) under CC BY 4.0; get
https://huggingface.co/datasets/Rosie-Lab/BERSt. Layout of the folder::

    berst-data/test/metadata.csv     file_name (or audio), user_id, gender, affect, phone_position,
                                     script, shout_level, first_language, current_language, ...
    berst-data/test/audio/shout_data_0b1d3d41-....wav
    berst-data/train, berst-data/validation

``affect`` is what the actor was asked for. Nobody listened whether it is heard, so no answer about
the voice can be shown wrong. The label for joy and the middle level's name are assumed.

``group.shout`` is none, raised or shout. ``group.distance`` is an order of the positions, which are
sentences: 0 at the body, 1 in reach or up to 2 m, 2 across the room, 3 outside it; ``unknown``
where no rule fits. ``group.obstructed`` is yes where the phone is in or under something. The rules
are ours; ``positions=FILE`` names a JSON object of sentence -> distance that goes before them.

    mmemo manifest data/spoken/berst.py --root BERSt --output berst.jsonl --split train
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import (
    SOUNDS,
    ClipIndex,
    LabelReader,
    labelled_row,
    once,
)
from mmemo.data.releases.tables import read_table, read_text
from mmemo.errors import DataError

LABELS = "berst"
COLUMNS = ("task", "gold")
SPLITS = ("train", "validation", "test")
PUBLISHED = {
    f"split={name},ask=emotion": {"": count}
    for name, count in zip(("all", *SPLITS), (4523, 3503, 488, 532), strict=True)
}
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."
WORDS = "<audio>Write down what the speaker says, word for word."
_NEEDS = ("affect", "shout_level", "phone_position", "user_id", "script")
_OWN = "(?:the |your |my |their )?"
_HEAD = rf"{_OWN}(?:body|mouth|face|head|ear|chest|lap|person|hand)s?"
_DISTANCES = (  # the first that fits
    (
        "3",
        r"(?:other|another|different|next|adjacent) room|out(?:side)? of|outside|hall|upstairs"
        rf"|downstairs|behind {_OWN}(?:a )?(?:closed )?door",
    ),
    (
        "2",
        r"(?:other|far|opposite) (?:side|end|corner)|across|far (?:away|from)"
        r"|\b(?:[3-9]|\d\d)(?:\s*-\s*\d+)?\s*(?:m\b|met)",
    ),
    ("0", rf"pocket|held|holding|(?:near|in|on|at|to|by|beside) {_HEAD}"),
    (
        "1",
        r"\b[12](?:\s*-\s*2)?\s*(?:m\b|met)|arm|reach|front|beside|next to|near|table|desk|close",
    ),
)
_OBSTRUCTED = (
    r"pocket|bag|backpack|purse|drawer|under|behind|cover|face ?down|inside|obstruct|blanket"
    r"|pillow|cupboard|closet|\bbox"
)


def rows(
    root: Path,
    *,
    split: str = "all",
    ask: str = "emotion",
    positions: str = "",
    labels: str = LABELS,
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip and task. ``split``: all, train, validation or test. ``ask``: emotion,
    transcript or both. ``labels``: the label set of the rows."""
    need_option("split", split, ("all", *SPLITS))
    need_option("ask", ask, ("emotion", "transcript", "both"))
    read = LabelReader(LABELS, labels)
    own = _positions(positions)
    for part in SPLITS if split == "all" else (split,):
        table = next(iter(sorted(root.glob(f"**/{part}/metadata.csv"))), None)
        if table is None and split == "all":
            continue
        if table is None:
            raise DataError(f"has no {part}/metadata.csv; check --data", file=str(root))
        yield from once(_rows(root, table, part, read, own, ask))


def _rows(
    root: Path, table: Path, part: str, read: LabelReader, own: Mapping[str, str], ask: str
) -> Iterator[dict[str, Any] | Excluded]:
    folder = table.parent.relative_to(root).as_posix()
    clips = ClipIndex(root, [folder], SOUNDS)
    for line in read_table(table, _NEEDS):
        if isinstance(line, Excluded):
            yield line
            continue
        name = Path(line.get("file_name") or line.get("audio") or line.get("audio_id") or "").name
        row = f"berst-{part}-{Path(name).stem}"
        path = clips.find(Path(name).stem, f"{folder}/audio/{name}")
        group = {
            "speaker": line["user_id"],
            "gender": line.get("gender", "").lower(),
            "first_language": line.get("first_language", ""),
            "shout": shout_of(line["shout_level"]),
            "distance": own.get(line["phone_position"]) or distance_of(line["phone_position"]),
            "obstructed": "yes" if re.search(_OBSTRUCTED, line["phone_position"].lower()) else "no",
        }
        label = read(line["affect"], row)
        if ask != "transcript":
            yield (
                label
                if isinstance(label, Excluded)
                else labelled_row(
                    row, QUESTION.format(read.names), label, {"audio": path}, group=group
                )
            )
        if ask != "emotion" and not line["script"]:
            yield Excluded(f"{row}-words", "no script")
        elif ask != "emotion":
            yield {
                "sample_id": f"{row}-words",
                "prompt": WORDS,
                "completion": line["script"],
                "audio": path,
                "task": "transcript",
                "gold": [line["script"]],
                "group": {key: value for key, value in group.items() if value},
            }


def shout_of(level: str) -> str:
    """none, raised or shout; any other text is kept."""
    text = level.lower().strip()
    if re.search(r"\b(?:no|not|none|normal|speak\w*|spoken|calm)\b", text):
        return "none"
    if re.search(r"rais|slight|mid|medium|some|low|loud", text):
        return "raised"
    return "shout" if "shout" in text else text


def distance_of(position: str) -> str:
    """The distance of a position, 0 to 3, or unknown."""
    text = position.lower()
    return next((rank for rank, rule in _DISTANCES if re.search(rule, text)), "unknown")


def _positions(file: str) -> Mapping[str, str]:
    if not file:
        return {}
    try:
        found: Any = json.loads(read_text(Path(file)))
        return {str(key): str(value) for key, value in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"must be a JSON object of position -> distance ({error})", file=file
        ) from error
