"""The cues of a manifest row: which are present, absent or beside the point, and where each one is.

``cues`` of a row may list cues by kind, by channel, or by both in either order, and a cue may be an
object that names its channel:

    {"present": ["sobbing"], "absent": ["smile"], "spurious": ["music"]}
    {"audio": ["sobbing"], "face": ["lowered gaze"]}
    {"present": {"audio": ["sobbing"]}, "spurious": {"audio": ["music"], "video": ["a red wall"]}}
    {"present": [{"cue": "sobbing", "channel": "audio"}], "spurious": ["music"], "audio": ["music"]}

Cues that are listed under a channel and under no kind are present.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from mmemo.data.row_models import CUE_KINDS, CUE_PLACES, CueModel, Row
from mmemo.data.sample import CueChannel, Truth

CueList = Sequence[str | CueModel]
CueLists = Mapping[str, CueList | Mapping[str, CueList | None] | None]

_CHANNELS: Mapping[str, CueChannel] = {
    "audio": "audio",
    "video": "video",
    "face": "video",
    "text": "text",
}
"""Where a row may say that a cue is -> its channel. A question about the picture is about both the
frames and the face."""


def read_cues(
    row: Row, given: CueLists
) -> tuple[dict[str, tuple[str, ...]], dict[str, CueChannel]]:
    """The cues by kind, with the present ones also by channel, and the channel of each cue.

    Cues that are listed under a channel and under no kind are present.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in CUE_KINDS if kind in given}
    loose: list[str] = []
    channels: dict[str, CueChannel] = {}
    spelled: dict[str, CueChannel] = {}
    for names, item in _cue_items(given):
        text, own = (item, None) if isinstance(item, str) else (item.cue, item.channel)
        kind = [name for name in names if name in CUE_KINDS]
        where = [name for name in (*names, own) if name in CUE_PLACES]
        if len(kind) > 1 or len(names) - len(kind) > 1:
            row.bad("cues", f"has '{names[1]}' under '{names[0]}'; list a kind by channel")
            continue
        (kinds.setdefault(kind[0], []) if kind else loose).append(text)
        for place in where:
            channel: CueChannel = _CHANNELS[place]
            known = spelled.setdefault(cue_key(text), channel)
            if known != channel:
                row.bad(
                    "cues",
                    f"has '{text}' under {known} and {channel}, but a cue is in one channel; keep "
                    "one, or word what is heard and what is seen differently",
                )
            channels[text] = known
    listed = {cue_key(text) for texts in kinds.values() for text in texts}
    extra = [text for text in dict.fromkeys(loose) if cue_key(text) not in listed]
    if extra:
        kinds.setdefault("present", []).extend(extra)
    found = {kind: tuple(texts) for kind, texts in kinds.items()}
    for text in dict.fromkeys(text for texts in kinds.values() for text in texts):
        if cue_key(text) in spelled:
            channels[text] = spelled[cue_key(text)]
    named = {_CHANNELS[name] for name in given if name in _CHANNELS}
    for channel in dict.fromkeys(_CHANNELS.values()):
        here = (one for one in found.get("present", ()) if spelled.get(cue_key(one)) == channel)
        present = tuple(dict.fromkeys(here))
        if present or channel in named:
            found[channel] = present
    return found, channels


def _cue_items(given: CueLists) -> Iterator[tuple[tuple[str, ...], str | CueModel]]:
    """Each cue with the keys that it stands under, those of one channel after another."""
    order = {name: place for place, name in enumerate((*CUE_KINDS, *CUE_PLACES))}
    for key in sorted(given, key=lambda name: order[name]):
        value = given[key] or ()
        if isinstance(value, Mapping):
            for inner, items in value.items():
                yield from (((key, inner), item) for item in items or ())
        else:
            yield from (((key,), item) for item in value)


@lru_cache(maxsize=1 << 14)
def cue_key(text: str) -> str:
    """A cue's text without what does not make it another cue: capitals and extra blanks."""
    return " ".join(text.casefold().split())


def cue_lists(truth: Truth) -> dict[str, list[str]]:
    """``cues`` of a row, in plain lists: by kind, and under each channel those that are there."""
    found = {kind: list(texts) for kind, texts in truth.cues.items() if kind in CUE_KINDS}
    for channel in dict.fromkeys(_CHANNELS.values()):
        own = [cue for cue, where in truth.cue_channels.items() if where == channel]
        if own or channel in truth.cues:
            found[channel] = own
    return found
