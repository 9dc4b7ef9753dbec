"""``mmemo encode`` in several ranks: each clip once, one report, and a killed rank costs little."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.config import load_config, save_resolved
from mmemo.features import ingest
from mmemo.features.encode import Alone, EncodeConfig, run_encode
from mmemo.features.store import FeatureStore, StoreConfig
from mmemo.run_log import RunRecord, read_events
from mmemo.train import distributed
from mmemo.train.sft import SftConfig
from tests.features.test_encode_stage import config as encode_config
from tests.features.tiny_backbone import local_pool
from tests.media_files import write_clip
from tests.train.tiny import sft_config, write_rows


class Second(Alone):
    """One of two ranks, whose peer has made ten features of 5 bytes and found two."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2, torch.device("cpu"))

    def all_gather_text(self, text: str) -> list[str]:
        return [json.dumps([10, 50, 2, 1e6, {"quiet": 1}]), text]


def test_the_report_is_that_of_all_ranks_and_the_first_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ingest, "DecodePool", local_pool([]))
    chosen = encode_config(tmp_path)
    alone = run_encode(chosen)
    for rank in (0, 1):
        chosen = encode_config(tmp_path, output_dir=str(tmp_path / f"{rank}" / "encode"))
        out = Path(chosen.output_dir)
        out.mkdir(parents=True)
        (out / "bad_clips.jsonl").write_text("")  # rank 0 writes it
        capsys.readouterr()
        found = run_encode(chosen, ranks=Second(rank))
        assert (found.new, found.bytes) == (alone.new + 10, alone.bytes + 50)
        assert (found.reused, found.seconds, found.notes) == (0, 1e6, {"quiet": 1})
        assert ("features made" in capsys.readouterr().out) == (rank == 0)
        assert (out / "config.yaml").exists() == (rank == 0)
        kinds = [event["kind"] for event in read_events(out / "events.jsonl")]
        assert kinds == (["bad_clip", "ingest", "encoded"] if rank == 0 else [])


def test_ranks_are_started_for_the_config_of_another_stage(tmp_path, monkeypatch):
    write_rows(tmp_path)
    config = sft_config(tmp_path, tmp_path / "run")
    save_resolved(config, tmp_path / "sft.yaml")
    launched: list[Any] = []
    monkeypatch.setattr(
        distributed, "launch", lambda argv, n, **more: launched.append((list(argv), n, more))
    )
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    done = CliRunner().invoke(app, ["encode", str(tmp_path / "sft.yaml"), "--processes", "2"])
    assert done.exit_code == 0, done.exception
    file = tmp_path / "run" / "encode" / "launch.yaml"
    assert launched == [(["encode", str(file)], 2, {"timeout": 1800})]
    assert load_config(SftConfig, file).run.processes == 2
    assert not (tmp_path / "run" / "encode" / "bad_clips.jsonl").exists()


def start(config: EncodeConfig, *more: str) -> subprocess.Popen[str]:
    file = Path(config.output_dir).with_suffix(".yaml")
    save_resolved(config, file)
    command = [sys.executable, "-m", "mmemo.cli", "encode", str(file), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def features(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    store = FeatureStore(StoreConfig(path=str(folder)), read_only=True)
    store.missing([])
    return {key: store.get(key) or {} for key in store._places}


@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_killed_rank_ends_the_others_and_the_same_command_finishes(tmp_path):
    chosen = encode_config(tmp_path, store={"path": str(tmp_path / "one")})
    media = tmp_path / "media"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for number in range(12):  # enough to be killed in the middle
        name = f"more-{number}.mp4"
        write_clip(media / name, seconds=1.0, size=(64, 64), tone=300.0 + 7 * number)
        rows.append(json.loads(json.dumps(rows[0]).replace("0.mp4", name)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_encode(chosen)
    two = chosen.model_copy(
        update={
            "output_dir": str(tmp_path / "two" / "encode"),
            "store": StoreConfig(path=str(tmp_path / "store"), shard_mb=0.001),
        }
    )
    first = start(two, "--processes", "2")
    while not list((tmp_path / "store" / "shards").glob("*")):
        assert first.poll() is None
        time.sleep(0.01)
    ranks = subprocess.run(
        ["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True
    )
    one, other = map(int, ranks.stdout.split())
    os.kill(one, signal.SIGSTOP)  # or it might do the rest in the seconds that it is given to end
    os.kill(other, signal.SIGKILL)
    _, said = first.communicate(timeout=600)
    assert first.returncode == 2
    assert "run the same command again" in said
    assert 0 < len(features(tmp_path / "store")) < 48
    again = start(two, "--processes", "2")
    again.communicate(timeout=900)
    assert again.returncode == 0
    one, other = features(tmp_path / "one"), features(tmp_path / "store")
    assert one.keys() == other.keys()
    assert len(one) == 48
    assert all(torch.equal(one[key]["x"], other[key]["x"]) for key in one)
    record = RunRecord(Path(two.output_dir), enabled=False)
    done = record.events("encoded")[-1]
    assert done["ranks"] == 2
    assert 0 < done["new"] < 48
    bad = [event["path"] for event in record.events("bad_clip")]
    assert bad == ["page.mp4"]
    assert [path.name for path in (tmp_path / "store" / "claims").iterdir()] == ["lock"]
