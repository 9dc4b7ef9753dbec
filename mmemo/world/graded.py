"""Reasoning with known faults and therefore known grades, for training a reward model.

A candidate starts as a correct and complete :class:`Draft`. Faults of several severities are put
into it, alone or together, and every fault has a known cost in each of the judge's four dimensions
(arXiv 2601.15668; the costs are ours, and the same as those of :mod:`mmemo.world.grading`). The
draft is then put into one of many wordings (:func:`worded`), which says nothing about its faults.
Grades are never derived from the text. Junk, which contains no reasoning but which judges are known
to reward, gets the lowest grades.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmemo.rewards.judge.rubric import DIMENSIONS, HIGHEST, LOWEST, WORST, Grades
from mmemo.world import emotions as E
from mmemo.world import questions as Q
from mmemo.world.claims_of_answer import VOCABULARY, Channel, Reading
from mmemo.world.config import WorldConfig
from mmemo.world.grading import NEEDED, grade_facts
from mmemo.world.plan import ClipPlan
from mmemo.world.rows import Row, row_of, scene_cues, with_emotion, without_cues

ADJECTIVES: Mapping[str, str] = {
    "happy": "joyful",
    "sad": "sad",
    "angry": "angry",
    "fear": "afraid",
    "surprise": "surprised",
    "neutral": "neutral",
}
NOUNS: Mapping[str, str] = {
    "happy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "fear": "fear",
    "surprise": "surprise",
    "neutral": "no emotion",
}
FILLERS: tuple[str, ...] = (
    "This is a matter of great care.",
    "It is what it is.",
    "There are many ways to look at a thing like this.",
    "People are often hard to read.",
    "The clip is short and has a person in it.",
    "All of this is seen as it is.",
)
"""Sentences without content."""

_SHOWN = {"face": "shows", "voice": "carries"}
_SENSED = {"face": "looks", "voice": "sounds"}
_FOUND = {"face": "seen", "voice": "heard"}


@dataclass(slots=True)
class Part:
    """What a draft says about one channel. ``strength`` may be empty."""

    emotion: str
    strength: str
    cues: list[str]


@dataclass(slots=True)
class Draft:
    """A reasoning before it is put into words.

    ``weighed``: a sentence for each channel called stronger, or for ``agree`` or ``neither``.
    ``concluded``: the emotion of a final sentence, if not empty. ``fillers`` and ``repeats``:
    number of sentences without content, and of repeated ones. ``faults``: severity of each fault.
    """

    parts: dict[Channel, Part]
    weighed: list[str]
    answer: str
    concluded: str = ""
    fillers: int = 0
    repeats: int = 0
    small: int = 0
    """Number of sentences that begin with a lower-case letter."""
    shape: str = "<think>{}</think><answer>{}</answer>"
    faults: dict[str, int] = field(default_factory=dict[str, int])


def worded(draft: Draft, rng: np.random.Generator) -> str:
    """The draft as text, in a random wording that says nothing about the faults."""
    channels = list(draft.parts)
    if rng.integers(2):
        channels.reverse()
    sentences = [_channel(name, draft.parts[name], rng) for name in channels]
    sentences += [_weigh(side, rng) for side in draft.weighed]
    if draft.concluded:
        sentences.append(_conclusion(draft.concluded, rng))
    for place in rng.permutation(len(sentences))[: draft.repeats]:
        sentences.append(sentences[int(place)])
    for number in rng.permutation(len(FILLERS))[: draft.fillers]:
        sentences.insert(int(rng.integers(len(sentences) + 1)), FILLERS[int(number)])
    for place in rng.permutation(len(sentences))[: draft.small]:
        text = sentences[int(place)]
        sentences[int(place)] = text[0].lower() + text[1:]
    return draft.shape.format(" ".join(sentences), draft.answer)


def _channel(name: Channel, part: Part, rng: np.random.Generator) -> str:
    adjective, noun, way = ADJECTIVES[part.emotion], NOUNS[part.emotion], int(rng.integers(5))
    strong, weakly = (f"{part.strength} ", f"{part.strength}ly ") if part.strength else ("", "")
    listed, joined = ", ".join(part.cues), _joined(part.cues)
    if way == 0 or (way == 4 and not part.cues):
        described = ", ".join(word for word in (part.emotion, part.strength, listed) if word)
        return f"{name.capitalize()}: {described}."
    if way == 1:
        return f"The {name} {_SHOWN[name]} {strong}{noun}{f': {listed}' if listed else ''}."
    if way == 2:
        with_cues = f", with {joined}" if joined else ""
        return f"The {name} {_SENSED[name]} {weakly}{adjective}{with_cues}."
    if way == 3:
        found = f", {_FOUND[name]} in {joined}" if joined else ""
        return f"In the {name} there is {strong}{noun}{found}."
    so = f", and {part.strength}ly so" if part.strength else ""
    return f"{joined[0].upper()}{joined[1:]}: the {name} is {adjective}{so}."


def _weigh(side: str, rng: np.random.Generator) -> str:
    if side == "neither":
        return Q.pick_wording(rng, "Neither is strong.", "Neither of the two is strong.")
    if side == "agree":
        return Q.pick_wording(
            rng, "Face and voice agree.", "Both agree.", "The two channels match."
        )
    other = "voice" if side == "face" else "face"
    return Q.pick_wording(
        rng,
        f"The {side} is stronger.",
        f"The {other} is weaker.",
        f"The {side} outweighs the {other}.",
        f"The {side} decides.",
        f"The stronger channel is the {side}.",
    )


def _conclusion(emotion: str, rng: np.random.Generator) -> str:
    adjective, noun = ADJECTIVES[emotion], NOUNS[emotion]
    return Q.pick_wording(rng, f"So the person feels {adjective}.", f"Therefore there is {noun}.")


def _joined(cues: Sequence[str]) -> str:
    return " and ".join(", ".join(cues).rsplit(", ", 1))


_CLEAN, _JUNK = 0.14, 0.06  # shares of candidates
_FAULTS = (1, 1, 2, 2, 3)  # numbers of faults to try, equally likely
_CONTRASTS: Mapping[str, float] = {  # shares of the contrasts
    "other_facts": 0.4,
    "cues_absent": 0.25,
    "other_emotion": 0.15,
    "constant": 0.2,
}
_CONSTANTS = 6  # answers that are repeated over the clips


def graded_rows(config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]) -> list[Row]:
    """``size.graded_answers`` rows per clip: ``prompt``, ``candidate``, ``grades``, ``faults``.

    ``grades`` maps each dimension to 1..5, ``faults`` each fault's name to its severity. The rows
    hold the clip's truth except ``attributes`` and ``face_boxes``, which a scorer of text does not
    need.
    """
    rows: list[Row] = []
    for plan, base in zip(plans, bases, strict=True):
        rng = np.random.default_rng([plan.seed, 13])
        for number in range(config.size.graded_answers):
            asked = Q.emotion_question(plan, rng, config.transcript_in_prompt)
            candidate, grades, faults = _candidate(plan, asked.question, rng)
            row = row_of(plan, {**base, "face_boxes": []}, asked, "emotion", number)
            rows.append(_graded(row, "graded", candidate, grades, faults))
    return rows


def contrast_rows(
    config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]
) -> list[Row]:
    """``size.graded_contrasts`` rows per clip like those of :func:`graded_rows`, and ``contrast``.

    ``contrast`` names what was changed while the text was held: ``other_facts``, the facts of
    another clip; ``cues_absent``, facts in which some cues of the text are absent;
    ``other_emotion``, facts with another emotion of one channel; ``constant``, one clip's correct
    answer, repeated over all clips. Factual alignment and completeness follow from the draft's
    claims and the changed facts by the costs of :mod:`mmemo.world.grading`; the other two
    dimensions are those of the text.
    """
    rows: list[Row] = []
    if not config.size.graded_contrasts:
        return rows
    constants = [_constant(plan) for plan in plans[:_CONSTANTS]]
    for place, (plan, base) in enumerate(zip(plans, bases, strict=True)):
        rng = np.random.default_rng([plan.seed, 16])
        for number in range(config.size.graded_contrasts):
            kind = str(rng.choice(list(_CONTRASTS), p=list(_CONTRASTS.values())))
            source, asked = plan, Q.emotion_question(plan, rng, config.transcript_in_prompt)
            if kind == "other_facts":
                source = plans[(place + 1 + int(rng.integers(len(plans) - 1))) % len(plans)]
            if kind == "constant":
                work, text = constants[int(rng.integers(len(constants)))]
            else:
                work = _faulty(source, rng)
                text = worded(work.draft, rng)
            facts = _changed(base, work, kind, rng)
            factual, complete = grade_facts(_claims(work.draft), facts)
            known = work.grades()._replace(factual_alignment=factual, caption_completeness=complete)
            row = row_of(plan, {**facts, "face_boxes": []}, asked, "emotion", number)
            rows.append(_graded(row, "contrast", text, known, {kind: 1}) | {"contrast": kind})
    return rows


def _graded(row: Row, kind: str, text: str, grades: Grades, faults: dict[str, int]) -> Row:
    prompt = row.pop("messages")[0]
    del row["attributes"]  # only encoders learn from it, and there are many rows
    return {
        "sample_id": row.pop("sample_id").replace("emotion", kind),
        "prompt": [prompt],
        "candidate": text,
        "grades": dict(zip(DIMENSIONS, grades, strict=True)),
        "faults": faults,
        **row,
    }


def _changed(base: Row, work: _Work, kind: str, rng: np.random.Generator) -> Row:
    """The truth that a contrast's text is graded by."""
    if kind == "cues_absent":
        cues = sorted({cue for part in work.draft.parts.values() for cue in part.cues})
        named = [cue for cue in cues if cue in base["cues"]["present"]]
        gone = rng.permutation(len(named))[: 1 + int(rng.integers(max(1, len(named))))]
        return without_cues(base, {named[int(place)] for place in gone})
    if kind == "other_emotion":
        modality = ("video", "audio")[int(rng.integers(2))]
        others = [one for one in E.EMOTIONS if one != base["modality_labels"][modality]]
        return with_emotion(base, work.plan, modality, others[int(rng.integers(len(others)))])
    return base


def _claims(draft: Draft) -> Reading:
    """What a draft claims about a clip, known without reading its text."""
    claims = Reading(cues=frozenset(cue for part in draft.parts.values() for cue in part.cues))
    for name, part in draft.parts.items():
        claims.emotions[name].add(part.emotion)
    claims.stronger = {side for side in draft.weighed if side != "agree"}
    claims.agreement = {True} if "agree" in draft.weighed else set()
    return claims


def _constant(plan: ClipPlan) -> tuple[_Work, str]:
    rng = np.random.default_rng([plan.seed, 17])
    work = _Work(plan, rng)
    return work, worded(work.draft, rng)


def _candidate(
    plan: ClipPlan, question: str, rng: np.random.Generator
) -> tuple[str, Grades, dict[str, int]]:
    if (kind := rng.uniform()) < _JUNK:
        return _junk(question, rng), WORST, {"junk": 1}
    work = _faulty(plan, rng, clean=kind < _JUNK + _CLEAN)
    return worded(work.draft, rng), work.grades(), work.draft.faults


def _faulty(plan: ClipPlan, rng: np.random.Generator, clean: bool | None = None) -> _Work:
    """A correct draft, and unless ``clean`` with faults. Half are clean if it is not said."""
    work = _Work(plan, rng)
    if clean is None:
        clean = bool(rng.integers(2))
    if not clean:
        number = _FAULTS[int(rng.integers(len(_FAULTS)))]
        odds = np.array([weight for _, weight, _ in _KINDS], dtype=np.float64)
        drawn = rng.choice(len(_KINDS), size=number, replace=False, p=odds / odds.sum())
        for index in sorted(drawn.tolist()):  # in the order of _KINDS, for which costs add up
            name, _, make = _KINDS[index]
            severity = make(work)
            if severity:
                work.draft.faults[name] = severity
    return work


def _junk(question: str, rng: np.random.Generator) -> str:
    """Text without reasoning, with or without the tags."""
    emotion = E.EMOTIONS[int(rng.integers(len(E.EMOTIONS)))]
    thoughts = (
        "",
        ":",
        "Thought process:",
        "Let's solve this problem step by step.",
        ", ".join(E.EMOTIONS) + ".",
        question,
        " ".join(FILLERS[int(place)] for place in rng.permutation(len(FILLERS))),
        f"The answer is {emotion}.",
    )
    thought = thoughts[int(rng.integers(len(thoughts)))]
    return f"<think>{thought}</think><answer>{emotion}</answer>" if rng.integers(4) else thought


class _Work:
    """A draft in progress, the truth behind it, and the cost of its faults so far."""

    def __init__(self, plan: ClipPlan, rng: np.random.Generator) -> None:
        self.plan, self.rng = plan, rng
        self.lost = dict.fromkeys(("factual", "quality", "structure"), 0)
        self.present: dict[Channel, list[str]] = {
            "face": Q.face_cues(plan, len(E.ACTION_UNITS)),
            "voice": Q.voice_cues(plan, len(E.PROSODY)),
        }
        self.truth: dict[Channel, str] = {"face": plan.face_emotion, "voice": plan.voice_emotion}
        self.agree = plan.face_emotion == plan.voice_emotion
        strengths: dict[Channel, float] = {
            "face": plan.face_strength,
            "voice": plan.voice_strength,
        }
        parts: dict[Channel, Part] = {}
        for name, emotion in self.truth.items():
            calm = emotion == "neutral"
            strength = "" if calm or rng.uniform() < 0.3 else E.strength_word(strengths[name])
            most = NEEDED + int(rng.integers(2))
            parts[name] = Part(emotion, strength, [] if calm else self.present[name][:most])
        weighed = plan.stronger
        if plan.label == "neutral":
            weighed = "neither"
        elif self.agree and rng.integers(2):
            weighed = "agree"
        concluded = plan.label if rng.integers(2) else ""
        self.draft = Draft(parts, [weighed], plan.label, concluded)

    def grades(self) -> Grades:
        """The grades after all costs; completeness is the share of the important facts stated."""
        wanted = covered = 0
        for name, emotion in self.truth.items():
            part = self.draft.parts.get(name)
            if emotion == "neutral" or not self.present[name]:
                wanted += 1
                covered += part is not None
                continue
            need = min(NEEDED, len(self.present[name]))
            right = 0 if part is None else len(set(part.cues) & set(self.present[name]))
            wanted += need
            covered += min(need, right)
        complete = LOWEST + int((HIGHEST - LOWEST) * covered / wanted + 0.5)
        named = any(part.cues for part in self.draft.parts.values())
        felt = any(part.emotion != "neutral" for part in self.draft.parts.values())
        bare = felt and not named and any(self.present.values())
        lost = {**self.lost, "quality": self.lost["quality"] + 2 * bare}
        left = {name: max(LOWEST, HIGHEST - cost) for name, cost in lost.items()}
        return Grades(left["factual"], left["quality"], complete, left["structure"])

    def pick(self, number: int) -> int:
        """A random integer below ``number``."""
        return int(self.rng.integers(number))

    def spend(self, factual: int = 0, quality: int = 0, structure: int = 0) -> None:
        """Add the cost of a fault."""
        self.lost["factual"] += factual
        self.lost["quality"] += quality
        self.lost["structure"] += structure

    def felt(self, *but: str) -> str:
        """A random emotion that neither channel has and that is none of ``but``."""
        others = [one for one in E.FELT if one not in {*self.truth.values(), *but}]
        return others[self.pick(len(others))]

    def untouched(self, *faults: str) -> bool:
        """Whether the draft has none of these faults, whose costs would not add up with the
        next."""
        return not any(name in self.draft.faults for name in faults)


def _wrong_cue(work: _Work) -> int:
    """Add 1 to 3 absent cues to the correct ones."""
    added, wanted = 0, 1 + work.pick(3)
    for name, part in work.draft.parts.items():
        right = len(set(part.cues) & set(work.present[name]))
        # More absent than present cues would make the channel count as not covered, which has a
        # cost in completeness too.
        room = 2 * right - len(set(part.cues) & VOCABULARY[name]) if right else 1
        pool = sorted(VOCABULARY[name] - set(work.present[name]) - _faint(work.plan))
        pool = [cue for cue in pool if cue not in part.cues and _opposite(cue) not in part.cues]
        if part.emotion == "neutral":
            continue
        chosen: list[str] = []
        for place in work.rng.permutation(len(pool)):
            cue = pool[int(place)]
            if len(chosen) < min(room, wanted - added) and _opposite(cue) not in chosen:
                chosen.append(cue)
        for cue in chosen:
            part.cues.insert(work.pick(len(part.cues) + 1), cue)
        added += len(chosen)
    work.spend(factual=added)
    return added


def _faint(plan: ClipPlan) -> set[str]:
    """Action units that are too weak to count as shown and too strong to count as absent."""
    return {
        E.ACTION_UNITS[unit] for unit, value in plan.aus.items() if Q.ACTIVE / 2 <= value < Q.ACTIVE
    }


def _opposite(cue: str) -> str:
    way, _, noun = cue.partition(" ")
    return f"{'high' if way == 'low' else 'low' if way == 'high' else way} {noun}"


def _wrong_emotion(work: _Work) -> int:
    """Change one channel's emotion, and the answer if that channel decides it."""
    if "neutral" in work.truth.values() or not work.untouched("missing_channel", "wrong_side"):
        return 0
    draft = work.draft
    name: Channel = ("face", "voice")[work.pick(2)]
    wrong = work.felt()
    draft.parts[name].emotion = wrong
    decides = work.plan.stronger == name
    # Two channels that are said to agree change together, or the text would also contradict itself.
    if work.agree and draft.weighed == ["agree"]:
        draft.parts["voice" if name == "face" else "face"].emotion = wrong
        work.spend(factual=4)
        decides = True
    else:
        work.spend(factual=2)
    if decides:
        draft.answer = wrong
        draft.concluded = wrong if draft.concluded else ""
    return 2


def _wrong_side(work: _Work) -> int:
    """Call the weaker channel the stronger one, and follow it."""
    if work.agree or not work.untouched("missing_channel"):
        return 0
    draft = work.draft
    side: Channel = "voice" if work.plan.stronger == "face" else "face"
    draft.weighed = [side]
    # The strengths change places too, or they would contradict the side, which is another fault.
    face, voice = draft.parts["face"], draft.parts["voice"]
    face.strength, voice.strength = voice.strength, face.strength
    if not (face.strength and voice.strength):
        face.strength = voice.strength = ""
    draft.answer = work.truth[side]
    draft.concluded = draft.answer if draft.concluded else ""
    work.spend(factual=1)
    return 1


def _missing_cue(work: _Work) -> int:
    """Remove 1 to 4 of the cues that a complete answer names."""
    wanted, gone = 1 + work.pick(4), 0
    parts = [part for part in work.draft.parts.values() if part.cues]
    if not parts:
        return 0
    for part in parts:
        # Cues beyond the needed ones would make up for those that are removed.
        del part.cues[NEEDED:]
    for index in range(wanted):
        part = parts[(index + work.pick(2)) % len(parts)]
        if part.cues:
            part.cues.pop(work.pick(len(part.cues)))
            gone += 1
    return gone


def _missing_channel(work: _Work) -> int:
    """Leave the weaker channel out."""
    weaker: Channel = "voice" if work.plan.stronger == "face" else "face"
    del work.draft.parts[weaker]
    work.spend(quality=1, structure=1)
    return 1


def _contradiction(work: _Work) -> int:
    """Contradict the draft, by severity: 1, a cue is low and high at once; 2, the conclusion
    differs from the answer, or both channels are called stronger; 3, the answer follows from
    nothing."""
    draft = work.draft
    if not work.untouched("missing_channel", "wrong_side", "wrong_emotion", "not_weighed"):
        return 0
    severity = 1 + work.pick(3)
    if severity == 1:
        voice = draft.parts["voice"]
        sure = [cue for cue in voice.cues if cue in work.present["voice"]]
        if not sure or len(voice.cues) > len(sure) or voice.emotion == "neutral":
            return 0
        voice.cues.append(_opposite(sure[work.pick(len(sure))]))
        work.spend(factual=1, quality=1)
    elif severity == 2 and not work.agree and work.pick(2):
        draft.weighed = ["face", "voice"]
        draft.concluded = ""
        work.spend(factual=1, quality=2, structure=1)
    elif severity == 2:
        draft.concluded = work.felt(draft.answer)
        work.spend(quality=2)
    else:
        draft.answer = work.felt()
        draft.concluded = draft.answer if draft.concluded else ""
        work.spend(quality=3)
    return severity


def _not_weighed(work: _Work) -> int:
    """Do not say which channel decides."""
    if not work.untouched("wrong_side", "missing_channel", "wrong_emotion"):
        return 0
    work.draft.weighed = []
    for part in work.draft.parts.values():
        part.strength = ""
    work.spend(quality=int(not work.agree), structure=1)
    return 1


def _spurious_cue(work: _Work) -> int:
    """Cite one or two things of the scene as evidence."""
    part = next(iter(work.draft.parts.values()))
    if part.emotion == "neutral":
        return 0
    found = scene_cues(work.plan)[: 1 + work.pick(2)]
    part.cues += found
    work.spend(quality=len(found))
    return len(found)


def _filler(work: _Work) -> int:
    """Add 1 to 3 sentences without content."""
    work.draft.fillers = 1 + work.pick(3)
    work.spend(structure=work.draft.fillers)
    return work.draft.fillers


def _repetition(work: _Work) -> int:
    """Repeat one or two sentences."""
    draft = work.draft
    if draft.concluded or not draft.weighed or not work.untouched("contradiction"):
        return 0
    draft.repeats = 1 + work.pick(2)
    work.spend(structure=2 * draft.repeats)
    return draft.repeats


def _broken_form(work: _Work) -> int:
    """Break the form, by severity: 1, a sentence without its capital; 2, two of them, or a tag
    that is not closed."""
    severity = 1 + work.pick(2)
    if severity == 1:
        work.draft.small = 1
    elif work.pick(2) and len(work.draft.weighed):
        work.draft.small = 2
    else:
        shapes = ("<think>{}</think><answer>{}", "<think>{}<answer>{}</answer>")
        work.draft.shape = shapes[work.pick(2)]
    work.spend(structure=severity)
    return severity


_KINDS: tuple[tuple[str, int, Callable[[_Work], int]], ...] = (
    ("missing_channel", 2, _missing_channel),
    ("missing_cue", 5, _missing_cue),
    ("wrong_side", 2, _wrong_side),
    ("wrong_emotion", 3, _wrong_emotion),
    ("not_weighed", 2, _not_weighed),
    ("contradiction", 5, _contradiction),
    ("wrong_cue", 4, _wrong_cue),
    ("spurious_cue", 3, _spurious_cue),
    ("filler", 3, _filler),
    ("repetition", 2, _repetition),
    ("broken_form", 3, _broken_form),
)
"""Each fault's name, relative frequency, and function, which applies it to a draft and returns its
severity, 0 if it does not apply."""
