"""Affective tree: pays for describing a tree of cues, expressions and emotion close to the true
one.

Range: 0 to 1. None: the row has no label, or does not say what its channels express.
Source: VidEmo's R_tree = exp(-λ·TED(T_gt, T_pred)) (arXiv 2511.02712) on trees of three levels:
attribute, expression and emotion. The paper gives neither λ nor the edit costs nor the parser; ours
are reconstructions:

- The tree is parsed from the completion, without a second model: the emotion from ``<answer>``, an
  expression and its attributes from each "Face: sad, inner brows raised." of the reasoning. A
  completion that cannot be parsed scores 0.
- Children are sorted into a canonical order. Inserting or deleting a node costs 1, changing a value
  0.5.
- The distance is divided by the number of nodes in both trees, so that clips with many cues are not
  penalised, and λ is 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.answers.parsing import base_form, labels_for, normalise, read_label
from mmemo.rewards.tree_distance import Tree, tree_distance
from mmemo.world.emotions import ACTION_UNITS

_CHANNEL = {"video": "face", "audio": "voice", "text": "words"}
_FACE = frozenset(ACTION_UNITS.values())
_STRENGTHS = ("weak", "moderate", "strong")
_PART = re.compile(r"(?:^|(?<=[.;\n]))\s*([^\W\d][\w ]{0,20}):\s*([^.;:\n]*)")
_MAX_NODES = 64


def tree(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    label: Sequence[str | None],
    modality_labels: Sequence[Mapping[str, str] | None],
    cues: Sequence[Mapping[str, Sequence[str]] | None],
    scale: float = 3.0,
    channels: Sequence[str] = ("face", "voice"),
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row does not say what its channels express.

    Args:
        label: the true labels.
        modality_labels: each row's emotions by modality.
        cues: each row's texts by kind, of which ``present`` is read.
        scale: λ.
        channels: names of the channels that a description covers.
    """
    scores: list[float | None] = []
    for index, completion in enumerate(completions):
        row = {
            "label": label[index],
            "modality_labels": modality_labels[index],
            "cues": cues[index],
        }
        truth = true_tree(row, channels)
        if truth is None:
            scores.append(None)
            continue
        described = read_tree(completion_text(completion), truth.value, channels)
        distance = None if described is None else _distance(truth, described)
        scores.append(0.0 if distance is None else math.exp(-scale * distance))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's true tree in words; None without one."""
    truth = true_tree(row, ("face", "voice"))
    if truth is None:
        return None
    lines: list[str] = []
    for one in truth.children:
        values = (one.value, *(leaf.value for leaf in one.children))
        lines.append(f"{one.slot}: {', '.join(values)}.")
    return f"<think>{' '.join(lines)}</think><answer>{truth.value}</answer>"


def true_tree(row: Mapping[str, Any], channels: Sequence[str]) -> Tree | None:
    """The tree of a row's truth: emotion, each channel's expression, and the present cues."""
    expressed = {
        _CHANNEL.get(name, name): emotion
        for name, emotion in (row.get("modality_labels") or {}).items()
    }
    found = [name for name in channels if name in expressed]
    if row.get("label") is None or not found:
        return None
    cues_of: dict[str, list[str]] = {name: [] for name in found}
    for cue in (row.get("cues") or {}).get("present", ()):
        channel = "face" if cue in _FACE else "voice"
        if channel in cues_of:
            cues_of[channel].append(cue)
    return _build(row["label"], [(name, expressed[name], cues_of[name]) for name in found])


def read_tree(text: str, truth: str, channels: Sequence[str]) -> Tree | None:
    """The tree that a completion describes; None if it cannot be parsed."""
    label = read_label(text, labels_for(truth)[0])
    parts: list[tuple[str, str, list[str]]] = []
    for found in _PART.finditer(think_text(text)):
        channel = found.group(1).strip().lower()
        items = [item.strip().lower() for item in found.group(2).split(",")]
        cues = [item for item in items[1:] if item and item not in _STRENGTHS]
        if channel in channels and items[0]:
            parts.append((channel, items[0], list(dict.fromkeys(cues))))
    names = [name for name, _, _ in parts]
    if label is None or not parts or len(set(names)) < len(names):
        return None
    described = _build(label, parts)
    return described if len(described) <= _MAX_NODES else None


def _build(label: str, parts: Sequence[tuple[str, str, Sequence[str]]]) -> Tree:
    expressions = [
        Tree(channel, base_form(emotion), tuple(_leaf(channel, cue) for cue in cues))
        for channel, emotion, cues in parts
    ]
    return Tree("emotion", base_form(label), tuple(expressions)).ordered()


def _leaf(channel: str, cue: str) -> Tree:
    return Tree(f"{channel} cue", normalise(cue))


def _distance(one: Tree, other: Tree) -> float:
    """Normalised edit distance: 0 for equal trees, at most 1."""
    return tree_distance(one, other) / (len(one) + len(other))
