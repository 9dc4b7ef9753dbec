"""Several ranks: how they start and end, and that they learn what one rank learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmemo import checkpoint
from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.run_log import RunRecord
from mmemo.train import distributed
from mmemo.train.config import TrainConfig
from mmemo.train.sft import run_sft
from mmemo.train.zero import engine as deepspeed
from tests.train.rank_job import JOBS, experts_config
from tests.train.tiny import sft_config, sft_values, write_rows

SHOW = "import os,sys; open(sys.argv[1]+os.environ['RANK'],'w').write(str(dict(os.environ)))"
WAIT = (
    "import signal,sys,time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
    "open(sys.argv[1] + __import__('os').environ['RANK'], 'w').close()\n"
    "time.sleep(60)\n"
)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *arguments]


def wait_for(*paths: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"{paths} did not appear"
        time.sleep(0.01)


def test_ranks_get_what_torchrun_gives(tmp_path: Path) -> None:
    assert distributed.run_ranks(python(SHOW, f"{tmp_path}/"), 3, cpu=True) == 0
    for rank in range(3):
        found = eval((tmp_path / str(rank)).read_text())
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "3",
        )
        assert found["DS_ACCELERATOR"] == "cpu"
        assert int(found["MASTER_PORT"]) > 0


def test_the_first_failure_ends_the_others_and_gives_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_GRACE", 0.2)
    code = "import os,time,sys\nif os.environ['RANK']=='1': sys.exit(7)\ntime.sleep(60)"
    started = time.monotonic()
    assert distributed.run_ranks(python(code), 2, cpu=True) == 7
    assert time.monotonic() - started < 30
    killed = "import os,signal\nif os.environ['RANK']=='0': os.kill(os.getpid(), signal.SIGKILL)"
    assert distributed.run_ranks(python(killed), 2, cpu=True) == 137


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_their_code_comes_back(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def send() -> None:
        wait_for(tmp_path / "0", tmp_path / "1")
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    assert distributed.run_ranks(python(WAIT, f"{tmp_path}/"), 2, cpu=True) == code
    thread.join()
    assert signal.getsignal(number) == before


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    code = (
        "import sys; from mmemo.train.distributed import run_ranks; "
        f"run_ranks([sys.executable, '-S', '-c', {WAIT + 'x'!r}[:-1], sys.argv[1]], 2, cpu=True)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/"])
    wait_for(tmp_path / "0", tmp_path / "1", seconds=200)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 2
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 30
    while any(_alive(int(child)) for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_auto_values_are_filled_and_contradictions_refused(tmp_path: Path) -> None:
    train = parse(TrainConfig, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3})
    for stage in (2, 3):
        found = deepspeed.filled(f"ds_configs/zero{stage}.json", train, 2, 64)
        assert found["train_batch_size"] == 24
        assert found["gradient_clipping"] == 1.0
        assert found["bf16"]["enabled"] is False
        assert "auto" not in json.dumps(found)
    file = tmp_path / "ds.json"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 5}, "train_batch_size is 5 .* 24"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"zero_optimization": {"stage": 0}}, "must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "remove 'optimizer'"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "stage 1 cannot overlap_comm"),
        ({"zero_optimization": {"stage": 2}, "comms_logger": "auto"}, "'comms_logger' cannot be"),
        ({}, "is not a DeepSpeed config"),
    ]
    for values, message in cases:
        file.write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=message):
            deepspeed.filled(str(file), train, 2, 64)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """Every scenario of ``rank_job``, run by two ranks in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rows").symlink_to(rows)
    _write_bad(folder / "bad", rows)
    command = [sys.executable, "-m", "tests.train.rank_job", str(folder), *JOBS]
    assert distributed.run_ranks(command, 2, cpu=True) == 0
    return folder


def _write_bad(folder: Path, rows: Path) -> None:
    (folder / "clips").mkdir(parents=True)
    for clip in (rows / "clips").iterdir():
        (folder / "clips" / clip.name).write_bytes(clip.read_bytes())
    (folder / "clips" / "1.mp4").write_bytes(b"")
    (folder / "rows.jsonl").write_text((rows / "rows.jsonl").read_text())


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """The same stage on one rank with accumulation 2."""
    out = tmp_path_factory.mktemp("alone")
    return run_sft(sft_config(rows, out, train={"gradient_accumulation_steps": 2}))


@pytest.mark.distributed
@pytest.mark.timeout(2400)
class TestTwoRanks:
    def test_collectives(self, done: Path) -> None:
        for one in found(done, "collectives"):
            assert one["sum"] == [2.0, 1.0]
            assert one["any"] == [False, True]
            assert one["texts"] == ["", "Grüße 🙂"]
            assert one["from_main"] == "rank 0"
            assert one["gradients"] == [[3.0] * 3, [5.0] * 3, None]

    def test_each_clip_is_encoded_by_one_rank(self, done: Path) -> None:
        first, second = (one["encoded"] for one in found(done, "encodes"))
        assert len(first) + len(second) == len({*first, *second})
        wanted = {f"{kind}/{clip}" for kind, clip in _streams(done / "rows" / "rows.jsonl")}
        assert {*first, *second} == wanted

    @pytest.mark.parametrize("how", ["sft", "packed"])
    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_two_ranks_learn_what_one_with_accumulation_does(
        self, done: Path, alone: Path, stage: str, how: str
    ) -> None:
        first, second = (Path(one["final"]) for one in found(done, f"{how}-{stage}"))
        assert first == second
        checkpoint.verify(first)
        expected = load_file(alone / "model.safetensors")
        got = load_file(first / "model.safetensors")
        assert set(got) == set(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=2e-5, msg=name)
        losses = [_losses(folder.parent) for folder in (first, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_grpo_learns_the_same_and_goes_on_where_it_stopped(
        self, done: Path, stage: str
    ) -> None:
        """Completions are drawn from the same weights, however these are held."""
        first, plain = (Path(found(done, f"grpo-{one}")[0]["final"]) for one in (stage, "plain"))
        resumed = Path(found(done, f"grpo-{stage}")[0]["resumed"])
        checkpoint.verify(resumed)
        got, expected = (load_file(one / "adapter_model.safetensors") for one in (first, plain))
        assert set(got) == set(expected)
        assert any("lora_B" in name and weight.any() for name, weight in got.items())
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=2e-5, msg=name)
        assert _said(done, stage) == _said(done, "plain")
        again = load_file(resumed / "adapter_model.safetensors")
        assert all(torch.equal(weight, got[name]) for name, weight in again.items())
        assert RunRecord(resumed.parent).events("resume")[-1]["step"] == 2

    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_all_weights_learn_against_a_copy_of_them(self, done: Path, stage: str) -> None:
        """However the engine holds the policy, each rank's copy is what training started from."""
        first, plain = (Path(found(done, f"full-{one}")[0]["final"]) for one in (stage, "plain"))
        got, expected = (load_file(one / "model.safetensors") for one in (first, plain))
        assert set(got) == set(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=2e-5, msg=name)
        logged = (done / f"full-{stage}/metrics.jsonl").read_text().splitlines()
        divergences = [json.loads(line)["kl"] for line in logged]
        assert divergences[0] == 0
        assert divergences[-1] > 1e-7
        resumed = Path(found(done, f"full-{stage}")[0]["resumed"])
        again = load_file(resumed / "model.safetensors")
        assert all(torch.equal(weight, got[name]) for name, weight in again.items())
        assert RunRecord(resumed.parent).events("resume")[-1]["step"] == 2

    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_experts_learn_on_two_ranks_what_they_do_on_one(
        self, done: Path, rows: Path, tmp_path: Path, stage: str
    ) -> None:
        """Two times four rows are eight times one, the penalties on the experts included."""
        final = Path(found(done, f"experts-{stage}")[0]["final"])
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        one = run_sft(experts_config(rows, tmp_path, train=split))
        got, expected = (load_file(f / "adapter_model.safetensors") for f in (final, one))
        assert set(got) == set(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=5e-4, msg=name)
        logged = json.loads((final.parent / "metrics.jsonl").read_text().splitlines()[-1])
        assert 0 < logged["experts/weight/audio"] < 1

    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(
        self, done: Path, stage: str
    ) -> None:
        for one in found(done, f"stopped-{stage}"):
            assert one["code"] == 143
            assert one["saved"] == ["checkpoint-3"]
        whole = Path(found(done, f"sft-{stage}")[0]["final"])
        again = Path(found(done, f"stopped-{stage}")[0]["final"])
        assert (again / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()

    @pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
    def test_a_step_that_one_rank_cannot_take_is_skipped_by_both(
        self, done: Path, stage: str
    ) -> None:
        for one in found(done, f"one-sided-{stage}"):
            assert (one["skipped"], one["steps"]) == (1, 4)
        digests = found(done, f"one-sided-{stage}")[0]["digests"]
        assert digests[1] == digests[2]
        assert len(set(digests)) == 3
        (event,) = RunRecord(done / f"one-sided-{stage}").events("nonfinite")
        assert event["what"] == "loss"
        assert len(event["sample_ids"]) == 1

    def test_bad_rows_are_left_out_before_the_ranks_share_the_rest(self, done: Path) -> None:
        record = RunRecord(done / "bad_rows")
        left_out = record.events("ingest")[0]["rows_left_out"]
        assert left_out > 0
        lines = (done / "bad" / "rows.jsonl").read_text().splitlines()
        steps = -(-(len(lines) - left_out) // 4)
        assert record.events("train_done")[0]["state"]["step"] == steps

    def test_no_room_is_the_same_error_everywhere(self, done: Path) -> None:
        for one in found(done, "full_disk"):
            assert "could not be saved" in one["error"]

    def test_half_precision_and_adapters_work_sharded(self, done: Path) -> None:
        assert all(weight.isfinite().all() for weight in _weights(done, "bf16", "model"))
        adapter = Path(found(done, "adapter")[0]["final"])
        saved = load_file(adapter / "adapter_model.safetensors")
        assert any("lora_B" in name and weight.any() for name, weight in saved.items())
        assert all(weight.numel() for weight in saved.values())
        assert any("connectors" in name for name in saved)


def _said(done: Path, stage: str) -> list[Any]:
    lines = (done / f"grpo-{stage}/completions.jsonl").read_text().splitlines()
    return [json.loads(line)["completions"] for line in lines]


def _weights(done: Path, name: str, file: str) -> list[torch.Tensor]:
    return list(load_file(Path(found(done, name)[0]["final"]) / f"{file}.safetensors").values())


def _streams(manifest: Path) -> set[tuple[str, str]]:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    return {
        (kind, row[f"{kind}s"][0])
        for row in rows
        for kind in ("video", "audio", "face")
        if f"{kind}s" in row
    }


def _losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


class OneRank:
    is_main, size = True, 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (SystemExit(143), 143),
        (SystemExit(130), 130),
        (KeyboardInterrupt(), 130),
        (ValueError(), 1),
        (SystemExit("a text"), 1),
    ],
)
def test_how_a_run_ended_is_kept(tmp_path: Path, raised: BaseException | None, code: int) -> None:
    (tmp_path / "exit_code").write_text("old")
    expected = nullcontext() if raised is None else pytest.raises(type(raised))
    with expected, distributed.exit_code(tmp_path, OneRank()):  # type: ignore[arg-type]
        assert not (tmp_path / "exit_code").exists()
        if raised is not None:
            raise raised
    assert (tmp_path / "exit_code").read_text() == f"{code}\n"


@pytest.mark.distributed
def test_a_stop_under_torchrun_is_told_from_a_failure(tmp_path: Path) -> None:
    """torchrun itself ends with 1. An older launcher's ``--local_rank`` is taken, too."""
    write_rows(tmp_path / "rows")
    values = sft_values(
        tmp_path / "rows",
        tmp_path / "out",
        train={"max_steps": 5000, "per_device_train_batch_size": 2},
        run={"use_cpu": True, "save_steps": 5},
    )
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "mmemo.cli", "sft", str(tmp_path / "sft.yaml")]
    process = subprocess.Popen([*command, "--local_rank=0"])
    try:
        wait_for(tmp_path / "out/checkpoint-5", seconds=200)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) != 0
    finally:
        process.kill()
    assert (tmp_path / "out/exit_code").read_text() == "143\n"
