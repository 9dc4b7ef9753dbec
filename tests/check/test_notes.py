"""The notes of ``mmemo check``: what is odd about clips that can be used, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from av.stream import Disposition

from mmemo.check.media import MediaCheck
from mmemo.check.notes import MEANINGS, MediaNote, length_notes, stream_notes
from mmemo.check.run import run_check
from mmemo.data.manifest import DataConfig
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.errors import MediaError
from mmemo.features.keys import Span
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.probe import AudioStream, MediaInfo, VideoStream
from tests.check.test_run import question, sft
from tests.media.sound_files import AudioTrack, write_channels, write_tracks
from tests.media_files import sine, write_clip

BOTH: tuple[Modality, ...] = ("video", "audio")


def rows(refs: Sequence[MediaRef], want: Sequence[Modality]) -> list[Sample]:
    turns = (Turn("user", "".join(f"<{m}>" for m in want)),)
    return [
        Sample(f"row {n}", turns, dict.fromkeys(want, ref), source=("rows.jsonl", n + 1))
        for n, ref in enumerate(refs)
    ]


def check(
    folder: Path, refs: Sequence[MediaRef], *want: Modality, probe: bool = True, **changes: Any
) -> MediaCheck:
    data = DataConfig(manifests=["rows.jsonl"], media_root=str(folder))
    limits = DecodeConfig(workers=1, max_bad_share=1.0)
    sampling = SamplingConfig(**changes)
    found = MediaCheck(data, rows(refs, want), limits, sampling=sampling)
    found.files(probe=probe)
    return found


def kinds(notes: Sequence[MediaNote]) -> set[tuple[str, str]]:
    return {(note.path, note.kind) for note in notes}


def test_sound_is_listened_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voice = np.random.default_rng(1).normal(0, 0.1, 16000)
    write_channels(tmp_path / "good.wav", [voice, voice], "stereo")
    write_channels(tmp_path / "opposite.wav", [voice, -voice], "stereo")
    write_channels(tmp_path / "silent.wav", [0 * voice], "mono")
    write_channels(tmp_path / "clipped.wav", [np.clip(50 * voice, -1, 1)], "mono")
    write_tracks(tmp_path / "two.mkv", [AudioTrack(300, "eng"), AudioTrack(500, "deu")])
    names = ["good.wav", "opposite.wav", "silent.wav", "clipped.wav", "two.mkv"]
    found = check(tmp_path, [MediaRef(name) for name in names], "audio")
    assert found.bad == []
    assert kinds(found.notes) == {
        ("opposite.wav", "opposite phase"),
        ("silent.wav", "silent"),
        ("clipped.wav", "clipped"),
        ("two.mkv", "several tracks"),
    }
    printed = capsys.readouterr().out
    assert "Notes on 5 clips" in printed
    assert re.search(r"opposite phase +1 +the channels cancel", printed)
    assert "several tracks: two.mkv: 2 audio tracks: 0 eng (read); 1 deu" in " ".join(
        printed.split()
    )


def test_streams_of_different_length(tmp_path: Path) -> None:
    """As in MELD, where a sound goes on for minutes after its picture."""
    write_clip(tmp_path / "good.mp4", seconds=2)
    join(tmp_path / "long.mp4", video=2, audio=20)
    join(tmp_path / "short.mp4", video=20, audio=2)
    refs = [MediaRef(f"{name}.mp4") for name in ("good", "long", "short")]
    spans = [MediaRef("long.mp4", 0, 1.5), MediaRef("long.mp4", 0, 5)]
    for probe in (True, False):
        found = check(tmp_path, [*refs, *spans], *BOTH, probe=probe).notes
        apart = [note for note in found if note.kind == "streams apart"]
        assert [(note.path, note.end) for note in apart] == [
            ("long.mp4", None),
            ("short.mp4", None),
            ("long.mp4", 5),
        ]
        assert apart[0].detail.startswith(
            "picture from 0.00 s to 2.00 s, sound from 0.00 s to 20.0"
        )
        assert apart[0].sample_ids == ("row 1",)


def join(path: Path, *, video: float, audio: float) -> None:
    """A clip whose picture and sound have lengths of their own."""
    import av

    from tests.media_files import drawn

    with av.open(str(path), "w") as container:
        picture: Any = container.add_stream("libx264", rate=12)
        picture.width = picture.height = 96
        picture.pix_fmt = "yuv420p"
        sound: Any = container.add_stream("aac", rate=16000, layout="mono")
        samples = (sine(audio, 16000, 220) * 32767).astype("<i2").reshape(1, -1)
        frame: Any = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(sound.encode(frame))
        for number in range(round(video * 12)):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(drawn(number % 256))))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))


def info(**changes: Any) -> MediaInfo:
    video = {"width": 96, "height": 96, "fps": 12.0, "frames": 24, "codec": "h264", "seconds": 2.0}
    audio = AudioStream(16000, 1, "aac", seconds=2.0)
    return MediaInfo("", 1, 2.0, VideoStream(**{**video, **changes}), audio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"sample_aspect": 16 / 15}, "pixel shape"),
        ({"interlaced": True, "field_order": "tt"}, "interlaced"),
        ({"mirrored": True, "rotation": 90}, "mirrored"),
        ({"rotation": 90}, None),
        ({"tracks": ("0", "1")}, "several tracks"),
        ({"seconds": 2.4}, None),
        ({"seconds": 2.6}, "streams apart"),
        ({"start": 0.6, "seconds": 1.4}, "streams apart"),
    ],
)
def test_notes_on_a_picture(changes: dict[str, Any], note: str | None) -> None:
    found = [kind for kind, _ in stream_notes(info(**changes), (0.0, 3.0), BOTH)]
    assert found == ([note] if note else [])
    heard = [kind for kind, _ in stream_notes(info(**changes), (0.0, 3.0), ["audio"])]
    # Who only listens is told where the streams differ, and nothing of the picture.
    assert heard == ([note] if note == "streams apart" else [])


def lengths(seconds: Sequence[float]) -> list[float]:
    spans = {Span(f"{n}.mp4"): value for n, value in enumerate(seconds)}
    return [spans[span] for span in length_notes(spans)]


def test_a_length_far_from_the_others() -> None:
    # Like MELD: utterances of 0.5 s to 12 s, and one of five minutes.
    usual = list(np.exp(np.random.default_rng(0).normal(1.0, 0.6, 500)))
    assert lengths([*usual, 305.0]) == [305.0]
    assert lengths(usual) == []
    # All of one length: the median absolute deviation is 0, and three times the median counts.
    assert lengths([2.0] * 30 + [5.9, 0.7, 6.1, 0.6]) == [6.1, 0.6]
    assert lengths([2.0] * 8 + [300.0]) == []  # too few to tell
    assert lengths([2.0] * 9 + [300.0]) == [300.0]


def test_lengths_are_those_of_the_spans(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", seconds=30, audio=False, size=(32, 32), fps=4)
    refs = [MediaRef("a.mp4", n, n + 1.5) for n in range(12)]
    found = check(tmp_path, [*refs, MediaRef("a.mp4")], "video").notes
    assert [(note.kind, note.start, note.end) for note in found] == [("length", None, None)]
    assert found[0].detail == "30.0 s long, and half of the clips are under 1.5 s"


def test_a_sound_that_cannot_be_decoded_is_a_bad_clip(tmp_path: Path) -> None:
    write_channels(tmp_path / "good.wav", [sine(1, 16000, 220)], "mono")
    path = tmp_path / "bad.mp4"
    write_clip(path, video=False, seconds=5)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))
    found = check(tmp_path, [MediaRef("bad.mp4"), MediaRef("good.wav")], "audio")
    assert [(clip.path, clip.kind) for clip in found.bad] == [("bad.mp4", "decode")]
    assert found.notes == []


def test_an_asked_track_that_is_missing_is_a_bad_clip(tmp_path: Path) -> None:
    write_tracks(tmp_path / "two.mkv", [AudioTrack(300), AudioTrack(500)])
    assert check(tmp_path, [MediaRef("two.mkv")], "audio", audio_track=1).bad == []
    with pytest.raises(MediaError, match=r"no audio track '2', only 0; 1; correct sampl"):
        check(tmp_path, [MediaRef("two.mkv")], "audio", audio_track=2)
    write_clip(tmp_path / "a.mp4", seconds=1.0)
    with pytest.raises(MediaError, match=r"no audio track 'fra'; correct sampling\.audio_track"):
        check(tmp_path, [MediaRef("a.mp4")], *BOTH, audio_track="fra")
    assert check(tmp_path, [MediaRef("a.mp4")], "video", audio_track="fra").bad == []


def test_the_note_is_on_the_track_that_is_heard(tmp_path: Path) -> None:
    commentary = AudioTrack(300, title="Commentary", marks=Disposition.comment)
    write_tracks(tmp_path / "two.mkv", [commentary, AudioTrack(0.0)])
    silent = ("two.mkv", "silent")
    assert silent in kinds(check(tmp_path, [MediaRef("two.mkv")], "audio").notes)
    other = check(tmp_path, [MediaRef("two.mkv")], "audio", audio_track=0)
    assert silent not in kinds(other.notes)


def test_only_the_first_of_many_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs: list[MediaRef] = []
    for number in range(5):
        write_channels(tmp_path / f"{number}.wav", [np.zeros(1600)], "mono")
        refs.append(MediaRef(f"{number}.wav"))
    check(tmp_path, refs, "audio")
    printed = capsys.readouterr().out
    assert printed.count("silent: ") == 4
    assert "silent: and 2 more" in printed


def test_notes_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    join(tmp_path / "a.mp4", video=1, audio=3)
    write_clip(tmp_path / "b.mp4", seconds=1.0)
    config = sft(tmp_path, tmp_path, [question("one", "a", "sad"), question("two", "b", "sad")])
    report = run_check(config, probe=True, notes=tmp_path / "notes.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["path"]) for line in lines] == [("streams apart", "a.mp4")]
    assert lines[0]["sample_ids"] == ["one"]
    assert [note.row() for note in report.notes] == lines


def test_each_kind_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/what-is-fed.md").read_text()
    for kind in MEANINGS:
        assert f"`{kind}`" in page
