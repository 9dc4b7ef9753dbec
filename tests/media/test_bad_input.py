"""Every way a file can be bad becomes a typed error that names the file and the reason."""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mmemo.errors import MediaError
from mmemo.media.clip import BadClip, DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode, decode_guarded
from mmemo.media.decode_pool import DecodePool
from mmemo.media.probe import probe
from mmemo.media.scan import scan_packets
from tests.media_files import sine, write_clip, write_wav

HTML = b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n" * 20


def job(path: Path, *want: Any, **fields: Any) -> DecodeJob:
    limits = DecodeConfig(**fields.pop("limits", {}))
    return DecodeJob(
        path, f"clips/{path.name}", frozenset(want), SamplingConfig(), limits, **fields
    )


def refused(path: Path, *want: Any, **fields: Any) -> MediaError:
    """The error that both ways of decoding agree on."""
    found: list[MediaError] = []
    for function in (decode, decode_guarded):
        with pytest.raises(MediaError) as caught:
            function(job(path, *(want or ("video", "audio")), **fields))
        found.append(caught.value)
    one, two = found
    assert one.path == f"clips/{path.name}"
    assert str(one) == str(two)
    assert str(one).startswith(f"clips/{path.name}: {one.kind}: ")
    assert str(path) not in one.detail
    return one


def faststart(source: Path, path: Path) -> Path:
    """The same mp4 with its index in front."""
    options = {"movflags": "+faststart"}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    return path


def declare_mkv(path: Path, seconds: float) -> Path:
    """Make the header of a Matroska file claim another duration."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # element Duration, eight bytes, in milliseconds
    struct.pack_into(">d", data, at, seconds * 1000)
    path.write_bytes(bytes(data))
    return path


def slow_down(path: Path, factor: int) -> Path:
    """Make the index of an mp4 spread its samples over a longer time."""
    data = bytearray(path.read_bytes())
    at = data.find(b"stts")
    while at >= 0:
        for entry in range(struct.unpack_from(">I", data, at + 8)[0]):
            place = at + 16 + 8 * entry
            delta = struct.unpack_from(">I", data, place)[0]
            struct.pack_into(">I", data, place, delta * factor)
        at = data.find(b"stts", at + 4)
    for name, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20), (b"elst", 12)):
        at = data.find(name)
        while at >= 0:
            value = struct.unpack_from(">I", data, at + offset)[0]
            struct.pack_into(">I", data, at + offset, min(value * factor, 2**31))
            at = data.find(name, at + 4)
    path.write_bytes(bytes(data))
    return path


def _rename(new: bytes, path: Path) -> None:
    (path.parent / "new").write_bytes(new)
    (path.parent / "new").replace(path)


def _rewrite(new: bytes, path: Path) -> None:
    """In place, with the same size and the old modification time."""
    status = path.stat()
    path.write_bytes(new.ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _delete(_: bytes, path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("swap", "kind"), [(_rename, "changed"), (_rewrite, "changed"), (_delete, "missing")]
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: Callable[..., None], kind: str, old: bool
) -> None:
    """Else the sound of one file would stand under the digest of another."""
    monkeypatch.setattr("mmemo.media.probe._RACY_NS", -1 if old else 10**18)
    monkeypatch.setattr("mmemo.media.decode._scans", deque())
    one = write_clip(tmp_path / "one.mp4", tone=220.0).read_bytes()
    two = write_clip(tmp_path / "two.mp4", tone=880.0).read_bytes()
    path = tmp_path / "a.mp4"

    def scan(container: Any, name: str, *rest: Any) -> Any:
        found = scan_packets(container, name, *rest)
        swap(two, path)
        return found

    for module in ("decode", "probe"):
        monkeypatch.setattr(f"mmemo.media.{module}.scan_packets", scan)
    for read in (decode, decode_guarded, lambda j: probe(j.path, j.name)):
        path.write_bytes(one)
        with pytest.raises(MediaError, match="clips/a") as caught:
            read(job(path, "audio"))
        assert caught.value.kind == kind


def test_damage_that_comes_with_a_change_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "a.mp4")

    def waveform(*_: Any) -> Any:
        path.write_bytes(b"\0" * 100)
        raise MediaError("a", "decode", "the audio is damaged")

    monkeypatch.setattr("mmemo.media.decode.read_waveform", waveform)
    with pytest.raises(MediaError, match="start again when it is whole") as caught:
        decode(job(path, "audio"))
    assert caught.value.kind == "changed"


def test_a_file_that_is_gone_is_missing(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.mp4").kind == "missing"


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    assert refused(tmp_path / "a.mp4").kind == "empty"


@pytest.mark.parametrize("content", [HTML, b"\n\n" + HTML.lower(), b'{"error": "quota"}'])
def test_a_web_page_named_mp4(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    error = refused(tmp_path / "a.mp4")
    assert error.kind == "not_media"
    assert "HTML" in error.detail


@pytest.mark.parametrize("content", [b"\0" * 4096, bytes(range(256)) * 20, b"PK\x03\x04" * 99])
def test_no_media_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    assert refused(tmp_path / "a.mp4").kind == "not_media"


def test_a_picture_is_no_clip(tmp_path: Path) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), dtype=np.uint8))
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert refused(tmp_path / "a.mp4").kind == "not_media"


@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.6, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("front", [False, True])
def test_truncated_mp4(tmp_path: Path, share: float, front: bool) -> None:
    path = write_clip(tmp_path / "whole.mp4")
    if front:
        path = faststart(path, tmp_path / "front.mp4")
        assert decode(job(path, "video", "audio")).frames is not None
    data = path.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: max(40, int(len(data) * share))])
    assert refused(cut).kind == "truncated"
    # Even if the part that is asked for would decode.
    assert refused(cut, "video", start=0.0, end=0.2).kind == "truncated"


@pytest.mark.parametrize("suffix", [".mkv", ".wav", ".avi", ".flv"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_truncated_in_other_containers(tmp_path: Path, suffix: str, share: float) -> None:
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    path = tmp_path / f"a{suffix}"
    if suffix == ".wav":
        write_wav(path)
    else:
        write_clip(path, seconds=4, codec=codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refused(path, "audio").kind in {"truncated", "decode"}


def test_a_hole_in_the_middle(tmp_path: Path) -> None:
    """The index is there and the sizes agree; the frames in between are zeros."""
    path = write_clip(tmp_path / "a.mp4", seconds=4, fps=25)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat")
    data[at + 3000 : at + 12000] = bytes(9000)
    path.write_bytes(bytes(data))
    error = refused(path, "video")
    assert error.kind == "decode"
    assert "damaged" in error.detail


def test_no_audio_and_no_video(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", audio=False)
    blind = write_clip(tmp_path / "blind.mp4", video=False)
    assert refused(silent, "audio").kind == "no_audio"
    assert refused(silent, "video", "audio").kind == "no_audio"
    assert refused(blind, "video").kind == "no_video"
    assert refused(blind, "face").kind == "no_video"
    assert decode(job(silent, "video")).frames is not None
    assert decode(job(blind, "audio")).waveform is not None


def test_no_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    assert refused(path, "video").kind in {"no_frames", "no_video"}
    with pytest.raises(MediaError) as caught:
        probe(path, "a")
    assert caught.value.kind in {"no_frames", "not_media", "truncated"}


def test_a_video_stream_without_frames_beside_sound(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        picture = out.add_stream("libx264", rate=12)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        sound = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sine(1, 16000, 220)[None], format="flt", layout="mono")
        frame.sample_rate = 16000
        out.mux([*sound.encode(frame), *sound.encode(None)])
    assert refused(path, "video").kind in {"no_frames", "no_video"}
    assert decode(job(path, "audio")).waveform is not None


def test_a_header_that_claims_hours(tmp_path: Path) -> None:
    path = declare_mkv(write_clip(tmp_path / "a.mkv"), 7200)
    assert refused(path).kind == "too_long"
    error = refused(path, "video", start=0.0, end=1.0)
    assert error.kind == "truncated"
    assert "7200.0 s" in error.detail
    assert refused(path, limits={"max_seconds": 10000}).kind == "truncated"
    with pytest.raises(MediaError) as caught:
        probe(path, "a")
    assert caught.value.kind == "truncated"


def test_an_index_that_stretches_seconds_to_hours(tmp_path: Path) -> None:
    path = slow_down(write_clip(tmp_path / "a.mp4", audio=False), 3600)
    assert refused(path, "video").kind == "too_long"


def test_too_long_spans(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", seconds=3)
    limits = {"max_seconds": 1.0}
    error = refused(path, limits=limits)
    assert error.kind == "too_long"
    assert "max_seconds=1" in error.detail
    assert refused(path, start=0.5, end=2.0, limits=limits).kind == "too_long"
    assert decode(job(path, "video", start=1.0, end=2.0, limits=limits)).frames is not None


@pytest.mark.parametrize(
    ("start", "end"),
    [(2.5, 3.0), (2.5, None), (0.0, 4.0), (1.0, 1.0), (1.5, 0.5), (-1.0, 1.0), (None, 9.0)],
)
def test_spans_outside_the_file(tmp_path: Path, start: float | None, end: float | None) -> None:
    error = refused(write_clip(tmp_path / "a.mp4"), start=start, end=end)
    assert error.kind == "bad_span"
    assert "2.00 s" in error.detail


def test_not_a_number_is_no_time(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    assert refused(path, start=float("nan"), end=1.0).kind == "bad_span"
    assert refused(path, start=0.0, end=float("nan")).kind == "bad_span"


def test_an_end_that_was_rounded_up_is_forgiven(tmp_path: Path) -> None:
    clip = decode(job(write_clip(tmp_path / "a.mp4"), "audio", start=1.0, end=2.1))
    assert clip.waveform is not None
    assert len(clip.waveform) == 16000


def test_a_span_in_which_one_stream_is_over(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write_clip(tmp_path / "video.mkv", seconds=1, audio=False)
    write_clip(tmp_path / "audio.mkv", seconds=3, video=False)
    with (
        av.open(str(path), "w") as out,
        av.open(str(tmp_path / "video.mkv")) as video,
        av.open(str(tmp_path / "audio.mkv")) as audio,
    ):
        for source in (video, audio):
            for stream in source.streams:
                source_stream = out.add_stream_from_template(stream)
                stream.metadata["to"] = str(source_stream.index)
        packets = [
            (packet, out.streams[int(packet.stream.metadata["to"])])
            for source in (video, audio)
            for packet in source.demux()
            if packet.dts is not None
        ]
        for packet, stream in packets:
            packet.stream = stream
            out.mux(packet)
    assert refused(path, "video", start=2.0, end=3.0).kind == "no_frames"
    assert decode(job(path, "audio", start=2.0, end=3.0)).waveform is not None


def test_sound_that_is_not_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_f32le", rate=16000, layout="mono")
        wave = sine(1, 16000, 220)
        wave[8000] = np.nan
        frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.sample_rate = 16000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    assert refused(path, "audio").kind == "decode"


def test_a_playlist_opens_no_other_file_or_address(tmp_path: Path) -> None:
    """A demuxer for playlists would open what they name: local files, internal addresses."""
    secret = write_clip(tmp_path / "secret.mp4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        url = f"http://127.0.0.1:{port}/a.ts"
        playlists: dict[str, str] = {
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXT-X-ENDLIST\n",
            "hls file": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n",
            "concat": f"ffconcat version 1.0\nfile {secret}\n",
            "dash": f'<?xml version="1.0"?><MPD><BaseURL>{url}</BaseURL></MPD>',
            "sdp": f"v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
        }
        for name, text in playlists.items():
            path = tmp_path / f"{name}.mp4"
            path.write_text(text)
            assert refused(path, "video").kind == "not_media", name
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "a.mp4")
    whole: Callable[..., Any] = Path.open

    def denied(self: Path, *arguments: Any, **more: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return whole(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", denied)
    error = refused(path)
    assert error.kind == "missing"
    assert "Permission denied" in error.detail


def test_a_picture_that_changes_its_size(tmp_path: Path) -> None:
    """Transport streams may be glued together from different cameras."""
    parts = [
        write_clip(tmp_path / f"{w}.ts", seconds=1, size=(w, 64), audio=False).read_bytes()
        for w in (64, 96)
    ]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(parts))
    with pytest.raises(MediaError) as caught:
        decode(job(path, "video"))
    assert caught.value.kind in {"decode", "truncated"}


def test_bad_clips_come_back_in_their_place_and_leave_the_rest_alone(tmp_path: Path) -> None:
    good = write_clip(tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_bytes(HTML)
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:9000])
    silent = write_clip(tmp_path / "silent.mp4", audio=False)
    expected = decode(job(good, "video", "audio"))
    names = ["good", "empty", "page", "good", "cut", "silent", "good"]
    jobs = [job(tmp_path / f"{name}.mp4", "video", "audio") for name in names]
    with DecodePool(DecodeConfig(workers=2)) as pool:
        results = list(pool.map(jobs))
    kinds = [r.kind if isinstance(r, BadClip) else "good" for r in results]
    assert kinds == ["good", "empty", "not_media", "good", "truncated", "no_audio", "good"]
    assert silent.name in results[5].row()["path"]  # type: ignore[union-attr]
    for result in results:
        if not isinstance(result, BadClip):
            np.testing.assert_array_equal(result.frames, expected.frames)
            np.testing.assert_array_equal(result.waveform, expected.waveform)
            assert result.digest == expected.digest
