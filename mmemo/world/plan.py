"""The plan of each clip: who is in it, and which emotion each channel expresses how strongly.

A plan holds the whole truth of a clip before anything is rendered. Clips are labelled by the rule
of CA-MER (MoSEAR, arXiv 2508.01181): face and voice each express an emotion; where they differ, the
label is the emotion of the channel that expresses more strongly. Both strengths are drawn from the
same joint distribution in every subset, so neither a strength nor the gap between them reveals
whether the channels agree. Neutral speakers express nothing in either channel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmemo.content import sha256
from mmemo.data.sample import Conflict
from mmemo.world import emotions as E
from mmemo.world.config import WorldConfig
from mmemo.world.people import LEANING_LINES, NEUTRAL_LINES, Speaker, make_speakers

SPLITS: tuple[str, ...] = ("train", "val", "test", "rl")
_RENDERERS = ("drawing", "face", "people", "render", "scene", "voice")
_OFF_PROTOTYPE = 0.25  # maximum intensity of an action unit outside the emotion's prototype


@dataclass(frozen=True, slots=True)
class Scene:
    """What surrounds the person."""

    weather: str
    light: str
    cap: bool
    music: str


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """The truth of one clip, and everything that rendering it needs.

    ``aus``: apex intensities, 0..1. ``prosody``: deviations from the speaker's resting values,
    -1..1. ``yaw``, ``roll``: -1..1, image-right positive. ``onset``, ``offset`` and ``blinks``:
    times in seconds.
    """

    split: str
    index: int
    speaker: Speaker
    label: str
    conflict: Conflict
    face_emotion: str
    voice_emotion: str
    face_strength: float
    voice_strength: float
    aus: dict[str, float]
    onset: float
    offset: float
    yaw: float
    roll: float
    blinks: tuple[float, ...]
    prosody: dict[str, float]
    line: str
    text_emotion: str
    scene: Scene
    difficulty: float
    seed: int

    @property
    def name(self) -> str:
        """Path of the clip within the world's folder."""
        return f"clips/{self.split}/{self.index:04d}.mp4"

    @property
    def stronger(self) -> str:
        """``face`` or ``voice``: the channel that expresses more strongly."""
        return "face" if self.face_strength > self.voice_strength else "voice"


def plan_hash(plan: ClipPlan, config: WorldConfig) -> str:
    """Hash of everything that determines a rendered clip: plan, format, noise and code."""
    parts = [asdict(plan), config.media.model_dump(), config.difficulty.model_dump(), _renderer()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _renderer() -> list[str]:
    """Hashes of the modules that render clips, so that clips of older code are rendered again."""
    return [sha256(Path(__file__).with_name(f"{name}.py")) for name in _RENDERERS]


def make_plans(config: WorldConfig) -> dict[str, list[ClipPlan]]:
    """The plans of every split, in the order of their file numbers."""
    sizes = config.size
    people = make_speakers(
        config.seed,
        {"train": sizes.train_speakers, "val": sizes.val_speakers, "test": sizes.test_speakers},
        config.difficulty.speaker_spread,
    )
    people["rl"] = people["train"]
    counts = (sizes.train_clips, sizes.val_clips, sizes.test_clips, sizes.rl_clips)
    return {
        split: _plan_split(config, split, count, people[split])
        for split, count in zip(SPLITS, counts, strict=True)
    }


def _plan_split(
    config: WorldConfig, split: str, count: int, people: Sequence[Speaker]
) -> list[ClipPlan]:
    # The last number is above every clip's index, which stands in its place in a clip's own seed.
    rng = np.random.default_rng([config.seed, SPLITS.index(split), 1 << 20])
    cells = _cells(config, split, count, rng)
    # Each speaker has as many clips as any other, give or take one.
    order = [people[index % len(people)] for index in range(count)]
    shuffled = [order[index] for index in rng.permutation(count)]
    return [
        _plan_clip(config, split, index, speaker, cell)
        for index, (speaker, cell) in enumerate(zip(shuffled, cells, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class _Cell:
    conflict: Conflict
    stronger: str
    winner: str
    loser: str


def _cells(config: WorldConfig, split: str, count: int, rng: np.random.Generator) -> list[_Cell]:
    """Conflict subset, emotions and stronger channel of each clip: balanced, in random order."""
    training = split in ("train", "rl")
    consistent = round(count * (config.bias.train_consistent if training else 1 / 3))
    share = config.bias.train_video_share if training else 0.5
    by_face = round((count - consistent) * share)
    pairs = [(a, b) for a in E.FELT for b in E.FELT if a != b]
    cells: list[_Cell] = []
    sides: tuple[tuple[Conflict, str, int], ...] = (
        ("video_aligned", "face", by_face),
        ("audio_aligned", "voice", count - consistent - by_face),
    )
    for conflict, side, number in sides:
        for index in _cycle(len(pairs), number, rng):
            cells.append(_Cell(conflict, side, *pairs[index]))
    neutral = round(consistent * config.bias.neutral_share)
    felt = [E.FELT[index] for index in _cycle(len(E.FELT), consistent - neutral, rng)]
    for position, emotion in enumerate([*felt, *["neutral"] * neutral]):
        # Consistent clips have a stronger channel too: each is it equally often.
        side = "face" if position % 2 else "voice"
        cells.append(_Cell("consistent", side, emotion, emotion))
    return [cells[index] for index in rng.permutation(count)]


def _cycle(kinds: int, number: int, rng: np.random.Generator) -> list[int]:
    """``number`` indices below ``kinds``; each occurs as often as the others, give or take one."""
    rounds = [rng.permutation(kinds) for _ in range(-(-number // kinds))]
    return [int(index) for index in np.concatenate(rounds)[:number]] if rounds else []


def _plan_clip(
    config: WorldConfig, split: str, index: int, speaker: Speaker, cell: _Cell
) -> ClipPlan:
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    knobs = config.difficulty
    high, low = _strengths(config, rng)
    if cell.winner == "neutral":
        high, low = 0.0, 0.0
    by_face = cell.stronger == "face"
    face, voice = (cell.winner, cell.loser) if by_face else (cell.loser, cell.winner)
    face_strength, voice_strength = (high, low) if by_face else (low, high)
    seconds = config.media.seconds
    aus = _action_units(face, face_strength, knobs.ambiguity, knobs.cue_spread, rng)
    prosody = _prosody(voice, voice_strength, knobs.ambiguity, knobs.cue_spread, rng)
    line, text_emotion = _line(config, cell.winner, rng)
    blinks = rng.uniform(0.1, seconds - 0.1, size=rng.integers(0, 3))
    span = max(knobs.strength_max - knobs.strength_min, 1e-6)
    return ClipPlan(
        split=split,
        index=index,
        speaker=speaker,
        label=cell.winner,
        conflict=cell.conflict,
        face_emotion=face,
        voice_emotion=voice,
        face_strength=face_strength,
        voice_strength=voice_strength,
        aus=aus,
        onset=round(float(rng.uniform(0.05, 0.3)), 3),
        offset=round(seconds - float(rng.uniform(0.0, 0.25)), 3),
        yaw=round(float(rng.uniform(-1, 1)), 3),
        roll=round(float(rng.uniform(-1, 1)), 3),
        blinks=tuple(round(float(time), 3) for time in np.sort(blinks)),
        prosody=prosody,
        line=line,
        text_emotion=text_emotion,
        scene=_scene(config, split, cell.winner, rng),
        difficulty=round(1 - min(1.0, (high - low) / span) if high else 0.0, 3),
        seed=int(rng.integers(0, 1 << 31)),
    )


def _strengths(config: WorldConfig, rng: np.random.Generator) -> tuple[float, float]:
    """Strengths (stronger, weaker): the gap is uniform, then the weaker one within what is left."""
    knobs = config.difficulty
    span = knobs.strength_max - knobs.strength_min
    gap = rng.uniform(knobs.strength_gap, knobs.strength_gap + 0.8 * (span - knobs.strength_gap))
    low = rng.uniform(knobs.strength_min, knobs.strength_max - gap)
    return round(float(low + gap), 3), round(float(low), 3)


def _action_units(
    emotion: str, strength: float, ambiguity: float, spread: float, rng: np.random.Generator
) -> dict[str, float]:
    """Apex intensities: the prototype, mixed with its confusable neighbour, with missing units and
    random spread."""
    draws = rng.uniform(size=(len(E.ACTION_UNITS), 3))
    lean = float(rng.uniform(0, 0.6)) * ambiguity
    spared = int(rng.integers(0, 1 << 16))
    own = E.FACES[emotion]
    other = E.FACES[E.FACE_CONFUSED[emotion]] if emotion in E.FACE_CONFUSED else {}
    core = E.CORE[emotion]
    # One core unit is never missing, else ambiguity could take all of them from a face.
    kept = core[spared % len(core)] if core else ""
    found: dict[str, float] = {}
    for unit, (gone, jitter, stray) in zip(E.ACTION_UNITS, draws, strict=True):
        chance = (0.3 if unit in core else 0.15 + 0.35) * ambiguity
        base = 0.0 if unit != kept and gone < chance else own.get(unit, 0.0)
        value = strength * max(base, lean * other.get(unit, 0.0)) * (1 + spread * (2 * jitter - 1))
        if stray < 0.1 * spread / 0.15 and unit not in own:
            value = max(value, _OFF_PROTOTYPE * stray * 0.15 / max(0.1 * spread, 1e-9))
        found[unit] = round(float(min(1.0, value)), 3)
    return found


def _prosody(
    emotion: str, strength: float, ambiguity: float, spread: float, rng: np.random.Generator
) -> dict[str, float]:
    """Prosodic deviations: the prototype, rotated towards its confusable neighbour at equal norm,
    with random spread."""
    own = np.asarray(E.VOICES[emotion])
    lean = float(rng.uniform(0, 0.6)) * ambiguity
    noise = rng.normal(size=len(E.PROSODY)) * spread
    if emotion in E.VOICE_CONFUSED:
        mixed = (1 - lean) * own + lean * np.asarray(E.VOICES[E.VOICE_CONFUSED[emotion]])
        own = mixed * (np.linalg.norm(own) / np.linalg.norm(mixed))
    values = np.clip(strength * own + noise * 0.6, -1.1, 1.1)
    return {name: round(float(value), 3) for name, value in zip(E.PROSODY, values, strict=True)}


def _line(config: WorldConfig, label: str, rng: np.random.Generator) -> tuple[str, str]:
    """The spoken line, and the emotion that its words suggest (``neutral`` for most)."""
    # Both are drawn whether needed or not, so that later numbers do not depend on the settings.
    draw, pick = rng.uniform(), int(rng.integers(0, 1 << 16))
    if draw < config.bias.text_correlation and label in LEANING_LINES:
        lines = LEANING_LINES[label]
        return lines[pick % len(lines)], label
    return NEUTRAL_LINES[pick % len(NEUTRAL_LINES)], "neutral"


def _scene(config: WorldConfig, split: str, label: str, rng: np.random.Generator) -> Scene:
    follow = rng.uniform() < config.bias.scene_correlation and split in ("train", "rl")
    # Drawn even where the scene follows the emotion, so that later numbers do not depend on it.
    weather = E.WEATHERS[int(rng.integers(len(E.WEATHERS)))]
    light = E.LIGHTS[int(rng.integers(len(E.LIGHTS)))]
    cap = bool(rng.integers(2))
    music = E.MUSICS[int(rng.integers(len(E.MUSICS)))]
    return Scene(*E.SCENES[label]) if follow else Scene(weather, light, cap, music)
