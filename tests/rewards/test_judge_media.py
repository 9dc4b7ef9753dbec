"""What a judge sees and hears: the parts of a request decode to the clip's frames and sound."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import wave
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmemo.config import parse
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import ConfigError
from mmemo.rewards.judge.endpoint import EndpointJudge, JudgeConfig
from mmemo.rewards.judge.open import open_judge
from mmemo.rewards.judge.rubric import ClipMedia, ClipSpan, Grades, JudgeItem, clip_media
from mmemo.rewards.rewards import RewardConfig, RewardSet, columns_of, prompt_of
from tests.media_files import frame_number, write_clip
from tests.rewards.stub_judge import Reply, Server, judge_server

THOUGHT = "<think>The brows are lowered and the pitch of the voice is low.</think>"
GRADES = Grades(5, 4, 3, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media root with a clip whose frames show their numbers, and a file that is no clip."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "clip.mp4", seconds=2.0, tone=440.0, size=(96, 64))
    (folder / "broken.mp4").write_bytes(b"no clip")
    return folder


def judge(server: Server, cache: Path | None = None, **media: Any) -> EndpointJudge:
    values = {"base_url": server.url, "model": "m", "backoff_s": 0.01, "media": media}
    return EndpointJudge(parse(JudgeConfig, {**values, "cache_dir": cache and str(cache)}))


def clip_of(root: Path, name: str = "clip.mp4", **span: float) -> ClipMedia:
    return ClipMedia(str(root), ClipSpan(name, **span), ClipSpan(name, **span))


def ask(one: EndpointJudge, *clips: ClipMedia | None) -> list[Grades | None]:
    items = [JudgeItem("q", f"{THOUGHT} {number}", "f", at) for number, at in enumerate(clips)]
    return asyncio.run(one.score(items))


def frames_of(request: dict[str, Any], form: str = "jpeg") -> list[Any]:
    found = []
    for part in request["messages"][1]["content"]:
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(",", 1)
            assert head == f"data:image/{form};base64"
            raw = np.frombuffer(base64.b64decode(data, validate=True), np.uint8)
            found.append(cv2.cvtColor(cv2.imdecode(raw, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))
    return found


def sounds_of(request: dict[str, Any]) -> list[tuple[int, Any]]:
    found = []
    for part in request["messages"][1]["content"]:
        if part["type"] == "input_audio":
            assert part["input_audio"]["format"] == "wav"
            data = base64.b64decode(part["input_audio"]["data"], validate=True)
            with wave.open(io.BytesIO(data)) as file:
                assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                found.append((file.getframerate(), samples))
    return found


def tone_of(rate: int, samples: Any) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_the_parts_are_the_clip_s_frames_and_sound(root: Path, form: str) -> None:
    with judge_server(lambda *_: Reply()) as server:
        one = judge(server, frames=4, max_side=48, image_format=form)
        assert ask(one, clip_of(root)) == [GRADES]
    (request,) = server.seen
    frames, sounds = frames_of(request, form), sounds_of(request)
    assert [frame_number(frame) for frame in frames] == [3, 9, 15, 21]
    assert {frame.shape for frame in frames} == {(32, 48, 3)}
    ((rate, samples),) = sounds
    assert (rate, len(samples)) == (16000, 32000)
    assert tone_of(rate, samples) == pytest.approx(440, abs=1)
    kinds = [part["type"] for part in request["messages"][1]["content"]]
    assert kinds == ["text", *["image_url"] * 4, "input_audio", "text"]
    first, last = (request["messages"][1]["content"][at]["text"] for at in (0, -1))
    assert "4 frames in order of time and its sound" in first
    assert "brows" in last
    assert "brows" not in first


def test_the_row_s_span_is_what_is_sent(root: Path) -> None:
    with judge_server(lambda *_: Reply()) as server:
        assert ask(judge(server, frames=2), clip_of(root, start=1.0, end=2.0)) == [GRADES]
    (request,) = server.seen
    assert [frame_number(frame) for frame in frames_of(request)] == [15, 21]
    ((_, samples),) = sounds_of(request)
    assert len(samples) == 16000


@pytest.mark.parametrize(
    ("media", "frames", "sounds"),
    [({"frames": 0}, 0, 1), ({"sound": False, "frames": 3}, 3, 0)],
)
def test_either_stream_can_be_left_out(
    root: Path, media: dict[str, Any], frames: int, sounds: int
) -> None:
    with judge_server(lambda *_: Reply()) as server:
        assert ask(judge(server, **media), clip_of(root)) == [GRADES]
    (request,) = server.seen
    assert (len(frames_of(request)), len(sounds_of(request))) == (frames, sounds)


def test_what_cannot_be_shown_is_not_graded_and_costs_no_other(root: Path) -> None:
    with judge_server(lambda *_: Reply()) as server:
        one = judge(server, frames=1)
        outside = clip_of(root, "../clip.mp4")
        found = ask(one, clip_of(root, "broken.mp4"), clip_of(root), outside, None)
        assert found == [None, GRADES, None, None]
        assert len(server.seen) == 1
        counts = {name: one.counts[name] for name in ("bad_clip", "no_clip", "ungraded")}
        assert counts == {"bad_clip": 2, "no_clip": 1, "ungraded": 3}
        small = judge(server, frames=8, max_mb=0.01)
        assert ask(small, clip_of(root)) == [None]
        assert small.counts["clip_too_large"] == 1
        assert len(server.seen) == 1


def test_a_clip_is_decoded_once_and_its_grade_belongs_to_what_was_shown(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmemo.rewards.judge import media

    decoded: list[int] = []
    original = media.DecodePool.map

    def counted(self: Any, jobs: Any) -> Any:
        decoded.append(len(jobs))
        return original(self, jobs)

    monkeypatch.setattr(media.DecodePool, "map", counted)
    with judge_server(lambda *_: Reply()) as server:
        one = judge(server, tmp_path, frames=2)
        assert ask(one, *[clip_of(root)] * 4) == [GRADES] * 4
        assert ask(one, *[clip_of(root)] * 4) == [GRADES] * 4
        assert decoded == [1]  # picture and sound of one file together
        assert one.counts["cached"] == 4
        assert ask(judge(server, tmp_path, frames=1), clip_of(root)) == [GRADES]
        assert len(server.seen) == 5


def test_the_reward_finds_the_clip_of_its_row(root: Path, tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<video><audio>How do they feel?"}],
        "videos": ["clip.mp4"],
        "audios": ["clip.mp4"],
        "label": "angry",
        "start": 1.0,
        "end": 2.0,
    }
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps(row) + "\n" + json.dumps({**row, "videos": ["broken.mp4"]}))
    config = DataConfig(manifests=[str(manifest)], media_root=str(root))
    samples = load_samples(config)
    columns = [columns_of(sample) for sample in samples]
    assert clip_media(columns[0]["media"]) == clip_of(root, start=1.0, end=2.0)
    with judge_server(lambda *_: Reply()) as server:
        media = {"base_url": server.url, "model": "m", "media": {"frames": 2}}
        board = RewardSet(
            [
                RewardConfig(path="reward/reasoning.py:reasoning", params={"judge": media}),
                RewardConfig(path="reward/format.py:tags"),
            ]
        )
        text = f"{THOUGHT}<answer>angry</answer>"
        scores = board.score(
            [prompt_of(sample) for sample in samples],
            [[{"role": "assistant", "content": text}]] * 2,
            [[0]] * 2,
            {name: [column[name] for column in columns] for name in columns[0]},
        )
    assert scores.failures == []
    (graded, tags), (bad, other) = scores.values.tolist()
    assert graded == pytest.approx(14 / 20)
    assert math.isnan(bad)  # the clip cannot be decoded; the row keeps its other reward
    assert tags == other == 1
    assert [frame_number(frame) for frame in frames_of(server.seen[0])] == [15, 21]


def test_the_fields_have_limits_and_a_reward_model_has_none_of_them() -> None:
    base = {"base_url": "http://x/v1", "model": "m"}
    for media in ({"frames": 65}, {"max_side": 8}, {"max_mb": 0}, {"frame": 2}):
        with pytest.raises(ConfigError, match="media"):
            open_judge({**base, "media": media})
    with pytest.raises(ConfigError, match="belongs to an endpoint"):
        open_judge({"model": "m", "media": {"frames": 2}})
