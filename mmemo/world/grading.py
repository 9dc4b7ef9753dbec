"""Grades an emotion answer against the world's truth, by rule, in the judge's four dimensions.

Each dimension measures something of its own, so that one fault costs grades in one dimension:

- Factual alignment compares the text with the truth. An absent cue costs 1, a wrong emotion of a
  channel 2, a wrong statement on which channel is stronger, or on whether they agree, 1.
- Interpretative quality compares the text with itself: does the answer follow from the emotions
  that it attributes to the channels, and from which one it calls stronger? Contradictions, missing
  or unweighed channels, and irrelevant things cited as evidence cost grades.
- Caption completeness is the share of the important facts that are stated: the two strongest cues
  of each expressive channel, and that a neutral channel is neutral. A channel most of whose stated
  cues are absent counts as not covered, so listing everything covers nothing.
- Fluency and structure checks the tags, that each part occurs once, the sentences, and that
  nothing is repeated or idle.

Whether the answer is correct is not graded; that is what the outcome reward pays for. Length as
such earns nothing. A text that states nothing checkable about the channels gets the lowest grades.
The sizes of the costs are ours.
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
"""Number of cues per channel that a complete answer names, if there are as many."""
LONGEST = 40
"""Maximum number of words of a well-formed sentence."""

# The lookahead keeps the tags of one part from occurring inside of another.
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
        text: the answer.
        row: the row's truth, of which ``cues``, ``modality_labels`` and ``conflict`` are read. The
            text is not penalised for what the row does not know.
    """
    reading = read(text, row)
    if not reading.cues - _spurious(row) and not any(reading.emotions.values()):
        return WORST
    grades = (
        _factual(reading, row),
        _quality(reading, row),
        _complete(reading, row),
        _structure(text, reading),
    )
    return Grades(*(max(LOWEST, min(HIGHEST, one)) for one in grades))


def grade_facts(reading: Reading, row: Mapping[str, Any]) -> tuple[int, int]:
    """Factual alignment and caption completeness, 1 to 5, of known claims against a row's truth.

    Only these two dimensions depend on the clip: the same text keeps its quality and its structure
    beside another clip's facts.
    """
    factual, complete = _factual(reading, row), _complete(reading, row)
    return max(LOWEST, min(HIGHEST, factual)), max(LOWEST, min(HIGHEST, complete))


def present_cues(row: Mapping[str, Any]) -> dict[Channel, list[str]]:
    """The present cues of each channel, strongest first."""
    present: list[str] = list((row.get("cues") or {}).get("present", ()))
    return {name: [cue for cue in present if cue in known] for name, known in VOCABULARY.items()}


def true_emotions(row: Mapping[str, Any]) -> dict[Channel, str]:
    """The emotion that each channel expresses, as far as the row knows it."""
    labels = row.get("modality_labels") or {}
    return {channel: base_form(labels[key]) for channel, key in CHANNELS.items() if key in labels}


def _spurious(row: Mapping[str, Any]) -> frozenset[str]:
    cues = row.get("cues") or {}
    return frozenset(cues.get("spurious", ())) - frozenset(cues.get("present", ()))


def _factual(reading: Reading, row: Mapping[str, Any]) -> int:
    cues = row.get("cues") or {}
    present, absent = set(cues.get("present", ())), set(cues.get("absent", ()))
    if present & VOICE_CUES:  # rows list all cues of a voice, so those not listed are absent
        absent |= VOICE_CUES - present
    truth = true_emotions(row)
    wrong = len(reading.cues & absent)
    right = len(reading.cues & present)
    for channel, emotion in truth.items():
        wrong += 2 * len(reading.emotions[channel] - {emotion})
        right += emotion in reading.emotions[channel]
    conflict = row.get("conflict")
    decides = _DECIDES.get(str(conflict))
    if decides is not None:
        wrong += bool(reading.stronger - {decides})
    if conflict is not None:
        wrong += bool(reading.agreement - {conflict == "consistent"})
    # Stating nothing false is worth nothing where nothing true is stated.
    return HIGHEST - wrong if right else LOWEST


def _quality(reading: Reading, row: Mapping[str, Any]) -> int:
    face, voice = reading.emotions["face"], reading.emotions["voice"]
    lost = 2 * (len(face) > 1 or len(voice) > 1)
    lost += 2 * (len(reading.stronger) > 1 or len(reading.agreement) > 1)
    lost += _strengths_contradict(reading)
    lost += bool(reading.doubled or any(_both_ways(reading.cues)))
    lost += min(2, len(reading.cues & _spurious(row)))
    if reading.agreement == {True} and face and voice and face != voice:
        lost += 1
    if (row.get("cues") or {}).get("present") and not reading.cues and face | voice != {"neutral"}:
        lost += 2  # emotions without any evidence
    if not face and not voice:
        lost += 3
    elif not face or not voice:
        lost += 1
    elif face != voice and len(reading.stronger) < 2 and reading.implied() in (None, "neither"):
        lost += 1  # not weighed
    if not _follows(reading):
        lost += 3
    elif reading.concluded - {reading.answer}:
        lost += 2
    return HIGHEST - lost


def _follows(reading: Reading) -> bool:
    """Whether the answer follows from the stated emotions and the stated stronger channel."""
    if reading.answer is None:
        return False
    face, voice = reading.emotions["face"], reading.emotions["voice"]
    if not face or not voice or face == voice:
        expected = face | voice
    else:
        # Unweighed, the emotion of either channel follows; that nothing is weighed has a cost of
        # its own.
        weighed = reading.implied()
        expected = {"face": face, "voice": voice}.get(str(weighed), face | voice)
    return reading.answer in expected or not (face or voice)


def _strengths_contradict(reading: Reading) -> bool:
    """Whether the channel that is called stronger is described with the lower strength."""
    face, voice = reading.strengths["face"], reading.strengths["voice"]
    if len(reading.stronger) != 1 or len(face) != 1 or len(voice) != 1:
        return False
    gap = max(face) - max(voice)
    return (gap < 0 and "face" in reading.stronger) or (gap > 0 and "voice" in reading.stronger)


def _both_ways(cues: frozenset[str]) -> list[str]:
    """Cues that are said to be low and high at once."""
    return [cue for cue in cues if cue.startswith("low ") and "high " + cue[4:] in cues]


def _complete(reading: Reading, row: Mapping[str, Any]) -> int:
    present, truth = present_cues(row), true_emotions(row)
    wanted = covered = 0
    for channel, vocabulary in VOCABULARY.items():
        if truth.get(channel) == "neutral" or not present[channel]:
            wanted += 1
            covered += bool(reading.emotions[channel])
            continue
        need = min(NEEDED, len(present[channel]))
        wanted += need
        named = reading.cues & vocabulary
        hits = len(named & set(present[channel]))
        covered += min(need, hits) if 2 * hits >= len(named) else 0
    # Half up, because Python's round() rounds half to even.
    return LOWEST + int((HIGHEST - LOWEST) * covered / wanted + 0.5)


def _structure(text: str, reading: Reading) -> int:
    lost = 0 if _SHAPE.fullmatch(text) else 2
    parts = ("face", "voice", "weigh")
    lost += sum(reading.parts[part] != 1 for part in parts)
    repeated = Counter(normalise(sentence) for sentence in reading.sentences)
    lost += sum(repeated.values()) - len(repeated)
    lost += reading.idle
    lost += min(2, sum(_malformed(sentence) for sentence in reading.sentences))
    words = [len(sentence.split()) for sentence in reading.sentences]
    lost += any(count > LONGEST for count in words) + _repeats_cues(reading)
    return HIGHEST - lost


def _malformed(sentence: str) -> bool:
    """Whether a sentence lacks its capital, its end, or both a heading and a verb."""
    formed = sentence[0].isupper() and sentence[-1] in ".!?;"
    return not formed or not (_HEADED.match(sentence) or _VERB.search(normalise(sentence)))


def _repeats_cues(reading: Reading) -> bool:
    """Whether a cue is named more than twice. Twice is fine: as a cue and as a reason."""
    whole = normalise(" ".join(reading.sentences))
    return any(whole.count(cue) > 2 for cue in reading.cues)
