"""Preference rows in the form of AVEm-DPO (arXiv 2602.07054): rejected answers of two kinds.

``spurious`` answers cite something that is present but irrelevant to the emotion. ``hallucinated``
answers cite a cue that is typical of the emotion that they name, but absent from the clip. About
half of each kind have the right label, so that the reasons are compared and not only the labels.
A rejected answer has the form of a chosen one: what it says about one channel is true.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmemo.world import emotions as E
from mmemo.world import questions as Q
from mmemo.world.config import WorldConfig
from mmemo.world.plan import ClipPlan
from mmemo.world.rows import Row, row_of, scene_cues


def preference_rows(
    config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]
) -> list[Row]:
    """Two rows per non-neutral clip, one of each kind. Extra column: ``rejected_kind``."""
    rows: list[Row] = []
    for plan, base in zip(plans, bases, strict=True):
        if plan.label == "neutral":
            continue
        rng = np.random.default_rng([plan.seed, 12])
        asked = Q.emotion_question(plan, rng, config.transcript_in_prompt)
        for number, kind in enumerate(("spurious", "hallucinated")):
            row = row_of(plan, base, asked, "emotion", number)
            prompt, answer = row.pop("messages")
            wrong = _wrong_label(plan) if rng.integers(2) else plan.label
            rows.append(
                {
                    "sample_id": row.pop("sample_id").replace("emotion", "preference"),
                    "prompt": [prompt],
                    "chosen": [answer],
                    "rejected": [{"role": "assistant", "content": wrong_reason(plan, kind, wrong)}],
                    "rejected_kind": kind,
                    **row,
                }
            )
    return rows


def _wrong_label(plan: ClipPlan) -> str:
    """The weaker channel's emotion if it differs from the label, else any other one."""
    weaker = plan.voice_emotion if plan.stronger == "face" else plan.face_emotion
    others = [emotion for emotion in E.FELT if emotion != plan.label]
    return weaker if weaker != plan.label else others[plan.seed % len(others)]


def wrong_reason(plan: ClipPlan, kind: str, label: str) -> str:
    """The correct answer with wrong cues, and possibly a wrong emotion, in one channel.

    Args:
        plan: the clip.
        kind: ``spurious`` or ``hallucinated``.
        label: the emotion that the answer names.
    """
    channel, weaker = plan.stronger, "voice" if plan.stronger == "face" else "face"
    if kind == "hallucinated":
        wrong = _wrong_label(plan)
        # All typical cues of the label may be present; then hallucinate those of another channel.
        options = [(channel, label), (weaker, label), (channel, wrong), (weaker, wrong)]
        options += [(channel, emotion) for emotion in E.FELT]
        found = [(where, what, _imagined(plan, where, what)) for where, what in options]
        channel, label, reasons = next(one for one in found if one[2])
    else:
        # Without music nothing irrelevant is heard; then the scene is cited for the face.
        channel = channel if scene_cues(plan, channel) else weaker
        reasons = scene_cues(plan, channel)[:2]
    if channel == "face":
        return Q.reasoned(plan, label, face=(label, reasons))
    return Q.reasoned(plan, label, voice=(label, reasons))


def _imagined(plan: ClipPlan, channel: str, emotion: str) -> list[str]:
    """Up to two cues that are typical of the emotion and absent from the channel."""
    if channel == "face":
        typical = sorted(E.FACES[emotion], key=lambda unit: -E.FACES[emotion][unit])
        # Units between half the threshold and the threshold count neither as shown nor as absent.
        return [E.ACTION_UNITS[u] for u in typical if plan.aus[u] < Q.ACTIVE / 2][:2]
    wanted = dict(zip(E.PROSODY, E.VOICES[emotion], strict=True))
    order = sorted(E.PROSODY, key=lambda name: -abs(wanted[name]))
    typical = [name for name in order if E.level_word(wanted[name]) != "middle"]
    return [
        Q.level_cue(name, wanted[name])
        for name in typical
        if E.level_word(wanted[name]) != E.level_word(plan.prosody[name])
    ][:2]
