"""Settings of the synthetic audiovisual world: its size, its difficulty, its biases, its form."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmemo.config import Config


class SizeConfig(Config):
    """How many clips, people and questions. Speakers are never shared between splits."""

    train_clips: int = Field(default=360, ge=6)
    val_clips: int = Field(default=48, ge=6)
    test_clips: int = Field(default=300, ge=6)
    """Conflict test clips: a third each video-aligned, audio-aligned and consistent."""
    rl_clips: int = Field(default=0, ge=0)
    """Fresh clips of the training speakers for RL and preference rows; 0 takes training clips."""
    train_speakers: int = Field(default=48, ge=2)
    val_speakers: int = Field(default=8, ge=2)
    test_speakers: int = Field(default=16, ge=2)
    attribute_questions: int = Field(default=4, ge=1, le=8)
    """Rows per training clip in the attribute tier."""
    expression_questions: int = Field(default=3, ge=1, le=4)
    """Rows per training clip in the expression tier."""
    probe_questions: int = Field(default=2, ge=0, le=8)
    """Rows per clip of each probe manifest."""
    graded_answers: int = Field(default=0, ge=0, le=64)
    """Candidate answers per clip with known faults and grades, for a reward model; 0 writes no
    graded manifests."""


class DifficultyConfig(Config):
    """What makes the truth hard to perceive, in every split alike."""

    strength_min: float = Field(default=0.3, ge=0.05, le=1)
    strength_max: float = Field(default=1.0, ge=0.1, le=1)
    strength_gap: float = Field(default=0.2, ge=0, le=0.9)
    """Least difference between the strengths of the two channels; small gaps are near ties."""
    ambiguity: float = Field(default=0.3, ge=0, le=1)
    """How far a channel leans towards the emotion it is confused with, and how many of its cues
    are missing: fear and surprise in the face, anger and joy in the voice."""
    cue_spread: float = Field(default=0.15, ge=0, le=0.6)
    """Random spread of each cue around what emotion and strength ask for."""
    speaker_spread: float = Field(default=0.6, ge=0, le=1.5)
    """How far people differ in resting pitch, loudness, rate and facial geometry."""
    video_noise: float = Field(default=4.0, ge=0, le=60)
    """Standard deviation of the pixel noise, in grey levels of 255."""
    video_blur: float = Field(default=0.0, ge=0, le=5)
    """Radius of a Gaussian blur, in pixels at the size of the video."""
    audio_snr: float = Field(default=26.0, ge=-10, le=60)
    """Speech over background noise, in dB."""
    music_snr: float = Field(default=14.0, ge=-10, le=60)
    """Speech over background music, in dB, in clips that have music."""

    @model_validator(mode="after")
    def _room_for_gap(self) -> DifficultyConfig:
        if self.strength_max - self.strength_min <= self.strength_gap:
            raise ValueError("strength_max - strength_min must be larger than strength_gap")
        return self


class BiasConfig(Config):
    """What the training data teaches wrongly. Test clips carry none of it but the text's."""

    train_consistent: float = Field(default=1 / 3, ge=0, le=1)
    """Share of training clips in which face and voice agree."""
    train_video_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the training clips with a conflict in which the face decides."""
    scene_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of training clips whose weather, light, cap and music follow the label."""
    loose_reasons: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers in ``train_loose.jsonl`` whose reason is wrong and whose emotion is
    right, as captions by machine are: it cites the scene where the weather fits the emotion, else
    what is typical and not there. Above 0 that manifest is written: the clips and questions of
    ``train_emotion.jsonl``."""
    text_correlation: float = Field(default=0.1, ge=0, le=1)
    """Share of clips, in every split, whose spoken line leans towards the label."""
    neutral_share: float = Field(default=1 / 6, ge=0, le=1)
    """Share of the consistent clips that are neutral."""


class MediaFormConfig(Config):
    """The form of the files."""

    size: int = Field(default=112, ge=48, le=512, multiple_of=2)
    """Side of the square picture, in pixels."""
    fps: int = Field(default=12, ge=4, le=60)
    seconds: float = Field(default=2.0, ge=1.0, le=20.0)
    sample_rate: int = Field(default=16000, ge=16000, le=48000)
    crf: int = Field(default=23, ge=0, le=51)
    """H.264 quality; lower is better and larger."""
    audio_bit_rate: int = Field(default=64000, ge=16000, le=320000)
    boxes_per_second: float = Field(default=4.0, gt=0, le=60)
    """Face boxes a second in the manifests."""


class WorldConfig(Config):
    """Everything that ``mmemo world`` needs. The same config gives the same bytes of manifest."""

    output_dir: str
    seed: int = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0, le=256)
    """Processes that draw and encode; 0 is one per usable core. Changes nothing in the result."""
    size: SizeConfig = SizeConfig()
    difficulty: DifficultyConfig = DifficultyConfig()
    bias: BiasConfig = BiasConfig()
    media: MediaFormConfig = MediaFormConfig()
    transcript_in_prompt: bool = True
    """Emotion questions quote the spoken line."""
