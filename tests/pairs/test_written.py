"""``negatives.level: media``: files that pairs name, and that training reads like other clips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import FaceBox, Modality
from mmemo.errors import ConfigError, DataError
from mmemo.experiments.pipeline import listing
from mmemo.media.clip import DecodedClip, DecodeJob
from mmemo.media.config import DecodeConfig
from mmemo.media.decode import decode
from mmemo.media.perturb import Perturbation, perturb_frames, perturb_sound
from mmemo.pairs.build import run_pairs
from mmemo.pairs.config import PairsConfig
from mmemo.pairs.written import _from  # pyright: ignore[reportPrivateUsage]
from mmemo.run_log import RunRecord
from mmemo.train.dpo.train import run_dpo
from tests.media_files import write_clip
from tests.models.parts import tiny
from tests.train.dpo.tiny import dpo_config

QUESTIONS = {"video": "What does the face show?", "audio": "How is the voice?", "joint": "And all?"}
EMOTIONS = ("happy", "sad", "angry")
CLIPS = 3


def write(folder: Path) -> None:
    """Three clips, and a question about each of picture, sound and both for every clip."""
    rows: list[str] = []
    for number in range(CLIPS):
        name, emotion = f"c{number}.mp4", EMOTIONS[number]
        write_clip(folder / name, seconds=1.0, fps=8, tone=200.0 + 90 * number)
        for query, text in QUESTIONS.items():
            row: dict[str, Any] = {
                "sample_id": f"r{number}-{query}",
                "messages": [
                    {"role": "user", "content": f"<video><audio><face>{text}"},
                    {
                        "role": "assistant",
                        "content": "<think>There are low brows and a loud voice.</think>"
                        f"<answer>{emotion}</answer>",
                    },
                ],
                **{f"{one}s": [name] for one in ("video", "audio", "face")},
                "label": emotion,
                "modality_labels": {"video": emotion, "audio": emotion},
                "cues": {
                    "present": ["low brows", "loud voice"],
                    "absent": ["a smile", "soft voice"],
                    "spurious": ["red cap", "music"],
                },
                "face_boxes": [{"time": 0.0, "box": [10, 10, 80, 80]}],
            }
            rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def config(root: Path, out: str = "pairs", **negatives: Any) -> PairsConfig:
    values: dict[str, Any] = {
        "output_dir": str(root / out),
        "data": {"manifests": [str(root / "rows.jsonl")], "media_root": str(root)},
        "source": {"kind": "truth"},
        "negatives": {"kinds": {"noise": 1}, "level": "media", **negatives},
        "report": {"allow": ["text", "length", "duplicates"]},
        "decode": {"workers": 1},
    }
    return parse(PairsConfig, values)


def pairs_of(path: Path) -> dict[str, Preference]:
    pairs = load_preferences(DataConfig(manifests=[str(path)]))
    return {pair.sample.sample_id.removesuffix("-pair"): pair for pair in pairs}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        one.name: one.read_bytes()
        for one in (folder / "negatives").iterdir()
        if one.suffix in (".mp4", ".mkv", ".wav")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def test_pairs_name_files_that_are_shared_and_made_once(folder: Path) -> None:
    path = run_pairs(config(folder, irrelevant={"noise": 1}))
    pairs = pairs_of(path)
    assert len(pairs) == CLIPS * len(QUESTIONS)
    for pair in pairs.values():
        negative, own = pair.negative, pair.sample.media
        assert negative is not None
        assert (negative.kind, negative.feature_level) == ("noise", False)
        for modality, ref in negative.media.items():
            assert (folder / ref.path).is_file()
            assert ref.path.startswith("negatives/")
            assert ref.face_boxes == own[modality].face_boxes
        assert len({ref.path for ref in negative.media.values()}) == 1
        assert (pair.irrelevant is None) == (pair.query == "joint")
        if pair.irrelevant is not None:
            assert set(pair.irrelevant.media) == set(own) - set(negative.media)
    # The noisy sound that is a negative of one question is the irrelevant one of another.
    first, second = pairs["r0-audio"], pairs["r0-video"]
    assert first.negative is not None
    assert second.irrelevant is not None
    assert first.negative.media == second.irrelevant.media
    made = files_of(folder)
    assert len(made) == 3 * CLIPS
    report = json.loads((folder / "pairs/report.json").read_text())
    assert report["cells"]["negative"]["audio: noise (file)"] == CLIPS
    # Another run finds them all; a changed setting does not.
    times = {one: one.stat().st_mtime_ns for one in (folder / "negatives").glob("*.m??")}
    again = run_pairs(config(folder, "again", irrelevant={"noise": 1}))
    assert again.read_bytes() == path.read_bytes()
    assert {one: one.stat().st_mtime_ns for one in times} == times
    run_pairs(config(folder, "other", irrelevant={"noise": 1}, snr_db=5.0))
    assert files_of(folder).keys() > made.keys()
    assert {name: data for name, data in files_of(folder).items() if name in made} == made


def test_a_cut_run_goes_on_and_a_damaged_file_is_made_again(folder: Path) -> None:
    path = run_pairs(config(folder))
    made = files_of(folder)
    gone, damaged, kept = sorted(made)[:3]
    (folder / "negatives" / gone).unlink()
    (folder / "negatives" / damaged).write_bytes(made[damaged][:100])
    index = folder / "negatives/index.jsonl"
    index.write_bytes(index.read_bytes()[:-5])
    before = (folder / "negatives" / kept).stat().st_mtime_ns
    assert run_pairs(config(folder, "again")).read_bytes() == path.read_bytes()
    assert files_of(folder) == made
    last = json.loads(index.read_text().splitlines()[-1])
    assert {"file", "sha256", "sources", "streams", "change"} <= last.keys()
    if kept != last["file"]:
        assert (folder / "negatives" / kept).stat().st_mtime_ns == before


def test_files_of_the_folder_are_no_inputs_of_a_pipeline(folder: Path) -> None:
    before = listing(folder)
    run_pairs(config(folder, "pairs"))
    assert (folder / "negatives").is_dir()
    added = {name for name in listing(folder) if name not in before}
    assert added == {"pairs/config.yaml", "pairs/pairs.jsonl", "pairs/report.json"}


def clip_at(folder: Path, pair: Preference, path: str, frames: int = 4) -> DecodedClip:
    sampling = tiny().model.sampling.model_copy(update={"frames": frames})
    want: frozenset[Modality] = frozenset(("video", "audio"))
    return decode(DecodeJob(folder / path, path, want, sampling, DecodeConfig()))


@pytest.mark.parametrize("kind", ["noise", "blurred", "reversed"])
def test_features_of_a_file_are_those_of_the_same_change_in_memory(folder: Path, kind: str) -> None:
    kinds = {kind: 1.0} if kind != "blurred" else {"blurred": 1.0, "noise": 1e-9}
    pair = pairs_of(run_pairs(config(folder, kinds=kinds)))["r0-video"]
    assert pair.negative is not None
    assert pair.negative.kind == kind
    own = clip_at(folder, pair, "c0.mp4")
    every = clip_at(folder, pair, "c0.mp4", frames=8)  # all frames of the file
    written = clip_at(folder, pair, pair.negative.media["video"].path)
    assert every.frames is not None
    assert every.times is not None
    assert own.times is not None
    change = Perturbation(kind, pair.negative.seed)
    worse = np.asarray(perturb_frames(list(every.frames), change, "a"))
    at = [int(np.argmin(np.abs(every.times - time))) for time in own.times]
    memory = replace(own, frames=worse[at])
    backbone = tiny().model
    features = [x["x"] for x in backbone.encode("video", [own, memory, written])]
    original, expected, found = features
    change_size = (expected - original).norm()
    assert (found - expected).norm() < 0.15 * change_size
    # What is not asked about is the same sound, so its features are the same numbers.
    sounds: list[Mapping[str, Tensor]] = backbone.encode("audio", [own, written])
    assert sounds[0]["x"].equal(sounds[1]["x"])


def test_features_of_a_noisy_sound_file(folder: Path) -> None:
    pair = pairs_of(run_pairs(config(folder, snr_db=3.0)))["r1-audio"]
    assert pair.negative is not None
    path = pair.negative.media["audio"].path
    own, written = clip_at(folder, pair, "c1.mp4"), clip_at(folder, pair, path)
    # The file has the noise at its own rate, and memory at the model's.
    sampling = tiny().model.sampling.model_copy(update={"sample_rate": 44100})
    full = decode(
        DecodeJob(folder / "c1.mp4", "c1", frozenset(("audio",)), sampling, DecodeConfig())
    )
    assert full.waveform is not None
    worse = perturb_sound(
        full.waveform, 44100, Perturbation("noise", pair.negative.seed, snr_db=3.0), "a"
    )
    found = decode(DecodeJob(folder / path, path, frozenset(("audio",)), sampling, DecodeConfig()))
    assert found.waveform == pytest.approx(worse, abs=1e-4)
    backbone = tiny().model
    first, second = (x["x"] for x in backbone.encode("video", [own, written]))
    assert first.equal(second)
    first, second = (x["x"] for x in backbone.encode("audio", [own, written]))
    assert not first.equal(second)


def test_another_clips_stream_is_a_file_with_this_clips_rest_and_counts_as_a_leak(
    folder: Path,
) -> None:
    path = run_pairs(config(folder, kinds={"different_label": 1}))
    pairs = pairs_of(path)
    for name, pair in pairs.items():
        assert pair.negative is not None
        for ref in pair.negative.media.values():
            # Where nothing of the clip is left, the other clip serves as it is.
            assert ref.path.startswith("negatives/") == (pair.query != "joint"), name
    index = (folder / "negatives/index.jsonl").read_text().splitlines()
    made = {json.loads(line)["file"]: json.loads(line) for line in index}
    negative = pairs["r0-audio"].negative
    assert negative is not None
    row = made[negative.media["audio"].path.removeprefix("negatives/")]
    donor, base = row["sources"]
    assert (base, row["change"], row["streams"]) == ("c0.mp4", None, ["audio"])
    mixed = clip_at(folder, pairs["r0-audio"], negative.media["audio"].path)
    own, other = (clip_at(folder, pairs["r0-audio"], one) for one in ("c0.mp4", donor))
    assert np.array_equal(mixed.frames, own.frames)
    assert np.array_equal(mixed.waveform, other.waveform)
    # The donor is an evaluation clip: the pair leaks it, although it does not name it.
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "one.jsonl").write_text(next(x for x in lines if '"r0-audio"' in x) + "\n")
    (folder / "test.jsonl").write_text(next(x for x in lines if donor in x) + "\n")
    values = config(folder, "leak", kinds={"different_label": 1}).model_dump()
    values["report"] |= {"against": [str(folder / "test.jsonl")]}
    values["queries"] = ["audio"]
    with pytest.raises(DataError, match="share a clip with an evaluation set"):
        run_pairs(parse(PairsConfig, values))
    report = json.loads((folder / "leak/report.json").read_text())
    assert report["leaks"]["clip"] == 2  # the donor's own pair and the one that borrows


def test_a_file_that_cannot_be_written_leaves_its_pair_without_a_negative(folder: Path) -> None:
    write_clip(folder / "c2.mp4", seconds=0.125, fps=8)  # one frame, which has no other order
    kinds = {"frozen_frame": 1.0, "noise": 1e-9}
    pairs = pairs_of(run_pairs(config(folder, kinds=kinds, irrelevant={"noise": 1})))
    assert pairs["r2-video"].negative is None
    assert pairs["r2-video"].irrelevant is not None
    assert pairs["r1-video"].negative is not None
    report = json.loads((folder / "pairs/report.json").read_text())
    assert report["without"]["negative"] == 1
    assert report["given_up"]["frozen_frame"] == 1
    (told,) = RunRecord(folder / "pairs").events("negative_not_written")
    assert "changes nothing in one frame" in told["detail"]


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ({"kinds": {"blurred": 1, "noise": 1}, "level": "features"}, "set level: media"),
        ({"irrelevant": {"cropped": 1}, "level": "features"}, "set level: media"),
        ({"folder": "../elsewhere"}, "inside data.media_root"),
        ({"folder": "/tmp/x"}, "inside data.media_root"),
        ({"crop_scale": [0.5, 0.1]}, "the smaller one first"),
        ({"kinds": {"blured": 1}}, "did you mean 'blurred'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    tmp_path: Path, negatives: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **negatives)


def test_a_preference_run_reads_the_files(folder: Path) -> None:
    path = run_pairs(config(folder, kinds={"noise": 1, "different_label": 1}))
    term = {"kind": "avem_dpo"}
    run_dpo(dpo_config(path.parent, folder / "run", term, data={"media_root": str(folder)}))
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["avem_dpo/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert json.loads(lines[-1])["step"] == 4


def test_boxes_of_a_span_count_from_its_start() -> None:
    boxes = tuple(FaceBox(time, (0, 0, time + 1, 1)) for time in (0.0, 1.0, 2.0, 3.0))
    moved = _from(boxes, 1.5)
    assert [(box.time, box.box[2]) for box in moved] == [(0.0, 2.0), (0.5, 3.0), (1.5, 4.0)]
    assert _from(boxes, 0.0) == boxes
