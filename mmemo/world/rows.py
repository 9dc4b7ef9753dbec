"""Manifest rows: a question about a clip, its media, and the truth of the clip."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmemo.world import emotions as E
from mmemo.world import questions as Q
from mmemo.world.config import WorldConfig
from mmemo.world.face import face_boxes
from mmemo.world.plan import ClipPlan
from mmemo.world.voice import attributes as voice_attributes

Row = dict[str, Any]


def base_row(plan: ClipPlan, config: WorldConfig) -> Row:
    """The columns that all rows of a clip share: truth, speaker and span."""
    return {
        "face_boxes": face_boxes(plan, config),
        "label": plan.label,
        "labels": [plan.label],
        "aus": dict(plan.aus),
        "cues": cues(plan),
        "transcript": plan.line,
        "modality_labels": {
            "audio": plan.voice_emotion,
            "video": plan.face_emotion,
            "text": plan.text_emotion,
        },
        "attributes": attributes(plan),
        "group": {"speaker": plan.speaker.name, "gender": plan.speaker.gender},
        "conflict": plan.conflict,
        "difficulty": plan.difficulty,
        "start": None,
        "end": None,
    }


def cues(plan: ClipPlan) -> dict[str, list[str]]:
    """Cues in words by kind: ``present``; ``absent``, those typical of the label first; and
    ``spurious``, which are present in the scene but irrelevant. ``video`` and ``audio`` say where
    each of them is, or would be."""
    shown = [E.ACTION_UNITS[unit] for unit in Q.shown_units(plan)]
    heard = Q.voice_cues(plan, len(E.PROSODY))
    typical = [E.ACTION_UNITS[unit] for unit in E.FACES[plan.label]]
    absent = [E.ACTION_UNITS[unit] for unit in E.FACES[plan.label] if plan.aus[unit] < Q.ACTIVE / 2]
    others = [
        words
        for unit, words in E.ACTION_UNITS.items()
        if plan.aus[unit] < Q.ACTIVE / 2 and words not in typical
    ]
    return {
        "present": shown + heard,
        "absent": absent + others,
        "spurious": scene_cues(plan),
        "video": shown + absent + others + scene_cues(plan, "face"),
        "audio": heard + scene_cues(plan, "voice"),
    }


def without_cues(row: Row, gone: Collection[str]) -> Row:
    """The row with these present cues made absent, in words and in action units."""
    found = row["cues"]
    units = {unit for unit, words in E.ACTION_UNITS.items() if words in gone}
    return {
        **row,
        "aus": {unit: value for unit, value in row["aus"].items() if unit not in units},
        "cues": {
            **found,
            "present": [cue for cue in found["present"] if cue not in gone],
            "absent": [cue for cue in found["present"] if cue in gone] + found["absent"],
        },
    }


def with_emotion(row: Row, plan: ClipPlan, modality: str, emotion: str) -> Row:
    """The row with another emotion in one of its modalities; the stronger channel still decides."""
    channels = {**row["modality_labels"], modality: emotion}
    stronger = "video" if plan.stronger == "face" else "audio"
    agree = channels["video"] == channels["audio"]
    return {
        **row,
        "modality_labels": channels,
        "label": channels[stronger],
        "labels": [channels[stronger]],
        "conflict": "consistent" if agree else f"{stronger}_aligned",
    }


def scene_cues(plan: ClipPlan, channel: str | None = None) -> list[str]:
    """The contents of the scene, in words.

    Args:
        channel: ``face`` for those that are seen, ``voice`` for those that are heard; None for all.
    """
    scene = plan.scene
    seen = [f"{scene.weather} in the window", f"{scene.light} light"]
    seen += ["a cap"] if scene.cap else []
    heard = [f"{scene.music} music"] if scene.music != "none" else []
    return {"face": seen, "voice": heard}.get(channel or "", seen + heard)


def attributes(plan: ClipPlan) -> dict[str, dict[str, float]]:
    """Targets for training small encoders, by modality, 0..1 each. Yaw and roll are 0.5 for a head
    that faces ahead."""
    pose = {"yaw": round((plan.yaw + 1) / 2, 3), "roll": round((plan.roll + 1) / 2, 3)}
    scene = {
        **{f"weather_{kind}": float(plan.scene.weather == kind) for kind in E.WEATHERS},
        **{f"light_{kind}": float(plan.scene.light == kind) for kind in E.LIGHTS},
        "cap": float(plan.scene.cap),
    }
    return {
        "face": {**plan.aus, **pose},
        "audio": voice_attributes(plan),
        "video": {**plan.aus, **pose, **scene},
    }


def row_of(plan: ClipPlan, base: Row, asked: Q.Asked, tier: str, number: int) -> Row:
    """A row: the question with its media placeholders, the answer, and the clip's truth."""
    placeholders = "".join(f"<{kind}>" for kind in asked.media)
    messages = [{"role": "user", "content": placeholders + asked.question}]
    if asked.answer:
        messages.append({"role": "assistant", "content": asked.answer})
    row: Row = {
        "sample_id": f"{plan.split}-{plan.speaker.name}-{plan.index:04d}-{tier}-{number}",
        "messages": messages,
    }
    row.update({f"{kind}s": [plan.name] for kind in asked.media})
    truth = base if "face" in asked.media else {**base, "face_boxes": []}
    return {**row, **truth, "tier": tier, **asked.extra}
