"""What mmemo 0.1.0 left on a disk is still read: models, checkpoints, evaluations and reports.

``tests/fixtures/run_of_0_1`` is a pipeline of a tiny SFT stage with LoRA (four steps, a checkpoint
after the second) and an evaluation, as version 0.1.0 wrote them; only what can be made again and
the last checkpoint were taken out. Where a file of the fixture would have to change for a test to
pass, users' files would have to change too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmemo
from mmemo.config import load_config, parse
from mmemo.data.collate import Collator
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import ConfigError
from mmemo.evaluation.results import compare, read_results
from mmemo.features.source import FeatureSource
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.report.collect import read_run
from mmemo.report.page import build_report
from mmemo.run_log import read_events
from mmemo.train.sft import SftConfig, run_sft

FIXTURE = Path(__file__).parent / "fixtures/run_of_0_1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, which the run's relative paths are relative to."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    (tmp_path / "old/finished").rename(tmp_path / "old/run")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_a_model_loads_and_computes_what_it_did(old: Path) -> None:
    """``expected_logits.json``: every 50th logit behind each row's last token, by 0.1.0."""
    wanted = json.loads((old / "expected_logits.json").read_text())
    loaded = mmemo.load_model("run/sft/final")
    rows = load_samples(parse(DataConfig, {"manifests": ["data/rows.jsonl"], "media_root": "data"}))
    limits = parse(DecodeConfig, {"workers": 1})
    backbone: Any = unwrap(loaded.model)
    with FeatureSource(rows, backbone, None, Path("data"), limits) as source, torch.no_grad():
        collate = Collator(loaded.processor, source, None)
        for row in rows:
            batch = {k: v for k, v in collate([row]).items() if isinstance(v, torch.Tensor)}
            found = loaded.model(**batch).logits[0, -1, ::50]
            expected = torch.tensor(wanted.pop(row.sample_id))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not wanted


def test_a_checkpoint_goes_on_to_the_same_weights(old: Path) -> None:
    wanted = load_file("run/sft/final/adapter_model.safetensors")
    shutil.rmtree("run/sft/final")
    final = run_sft(load_config(SftConfig, Path("run/sft/config.yaml"), []))
    found = load_file(final / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():  # to the bit on the machine that made it
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
    events = read_events(Path("run/sft/events.jsonl"))
    assert [e["step"] for e in events if e["kind"] == "train_start"] == [0, 2]
    steps = [line["step"] for line in read_events(Path("run/sft/metrics.jsonl")) if "loss" in line]
    assert steps[-2:] == [3, 4]


def test_a_checkpoint_that_is_refused_says_which_version_made_it(old: Path) -> None:
    config = load_config(SftConfig, Path("run/sft/config.yaml"), ["train.learning_rate=0.1"])
    says = rf"made by mmemo 0\.1\.0 \(this is {mmemo.__version__}\) with other settings: .*0\.003"
    with pytest.raises(ConfigError, match=says):
        run_sft(config)


def test_an_evaluation_is_read_compared_and_continued(old: Path) -> None:
    folder = Path("run/evaluation")
    result = read_results(folder)
    assert result.values["n"] == 8
    (block,) = compare(folder, folder)[0].tasks.values()
    assert block["unpaired"] == 0
    again = mmemo.evaluate("run/evaluation/config.yaml", "benchmark.path=benchmark.py")
    assert again["tasks"]["emotion"]["n"] == 8


def test_the_report_knows_what_was_trained(old: Path) -> None:
    overview = read_run(Path("run"))
    assert [stage.name for stage in overview.stages] == ["sft", "evaluation", "report"]
    assert not overview.held_out  # the evaluation asks about the speakers it was trained on
    page = build_report(Path("run"), old / "report.html").read_text()
    assert "sft" in page
    losses: Any = overview.stages[0].losses
    assert [step for step, _ in losses["training"]] == [1, 2, 3, 4]
