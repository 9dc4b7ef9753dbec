"""Plain LoRA of equal size whose first step goes as far as that of the experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.config import parse
from mmemo.data.collate import IGNORE_INDEX, Collator
from mmemo.data.manifest import load_samples
from mmemo.errors import ConfigError
from mmemo.features.encode import FeatureSource
from mmemo.models.adapters.lora import as_plain, unwrap
from mmemo.models.build import AdapterConfig, ModelConfig, load_model
from mmemo.train.dpo.train import run_dpo
from mmemo.train.sft import run_sft, sft_batch
from tests.models.parts import tiny, values
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.tiny import sft_config

SECTION = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
LORA = {**SECTION, "experts": {"variant": "lora", "match_step": True}}
STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "constant",
    "learning_rate": 2e-3,
    "warmup_steps": 0,
}


def stage(rows: Path, out: Path, lora: dict[str, Any], seed: int = 0, **train: Any) -> Path:
    """One step of the adapter alone; answers the run's ``final``."""
    model = {**values(), "lora": lora, "seed": seed}
    given = {**STEP, "seed": seed, **train}
    return run_sft(sft_config(rows, out, model=model, trainable=["lm"], train=given))


def moved(final: Path, config: Any) -> float:
    """How far the adapter moves the logits of the answers of the first step, on the whole rows."""
    loaded = load_model(parse(ModelConfig, {"path": str(final)}))
    model: Any = loaded.model
    samples = load_samples(config.data)
    backbone = unwrap(model)
    source = FeatureSource(samples, backbone, None, Path(config.data.media_root), config.decode)
    from mmemo.data.collate import measure_lengths
    from mmemo.data.curriculum import plan_epoch

    lengths = measure_lengths(samples, loaded.processor)
    first = plan_epoch(samples, config.curriculum, lengths, 8, config.train.seed, 0)[0]
    with source, torch.no_grad():
        collator = Collator(loaded.processor, source, config.data.max_length)
        batch = sft_batch(collator([samples[row] for row in first]))
        inputs = {name: batch[name] for name in batch["inputs"]}
        answers = batch["labels"][:, 1:] != IGNORE_INDEX
        after = model(**inputs, use_cache=False).logits[:, :-1][answers]
        with model.disable_adapter():
            before = model(**inputs, use_cache=False).logits[:, :-1][answers]
    return float((after - before).norm())


def test_the_first_step_goes_as_far_as_that_of_the_experts(rows: Path, tmp_path: Path) -> None:
    """Measured from outside, on the adapters that a step of the whole stage leaves behind."""
    for seed in range(3):
        found: dict[str, float] = {}
        for name, lora in (
            ("mose", {**SECTION, "experts": {}}),
            ("equal", {**SECTION, "experts": {"variant": "lora"}}),
            ("matched", LORA),
        ):
            out = tmp_path / f"{name}-{seed}"
            final = stage(rows, out, lora, seed)
            given = sft_config(rows, out, model=values(), train={**STEP, "seed": seed})
            found[name] = moved(final, given)
        assert found["equal"] > 1.5 * found["mose"]
        assert found["matched"] == pytest.approx(found["mose"], rel=0.1)


def test_a_resumed_run_keeps_what_was_measured_and_a_later_stage_goes_on(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = stage(rows, tmp_path / "run", LORA)
    assert "times as far as the experts'" in capsys.readouterr().out.replace("\n", " ")
    measured = json.loads((tmp_path / "run" / "equal_step.json").read_text())["measured"]
    saved = json.loads((final / "adapter_config.json").read_text())
    same_size = as_plain(unwrap(tiny().model), parse(AdapterConfig, LORA))
    assert saved["r"] == same_size.r
    assert saved["lora_alpha"] == measured["lora_alpha"] < same_size.lora_alpha
    # Another start of the same run reads the file, here with another number in it.
    other = json.loads((tmp_path / "run" / "equal_step.json").read_text())
    other["measured"]["lora_alpha"] = 3.0
    again = tmp_path / "again"
    again.mkdir()
    (again / "equal_step.json").write_text(json.dumps(other))
    assert (
        json.loads((stage(rows, again, LORA) / "adapter_config.json").read_text())["lora_alpha"]
        == 3.0
    )
    # And a run with other settings does not.
    third = tmp_path / "third"
    third.mkdir()
    (third / "equal_step.json").write_text(json.dumps(other))
    assert (
        json.loads((stage(rows, third, LORA, seed=1) / "adapter_config.json").read_text())[
            "lora_alpha"
        ]
        != 3.0
    )
    # A later stage continues the adapter with the same section, and measures nothing.
    onwards = {"path": str(final), "lora": LORA}
    done = run_sft(
        sft_config(rows, tmp_path / "later", model=onwards, trainable=["lm"], train=STEP)
    )
    assert not (tmp_path / "later" / "equal_step.json").exists()
    assert (
        json.loads((done / "adapter_config.json").read_text())["lora_alpha"]
        == measured["lora_alpha"]
    )
    with pytest.raises(ConfigError, match=r"lora\.r is"):
        load_model(parse(ModelConfig, {**onwards, "lora": {**LORA, "r": 8}}))


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_tokens": "all"}], ids=str
)
def test_tied_weights_that_train_beside_it_stay_tied(
    rows: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    final = stage(rows, tmp_path / "run", {**LORA, **more})
    model: Any = unwrap(load_model(parse(ModelConfig, {"path": str(final)})).model)
    assert torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
    # They take no part in what is measured.
    stage(rows, tmp_path / "alone", LORA)
    alpha, alone = (
        json.loads((tmp_path / name / "equal_step.json").read_text())["measured"]["lora_alpha"]
        for name in ("run", "alone")
    )
    assert alpha == pytest.approx(alone, rel=1e-3)


def test_only_sft_measures(rows: Path, tmp_path: Path) -> None:
    write_pairs(rows)
    with pytest.raises(ConfigError, match="which only sft does"):
        run_dpo(dpo_config(rows, tmp_path / "dpo", model={**values(), "lora": LORA}))
    with pytest.raises(ConfigError, match="match_step has no effect with the variant 'mose'"):
        parse(AdapterConfig, {"experts": {"match_step": True}})
    with pytest.raises(ConfigError, match="does not move the logits"):
        stage(rows, tmp_path / "still", LORA, learning_rate=1e-30)
