"""Affective tree: how near the described tree of cues, expressions and emotion is to the true one.

VidEmo's R_tree = exp(-λ·TED(T_gt, T_pred)) (arXiv 2511.02712) on trees of three levels, attribute,
expression and emotion. The paper prints neither λ nor the edit costs nor the parser; ours are:

- the tree is read from what the model writes, without a second model: the emotion from
  ``<answer>``, an expression and its attributes from each "Face: sad, inner brows raised." of the
  reasoning. What cannot be read scores 0;
- children are put in one order, inserting or deleting a node costs 1, changing a value 0.5;
- the distance is divided by the number of nodes in both trees, so that rich clips are not punished
  for being rich, and λ is 3.
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
_MOST_NODES = 64


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
        label, modality_labels, cues: the true columns.
        scale: λ.
        channels: the parts that a description has.
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
        said = read_tree(completion_text(completion), truth.value, channels)
        scores.append(0.0 if said is None else math.exp(-scale * _distance(truth, said)))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's own tree, written out."""
    truth = true_tree(row, ("face", "voice"))
    if truth is None:
        return None
    lines: list[str] = []
    for one in truth.children:
        values = (one.value, *(leaf.value for leaf in one.children))
        lines.append(f"{one.slot}: {', '.join(values)}.")
    return f"<think>{' '.join(lines)}</think><answer>{truth.value}</answer>"


def true_tree(row: Mapping[str, Any], channels: Sequence[str]) -> Tree | None:
    """The tree of a row's truth: emotion, what each channel expresses, the present cues."""
    expressed = {
        _CHANNEL.get(name, name): emotion
        for name, emotion in (row.get("modality_labels") or {}).items()
    }
    found = [name for name in channels if name in expressed]
    if row.get("label") is None or not found:
        return None
    below: dict[str, list[str]] = {name: [] for name in found}
    for cue in (row.get("cues") or {}).get("present", ()):
        home = "face" if cue in _FACE else "voice"
        if home in below:
            below[home].append(cue)
    return _build(row["label"], [(name, expressed[name], below[name]) for name in found])


def read_tree(text: str, truth: str, channels: Sequence[str]) -> Tree | None:
    """The tree that a completion describes, None where it cannot be read."""
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
    said = _build(label, parts)
    return said if len(said) <= _MOST_NODES else None


def _build(label: str, parts: Sequence[tuple[str, str, Sequence[str]]]) -> Tree:
    expressions = [
        Tree(channel, base_form(emotion), tuple(_leaf(channel, cue) for cue in cues))
        for channel, emotion, cues in parts
    ]
    return Tree("emotion", base_form(label), tuple(expressions)).ordered()


def _leaf(channel: str, cue: str) -> Tree:
    return Tree(f"{channel} cue", normalise(cue))


def _distance(one: Tree, other: Tree) -> float:
    """0 for equal trees, at most 1."""
    return tree_distance(one, other) / (len(one) + len(other))
