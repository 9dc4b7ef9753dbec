"""Questions and answers about a clip, in a small closed vocabulary, with several wordings each.

Answers are short: at most 20 words for an attribute or an expression, at most 45 for an emotion.
The wording of a question is drawn by the clip's seed and reveals nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmemo.world import emotions as E
from mmemo.world.plan import ClipPlan

ACTIVE = 0.2
"""Minimum apex intensity of an action unit that counts as shown."""
_TURNED = 0.35  # minimum yaw or roll of a head that counts as turned or tilted
_NOUNS = {
    "pitch": "pitch",
    "pitch_range": "range",
    "loudness": "loudness",
    "rate": "rate",
    "slope": "ending",
    "breathiness": "breath",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a clip with its answer. ``media``: the streams that it needs, in the order
    of their placeholders."""

    kind: str
    media: tuple[str, ...]
    question: str
    answer: str
    extra: dict[str, str] = field(default_factory=dict[str, str])


ALL = ("video", "audio", "face")


def shown_units(plan: ClipPlan) -> list[str]:
    """The action units that are shown, strongest first."""
    active = [unit for unit, value in plan.aus.items() if value >= ACTIVE]
    return sorted(active, key=lambda unit: -plan.aus[unit])


def face_cues(plan: ClipPlan, limit: int = 3) -> list[str]:
    """The strongest facial cues, in words."""
    return [E.ACTION_UNITS[unit] for unit in shown_units(plan)[:limit]]


def voice_cues(plan: ClipPlan, limit: int = 3) -> list[str]:
    """The largest prosodic deviations, in words such as ``high pitch``."""
    order = sorted(plan.prosody, key=lambda name: -abs(plan.prosody[name]))
    moved = [name for name in order if E.level_word(plan.prosody[name]) != "middle"]
    return [level_cue(name, plan.prosody[name]) for name in moved][:limit]


def level_cue(name: str, departure: float) -> str:
    """A prosodic deviation in words: ``high pitch``."""
    return f"{E.level_word(departure)} {_NOUNS[name]}"


def attribute_questions(plan: ClipPlan, rng: np.random.Generator, number: int) -> list[Asked]:
    """``number`` different questions on action units, prosody, head pose and scene."""
    makers = (
        _ask_units,
        _ask_prosody,
        _ask_brows,
        _ask_pose,
        _ask_level,
        _ask_scene,
        _ask_unit,
        _ask_music,
    )
    head, rest = [0, 1], [int(index) for index in 2 + rng.permutation(len(makers) - 2)]
    return [makers[index](plan, rng) for index in (head + rest)[:number]]


def expression_questions(plan: ClipPlan, rng: np.random.Generator, number: int) -> list[Asked]:
    """Questions on the face's emotion, the voice's, which is stronger, and whether they agree."""
    makers = (_ask_face, _ask_voice, _ask_stronger, _ask_agree)
    return [maker(plan, rng) for maker in makers[:number]]


def emotion_question(plan: ClipPlan, rng: np.random.Generator, transcript: bool) -> Asked:
    """The question which emotion the person feels and why. ``transcript`` quotes the spoken
    line."""
    said = f'They say "{plan.line}". ' if transcript else ""
    text = pick_wording(
        rng,
        "Which emotion does the person feel, and why?",
        "What does the person feel? Explain with face and voice.",
        "Name the emotion of the person and say why.",
        "How does the person feel? Think first, then answer.",
    )
    return Asked("emotion", ALL, said + text, emotion_answer(plan))


def emotion_answer(plan: ClipPlan) -> str:
    """The reasoned answer: each channel's emotion and cues, the stronger channel, the label."""
    return reasoned(plan, plan.label)


def reasoned(
    plan: ClipPlan,
    label: str,
    face: tuple[str, Sequence[str]] | None = None,
    voice: tuple[str, Sequence[str]] | None = None,
) -> str:
    """An emotion answer. ``face`` and ``voice`` replace a channel's true (emotion, cues)."""
    face_emotion, face_seen = face or (plan.face_emotion, face_cues(plan, 2))
    voice_emotion, voice_heard = voice or (plan.voice_emotion, voice_cues(plan, 2))
    seen = _channel("Face", face_emotion, plan.face_strength, face_seen)
    heard = _channel("Voice", voice_emotion, plan.voice_strength, voice_heard)
    return f"<think>{seen} {heard} {_rule(plan)}</think><answer>{label}</answer>"


def _channel(name: str, emotion: str, strength: float, cues: Sequence[str]) -> str:
    if emotion == "neutral":
        return f"{name}: neutral."
    seen = f", {', '.join(cues)}" if cues else ""
    return f"{name}: {emotion}, {E.strength_word(strength)}{seen}."


def _concluded(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def pick_wording(rng: np.random.Generator, *wordings: str) -> str:
    """One of the wordings, at random."""
    return wordings[int(rng.integers(len(wordings)))]


def _media(rng: np.random.Generator, *needed: str) -> tuple[str, ...]:
    """The needed streams alone or all three, at random, so that models learn which stream to
    use."""
    return ALL if rng.integers(2) else needed


def _ask_units(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng,
        "Which action units are active in the face?",
        "What moves in the face?",
        "List what the face does.",
    )
    shown = set(shown_units(plan)[:6])
    names = [words for unit, words in E.ACTION_UNITS.items() if unit in shown]
    answer = ", ".join(names) + "." if names else "nothing moves."
    return Asked("units", _media(rng, "face"), text, answer)


def _ask_unit(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    shown = shown_units(plan)
    # Units between the two limits are not asked about, since neither answer would be clearly right.
    hidden = [unit for unit, value in plan.aus.items() if value < ACTIVE / 2]
    yes = bool(rng.integers(2)) and bool(shown)
    pool = shown if yes else hidden
    unit = pool[int(rng.integers(len(pool)))]
    text = pick_wording(rng, "Does the face show {}?", "Are there {} in the face?")
    question = text.format(E.ACTION_UNITS[unit])
    return Asked("unit", _media(rng, "face"), question, "yes." if yes else "no.")


def _ask_brows(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng, "How strong are the brows and the mouth?", "What do brows and mouth do?"
    )
    parts: list[str] = []
    for name, units in (
        ("brows", ("AU1", "AU2", "AU4")),
        ("mouth", ("AU12", "AU15", "AU20", "AU23", "AU25", "AU26")),
    ):
        unit = max(units, key=lambda key: plan.aus[key])
        value = plan.aus[unit]
        shown = f"{E.ACTION_UNITS[unit]}, {E.strength_word(value)}" if value >= ACTIVE else "still"
        parts.append(f"{name}: {shown}.")
    return Asked("brows", _media(rng, "face"), text, " ".join(parts))


def _ask_prosody(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng,
        "How are the pitch, loudness and rate of the voice?",
        "Describe pitch, loudness and rate.",
        "What are the levels of pitch, loudness and rate in the voice?",
    )
    levels = {name: E.level_word(value) for name, value in plan.prosody.items()}
    answer = f"pitch {levels['pitch']}, loudness {levels['loudness']}, rate {levels['rate']}."
    return Asked("prosody", _media(rng, "audio"), text, answer)


def _ask_level(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng, "How are the range, ending and breath of the voice?", "Describe range, ending, breath."
    )
    levels = {name: E.level_word(value) for name, value in plan.prosody.items()}
    answer = (
        f"range {levels['pitch_range']}, ending {levels['slope']}, breath {levels['breathiness']}."
    )
    return Asked("level", _media(rng, "audio"), text, answer)


def _ask_pose(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(rng, "How is the head held?", "Where is the head turned and tilted?")
    turn = "left" if plan.yaw < -_TURNED else "right" if plan.yaw > _TURNED else "ahead"
    tilt = "left" if plan.roll < -_TURNED else "right" if plan.roll > _TURNED else "not"
    return Asked("pose", _media(rng, "video"), text, f"turned {turn}, tilted {tilt}.")


def _ask_scene(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(rng, "What is the scene?", "Describe the window, the light and the cap.")
    cap = "a cap" if plan.scene.cap else "no cap"
    answer = f"{plan.scene.weather} in the window, {plan.scene.light} light, {cap}."
    return Asked("scene", _media(rng, "video"), text, answer)


def _ask_music(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(rng, "Which music is there?", "What music plays?")
    answer = "no music." if plan.scene.music == "none" else f"{plan.scene.music} music."
    return Asked("music", _media(rng, "audio"), text, answer)


def _ask_face(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng, "What does the face show?", "Which emotion is in the face, and how strong?"
    )
    seen = _channel("Face", plan.face_emotion, plan.face_strength, face_cues(plan, 3))
    return Asked("face", _media(rng, "face"), text, _concluded(seen, plan.face_emotion))


def _ask_voice(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng, "What does the voice carry?", "Which emotion is in the voice, and how strong?"
    )
    heard = _channel("Voice", plan.voice_emotion, plan.voice_strength, voice_cues(plan, 3))
    return Asked("voice", _media(rng, "audio"), text, _concluded(heard, plan.voice_emotion))


def _ask_stronger(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng,
        "Which is stronger, the face or the voice?",
        "Where is the stronger expression, in the face or in the voice?",
    )
    return Asked("stronger", ALL, text, _rule(plan))


def _rule(plan: ClipPlan) -> str:
    neutral = plan.label == "neutral"
    return "Neither is strong." if neutral else f"The {plan.stronger} is stronger."


def _ask_agree(plan: ClipPlan, rng: np.random.Generator) -> Asked:
    text = pick_wording(
        rng, "Do the face and the voice agree?", "Do face and voice carry one emotion?"
    )
    gold = "yes" if plan.conflict == "consistent" else "no"
    return Asked("agree", ALL, text, f"<answer>{gold}</answer>")
