"""A contact sheet of the world: a row per clip with frames, waveform, pitch, truth and words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from mmemo.console import console
from mmemo.world import emotions as E
from mmemo.world import scene
from mmemo.world.config import WorldConfig
from mmemo.world.face import draw_clip, frame_times
from mmemo.world.plan import ClipPlan, make_plans
from mmemo.world.questions import face_cues, voice_cues
from mmemo.world.render import WorldError
from mmemo.world.voice import pitch_track, speak

_FRAMES = 6
_SCALE = 2  # frames are drawn at twice the size of the video
_INK, _SOFT = "#22303c", "#7b8a97"
_COLOURS = {
    "happy": "#e3a21a",
    "sad": "#3f7fbf",
    "angry": "#cf4a3c",
    "fear": "#7a5aa6",
    "surprise": "#d9722e",
    "neutral": "#7b8a97",
}
_CONFLICTS = {
    "video_aligned": "conflict: the face decides",
    "audio_aligned": "conflict: the voice decides",
    "consistent": "face and voice agree",
}


def preview(config: WorldConfig, path: Path, rows: int = 9) -> Path:
    """Write a PNG of ``rows`` test clips, a third from each conflict subset; returns ``path``.

    Raises:
        WorldError: ``path`` does not end in .png, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise WorldError(f"{path}: the contact sheet is a PNG; give a file name that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(config, path, rows)
    except OSError as error:
        raise WorldError(
            f"{path}: cannot be written ({error.strerror or error}); give another file name"
        ) from error
    return path


def _draw(config: WorldConfig, path: Path, rows: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plans = _choose(make_plans(config)["test"], rows)
    figure = Figure(figsize=(16, 1.36 * len(plans) + 0.7), facecolor="white")
    FigureCanvasAgg(figure)
    grid: Any = figure.add_gridspec(
        len(plans),
        3,
        width_ratios=(7.6, 3.1, 3.9),
        left=0.01,
        right=0.995,
        top=1 - 0.55 / (1.36 * len(plans) + 0.7),
        bottom=0.02,
        wspace=0.06,
        hspace=0.16,
    )
    figure.text(0.012, 0.997, "mmemo world", va="top", size=17, weight="bold", color=_INK)
    figure.text(
        0.14,
        0.9955,
        "Six moments of each clip, its sound (bars) and pitch (line), and its truth:"
        " the channel that expresses more strongly decides.",
        va="top",
        size=11,
        color=_SOFT,
    )
    for row, plan in enumerate(plans):
        _frames(figure.add_subplot(grid[row, 0]), plan, config)
        _sound(figure.add_subplot(grid[row, 1]), plan, config, last=row == len(plans) - 1)
        _truth(figure.add_subplot(grid[row, 2]), plan)
    figure.savefig(path, dpi=110, format="png")


def _choose(plans: Sequence[ClipPlan], rows: int) -> list[ClipPlan]:
    """Clips from each subset in turn, with labels and speakers as different as possible."""
    chosen: list[ClipPlan] = []
    for number in range(rows):
        subset = tuple(_CONFLICTS)[number % len(_CONFLICTS)]
        pool = [plan for plan in plans if plan.conflict == subset and plan not in chosen]
        labels = [plan.label for plan in chosen]
        people = [plan.speaker.name for plan in chosen]
        pool.sort(key=lambda plan: (labels.count(plan.label), people.count(plan.speaker.name)))
        chosen += pool[:1]
    return chosen


def _frames(axes: Any, plan: ClipPlan, config: WorldConfig) -> None:
    frames = draw_clip(plan, config, config.media.size * _SCALE)
    times = frame_times(config)
    picks = np.linspace(1, len(frames) - 3, _FRAMES).round().astype(int)
    gap = np.full((frames.shape[1], 6, 3), 255, np.uint8)
    strip = [part for index in picks for part in (frames[index], gap)][:-1]
    axes.imshow(np.concatenate(strip, axis=1))
    for column, index in enumerate(picks):
        x = column * (frames.shape[2] + 6) + 6
        axes.text(
            x,
            8,
            f"{times[index]:.1f} s",
            color="white",
            size=7,
            va="top",
            bbox={"facecolor": "black", "alpha": 0.35, "pad": 1.5, "linewidth": 0},
        )
    axes.set_axis_off()


def _sound(axes: Any, plan: ClipPlan, config: WorldConfig, *, last: bool) -> None:
    rate, knobs = config.media.sample_rate, config.difficulty
    voice = speak(plan, config.media.seconds, rate)
    sound = scene.mix(voice, plan, rate, knobs.audio_snr, knobs.music_snr)
    times, track = pitch_track(voice, rate)
    bars = np.abs(sound[: len(sound) // 160 * 160]).reshape(-1, 160).max(axis=1)
    where = (np.arange(len(bars)) + 0.5) * 160 / rate
    colour = _COLOURS[plan.voice_emotion]
    axes.bar(where, 2 * bars, 0.008, bottom=-bars, color=colour, alpha=0.45, linewidth=0)
    axes.set(xlim=(0, config.media.seconds), ylim=(-0.42, 0.42), yticks=[])
    axes.tick_params(labelsize=7, colors=_SOFT, length=2, labelbottom=last)
    pitch = axes.twinx()
    pitch.plot(times, track, color=_INK, linewidth=1.6)
    pitch.set(ylim=(60, 520), yscale="log")
    pitch.set_yticks([75, 150, 300], labels=["75", "150", "300 Hz"], size=7, color=_SOFT)
    pitch.minorticks_off()
    pitch.tick_params(length=2)
    for one in (axes, pitch):
        for side in ("top", "left", "right"):
            one.spines[side].set_visible(False)
        one.spines["bottom"].set_color("#d5dbe0")


def _truth(axes: Any, plan: ClipPlan) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    axes.text(0.06, 0.98, plan.label, va="top", size=14, weight="bold", color=_COLOURS[plan.label])
    axes.text(1.0, 0.955, _CONFLICTS[plan.conflict], va="top", ha="right", size=9, color=_SOFT)
    channels = (
        ("face", plan.face_emotion, plan.face_strength, face_cues(plan, 3)),
        ("voice", plan.voice_emotion, plan.voice_strength, voice_cues(plan, 3)),
    )
    for y, (name, emotion, strength, seen) in zip((0.66, 0.40), channels, strict=True):
        axes.text(0.06, y, name, va="center", size=9.5, color=_INK)
        axes.barh(y, 0.30, 0.13, left=0.17, color="#eceff2")
        axes.barh(y, 0.30 * strength, 0.13, left=0.17, color=_COLOURS[emotion])
        word = f"{E.strength_word(strength)} {emotion}" if emotion != "neutral" else "neutral"
        axes.text(0.485, y + 0.005, word, va="center", size=9, color=_COLOURS[emotion])
        axes.text(0.17, y - 0.115, ", ".join(seen), va="center", size=7.5, color=_SOFT)
    around = plan.scene
    music = "no music" if around.music == "none" else f"{around.music} music"
    words = f'"{plan.line}"  ·  {around.weather}, {around.light} light, {music}'
    axes.text(0.06, 0.09, words, va="center", size=8.5, color=_INK, style="italic")


def run_preview(config: WorldConfig, path: Path) -> None:
    """``mmemo world --preview``: write a contact sheet to ``path`` and print where it is.

    Raises:
        WorldError: as :func:`preview`.
    """
    sheet = preview(config, path)
    console.print(Text.assemble("Contact sheet: ", (str(sheet), "bold")), soft_wrap=True)
