"""Clips of tables with labels of the voice, of the picture and of the whole clip.

A file has one of two forms:

- one subset of CA-MER, named ``video-aligned.json``, ``audio-aligned.json`` or ``consistent.json``:
  a list of rows whose clips are in the folder of the same name, ``video-aligned/{file_name}.avi``;
- any other table (CSV, JSON or JSONL) with all three labels, which the rule in
  :mod:`mmemo.data.conflict` splits into the three subsets. A list of labels, or labels separated by
  commas, are the votes of several annotators; the majority counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mmemo.answers.emotion_wheels import split_words
from mmemo.answers.label_set import LabelSet, base_form, normalise
from mmemo.data import conflict
from mmemo.data.adapter import Excluded
from mmemo.data.conflict import first_existing, majority, slice_of, subset_named
from mmemo.data.manifest import DataConfig, read_rows
from mmemo.data.row_models import Row
from mmemo.data.sample import CONFLICTS, Conflict, MediaRef, Sample, Truth
from mmemo.errors import DataError, EvaluationError

GUESSES: Mapping[str, Sequence[str]] = {
    "name_key": ("file_name", "filename", "name", "video", "videos", "video_path", "file", "path"),
    "label_key": (
        *("label", "labels", "emotion", "emotions", "true_label", "ground_truth", "gt", "answer"),
        *("openset", "discrete", "category", "class"),
    ),
    "audio_key": (
        *("audio_label", "label_audio", "label_A", "label_a", "audio_emotion"),
        "modality_labels.audio",
    ),
    "video_key": (
        *("video_label", "label_video", "label_V", "label_v", "video_emotion"),
        "modality_labels.video",
    ),
    "speaker_key": ("speaker", "speaker_id", "group.speaker"),
}
"""Keys to try where none is given. The keys that CA-MER itself uses are not public."""
ENDINGS = ("", ".avi", ".mp4", ".mkv", ".mov", ".webm", ".flv")


@dataclass(frozen=True)
class Table:
    """How the rows of one file are read: the keys of their values, and their labels."""

    data: DataConfig
    file: Path
    keys: Mapping[str, str | None]
    media: str | None
    label_map: Mapping[str, str]
    classes: LabelSet

    @property
    def subset(self) -> Conflict | None:
        """The subset of a CA-MER file; None where the rule decides for each row."""
        return subset_named(self.file.stem)


def read_clips(
    data: DataConfig,
    *,
    classes: LabelSet,
    keys: Sequence[str | None] = (),
    media: str | None = None,
    label_map: Mapping[Any, str] | None = None,
) -> tuple[list[Sample], list[Excluded]]:
    """The clips of the three subsets in file order, without a question, and the rows that are in
    none. ``data.limit`` takes the first clips evenly from the subsets. The label of a clip is the
    one class that it is labelled with; a clip labelled with none, or with several, has only
    ``labels``, its words.

    Args:
        classes: the labels that a clip may have.
        keys: the keys of ``GUESSES``, in its order: of the clip's name, of the labels of the whole
            clip, of the voice and of the picture, and of the speaker. Where None, the first guess
            that a file has. ``a.b`` is ``b`` inside ``a``.
        media: the path of a row's clip under the media root, ``Raw/{video_id}/{clip_id}.mp4``.
        label_map: the meaning of labels as they are written, ``{4: angry}``.

    Raises:
        DataError, EvaluationError: a file cannot be read, or no clip is labelled with a class.
    """
    if data.tiers or data.groups:
        raise EvaluationError("data.tiers and data.groups have no effect here; leave them out")
    wanted = dict(zip_longest(GUESSES, keys))
    mapped = {str(written): word for written, word in (label_map or {}).items()}
    tables = [Table(data, Path(file), wanted, media, mapped, classes) for file in data.manifests]
    rows = [row for table in tables for row in _read(table)]
    clips = conflict.first_of_slices([row for row in rows if isinstance(row, Sample)], data.limit)
    if clips and not any(clip.truth.label for clip in clips):
        found = sorted({word for clip in clips for word in clip.truth.labels})
        raise EvaluationError(
            f"no clip's label is one of the classes ({', '.join(classes.labels)}); the labels are "
            f"{', '.join(found[:12])}: give benchmark.params.classes or label_map"
        )
    return clips, [row for row in rows if isinstance(row, Excluded)]


def find_subsets(paths: Sequence[str]) -> dict[str, Any]:
    """The files that ``--data`` names, or the three subsets in a folder; their clips are beside
    them.

    Raises:
        EvaluationError: a folder lacks a subset.
    """
    files: list[str] = []
    for path in map(Path, paths):
        found = {subset_named(file.stem): file for file in sorted(path.glob("*.json"))}
        missing = [name.replace("_", "-") for name in CONFLICTS if name not in found]
        if path.is_dir() and missing:
            raise EvaluationError(f"{path} has no {missing[0]}.json; give the folder of CA-MER")
        files += [str(found[name]) for name in CONFLICTS] if path.is_dir() else [str(path)]
    return {"manifests": files, "media_root": str(Path(files[0]).parent)}


def _read(table: Table) -> Iterator[Sample | Excluded]:
    """Each row of a file as a clip of a subset, without its question; or why it is in none."""
    rows = list(read_rows(table.file))
    if not rows:
        raise DataError("has no rows", file=str(table.file))
    for row in rows:
        if row.problems:
            raise row.problems[0]
    table = replace(table, keys=_find_keys(table, rows))
    for row in rows:
        yield _clip(row, table)


def _find_keys(table: Table, rows: Sequence[Row]) -> dict[str, str | None]:
    """The key of each role: the given one, or the first guess that some row has.

    Raises:
        EvaluationError: no row has a required key; the message lists the keys that the rows have.
    """
    needed = {"label_key"} if table.media else {"name_key", "label_key"}
    needed |= set() if table.subset else {"audio_key", "video_key"}
    found: dict[str, str | None] = {}
    for role, key in table.keys.items():
        choices = GUESSES[role] if key is None else (key,)
        present = (one for one in choices if any(_value(row, one) is not None for row in rows))
        found[role] = next(present, None)
        if found[role] is None and (key is not None or role in needed):
            have = ", ".join(dict.fromkeys(name for row in rows for name in row.values))
            raise EvaluationError(
                f"{table.file}: no row has {' or '.join(choices)}; its rows have {have}: name the "
                f"right one in benchmark.params.{role}"
            )
    return found


def _value(row: Row, key: str | None) -> Any:
    """The value of ``key``, where ``a.b`` is ``b`` inside ``a``; None where there is none."""
    value: Any = row.values
    for part in (key or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value in ("", []) else value


class _LeftOutError(Exception):
    """A row is in no subset; the arguments are the reason and its detail."""


def _clip(row: Row, table: Table) -> Sample | Excluded:
    path = table.media and _fill(table.media, row)
    name = str(path or _name(_value(row, table.keys["name_key"])))
    try:
        if not name:
            raise _LeftOutError("no name", "")
        channels = _channels(row, table)
        words = _joint(row, table)
        spelled = {_spelled(word, table) for word in words}
        kind = _slice(channels, spelled, table)
    except _LeftOutError as reason:
        return Excluded(f"{name or 'row'} ({table.file.name}:{row.line})", *reason.args)
    classes = spelled & {*table.classes.labels}
    label = min(classes) if len(classes) == 1 else None
    path = path or _find_media(name, table)
    speaker = _value(row, table.keys["speaker_key"])
    streams = table.data.modalities
    return Sample(
        sample_id=f"{table.file.stem}/{name}",
        turns=(),
        media={m: MediaRef(path) for m in (("video", "audio") if streams is None else streams)},
        truth=Truth(label, words, modality_labels=channels, conflict=kind),
        group={} if speaker is None else {"speaker": str(speaker)},
        source=(str(table.file), row.line),
    )


def _channels(row: Row, table: Table) -> dict[str, str]:
    """The labels of voice and picture; empty for a subset whose rows do not have both."""
    values = {side: _value(row, table.keys[f"{side}_key"]) for side in ("audio", "video")}
    if table.subset and None in values.values():
        return {}
    return {side: _vote(value, table, f"{side} label") for side, value in values.items()}


def _joint(row: Row, table: Table) -> tuple[str, ...]:
    """The words of the whole clip's label; in a CA-MER file, all that it lists."""
    value = _value(row, table.keys["label_key"])
    return _words(value, table, "label") if table.subset else (_vote(value, table, "label"),)


def _slice(channels: Mapping[str, str], joint: set[str], table: Table) -> Conflict:
    """The subset by the rule, or that of the file where the row's labels do not suffice for the
    rule."""
    if table.subset is not None and (not channels or len(joint) > 1):
        return table.subset
    whole = min(joint)
    found = slice_of(channels["audio"], channels["video"], whole)
    detail = f"voice {channels['audio']}, picture {channels['video']}, clip {whole}"
    if found == "all_different" or found == "joint_differs":
        raise _LeftOutError(found.replace("_", " "), detail)
    if table.subset not in (None, found):
        raise _LeftOutError("in the file of another subset", detail)
    return found


def _vote(value: Any, table: Table, what: str) -> str:
    """One label: that of the majority where the value lists the labels of several annotators."""
    words = _words(value, table, what)
    # Votes are counted by class, because annotators may use several forms of one word.
    most = majority([_spelled(word, table) for word in words])
    if most is None:
        raise _LeftOutError(f"annotators split on the {what}", ", ".join(words))
    return most


def _words(value: Any, table: Table, what: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    found: list[str] = []
    for one in listed:
        if str(one) in table.label_map:
            found.append(table.label_map[str(one)])
        elif isinstance(one, str):
            for part in re.split(r"[,;/\n]", one):  # as written: "-1.0" and "1.0" are two labels
                mapped = table.label_map.get(part.strip())
                found += split_words(part, "corrected") if mapped is None else [mapped]
        elif one is not None:
            raise _LeftOutError(f"{what} is no word", f"{one!r}: add it to label_map")
    if not found:
        raise _LeftOutError(f"no {what}", "")
    return tuple(found)


def _spelled(word: str, table: Table) -> str:
    """The class that a word is a form of, or else a canonical spelling of the word."""
    return table.classes.exact(normalise(word)) or base_form(word)


def _name(value: Any) -> str:
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    return str(one) if isinstance(one, str | int) else ""


def _find_media(name: str, table: Table) -> str:
    """The path of a clip. CA-MER's clips are in the folder with the name of their file, with any
    extension; other names are paths."""
    folders = (table.file.stem, ".") if table.subset else (".", table.file.stem)
    # A name with an extension is tried as it stands first, and a name without one last.
    endings = sorted(ENDINGS, key=lambda ending: bool(ending) == bool(Path(name).suffix))
    names = [(Path(folder) / (name + end)).as_posix() for folder in folders for end in endings]
    return first_existing(Path(table.data.media_root), names)


def _fill(media: str, row: Row) -> str:
    try:
        return media.format_map(row.values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"benchmark.params.media '{media}' does not fit {row.file}:{row.line}, whose keys are "
            f"{', '.join(row.values)}"
        ) from error
