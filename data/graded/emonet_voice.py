"""EmoNet-Voice Bench: how strongly a voice expresses one of 40 emotions, as experts rated it.

12,600 synthetic clips (Schuhmann et al., arXiv 2506.09827) under CC BY 4.0; psychologists rated how
strongly each expresses its one emotion: 0 absent, 1 mild, 2 intense. Get EmoNet-Voice Bench from
LAION on the Hugging Face hub. Layout of the folder (columns as third parties read them; an export
as .jsonl or .csv does as well)::

    data/train-00000-of-00003.parquet     audio, label: "[{'human-1': {'Fear': 2}}, ...]"
    audio/0a1b2c3d_1.wav                  the sounds; --option extract=yes writes them (pyarrow)

``label`` is the text of a Python list with a dict for each rater, whose category is URL-encoded and
shortened ("Hope" for "Hope/Enthusiasm/Optimism"). ``gold`` is the raters' mean times 5, 0 to 10.
``group.heard`` is ``all`` where every rater gave 1 or more, which holds for 4,692 clips. There are
no voice ids; the clips of one generation share the prefix in ``group.generation``. ``ask=both``
adds a question of ours about those 4,692 clips: which of the 40 emotions is it?

    mmemo manifest data/graded/emonet_voice.py --root EMONET --output emonet_voice.jsonl
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mmemo.answers.label_sets import emotion_set
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.exports import read_export
from mmemo.data.releases.folders import SOUNDS, ClipIndex, once
from mmemo.errors import EvaluationError

COLUMNS = ("task", "gold")
PUBLISHED = {"": {"": 12600}, "ask=both": {"": 12600 + 4692}}
QUESTION = (
    "<audio>How strongly does the speaker's voice express {}? Answer with one number from 0 (not "
    "at all) to 10 (very strongly)."
)
WHICH = (
    "<audio>Which emotions does the speaker's voice express? Name the three most likely ones, the "
    f"most likely first, of: {'; '.join(emotion_set('emonet').names)}."
)
_PARTS = re.compile(r"\s*[/&,|]\s*|\s+and\s+|_+")


def rows(
    root: Path, *, extract: str = "no", ask: str = "intensity"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``extract``: whether to write the sounds of parquet files to ``audio/``.
    ``ask``: intensity or both."""
    need_option("ask", ask, ("intensity", "both"))
    need_option("extract", extract, ("no", "yes"))
    sounds = root / "audio" if extract == "yes" else None
    lines = list(read_export(root, ("audio", "label"), sounds))
    clips = ClipIndex(root, ["."], SOUNDS)
    yield from once(row for line in lines for row in _rows(line, clips, ask))


def _rows(
    line: dict[str, Any] | Excluded, clips: ClipIndex, ask: str
) -> Iterator[dict[str, Any] | Excluded]:
    if isinstance(line, Excluded):
        yield line
        return
    sound = line["audio"]
    name = Path(str(sound["path"] if isinstance(sound, dict) else sound)).name
    rated = read_label(str(line["label"]))
    if isinstance(rated, str):
        yield Excluded(name, rated, str(line["label"])[:200])
        return
    emotion, ratings = rated
    heard = "all" if all(ratings) else "some" if any(ratings) else "none"
    group = {"emotion": emotion, "heard": heard}
    gold = 5 * sum(ratings) / len(ratings)
    if found := re.match(r"[0-9a-f]{8}(?![0-9a-f])", name):
        group["generation"] = found.group()
    row = {
        "sample_id": f"emonet-voice-{Path(name).stem}",
        "prompt": QUESTION.format(emotion.lower()),
        "audio": clips.find(Path(name).stem, f"audio/{name}"),
        "completion": f"<answer>{gold:g}</answer>",
        "gold": gold,
        "group": group,
    }
    yield row
    if ask == "both" and heard == "all":
        which = {"sample_id": f"{row['sample_id']}-emotion", "prompt": WHICH, "task": "emotion"}
        yield {**row, **which, "gold": emotion, "completion": f"<answer>{emotion}</answer>"}


def read_label(cell: str) -> tuple[str, list[float]] | str:
    """The emotion and each rater's 0, 1 or 2 of a ``label`` cell; or why it cannot be read."""
    try:
        raters = [r for one in ast.literal_eval(cell.strip()) for r in one.values()]
        pairs = [(unquote(name), value) for one in raters for name, value in one.items()]
    except (ValueError, SyntaxError, TypeError, AttributeError, MemoryError, RecursionError):
        return "label cannot be read"
    emotions = {_emotion(name) for name, _ in pairs}
    if len(emotions) != 1:
        return "several emotions" if emotions else "no ratings"
    (emotion,) = emotions
    if emotion is None:
        return "label outside the set"
    if any(type(value) not in (int, float) or value not in (0, 1, 2) for _, value in pairs):
        return "rating outside 0 to 2"
    return emotion, [float(value) for _, value in pairs]


def _emotion(written: str) -> str | None:
    """The label that a category means: "Hope", "Hope/Optimism" and "hope & enthusiasm" are one."""
    found: set[str] = set()
    for part in (written, *_PARTS.split(written)):
        try:
            found.add(emotion_set("emonet").find(part).name)
        except EvaluationError:
            continue
    return found.pop() if len(found) == 1 else None
