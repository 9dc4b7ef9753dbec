"""Affective tree: pays for describing a tree of cues, expressions and emotion close to the true
one.

Range: 0 to 1. None: the row has no label, or does not say what its channels express.
Source: VidEmo's R_tree = exp(-λ·TED(T_gt, T_pred)) (arXiv 2511.02712) on trees of three levels:
attribute, expression and emotion. The paper gives neither λ nor the edit costs nor the parser; ours
are reconstructions:

- The tree is parsed from the completion, without a second model: the emotion from ``<answer>``, an
  expression and its attributes from each "Face: sad, inner brows raised." of the reasoning. A
  completion that cannot be parsed scores 0. Cues that the text denies anywhere or hedges are no
  attributes.
- Children are sorted into a canonical order. Only an emotion and an expression can be changed; a
  wrong attribute is one to delete, and the right one is still to insert, so that naming an invented
  cue never scores more than naming none.
- The levels weigh so that each decides over all below it: with C channels, the emotion weighs
  1.5·C + 1.5, an expression 1.5, and all true attributes together 1. Attributes of which no more
  are right than wrong count as none, so that naming every known cue earns nothing. A completion
  with a wrong emotion thus never scores more than any with the right one, and one with a wrong
  expression never more than the same with the right one.
- The distance is divided by its largest value, so it does not grow with the number of cues, and λ
  is 3.

The channel of a cue is what the row says: ``cues`` may list its cues by ``video``, ``audio`` and
``text`` beside ``present``. A present cue without a channel counts under any channel, once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo.answers.claims import denies, read_claims
from mmemo.answers.messages import Chat, completion_text, think_text
from mmemo.answers.parsing import base_form, labels_for, normalise, read_label
from mmemo.rewards.tree_distance import Tree, tree_distance

_CHANNEL = {"video": "face", "audio": "voice", "text": "words"}
_STRENGTHS = ("weak", "moderate", "strong")
_PART = re.compile(r"(?:^|(?<=[.;。；\n]))\s*([^\W\d][\w ]{0,20}?)\s*[:：]\s*([^.;。；\n]*)")
_ITEM = re.compile(r"[,，、]")
_LEAD = re.compile(r"^(?:and|or|nor|no|not|without|with|a|an|the)\s+")
_MAX_NODES = 64
_EXPRESSION, _ATTRIBUTES, _NEVER = 1.5, 1.0, math.inf

Cues = Mapping[str, Sequence[str]]


def tree(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    label: Sequence[str | None],
    modality_labels: Sequence[Mapping[str, str] | None],
    cues: Sequence[Cues | None],
    classes: Sequence[str] | None = None,
    scale: float = 3.0,
    channels: Sequence[str] = ("face", "voice"),
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row has no label among the classes, or does not say
    what its channels express.

    Args:
        label: the true labels.
        modality_labels: each row's emotions by modality.
        cues: each row's texts by kind, of which ``present`` and those by modality are read.
        classes: the labels that an answer may name; mmemo passes those of the manifests. None
            allows every emotion whose forms mmemo knows and the row's own label.
        scale: λ.
        channels: names of the channels that a description covers.
    """
    given = None if classes is None else tuple(classes)
    scores: list[float | None] = []
    for completion, truth, emotions, row_cues in zip(
        completions, label, modality_labels, cues, strict=True
    ):
        row = {"label": truth, "modality_labels": emotions, "cues": row_cues}
        if not _applies(row, channels) or labels_for(str(truth), given)[1] is None:
            scores.append(None)
            continue
        described = read_tree(completion_text(completion), row, channels, given)
        if described is None:
            scores.append(0.0)
            continue
        right = true_tree(row, channels, described)
        scores.append(math.exp(-scale * _distance(right, described, len(channels))))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The row's true tree in words; None without one."""
    channels = ("face", "voice")
    if not _applies(row, channels):
        return None
    return _said(true_tree(row, channels), str(row["label"]))


def attacks(row: Mapping[str, Any]) -> dict[str, str]:
    """The true tree with an invented cue, with a cue of the other channel, with a nonsense word,
    and with cues changed to invented ones."""
    channels = ("face", "voice")
    if not _applies(row, channels):
        return {}
    right, label = true_tree(row, channels), str(row["label"])
    first, *others = right.children
    wrong = {
        "invented cue": _with(first, "ears wiggling"),
        "nonsense word": _with(first, "blorptastic"),
        "changed cues": Tree(first.slot, first.value, tuple(_leaf(first.slot, "x") for _ in "ab")),
    }
    for other in others:
        for leaf in other.children[:1]:
            wrong["cue of the other channel"] = _with(first, leaf.value)
    return {
        name: _said(Tree(right.slot, right.value, (one, *others)), label)
        for name, one in wrong.items()
    }


def true_tree(
    row: Mapping[str, Any], channels: Sequence[str], described: Tree | None = None
) -> Tree:
    """The tree of a row's truth: emotion, each channel's expression, and the present cues.

    Args:
        described: the tree that it is compared with; a cue whose channel the row does not say
            stands where this tree has it.
    """
    expressed = _expressed(row)
    found = [name for name in channels if name in expressed]
    cues: Cues = row.get("cues") or {}
    known: dict[str, list[str]] = {}
    for kind, channel in _CHANNEL.items():
        for cue in cues.get(kind, ()):
            known.setdefault(normalise(cue), []).append(channel)
    named = {} if described is None else _leaves(described)
    cues_of: dict[str, list[str]] = {name: [] for name in found}
    for cue in dict.fromkeys(map(normalise, _present(cues))):
        where = [name for name in found if cue in named.get(name, ())] or found
        for channel in known.get(cue, where[:1]):
            # A cue of a channel that the tree does not have is no part of it.
            if channel in cues_of:
                cues_of[channel].append(cue)
    return _build(str(row["label"]), [(name, expressed[name], cues_of[name]) for name in found])


def read_tree(
    text: str,
    row: Mapping[str, Any],
    channels: Sequence[str],
    classes: tuple[str, ...] | None = None,
) -> Tree | None:
    """The tree that a completion describes; None if it cannot be parsed."""
    label = read_label(text, labels_for(str(row["label"]), classes)[0])
    known = {normalise(cue) for listed in (row.get("cues") or {}).values() for cue in listed}
    thought = think_text(text)
    phrases = {cue: (cue,) for cue in known if cue}
    # A cue that is said here and denied there is claimed nowhere.
    described = [one for one in _PART.finditer(thought) if _channel(one) in channels]
    around = _PART.sub(lambda one: "\n" if _channel(one) in channels else one.group(), thought)
    denied = set(read_claims(around, phrases).denied)
    parts: list[tuple[str, str, list[str]]] = []
    for found in described:
        expression, _, listed = _ITEM.sub(",", found.group(2)).partition(",")
        if expression.strip():
            asserted, denied_here = _attributes(listed, phrases)
            denied |= denied_here
            parts.append((_channel(found), expression, asserted))
    parts = [(name, shown, [x for x in cues if x not in denied]) for name, shown, cues in parts]
    names = [name for name, _, _ in parts]
    if label is None or not parts or len(set(names)) < len(names):
        return None
    built = _build(label, parts)
    return built if len(built) <= _MAX_NODES else None


def _channel(part: re.Match[str]) -> str:
    return part.group(1).strip().lower()


def _attributes(
    listed: str, phrases: Mapping[str, tuple[str, ...]]
) -> tuple[list[str], frozenset[str]]:
    """The cues that a list asserts, and those that it denies: known ones wherever they stand in it,
    any other item as it is."""
    items = [normalise(item) for item in listed.split(",")]
    others: list[str] = []
    for item in items:
        claims = read_claims(item, phrases)
        core = _LEAD.sub("", item)
        if (
            core
            and core not in _STRENGTHS
            and not (claims.asserted | claims.denied | claims.hedged)
        ):
            others.append(core)
    claims = read_claims(listed, {**phrases, **{core: (core,) for core in others}})
    asserted = sorted(one for one in claims.asserted if one in phrases or not denies(one))
    return asserted, claims.denied


def _applies(row: Mapping[str, Any], channels: Sequence[str]) -> bool:
    return row.get("label") is not None and any(name in channels for name in _expressed(row))


def _expressed(row: Mapping[str, Any]) -> dict[str, str]:
    labels: Mapping[str, str] = row.get("modality_labels") or {}
    return {_CHANNEL.get(name, name): emotion for name, emotion in labels.items()}


def _present(cues: Cues) -> list[str]:
    return [cue for kind in ("present", *_CHANNEL) for cue in cues.get(kind, ())]


def _leaves(described: Tree) -> dict[str, set[str]]:
    return {one.slot: {leaf.value for leaf in one.children} for one in described.children}


def _said(described: Tree, label: str) -> str:
    lines = [
        f"{one.slot}: {', '.join((one.value, *(leaf.value for leaf in one.children)))}."
        for one in described.children
    ]
    return f"<think>{' '.join(lines)}</think><answer>{label}</answer>"


def _with(expression: Tree, cue: str) -> Tree:
    leaves = (*expression.children, _leaf(expression.slot, cue))
    return Tree(expression.slot, expression.value, leaves)


def _build(label: str, parts: Sequence[tuple[str, str, Sequence[str]]]) -> Tree:
    expressions = [
        Tree(channel, base_form(emotion), tuple(_leaf(channel, cue) for cue in cues))
        for channel, emotion, cues in parts
    ]
    return Tree("emotion", base_form(label), tuple(expressions)).ordered()


def _leaf(channel: str, cue: str) -> Tree:
    return Tree(f"{channel} cue", normalise(cue))


def _without_attributes(described: Tree) -> Tree:
    parts = tuple(Tree(part.slot, part.value) for part in described.children)
    return Tree(described.slot, described.value, parts)


def _distance(one: Tree, other: Tree, channels: int) -> float:
    """Normalised edit distance from the true tree to another: 0 for equal ones, at most 1."""
    true, said = (
        {(part.slot, leaf.value) for part in tree_.children for leaf in part.children}
        for tree_ in (one, other)
    )
    if true and len(said - true) >= len(said & true):
        other = _without_attributes(other)
    leaves = len(true) or len(said)
    emotion = _EXPRESSION * channels + _EXPRESSION

    def weight(node: Tree) -> float:
        if node.slot == "emotion":
            return emotion
        return _ATTRIBUTES / leaves if node.slot.endswith(" cue") else _EXPRESSION

    def relabel(left: Tree, right: Tree) -> float:
        if (left.slot, left.value) == (right.slot, right.value):
            return 0.0
        # What cannot be changed is deleted and inserted.
        changed = left.slot == right.slot and not left.slot.endswith(" cue")
        return weight(left) if changed else _NEVER

    most = emotion + _EXPRESSION * channels + _ATTRIBUTES
    return tree_distance(one, other, relabel, weight) / most
