"""Graded: the four grades of a reasoning, given by rule from what is true of the clip.

The dimensions of EmotionThinker's reward model (arXiv 2601.15668) without a model: the mean grade g
of :func:`mmemo.world.grading.grade` as (g - 1) / 4. It knows the synthetic world's vocabulary of
cues, so it is exact there: a yardstick for judges and reward models. ``mode: inverted`` pays 1
minus that, for studies of a scorer that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mmemo.answers.messages import Chat, completion_text
from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST, Grades
from mmemo.world.grading import grade, present_cues, true_emotions


def graded(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    *,
    cues: Sequence[Mapping[str, Sequence[str]] | None],
    modality_labels: Sequence[Mapping[str, str] | None],
    label: Sequence[str | None],
    conflict: Sequence[str | None],
    mode: Literal["right", "inverted"] = "right",
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    """0 to 1 per completion; None where the row does not know both channels' emotions.

    Args:
        cues: of each row the texts that are ``present``, ``absent`` and ``spurious``.
        modality_labels: the emotions in ``video`` and ``audio``.
        label: the clip's emotion; not part of the grade, and only there to tell rows with a truth.
        conflict: which channel decides, or ``consistent``.
        mode: ``inverted`` pays for the worst reasoning.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ("right", "inverted"):
        raise ValueError(f"mode is '{mode}'; write right or inverted")
    scores: list[float | None] = []
    found: list[Grades] = []
    for index, completion in enumerate(completions):
        row = {
            "cues": cues[index],
            "modality_labels": modality_labels[index],
            "conflict": conflict[index],
        }
        if label[index] is None or len(true_emotions(row)) < 2:
            scores.append(None)
            continue
        found.append(grade(completion_text(completion), row))
        right = (sum(found[-1]) / len(DIMENSIONS) - LOWEST) / (HIGHEST - LOWEST)
        scores.append(right if mode == "right" else 1 - right)
    if log_metric is not None and found:
        for name, values in zip(DIMENSIONS, zip(*found, strict=True), strict=True):
            log_metric(name, sum(values) / len(values))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The two strongest cues of each channel, weighed; None where an emotion is unknown."""
    emotions = true_emotions(row)
    if row.get("label") is None or len(emotions) < 2:
        return None
    cues = present_cues(row)
    parts: list[str] = []
    for channel, emotion in emotions.items():
        named = cues[channel][:2] if emotion != "neutral" else []
        parts.append(f"{channel.capitalize()}: {', '.join([emotion, *named])}.")
    decides = {"video_aligned": "The face decides.", "audio_aligned": "The voice decides."}
    weighed = decides.get(str(row.get("conflict")), "Face and voice agree.")
    return f"<think>{' '.join(parts)} {weighed}</think><answer>{row['label']}</answer>"


def wrong_on_purpose(params: Mapping[str, Any]) -> str | None:
    """The inverted mode pays for bad reasoning."""
    inverted = params.get("mode") == "inverted"
    return "mode 'inverted' pays for the worst reasoning" if inverted else None
