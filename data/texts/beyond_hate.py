"""Beyond Hate: memes that are hateful, uncivil or intolerant.

2,030 memes of Hateful Memes, labelled again for incivility and intolerance (arXiv 2603.22985). The
memes are Facebook AI's (Kiela et al., NeurIPS 2020), under its own agreement; for the new labels
see the paper. Layout of the folder::

    *.jsonl         id, img, label (1: hateful), text, and incivility and intolerance, 0 or 1
    img/01235.png   the memes
    clips/01235.mp4 the memes as clips, which you make, see below

The names of both new columns are an assumption; ``incivility=NAME`` and ``intolerance=NAME`` give
others. A meme without them has only its question about hate. ``file`` names one of several files.

Memes are pictures, and rows take clips. Make each one a clip of a second, in the folder ``img``:

    for f in *.png; do
      ffmpeg -loop 1 -i $f -t 1 -r 4 -vf scale=512:-2 -pix_fmt yuv420p ../clips/${f%.png}.mp4
    done

With ``picture=none`` only the words of the meme are shown, which is a baseline of its own.

    mmemo manifest data/texts/beyond_hate.py --root BeyondHate --output memes.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import find_file, read_table

COLUMNS = ("task", "gold")
KINDS = ("uncivil", "intolerant")
HATE = "{}This meme says: {}\n\nIs the meme hateful? Answer with yes or no."
KIND = (
    "{}This meme says: {}\n\nIs it uncivil (rude, insulting or vulgar), intolerant (against people "
    "for what they are, or against their rights)? Answer with uncivil, intolerant, both of them "
    "separated by a comma, or none."
)


def rows(
    root: Path,
    *,
    file: str = "*.jsonl",
    picture: str = "clip",
    incivility: str = "incivility",
    intolerance: str = "intolerance",
) -> Iterator[dict[str, Any] | Excluded]:
    """Two rows per meme, for the tasks ``hateful`` and ``kinds``. ``picture``: clip or none."""
    need_option("picture", picture, ("clip", "none"))
    seen: set[str] = set()
    for place, values in enumerate(read_table(find_file(root, file)), start=1):
        if isinstance(values, Excluded):
            yield values
            continue
        name = f"meme-{str(values.get('id', '')).strip() or place}"
        text = str(values.get("text") or "").strip()
        if name in seen or not text:
            yield Excluded(name, "listed twice" if name in seen else "no text")
            continue
        seen.add(name)
        base: dict[str, Any] = {"group": {"speaker": name}}
        if picture == "clip":
            stem = PurePosixPath(str(values.get("img") or name.removeprefix("meme-"))).stem
            base["videos"] = [f"clips/{stem}.mp4"]
        mark = "<video>" if picture == "clip" else ""
        hateful = _truth(values.get("label"))
        if hateful is None:
            yield Excluded(f"{name}-hateful", "no label", str(values.get("label")))
        else:
            label = "yes" if hateful else "no"
            yield {
                **base,
                "sample_id": f"{name}-hateful",
                "task": "hateful",
                "prompt": HATE.format(mark, text),
                "completion": f"<answer>{label}</answer>",
                "label": label,
            }
        found = [_truth(values.get(column)) for column in (incivility, intolerance)]
        if None in found:
            if found != [None, None] or any(one in values for one in (incivility, intolerance)):
                yield Excluded(f"{name}-kinds", "no label", str(found))
            continue
        gold = [kind for kind, true in zip(KINDS, found, strict=True) if true]
        yield {
            **base,
            "sample_id": f"{name}-kinds",
            "task": "kinds",
            "prompt": KIND.format(mark, text),
            "completion": f"<answer>{', '.join(gold) or 'none'}</answer>",
            "gold": gold,
        }


def _truth(value: Any) -> bool | None:
    """A label of 0 or 1, however it is written."""
    written = str(value).strip().casefold()
    known = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    return known.get(written)
