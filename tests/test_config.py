"""Strict configs: typos are named, overrides apply, numbers are numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmemo.config import Config, apply_overrides, load_config, parse, read_yaml, save_resolved
from mmemo.errors import ConfigError
from mmemo.experiments.pipeline import read_pipeline
from mmemo.experiments.study import VARIABLES, read_study
from mmemo.stages import config_class, guess


class Inner(Config):
    learning_rate: float = 1e-3
    num_train_epochs: int = 1


class Outer(Config):
    train: Inner = Inner()
    items: list[Inner] = []
    name: str = "x"
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("values", "place", "guess"),
    [
        ({"nam": "y"}, "nam", "name"),
        ({"train": {"learning_rte": 1}}, "train.learning_rte", "learning_rate"),
        ({"items": [{"num_epochs": 1}]}, "items.0.num_epochs", "num_train_epochs"),
        ({"maybe": {"learningrate": 1}}, "maybe.learningrate", "learning_rate"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_key(values, place, guess) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, values, where="a.yaml")
    assert f"unknown key '{place}'" in str(caught.value)
    assert f"did you mean '{guess}'" in str(caught.value)
    assert str(caught.value).startswith("a.yaml: ")


def test_a_wrong_type_names_the_field() -> None:
    with pytest.raises(ConfigError, match=r"'train\.num_train_epochs'"):
        parse(Outer, {"train": {"num_train_epochs": "many"}})


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("5E3", 5e3), ("-2.5e+1", -25.0)])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "a.yaml").write_text(f"x: {text}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"x": value}


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: 1\ny: 2\nx: 3\n")
    with pytest.raises(ConfigError, match="line 3: key 'x' is given twice"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a: !!python/object/apply:os.system ['true']"])
def test_other_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path"):
        read_yaml(tmp_path / "none.yaml")


def test_variables_are_filled_and_missing_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# ${other} in a comment\nx: ${run}/y\n")
    assert read_yaml(tmp_path / "a.yaml", {"run": "r"}) == {"x": "r/y"}
    with pytest.raises(ConfigError, match="run"):
        read_yaml(tmp_path / "a.yaml")


def test_overrides_reach_sections_lists_and_new_sections() -> None:
    values = {"items": [{"learning_rate": 1.0}], "name": "x"}
    merged = apply_overrides(
        values, ["--items.0.learning_rate=1e-5", "--train.num_train_epochs=3", "--name=true"]
    )
    assert merged == {
        "items": [{"learning_rate": 1e-5}],
        "train": {"num_train_epochs": 3},
        "name": True,
    }
    assert values["items"][0]["learning_rate"] == 1.0


@pytest.mark.parametrize("text", ["--name", "--=1", "--name.x=1", "--items.7.learning_rate=1"])
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        apply_overrides({"name": "x", "items": []}, [text])


@example(rate=1.0, epochs=1, name="0E0")
@example(rate=1.0, epochs=1, name="1e-4")
@given(
    rate=st.floats(min_value=1e-9, max_value=1e9),
    epochs=st.integers(1, 10**6),
    name=st.text(max_size=20),
)
def test_the_resolved_config_reads_back_equal(tmp_path_factory, rate, epochs, name) -> None:
    config = Outer(train=Inner(learning_rate=rate, num_train_epochs=epochs), name=name)
    path = tmp_path_factory.mktemp("c") / "resolved.yaml"
    save_resolved(config, path)
    assert load_config(Outer, path) == config


SHIPPED = sorted(Path("train_configs").rglob("*.yaml"))
TRAINED, EVALUATED = (
    [p for p in SHIPPED if guess(read_yaml(p, later=VARIABLES)) in stages]
    for stages in (("sft", "grpo", "dpo"), ("eval",))
)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_shipped_config_is_valid(path: Path) -> None:
    values = read_yaml(path, {"run": "runs/x", "seed": "0"}, later=VARIABLES)
    stage = guess(values)
    if stage == "study":
        study, cells = read_study(path, [])
        shared = bool(study.shared) + bool(study.start) * len(study.seeds)
        assert len(cells) == shared + len(study.arms) * len(study.seeds)
    elif stage == "pipeline":
        assert len(read_pipeline(path, [])[1]) == len(values["stages"])
    else:
        parse(config_class(stage), values, where=str(path))


@pytest.mark.parametrize("variant", ["mose", "gate", "moka", "hydra", "lora"])
@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_every_training_config_takes_experts(path: Path, variant: str) -> None:
    values = read_yaml(path, {"run": "runs/x", "seed": "0"})
    given = apply_overrides(values, [f"model.lora.experts={{variant: {variant}}}"])
    config: Any = parse(config_class(guess(given)), given)
    assert config.model.lora.experts.variant == variant


@pytest.mark.parametrize("path", EVALUATED, ids=str)
def test_every_evaluation_takes_reallocation(path: Path) -> None:
    values = read_yaml(path, {"run": "runs/x", "seed": "0"})
    given = apply_overrides(values, ["generation.reallocation={}"])
    config: Any = parse(config_class("eval"), given)
    assert config.generation.change is config.generation.reallocation is not None
