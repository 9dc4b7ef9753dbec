"""Where the cues of a row are: every form of ``cues``, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.data.cues import cue_lists
from mmemo.data.row_models import Row
from mmemo.data.rows import read_row
from mmemo.data.sample import Truth


def read(cues: Any) -> tuple[Truth | None, list[str]]:
    row = Row({"messages": [{"role": "user", "content": "hi"}], "cues": cues}, "m.jsonl", 3)
    sample = read_row(row)
    return sample and sample.truth, [str(one) for one in row.problems]


SAME = {"present": ("sobbing", "lowered gaze"), "absent": ("smile",), "spurious": ("music",)}
CHANNELS = {"sobbing": "audio", "lowered gaze": "video", "smile": "video", "music": "audio"}


@pytest.mark.parametrize(
    "given",
    [
        {
            "present": {"audio": ["sobbing"], "face": ["lowered gaze"]},
            "absent": {"video": ["smile"]},
            "spurious": {"audio": ["music"]},
        },
        {
            "audio": {"present": ["sobbing"], "spurious": ["music"]},
            "face": {"present": ["lowered gaze"], "absent": ["smile"]},
        },
        {
            "present": [
                {"cue": "sobbing", "channel": "audio"},
                {"cue": "lowered gaze", "channel": "face"},
            ],
            "absent": [{"cue": "smile", "channel": "video"}],
            "spurious": [{"cue": "music", "channel": "audio"}],
        },
        {
            "present": ["sobbing", "lowered gaze"],
            "absent": ["smile"],
            "spurious": ["music"],
            "audio": ["sobbing", "music"],
            "video": ["lowered gaze", "smile"],
        },
        {
            "audio": ["sobbing", "music"],
            "face": ["lowered gaze"],
            "absent": {"face": ["smile"]},
            "spurious": ["music"],
        },
    ],
)
def test_every_form_says_the_same(given: dict[str, Any]) -> None:
    truth, problems = read(given)
    assert truth is not None, problems
    assert {kind: truth.cues[kind] for kind in SAME} == SAME
    assert truth.cue_channels == CHANNELS
    assert (truth.cues["audio"], truth.cues["video"]) == (("sobbing",), ("lowered gaze",))
    again, _ = read(cue_lists(truth))
    assert again is not None
    assert {**again.cues} == {**truth.cues}
    assert again.cue_channels == truth.cue_channels


def test_plain_lists_load_and_have_no_channel() -> None:
    truth, _ = read({"present": ["sobbing", {"cue": "a smile"}], "spurious": None})
    assert truth is not None
    assert truth.cues == {"present": ("sobbing", "a smile"), "spurious": ()}
    assert truth.cue_channels == {}


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"present": {"sound": ["x"]}}, "cues.present.sound", "is unknown"),
        ({"present": [{"cue": "x", "channel": "vidoe"}]}, ".channel", "did you mean 'video'?"),
        ({"present": [{"cue": "x", "chanel": "audio"}]}, ".chanel", "did you mean 'channel'?"),
        ({"present": [{"channel": "audio"}]}, "cues.present.0.cue", "is missing"),
        ({"audio": ["Sobbing"], "face": ["sobbing"]}, "'cues'", "under audio and video"),
        ({"present": {"audio": ["x"]}, "absent": {"video": ["x"]}}, "'cues'", "one channel"),
        ({"audio": [{"cue": "x", "channel": "video"}]}, "'cues'", "under audio and video"),
        ({"present": {"absent": ["x"]}}, "'cues'", "list a kind by channel"),
        ({"audio": {"video": ["x"]}}, "'cues'", "list a kind by channel"),
        ({"present": {"audio": "x"}}, "cues.present.audio", "list of strings"),
        ({"present": ["x", 1]}, "cues.present.1", "string that is not empty"),
        (["x"], "'cues'", "must be an object"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(given: Any, field: str, words: str) -> None:
    truth, problems = read(given)
    assert truth is None
    assert field in problems[0]
    assert words in problems[0]
    assert "\n" not in problems[0]


def test_a_cue_of_the_face_and_of_the_picture_is_in_one_channel() -> None:
    truth, _ = read({"face": ["tears"], "video": ["tears"]})
    assert truth is not None
    assert truth.cues["present"] == truth.cues["video"] == ("tears",)
