"""A small task of known truth: a real face, sad or happy, and a voice of controlled prosody.

The face comes from one real clip, in whose first seconds a woman cries and in whose last seconds
she smiles; the voice reads a neutral sentence. Both are muxed into mp4 files. Face and voice are
crossed, so that neither tells the other, and every clip is asked about both. Held-out clips have
other seconds of the footage, other voices and other sentences.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tests.real_weights.voice import Prosody, Speaker

FPS = 10
SIZE = (480, 270)  # width, height of the written clips
LABELS = ("sad", "happy")
QUESTIONS = {"face": "What does the face show?", "audio": "How does the voice sound?"}


@dataclass(frozen=True)
class Split:
    """What a half of the task is made of. ``seconds`` of the footage, per emotion."""

    name: str
    voices: tuple[str, ...]
    sentences: tuple[str, ...]
    seconds: dict[str, tuple[float, float]]
    clips: int


TRAIN = Split(
    "train",
    ("en-us+m1", "en-us+m3", "en-us+m4", "en-us+f1", "en-us+f2", "en-us+m7"),
    (
        "The train leaves at nine in the morning.",
        "Please put the book on the table.",
        "We are going to the shop on Monday.",
        "The meeting is in room number twelve.",
    ),
    {"sad": (0.0, 4.0), "happy": (13.0, 20.0)},
    clips=48,
)
TEST = Split(
    "test",
    ("en-us+m2", "en-us+f3"),
    ("My brother lives in a small town.", "The window is on the left side."),
    {"sad": (4.0, 6.0), "happy": (11.0, 13.0)},
    clips=24,
)


def make(clip: Path, espeak: Path, into: Path, seed: int = 0) -> None:
    """Write ``into``/clips and the manifests ``train.jsonl`` and ``test.jsonl``."""
    frames, times = _read(clip)
    speaker = Speaker(espeak)
    for split in (TRAIN, TEST):
        rng = random.Random(f"{seed} {split.name}")
        rows: list[dict[str, object]] = []
        for number in range(split.clips):
            # The four combinations take turns, so that labels are balanced and crossed.
            face, voice = LABELS[number % 2], LABELS[number // 2 % 2]
            name = split.voices[number // 4 % len(split.voices)]
            sound = speaker.say(rng.choice(split.sentences), name, _prosody(voice, rng))
            seconds = min(len(sound) / speaker.rate, 2.0)
            first, last = split.seconds[face]
            start = rng.uniform(first, max(last - seconds, first))
            shown = np.searchsorted(times, start + np.arange(round(seconds * FPS)) / FPS)
            path = Path("clips") / split.name / f"{number:03d}.mp4"
            picture = frames[np.minimum(shown, len(frames) - 1)]
            mux(into / path, picture, FPS, sound, speaker.rate)
            rows += _rows(split, number, str(path), {"face": face, "audio": voice}, name)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (into / f"{split.name}.jsonl").write_text(lines, encoding="utf-8")


def _prosody(emotion: str, rng: random.Random) -> Prosody:
    def near(value: int) -> int:
        return round(value * rng.uniform(0.9, 1.1))

    if emotion == "happy":
        return Prosody(near(190), near(70), near(85), near(120))
    return Prosody(near(115), near(28), near(15), near(65))


def _rows(
    split: Split, number: int, path: str, truth: dict[str, str], voice: str
) -> list[dict[str, object]]:
    return [
        {
            "sample_id": f"{split.name}-{number:03d}-{channel}",
            "messages": [
                {
                    "role": "user",
                    "content": f"<video><audio><face>{question} Answer sad or happy.",
                },
                {"role": "assistant", "content": f"<answer>{truth[channel]}</answer>"},
            ],
            "videos": [path],
            "audios": [path],
            "faces": [path],
            "label": truth[channel],
            "modality_labels": {"video": truth["face"], "audio": truth["audio"]},
            "group": {"speaker": voice},
            "tier": "expression",
        }
        for channel, question in QUESTIONS.items()
    ]


def _read(clip: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    with av.open(str(clip)) as container:
        read = [
            (frame.to_ndarray(format="rgb24", width=SIZE[0], height=SIZE[1]), frame.time)
            for frame in container.decode(video=0)
        ]
    frames, times = zip(*read, strict=True)
    return np.stack(frames), np.array(times)


def mux(
    path: Path, frames: NDArray[np.uint8], fps: int, sound: NDArray[np.float32], rate: int
) -> None:
    """Write (F, H, W, 3) RGB frames and (S,) samples as H.264 and AAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=fps)
        picture.height, picture.width = frames.shape[1:3]
        picture.pix_fmt = "yuv420p"
        picture.options = {"crf": "18", "preset": "ultrafast"}
        voice = container.add_stream("aac", rate=rate, layout="mono")
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        samples = np.clip(sound, -1, 1)[None].astype(np.float32)
        heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        heard.sample_rate, heard.pts = rate, 0
        container.mux(voice.encode(heard))
        container.mux(voice.encode(None))
