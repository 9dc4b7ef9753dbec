"""Filling the store, leaving out bad clips, and reading features back."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmemo.data.sample import FaceBox, MediaRef, Sample, Turn
from mmemo.errors import ConfigError, DataError, MediaError, TrainingError
from mmemo.features import ingest, source
from mmemo.features.encode import FeatureSource, ensure_features, feature_key, forecast
from mmemo.features.face_crops import CropCache
from mmemo.features.ingest import IngestReport
from mmemo.features.keys import Digests, Identifier, MemoryMap, sampling_part
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.media import decode as decode_module
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode_pool import DecodePool
from mmemo.run_log import RunRecord
from tests.features.tiny_backbone import (
    Refusing,
    TinyBackbone,
    boxed,
    local_pool,
    sample,
)
from tests.media.slow_decode import LOG
from tests.media.sound_files import write_channels
from tests.media_files import sine, write_clip

LIMITS = DecodeConfig(workers=1, max_bad_share=1.0, backend="pyav")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_clip(
            folder / f"{number}.mp4",
            seconds=1.0 + 0.2 * number,
            size=(64, 64),
            tone=200.0 + 40 * number,
        )
    write_clip(folder / "silent.mp4", seconds=1.0, size=(64, 64), audio=False)
    write_clip(folder / "sound.m4a", seconds=1.0, video=False)
    return folder


@pytest.fixture
def media(clips, tmp_path) -> Path:
    return Path(shutil.copytree(clips, tmp_path / "media"))


@pytest.fixture
def jobs(monkeypatch):
    """Decode in this process, and say what was decoded."""
    seen = []
    monkeypatch.setattr(ingest, "DecodePool", local_pool(seen))
    monkeypatch.setattr(source, "DecodePool", local_pool(seen))
    monkeypatch.setattr("mmemo.features.forecast.DecodePool", local_pool(seen))
    return seen


def open_at(path: Path, **settings) -> FeatureStore:
    return FeatureStore(StoreConfig(path=str(path), **settings))


def ensure(samples, backbone, store, media, out, **more):
    return ensure_features(
        samples,
        backbone,
        store,
        media_root=media,
        limits=more.pop("limits", LIMITS),
        record=RunRecord(out),
        out_dir=out,
        **more,
    )


GOOD = [sample(f"{number}.mp4") for number in range(5)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_clip_is_decoded_once_for_all_its_modalities_and_rows(media, tmp_path, jobs):
    rows = [*GOOD, sample("0.mp4", "audio"), sample("0.mp4", "video", "face")]
    backbone = TinyBackbone()
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, backbone, store, media, tmp_path / "out")
    assert report.kept == rows
    assert [job.want for job in jobs] == [frozenset({"video", "audio", "face"})] * 5
    assert (report.clips, report.new, report.reused, report.bad) == (5, 15, 0, [])
    with open_at(tmp_path / "store") as store:
        again = ensure(rows, backbone, store, media, tmp_path / "out")
        assert report.bytes == sum(
            tensor.nbytes
            for row in GOOD
            for features in FeatureSource(rows, backbone, store, media, LIMITS).get(row).values()
            for tensor in features.values()
        )
    assert (again.new, again.reused, len(jobs)) == (0, 15, 5)
    assert len(backbone.encoded) == 15


def test_spans_of_one_file_are_features_of_their_own(media, tmp_path, jobs):
    rows = [
        sample("4.mp4", "audio", sample_id="whole"),
        sample("4.mp4", "audio", sample_id="a", start=0.0, end=0.5),
        sample("4.mp4", "audio", sample_id="b", start=0.5, end=1.0),
    ]
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
        get = FeatureSource(rows, TinyBackbone(), store, media, LIMITS).get
        whole, a, b = (get(row)["audio"]["x"] for row in rows)
    assert report.new == report.clips == 3
    assert len(a) == len(b) == 25
    assert torch.equal(whole[:25], a)
    assert not torch.equal(a, b)


def bad_media(media: Path) -> list:
    (media / "empty.mp4").write_bytes(b"")
    (media / "page.mp4").write_text("<!DOCTYPE html><html><body>403 Forbidden</body></html>")
    data = (media / "3.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(data[: len(data) // 3])
    names = ["empty.mp4", "page.mp4", "cut.mp4", "absent.mp4", "../out.mp4", "silent.mp4"]
    return [sample(name, sample_id=name) for name in names]


def test_bad_clips_are_named_recorded_and_left_out_in_order(media, tmp_path, jobs):
    bad = bad_media(media)
    rows = [
        row for pair in zip([*GOOD, sample("sound.m4a", "audio")], bad, strict=True) for row in pair
    ]
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
    assert report.kept == [*GOOD, sample("sound.m4a", "audio")]
    listed = rows_of(tmp_path / "out" / "bad_clips.jsonl")
    assert [row["path"] for row in listed] == [row.sample_id for row in bad]
    assert [row["sample_ids"] for row in listed] == [[row.sample_id] for row in bad]
    kinds = {row["path"]: row["kind"] for row in listed}
    assert kinds["empty.mp4"] == "empty"
    assert kinds["page.mp4"] == "not_media"
    assert kinds["absent.mp4"] == "missing"
    assert kinds["../out.mp4"] == "outside_root"
    assert kinds["silent.mp4"] == "no_audio"
    assert "cut.mp4" in kinds
    (event,) = RunRecord(tmp_path / "out").events("ingest")
    assert event["bad"] == report.kinds
    assert sum(event["bad"].values()) == 6
    assert (event["rows"], event["rows_left_out"], event["clips"]) == (12, 6, 12)
    events = RunRecord(tmp_path / "out").events("bad_clip")
    assert [(e["path"], e["reason"], e["detail"], e["sample_ids"]) for e in events] == [
        (row["path"], row["kind"], row["detail"], row["sample_ids"]) for row in listed
    ]


def test_a_stream_that_fails_does_not_take_the_others_with_it(media, tmp_path, jobs):
    rows = [
        sample("silent.mp4", "video", "audio", sample_id="needs sound"),
        sample("silent.mp4", "video", "face", sample_id="frames are enough"),
        sample("sound.m4a", sample_id="needs frames"),
        sample("sound.m4a", "audio", sample_id="sound is enough"),
    ]
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
    assert [row.sample_id for row in report.kept] == ["frames are enough", "sound is enough"]
    assert {clip.path: clip.kind for clip in report.bad} == {
        "silent.mp4": "no_audio",
        "sound.m4a": "no_video",
    }


def test_too_large_a_share_of_bad_clips_stops_the_run(media, tmp_path, jobs):
    rows = [*GOOD[:2], *bad_media(media)[:2]]
    limits = LIMITS.model_copy(update={"max_bad_share": 0.4})
    with open_at(tmp_path / "store") as store, pytest.raises(TrainingError) as caught:
        ensure(rows, TinyBackbone(), store, media, tmp_path / "out", limits=limits)
    message = str(caught.value)
    for part in ("2 of 4", "50.0%", "40.0%", "empty.mp4: empty", "page.mp4", "bad_clips.jsonl"):
        assert part in message
    assert len(rows_of(tmp_path / "out" / "bad_clips.jsonl")) == 2
    with open_at(tmp_path / "store") as store:
        limits = LIMITS.model_copy(update={"max_bad_share": 0.5})
        assert (
            len(ensure(rows, TinyBackbone(), store, media, tmp_path / "out", limits=limits).kept)
            == 2
        )


def test_known_bad_clips_are_not_tried_again_until_something_changes(media, tmp_path, jobs):
    rows = [sample("silent.mp4", "audio"), sample("0.mp4", "audio")]
    backbone = TinyBackbone()

    def tried(**more) -> list[str]:
        jobs.clear()
        with open_at(tmp_path / "store") as store:
            ensure(rows, backbone, store, media, tmp_path / "out", **more)
        return [job.name for job in jobs]

    assert tried() == ["silent.mp4", "0.mp4"]
    assert tried() == []
    assert tried(limits=LIMITS.model_copy(update={"timeout": 90.0})) == ["silent.mp4"]
    backbone = TinyBackbone(weight=2.0)  # another tower: known without decoding
    assert tried() == ["0.mp4"]
    shutil.copy(media / "1.mp4", media / "silent.mp4")
    assert tried() == ["silent.mp4"]
    assert rows_of(tmp_path / "out" / "bad_clips.jsonl") == []


def test_a_clip_that_times_out_is_paid_for_once(media, tmp_path, monkeypatch):
    """Real workers, really killed."""
    shutil.copy(media / "0.mp4", media / "slow.mp4")
    (media / "slow.mp4").write_bytes((media / "slow.mp4").read_bytes() + b"\0\0\0\x08free")
    log = tmp_path / "log"
    monkeypatch.setenv(LOG, str(log))
    monkeypatch.setattr(
        ingest,
        "DecodePool",
        lambda limits: DecodePool(limits, target="tests.media.slow_decode:slow_decode"),
    )
    limits = LIMITS.model_copy(update={"timeout": 3.0})
    rows = [sample("slow.mp4", "audio"), sample("1.mp4", "audio")]

    def run(out: str, limits: DecodeConfig = limits) -> IngestReport:
        with open_at(tmp_path / "store") as store:
            return ensure(rows, TinyBackbone(), store, media, tmp_path / out, limits=limits)

    for _ in range(2):  # a run that is resumed leaves out the same rows
        report = run("out")
        assert report.kinds == {"timeout": 1}
        assert report.kept == rows[1:]
        assert sorted(log.read_text().splitlines()) == ["1.mp4 audio", "slow.mp4 audio"]
    # The machine may be free again when another run comes, or this one is started anew.
    (media / "slow.mp4").rename(media / "moved.mp4")
    rows[0] = sample("moved.mp4", "audio")
    assert run("other").kept == rows
    assert run("out").kept == rows[1:]
    strict = limits.model_copy(update={"max_bad_share": 0.1})
    with pytest.raises(TrainingError, match=r"tried again by the next run"):
        run("out", strict)
    assert run("out", strict).kept == rows


def values(rows, backbone, store, media, **more) -> list[dict]:
    with FeatureSource(rows, backbone, store, media, LIMITS, **more) as found:
        return [found.get(row) for row in rows]


def identical(one: list[dict], two: list[dict]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[m][n], b[m][n]) for m in a for n in a[m])
        for a, b in zip(one, two, strict=True)
    )


def test_the_off_switch_changes_no_bit(media, tmp_path):
    """Stored, decoded in a worker, decoded here: the same features."""
    backbone = TinyBackbone()
    rows = GOOD[:3]
    with open_at(tmp_path / "store") as store:
        ensure(rows, backbone, store, media, tmp_path / "out")
        count = len(backbone.encoded)
        stored = values(rows, backbone, store, media)
        assert len(backbone.encoded) == count
    assert identical(stored, values(rows, backbone, None, media, isolate=False))
    assert len(backbone.encoded) == count + 9
    assert identical(stored, values(rows, backbone, None, media, isolate=True))


def test_without_a_store_every_get_encodes_and_bad_rows_are_left_out_all_the_same(
    media, tmp_path, jobs
):
    bad = bad_media(media)
    backbone = TinyBackbone()
    report = ensure([*GOOD, *bad], backbone, None, media, tmp_path / "out")
    assert report.kept == GOOD
    assert len(report.bad) == 6
    assert backbone.encoded == []
    with FeatureSource(GOOD, backbone, None, media, LIMITS) as found:
        for _ in range(2):
            found.get(GOOD[0])
    assert len(backbone.encoded) == 6


def test_a_changed_file_never_gives_the_old_features(media, tmp_path, jobs):
    backbone = TinyBackbone()
    rows = [GOOD[0]]
    target = media / "0.mp4"
    with open_at(tmp_path / "store") as store:
        ensure(rows, backbone, store, media, tmp_path / "out")
        found = FeatureSource(rows, backbone, store, media, LIMITS)
        old = found.get(rows[0])
        status = target.stat()
        # Same name, same size, same modification time: other sound.
        write_clip(target, seconds=1.0, size=(64, 64), tone=500.0)
        grown = target.read_bytes()
        assert len(grown) <= status.st_size + 4000
        target.write_bytes(grown + b"\0" * max(0, status.st_size - len(grown)))
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        new = found.get(rows[0])
        assert not torch.equal(old["audio"]["x"], new["audio"]["x"])
        assert identical([new], values(rows, backbone, None, media))
        target.unlink()
        with pytest.raises(MediaError, match="missing"):
            found.get(rows[0])


def test_a_changed_tower_or_sampling_never_gives_the_old_features(media, tmp_path, jobs):
    rows = GOOD[:1]
    changes = [
        ({}, 3),
        ({"weight": 2.0}, 3),
        ({"frames": 6}, 2),  # sound does not depend on the number of frames
        ({"sample_rate": 8000}, 1),
        ({}, 0),
    ]
    with open_at(tmp_path / "store") as store:
        for change, new in changes:
            backbone = TinyBackbone(**change)
            report = ensure(rows, backbone, store, media, tmp_path / "out")
            assert report.new == new, change
            stored = values(rows, backbone, store, media)
            assert identical(stored, values(rows, backbone, None, media)), change


def test_face_boxes_are_part_of_a_face_and_of_nothing_else(media, tmp_path, jobs):
    backbone = TinyBackbone()
    face = backbone.sampling.face.model_copy(update={"detector": "boxes"})
    backbone.sampling = backbone.sampling.model_copy(update={"face": face})
    rows = [
        boxed("0.mp4", 2.0),
        boxed("0.mp4", 20.0),
        sample("0.mp4", "audio"),
        boxed("0.mp4", 2.0),
    ]
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, backbone, store, media, tmp_path / "out")
        assert report.new == 3
        one, two, _, three = values(rows, backbone, store, media)
    assert not torch.equal(one["face"]["x"], two["face"]["x"])
    assert torch.equal(one["face"]["x"], three["face"]["x"])
    bare = replace(sample("1.mp4", "video", "face", sample_id="bare"), source=("rows.jsonl", 7))
    with open_at(tmp_path / "store") as store, pytest.raises(DataError) as caught:
        ensure([*rows, bare], backbone, store, media, tmp_path / "out")
    assert str(caught.value).startswith(
        "rows.jsonl:7: field 'face_boxes': is missing in row 'bare'"
    )


def test_another_face_tower_needs_no_decoding(media, tmp_path, jobs):
    """The crops are kept: neither decoded nor detected again, and the same to the bit."""
    rows = [sample("0.mp4", "face"), sample("1.mp4"), sample("2.mp4", "face", start=0.2, end=0.8)]
    with open_at(tmp_path / "store") as store:
        ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
        assert store.crops is not None
        assert store.crops.stats().features == 3
        jobs.clear()
        other = TinyBackbone(weight=2.0)
        report = ensure(rows, other, store, media, tmp_path / "out")
        assert [(job.name, job.want) for job in jobs] == [("1.mp4", {"video", "audio"})]
        assert (report.new, report.kept, report.bad) == (5, rows, [])
        stored = values(rows, other, store, media)
        jobs.clear()
        third = TinyBackbone(weight=3.0)
        made = values(rows, third, store, media)  # without having been filled
        assert [(job.name, job.want) for job in jobs] == [("1.mp4", {"video", "audio"})]
        jobs.clear()
        smaller = TinyBackbone(frames=3)
        ensure(rows, smaller, store, media, tmp_path / "out")
        assert [job.want for job in jobs] == [{"face"}, {"video", "face"}, {"face"}]
    assert identical(stored, values(rows, other, None, media))
    assert identical(made, values(rows, third, None, media))


def test_crops_can_be_switched_off_and_are_bounded(media, tmp_path, jobs):
    rows = [sample(f"{number}.mp4", "face") for number in range(5)]
    with open_at(tmp_path / "off", crops_gb=0) as store:
        ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
        ensure(rows, TinyBackbone(weight=2.0), store, media, tmp_path / "out")
    assert len(jobs) == 10
    assert not (tmp_path / "off" / "crops").exists()
    jobs.clear()
    with open_at(tmp_path / "small", crops_gb=40e3 / 1e9) as store:  # 12.3 kB each
        ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
        report = ensure(rows, TinyBackbone(weight=2.0), store, media, tmp_path / "out")
        assert report.new == 5
        assert store.crops is not None
        assert 0 < store.crops.stats().bytes <= 40e3
        assert not store.full
    assert len(jobs) > 5


def test_crops_of_a_replaced_file_are_not_used(media, tmp_path, monkeypatch):
    """The file changes after it was hashed, when its old crops have been found."""
    pool = local_pool([])

    class Swapping(pool):
        def map(self, jobs):
            for job in jobs:
                shutil.copy(media / "4.mp4", media / "0.mp4")
                yield from super().map([job])

    monkeypatch.setattr(ingest, "DecodePool", pool)
    other = TinyBackbone(weight=2.0)
    with open_at(tmp_path / "store") as store:
        ensure(GOOD[:1], TinyBackbone(), store, media, tmp_path / "out")
        monkeypatch.setattr(ingest, "DecodePool", Swapping)
        report = ensure(GOOD[:1], other, store, media, tmp_path / "out")
        assert (report.kept, report.new) == (GOOD[:1], 3)
        monkeypatch.setattr(ingest, "DecodePool", None)
        stored = values(GOOD[:1], other, store, media)
    assert identical(stored, values([sample("4.mp4")], other, None, media, isolate=False))


def test_odd_sounds_are_counted_and_said(media, tmp_path, jobs, capsys):
    tone = sine(1, 16000, 220)
    write_channels(media / "opposite.wav", [tone, -tone], "stereo")
    write_channels(media / "still.wav", [0 * tone], "mono")
    rows = [sample(name, "audio") for name in ("opposite.wav", "still.wav", "0.mp4")]
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, TinyBackbone(), store, media, tmp_path / "out")
        assert report.kept == rows
        assert report.notes == {"opposite phase": 1, "silent": 1}
    event = RunRecord(tmp_path / "out").events("ingest")[-1]
    assert event["notes"] == report.notes
    assert "Odd sounds: 1 opposite phase, 1 silent; mmemo check --probe" in capsys.readouterr().out


def test_frames_without_a_face_are_counted(media, tmp_path, jobs):
    """Also of clips that were encoded before. The crops say which frames these are."""
    backbone = TinyBackbone()
    face = backbone.sampling.face.model_copy(update={"detector": "boxes", "max_gap": 0.2})
    backbone.sampling = backbone.sampling.model_copy(update={"face": face})
    rows = [boxed("0.mp4", 2.0), boxed("1.mp4", 2.0)]  # a box at 0 s, near the first frame
    near = FaceBox(0.125, (2.0, 10.0, 42.0, 50.0))
    rows.append(
        Sample("near", (Turn("user", "?"),), {"face": MediaRef("0.mp4", None, None, (near,))})
    )
    with open_at(tmp_path / "store") as store:
        for _ in range(2):
            report = ensure(rows, backbone, store, media, tmp_path / "out")
            assert (report.face_frames, report.faceless) == (12, 9)
        event = RunRecord(tmp_path / "out").events("ingest")[-1]
        assert (event["face_frames"], event["frames_without_a_face"]) == (12, 9)
        found = Identifier(backbone, media, LIMITS, Digests(MemoryMap()))
        (span,) = found.spans(rows[2]).values()
        stream = found.stream("face", span)
        clip = CropCache(store).find([stream])
        plain = decode_module.decode(found.job(span, [stream]))
    assert clip is not None
    assert plain.faces is not None
    assert clip.faces is not None
    assert clip.faces.found.tolist() == [True, False, False, False]
    assert (clip.faces.colour, clip.faces.detector) == ("RGB", "boxes")
    for name in ("crops", "found", "scores"):
        one, two = getattr(clip.faces, name), getattr(plain.faces, name)
        assert one.dtype == two.dtype
        assert (one == two).all()
    assert (clip.digest, clip.duration, clip.name) == (plain.digest, plain.duration, plain.name)
    assert (clip.times == plain.times).all()


def with_detector(model: str) -> SamplingConfig:
    sampling = TinyBackbone().sampling
    face = sampling.face.model_copy(update={"detector": "yunet", "model": model})
    return sampling.model_copy(update={"face": face})


def test_a_detector_file_is_known_by_its_content(tmp_path, monkeypatch):
    """However it is named: a path, one from the home folder, a file of a hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "hub.onnx"))
    names = [str(tmp_path / "home.onnx"), "~/home.onnx", "some/repo:face.onnx"]
    seen = []
    for content in (b"one", b"two"):
        for file in ("home.onnx", "hub.onnx"):
            (tmp_path / file).write_bytes(content)
        parts = {sampling_part("face", with_detector(name)) for name in names}
        assert len(parts) == 1
        seen += parts
    assert len(set(seen)) == 2
    with pytest.raises(ConfigError, match=r"face\.model.*set face\.model to"):
        sampling_part("face", with_detector("~/none.onnx"))
    # What is hashed is what the workers load.
    backbone = TinyBackbone()
    backbone.sampling = with_detector("some/repo:face.onnx")
    write_clip(tmp_path / "a.mp4", seconds=0.5)
    found = Identifier(backbone, tmp_path, LIMITS, Digests(MemoryMap()))
    (span,) = found.spans(sample("a.mp4", "face")).values()
    job = found.job(span, [found.stream("face", span)])
    assert job.sampling.face.model == str(tmp_path / "hub.onnx")


def test_a_detector_that_is_not_needed_is_not_looked_for(tmp_path):
    backbone = TinyBackbone()
    backbone.sampling = with_detector("none/there:face.onnx")
    write_clip(tmp_path / "a.mp4", seconds=0.5)
    found = Identifier(backbone, tmp_path, LIMITS, Digests(MemoryMap()))
    for modality, span in found.spans(sample("a.mp4", "video", "audio")).items():
        assert found.job(span, [found.stream(modality, span)]).name == "a.mp4"


def test_every_part_of_a_key_counts():
    parts = ("d" * 64, 0.0, 1.0, "part", "print")
    changed = [
        ("e" * 64, *parts[1:]),
        (parts[0], 0.5, *parts[2:]),
        (*parts[:2], None, *parts[3:]),
        (*parts[:3], "other", parts[4]),
        (*parts[:4], "other"),
    ]
    keys = {feature_key(*parts), *(feature_key(*other) for other in changed)}
    assert len(keys) == 6
    assert feature_key(parts[0], None, *parts[2:]) == feature_key(*parts)


def test_digests_follow_the_bytes_even_within_a_clock_tick(tmp_path):
    path = tmp_path / "file"
    digests = Digests(MemoryMap())
    seen = set()
    for number in range(200):  # same size each time, far faster than the clock's step
        path.write_bytes(b"%03d" % number)
        seen.add(digests.of(path))
    assert len(seen) == 200


def test_old_files_are_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr("mmemo.features.keys._RACY_NS", -1)
    calls = []
    monkeypatch.setattr("mmemo.features.keys.sha256", lambda p: calls.append(p) or "digest")
    digests = Digests(MemoryMap())
    assert [digests.of(path) for _ in range(3)] == ["digest"] * 3
    assert len(calls) == 1
    path.chmod(0o600)  # only the change time moves
    digests.of(path)
    assert len(calls) == 2


def test_damage_and_eviction_under_a_running_source_are_made_good(media, tmp_path, jobs):
    backbone = TinyBackbone()
    want = values(GOOD, backbone, None, media)
    with open_at(tmp_path / "store") as store:
        ensure(GOOD, backbone, store, media, tmp_path / "out")
        found = FeatureSource(GOOD, backbone, store, media, LIMITS, memory_mb=0)
        assert identical(want, [found.get(row) for row in GOOD])
        (path,) = (tmp_path / "store" / "shards").iterdir()
        data = bytearray(path.read_bytes())
        # Every feature, because they are in the order of their keys, and the first read must fail.
        for at in range(8 + int.from_bytes(data[:8], "little"), len(data), 8):
            data[at] ^= 4
        path.write_bytes(bytes(data))
        jobs.clear()
        assert identical(want, found.get_many(GOOD))
        assert len(jobs) == 5
        assert store.stats().damaged == (str(path),)
        found.close()
        assert identical(want, [found.get(row) for row in GOOD])
        assert len(jobs) == 5


def test_a_budget_smaller_than_the_epoch_still_serves_all_of_it(media, tmp_path, jobs):
    backbone = TinyBackbone()
    want = values(GOOD, backbone, None, media)
    jobs.clear()
    budget = 6000 / 1e9
    for _ in range(2):
        with open_at(tmp_path / "store", shard_mb=0.001, budget_gb=budget) as store:
            report = ensure(GOOD, backbone, store, media, tmp_path / "out")
            assert report.kept == GOOD
            assert store.stats().bytes <= 6000
            assert store.stats().features > 0
            with FeatureSource(GOOD, backbone, store, media, LIMITS, memory_mb=0) as found:
                for _ in range(2):
                    assert identical(want, [found.get(row) for row in GOOD])
            assert store.stats().evicted == 0


def test_a_tower_that_refuses_or_gives_nan_makes_a_bad_clip_for_that_tower(media, tmp_path, jobs):
    tower = Refusing()
    tower.refused, tower.broken = frozenset({"1.mp4"}), frozenset({"3.mp4"})
    with open_at(tmp_path / "store") as store:
        report = ensure(GOOD, tower, store, media, tmp_path / "out")
        assert [row.sample_id[0] for row in report.kept] == ["0", "2", "4"]
        assert [clip.path for clip in report.bad] == ["1.mp4", "3.mp4"]
        assert "not finite" in report.bad[1].detail
        jobs.clear()
        again = ensure(GOOD, tower, store, media, tmp_path / "out")
        assert (again.bad, jobs) == (report.bad, [])
        other = ensure(GOOD, TinyBackbone(weight=3.0), store, media, tmp_path / "out")
        assert other.bad == []


def test_a_modality_without_a_branch_is_an_error_of_the_row(media, tmp_path, jobs):
    row = sample("0.mp4")
    with open_at(tmp_path / "store") as store, pytest.raises(DataError, match=r"data\.modalities"):
        ensure([row], TinyBackbone(modalities=("audio",)), store, media, tmp_path / "out")


def test_a_file_that_changes_between_hash_and_decode_is_keyed_by_what_was_decoded(
    media, tmp_path, monkeypatch
):
    seen = []
    pool = local_pool(seen)

    class Swapping(pool):
        def map(self, jobs):
            for job in jobs:
                if not seen:
                    shutil.copy(media / "4.mp4", media / "0.mp4")
                yield from super().map([job])

    monkeypatch.setattr(ingest, "DecodePool", Swapping)
    with open_at(tmp_path / "store") as store:
        report = ensure(GOOD[:1], TinyBackbone(), store, media, tmp_path / "out")
        assert (report.kept, report.new) == (GOOD[:1], 3)
        stored = values(GOOD[:1], TinyBackbone(), store, media)
    assert len(seen) == 1
    assert identical(stored, values([sample("4.mp4")], TinyBackbone(), None, media, isolate=False))


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_goes_on_changing_or_goes_is_a_bad_clip(media, tmp_path, monkeypatch, gone):
    pool = local_pool([])

    class Swapping(pool):
        """The file changes after it was hashed and again after it was decoded."""

        def map(self, jobs):
            for job in jobs:
                if job.name != "0.mp4":
                    yield from super().map([job])
                    continue
                shutil.copy(media / "4.mp4", media / "0.mp4")
                results = list(super().map([job]))
                (media / "0.mp4").unlink()
                if not gone:
                    shutil.copy(media / "3.mp4", media / "0.mp4")
                yield from results

    monkeypatch.setattr(ingest, "DecodePool", Swapping)
    for _ in range(2):  # also when the run is resumed, with the file whole again
        with open_at(tmp_path / "store") as store:
            report = ensure(GOOD, TinyBackbone(), store, media, tmp_path / "out")
            assert report.kept == GOOD[1:]
            assert report.kinds == {"missing" if gone else "changed": 1}
            assert store.stats().features == 12
        monkeypatch.setattr(ingest, "DecodePool", pool)
    with open_at(tmp_path / "store") as store:
        shutil.copy(media / "3.mp4", media / "0.mp4")
        again = ensure(GOOD, TinyBackbone(), store, media, tmp_path / "another")
        assert again.kept == GOOD
        stored = values(GOOD, TinyBackbone(), store, media)
    assert identical(stored, values(GOOD, TinyBackbone(), None, media, isolate=False))


def test_a_swap_while_a_file_is_read_stores_nothing_of_the_old_one(
    media, tmp_path, monkeypatch, jobs
):
    monkeypatch.setattr(decode_module, "_scans", deque())
    scan = decode_module.scan_packets
    swaps = []

    def swap(container, name, *rest):
        found = scan(container, name, *rest)
        if name == "0.mp4" and len(swaps) < 2:
            swaps.append(name)
            write_clip(media / "new.mp4", seconds=1.0, size=(64, 64), tone=500.0 + len(swaps))
            (media / "new.mp4").replace(media / "0.mp4")
        return found

    monkeypatch.setattr(decode_module, "scan_packets", swap)
    with open_at(tmp_path / "store") as store:
        report = ensure(GOOD, TinyBackbone(), store, media, tmp_path / "out")
        assert (report.kinds, report.kept) == ({"changed": 1}, GOOD[1:])
        with (
            FeatureSource(GOOD, TinyBackbone(), store, media, LIMITS) as found,
            pytest.raises(MediaError, match="changed"),
        ):
            found.get(GOOD[0])
        stored = values(GOOD, TinyBackbone(), store, media)
    assert len(swaps) == 2
    assert identical(stored, values(GOOD, TinyBackbone(), None, media, isolate=False))


def test_reading_ahead_gives_the_same_features(media, tmp_path, jobs):
    backbone = TinyBackbone()
    want = values(GOOD, backbone, None, media)
    with open_at(tmp_path / "store") as store:
        ensure(GOOD, backbone, store, media, tmp_path / "out")
        for held in (store, None):
            with FeatureSource(GOOD, backbone, held, media, LIMITS) as found:
                found.prefetch(GOOD)
                assert identical(want, [found.get(row) for row in GOOD])
                found.prefetch([sample("0.mp4"), sample("absent.mp4")])
                assert identical(want[:1], [found.get(GOOD[0])])
                with pytest.raises(MediaError, match="missing"):
                    found.get(sample("absent.mp4"))


def test_memory_keeps_the_features_used_last(media, tmp_path, jobs):
    backbone = TinyBackbone()
    with open_at(tmp_path / "store") as store:
        ensure(GOOD, backbone, store, media, tmp_path / "out")
        found = FeatureSource(GOOD, backbone, store, media, LIMITS)
        first = found.get(GOOD[0])
        hits = store.stats().hits
        assert found.get(GOOD[0])["video"]["x"] is first["video"]["x"]
        assert store.stats().hits == hits
        small = FeatureSource(GOOD, backbone, store, media, LIMITS, memory_mb=0.001)
        for row in [*GOOD, *GOOD]:
            small.get(row)
        assert store.stats().hits > hits + 15


def test_a_forecast_is_near_and_writes_nothing(media, tmp_path, jobs):
    for number in range(5, 24):
        shutil.copy(media / f"{number % 5}.mp4", media / f"{number}.mp4")
        with (media / f"{number}.mp4").open("ab") as handle:
            handle.write(b"\0\0\0\x09free" + bytes([number]))
    rows = [sample(f"{number}.mp4") for number in range(24)]
    backbone = TinyBackbone()
    before = forecast(rows, backbone, None, media_root=media, limits=LIMITS, probe=8)
    assert (before.clips, before.new, before.known, before.probed) == (24, 72, 0, 8)
    assert len(jobs) == 8
    with open_at(tmp_path / "store") as store:
        report = ensure(rows, backbone, store, media, tmp_path / "out")
        assert store.crops is not None
        assert before.crop_bytes == pytest.approx(store.crops.stats().bytes, rel=0.1)
    assert before.bytes == pytest.approx(report.bytes, rel=0.1)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    store = open_at(tmp_path / "store")
    after = forecast(rows, backbone, store, media_root=media, limits=LIMITS)
    assert (after.new, after.known, after.bytes) == (0, 72, 0)
    other = forecast(rows, TinyBackbone(frames=6), store, media_root=media, limits=LIMITS)
    assert (other.new, other.known) == (48, 24)
    assert other.crop_bytes == pytest.approx(before.crop_bytes * 6 / 4, rel=0.02)
    tower = forecast(rows, TinyBackbone(weight=2.0), store, media_root=media, limits=LIMITS)
    assert (tower.new, tower.crop_bytes) == (72, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == files
