"""Graded: pays for the quality of the reasoning, graded by rule against the truth of the clip.

Range: 0 to 1. None: the row has no label, or lacks the emotion of the face or the voice, or one of
them is no emotion that the rules know.
Source: the four dimensions of EmotionThinker's reward model (arXiv 2601.15668) without a model: the
mean grade g of :func:`mmemo.world.grading.grade`, as (g - 1) / 4. The rules are ours.

The rules know the synthetic world's vocabulary of cues and are exact there, so this reward is a
yardstick for judges and reward models. ``mode: inverted`` pays 1 minus the score, for studies of a
scorer that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mmemo.answers.messages import Chat, completion_text
from mmemo.answers.parsing import EMOTIONS, base_form
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
        cues: each row's texts by kind: ``present``, ``absent`` and ``spurious``.
        modality_labels: each row's emotions by modality, of which ``video`` and ``audio`` are read.
        label: the clip's emotion. It does not affect the grade; rows without it are not scored.
        conflict: which channel decides, or ``consistent``.
        mode: ``right``, or ``inverted`` to pay for the worst reasoning.
        log_metric: receives the mean grade of each dimension.

    Raises:
        ValueError: ``mode`` is neither.
    """
    if mode not in ("right", "inverted"):
        raise ValueError(f"mode is '{mode}'; write right or inverted")
    scores: list[float | None] = []
    grades_given: list[Grades] = []
    for index, completion in enumerate(completions):
        row = {
            "cues": cues[index],
            "modality_labels": modality_labels[index],
            "conflict": conflict[index],
        }
        if not _known(label[index], row):
            scores.append(None)
            continue
        grades_given.append(grade(completion_text(completion), row))
        right = (sum(grades_given[-1]) / len(DIMENSIONS) - LOWEST) / (HIGHEST - LOWEST)
        scores.append(right if mode == "right" else 1 - right)
    if log_metric is not None and grades_given:
        for name, values in zip(DIMENSIONS, zip(*grades_given, strict=True), strict=True):
            log_metric(name, sum(values) / len(values))
    return scores


def gold(row: Mapping[str, Any]) -> str | None:
    """The two strongest cues of each channel, weighed; None where an emotion is unknown."""
    if not _known(row.get("label"), row):
        return None
    emotions = true_emotions(row)
    cues = present_cues(row)
    parts: list[str] = []
    for channel, emotion in emotions.items():
        named = cues[channel][:2] if emotion != "neutral" else []
        parts.append(f"{channel.capitalize()}: {', '.join([emotion, *named])}.")
    decides = {"video_aligned": "The face decides.", "audio_aligned": "The voice decides."}
    weighed = decides.get(str(row.get("conflict")), "Face and voice agree.")
    return f"<think>{' '.join(parts)} {weighed}</think><answer>{row['label']}</answer>"


def wrong_on_purpose(params: Mapping[str, Any]) -> str | None:
    """The inverted mode pays for the worst reasoning."""
    inverted = params.get("mode") == "inverted"
    return "mode 'inverted' pays for the worst reasoning" if inverted else None


def _known(label: str | None, row: Mapping[str, Any]) -> bool:
    """Whether the rules can read an answer that names the row's emotions."""
    named = [*true_emotions(row).values(), *([] if label is None else [base_form(label)])]
    return len(named) == 3 and all(one in EMOTIONS for one in named)
