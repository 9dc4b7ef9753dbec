"""The sample type that all stages use, independent of the format of the row on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Modality = Literal["video", "audio", "face"]
"""The media streams of a row. ``fusion`` is computed from them inside the model."""

MODALITIES: tuple[Modality, ...] = ("video", "audio", "face")

Conflict = Literal["video_aligned", "audio_aligned", "consistent"]
"""CA-MER's conflict subsets: the modality whose label agrees with the clip's (MoSEAR,
arXiv 2508.01181)."""

CueChannel = Literal["audio", "video", "text"]
"""Where a cue is: heard, seen, or in the words that are said."""

CONFLICTS: tuple[Conflict, ...] = ("video_aligned", "audio_aligned", "consistent")


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat turn. ``text`` holds the placeholders ``<video>``, ``<audio>``, ``<face>``."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class FaceBox:
    """A face at ``time`` seconds, in pixels of the frame as a player shows it.

    That is after mirroring, turning and stretching to square pixels (:mod:`mmemo.media.display`),
    and before ``max_side``. ``mmemo check --probe`` names clips whose pixels are not square.
    """

    time: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    left_eye: tuple[float, float] | None = None  # image-left eye, x, y
    right_eye: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A stream of a file under ``media_root``, and the span of it to use, in seconds."""

    path: str
    start: float | None = None
    end: float | None = None
    face_boxes: tuple[FaceBox, ...] = ()  # for the ``boxes`` detector; only on ``face``


@dataclass(frozen=True, slots=True)
class Truth:
    """Ground truth about the emotion in a clip. Every field may be absent."""

    label: str | None = None
    labels: tuple[str, ...] = ()
    aus: Mapping[str, float] = field(default_factory=dict[str, float])  # "AU12" -> 0..1
    cues: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict[str, tuple[str, ...]]
    )  # "present" | "absent" | "spurious" -> cue texts; "audio" | "video" | "text" -> present there
    cue_channels: Mapping[str, CueChannel] = field(
        default_factory=dict[str, CueChannel]
    )  # cue text -> where the row says that it is, or would be if it were present
    modality_labels: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # "audio" | "video" | "text" -> emotion
    attributes: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )  # modality -> attribute -> 0..1, targets of encoder training
    conflict: Conflict | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one clip.

    ``turns`` ends with the assistant's answer in training rows and with the user's question in
    prompt-only rows. ``chosen`` and ``rejected`` are set in preference rows only.
    ``rejected_media`` is set if the rejected answer belongs to another clip than the chosen one.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    media: Mapping[Modality, MediaRef]
    truth: Truth = field(default_factory=Truth)
    transcript: str | None = None
    group: Mapping[str, str] = field(default_factory=dict[str, str])  # speaker, gender, ...
    tier: str | None = None  # curriculum tier: attribute | expression | emotion
    difficulty: float | None = None  # 0 easy .. 1 hard
    chosen: str | None = None
    rejected: str | None = None
    rejected_media: Mapping[Modality, MediaRef] = field(default_factory=dict[Modality, MediaRef])
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])  # passed through
    source: tuple[str, int] = ("", 0)  # manifest file and line, for errors
    # Folder of the media paths, for judges that look and listen. The same rows may be elsewhere.
    media_root: str | None = field(default=None, compare=False)

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the final assistant answer."""
        if self.turns and self.turns[-1].role == "assistant":
            return self.turns[:-1]
        return self.turns

    @property
    def answer(self) -> str | None:
        """The final assistant answer, or None for a prompt-only row."""
        if self.turns and self.turns[-1].role == "assistant":
            return self.turns[-1].text
        return None
