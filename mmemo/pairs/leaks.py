"""Pairs that should not be there: twice the same, nearly the same, or of an evaluation set."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mmemo import content
from mmemo.console import progress
from mmemo.data.manifest import DataConfig, load_samples, read_rows
from mmemo.data.preference import Preference
from mmemo.data.sample import MediaRef, Sample
from mmemo.errors import MediaError
from mmemo.media.paths import resolve
from mmemo.pairs.config import PairsConfig

_EXAMPLES = 5


def digests(names: Iterable[str], root: Path) -> dict[str, str | None]:
    """Path -> SHA-256 of the file under ``root``; None where it cannot be read."""
    listed = sorted(set(names))
    found: dict[str, str | None] = {}
    with progress("digests", len(listed), unit="files") as bar:
        for name in listed:
            try:
                found[name] = content.sha256(resolve(root, name))
            except (MediaError, OSError):
                found[name] = None
            bar.advance()
    return found


def media_of(pair: Preference) -> list[MediaRef]:
    """Every file that training on the pair would show."""
    sides = [side for side in (pair.negative, pair.irrelevant) if side is not None]
    return [*pair.sample.media.values(), *(ref for side in sides for ref in side.media.values())]


def clip_of(sample: Sample) -> str:
    """What names the clip of a row: file and span."""
    ref = next(iter(sample.media.values()), None)
    return "" if ref is None else f"{ref.path}#{ref.start}#{ref.end}"


def duplicates(
    pairs: Sequence[Preference], contents: Mapping[str, str | None], near: float
) -> dict[str, Any]:
    """``exact``: pairs that repeat an earlier one, a copy of its clip under another name counted
    as that clip; ``near``: pairs of one clip whose words overlap by ``near`` or more."""
    by_clip: dict[str, list[Preference]] = defaultdict(list)
    for pair in pairs:
        ref = next(iter(pair.sample.media.values()), None)
        name = "" if ref is None else contents.get(ref.path) or ref.path
        by_clip[f"{name}#{ref and ref.start}#{ref and ref.end}"].append(pair)
    exact: list[list[str]] = []
    close: list[list[str]] = []
    for listed in by_clip.values():
        texts = [_text(pair) for pair in listed]
        words = [set(re.findall(r"\w+", text.lower())) for text in texts]
        for one, other in combinations(range(len(listed)), 2):
            ids = [listed[one].sample.sample_id, listed[other].sample.sample_id]
            if texts[one] == texts[other]:
                exact.append(ids)
            elif len(words[one] & words[other]) >= near * len(words[one] | words[other]):
                close.append(ids)
    repeated = {other for _, other in exact}
    return {
        "exact": len(repeated),
        "near": len({other for _, other in close} - repeated),
        "examples": [*exact[:_EXAMPLES], *close[:_EXAMPLES]],
    }


def _text(pair: Preference) -> str:
    turns = " ".join(turn.text for turn in pair.sample.turns)
    answers = " | ".join(f"{name}: {pair.answers[name]}" for name in sorted(pair.answers))
    return " ".join(f"{turns} | {answers}".split())


def leaks(
    config: PairsConfig, pairs: Sequence[Preference], contents: Mapping[str, str | None]
) -> dict[str, Any]:
    """Pairs that share a clip, a speaker or the content of a file with an evaluation manifest."""
    samples = [row for name in config.report.against for row in _evaluated(name)]
    root = Path(config.report.against_root or config.data.media_root)
    theirs = {ref.path for sample in samples for ref in sample.media.values()}
    same_root = root.resolve() == Path(config.data.media_root).resolve()
    clips = theirs if same_root else set[str]()
    speakers = {speaker for sample in samples if (speaker := sample.group.get("speaker"))}
    seen = set(digests(theirs, root).values()) - {None} if config.report.digests else set[str]()
    found: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        paths = {ref.path for ref in media_of(pair)}
        hits = {
            "clip": bool(paths & clips),
            "speaker": pair.sample.group.get("speaker") in speakers,
            "digest": bool({contents.get(path) for path in paths} & seen),
        }
        for name, hit in hits.items():
            found[name] += hit
            if hit and len(examples[name]) < _EXAMPLES:
                examples[name].append(pair.sample.sample_id)
    return {
        "against": list(config.report.against),
        "rows": len(samples),
        **{name: found[name] for name in ("clip", "speaker", "digest")},
        "unread": sum(value is None for value in contents.values()),
        "examples": dict(examples),
    }


def _evaluated(name: str) -> list[Sample]:
    """The rows of an evaluation manifest, with whatever columns it has."""
    columns = sorted({key for row in read_rows(Path(name)) for key in row.values})
    return load_samples(DataConfig(manifests=[name], columns=columns))
