"""What is in a file of pairs, and what must not be: counts, repeats, leaks, give-aways."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmemo.console import console
from mmemo.data.preference import Answer, Preference
from mmemo.pairs.config import PairsConfig
from mmemo.pairs.leaks import (
    Told,
    clip_of,
    digests,
    duplicates,
    leaks,
    masked,
    media_of,
    told_by_length,
    told_by_words,
    words,
)

REJECTED: tuple[Answer, ...] = ("spurious", "hallucinated")


def pairs_report(config: PairsConfig, pairs: Sequence[Preference]) -> dict[str, Any]:
    """All findings as plain values; ``problems`` lists those that ``report.allow`` does not."""
    root = Path(config.data.media_root)
    files = {ref.path for pair in pairs for ref in media_of(pair)}
    contents = digests(files, root) if config.report.digests else {}
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "clips": len({clip_of(pair.sample) for pair in pairs}),
        "cells": cells(pairs),
        "duplicates": duplicates(pairs, contents, config.report.near),
        "length": {name: length_gap(rows, name) for name, rows in _by_name(pairs).items()},
        "text": {name: _told(rows, pairs) for name, rows in _by_name(pairs).items()},
    }
    if config.report.against:
        found["leaks"] = leaks(config, pairs, contents)
    problems = _problems(found, config.report.max_text_accuracy)
    allowed = set(config.report.allow)
    found["bound"] = config.report.max_text_accuracy
    found["problems"] = [text for name, text in problems if name not in allowed]
    found["allowed"] = [text for name, text in problems if name in allowed]
    found["right_label"] = {
        name: round(sum(_names_label(pair, text) for pair, text in rows) / len(rows), 4)
        for name, rows in _by_name(pairs).items()
    }
    return found


def cells(pairs: Sequence[Preference]) -> dict[str, dict[str, int]]:
    """How many pairs there are of each sort."""
    counts: dict[str, Counter[str]] = {
        name: Counter()
        for name in ("query", "rejected", "negative", "irrelevant", "conflict", "cell")
    }
    for pair in pairs:
        counts["query"][pair.query] += 1
        for name in names_of(pair):
            counts["rejected"][name] += 1
        for side, negative in (("negative", pair.negative), ("irrelevant", pair.irrelevant)):
            kind = "none" if negative is None else negative.kind
            counts[side][f"{pair.query}: {kind}"] += 1
        if pair.sample.truth.conflict:
            counts["conflict"][pair.sample.truth.conflict] += 1
        if "cell" in pair.sample.group:
            counts["cell"][pair.sample.group["cell"]] += 1
    return {name: dict(sorted(found.items())) for name, found in counts.items() if found}


def names_of(pair: Preference) -> dict[str, Answer]:
    """The rejected answers as reports call them -> where they stand."""
    if pair.plain:
        return {"rejected": "spurious"}
    return {name: name for name in REJECTED if name in pair.answers}


def _by_name(pairs: Sequence[Preference]) -> dict[str, list[tuple[Preference, str]]]:
    """Kind of rejected answer -> (pair, that answer)."""
    found: dict[str, list[tuple[Preference, str]]] = {}
    for pair in pairs:
        for name, place in names_of(pair).items():
            found.setdefault(name, []).append((pair, pair.answers[place]))
    return dict(sorted(found.items()))


def length_gap(rows: Sequence[tuple[Preference, str]], name: str) -> dict[str, Any]:
    """Words of the chosen answer minus those of the rejected, and what length alone tells."""
    chosen, rejected = [pair.answers["chosen"] for pair, _ in rows], [text for _, text in rows]
    gaps = [words(one) - words(other) for one, other in zip(chosen, rejected, strict=True)]
    told = told_by_length(chosen, rejected, [clip_of(pair.sample) for pair, _ in rows])
    return {
        "chosen_words": round(statistics.fmean(words(text) for text in chosen), 3),
        "rejected_words": round(statistics.fmean(words(text) for text in rejected), 3),
        "mean_gap": round(statistics.fmean(gaps), 3),
        "longer_chosen": round(sum(gap > 0 for gap in gaps) / len(gaps), 4),
        "longer_rejected": round(sum(gap < 0 for gap in gaps) / len(gaps), 4),
        **told.plain(),
        "told": told,
    }


def _names_label(pair: Preference, text: str) -> bool:
    """Whether a rejected answer ends as the chosen one does: only its reasons are wrong."""
    ends = [answer.rpartition("<answer>")[2] for answer in (pair.answers["chosen"], text)]
    return "<answer>" in text and ends[0] == ends[1]


def _told(rows: Sequence[tuple[Preference, str]], pairs: Sequence[Preference]) -> dict[str, Told]:
    prompts = [" ".join(turn.text for turn in pair.sample.turns) for pair, _ in rows]
    chosen, rejected = [pair.answers["chosen"] for pair, _ in rows], [text for _, text in rows]
    clips = [clip_of(pair.sample) for pair, _ in rows]
    cues = sorted({c for pair in pairs for kind in pair.sample.truth.cues.values() for c in kind})
    bare = [[masked(text, cues) for text in texts] for texts in (prompts, chosen, rejected)]
    return {
        "words": told_by_words(prompts, chosen, rejected, clips),
        "style": told_by_words(bare[0], bare[1], bare[2], clips),
    }


def _problems(found: Mapping[str, Any], bound: float) -> list[tuple[str, str]]:
    """What is wrong, as (check, sentence)."""
    problems: list[tuple[str, str]] = []
    for name, gap in found["length"].items():
        told: Told = gap.pop("told")
        if told.above(bound):
            problems.append(
                (
                    "length",
                    f"length alone tells the chosen from the {name} answer in "
                    f"{told.accuracy:.0%} of the pairs; make them of equal length",
                )
            )
    for name, seen in found["text"].items():
        held = ("style",) if name == "spurious" else ("words", "style")
        for way in held:
            told = seen[way]
            if told.above(bound):
                problems.append(
                    (
                        "text",
                        f"{way} alone tell the chosen from the {name} answer in "
                        f"{told.accuracy:.0%} of the pairs; give both the same wording",
                    )
                )
        for way in tuple(seen):
            seen[way] = {**seen[way].plain(), "bounded": way in held}
    exact = found["duplicates"]["exact"]
    if exact:
        problems.append(("duplicates", f"{exact} pairs stand there twice; remove the copies"))
    for name, what in (("clip", "a clip"), ("speaker", "a speaker"), ("digest", "a file")):
        count = found.get("leaks", {}).get(name, 0)
        if count:
            problems.append(
                (name, f"{count} pairs share {what} with an evaluation set; leave those rows out")
            )
    return problems


def print_report(found: Mapping[str, Any]) -> None:
    """Tables for a person."""
    table = Table(
        title=f"{found['pairs']:,} pairs of {found['clips']:,} clips", title_justify="left"
    )
    table.add_column("of")
    table.add_column("pairs", overflow="fold")
    for name, counts in found["cells"].items():
        table.add_row(name, ", ".join(f"{key} {count}" for key, count in counts.items()))
    for reason, count in found.get("left_out", {}).items():
        table.add_row("left out", f"{reason}: {count}")
    console.print(table)
    told = Table(title="Told without the clip", title_justify="left")
    for column in ("rejected answer", "by", "of the pairs", "bound", "words chosen / rejected"):
        told.add_column(column)
    for name, seen in found["text"].items():
        gap = found["length"][name]
        for way, one in (*seen.items(), ("length", gap)):
            bounded = one.get("bounded", True)
            sizes = f"{gap['chosen_words']:.1f} / {gap['rejected_words']:.1f}"
            told.add_row(
                name,
                way,
                _share(one),
                f"{found['bound']:.0%}" if bounded else "none",
                sizes if way == "length" else "",
            )
    console.print(told)
    same = found["duplicates"]
    console.print(f"Duplicates: {same['exact']} exact, {same['near']} near.")
    if "leaks" in found:
        leaked = found["leaks"]
        shared = ", ".join(f"{name} {leaked[name]}" for name in ("clip", "speaker", "digest"))
        console.print(f"Shared with {leaked['rows']} evaluation rows: {shared}.")
    for text in found["allowed"]:
        console.print(f"[yellow]allowed:[/yellow] {text}", soft_wrap=True)
    for text in found["problems"]:
        console.print(f"[red]problem:[/red] {text}", soft_wrap=True)


def _share(one: Mapping[str, Any]) -> str:
    if one["accuracy"] is None:
        return f"too few clips ({one['pairs']} pairs)"
    return f"{one['accuracy']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
