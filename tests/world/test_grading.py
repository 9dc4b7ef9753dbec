"""The rule-based grader: the world's answers get the most, and each fault costs where it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmemo.answers.messages import think_text
from mmemo.config import parse
from mmemo.rewards.judge.rubric import HIGHEST, WORST, Grades
from mmemo.world.config import WorldConfig
from mmemo.world.grading import grade
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans
from mmemo.world.rows import Row

BEST = Grades(HIGHEST, HIGHEST, HIGHEST, HIGHEST)
ROW: Row = {
    "label": "angry",
    "conflict": "video_aligned",
    "modality_labels": {"video": "angry", "audio": "sad", "text": "neutral"},
    "cues": {
        "present": ["brows lowered", "lips pressed", "low pitch", "low loudness", "low rate"],
        "absent": ["lip corners up", "cheeks raised", "jaw dropped", "lids tightened"],
        "spurious": ["rain in the window", "a cap"],
    },
}
NEUTRAL: Row = {
    "label": "neutral",
    "conflict": "consistent",
    "modality_labels": {"video": "neutral", "audio": "neutral", "text": "neutral"},
    "cues": {"present": ["low range"], "absent": ["lip corners up"], "spurious": []},
}
FACE = "Face: angry, strong, brows lowered, lips pressed."
VOICE = "Voice: sad, weak, low pitch, low loudness."
RULE = "The face is stronger."


def said(face: str = FACE, voice: str = VOICE, rule: str = RULE, answer: str = "angry") -> str:
    thought = " ".join(part for part in (face, voice, rule) if part)
    return f"<think>{thought}</think><answer>{answer}</answer>"


@pytest.fixture(scope="module")
def full() -> dict[str, list[Row]]:
    config = parse(WorldConfig, {"output_dir": "unused", "seed": 3})
    return manifests(config, make_plans(config))


@pytest.mark.parametrize("name", ["train_emotion", "val_emotion", "test_conflict", "preference"])
def test_the_worlds_answers_get_the_best_grades(name: str, full: dict[str, list[Row]]) -> None:
    assert len(full[name]) > 40
    for row in full[name]:
        turn = row["messages"][-1] if "messages" in row else row["chosen"][0]
        assert grade(turn["content"], row) == BEST, turn["content"]


def test_rejected_answers_lose_where_they_are_wrong(full: dict[str, list[Row]]) -> None:
    for row in full["preference"]:
        found = grade(row["rejected"][0]["content"], row)
        if row["rejected_kind"] == "spurious":
            assert found.interpretative_quality <= 4  # it may cite music alone
        else:
            assert found.factual_alignment <= 4


@pytest.mark.parametrize(
    "text",
    [
        said(),
        said(answer="Anger."),
        said(
            "The face looks angry and strong, with brows lowered and lips pressed.",
            "The voice sounds sad, with low pitch and low loudness.",
            "The face outweighs the voice.",
        ),
        said(rule="The voice is weaker, so the person feels angry."),
        said(rule="The voice is not stronger than the face."),
        said(face=VOICE, voice=FACE),
        said("Anger in the face: brows lowered, lips pressed."),
        said(rule="They disagree, and the face decides."),
        said("Face: angry, strong, brows lowered, lips pressed, no lip corners up."),
    ],
)
def test_wordings_of_the_same_truth_get_the_same(text: str) -> None:
    assert grade(text, ROW) == BEST


F, Q, C, S = range(4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # against the truth
        (said("Face: angry, brows lowered, lips pressed, jaw dropped."), {F: 4}),
        (said("Face: angry, brows lowered, lips pressed, jaw dropped, cheeks raised."), {F: 3}),
        (said(voice="Voice: sad, weak, low pitch, low loudness, high rate."), {F: 4}),
        (said("Face: happy, strong, brows lowered, lips pressed.", answer="happy"), {F: 3}),
        (said(voice="Voice: fear, weak, low pitch, low loudness."), {F: 3}),
        (said(FACE.replace("strong", "weak"), VOICE.replace("weak", "strong"),
              "The voice is stronger.", "sad"), {F: 4}),
        (said(rule="Face and voice agree. The face is stronger."), {F: 4, Q: 4, S: 4}),
        # against itself
        (said(answer="happy"), {Q: 2}),
        (said(answer="sad"), {Q: 2}),
        (said(answer="angry or sad"), {Q: 2}),
        (said(answer=""), {Q: 2, S: 3}),
        (said(FACE.replace("strong", "weak"), VOICE.replace("weak", "strong")), {Q: 4}),
        (said(rule="The face is stronger. The voice is stronger."), {F: 4, Q: 3, S: 4}),
        (said(rule="The face is stronger, so the person feels sad."), {Q: 3}),
        (said("Face: angry, strong, brows lowered, lips pressed, rain in the window."), {Q: 4}),
        (said("Face: angry, strong, brows lowered, lips pressed. The face is happy."),
         {F: 3, Q: 3, S: 4}),
        (said(voice="Voice: sad, weak, low pitch, high pitch, low loudness."), {F: 4, Q: 4}),
        (said("Face: angry, strong.", "Voice: sad, weak."), {Q: 3, C: 1}),
        (said(rule=""), {S: 4}),  # the strengths weigh
        (said(FACE.replace(" strong,", ""), rule=""), {Q: 4, S: 4}),
        # coverage
        (said("Face: angry, strong, brows lowered."), {C: 4}),
        (said("Face: angry, strong."), {C: 3}),
        (said("Face: angry, strong.", "Voice: sad, weak, low pitch."), {C: 2}),
        (said(voice=""), {Q: 4, C: 3, S: 4}),
        # structure
        (said().replace("</think>", ""), {S: 3}),
        (said().replace("<think>", "").replace("</think>", ""), None),
        (said() + said(), {S: 3}),
        (said(rule=f"{RULE} {FACE}"), {S: 3}),
        (said(rule=f"{RULE} {RULE}"), {S: 3}),
        (said(rule=f"{RULE} This is a thing of great care."), {S: 4}),
        (said("face: angry, strong, brows lowered, lips pressed."), {S: 4}),
        (said(FACE, VOICE, "The face is stronger"), {S: 4}),
        (said(rule="The face is stronger " + "and stronger " * 40 + "."), {S: 4}),
    ],
)  # fmt: skip
def test_each_fault_costs_where_it_belongs(text: str, expected: dict[int, int] | None) -> None:
    wanted = list(WORST if expected is None else BEST)
    for place, value in (expected or {}).items():
        wanted[place] = value
    assert list(grade(text, ROW)) == wanted


def test_neutral_needs_no_cue() -> None:
    text = "<think>Face: neutral. Voice: neutral. Neither is strong.</think><answer>{}</answer>"
    assert grade(text.format("neutral"), NEUTRAL) == BEST
    assert grade(text.format("sad"), NEUTRAL).interpretative_quality == 2
    half = "<think>Face: neutral. Neither is strong.</think><answer>neutral</answer>"
    assert grade(half, NEUTRAL).caption_completeness == 3


EVERY_CUE = ", ".join(
    ["brows lowered", "lips pressed", "lip corners up", "cheeks raised", "jaw dropped"]
    + [f"{way} {noun}" for noun in ("pitch", "loudness", "rate") for way in ("low", "high")]
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "<think>Let's solve this problem step by step.</think><answer>angry</answer>",
        "<think>angry, happy, sad, fear</think><answer>angry</answer>",
        "<think>" + "The person is in a room and speaks. " * 40 + "</think><answer>angry</answer>",
        "<think>rain in the window, a cap</think><answer>angry</answer>",
    ],
)
def test_text_that_says_nothing_of_the_channels_gets_the_lowest(text: str) -> None:
    assert grade(text, ROW) == WORST


def test_listing_every_cue_earns_little() -> None:
    listed = grade(f"<think>{EVERY_CUE}</think><answer>angry</answer>", ROW)
    assert listed.factual_alignment == 1
    assert sum(listed) <= 8
    headed = said(f"Face: angry, {EVERY_CUE}.", "Voice: sad.")
    assert sum(grade(headed, ROW)) <= 13


@pytest.mark.parametrize(
    "longer",
    [
        lambda text: text.replace("</think>", " It is so." * 12 + "</think>"),
        lambda text: text.replace("</think>", f" {think_text(text)}" * 3 + "</think>"),
        lambda text: text + " I am sure of it." * 20,
    ],
)  # fmt: skip
def test_length_alone_never_raises_a_grade(longer: Callable[[str], str]) -> None:
    for text in (said(), said("Face: angry."), said(answer="happy")):
        before, after = grade(text, ROW), grade(longer(text), ROW)
        assert all(new <= old for new, old in zip(after, before, strict=True))
        assert sum(after) < sum(before)


def test_what_a_row_does_not_know_is_not_held_against_the_text() -> None:
    bare: dict[str, Any] = {"cues": {}, "modality_labels": {}, "conflict": None}
    found = grade(said(), bare)
    assert found.interpretative_quality == HIGHEST
    assert found.fluency_and_structural_clarity == HIGHEST
