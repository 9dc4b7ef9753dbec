"""What makes a run fit: proposals are tried, ordered by cost, and can be pasted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mmemo.check.changes import cheapest, possible
from mmemo.check.fitting import Forecaster, parse_lengths, parse_size
from mmemo.check.shapes import shapes_of
from mmemo.check.stages import plan_without_rows
from mmemo.cli import app
from mmemo.config import apply_overrides, dump, parse
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import load_model, set_trainable
from mmemo.train.sft import SftConfig
from tests.check.measured import save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("bases")
    save_base(found, "float32")
    # The shapes alone: what a user has before the weights are fetched.
    (found / "shapes").mkdir()
    text = (found / "float32" / "config.json").read_text(encoding="utf-8")
    (found / "shapes" / "config.json").write_text(text, encoding="utf-8")
    return found


def values(folder: Path, **model: Any) -> dict[str, Any]:
    return {
        "output_dir": "out",
        "model": {"path": str(folder / "shapes"), **model},
        "data": {"manifests": ["rows.jsonl"], "media_root": "."},
        "trainable": ["lm"],
        "train": {"per_device_train_batch_size": 6},
    }


LORA = {"lora": {"r": 4}}


def forecaster(config: SftConfig) -> Forecaster:
    plan = plan_without_rows(config)
    model = shapes_of(config.model, config.trainable)
    return Forecaster(config, model, plan, parse_lengths("200+100"), plan.training_of)


def test_shapes_alone_give_the_forecast_of_the_model(folder: Path) -> None:
    for model in (LORA, {}):
        config = parse(SftConfig, values(folder, **model))
        again = forecaster(config)
        whole = config.model.model_copy(update={"path": str(folder / "float32")})
        loaded = load_model(whole)
        set_trainable(loaded.model, config.trainable)
        assert all(p.is_meta for p in again.model.parameters())
        other = Forecaster(config, loaded.model, again.plan, again.lengths, again.training_of)
        assert again() == other()
        assert type(unwrap(again.model)) is type(unwrap(loaded.model))


@pytest.mark.parametrize(("model", "share"), [(LORA, 0.4), ({}, 0.5)], ids=["LoRA", "full"])
def test_what_is_proposed_fits_and_nothing_in_it_is_idle(
    folder: Path, model: dict[str, Any], share: float
) -> None:
    config = parse(SftConfig, values(folder, **model))
    again = forecaster(config)
    limit = int(share * again().total)
    fits = cheapest(config, limit, again)
    assert len(fits) == 3
    costs = {one: c.cost for c in possible(dump(config)) for one in c.overrides[:1]}
    totals = [sum(costs.get(one, 0) for one in fit.overrides) for fit in fits]
    assert totals == sorted(totals)
    for fit in fits:
        changed = apply_overrides(dump(config), [f"--{one}" for one in fit.overrides])
        estimate = forecaster(parse(SftConfig, changed))()  # of a model that is built anew
        assert estimate.total == fit.estimate.total <= limit
    sets = [set(fit.overrides) for fit in fits]
    assert not any(one < other for one in sets for other in sets)


def test_smaller_micro_batches_are_as_many_more(folder: Path) -> None:
    config = parse(SftConfig, values(folder, **LORA))
    found = [c.overrides for c in possible(dump(config)) if c.group == "batches"]
    assert found == [
        ("train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2"),
        ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=6"),
    ]


def test_nothing_is_proposed_where_nothing_helps(folder: Path) -> None:
    config = parse(SftConfig, values(folder, **LORA))
    assert cheapest(config, 1000, forecaster(config)) == []


def test_the_command_says_so_and_fails(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(values(folder, **LORA)), encoding="utf-8")

    def call(memory: str) -> tuple[int, str]:
        options = ["--lengths", "200+100", "--memory", memory]
        done = CliRunner().invoke(app, ["check", str(file), *options])
        return done.exit_code, done.output

    code, text = call("10GB")
    assert (code, "more than" in text) == (0, False)
    code, text = call("40MB")
    assert code == 1
    assert "more than the 40.0 MB of a device" in " ".join(text.split())
    assert "--train." in text
    assert "fits together" not in text
    code, text = call("1kB")
    assert code == 1
    assert "use larger devices" in text


def test_a_path_without_a_config_is_refused(folder: Path, tmp_path: Path) -> None:
    config = parse(SftConfig, {**values(folder), "model": {"path": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"--model\.path"):
        shapes_of(config.model, config.trainable)
    scratch = {"text": {"scratch": {"hidden_size": 32}}}
    with pytest.raises(ConfigError, match="leave --lengths out"):
        shapes_of(parse(SftConfig, {**values(folder), "model": scratch}).model, ["lm"])


def test_sizes_and_lengths_are_read() -> None:
    sizes = ("24GB", "24 GiB", "1.5gb", "7")
    assert [parse_size(x) for x in sizes] == [24 * 10**9, 24 * 2**30, 15 * 10**8, 7]
    for wrong in ("", "GB", "24 G", "-1GB", "0GB"):
        with pytest.raises(ConfigError, match="write for example 24GB"):
            parse_size(wrong)
    assert (parse_lengths("20+5").longest, parse_lengths("20+5").answer) == (20, 5)
    for wrong in ("20", "20+", "0+5", "a+b", "20-5"):
        with pytest.raises(ConfigError, match="2048"):
            parse_lengths(wrong)
