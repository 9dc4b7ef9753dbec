"""What a model was trained on, from the records of its runs, and what of it the questions show.

A training run of mmemo keeps its config in ``events.jsonl`` beside its ``final`` folder. From the
evaluated model, the runs are followed back through ``model`` of their configs. The result is

- ``in-distribution``: a training manifest is of the same data set as the questions (the same
  adapter or media root), or shares a clip or a text with them;
- ``zero-shot``: all training rows are known, and none is of this data set. What the base models
  were trained on before, named in ``base``, is never known here;
- ``unknown``: the model comes from elsewhere, or a record or a manifest of its training is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.config import dump
from mmemo.data.adapter import adapter_of_manifest
from mmemo.data.manifest import DataConfig, load_samples, read_rows
from mmemo.errors import MediaError, MmemoError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import EvalConfig
from mmemo.formats import counted, joined
from mmemo.media.paths import resolve
from mmemo.models.config import ModelConfig
from mmemo.run_log import read_events
from mmemo.stages import recorded, trains

Block = dict[str, Any]

_NOT_TRAINED_ON = ("eval_data", "test_data", "report")
_SHOWN = 5


@dataclass(slots=True)
class _History:
    """The training manifests of a model with their media roots, the models that it was made of and
    that no record is known of, and what is missing."""

    manifests: dict[tuple[str, str], None] = field(default_factory=dict[tuple[str, str], None])
    base: dict[str, None] = field(default_factory=dict[str, None])
    missing: list[str] = field(default_factory=list[str])
    runs: int = 0


def training_of(config: EvalConfig, questions: Sequence[Question]) -> Block:
    """``status``, the training ``manifests``, the ``base`` models, ``same``, which manifests are of
    the questions' data set, and the ``overlap`` with the questions in numbers of questions; where
    it is ``unknown``, ``why``."""
    history = _history(config.model)
    rows: dict[tuple[str, str], _Shown] = {}
    for name, root in history.manifests:
        try:
            status = Path(name).stat()
            rows[name, root] = _shown(name, status.st_mtime_ns, status.st_size)
        except (MmemoError, OSError):
            history.missing.append(f"{name} cannot be read")
    same = [key for key in rows if _same_data(config.data, *key)]
    overlap = _overlap(questions, config.data.media_root, rows, same) if rows else {}
    shared = any(overlap.get(name) for name in ("clips", "files", "texts"))
    block: Block = {
        "status": "unknown",
        "manifests": [name for name, _ in history.manifests],
        "base": list(history.base),
        "same": [name for name, _ in same],
        "overlap": overlap,
    }
    if same or shared:
        block["status"] = "in-distribution"
    elif not history.runs and not history.missing and history.base:
        block["why"] = "no record of its training lies beside the model"
    elif history.missing:
        block["why"] = "; ".join(history.missing[:_SHOWN])
    else:
        block["status"] = "zero-shot"
    return block


def training_sentence(block: Mapping[str, Any]) -> str:
    """The mark in words, for tables and reports."""
    status = block.get("status", "unknown")
    if status == "unknown":
        why = block.get("why", "this evaluation did not look")
        return f"Training data: unknown ({why}), so this may be no zero-shot result."
    base = block.get("base", [])
    before = f"; what {joined(base)} had seen before is unknown" if base else ""
    if status == "zero-shot":
        named = f" ({', '.join(block['manifests'])})" if block["manifests"] else " (none)"
        return f"Zero-shot: no training manifest is of this data set{named}{before}."
    overlap = block.get("overlap", {})
    kinds = {"clips": "clip", "files": "file", "speakers": "speaker", "texts": "text"}
    shares = [
        f"{overlap[name]} of {counted(overlap['questions'], 'question')} with a {one} of training"
        for name, one in kinds.items()
        if overlap.get(name)
    ]
    told = f": {joined(shares)}" if shares else "; no clip, file or speaker is in both"
    named = ", ".join(block["same"]) or "other manifests"
    return f"In-distribution: trained on {named}{told}{before}."


def _history(model: ModelConfig) -> _History:
    """The history of a model, back to its base models."""
    found = _History()
    visited: set[Path] = set()
    starts: list[Any] = [dump(model)]
    while starts:
        for name in _sources(starts.pop()):
            path = Path(name)
            folder = next((p for p in (path, path.parent) if (p / "events.jsonl").exists()), None)
            if folder is None:
                if path.name == "final":  # it was trained here, and its run is gone
                    found.missing.append(f"the record of {name} is gone")
                else:
                    found.base[name] = None
                continue
            if folder.resolve() in visited:
                continue
            visited.add(folder.resolve())
            configs = list(_training_configs(folder))
            if not configs:
                found.missing.append(f"{folder} does not say how it was trained")
            for config in configs:
                found.runs += 1
                rest = {key: one for key, one in config.items() if key not in _NOT_TRAINED_ON}
                named = list(_manifests(rest))
                if not named:
                    found.missing.append(f"the config of {folder} names no manifest")
                found.manifests.update(dict.fromkeys(named))
                starts.append(config.get("model"))
    return found


def _training_configs(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The configs of the training runs that a folder's record names."""
    for event in read_events(folder / "events.jsonl"):
        config: Any = event.get("config")
        kind = str(event.get("stage") if event.get("kind") == "stage" else event.get("kind"))
        known = event.get("kind") == "stage" or recorded(kind) is not None
        if known and isinstance(config, Mapping) and trains(kind):
            yield config  # pyright: ignore[reportUnknownVariableType]


def _sources(model: Any) -> Iterator[str]:
    """The folders and hub ids that a ``model`` section is made of."""
    if not isinstance(model, Mapping):
        return
    values: Mapping[str, Any] = model  # pyright: ignore[reportUnknownVariableType]
    for key, value in values.items():
        if key in ("path", "text", "encoder") and isinstance(value, str):
            yield value
        elif key in ("video", "audio", "face", "fusion"):
            yield from _sources(value)


def _manifests(value: Any, root: str = ".") -> Iterator[tuple[str, str]]:
    """All ``manifests`` anywhere in a config, with their media roots."""
    if not isinstance(value, Mapping):
        return
    values: Mapping[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
    root = str(values.get("media_root", root))
    names: Any = values.get("manifests", [])
    for name in names if isinstance(names, list) else []:  # pyright: ignore[reportUnknownVariableType]
        yield str(name), root  # pyright: ignore[reportUnknownArgumentType]
    for key, part in values.items():
        if key != "manifests":
            yield from _manifests(part, root)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a model saw of a manifest: its files, its users' turns, and the speakers."""

    files: frozenset[str]
    texts: frozenset[str]
    speakers: frozenset[str]


@lru_cache(maxsize=64)
def _shown(name: str, changed: int, size: int) -> _Shown:
    """What the rows of a manifest show, whatever columns it has. A process that evaluates several
    times reads it once, as long as it has the same time and size."""
    rows = list(read_rows(Path(name)))
    columns = sorted({key for row in rows for key in row.values})
    samples = load_samples(DataConfig(manifests=[name], columns=columns), rows=lambda _: rows)
    media = (ref for s in samples for ref in (*s.media.values(), *s.rejected_media.values()))
    texts = {turn.text for s in samples for turn in s.turns if turn.role == "user"}
    return _Shown(
        frozenset(ref.path for ref in media),
        frozenset(map(_text, texts)),
        frozenset(s.group["speaker"] for s in samples if "speaker" in s.group),
    )


def _same_data(ours: DataConfig, manifest: str, root: str) -> bool:
    """Whether a training manifest is of the data set of the questions: one of their manifests, or
    made by the same adapter; where an adapter is not known, under the same media root."""
    own = [Path(name) for name in ours.manifests]
    if Path(manifest).resolve() in [path.resolve() for path in own]:
        return True
    theirs = adapter_of_manifest(Path(manifest))
    records = [adapter_of_manifest(path) for path in own]
    if theirs is not None and all(record is not None for record in records):
        # A benchmark with rows of its own has the name of the data set's adapter, too.
        names = [Path(str(one["adapter"])).stem for one in records if one is not None]
        return Path(str(theirs["adapter"])).stem in names
    place = Path(ours.media_root).resolve()
    # The working directory is the root of whatever gives none.
    return place == Path(root).resolve() and place != Path.cwd().resolve()


def _overlap(
    questions: Sequence[Question],
    root: str,
    rows: Mapping[tuple[str, str], _Shown],
    same: Sequence[tuple[str, str]],
) -> Block:
    """How many questions show a clip or a file of training, or a speaker of the same data set: a
    speaker of the same name in another data set is another person. Questions without a clip are
    compared by their text."""
    files = {(place, file) for (_, place), seen in rows.items() for file in seen.files}
    # Many rows are about one file, and looking for a file costs more than reading its row.
    clips = {_place(*file) for file in files}
    texts = frozenset[str]().union(*(seen.texts for seen in rows.values()))
    speakers = frozenset[str]().union(*(rows[key].speakers for key in same))
    hits: dict[str, list[str]] = {"clips": [], "files": [], "speakers": [], "texts": []}
    places = {
        path: _place(root, path) for path in {ref.path for q in questions for ref in _media(q)}
    }
    copies = _copies(set(places.values()), clips)
    for question in questions:
        paths = {places[ref.path] for ref in _media(question)}
        asked = next((t.text for t in reversed(question.turns) if t.role == "user"), "")
        found = {
            "clips": bool(paths & clips),
            "files": bool(paths & copies),
            "speakers": question.sample.group.get("speaker") in speakers,
            "texts": not paths and _text(asked) in texts,
        }
        for kind, hit in found.items():
            if hit:
                hits[kind].append(question.sample.sample_id)
    examples = {kind: names[:_SHOWN] for kind, names in hits.items() if names}
    counts = {kind: len(names) for kind, names in hits.items()}
    return {"questions": len(questions), **counts, "examples": examples}


def _media(question: Question) -> list[Any]:
    return list(question.sample.media.values())


def _text(text: str) -> str:
    return " ".join(text.split())


def _place(root: str, name: str) -> Path:
    try:
        return resolve(Path(root), name)
    except (MediaError, OSError):
        return Path(root) / name


def _copies(ours: set[Path], theirs: set[Path]) -> set[Path]:
    """The files of ``ours`` that are in ``theirs`` byte by byte, under whatever name. Only files of
    equal size are hashed."""
    sizes: dict[int, list[Path]] = {}
    for path in sorted(theirs):
        size = _size(path)
        if size is not None:
            sizes.setdefault(size, []).append(path)
    found: set[Path] = set()
    digests: dict[Path, str] = {}
    for path in sorted(ours):
        size = _size(path)
        others = sizes.get(size, []) if size is not None else []
        if path in others:
            found.add(path)
            continue
        for one in (path, *others) if others else ():
            if one not in digests:
                digests[one] = content.sha256(one)
        if others and digests[path] in {digests[one] for one in others}:
            found.add(path)
    return found


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
