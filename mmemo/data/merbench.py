"""MER-UniBench's nine test sets in the processed folders of MERBench and AffectGPT.

Each set is a folder (``meld-process``, ``mer2023-dataset-process``, ...) with clips by name, a
table of subtitles, and the labels in ``label*.npz``: a dictionary
``{name: {"emo": ..., "val": ...}}`` for each part of the data. OV-MERD+ has ``ovlabel.csv`` (name,
openset) instead. Layouts, columns and label orders are those of AffectGPT's own loaders (ICML 2025,
arXiv 2501.16566).

For scoring alone, a file of recorded predictions does in place of a folder, ``meld.json`` with
``{"items": [{"id", "gt", ...}]}``.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mmemo.config import nearest
from mmemo.data.adapter import Excluded
from mmemo.data.npz import read_npz_objects
from mmemo.errors import ConfigError, DataError

Metric = Literal["hit", "set", "sentiment"]
_MELD = ("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise")
_IEMOCAP = ("happy", "sad", "neutral", "anger")
_SUBTITLES = "transcription-engchi-polish.csv"
_CLIPS = (".mp4", ".avi", ".mkv", ".webm", ".mov")


@dataclass(frozen=True, slots=True)
class UniSet:
    """One test set: its ``metric`` and published ``size``; its ``folder`` and, inside it, the files
    of labels and subtitles and the folders of clips and sound.

    ``part``: the dictionary of the label file. ``order``: the labels behind numbers. ``session``:
    the fifth character of the names, of IEMOCAP's one session. ``text``: the column of subtitles.
    """

    name: str
    metric: Metric
    size: int
    folder: str
    labels: str
    part: str = "test_corpus"
    video: str = "video"
    audio: str = "audio"
    subtitles: str = _SUBTITLES
    text: str = "english"
    order: tuple[str, ...] = ()
    session: str = ""
    aliases: tuple[str, ...] = ()


_ALL = (
    UniSet(
        *("mer2023", "hit", 411, "mer2023-dataset-process", "label-6way.npz", "test1_corpus"),
        text="chinese",
    ),
    UniSet(
        *("mer2024", "hit", 1169, "mer2024-dataset-process", "label-6way.npz", "test1_corpus"),
        subtitles="transcription_merge.csv",
        text="chinese",
    ),
    UniSet(
        *("meld", "hit", 2610, "meld-process", "label.npz"),
        video="subvideo",
        audio="subaudio",
        order=_MELD,
    ),
    UniSet(
        *("iemocap", "hit", 1241, "iemocap-process", "label_4way.npz", "whole_corpus"),
        video="subvideo-tgt",
        audio="subaudio",
        order=_IEMOCAP,
        session="5",
        aliases=("iemocapfour", "iemocap4"),
    ),
    UniSet(
        *("mosi", "sentiment", 686, "cmumosi-process", "label.npz"),
        video="subvideo",
        audio="subaudio",
        aliases=("cmumosi",),
    ),
    UniSet(
        *("mosei", "sentiment", 4659, "cmumosei-process", "label.npz"),
        video="subvideo_new",
        audio="subaudio",
        aliases=("cmumosei",),
    ),
    UniSet("sims", "sentiment", 457, "sims-process", "label.npz", text="chinese"),
    UniSet(
        *("simsv2", "sentiment", 1034, "simsv2-process", "label.npz"),
        video="video_new",
        text="chinese",
        aliases=("sims2", "chsimsv2"),
    ),
    UniSet(
        *("ovmerdplus", "set", 532, "ovmerdplus-process", "ovlabel.csv"),
        subtitles="subtitle_eng.csv",
        text="sentence",
        aliases=("ovmerd", "ovmerd+"),
    ),
)
SETS: Mapping[str, UniSet] = {one.name: one for one in _ALL}
"""The nine sets by name, in the order of the paper's table."""


def set_named(name: str) -> UniSet:
    """A set by its name in any usual spelling: ``CMU-MOSI``, ``IEMOCAPFour``, ``OV-MERD+``.

    Raises:
        ConfigError: there is no such set.
    """
    plain = _plain(name)
    for one in _ALL:
        if plain in (one.name, *one.aliases):
            return one
    guess = nearest(plain, list(SETS))
    hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(SETS)}"
    raise ConfigError(f"MER-UniBench has no set '{name}'; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


@dataclass(frozen=True, slots=True)
class UniItem:
    """One clip. ``gold``: a label, a sentiment from negative to positive, or a list of words.
    ``subtitle`` and ``speaker`` may be empty. ``video`` and ``audio`` are relative to the root."""

    name: str
    gold: str | float | list[str]
    subtitle: str
    video: str
    audio: str
    speaker: str


def read_set(root: Path, one: UniSet) -> Iterator[UniItem | Excluded]:
    """The clips of a set in the order of its label file.

    Args:
        root: the folder that holds the sets' folders, or the set's own.

    Raises:
        DataError: the label file is missing or is no such file.
    """
    folder = root / one.folder if (root / one.folder).is_dir() else root
    recorded = None if (folder / one.labels).exists() else recorded_file(root, one)
    gold = read_gold(recorded or folder / one.labels, one)
    subtitles = _texts(folder / one.subtitles, one.text)
    for name, value in gold.items():
        if isinstance(value, Excluded):
            yield value
            continue
        # A clip that is missing is named as the release has it, and found missing by its reader.
        clip = _first(folder / one.video, name, _CLIPS)
        sound = _first(folder / one.audio, name, (".wav",)) or clip
        paths = [path or folder / one.video / f"{name}.mp4" for path in (clip, sound)]
        video, audio = (path.relative_to(root).as_posix() for path in paths)
        yield UniItem(name, value, subtitles.get(name, ""), video, audio, _speaker(name, one))


def is_there(root: Path, one: UniSet) -> bool:
    """Whether a folder holds a set."""
    return (root / one.folder).is_dir() or recorded_file(root, one) is not None


def recorded_file(root: Path, one: UniSet) -> Path | None:
    """The file of a set's recorded predictions in a folder, ``meld.json`` or ``CMU-MOSI.json``."""
    names = {one.name, *one.aliases}
    return next((path for path in sorted(root.glob("*.json")) if _plain(path.stem) in names), None)


def read_gold(path: Path, one: UniSet) -> Mapping[str, str | float | list[str] | Excluded]:
    """The name of each clip -> what is right, in the file's order; the clips without it.

    Raises:
        DataError: it is not this set's label file.
    """
    if path.suffix == ".json":
        return _recorded(path, one)
    if path.suffix == ".csv":
        texts = _texts(path, "openset", needed=True)
        return {name: _gold(name, text, one) for name, text in texts.items()}
    corpus: Any = read_npz_objects(path).get(one.part)
    if not isinstance(corpus, dict):
        raise DataError(f"has no dictionary '{one.part}'; give the released file", file=str(path))
    entries = cast("dict[Any, Any]", corpus)
    key = "val" if one.metric == "sentiment" else "emo"
    found: dict[str, str | float | list[str] | Excluded] = {}
    for name, entry in entries.items():
        if one.session and str(name)[4:5] != one.session:
            continue
        value = cast("dict[str, Any]", entry).get(key) if isinstance(entry, dict) else None
        found[str(name)] = _gold(str(name), value, one)
    return found


def _recorded(path: Path, one: UniSet) -> Mapping[str, str | float | list[str] | Excluded]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        given = {str(item["id"]): item["gt"] for item in items}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"holds no labels ({error!r})", file=str(path)) from error
    return {name: _gold(name, value, one) for name, value in given.items()}


def _gold(name: str, value: Any, one: UniSet) -> str | float | list[str] | Excluded:
    try:
        if one.metric == "set":
            words = _words(value) if isinstance(value, str) else [str(word) for word in value]
            return words or ["neutral"]  # as the released loader has it
        if one.metric == "sentiment":
            # Python floats only: MERBench writes -10 where a clip has no valence.
            number = float(value)
            known = math.isfinite(number) and number != -10
            return number if known else Excluded(f"{one.name}/{name}", "no label")
        if isinstance(value, str) and value:
            return value
        if one.order and int(value) >= 0:  # a negative one would count from the end
            return one.order[int(value)]
    except (TypeError, ValueError, IndexError):
        pass
    return Excluded(f"{one.name}/{name}", "label outside the set", str(value))


def _speaker(name: str, one: UniSet) -> str:
    """The speaker where the name tells it: ``Ses05F_impro01_M003`` is the man of session 5, and
    a video of MOSI and MOSEI (``2iD-tVS8NPw_12``) shows one person."""
    start, _, end = name.rpartition("_")
    if one.name == "iemocap":
        return name[:5] + end[:1]
    return start if one.name in ("mosi", "mosei") else ""


def _words(text: str) -> list[str]:
    inner = text.removeprefix("[").removesuffix("]")
    for quote in "'\"":
        inner = inner.replace(quote, ",")
    return [word.strip() for word in inner.split(",") if word.strip()]


def _texts(path: Path, column: str, *, needed: bool = False) -> dict[str, str]:
    """``name`` -> a column of a table; nothing where a table that is not needed is missing."""
    if not needed and not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as table:
            rows = list(csv.DictReader(table))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot be read ({error}); give the released table", file=str(path)) from (
            error
        )
    if rows and not {"name", column} <= set(rows[0]):
        raise DataError(f"has no columns 'name' and '{column}'", file=str(path))
    return {row["name"]: row[column] or "" for row in rows if row["name"]}


def _first(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    # By joining, so that names with dots keep them.
    found = (folder / f"{name}{suffix}" for suffix in suffixes)
    return next((path for path in found if path.exists()), None)
