"""Utterances whose voice, picture and whole were labelled apart, with the labels of each in a file,
or a folder, of its own, as in EmotionTalk's release (arXiv 2505.23018).

Each manifest is named ``mm`` or ``multimodal``, ``audio`` or ``video``, or lies in a folder with
such a name. It is a table (``file_name,emotion``), or a folder with one JSON file per utterance:
``emotion_result`` is the annotators' consensus, and where a file has none, the majority of its
``data`` counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmemo.answers.label_set import LabelSet, normalise
from mmemo.data.adapter import Excluded
from mmemo.data.conflict import first_existing, first_of_slices, majority, slice_of
from mmemo.data.manifest import DataConfig, read_rows
from mmemo.data.sample import MediaRef, Sample, Truth
from mmemo.errors import DataError, EvaluationError

NAMES: Mapping[str, tuple[str, ...]] = {
    "joint": ("mm", "multimodal"),
    "audio": ("audio",),
    "video": ("video",),
}
"""Kind of label to the names of manifests, or of their nearest folders, that contain it."""
FORMS = (
    ("mm.csv", "audio.csv", "video.csv"),
    ("Multimodal/json", "Audio/json", "Video/json"),
)
"""The two forms that the labels in a folder may have."""
_FOLDERS = ("", "mp4/", "Multimodal/mp4/", "Multimodal/")


class _NoLabelError(Exception):
    """An utterance has no label of one kind; the arguments are the reason and its detail."""


def read_utterances(
    data: DataConfig,
    *,
    classes: LabelSet,
    splits: Mapping[str, Sequence[str]],
    split: str,
) -> tuple[list[Sample], list[Excluded]]:
    """The utterances of the three conflict subsets, without a question, in the order of the labels
    of the whole; and those that lack one of the three labels. ``data.limit`` takes the first ones
    evenly from the subsets.

    Args:
        splits: the published splits but for ``train``, and the sessions of each.
        split: the split to take, or ``all``. A session of no other split is of ``train``.

    Raises:
        DataError, EvaluationError: there is no such split, or the files do not fit together.
    """
    if split not in ("all", "train", *splits):
        raise EvaluationError(f"split is '{split}'; use test, val, train or all")
    if data.tiers or data.groups:
        raise EvaluationError("data.tiers and data.groups have no effect here; leave them out")
    tables = _read(data.manifests)
    kept: list[Sample] = []
    excluded: list[Excluded] = []
    # From all three tables, so that an utterance that is missing in one of them is counted.
    for name in dict.fromkeys(name for kind in NAMES for name in tables[kind]):
        session = name.partition("_")[0]
        own = next((known for known, sessions in splits.items() if session in sessions), "train")
        if split not in ("all", own):
            continue
        try:
            kept.append(_sample(name, tables, data, classes))
        except _NoLabelError as reason:
            excluded.append(Excluded(name, *reason.args))
    return first_of_slices(kept, data.limit), excluded


def find_tables(paths: Sequence[str]) -> dict[str, Any]:
    """The manifests that ``--data`` names, or those in the folder that it names, which then also
    contains the clips.

    Raises:
        EvaluationError: the folder has labels in neither form.
    """
    root = Path(paths[0])
    if len(paths) > 1:
        return {"manifests": list(paths)}
    for form in FORMS:
        for place in (".", "mm-process", "dataset/mm-process"):
            found = [root / place / name for name in form]
            if all(path.exists() for path in found):
                return {"manifests": [str(path) for path in found], "media_root": str(root)}
    wanted = " nor ".join(", ".join(form) for form in FORMS)
    raise EvaluationError(f"{root} has neither {wanted}; give the folder that does")


Table = dict[str, dict[str, Any]]
"""Utterance to its row: ``file_name`` and ``emotion`` of a CSV file, or a whole JSON file."""


def _sample(name: str, tables: Mapping[str, Table], data: DataConfig, classes: LabelSet) -> Sample:
    label = {kind: _label(tables[kind].get(name), kind, classes) for kind in NAMES}
    conflict = slice_of(label["audio"], label["video"], label["joint"])
    if conflict == "all_different" or conflict == "joint_differs":
        detail = f"voice {label['audio']}, picture {label['video']}, clip {label['joint']}"
        raise _NoLabelError(conflict.replace("_", " "), detail)
    row = tables["joint"][name]
    clip = str(row.get("file_name") or name)
    clip = clip if clip.endswith(".mp4") else f"{clip}.mp4"
    path = first_existing(Path(data.media_root), [folder + clip for folder in _FOLDERS])
    streams = ("video", "audio") if data.modalities is None else data.modalities
    session, _, speaker = name.split("_")[:3] if name.count("_") >= 3 else (name, "", "")
    return Sample(
        sample_id=name,
        turns=(),
        media={modality: MediaRef(path) for modality in streams},
        truth=Truth(
            label["joint"],
            modality_labels={side: label[side] for side in ("audio", "video")},
            conflict=conflict,
        ),
        group={"speaker": str(row.get("speaker_id") or speaker or name), "session": session},
    )


def _label(row: Mapping[str, Any] | None, kind: str, classes: LabelSet) -> str:
    """The class of the utterance in a row."""
    what = f"{kind} label"
    if row is None:
        raise _NoLabelError(f"no {what}")
    given = row.get("emotion", row.get("emotion_result"))
    listed = _words(given) or _words(row.get("data"))
    if not listed:
        raise _NoLabelError(f"no {what}")
    known = [classes.exact(normalise(word)) for word in listed]
    if None in known:
        strange = listed[known.index(None)]
        raise _NoLabelError(f"unknown {what}", strange)
    most = majority(cast("list[str]", known))
    if most is None:
        raise _NoLabelError(f"annotators split on the {what}", ", ".join(listed))
    return most


def _words(value: Any) -> list[str]:
    """The words of a consensus label, or of a list of the annotators' labels."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        entry = cast("dict[str, Any]", value)
        return _words(entry.get("emotion_result", entry.get("emotion")))
    if isinstance(value, list):
        return [word for one in cast("list[Any]", value) for word in _words(one)]
    return []


def _read(manifests: Sequence[str]) -> dict[str, Table]:
    """The rows of each kind of label, by utterance."""
    tables: dict[str, Table] = {kind: {} for kind in NAMES}
    for manifest in manifests:
        path = Path(manifest)
        table = tables[_kind(path)]
        for row in _json_rows(path) if path.is_dir() else _csv_rows(path):
            name = Path(str(row["file_name"])).stem
            if name in table:
                raise DataError(f"'{name}' is labelled twice; keep one", file=manifest)
            table[name] = row
    for kind, table in tables.items():
        if not table:
            raise EvaluationError(
                f"no manifest has {kind} labels; give mm.csv, audio.csv and video.csv, or the "
                "folders Multimodal/json, Audio/json and Video/json"
            )
    return tables


def _kind(path: Path) -> str:
    """The kind of labels in a manifest, from its name or that of its nearest folder."""
    for part in (path.stem, *reversed(path.parent.parts)):
        for kind, names in NAMES.items():
            if part.casefold() in names:
                return kind
    raise EvaluationError(
        f"{path}: neither the file nor a folder above it is named mm, multimodal, audio or video, "
        "so the kind of its labels is unknown; rename it"
    )


def _csv_rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".npz":
        raise DataError("is a pickle, which is not read; give the CSV beside it", file=str(path))
    for row in read_rows(path):
        if row.problems:
            raise row.problems[0]
        if not row.has("file_name"):
            have = ", ".join(row.values)
            raise DataError(f"has no 'file_name', only {have}", file=str(path), line=row.line)
        yield dict(row.values)


def _json_rows(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.rglob("*.json")):
        try:
            # utf-8-sig also reads files that begin with a byte order mark.
            value: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read ({error})", file=str(path)) from error
        if not isinstance(value, dict):
            raise DataError("must hold one object", file=str(path))
        row = cast("dict[str, Any]", value)
        yield {**row, "file_name": row.get("file_name") or path.stem}
