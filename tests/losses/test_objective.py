"""The objective: read from a config, terms built in or by path, and nothing requested twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo import content
from mmemo.config import dump, parse
from mmemo.errors import ConfigError
from mmemo.losses.objective import (
    TERMS,
    LogpRequest,
    ObjectiveConfig,
    build_terms,
    describe_terms,
    merge_requests,
)
from tests.losses.pairs import KINDS


def objective(*terms: dict[str, Any]) -> ObjectiveConfig:
    return parse(ObjectiveConfig, {"terms": list(terms)})


def test_every_kind_can_be_asked_for_and_comes_back_from_its_dump() -> None:
    config = objective(*({"kind": kind, "weight": 0.5} for kind in KINDS))
    assert [(name, weight) for name, weight, _ in build_terms(config.terms)] == [
        (kind, 0.5) for kind in KINDS
    ]
    assert parse(ObjectiveConfig, dump(config)) == config


def test_the_published_hyper_parameters_are_the_defaults() -> None:
    avem, mod = objective({"kind": "avem_dpo"}, {"kind": "mod_dpo_plus_plus"}).terms
    for term, wanted in (
        (avem, {"beta": 0.1, "lambda_av": 1, "beta_vr": 0.5, "gamma": 0.2}),
        (mod, {"beta": 0.1, "beta_inv": 0.02, "beta_sens": 0.05, "gamma": 0.05}),
    ):
        found = dump(term)
        assert {name: found[name] for name in wanted} == wanted
        assert found["sign"] == "plus"


def test_a_kind_twice_needs_names() -> None:
    with pytest.raises(ConfigError, match="two terms are called 'dpo'"):
        objective({"kind": "dpo"}, {"kind": "dpo", "beta": 0.2})
    config = objective({"kind": "dpo"}, {"kind": "dpo", "name": "softer", "beta": 0.2})
    assert [one.name for one in build_terms(config.terms)] == ["dpo", "softer"]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"kind": "avem_dpo", "lamda_av": 1}], "did you mean 'lambda_av'"),
        ([{"kind": "avemdpo"}], r"did you mean 'avem_dpo'\? A loss of your own"),
        ([{"kind": "zzz"}], "use one of avem_dpo, mod_dpo"),
        ([{"beta": 0.1}], r"terms\.0.*needs a 'kind'"),
        (["dpo"], r"terms\.0"),
        ([{"kind": "losses/none.py:Simpo"}], "neither in .* nor shipped"),
        ([{"kind": "losses/simpo.py:Simp"}], "did you mean 'Simpo'"),
        ([{"kind": "losses/simpo.py"}], "must look like folder/file.py:name"),
        ([{"kind": "losses/simpo.py:lengths"}], "not a loss term; derive the class from"),
        ([{"kind": "losses/simpo.py:SigmoidTerm"}], "lacks __call__, needs"),
        ([{"kind": "losses/simpo.py:Simpo", "gama": 1}], "'gama': did you mean 'gamma'"),
        ([{"kind": "losses/simpo.py:Simpo", "beta": 0}], "'beta': .* greater than 0, not 0"),
        ([], "terms"),
        ([{"kind": "dpo", "beta": 0}], "beta"),
        ([{"kind": "dpo", "weight": -1}], "weight"),
        ([{"kind": "dpo", "weight": 0}], "weight 0"),
        ([{"kind": "avem_dpo", "gamma": float("nan")}], "gamma"),
        ([{"kind": "avem_dpo", "text_clamp": 0}], "text_clamp"),
    ],
)
def test_what_is_wrong_is_named(terms: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        objective(*terms)
    assert "\n" not in str(caught.value)


SIMPO = "losses/simpo.py:Simpo"


def test_a_term_by_path_stands_beside_the_built_in_ones() -> None:
    config = objective({"kind": SIMPO, "weight": 0.5, "beta": 2.5}, {"kind": "dpo"})
    built = build_terms(config.terms)
    assert [(one.name, one.weight) for one in built] == [("simpo", 0.5), ("dpo", 1.0)]
    values = dump(config)["terms"][0]
    assert (values["kind"], values["beta"], values["gamma"]) == (SIMPO, 2.5, 1.0)
    assert parse(ObjectiveConfig, dump(config)) == config
    with pytest.raises(ConfigError, match="two terms are called 'simpo'"):
        objective({"kind": SIMPO}, {"kind": SIMPO, "beta": 1})


def test_only_terms_by_path_have_a_file_to_record() -> None:
    config = objective({"kind": SIMPO, "name": "mine"}, {"kind": "dpo"})
    (found,) = describe_terms(config.terms)
    file = content.find("losses/simpo.py")
    assert found == {
        "name": "mine",
        "path": SIMPO,
        "file": str(file.resolve()),
        "sha256": content.sha256(file),
    }


def test_a_file_that_fails_when_it_is_run_is_named(tmp_path: Path) -> None:
    for name, text in (("raises", "1 / 0"), ("no_python", "def")):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"{name}\.py cannot be loaded \(\w+Error"):
            objective({"kind": f"{file}:Mine"})


def test_the_schema_documents_the_built_in_terms() -> None:
    schema = ObjectiveConfig.model_json_schema()
    assert "label_smoothing" in schema["$defs"]["Dpo"]["properties"]
    assert len(schema["$defs"]) == len(TERMS) == len(KINDS)


def asked(*terms: dict[str, Any]) -> dict[tuple[str, str], LogpRequest]:
    found = merge_requests(build_terms(objective(*terms).terms))
    assert len({one.key for one in found}) == len(found)
    return {one.key: one for one in found}


def test_a_key_is_requested_once_with_all_that_any_term_wants() -> None:
    sft: Any = {"kind": "sft"}
    assert asked(sft) == {("input", "chosen"): LogpRequest("input", "chosen", reference=False)}
    both = asked(sft, {"kind": "dpo"})
    assert both["input", "chosen"] == LogpRequest("input", "chosen")
    assert len(both) == 3
    # mod_dpo bars the gradient of the negative, mdpo wants it for the chosen answer
    mixed = asked({"kind": "mod_dpo"}, {"kind": "mdpo"})
    assert mixed["negative", "chosen"] == LogpRequest("negative", "chosen")
    barred = LogpRequest("negative", "spurious", grad=False, reference=False)
    assert mixed["negative", "spurious"] == barred
    # the text prior of one is the policy's, of the other the reference's
    prior = asked({"kind": "mod_dpo_plus_plus"}, {"kind": "avem_dpo"})["text", "chosen"]
    assert prior == LogpRequest("text", "chosen", grad=False)
    alone = asked({"kind": "mod_dpo_plus_plus"})["text", "chosen"]
    assert alone == LogpRequest("text", "chosen", grad=False, policy=False)


def test_a_term_that_only_observes_asks_for_no_gradient() -> None:
    found = asked({"kind": "dpo", "rejected": "spurious"}, {"kind": "mdpo", "weight": 0})
    assert {place for place, one in found.items() if one.grad} == {
        ("input", "chosen"),
        ("input", "spurious"),
    }
    assert found["negative", "chosen"] == LogpRequest("negative", "chosen", grad=False)
