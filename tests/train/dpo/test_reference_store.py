"""A stored reference is used again only for a model that computes the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from mmemo.checkpoint import MANIFEST
from mmemo.config import parse
from mmemo.models.adapters.lora import deciding_settings, save_model
from mmemo.models.build import ModelConfig, load_model
from mmemo.run_log import RunRecord
from mmemo.train.dpo.reference_store import reference_fingerprint
from mmemo.train.dpo.train import run_dpo
from tests.models.parts import TEXTS, shake, values
from tests.train.dpo.tiny import dpo_config, write_pairs

LORA: dict[str, Any] = {"r": 4, "lora_dropout": 0.0}
EXPERTS: dict[str, Any] = {**LORA, "experts": {"variant": "mose"}}


@pytest.fixture(scope="module", autouse=True)
def pairs(rows: Path) -> Path:
    return write_pairs(rows)


def saved(folder: Path, lora: Mapping[str, Any]) -> Path:
    """A run's folder: a base, and an adapter on it that does something."""
    config = parse(ModelConfig, {**values(), "lora": dict(lora)})
    loaded = load_model(config, TEXTS, base_dir=folder / "base")
    shake(loaded.model, 0.05)
    save_model(loaded.model, loaded.processor, folder / "final", base=loaded.base)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("lora"), LORA)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("experts"), EXPERTS)


def fingerprint(folder: Path, *, adapter: bool = True, **more: Any) -> str:
    model = load_model(parse(ModelConfig, {"path": str(folder), **more})).model
    return reference_fingerprint(model, adapter=adapter)


@cache
def known(folder: Path) -> str:
    """The fingerprint of a folder that no test changes."""
    return fingerprint(folder)


def edited(run: Path, into: Path, file: str, place: str, value: Any) -> Path:
    """A copy of a run's folder in which one setting of a JSON file has another value."""
    shutil.copytree(run, into)
    path = into / file
    (path.parent / MANIFEST).unlink(missing_ok=True)  # as of a model that mmemo did not save
    found: Any = json.loads(path.read_text())
    inner, *rest = reversed(place.split("."))
    section = found
    for key in reversed(rest):
        section = section[key]
    assert section.get(inner, "missing") != value
    section[inner] = value
    path.write_text(json.dumps(found))
    return into / "final"


ADAPTER = "final/adapter_config.json"
BASE = "base/config.json"


@pytest.mark.parametrize(
    ("kind", "file", "place", "value"),
    [
        ("lora", ADAPTER, "lora_alpha", 7),
        ("lora", ADAPTER, "use_rslora", True),
        ("lora", ADAPTER, "alpha_pattern", {"q_proj": 3}),
        ("lora", ADAPTER, "alora_invocation_tokens", [5, 6]),
        ("experts", ADAPTER, "lora_alpha", 7),
        ("experts", ADAPTER, "use_rslora", True),
        ("experts", ADAPTER, "routing", "soft"),
        ("experts", ADAPTER, "temperature", 0.5),
        ("lora", BASE, "text_config.rms_norm_eps", 0.1),
        ("lora", BASE, "text_config.rope_parameters", {"rope_theta": 9.0, "rope_type": "default"}),
        ("lora", BASE, "text_config.hidden_act", "gelu"),
        ("lora", BASE, "branches.audio.pooling", "attention"),
    ],
)
def test_a_setting_that_changes_what_the_same_weights_compute_changes_the_fingerprint(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, file: str, place: str, value: Any
) -> None:
    run: Path = request.getfixturevalue(kind)
    before = known(run / "final")
    if place == "branches.audio.pooling":  # whose weights other branches may lack
        model: Any = load_model(parse(ModelConfig, {"path": str(run / "final")})).model
        model.get_base_model().config.branches["audio"]["pooling"] = value
        assert reference_fingerprint(model, adapter=True) != before
        return
    other = edited(run, tmp_path / "other", file, place, value)
    assert fingerprint(other) != before


@pytest.mark.parametrize(
    ("kind", "file", "place", "value"),
    [
        ("lora", ADAPTER, "lora_dropout", 0.3),
        ("lora", ADAPTER, "init_lora_weights", False),
        ("experts", ADAPTER, "weight_penalty", 0.7),
        ("lora", BASE, "transformers_version", "9.9"),
    ],
)
def test_a_setting_that_only_trains_or_names_does_not(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, file: str, place: str, value: Any
) -> None:
    run: Path = request.getfixturevalue(kind)
    other = edited(run, tmp_path / "other", file, place, value)
    assert fingerprint(other) == known(run / "final")


@pytest.mark.parametrize(
    "change",
    [
        {"r": 3},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 3}},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1, 3]}},
        {"lora_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_an_adapter_computes_with_beside_its_weights(change: dict[str, Any]) -> None:
    """Of any adapter of PEFT's, by the values that are not its defaults."""
    training = {"lora_dropout": 0.5, "task_type": "CAUSAL_LM", "inference_mode": True}
    assert deciding_settings(LoraConfig(**training)) == {}
    assert deciding_settings(LoraConfig(**training, **change)) == change


def test_number_types_and_rows_of_the_embedding_are_part_of_it(lora: Path) -> None:
    before = fingerprint(lora / "base", adapter=False)
    assert fingerprint(lora / "base", adapter=False, dtype="bfloat16") != before
    # What a new adapter trains, rows of the embedding too, is no part of the reference.
    new = {"lora": {**LORA, "target_modules": ["q_proj"]}}
    assert fingerprint(lora / "base", adapter=False, **new) == before
    assert fingerprint(lora / "base", adapter=True, **new) != before


def test_an_adapter_with_another_alpha_gets_a_reference_of_its_own(
    rows: Path, lora: Path, tmp_path: Path
) -> None:
    """Through a whole run: the initial margin is 0 for either."""
    other = edited(lora, tmp_path / "other", ADAPTER, "lora_alpha", 100)

    def run(path: Path, out: str, **changes: Any) -> tuple[int, float]:
        config = dpo_config(
            rows,
            tmp_path / out,
            "dpo",
            model={"path": str(path)},
            train={"max_steps": 1, **changes.pop("train", {})},
            store={"path": str(tmp_path / "features")},
            **changes,
        )
        run_dpo(config)
        line = json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[0])
        computed = RunRecord(tmp_path / out).events("reference")[-1]["computed"]
        return computed, line["dpo/rewards/margins"]

    for path in (lora / "final", other):
        computed, margin = run(path, f"run-{path.parent.name}")
        assert computed == 16
        assert margin == pytest.approx(0, abs=1e-6)
    # What has no part in it: where results go, how is learnt, how long a prompt may be.
    harmless = {"data": {"max_length": 500}, "train": {"learning_rate": 1e-5, "seed": 7}}
    assert run(other, "again", **harmless)[0] == 0
    # What has: the streams that are shown, the divisor of the logits, the kind of forward pass.
    for number, change in enumerate(
        (
            {"data": {"modalities": ["video", "face"]}},
            {"dpo": {"temperature": 0.5}},
            {"dpo": {"shared_prefix": False}},
        )
    ):
        assert run(other, f"change-{number}", **change)[0] > 0, change


def test_another_template_or_tokenizer_gives_other_addresses(rows: Path, tmp_path: Path) -> None:
    """Through the tokens of prompt and answer."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ' says: ' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}{{ '<|' + p['type'] + '|>' }}"
        "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant says: ' }}{% endif %}"
    )
    for number, more in enumerate(({}, {"chat_template_path": str(template)})):
        config = dpo_config(
            rows,
            tmp_path / f"run-{number}",
            "dpo",
            model={**values(), "lora": LORA, **more},
            train={"max_steps": 1},
            store={"path": str(tmp_path / "features")},
        )
        run_dpo(config)
        event = RunRecord(tmp_path / f"run-{number}").events("reference")[-1]
        assert event["computed"] == 16
