"""Report on a file of pairs: counts, duplicates, leaks, and how well text alone gives them away."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmemo.console import console
from mmemo.data.preference import MEDIA_KINDS, REJECTED, Answer, Preference
from mmemo.pairs.config import PairsConfig
from mmemo.pairs.leaks import (
    SHORT,
    BlindAccuracy,
    accuracy_from_length,
    accuracy_from_words,
    clip_of,
    digests,
    duplicates,
    leaks,
    masked,
    media_of,
    mentions,
    words,
)

NEVER_RIGHT = "spurious, never right"
"""Spurious answers that name a cue which no chosen answer of the pairs names."""
_NAMED = 8  # cues that a line of the console names


def pairs_report(
    config: PairsConfig,
    pairs: Sequence[Preference],
    sources: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """All findings as plain values; ``problems`` has those that ``report.allow`` does not list.

    Args:
        sources: written file -> the files that it was made of, which may leak as well.
    """
    root, sources = Path(config.data.media_root), sources or {}
    files = {ref.path for pair in pairs for ref in media_of(pair)}
    files |= {path for made in sources.values() for path in made}
    contents = digests(files, root) if config.report.digests else {}
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "clips": len({clip_of(pair.sample) for pair in pairs}),
        "cells": cells(pairs),
        "duplicates": duplicates(pairs, contents, config.report.near),
        "length": {name: length_gap(rows, name) for name, rows in _by_name(pairs).items()},
        "text": {name: _text_accuracy(rows, pairs) for name, rows in _by_name(pairs).items()},
        "text_by_query": {name: _by_query(rows) for name, rows in _by_name(pairs).items()},
        "never_right": _never_right(pairs),
    }
    if config.report.against:
        found["leaks"] = leaks(config, pairs, contents, sources)
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
    """The number of pairs by question, rejected answer, negative, conflict and cell."""
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
            if negative is not None and not negative.feature_level and kind not in MEDIA_KINDS:
                kind += " (file)"
            counts[side][f"{pair.query}: {kind}"] += 1
        if pair.sample.truth.conflict:
            counts["conflict"][pair.sample.truth.conflict] += 1
        if "cell" in pair.sample.group:
            counts["cell"][pair.sample.group["cell"]] += 1
    return {name: dict(sorted(found.items())) for name, found in counts.items() if found}


def names_of(pair: Preference) -> dict[str, Answer]:
    """Name of each rejected answer in the report -> its key in ``answers``."""
    if pair.plain:
        return {"rejected": "spurious"}
    return {name: name for name in REJECTED if name in pair.answers}


def _by_name(pairs: Sequence[Preference]) -> dict[str, list[tuple[Preference, str]]]:
    """Kind of rejected answer -> (pair, that answer).

    Spurious answers with a cue that no chosen answer names are a kind of their own.
    """
    never = mentions([*_never_right(pairs)])
    found: dict[str, list[tuple[Preference, str]]] = {}
    for pair in pairs:
        for name, answer in names_of(pair).items():
            text = pair.answers[answer]
            if name == "spurious" and never.search(_said(pair, text)):
                name = NEVER_RIGHT
            found.setdefault(name, []).append((pair, text))
    return dict(sorted(found.items()))


def _never_right(pairs: Sequence[Preference]) -> dict[str, int]:
    """The irrelevant cues that spurious answers name and no chosen answer does -> their number.

    Whatever the clip, such a cue is never a reason, so no wording could hide it.
    """
    listed = sorted({cue for pair in pairs for cue in pair.sample.truth.cues.get("spurious", ())})
    named = mentions(listed)
    right = {one.lower() for pair in pairs for one in named.findall(pair.answers["chosen"])}
    counts: Counter[str] = Counter()
    for pair in pairs:
        if not pair.plain:
            said = _said(pair, pair.answers.get("spurious", ""))
            found = {one.lower() for one in named.findall(said)}
            counts.update(found - right)
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _said(pair: Preference, answer: str) -> str:
    """An answer, with its question if it makes no sense alone: "Yes."."""
    if not answer or words(answer) > SHORT:
        return answer
    return f"{pair.sample.turns[-1].text} {answer}"


def _by_query(rows: Sequence[tuple[Preference, str]]) -> dict[str, dict[str, Any]]:
    """The accuracy from words by what the question is about."""
    found: dict[str, dict[str, Any]] = {}
    for query in sorted({pair.query for pair, _ in rows}):
        own = [(pair, text) for pair, text in rows if pair.query == query]
        prompts, chosen, rejected, clips = _texts(own)
        found[query] = accuracy_from_words(prompts, chosen, rejected, clips).to_json()
    return found


def _texts(
    rows: Sequence[tuple[Preference, str]],
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Prompts, chosen and rejected answers, and clips."""
    return (
        [" ".join(turn.text for turn in pair.sample.turns) for pair, _ in rows],
        [pair.answers["chosen"] for pair, _ in rows],
        [text for _, text in rows],
        [clip_of(pair.sample) for pair, _ in rows],
    )


def length_gap(rows: Sequence[tuple[Preference, str]], name: str) -> dict[str, Any]:
    """Word counts of chosen and rejected answers, and how well length alone tells them apart."""
    chosen, rejected = [pair.answers["chosen"] for pair, _ in rows], [text for _, text in rows]
    gaps = [words(one) - words(other) for one, other in zip(chosen, rejected, strict=True)]
    accuracy = accuracy_from_length(chosen, rejected, [clip_of(pair.sample) for pair, _ in rows])
    return {
        "chosen_words": round(statistics.fmean(words(text) for text in chosen), 3),
        "rejected_words": round(statistics.fmean(words(text) for text in rejected), 3),
        "mean_gap": round(statistics.fmean(gaps), 3),
        "longer_chosen": round(sum(gap > 0 for gap in gaps) / len(gaps), 4),
        "longer_rejected": round(sum(gap < 0 for gap in gaps) / len(gaps), 4),
        **accuracy.to_json(),
        "told": accuracy,
    }


def _names_label(pair: Preference, text: str) -> bool:
    """Whether a rejected answer names the chosen answer's emotion, so that only its reasoning is
    wrong."""
    ends = [answer.rpartition("<answer>")[2] for answer in (pair.answers["chosen"], text)]
    return "<answer>" in text and ends[0] == ends[1]


def _text_accuracy(
    rows: Sequence[tuple[Preference, str]], pairs: Sequence[Preference]
) -> dict[str, BlindAccuracy]:
    """Accuracy of a classifier of words, with the cues as they are and masked."""
    prompts, chosen, rejected, clips = _texts(rows)
    cues = sorted({c for pair in pairs for kind in pair.sample.truth.cues.values() for c in kind})
    style = [[masked(text, cues) for text in texts] for texts in (prompts, chosen, rejected)]
    return {
        "words": accuracy_from_words(prompts, chosen, rejected, clips),
        "style": accuracy_from_words(style[0], style[1], style[2], clips),
    }


def _problems(found: Mapping[str, Any], bound: float) -> list[tuple[str, str]]:
    """The problems, as (check, sentence)."""
    problems: list[tuple[str, str]] = []
    for name, gap in found["length"].items():
        # The object is no JSON value; its numbers already stand beside it.
        blind: BlindAccuracy = gap.pop("told")
        if blind.above(bound):
            problems.append(
                (
                    "length",
                    f"length alone tells the chosen from the {name} answer in "
                    f"{blind.accuracy:.0%} of the pairs; make them equally long",
                )
            )
    for name, by_features in found["text"].items():
        bounded = ("style",) if name == NEVER_RIGHT else ("words", "style")
        for features in bounded:
            blind = by_features[features]
            if blind.above(bound):
                problems.append(
                    (
                        "text",
                        f"{features} alone tell the chosen from the {name} answer in "
                        f"{blind.accuracy:.0%} of the pairs; give both the same wording",
                    )
                )
        for features in tuple(by_features):
            values = by_features[features].to_json()
            by_features[features] = {**values, "bounded": features in bounded}
    exact = found["duplicates"]["exact"]
    if exact:
        problems.append(("duplicates", f"{exact} pairs are exact duplicates; remove the copies"))
    for name, shared in (("clip", "a clip"), ("speaker", "a speaker"), ("digest", "a file")):
        count = found.get("leaks", {}).get(name, 0)
        if count:
            problems.append(
                (name, f"{count} pairs share {shared} with an evaluation set; remove those rows")
            )
    return problems


def print_report(found: Mapping[str, Any]) -> None:
    """Print the report as tables."""
    table = Table(
        title=f"{found['pairs']:,} pairs of {found['clips']:,} clips", title_justify="left"
    )
    table.add_column("by")
    table.add_column("pairs", overflow="fold")
    for name, counts in found["cells"].items():
        table.add_row(name, ", ".join(f"{key} {count}" for key, count in counts.items()))
    for reason, count in found.get("left_out", {}).items():
        table.add_row("skipped rows", f"{reason}: {count}")
    console.print(table)
    accuracy = Table(title="Accuracy of a classifier without the clip", title_justify="left")
    for column in ("rejected answer", "features", "accuracy", "bound", "words chosen / rejected"):
        accuracy.add_column(column)
    for name, by_features in found["text"].items():
        gap = found["length"][name]
        for features, one in (*by_features.items(), ("length", gap)):
            bounded = one.get("bounded", True)
            sizes = f"{gap['chosen_words']:.1f} / {gap['rejected_words']:.1f}"
            accuracy.add_row(
                name,
                features,
                _share(one),
                f"{found['bound']:.0%}" if bounded else "none",
                sizes if features == "length" else "",
            )
    console.print(accuracy)
    _print_channels(found)
    repeated = found["duplicates"]
    console.print(f"Duplicates: {repeated['exact']} exact, {repeated['near']} near.")
    if "leaks" in found:
        leaked = found["leaks"]
        shared = ", ".join(f"{name} {leaked[name]}" for name in ("clip", "speaker", "digest"))
        console.print(f"Shared with {leaked['rows']} evaluation rows: {shared}.")
    for text in found["allowed"]:
        console.print(Text.assemble(("allowed:", "yellow"), f" {text}"), soft_wrap=True)
    for text in found["problems"]:
        console.print(Text.assemble(("problem:", "red"), f" {text}"), soft_wrap=True)


def _print_channels(found: Mapping[str, Any]) -> None:
    """Print which cues never are a right reason, and where cues are if the rows do not say it."""
    never: Mapping[str, int] = found["never_right"]
    if never:
        console.print(
            f"Told by their words, whatever the clip: spurious answers with {_cue_names(never)}, "
            "which no right answer names; with source.spurious: outweighed there are none.",
            soft_wrap=True,
        )
    channels: Mapping[str, Any] = found.get("channels", {})
    for channel, cues in channels.get("guessed", {}).items():
        console.print(f"Guessed to be {channel}: {_cue_names(cues)}.", soft_wrap=True)
    if channels.get("unknown"):
        console.print(
            f"In no known channel, so not used for questions about one: "
            f"{_cue_names(channels['unknown'])}; say in the rows' cues where they are.",
            soft_wrap=True,
        )
    for name, count in found.get("no_rejected", {}).items():
        kind, _, query = name.partition(": ")
        console.print(f"Pairs without a {kind} answer: {count} of {query} questions.")


def _cue_names(cues: Mapping[str, int]) -> str:
    """The most frequent cues, and how many there are beside them."""
    shown = ", ".join(f"{cue} ({count})" for cue, count in [*cues.items()][:_NAMED])
    return shown if len(cues) <= _NAMED else f"{shown} and {len(cues) - _NAMED} more"


def _share(one: Mapping[str, Any]) -> str:
    if one["accuracy"] is None:
        return f"too few clips ({one['pairs']} pairs)"
    return f"{one['accuracy']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
