"""What is decoded is what the ffmpeg program shows: frame by frame and tone by tone.

Each clip is made with the program from the same 36 numbered frames (12 a second) and the same six
tones (half a second each), and read back by it. A clip passes if mmemo does not refuse it, if every
frame is the one that the program shows at that time, in the same shape, if the frames are spread
evenly over the picture, and if every tone is heard where the program hears it.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray

from mmemo.data.sample import FaceBox
from mmemo.errors import MediaError
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig, FaceConfig, SamplingConfig
from mmemo.media.decode import decode, decode_guarded, read_pyav
from mmemo.media.probe import open_media, probe
from mmemo.media.scan import scan_packets
from mmemo.media.tracks import video_stream
from tests.media_files import drawn, frame_number, sine

FPS, COUNT, STEP, RATE = 12, 36, 0.5, 16000
TONES = (300, 500, 700, 900, 1100, 1300)
FRAMES = 8


def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-800:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the raw frames, the raw sound, and an mp4 of them to copy from."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "v.rgb").write_bytes(b"".join(drawn(i).tobytes() for i in range(COUNT)))
    # The tones rise and fall, so that the steps are no clicks.
    fade = np.minimum(1, np.minimum(np.arange(24000), np.arange(24000)[::-1]) / 480)
    tones = [sine(STEP, 48000, tone) * fade for tone in TONES]
    (folder / "a.f32").write_bytes(np.concatenate(tones).astype("<f4").tobytes())
    run(*VIDEO(folder), *AUDIO(folder), *H264, *AAC, folder / "src.mp4")
    return folder


def VIDEO(folder: Path) -> list[object]:
    return ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x96", "-r", FPS, "-i", folder / "v.rgb"]


def AUDIO(folder: Path) -> list[object]:
    return ["-f", "f32le", "-ar", "48000", "-ac", "1", "-i", folder / "a.f32"]


def words(text: str) -> list[str]:
    return text.split()


H264 = words("-c:v libx264 -preset ultrafast -crf 10 -pix_fmt yuv420p -g 12 -bf 2 -threads 1")
AAC, MP3, MP2, OPUS, PCM = (
    words(f"-c:a {codec}") for codec in ("aac", "libmp3lame", "mp2", "libopus", "pcm_s16le")
)
MPEG2 = words("-c:v mpeg2video -q:v 2 -r 24 -pix_fmt yuv420p -threads 1")
MPEG4 = words("-c:v mpeg4 -q:v 2 -g 12 -threads 1")
VP8 = words("-c:v libvpx -b:v 3M -g 12 -deadline realtime -cpu-used 8 -threads 1")
VP9 = words("-c:v libvpx-vp9 -b:v 3M -g 12 -deadline realtime -cpu-used 8 -threads 1")
HEVC = words("-c:v libx265 -preset ultrafast -crf 10 -pix_fmt yuv420p")
HEVC += ["-x265-params", "log-level=none:pools=1:bframes=2:keyint=12"]
WMV = words("-c:v wmv2 -q:v 2 -c:a wmav2")


@dataclass(frozen=True)
class Truth:
    """What the program shows. ``times``: seconds from the file's start."""

    times: NDArray[np.float64]
    numbers: list[int]
    frames: NDArray[np.uint8]
    wave: NDArray[np.float32]
    heard: float  # seconds from the file's start to the first sample


SQUARE = r"scale=trunc(iw*max(1\,sar)+0.5):trunc(ih*max(1\,1/sar)+0.5)"


def truth(path: Path, picture: bool = True, sound: bool = True, fields: bool = False) -> Truth:
    """Read a clip with the program: its frames with square pixels, and its sound."""
    video, audio = path.with_suffix(".rgb"), path.with_suffix(".f32")
    seen, heard = path.with_suffix(".v"), path.with_suffix(".a")  # lists of time stamps
    outputs: list[object] = []
    if picture:
        chain = ("bwdif=mode=send_frame," if fields else "") + SQUARE
        shown = ["-map", "0:v:0", "-fps_mode", "passthrough", "-enc_time_base", "filter"]
        shown += ["-vf", chain, "-pix_fmt", "rgb24", "-c:v", "rawvideo"]
        outputs += [*shown, "-f", "rawvideo", video, *shown, "-f", "framecrc", seen]
    if sound:
        outputs += ["-map", "0:a:0", "-ac", 1, "-ar", RATE, "-f", "f32le", audio]
        outputs += ["-map", "0:a:0", "-c:a", "pcm_s16le", "-f", "framecrc", heard]
    said = run("-copyts", "-i", path, *outputs).stderr.decode(errors="replace")
    found = re.search(r"Duration: .*?, start: (-?[\d.]+)", said)
    origin = float(found[1]) if found else 0.0
    frames, times = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
    if picture:
        size = re.search(r"#dimensions 0: (\d+)x(\d+)", seen.read_text())
        assert size is not None
        frames = np.fromfile(video, np.uint8).reshape(-1, int(size[2]), int(size[1]), 3)
        times = stamps(seen)
        assert len(times) == len(frames)
    return Truth(
        times - origin,
        [frame_number(frame) for frame in frames],
        frames,
        np.fromfile(audio, "<f4") if sound else np.zeros(0, np.float32),
        float(stamps(heard)[0]) - origin if sound else 0.0,
    )


def stamps(listed: Path) -> NDArray[np.float64]:
    """Seconds on the file's own clock, from the program's list of frames."""
    text = listed.read_text()
    base = re.search(r"#tb 0: (\d+)/(\d+)", text)
    assert base is not None
    times = re.findall(r"^0, *-?\d+, *(-?\d+)", text, re.MULTILINE)
    return np.array([int(time) for time in times]) * int(base[1]) / int(base[2])


def read(path: Path, *want: Any, guarded: bool = True, **fields: Any) -> DecodedClip:
    limits = DecodeConfig(max_seconds=fields.pop("max_seconds", 600))
    sampling = SamplingConfig(frames=FRAMES, sample_rate=RATE)
    job = DecodeJob(path, path.name, frozenset(want), sampling, limits, **fields)
    return (decode_guarded if guarded else decode)(job)


def tone(wave: NDArray[np.float32], start: float) -> float:
    """The loudest frequency in the fifth of a second from ``start``, 0 where it is silent."""
    part = wave[max(0, round(start * RATE)) : max(0, round((start + 0.2) * RATE))]
    if len(part) < 0.15 * RATE or np.sqrt(np.mean(part**2)) < 0.05:
        return 0.0
    part = part[: round(0.15 * RATE)]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return float(np.fft.rfftfreq(len(part), 1 / RATE)[spectrum.argmax()])


def check_frames(clip: DecodedClip, true: Truth, even: bool = True) -> None:
    assert clip.frames is not None
    assert clip.times is not None
    assert clip.frames.shape[1:] == true.frames.shape[1:]
    shown = [frame_number(frame) for frame in clip.frames]
    for number, time in zip(shown, clip.times, strict=True):
        place = int(np.searchsorted(true.times, time + 4e-3, "right")) - 1
        assert place >= 0
        assert number == true.numbers[place], (shown, clip.times, true)
    # In the right colours and with the right side up, for one frame of them.
    place = true.numbers.index(shown[3])
    assert np.abs(clip.frames[3].astype(int) - true.frames[place]).mean() < 4
    if even:
        times = true.times
        end = times[-1] + (times[-1] - times[0]) / max(len(times) - 1, 1)
        # A first frame that comes a little late is held until then.
        begin = 0 if times[0] <= end / 4 else times[0]
        centres = begin + (np.arange(FRAMES) + 0.5) * (end - begin) / FRAMES
        wanted = np.clip(np.searchsorted(times, centres + 1e-6, "right") - 1, 0, None)
        got = np.searchsorted(times, clip.times + 4e-3, "right") - 1
        assert np.abs(got - wanted).max() <= 1, (got, wanted)


def check_sound(clip: DecodedClip, true: Truth) -> None:
    assert clip.waveform is not None
    missing = true.heard + len(true.wave) / RATE - len(clip.waveform) / RATE
    assert missing < 0.06, f"{missing:.2f} s of the sound are gone"
    count = min(len(TONES), round(len(true.wave) / RATE / STEP))
    assert count
    for step in range(count):
        at = true.heard + step * STEP + 0.15
        ours, theirs = tone(clip.waveform, at), tone(true.wave, at - true.heard)
        assert abs(ours - theirs) < 15, (step, ours, theirs)


def compare(path: Path, *, even: bool = True, order: bool = False, fields: bool = False) -> None:
    """``order``: the container has no time stamps, so only the order and the rate count."""
    true = truth(path, fields=fields)
    if order:
        true = Truth(np.arange(len(true.numbers)) / FPS, *list(vars(true).values())[1:])
    clip = read(path, "video", "audio")
    check_frames(clip, true, even)
    check_sound(clip, true)


# ------------------------------------------------------------------ containers and codecs

FILES: Mapping[str, list[str]] = {
    "h264 aac.mp4": [*H264, *AAC],
    "h264 pcm.mov": [*H264, *PCM],
    "h264 flac.mkv": [*H264, "-c:a", "flac"],
    "h264 without B frames.mp4": [*H264, "-bf", "0", *AAC],
    "open groups.mkv": [*H264, "-x264-params", "open-gop=1:bframes=3", *AAC],
    "long group.mp4": [*H264, "-g", "250", "-bf", "3", *AAC],
    "h264 mp3.flv": [*H264, *MP3, "-ar", "44100"],
    "sorenson.flv": [*words("-c:v flv -q:v 2"), *MP3, "-ar", "44100"],
    "h264 aac.ts": [*H264, *AAC],
    "mpeg2 mp2.ts": [*MPEG2, *MP2],
    "mpeg2 mp2.mpg": [*MPEG2, *MP2],
    "mpeg2 with B frames.mpg": [*MPEG2, "-bf", "2", *MP2],
    "h264 mp2.mpg": [*H264, *MP2, "-f", "mpeg"],  # several frames in one PES packet
    "mpeg1 mp2.mpg": [*words("-c:v mpeg1video -q:v 2 -r 24"), *MP2],
    "disc.vob": [*MPEG2, *words("-c:a ac3 -f vob")],
    "hevc aac.mp4": [*HEVC, *AAC],
    "hevc opus.mkv": [*HEVC, *OPUS],
    "vp8 vorbis.webm": [*VP8, *words("-c:a libvorbis")],
    "vp9 opus.webm": [*VP9, *OPUS],
    "av1 opus.mp4": [*words("-c:v libsvtav1 -preset 12 -crf 20 -svtav1-params lp=1"), *OPUS],
    "theora vorbis.ogv": words("-c:v libtheora -q:v 9 -g 12 -c:a libvorbis"),
    "wmv.wmv": WMV,
    "msmpeg4.asf": words("-c:v msmpeg4 -q:v 2 -c:a wmav2"),
    "mpeg4 aac.mp4": [*MPEG4, "-bf", "2", *AAC],
    "mpeg4 aac.3gp": [*MPEG4, *AAC],
    "mjpeg pcm.mov": [*words("-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"), *PCM],
    "prores.mov": [*words("-c:v prores_ks -profile:v 0"), *PCM],
    "ffv1.mkv": [*words("-c:v ffv1 -threads 1"), *PCM],
    "nut.nut": [*H264, *AAC],
    "mxf.mxf": [*MPEG2, *PCM],
    "one a second.mkv": [*words("-vf setpts=12*PTS -r 1"), *H264, *AAC],
    # pixels
    "ten bits.mkv": [*H264, *words("-pix_fmt yuv422p10le"), *AAC],
    "4-4-4.mp4": [*H264, *words("-pix_fmt yuv444p"), *AAC],
    "grey.mp4": [*H264, *words("-pix_fmt gray"), *AAC],
    "alpha.webm": [*VP9, *words("-pix_fmt yuva420p"), *OPUS],
    "alpha.mov": [*words("-c:v png -pix_fmt rgba"), *PCM],
    "odd size.mkv": [*words("-vf scale=97:95 -c:v ffv1 -pix_fmt yuv444p"), *PCM],
    # clocks
    "from 100 s.mkv": [*H264, *AAC, *words("-output_ts_offset 100")],
    "from 700 s.webm": [*VP8, *OPUS, *words("-output_ts_offset 700")],
    "from 700 s.ts": [*H264, *AAC, *words("-output_ts_offset 700")],
    "from 100 s.mp4": [*H264, *AAC, *words("-output_ts_offset 100")],
    "from 100 s.flv": [*H264, *AAC, *words("-ar 44100 -output_ts_offset 100")],
    "from 100 s.wmv": [*WMV, *words("-output_ts_offset 100")],
    "clock wraps.ts": [*H264, *AAC, *words("-output_ts_offset 95442")],
    "variable rate.mp4": [
        *words("-vf select=not(eq(mod(n\\,5)\\,3))*not(between(n\\,10\\,14)) -fps_mode vfr"),
        *(*H264, *AAC),
    ],
    "variable rate.mkv": [
        *words("-vf select=not(eq(mod(n\\,7)\\,2)) -fps_mode vfr"),
        *(*H264, *AAC),
    ],
    # pixels that are not square
    "wide pixels.mp4": [*words("-vf setsar=4/3"), *H264, *AAC],
    "wide pixels.mov": [*words("-vf setsar=16/15"), *H264, *PCM],
    "wide pixels.mkv": [*words("-vf setsar=64/45"), *H264, *AAC],
    "wide pixels.ts": [*words("-vf setsar=2/1"), *H264, *AAC],
    "tall pixels.mp4": [*words("-vf setsar=2/3"), *H264, *AAC],
    "wide pixels.mpg": ["-aspect", "16:9", *MPEG2, *MP2],
    "wide pixels.webm": [*words("-vf setsar=4/3"), *VP8, *OPUS],
    "wide pixels.wmv": [*words("-vf setsar=4/3"), *WMV],
}

AVI: Mapping[str, list[str]] = {
    "h264 with B frames.avi": [*H264, *MP3],
    "h264 without B frames.avi": [*H264, "-bf", "0", *MP3],
    "mpeg4.avi": [*MPEG4, *MP3],
    "mpeg4 with B frames.avi": [*MPEG4, "-bf", "2", *PCM],
    "mjpeg.avi": [*words("-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"), *PCM],
    "wide pixels.avi": [*words("-vf setsar=4/3"), *H264, *MP3],
}

PIPED: Mapping[str, tuple[str, list[str]]] = {
    "piped.mkv": ("matroska", [*H264, *AAC]),
    "piped mjpeg pcm.mkv": ("matroska", [*words("-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"), *PCM]),
    "piped.webm": ("webm", [*VP8, *OPUS]),
    "piped.flv": ("flv", [*H264, *AAC, "-ar", "44100"]),
    "piped.ts": ("mpegts", [*H264, *AAC]),
    "piped.mpg": ("mpeg", [*MPEG2, *MP2]),
    "piped.wmv": ("asf", WMV),
    "piped.avi": ("avi", [*MPEG4, *MP3]),
    "fragments.mp4": ("mp4", [*H264, *AAC, *words("-movflags frag_keyframe+empty_moov")]),
    "small fragments.mp4": (
        "mp4",
        [*H264, *AAC, *words("-movflags empty_moov+default_base_moof -frag_duration 400000")],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_containers_codecs_pixels_and_clocks(tmp_path: Path, source: Path, name: str) -> None:
    path = tmp_path / name
    run(*VIDEO(source), *AUDIO(source), *FILES[name], path)
    compare(path)


@pytest.mark.parametrize("name", AVI)
def test_avi_counts_frames(tmp_path: Path, source: Path, name: str) -> None:
    path = tmp_path / name
    run(*VIDEO(source), *AUDIO(source), *AVI[name], path)
    compare(path, order=True)


@pytest.mark.parametrize("name", PIPED)
def test_what_was_written_into_a_pipe(tmp_path: Path, source: Path, name: str) -> None:
    """The writer could not go back to fill in how long it became."""
    form, arguments = PIPED[name]
    path = tmp_path / name
    done = run(*VIDEO(source), *AUDIO(source), *arguments, "-f", form, "-")
    path.write_bytes(done.stdout)
    compare(path, order=form == "avi")


# ------------------------------------------------------------------ sound alone

VBR = words("-c:a libmp3lame -q:a 4")
SOUNDS: Mapping[str, list[str]] = {
    "a.wav": PCM,
    "rf64.wav": [*PCM, *words("-rf64 always")],
    "a.w64": PCM,
    "a.aiff": words("-c:a pcm_s16be"),
    "a.au": words("-c:a pcm_s16be"),
    "a.caf": words("-c:a pcm_s16be"),
    "a.flac": [],
    "a.ogg": words("-c:a libvorbis"),
    "a.opus": OPUS,
    "a.m4a": AAC,
    "a.mka": OPUS,
    "cbr.mp3": words("-c:a libmp3lame -b:a 64k"),
    "vbr.mp3": VBR,
    "vbr without header.mp3": [*VBR, *words("-write_xing 0 -id3v2_version 0")],
    "a.aac": words("-c:a aac -b:a 32k"),
    "vbr.aac": words("-c:a aac -q:a 2"),
    "a.amr": words("-c:a libopencore_amrnb -ar 8000"),
    "a.wma": words("-c:a wmav2"),
    "low rate.ts": [*words("-c:a aac -b:a 24k -ar 24000")],
    "alone.avi": MP3,
    "a.ac3": [],
    "a.eac3": [],
    "a.wv": [],
    "a.tta": [],
}
PIPED_SOUNDS = ("a.wav", "rf64.wav", "a.au", "a.caf", "a.flac", "a.ogg", "a.wma", "vbr.mp3")
MUXERS = {".wav": "wav", ".au": "au", ".caf": "caf", ".flac": "flac", ".ogg": "ogg"}
MUXERS |= {".wma": "asf", ".mp3": "mp3"}


@pytest.mark.parametrize("name", SOUNDS)
def test_sound_alone(tmp_path: Path, source: Path, name: str) -> None:
    path = tmp_path / name
    noise = "[0]lowpass=f=4000[a];anoisesrc=d=1:r=48000:a=0.9[b];[a][b]concat=v=0:a=1"
    # A second of noise at the end misleads who guesses the length from the bit rate.
    run(*AUDIO(source), "-filter_complex", noise, "-ac", 1, *SOUNDS[name], path)
    check_sound(read(path, "audio"), truth(path, picture=False))


@pytest.mark.parametrize("name", PIPED_SOUNDS)
def test_sound_that_was_written_into_a_pipe(tmp_path: Path, source: Path, name: str) -> None:
    path, plain = tmp_path / name, tmp_path / "plain.wav"
    run(*AUDIO(source), plain)
    form = MUXERS[path.suffix]
    path.write_bytes(run("-i", plain, *SOUNDS[name], "-f", form, "-").stdout)
    # The program itself reads nothing of an RF64 whose length was left at 0.
    check_sound(read(path, "audio"), truth(plain if "rf64" in name else path, picture=False))


@pytest.mark.parametrize("size", [0, 2**32 - 1, 2**31, 0x7FFFF000])
def test_a_wav_whose_length_was_left_open(tmp_path: Path, source: Path, size: int) -> None:
    path = tmp_path / "a.wav"
    run(*AUDIO(source), *PCM, path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"data") + 4, size)
    path.write_bytes(bytes(data))
    assert probe(path).duration == pytest.approx(3.0)
    check_sound(read(path, "audio"), truth(path, picture=False))


# ------------------------------------------------------------------ orientation and fields

MATRICES: Mapping[str, tuple[int, int, int, int]] = {
    "plain": (1, 0, 0, 1),
    "turned by 90": (0, 1, -1, 0),
    "turned by 180": (-1, 0, 0, -1),
    "turned by 270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down in a mirror": (1, 0, 0, -1),
    "mirrored and turned by 270": (0, 1, 1, 0),
    "mirrored and turned by 90": (0, -1, -1, 0),
}


def set_matrix(path: Path, matrix: Sequence[int]) -> None:
    """Write the display matrix of an mp4's first track."""
    a, b, c, d = (value << 16 for value in matrix)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("sar", ["1", "3/2"])
@pytest.mark.parametrize("name", MATRICES)
def test_orientation(tmp_path: Path, source: Path, name: str, sar: str) -> None:
    path = tmp_path / "a.mp4"
    picture = ["-vf", f"scale=128:96,setsar={sar}", "-frames:v", 12]
    run(*VIDEO(source), *picture, *H264, path)
    set_matrix(path, MATRICES[name])
    true = truth(path, sound=False)
    for guarded in (False, True):
        clip = read(path, "video", guarded=guarded)
        assert clip.frames is not None
        assert clip.times is not None
        assert clip.frames.shape[1:] == true.frames.shape[1:]
        for frame, time in zip(clip.frames, clip.times, strict=True):
            place = int(np.searchsorted(true.times, time + 4e-3, "right")) - 1
            assert np.abs(frame.astype(int) - true.frames[place]).mean() < 3
    info = probe(path).video
    assert info is not None
    height, width = true.frames.shape[1:3]
    assert (info.display_width, info.display_height) == (width, height)
    assert info.mirrored == ("mirror" in name)
    assert info.sample_aspect == (1.5 if sar == "3/2" else 1)


FIELDS: Mapping[str, list[str]] = {
    "tff.mpg": words("-c:v mpeg2video -q:v 2 -flags +ilme+ildct"),
    "bff.mpg": words("-c:v mpeg2video -q:v 2 -flags +ilme+ildct"),
    "tff.mp4": [*H264, *words("-flags +ilme+ildct -x264-params interlaced=1:tff=1")],
    "tff.mkv": [*words("-c:v mpeg2video -bf 2 -q:v 2 -flags +ilme+ildct")],
    "bff.mov": words("-c:v prores_ks -profile:v 0 -flags +ilme+ildct"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_merged_as_the_filter_does(tmp_path: Path, name: str) -> None:
    """A bar moves on from field to field; woven, its edges are combs."""
    lines = np.zeros((36, 96, 96, 3), np.uint8) + 30
    for number in range(36):
        for field in (0, 1):
            at = 2 * number + (field if name.startswith("tff") else 1 - field)
            lines[number, field::2, at : at + 24] = 220
    (tmp_path / "i.rgb").write_bytes(lines.tobytes())
    path = tmp_path / name
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x96", "-r", 24, "-i"]
    order = ["-vf", f"setfield={path.stem}"]
    pixels = "yuv422p10le" if path.suffix == ".mov" else "yuv420p"
    run(*given, tmp_path / "i.rgb", *order, *FIELDS[name], "-pix_fmt", pixels, path)
    true, woven = truth(path, sound=False, fields=True), truth(path, sound=False)
    clip = read(path, "video")
    assert clip.frames is not None
    assert clip.times is not None
    for frame, time in zip(clip.frames, clip.times, strict=True):
        place = int(np.searchsorted(true.times, time + 4e-3, "right")) - 1
        # Without its neighbours, a frame differs by ten times as much.
        assert np.abs(frame.astype(int) - true.frames[place]).mean() < 3e-4
        assert np.abs(frame.astype(int) - woven.frames[place]).mean() > 1
    info = probe(path).video
    assert info is not None
    assert info.interlaced


def test_a_packet_for_each_field(tmp_path: Path, source: Path) -> None:
    """The decoder makes one frame of two packets, whose time is that of the first field."""
    path = tmp_path / "a.mpg"
    fields = words("-vf setfield=tff -c:v mpeg2video -q:v 2 -flags +ilme+ildct")
    run(*VIDEO(source), *fields, "-pix_fmt", "yuv420p", path)
    with open_media(path, "a") as container:
        track, stream = scan_packets(container, "a").video, video_stream(container)
        assert track is not None
        halves = np.sort(np.concatenate([track.pts[:-1], track.pts[:-1] + np.diff(track.pts) // 2]))
        both = replace(track, pts=halves)
        read_all = [read_pyav(container, stream, each, PLACES, "a", None) for each in (track, both)]
    assert [frame_number(frame) for frame in read_all[0]] == PLACES.tolist()
    assert [frame_number(frame) for frame in read_all[1]] == (PLACES // 2).tolist()


PLACES = np.array([1, 2, 7, 12, 13])


def test_face_boxes_are_in_pixels_of_the_picture_that_is_shown(
    tmp_path: Path, source: Path
) -> None:
    path = tmp_path / "a.mp4"
    run(*VIDEO(source), "-vf", "setsar=2/1", *H264, path)
    set_matrix(path, MATRICES["mirrored"])
    box = FaceBox(0.0, (96.0, 0.0, 192.0, 96.0))  # the right half of 192 x 96
    face = FaceConfig(detector="boxes", size=96, margin=0, align=False, max_gap=20)
    sampling = SamplingConfig(frames=FRAMES, face=face)
    want: frozenset[Any] = frozenset({"video", "face"})
    job = DecodeJob(path, "a", want, sampling, DecodeConfig(), face_boxes=(box,))
    clip = decode(job)
    assert clip.faces is not None
    assert clip.frames is not None
    assert clip.faces.found.all()
    half = clip.frames[:, :, 96:].astype(int)
    assert np.abs(clip.faces.crops - half).mean() < 2


# ------------------------------------------------------------------ cut and put together

SEGMENTS: Mapping[str, tuple[str, list[str]]] = {
    "mp4": ("mp4", [*H264, *AAC]),
    "mkv": ("matroska", [*H264, *AAC]),
    "webm": ("webm", [*VP8, *OPUS]),
    "mov": ("mov", [*H264, *PCM]),
    "ts": ("mpegts", [*H264, *AAC]),
    "flv": ("flv", [*H264, *AAC, "-ar", "44100"]),
    "wmv": ("asf", [*WMV, "-g", "12"]),
    "mpg": ("mpeg", [*MPEG2, *MP2]),
}


@pytest.mark.parametrize("suffix", SEGMENTS)
def test_segments(tmp_path: Path, source: Path, suffix: str) -> None:
    form, codecs = SEGMENTS[suffix]
    cut = ["-f", "segment", "-segment_time", 1, "-segment_format", form]
    run(*VIDEO(source), *AUDIO(source), *codecs, *cut, tmp_path / f"%d.{suffix}")
    paths = sorted(tmp_path.glob(f"*.{suffix}"))
    assert len(paths) >= 2
    for path in paths:
        true = truth(path)
        clip = read(path, "video", "audio", max_seconds=2.5)
        check_frames(clip, true)
        assert clip.waveform is not None
        assert true.heard + len(true.wave) / RATE - len(clip.waveform) / RATE < 0.06


@pytest.mark.parametrize("codecs", [[*MPEG4, *MP3], [*H264, *MP3], [*H264, "-an"]])
def test_segments_of_an_avi(tmp_path: Path, source: Path, codecs: list[str]) -> None:
    """The gap before a segment is stored behind its first frame, and is none of its time."""
    cut = ["-f", "segment", "-segment_time", 1, "-segment_format", "avi"]
    run(*VIDEO(source), *AUDIO(source), *codecs, *cut, tmp_path / "%d.avi")
    paths = sorted(tmp_path.glob("*.avi"))
    assert len(paths) >= 2
    seen: list[int] = []
    for path in paths:
        clip = read(path, "video", max_seconds=2.2)
        assert clip.frames is not None
        numbers = [frame_number(frame) for frame in clip.frames]
        assert numbers == sorted(numbers)
        assert np.diff(numbers).max() <= 3
        seen += numbers
    assert seen == sorted(seen)
    assert seen[0] <= 1
    assert seen[-1] >= 34


COPIES: Mapping[str, list[str]] = {
    "cut before.mp4": words("-ss 1.3 -i SRC -t 1.2 -c copy"),
    "cut before.mkv": words("-ss 1.3 -i SRC -t 1.2 -c copy"),
    "cut before.ts": words("-ss 1.3 -i SRC -t 1.2 -c copy"),
    "cut after.mp4": words("-i SRC -ss 0.8 -t 2 -c copy"),
    "late sound.mp4": words("-i SRC -itsoffset 0.5 -i SRC -map 0:v -map 1:a -c copy"),
    "late sound.mkv": words("-i SRC -itsoffset 0.5 -i SRC -map 0:v -map 1:a -c copy"),
    "late picture.mp4": words("-itsoffset 0.5 -i SRC -i SRC -map 0:v -map 1:a -c copy"),
    "late picture.mkv": words("-itsoffset 0.5 -i SRC -i SRC -map 0:v -map 1:a -c copy"),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_with_edit_lists_and_late_streams(tmp_path: Path, source: Path, name: str) -> None:
    path = tmp_path / name
    arguments = [source / "src.mp4" if word == "SRC" else word for word in COPIES[name]]
    run(*arguments, path)
    compare(path, even="picture" not in name and "after" not in name)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("picture", "sound"), [(1.0, 3.0), (0.5, 3.0), (3.0, 0.5)])
def test_streams_of_different_length(
    tmp_path: Path, source: Path, suffix: str, picture: float, sound: float
) -> None:
    path = tmp_path / f"a.{suffix}"
    before = ["-t", picture, *VIDEO(source), "-t", sound, *AUDIO(source)]
    run(*before, *H264, *AAC, path)
    true, clip = truth(path), read(path, "video", "audio")
    check_frames(clip, true)
    check_sound(clip, true)
    assert clip.frames is not None
    numbers = {frame_number(frame) for frame in clip.frames}
    assert len(numbers) >= min(FRAMES, round(picture * FPS))
    # A span takes from the picture what the two have in common.
    part = read(path, "video", start=0.25, end=min(2.5, max(picture, sound)))
    assert part.frames is not None
    assert part.times is not None
    assert part.times.max() < picture + 0.2
    assert len({frame_number(frame) for frame in part.frames}) >= min(FRAMES, 3)
    info = probe(path)
    assert info.video is not None
    assert info.audio is not None
    assert info.video.seconds == pytest.approx(picture, abs=0.1)
    assert info.audio.seconds == pytest.approx(sound, abs=0.1)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_time_stamps_in_the_order_of_decoding(tmp_path: Path, source: Path, suffix: str) -> None:
    """What was copied out of an AVI, or lost its ctts box, has B frames and no times of display."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "mov":
        run("-i", source / "src.mp4", "-c", "copy", path)
        path.write_bytes(path.read_bytes().replace(b"ctts", b"free"))
    else:
        run(*VIDEO(source), *AUDIO(source), *H264, *PCM, tmp_path / "a.avi")
        sound = PCM if suffix != "mp4" else AAC
        run("-fflags", "+genpts", "-i", tmp_path / "a.avi", "-c:v", "copy", *sound, path)
    clip = read(path, "video")
    assert clip.frames is not None
    numbers = [frame_number(frame) for frame in clip.frames]
    assert numbers == sorted(numbers)
    assert np.abs(np.array(numbers) - (np.arange(FRAMES) + 0.5) * COUNT / FRAMES).max() <= 2.5


def test_a_picture_that_begins_when_the_sound_is_half_over(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "a.mkv"
    copy = words("-map 0:v -map 1:a -c copy")
    run("-itsoffset", 2, "-i", source / "src.mp4", "-i", source / "src.mp4", *copy, path)
    compare(path)


@pytest.mark.parametrize("name", ["h264 aac.ts", "mpeg2 mp2.ts", "mpeg2 with B frames.mpg"])
def test_a_recording_that_begins_anywhere(tmp_path: Path, source: Path, name: str) -> None:
    """The decoder shows nothing before the first key packet."""
    path = tmp_path / name
    run(*VIDEO(source), *AUDIO(source), *FILES[name], "-g", 12, path)
    data = path.read_bytes()
    unit = 188 if path.suffix == ".ts" else 2048
    # A transport stream repeats its tables, which the demuxer needs.
    head = data[: unit * 3] if path.suffix == ".ts" else b""
    path.write_bytes(head + data[len(data) // 5 // unit * unit :])
    true, clip = truth(path), read(path, "video")
    check_frames(clip, true)


# ------------------------------------------------------------------ parts of files

SPANS: Mapping[str, list[str]] = {
    **{name: FILES[name] for name in ("h264 aac.ts", "disc.vob", "mpeg2 with B frames.mpg")},
    **{name: FILES[name] for name in ("h264 mp2.mpg", "h264 pcm.mov", "vp8 vorbis.webm")},
    **{name: FILES[name] for name in ("h264 mp3.flv", "theora vorbis.ogv", "wmv.wmv")},
    "interlaced.mpg": [*words("-vf setfield=bff -flags +ildct+ilme"), *MPEG2, "-bf", "2", *MP2],
}
SOUND_SPANS: Mapping[str, list[str]] = {
    "vorbis.ogg": words("-c:a libvorbis"),
    "opus.opus": OPUS,
    "flac.ogg": words("-c:a flac"),
    "g722.wav": words("-c:a g722 -ar 16000"),
    "adpcm.wav": words("-c:a adpcm_ima_wav"),
    "mp2.mpg": [*MP2, "-f", "mpeg"],
    "a.mka": words("-c:a libvorbis"),
    "a.m4a": AAC,
    "a.mp3": MP3,
}


@pytest.mark.parametrize("name", [*SPANS, *SOUND_SPANS])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, source: Path, name: str) -> None:
    """Demuxers seek to wrong places and give the first packets there wrong time stamps."""
    path = tmp_path / name
    if name in SPANS:
        run(*VIDEO(source), *AUDIO(source), *SPANS[name], path)
    else:
        run(*AUDIO(source), *SOUND_SPANS[name], path)
    whole = read(path, "audio").waveform
    assert whole is not None
    for start, end in ((0.4, 1.1), (1.0, 2.0), (1.9, 2.9)):
        part = read(path, "audio", start=start, end=end).waveform
        assert part is not None
        same = whole[round(start * RATE) :][: len(part)]
        assert len(part) == pytest.approx((end - start) * RATE, abs=2)
        # Less than a sample apart, as the span begins between two samples.
        assert np.abs(same - part).mean() < 0.35 * np.abs(same).mean()
    if name in SPANS:
        true = truth(path, sound=False, fields="interlaced" in name)
        for start in (0.5, 1.2, 2.1):
            check_frames(read(path, "video", start=start, end=start + 0.7), true, even=False)


def test_a_fragment_of_a_longer_film(tmp_path: Path, source: Path) -> None:
    """As HLS and DASH are stored: FFmpeg gives the time of its end for its length."""
    listed = words("-c copy -f hls -hls_segment_type fmp4 -hls_time 1 -hls_segment_filename")
    run("-i", source / "src.mp4", *listed, tmp_path / "s%d.m4s", tmp_path / "a.m3u8")
    path = tmp_path / "a.mp4"
    path.write_bytes((tmp_path / "init.mp4").read_bytes() + (tmp_path / "s2.m4s").read_bytes())
    true, clip = truth(path), read(path, "video", "audio")
    check_frames(clip, true)
    assert clip.duration == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("name", "offset"),
    [("h264 aac.ts", 0), ("h264 aac.ts", 300), ("disc.vob", 0), ("h264 flac.mkv", 0)],
)
def test_files_glued_together_are_refused(
    tmp_path: Path, source: Path, name: str, offset: int
) -> None:
    """Frames and sound of two clips would be shown at the same time."""
    path, second = tmp_path / name, tmp_path / f"second {name}"
    run(*VIDEO(source), *AUDIO(source), *FILES[name], path)
    run(*VIDEO(source), *AUDIO(source), *FILES[name], "-output_ts_offset", offset, second)
    path.write_bytes(path.read_bytes() + second.read_bytes())
    with pytest.raises(MediaError, match="glued together; encode the file again") as caught:
        read(path, "video", "audio")
    assert caught.value.kind == "decode"
    with pytest.raises(MediaError, match="glued together"):
        probe(path)


# ------------------------------------------------------------------ damage

DAMAGED: Mapping[str, list[str]] = {
    name: FILES[name]
    for name in ("h264 aac.mp4", "h264 pcm.mov", "h264 flac.mkv", "h264 mp3.flv", "wmv.wmv")
}
DAMAGED |= {name: FILES[name] for name in ("from 100 s.mkv", "from 700 s.webm", "from 100 s.mp4")}
DAMAGED |= {name: AVI[name] for name in ("mpeg4.avi", "h264 with B frames.avi")}


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("name", [*DAMAGED, "a.wav", "a.m4a", "a.w64", "a.caf", "a.aiff", "a.flac"])
def test_a_file_whose_end_is_missing_is_refused(
    tmp_path: Path, source: Path, name: str, share: float
) -> None:
    path = tmp_path / name
    if name in DAMAGED:
        run(*VIDEO(source), *AUDIO(source), *DAMAGED[name], path)
    else:
        run(*AUDIO(source), *SOUNDS[name], path)
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    with pytest.raises(MediaError) as caught:
        read(path, "audio")
    assert caught.value.kind in {"truncated", "decode"}


def test_a_cut_mkv_whose_header_declares_the_length(tmp_path: Path, source: Path) -> None:
    """And not the time of the end, which is what the clock of this one passes soon."""
    path = tmp_path / "a.mkv"
    run(*VIDEO(source), *AUDIO(source), *H264, *AAC, "-output_ts_offset", 100, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    struct.pack_into(">d", data, at, 3000.0)
    path.write_bytes(bytes(data))
    assert read(path, "audio").duration == pytest.approx(3.0, abs=0.1)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(MediaError, match="missing at the end"):
        read(path, "audio")
