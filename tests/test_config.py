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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "train:\n  num_train_epochs: 010\n",
            r"line 2: '010' begins with 0.*write 10, or",
        ),
        ("train: {num_train_epochs: -0_017}", "write -17, or"),
        ("name: 0123", "write 123, or '0123' in quotes"),
        ("name: 01", "not 1; put it in quotes"),
        ("name: 1:30", "'1:30' would be read as a number to the base 60"),
        ("train: {learning_rate: 1:30.5}", "to the base 60"),
        ("train: {yes: 1}", "the key 'yes' is read as no text; put it in quotes"),
        ("~: 1", "the key '~' is read as no text"),
        ("? [a, b]\n: 1", "is read as no text"),
        ("name: !!binary aGk=", "is not valid YAML"),
        ("train: !!set {a, b}", "is not valid YAML"),
        ("items: &a [*a]", "is not valid YAML|contains itself"),
        ("items: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("name: no", "'name': Input should be a valid string, not false; put it in quotes"),
        ("name: 12", "not 12; put it in quotes"),
    ],
)
def test_what_yaml_reads_otherwise_than_people_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(Outer, tmp_path / "c.yaml")
    assert "c.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("name: 2026-11-30", "2026-11-30"),
        ("name: 2026-11-30 10:00:00", "2026-11-30 10:00:00"),
        ("name: '010'", "010"),
        ("name: 08x", "08x"),
    ],
)
def test_text_stays_text(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(Outer, tmp_path / "c.yaml")
    assert config.name == name
    save_resolved(config, tmp_path / "again.yaml")
    assert load_config(Outer, tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("1_000", 1000), ("0x10", 16), ("08", 8), ("07", 7), ("00", 0)]
)
def test_other_whole_numbers_are_read(tmp_path: Path, text: str, value: int) -> None:
    (tmp_path / "c.yaml").write_text(f"train: {{num_train_epochs: {text}}}")
    assert load_config(Outer, tmp_path / "c.yaml").train.num_train_epochs == value


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "'inf'", "'nan'", "1e999"])
def test_no_number_may_be_infinite(value: str) -> None:
    given = apply_overrides({}, [f"--train.learning_rate={value}"])
    with pytest.raises(ConfigError, match=r"'train\.learning_rate': Input should be a finite"):
        parse(Outer, given)


def configs(cls: type[Config]) -> list[type[Config]]:
    return [cls, *(one for child in cls.__subclasses__() for one in configs(child))]


def test_no_config_class_takes_infinite_numbers() -> None:
    for name in ("sft", "grpo", "dpo", "eval", "pairs", "encode"):
        config_class(name)  # imports the classes
    assert len(configs(Config)) > 30
    assert all(cls.model_config.get("allow_inf_nan") is False for cls in configs(Config))


def test_an_override_that_yaml_misreads_says_so_once() -> None:
    with pytest.raises(ConfigError, match=r"override '--a=010': '010' begins with 0"):
        apply_overrides({}, ["--a=010"])


def test_a_home_folder_is_expanded_wherever_a_path_may_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Outer, {"name": "~/run [a]"}).name == "/home/me/run [a]"
    assert parse(Outer, {"name": "a~/b"}).name == "a~/b"
    assert parse(Outer, {"name": "~"}).name == "~"


def test_a_variable_of_the_shell_is_not_taken_for_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"'name': '\$HOME/runs' begins with a var"):
        parse(Outer, {"name": "$HOME/runs"})
    assert parse(Outer, {"name": "$5 and more"}).name == "$5 and more"


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
        study, every = read_study(path, [])
        cells = [cell for cell in every if not cell.label.startswith("tuning")]
        assert (len(cells) < len(every)) == (study.tuning is not None)
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
