"""Probe questions in the form of EmoReAlM (arXiv 2602.07054), answered inside ``<answer>`` tags.

Tasks: ``basic_video`` and ``basic_audio`` (which of four cues is present), ``modality_agreement``
(yes or no), ``stress_video`` and ``stress_audio`` (does a cue support an emotion: it is present and
fits, is hallucinated, or is present but spurious). Gold answers are balanced in every task.
Hallucinated cues reuse the pairs of cue and emotion that are answered yes for other clips, so the
wording of a question does not reveal its answer; only spurious cues can be recognised from words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmemo.world import emotions as E
from mmemo.world import questions as Q
from mmemo.world.config import WorldConfig
from mmemo.world.plan import ClipPlan
from mmemo.world.questions import ALL, Asked
from mmemo.world.rows import Row, row_of, scene_cues

TASKS = ("basic_video", "basic_audio", "modality_agreement", "stress_video", "stress_audio")
_LETTERS = "ABCD"
_HEARD = 0.3  # minimum deviation of a voice cue that is offered as the correct choice


def probe_rows(config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]) -> list[Row]:
    """``probe_questions`` rows per clip over all tasks. Extra columns: ``task``, ``gold`` and
    ``probe_kind``."""
    if not plans or not config.size.probe_questions:
        return []
    # The first clip's seed tells the splits apart, which share the world's.
    rng = np.random.default_rng([config.seed, 20, plans[0].seed])
    wanted = len(plans) * config.size.probe_questions // len(TASKS)
    asked: list[tuple[int, Asked]] = []
    for task in TASKS:
        order = [int(index) for index in rng.permutation(len(plans))]
        if task.startswith("basic"):
            asked += _choices(plans, order, task, wanted, rng)
        elif task == "modality_agreement":
            asked += _agreement(plans, order, wanted, rng)
        else:
            asked += _stress(plans, order, task, wanted, rng)
    asked.sort(key=lambda pair: pair[0])
    rows: list[Row] = []
    numbers: dict[int, int] = {}
    for index, one in asked:
        number = numbers[index] = numbers.get(index, -1) + 1
        row = row_of(plans[index], bases[index], one, "expression", number)
        row["sample_id"] = row["sample_id"].replace("-expression-", "-probe-")
        rows.append(row)
    return rows


def _asked(task: str, question: str, gold: str, kind: str) -> Asked:
    extra = {"task": task, "gold": gold, "probe_kind": kind}
    return Asked(task, ALL, question, f"<answer>{gold}</answer>", extra)


def cues_of(plan: ClipPlan, task: str) -> tuple[list[str], list[str]]:
    """Clearly present and clearly absent cues of the face or the voice, as the task asks."""
    if task.endswith("video"):
        shown = [E.ACTION_UNITS[unit] for unit in Q.shown_units(plan)]
        hidden = [w for unit, w in E.ACTION_UNITS.items() if plan.aus[unit] < Q.ACTIVE / 2]
        return shown, hidden
    shown = [Q.level_cue(n, v) for n, v in plan.prosody.items() if abs(v) >= _HEARD]
    hidden = [Q.level_cue(n, -v) for n, v in plan.prosody.items() if abs(v) >= _HEARD]
    return shown, hidden


def _choices(
    plans: Sequence[ClipPlan], order: list[int], task: str, wanted: int, rng: np.random.Generator
) -> list[tuple[int, Asked]]:
    found: list[tuple[int, Asked]] = []
    for index in order:
        shown, hidden = cues_of(plans[index], task)
        # Whole rounds of the four letters keep the right answers balanced.
        if len(found) == wanted - wanted % 4:
            break
        if not shown or len(hidden) < 3:
            continue
        gold = len(found) % 4
        options = [hidden[int(k)] for k in rng.permutation(len(hidden))[:3]]
        options.insert(gold, shown[int(rng.integers(len(shown)))])
        listed = " ".join(f"({a}) {b}" for a, b in zip(_LETTERS, options, strict=True))
        asks = "does the face show" if task.endswith("video") else "does the voice carry"
        found.append((index, _asked(task, f"Which cue {asks}? {listed}", _LETTERS[gold], "basic")))
    return found


def _agreement(
    plans: Sequence[ClipPlan], order: list[int], wanted: int, rng: np.random.Generator
) -> list[tuple[int, Asked]]:
    sides = {"yes": [], "no": []}
    for index in order:
        sides["yes" if plans[index].conflict == "consistent" else "no"].append(index)
    number = min(wanted // 2, *(len(side) for side in sides.values()))
    wordings = ("Do the face and the voice agree?", "Do face and voice carry one emotion?")
    return [
        (index, _asked("modality_agreement", wordings[int(rng.integers(2))], gold, "agreement"))
        for gold, side in sides.items()
        for index in side[:number]
    ]


def _stress(
    plans: Sequence[ClipPlan], order: list[int], task: str, wanted: int, rng: np.random.Generator
) -> list[tuple[int, Asked]]:
    """Half of the answers are yes. Of the others, three quarters have hallucinated cues and one
    quarter spurious ones."""
    number = min(wanted, len(plans)) // 2
    half = len(order) // 2
    yes: list[tuple[int, str, str]] = []
    for index in order[:half]:
        emotion, typical = _supporting(plans[index], task)
        if typical and len(yes) < number:
            yes.append((index, typical[int(rng.integers(len(typical)))], emotion))
    spurious = len(yes) // 4
    no: list[tuple[int, str, str, str]] = []
    pairs = [(cue, emotion) for _, cue, emotion in yes]
    for index in order[half:]:
        if len(no) == len(yes):
            break
        if len(no) < spurious:
            options = scene_cues(plans[index], "face" if task.endswith("video") else "voice")
            if not options:
                continue
            cue, emotion = options[int(rng.integers(len(options)))], pairs[len(no)][1]
            no.append((index, cue, emotion, "spurious"))
            continue
        hidden = set(cues_of(plans[index], task)[1])
        fitting = [k for k, (cue, _) in enumerate(pairs[spurious:], spurious) if cue in hidden]
        if fitting:
            cue, emotion = pairs.pop(fitting[0])
            no.append((index, cue, emotion, "hallucinated"))
    no = no[: len(yes)]
    rows = [(index, cue, emotion, "supporting") for index, cue, emotion in yes[: len(no)]] + no
    wordings = ("Is there a cue of {e} here: {c}?", "Does this support {e}: {c}?")
    found: list[tuple[int, Asked]] = []
    for index, cue, emotion, kind in rows:
        text = wordings[int(rng.integers(2))].format(e=emotion, c=cue)
        found.append((index, _asked(task, text, "yes" if kind == "supporting" else "no", kind)))
    return found


def _supporting(plan: ClipPlan, task: str) -> tuple[str, list[str]]:
    """The channel's emotion, and those of its typical cues that are present."""
    shown = cues_of(plan, task)[0]
    if task.endswith("video"):
        emotion = plan.face_emotion
        typical = {E.ACTION_UNITS[unit] for unit in E.FACES[emotion]}
    else:
        emotion = plan.voice_emotion
        wanted = zip(E.PROSODY, E.VOICES[emotion], strict=True)
        typical = {Q.level_cue(name, value) for name, value in wanted if abs(value) >= _HEARD}
    return emotion, [cue for cue in shown if cue in typical]
