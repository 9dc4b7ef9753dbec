"""Which of several tracks is read, and that all readers of a file read the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from mmemo.config import dump, parse
from mmemo.errors import ConfigError, MediaError
from mmemo.features.keys import sampling_part
from mmemo.media.config import SamplingConfig
from mmemo.media.decode import decode, decode_guarded
from mmemo.media.probe import probe
from tests.media.sound_files import AudioTrack, job, tone_of, write_tracks, write_videos
from tests.media_files import frame_number, write_clip

NONE = Disposition(0)
DEFAULT = Disposition.default
COMMENT = Disposition.comment
DESCRIBED = Disposition.visual_impaired
MAIN, OTHER = 440.0, 1000.0


def tone(path: Path, **sampling: Any) -> int:
    clip = decode(job(path, "audio", **sampling))
    assert clip.waveform is not None
    return tone_of(clip.waveform)


@pytest.mark.parametrize(
    "tracks",
    [
        [AudioTrack(MAIN), AudioTrack(OTHER)],
        [AudioTrack(OTHER), AudioTrack(MAIN, marks=DEFAULT)],
        [AudioTrack(MAIN, marks=DEFAULT), AudioTrack(OTHER, marks=DEFAULT)],
        [AudioTrack(OTHER, marks=COMMENT), AudioTrack(MAIN)],
        [AudioTrack(OTHER, marks=DESCRIBED), AudioTrack(MAIN)],
        [AudioTrack(OTHER, marks=Disposition.hearing_impaired), AudioTrack(MAIN)],
        # Some muxers mark the first track as the default, whatever it is.
        [AudioTrack(OTHER, marks=COMMENT | DEFAULT), AudioTrack(MAIN)],
        [AudioTrack(OTHER, "eng", "Director's Commentary"), AudioTrack(MAIN, "eng")],
        [AudioTrack(OTHER, "eng", "Audio Description"), AudioTrack(MAIN, "eng", "Stereo")],
        [AudioTrack(OTHER, "zho", "导演评论音轨"), AudioTrack(MAIN, "zho")],
        [AudioTrack(OTHER, "ger", "Audiodeskription"), AudioTrack(MAIN, "ger")],
        [AudioTrack(OTHER, "fre", "Commentaire"), AudioTrack(MAIN, "fre")],
        [AudioTrack(OTHER, "qad"), AudioTrack(MAIN, "fre")],
        # The ffmpeg program marks the first track as the default by itself.
        [AudioTrack(OTHER, title="Comments", marks=DEFAULT), AudioTrack(MAIN, title="Stereo")],
        [AudioTrack(OTHER, "qad", marks=DEFAULT), AudioTrack(MAIN, "eng")],
        [AudioTrack(OTHER), AudioTrack(OTHER, title="Comments"), AudioTrack(MAIN, marks=DEFAULT)],
        [AudioTrack(MAIN, title="Commentary"), AudioTrack(OTHER, title="Commentary 2")],
    ],
)
def test_the_track_that_is_read(tracks: list[AudioTrack], tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mkv", tracks)
    assert tone(path) == MAIN
    sound = probe(path).audio
    assert sound is not None
    assert sum("(read)" in track for track in sound.tracks) == 1


def test_a_track_is_chosen_by_number_and_by_language(tmp_path: Path) -> None:
    tracks = [
        AudioTrack(300, "eng", marks=DEFAULT),
        AudioTrack(500, "ger", "Kommentar"),
        AudioTrack(700, "ger"),
    ]
    path = write_tracks(tmp_path / "a.mkv", tracks)
    assert tone(path) == 300
    assert tone(path, audio_track=1) == 500
    for language in ("ger", "deu", "de", "DE-at"):
        assert tone(path, audio_track=language) == 700
    assert tone(path, audio_track="en") == 300


@pytest.mark.parametrize("asked", [2, "fra"])
def test_an_asked_track_that_is_missing_is_named(asked: int | str, tmp_path: Path) -> None:
    path = write_tracks(tmp_path / "a.mkv", [AudioTrack(300, "eng", "Boom"), AudioTrack(500)])
    says = rf"no audio track '{asked}', only 0 eng 'Boom'; 1; correct sampling\.audio_track"
    with pytest.raises(MediaError, match=says) as caught:
        tone(path, audio_track=asked)
    assert caught.value.kind == "no_audio"  # so that rows which use only the picture are kept
    clip = write_clip(tmp_path / "b.mp4")
    assert decode(job(clip, "video", audio_track=asked)).frames is not None
    with pytest.raises(MediaError, match=r"no video track '3', only 0 .*sampling\.video_track"):
        decode(job(clip, "video", video_track=3))


def test_spans_of_two_choices_do_not_share_a_scan(tmp_path: Path) -> None:
    """The packets of the last files are remembered by what was asked of them."""
    path = write_tracks(tmp_path / "a.mkv", [AudioTrack(300), AudioTrack(500)], seconds=1.0)
    assert [tone(path, audio_track=n) for n in (0, 1, 0)] == [300, 500, 300]


@pytest.mark.parametrize("read", [decode, decode_guarded])
@pytest.mark.parametrize(
    ("marks", "first"), [([NONE, NONE], 20), ([NONE, DEFAULT], 60), ([COMMENT, NONE], 60)]
)
def test_decord_and_pyav_read_the_same_of_two_videos(
    read: Any, marks: list[Disposition], first: int, tmp_path: Path
) -> None:
    """Both tracks have the same times and the same last frame, so only the choice differs."""
    path = write_videos(tmp_path / "a.mkv", [20, 60], marks)
    one = job(path, "video", backend="auto", frames=4)
    for chosen, start in ((None, first), (0, 20), (1, 60)):
        sampling = one.sampling.model_copy(update={"video_track": chosen})
        clip = read(replace(one, sampling=sampling))
        numbers = [frame_number(frame) for frame in clip.frames]
        assert numbers == [start + 1, start + 4, start + 7, start + 10]


@pytest.mark.parametrize("read", [decode, decode_guarded])
def test_a_cover_is_never_the_video(read: Any, tmp_path: Path) -> None:
    marks = [Disposition.attached_pic, NONE]
    path = write_videos(tmp_path / "a.mp4", [20, 60], marks)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    clip = read(job(path, "video", backend="auto", frames=2, video_track=0))
    assert frame_number(clip.frames[0]) == 63
    video = probe(path).video
    assert video is not None
    assert len(video.tracks) == 1


def test_only_a_chosen_track_changes_a_key() -> None:
    plain = SamplingConfig()
    assert "track" not in sampling_part("audio", plain) + sampling_part("video", plain)
    other = SamplingConfig(audio_track=1)
    assert sampling_part("audio", other) != sampling_part("audio", plain)
    assert sampling_part("video", other) == sampling_part("video", plain)
    other = SamplingConfig(video_track="eng")
    assert sampling_part("audio", other) == sampling_part("audio", plain)
    crops = {"face": {"detector": "none"}}
    faces = [SamplingConfig.model_validate({**crops, "video_track": v}) for v in (None, 0)]
    assert sampling_part("face", faces[0]) != sampling_part("face", faces[1])


def test_identities_from_before_a_track_could_be_chosen_hold() -> None:
    assert set(dump(SamplingConfig())) == {"frames", "max_side", "sample_rate", "face"}
    assert dump(SamplingConfig(audio_track=0))["audio_track"] == 0
    assert parse(SamplingConfig, dump(SamplingConfig(video_track="deu"))).video_track == "deu"


@pytest.mark.parametrize("value", [-1, "english", "", 1.5])
def test_a_track_is_a_number_or_a_code(value: Any) -> None:
    with pytest.raises(ConfigError, match="audio_track"):
        parse(SamplingConfig, {"audio_track": value})


def test_the_sound_of_a_chosen_track_is_its_own_length(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=2.0)
    info = probe(path)
    assert info.audio is not None
    assert np.isclose(info.audio.seconds, 2.0, atol=0.05)
