"""``mmemo encode`` on a real tiny model and real files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from mmemo.config import parse
from mmemo.errors import ConfigError, TrainingError
from mmemo.features import ingest
from mmemo.features.encode import EncodeConfig, human_size, human_time, run_encode
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import load_model
from mmemo.run_log import read_events
from tests.features.tiny_backbone import local_pool
from tests.media_files import write_clip
from tests.models.parts import values


@pytest.fixture
def jobs(monkeypatch):
    seen = []
    monkeypatch.setattr(ingest, "DecodePool", local_pool(seen))
    monkeypatch.setattr("mmemo.features.forecast.DecodePool", local_pool(seen))
    return seen


def config(folder: Path, **changes) -> EncodeConfig:
    media = folder / "media"
    names = [f"{number}.mp4" for number in range(4)]
    if not media.exists():
        for number, name in enumerate(names):
            write_clip(media / name, seconds=1.0, size=(64, 64), tone=200.0 + 30 * number)
        (media / "page.mp4").write_text("<html></html>")
    rows = [
        {
            "sample_id": name,
            "messages": [
                {"role": "user", "content": "<video><audio><face>Which emotion?"},
                {"role": "assistant", "content": "<answer>angry</answer>"},
            ],
            "videos": [name],
            "audios": [name],
            "faces": [name],
        }
        for name in [*names, "page.mp4"]
    ]
    manifest = folder / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "output_dir": str(folder / "runs" / "encode"),
        "model": values(),
        "data": {"manifests": [str(manifest)], "media_root": str(media)},
        "decode": {"workers": 1, "max_bad_share": 0.3, "backend": "pyav"},
        **changes,
    }
    return parse(EncodeConfig, given)


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_forecasts_what_the_run_then_writes(tmp_path, jobs, capsys):
    chosen = config(tmp_path)
    before = everything(tmp_path)
    dry = run_encode(chosen, dry_run=True)
    assert everything(tmp_path) == before
    text = capsys.readouterr().out
    assert "size on disk" in text
    assert "more; store.crops_gb bounds them" in text
    assert "page.mp4: not_media" in text
    report = run_encode(chosen)
    text = capsys.readouterr().out
    for part in ("features made", "12 (", "4 of 5", "1 not_media", "page.mp4", "bad_clips.jsonl"):
        assert part in text, part
    assert "0.0% (0 of 16), used whole" in text  # frames without a face
    assert "4 clips, " in text
    assert dry.new - 3 == report.new == 12  # it cannot know that a clip is bad before it tries
    assert dry.bytes == pytest.approx(report.bytes * 5 / 4, rel=0.05)
    out = tmp_path / "runs" / "encode"
    bad, done = read_events(out / "events.jsonl")
    assert (bad["kind"], bad["path"], bad["reason"]) == ("bad_clip", "page.mp4", "not_media")
    assert done["new"] == 12
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["seed"] == 0
    store = FeatureStore(StoreConfig(path=str(tmp_path / "runs" / "features")))
    assert store.stats().features == 12
    jobs.clear()
    (tmp_path / "runs" / "features" / "shards" / "mine.txt").write_text("not a shard")
    (path,) = (tmp_path / "runs" / "features" / "shards").glob("*.safetensors")
    os.utime(path, (1, 1))
    before = everything(tmp_path)
    assert run_encode(chosen, dry_run=True).new == 0
    assert everything(tmp_path) == before
    assert run_encode(chosen).reused == 12
    assert jobs == []
    assert "found in the store" in capsys.readouterr().out


def test_other_weights_or_layers_are_other_features(tmp_path, jobs):
    run_encode(config(tmp_path))
    model = values()
    model["video"] = {**model["video"], "layer": 1}
    assert run_encode(config(tmp_path, model=model)).new == 4
    connector = values()
    connector["video"] = {**connector["video"], "tokens": 3}  # after the tower: same features
    assert run_encode(config(tmp_path, model=connector)).new == 0
    assert run_encode(config(tmp_path, model={**values(), "seed": 1})).new == 12


def test_the_fingerprint_is_of_the_tower_not_of_the_process():
    one, two = (unwrap(load_model(parse_model(), ["text"]).model) for _ in range(2))
    for modality in one.modalities:
        assert one.feature_fingerprint(modality) == two.feature_fingerprint(modality)


def parse_model():
    return parse(EncodeConfig.model_fields["model"].annotation, values())


def test_errors_say_what_to_do(tmp_path, jobs):
    with pytest.raises(ConfigError, match=r"store\.enabled"):
        run_encode(config(tmp_path, store={"enabled": False}))
    strict = {"workers": 1, "max_bad_share": 0.1, "backend": "pyav"}
    with pytest.raises(TrainingError, match=r"1 of 5 clips \(20\.0%\).*page\.mp4"):
        run_encode(config(tmp_path, decode=strict))


def test_sizes_and_times_for_people():
    assert [human_size(n) for n in (999, 1000, 2_500_000, 3 * 10**12)] == [
        "999 bytes",
        "1 kB",
        "2.5 MB",
        "3 TB",
    ]
    assert [human_time(s) for s in (3.21, 75.0, 3725.0)] == ["3.2 s", "1 min 15 s", "1 h 2 min"]
