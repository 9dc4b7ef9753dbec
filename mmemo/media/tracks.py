"""Which of a file's tracks are read. One rule for every place that opens a file.

A track that somebody asks for (``sampling.audio_track``, ``sampling.video_track``) is taken, or it
is an error that it is not there. Otherwise, in this order: a track that can be decoded and is not
marked as commentary, description or the like; one whose language and title do not speak of
commentary or description; one that the file marks as the default; the first. A picture that is
attached to a file, such as the cover of an album, is never its video.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from av.stream import Disposition

from mmemo.data.sample import Modality
from mmemo.errors import MediaError
from mmemo.media.config import SamplingConfig, TrackChoice

_STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_BESIDE = (
    Disposition.comment
    | Disposition.visual_impaired
    | Disposition.hearing_impaired
    | Disposition.descriptions
    | Disposition.dub
    | Disposition.karaoke
    | Disposition.lyrics
    | Disposition.clean_effects
    | Disposition.non_diegetic
    | Disposition.dependent
)
# DVB's codes of audio description, and ISO 639-2's of a track without speech.
_BESIDE_LANGUAGES = frozenset({"qad", "nar", "zxx"})
_BESIDE_TITLES = (
    *("comment", "kommentar", "komentar", "comentari", "descri", "deskri", "beschreibung"),
    *("hörfilm", "narrat", "karaoke", "isolated score", "music and effects", "music & effects"),
    *("解说", "解說", "評論", "评论", "讲评", "旁白", "口述", "解説", "コメンタリー", "해설"),
)
# Two-letter codes and the bibliographic codes of ISO 639-2, beside the terminological ones.
_SAME_LANGUAGE = {
    code: codes[0]
    for codes in (
        *(("eng", "en"), ("zho", "zh", "chi", "cmn"), ("deu", "de", "ger"), ("fra", "fr", "fre")),
        *(("spa", "es"), ("jpn", "ja"), ("kor", "ko"), ("ita", "it"), ("por", "pt"), ("rus", "ru")),
        *(("nld", "nl", "dut"), ("ces", "cs", "cze"), ("ell", "el", "gre"), ("fas", "fa", "per")),
        *(("ron", "ro", "rum"), ("slk", "sk", "slo"), ("ara", "ar"), ("hin", "hi"), ("tur", "tr")),
        *(("pol", "pl"), ("swe", "sv"), ("dan", "da"), ("fin", "fi"), ("nor", "no"), ("vie", "vi")),
        *(("tha", "th"), ("ind", "id"), ("ukr", "uk"), ("heb", "he"), ("hun", "hu"), ("ben", "bn")),
    )
    for code in codes
}


def video_stream(container: Any, asked: TrackChoice = None) -> Any | None:
    """The video stream to read, or None if there is none, or not the one that is asked for."""
    return _choose(video_tracks(container), asked)


def audio_stream(container: Any, asked: TrackChoice = None) -> Any | None:
    """The audio stream to read, or None if there is none, or not the one that is asked for."""
    return _choose(audio_tracks(container), asked)


def video_tracks(container: Any) -> list[Any]:
    """The video streams that are no attached pictures, in the file's order."""
    return [stream for stream in container.streams.video if not stream.disposition & _STILL]


def audio_tracks(container: Any) -> list[Any]:
    """The audio streams in the file's order."""
    return list(container.streams.audio)


def need_tracks(
    container: Any, name: str, want: Container[Modality], sampling: SamplingConfig
) -> None:
    """Check that the tracks that ``sampling`` asks for are among the file's.

    Raises:
        MediaError: ``no_video`` or ``no_audio``, with what the file has. A file without any such
            track is left to :func:`mmemo.media.probe.need_streams`.
    """
    if "video" in want or "face" in want:
        _need(video_tracks(container), "video", sampling.video_track, name)
    if "audio" in want:
        _need(audio_tracks(container), "audio", sampling.audio_track, name)


def describe(stream: Any, number: int) -> str:
    """A track in a few words: its number, its language, its title and how it is marked."""
    marks = [flag.name for flag in Disposition if stream.disposition & flag and flag.name]
    words = [_language(stream), f"'{title}'" if (title := _title(stream)) else "", *marks]
    return " ".join([str(number), *(word for word in words if word)])


def _need(tracks: Sequence[Any], kind: str, asked: TrackChoice, name: str) -> None:
    if tracks and asked is not None and _choose(tracks, asked) is None:
        have = "; ".join(describe(stream, number) for number, stream in enumerate(tracks))
        raise MediaError(
            name,
            f"no_{kind}",
            f"has no {kind} track '{asked}', only {have}; correct sampling.{kind}_track",
        )


def _choose(tracks: Sequence[Any], asked: TrackChoice) -> Any | None:
    if isinstance(asked, int):
        return tracks[asked] if asked < len(tracks) else None
    if asked is not None:
        tracks = [stream for stream in tracks if _language(stream) == _same(asked)]
    return min(tracks, key=_rank, default=None)  # the first of equals


def _rank(stream: Any) -> tuple[bool, bool, bool, bool]:
    """Lower is better. Muxers mark the first track as the default by themselves, so a title that
    speaks of commentary says more than that mark."""
    return (
        stream.codec_context is None,  # FFmpeg does not know how to decode it
        bool(stream.disposition & _BESIDE),
        _is_beside(stream),
        not stream.disposition & Disposition.default,
    )


def _is_beside(stream: Any) -> bool:
    title = _title(stream).casefold()
    return _language(stream) in _BESIDE_LANGUAGES or any(word in title for word in _BESIDE_TITLES)


def _language(stream: Any) -> str:
    return _same(stream.language or "").removesuffix("und")  # "und" is ISO 639-2's undetermined


def _same(code: str) -> str:
    """One code per language: ``en``, ``EN-us`` and ``eng`` are the same."""
    plain = code.casefold().partition("-")[0].partition("_")[0].strip()
    return _SAME_LANGUAGE.get(plain, plain)


def _title(stream: Any) -> str:
    # QuickTime keeps titles as handler names, beside those that only say what a handler is.
    handler = stream.metadata.get("handler_name", "")
    return stream.metadata.get("title", "" if handler.endswith("Handler") else handler).strip()
