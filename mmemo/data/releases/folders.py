"""What the adapters of released folders share: clips by name, and rows with a label.

Releases are read as they are found on disks: with emotions in another case, the file of another
operating system beside a clip (``._name.mp4``), or a clip in another container than the
documentation says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.label_sets import MappedLabel, mapping
from mmemo.answers.messages import one_line
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import whole_table
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import MODALITIES
from mmemo.errors import ConfigError, EvaluationError

CLIPS = (".mp4", ".avi", ".mkv", ".mov", ".flv", ".webm")
"""Suffixes of clips, the usual one first."""
SOUNDS = (".wav", ".flac", ".mp3", ".m4a")
_WORDS = ("chinese", "text", "sentence", "transcription", "english")


def read_words(root: Path, files: Sequence[str], key: str = "name") -> dict[str, str]:
    """Name of each clip to its words, from the first of ``files`` that is there; Chinese goes
    before English. Empty without such a file."""
    table = next((root / one for one in files if (root / one).is_file()), None)
    rows = [] if table is None else whole_table(table, (key,))
    found: dict[str, str] = {}
    for row in rows:
        cells = {name.lower(): value for name, value in row.items()}
        words = next((cells[name] for name in _WORDS if cells.get(name)), "")
        if words and words not in ("nan", "NaN"):  # as pandas writes an empty cell
            found[row[key]] = words
    return found


class ClipIndex:
    """The files of some folders of a release by name, without suffix. A name in another case is
    found too, if there is none in the same.

    Args:
        root: the release's folder; paths are relative to it.
        folders: patterns of folders, such as ``Clip`` or ``train*``, or ``.`` for the whole root;
            the first one that has the name counts. Their subfolders are searched too.
        suffixes: kinds of files, the preferred one first.
        key: what a file is known by, from its path relative to the matched folder; the name without
            suffix by default.
    """

    def __init__(
        self,
        root: Path,
        folders: Sequence[str],
        suffixes: Sequence[str] = CLIPS,
        key: Callable[[Path], str] = lambda path: path.stem,
    ) -> None:
        self._files: dict[str, str] = {}
        self._folded: dict[str, str] = {}
        for pattern in folders:
            for folder in [root] if pattern == "." else sorted(root.glob(pattern)):
                found = [
                    (suffixes.index(file.suffix.lower()), file) for file in _walk(folder, suffixes)
                ]
                for _, file in sorted(found):
                    path = file.relative_to(root).as_posix()
                    name = key(file.relative_to(folder))
                    self._files.setdefault(name, path)
                    self._folded.setdefault(name.casefold(), path)

    def __len__(self) -> int:
        return len(self._files)

    def find(self, name: str, otherwise: str) -> str:
        """The path of a name; ``otherwise``, where the release should have it, if there is none."""
        return self._files.get(name) or self._folded.get(name.casefold(), otherwise)


def _walk(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    # os.walk, because a release may have a million frames beside its clips.
    for parent, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


class LabelReader:
    """Reads the labels of a release as those of another set, or of its own.

    Raises:
        EvaluationError: there is no such label set.
    """

    def __init__(self, source: str, target: str) -> None:
        self.mapping = mapping(source, target)
        self.names = ", ".join(self.mapping.target.names)
        self._read: dict[str, MappedLabel | None] = {}

    def __call__(self, written: str, row: str) -> str | Excluded:
        """The label of the row ``row``, which a file writes as ``written``; or a row to leave out,
        if one of the sets has none for it."""
        if written not in self._read:
            try:
                self._read[written] = self.mapping[written]
            except EvaluationError:
                self._read[written] = None
        found = self._read[written]
        if found is None:
            return Excluded(row, "label outside the set", written or "(empty)")
        if found.target is None:
            reason = f"no such label in {self.mapping.target.name}"
            return Excluded(row, reason, found.label, expected=True)
        return found.target


def labelled_row(
    sample_id: str,
    question: str,
    label: str,
    media: Mapping[str, str],
    *,
    transcript: str = "",
    group: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A manifest row that asks for a label.

    Args:
        question: without placeholders, which are put before it.
        media: path of the file by modality.
        transcript: the words that are said; "" if they are not known.
        group: fields without a value are left out.
        more: further keys of the row.
    """
    row: dict[str, Any] = {
        "sample_id": sample_id,
        "prompt": "".join(PLACEHOLDERS[one] for one in MODALITIES if one in media) + question,
        "completion": f"<answer>{label}</answer>",
        **media,
        "label": label,
        "group": {key: value for key, value in (group or {}).items() if value},
        **more,
    }
    if transcript.strip():
        row["transcript"] = transcript.strip()
    return row


def number(written: str) -> float | None:
    """The number of a cell; None for an empty one, a word, and what is not finite."""
    try:
        value = float(written)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parts_of_folds(split: str, fold: str, folds: int = 5) -> list[tuple[str, str]]:
    """The lists, (part, fold), that the options ``split`` (all, train or test) and ``fold`` (a
    number or all) of a set with folds ask for. All folds are their test parts: together, the set.

    Raises:
        ConfigError: an option has another value, or all training parts are asked for.
    """
    numbers = [str(number + 1) for number in range(folds)]
    need_option("split", split, ("all", "train", "test"))
    need_option("fold", fold, (*numbers, "all"))
    if fold != "all":
        return [(part, fold) for part in (("train", "test") if split == "all" else (split,))]
    if split == "train":
        raise ConfigError(f"fold=all has no training part; choose one of {', '.join(numbers)}")
    return [("test", number) for number in numbers]


def words_of(text: str) -> str:
    """Words that somebody wrote or said, as they may stand in a question: on one line, and without
    what would be read as the place of a clip."""
    for mark in PLACEHOLDERS.values():
        text = text.replace(mark, " ")
    return one_line(text)


def talking(path: str) -> dict[str, str]:
    """The media of a clip with picture and sound."""
    return dict[str, str].fromkeys(MODALITIES, path)


def once(rows: Iterator[dict[str, Any] | Excluded]) -> Iterator[dict[str, Any] | Excluded]:
    """The rows, with the second one of an id left out."""
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, dict):
            if row["sample_id"] in seen:
                yield Excluded(row["sample_id"], "listed twice")
                continue
            seen.add(row["sample_id"])
        yield row
