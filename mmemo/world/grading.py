"""Grade an emotion answer against the world's truth: the four dimensions of the judge, by rule.

Each dimension looks at something of its own, so that one fault costs one grade:

- factual alignment: the text against the truth. An absent cue costs 1, a channel's wrong emotion 2,
  a wrong word on which channel is stronger, or on whether they agree, 1.
- interpretative quality: the text against itself. Does the answer follow from the emotions that it
  gives the channels and from the stronger of them? Contradictions, missing or unweighed channels,
  and things beside the point as evidence cost.
- caption completeness: the share of what there is to say (the two strongest cues of each channel
  that expresses something, that a neutral channel is neutral) that is said. A channel most of whose
  cues are not there counts as not covered: listing everything covers nothing.
- fluency and structure: the tags, each part once, sentences, no repetition, nothing idle.

Whether the answer is the right one is no part of it; that is the outcome reward's. Length as such
earns nothing. A text that says nothing checkable of the channels gets the lowest grades. The sizes
of the costs are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmemo.answers.parsing import base_form, normalise
from mmemo.rewards.judge.rubric import HIGHEST, LOWEST, WORST, Grades
from mmemo.world.claims_of_answer import CHANNELS, VOCABULARY, VOICE_CUES, Channel, Reading, read

NEEDED = 2
"""Cues of a channel that a complete answer names, where there are so many."""
LONGEST = 40
"""Words of a sentence above which it runs on."""

_SHAPE = re.compile(
    r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>"
    r"\s*<answer>(?:(?!</?think>|</?answer>).)+</answer>\s*",
    re.IGNORECASE | re.DOTALL,
)
_VERB = re.compile(
    r"\b(?:is|are|has|have|shows?|looks?|sounds?|carry|carries|expresses|feels?|seems?|speaks?"
    r"|agrees?|disagrees?|match|matches|differs?|decides|dominates|prevails|outweighs|wins|yields)"
    r"\b"
)
_HEADED = re.compile(r"^[A-Za-z ]{1,24}:")
_DECIDES = {"video_aligned": "face", "audio_aligned": "voice"}


def grade(text: str, row: Mapping[str, Any]) -> Grades:
    """The four grades, 1 to 5, of an answer such as ``<think>...</think><answer>sad</answer>``.

    Args:
        row: a row's truth; read are ``cues``, ``modality_labels`` and ``conflict``. What is
            missing is not held against the text.
    """
    said = read(text, row)
    if not said.cues - _spurious(row) and not any(said.emotions.values()):
        return WORST
    found = (_factual(said, row), _quality(said, row), _complete(said, row), _structure(text, said))
    return Grades(*(max(LOWEST, min(HIGHEST, one)) for one in found))


def present_cues(row: Mapping[str, Any]) -> dict[Channel, list[str]]:
    """The present cues of each channel, strongest first."""
    present: list[str] = list((row.get("cues") or {}).get("present", ()))
    return {name: [cue for cue in present if cue in known] for name, known in VOCABULARY.items()}


def true_emotions(row: Mapping[str, Any]) -> dict[Channel, str]:
    """The emotion that each channel expresses, where the row knows it."""
    labels = row.get("modality_labels") or {}
    return {channel: base_form(labels[key]) for channel, key in CHANNELS.items() if key in labels}


def _spurious(row: Mapping[str, Any]) -> frozenset[str]:
    cues = row.get("cues") or {}
    return frozenset(cues.get("spurious", ())) - frozenset(cues.get("present", ()))


def _factual(said: Reading, row: Mapping[str, Any]) -> int:
    cues = row.get("cues") or {}
    present, absent = set(cues.get("present", ())), set(cues.get("absent", ()))
    if present & VOICE_CUES:  # a voice's cues are listed whole, and what is not listed is not there
        absent |= VOICE_CUES - present
    truth = true_emotions(row)
    wrong = len(said.cues & absent)
    right = len(said.cues & present)
    for channel, emotion in truth.items():
        wrong += 2 * len(said.emotions[channel] - {emotion})
        right += emotion in said.emotions[channel]
    conflict = row.get("conflict")
    decides = _DECIDES.get(str(conflict))
    if decides is not None:
        wrong += bool(said.stronger - {decides})
    if conflict is not None:
        wrong += bool(said.agreement - {conflict == "consistent"})
    return HIGHEST - wrong if right else LOWEST


def _quality(said: Reading, row: Mapping[str, Any]) -> int:
    face, voice = said.emotions["face"], said.emotions["voice"]
    lost = 2 * (len(face) > 1 or len(voice) > 1)
    lost += 2 * (len(said.stronger) > 1 or len(said.agreement) > 1)
    lost += _strengths_contradict(said)
    lost += bool(said.doubled or any(_both_ways(said.cues)))
    lost += min(2, len(said.cues & _spurious(row)))
    if said.agreement == {True} and face and voice and face != voice:
        lost += 1
    if (row.get("cues") or {}).get("present") and not said.cues and face | voice != {"neutral"}:
        lost += 2  # emotions without any evidence
    if not face and not voice:
        lost += 3
    elif not face or not voice:
        lost += 1
    elif face != voice and len(said.stronger) < 2 and said.implied() in (None, "neither"):
        lost += 1  # not weighed
    if not _follows(said):
        lost += 3
    elif said.concluded - {said.answer}:
        lost += 2
    return HIGHEST - lost


def _follows(said: Reading) -> bool:
    """Whether the answer is what the stated emotions and the stated weighing lead to."""
    if said.answer is None:
        return False
    face, voice = said.emotions["face"], said.emotions["voice"]
    if not face or not voice or face == voice:
        expected = face | voice
    else:
        weighed = said.implied()
        expected = {"face": face, "voice": voice}.get(str(weighed), face | voice)
    return said.answer in expected or not (face or voice)


def _strengths_contradict(said: Reading) -> bool:
    """Whether the channel that is called stronger was called weaker in its strength."""
    face, voice = said.strengths["face"], said.strengths["voice"]
    if len(said.stronger) != 1 or len(face) != 1 or len(voice) != 1:
        return False
    gap = max(face) - max(voice)
    return (gap < 0 and "face" in said.stronger) or (gap > 0 and "voice" in said.stronger)


def _both_ways(cues: frozenset[str]) -> list[str]:
    """What is said to be low and high at once."""
    return [cue for cue in cues if cue.startswith("low ") and "high " + cue[4:] in cues]


def _complete(said: Reading, row: Mapping[str, Any]) -> int:
    present, truth = present_cues(row), true_emotions(row)
    wanted = covered = 0
    for channel, vocabulary in VOCABULARY.items():
        if truth.get(channel) == "neutral" or not present[channel]:
            wanted += 1
            covered += bool(said.emotions[channel])
            continue
        need = min(NEEDED, len(present[channel]))
        wanted += need
        named = said.cues & vocabulary
        hits = len(named & set(present[channel]))
        covered += min(need, hits) if 2 * hits >= len(named) else 0
    return LOWEST + int((HIGHEST - LOWEST) * covered / wanted + 0.5)


def _structure(text: str, said: Reading) -> int:
    lost = 0 if _SHAPE.fullmatch(text) else 2
    parts = ("face", "voice", "weigh")
    lost += sum(said.parts[part] != 1 for part in parts)
    repeated = Counter(normalise(sentence) for sentence in said.sentences)
    lost += sum(repeated.values()) - len(repeated)
    lost += said.idle
    lost += min(2, sum(_malformed(sentence) for sentence in said.sentences))
    words = [len(sentence.split()) for sentence in said.sentences]
    lost += any(count > LONGEST for count in words) + _repeats_cues(said)
    return HIGHEST - lost


def _malformed(sentence: str) -> bool:
    """No capital, no end, or neither a heading nor a verb."""
    formed = sentence[0].isupper() and sentence[-1] in ".!?;"
    return not formed or not (_HEADED.match(sentence) or _VERB.search(normalise(sentence)))


def _repeats_cues(said: Reading) -> bool:
    """Whether a cue is named more than twice: once as a cue and once as a reason is enough."""
    whole = normalise(" ".join(said.sentences))
    return any(whole.count(cue) > 2 for cue in said.cues)
