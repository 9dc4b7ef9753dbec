"""Config of the synthetic audiovisual world: size, difficulty, biases and media format."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmemo.config import Config


class SizeConfig(Config):
    """Numbers of clips, speakers and questions. Splits never share speakers."""

    train_clips: int = Field(default=360, ge=6)
    val_clips: int = Field(default=48, ge=6)
    test_clips: int = Field(default=300, ge=6)
    """Number of test clips: one third each video-aligned, audio-aligned and consistent."""
    rl_clips: int = Field(default=0, ge=0)
    """Number of additional clips of the training speakers for RL and preference rows. 0 uses the
    training clips."""
    train_speakers: int = Field(default=48, ge=2)
    val_speakers: int = Field(default=8, ge=2)
    test_speakers: int = Field(default=16, ge=2)
    attribute_questions: int = Field(default=4, ge=1, le=8)
    """Number of rows per training clip in the attribute tier."""
    expression_questions: int = Field(default=3, ge=1, le=4)
    """Number of rows per training clip in the expression tier."""
    probe_questions: int = Field(default=2, ge=0, le=8)
    """Number of rows per clip in each probe manifest."""
    graded_answers: int = Field(default=0, ge=0, le=64)
    """Number of candidate answers per clip with known faults and grades, for training a reward
    model. 0 writes no graded manifests."""
    graded_contrasts: int = Field(default=0, ge=0, le=64)
    """Number of further graded rows per clip in which the facts decide the grade, not the text: the
    same reasoning beside another clip's facts, beside facts without its cues or with another
    emotion, and one answer repeated over the clips. Needs ``graded_answers``."""


class DifficultyConfig(Config):
    """How hard the truth is to perceive; the same in every split."""

    strength_min: float = Field(default=0.3, ge=0.05, le=1)
    """Minimum strength with which a channel expresses its emotion."""
    strength_max: float = Field(default=1.0, ge=0.1, le=1)
    """Maximum strength with which a channel expresses its emotion."""
    strength_gap: float = Field(default=0.2, ge=0, le=0.9)
    """Minimum difference between the strengths of the two channels; small gaps are near ties."""
    ambiguity: float = Field(default=0.3, ge=0, le=1)
    """How far a channel leans towards the emotion with which it is confused (fear and surprise in
    the face, anger and joy in the voice), and how many of its cues are missing."""
    cue_spread: float = Field(default=0.15, ge=0, le=0.6)
    """Random spread of each cue around the value that emotion and strength prescribe."""
    speaker_spread: float = Field(default=0.6, ge=0, le=1.5)
    """How much speakers differ in resting pitch, loudness, rate and facial geometry."""
    video_noise: float = Field(default=4.0, ge=0, le=60)
    """Standard deviation of the pixel noise, in grey levels of 255."""
    video_blur: float = Field(default=0.0, ge=0, le=5)
    """Standard deviation of a Gaussian blur, in pixels of the video."""
    audio_snr: float = Field(default=26.0, ge=-10, le=60)
    """Signal-to-noise ratio of speech to background noise, in dB."""
    music_snr: float = Field(default=14.0, ge=-10, le=60)
    """Ratio of speech to background music in clips that have music, in dB."""

    @model_validator(mode="after")
    def _room_for_gap(self) -> DifficultyConfig:
        if self.strength_max - self.strength_min <= self.strength_gap:
            raise ValueError("strength_max - strength_min must be larger than strength_gap")
        return self


class BiasConfig(Config):
    """Spurious correlations of the training data. Test clips have none of them but the text's."""

    train_consistent: float = Field(default=1 / 3, ge=0, le=1)
    """Share of training clips in which face and voice express the same emotion."""
    train_video_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the conflicting training clips in which the face decides the label."""
    scene_correlation: float = Field(default=0.0, ge=0, le=1)
    """Share of training clips whose weather, light, cap and music are determined by the label."""
    loose_reasons: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers in ``train_loose.jsonl`` that give the right emotion for a wrong reason,
    as machine captions do: they cite the scene where the weather fits the emotion, else a typical
    cue that is absent. That manifest, with the clips and questions of ``train_emotion.jsonl``, is
    written if the share is above 0."""
    text_correlation: float = Field(default=0.1, ge=0, le=1)
    """Share of clips, in every split, whose spoken line suggests the label."""
    neutral_share: float = Field(default=1 / 6, ge=0, le=1)
    """Share of the consistent clips that are neutral."""


class MediaFormConfig(Config):
    """Format of the clips."""

    size: int = Field(default=112, ge=48, le=512, multiple_of=2)
    """Width and height of the video, in pixels."""
    fps: int = Field(default=12, ge=4, le=60)
    """Frames per second."""
    seconds: float = Field(default=2.0, ge=1.0, le=20.0)
    """Duration of a clip in seconds."""
    sample_rate: int = Field(default=16000, ge=16000, le=48000)
    """Sample rate of the audio, in Hz."""
    crf: int = Field(default=23, ge=0, le=51)
    """H.264 constant rate factor; lower values give better quality and larger files."""
    audio_bit_rate: int = Field(default=64000, ge=16000, le=320000)
    """Bit rate of the AAC audio, in bits per second."""
    boxes_per_second: float = Field(default=4.0, gt=0, le=60)
    """Number of face boxes per second in the manifests."""


class WorldConfig(Config):
    """Config of ``mmemo world``. The same config gives byte-identical manifests."""

    output_dir: str
    """Folder of the data set."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn at random."""
    workers: int = Field(default=0, ge=0, le=256)
    """Number of processes that render clips; 0 starts one per usable core. The number does not
    change the result."""
    size: SizeConfig = SizeConfig()
    difficulty: DifficultyConfig = DifficultyConfig()
    bias: BiasConfig = BiasConfig()
    media: MediaFormConfig = MediaFormConfig()
    transcript_in_prompt: bool = True
    """Quote the spoken line in emotion questions."""
