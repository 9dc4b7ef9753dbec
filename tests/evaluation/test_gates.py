"""What experts choose is noted by ``mmemo eval``, on real clips with tiny random models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmemo.config import dump, parse
from mmemo.errors import EvaluationError
from mmemo.evaluation import runner
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import read_predictions
from mmemo.evaluation.reliance import gates
from mmemo.evaluation.reliance.gates import gate_rows, read_gates
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.runner import run_eval
from mmemo.models.adapters.routing import EMBEDDING_GATE, Gates
from mmemo.models.build import Loaded, load_model, set_trainable
from mmemo.report.page import build_report
from mmemo.run_log import read_events
from tests.evaluation.world import config_of, save_model, write_world
from tests.models.native_files import FED, save_omni
from tests.models.parts import shake

ROWS = 9
FILES = ("gates.jsonl", "gates.json", "gates.csv")


def lora(variant: str = "mose", **changes: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "experts": {"variant": variant}, **changes}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A world and a model without an adapter; tests must not change them."""
    root = tmp_path_factory.mktemp("eval")
    return write_world(root / "world", ROWS), save_model(root / "model")


@pytest.fixture(autouse=True)
def shaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert and gate says something."""

    def loaded(*args: Any, **values: Any) -> Loaded:
        found = load_model(*args, **values)
        set_trainable(found.model, ["lm"])
        shake(found.model, 0.3)
        found.model.eval()
        return found

    monkeypatch.setattr(runner, "load_model", loaded)


def evaluate(shared: tuple[Path, Path], out: Path, variant: str = "mose", **changes: Any) -> Any:
    world, folder = shared
    values = {**dump(config_of(world, folder, out)), **of_model(folder, variant), **changes}
    return run_eval(parse(EvalConfig, values))


def of_model(folder: Path, variant: str) -> dict[str, Any]:
    return {"model": {"path": str(folder), "lora": lora(variant)}}


def found_in(result: EvalResult) -> Any:
    found = read_gates(result)
    assert found is not None
    return found


def test_each_prompt_gets_its_own_gates_layer_by_layer() -> None:
    """Of two linear layers in decoder layer 0 and one in layer 10; two prompts, two media."""
    weights = [torch.tensor([[0.2, 0.5, 0.3], [1, 0, 0]]) + torch.tensor([0, one, -one])
               for one in (0.0, 0.1, 0.2)]  # fmt: skip
    use = [torch.eye(3)[torch.tensor([[one, 1], [0, one]])] for one in range(3)]
    names = ["lm.layers.10.mlp.up", "lm.layers.0.attn.q", "lm.layers.0.attn.v"]
    made = {name: Gates(weights[at], use[at]) for name, at in zip(names, (2, 0, 1), strict=True)}
    first, second = gate_rows(made)
    assert first["layers"] == second["layers"] == [0, 10]
    assert np.allclose(first["weights"], [[0.2, 0.55, 0.25], [0.2, 0.7, 0.1]])
    assert np.allclose(second["weights"], [[1, 0.05, -0.05], [1, 0.2, -0.2]])
    assert first["use"][0] == [[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 1, 0]]]
    assert second["use"][1] == [[[1, 0, 0], [0, 0, 1]]]
    (only,) = gate_rows({EMBEDDING_GATE: Gates(torch.tensor([[0, 0.75, 0.25]]))})
    assert only == {"layers": [None], "weights": [[0.0, 0.75, 0.25]]}
    (only,) = gate_rows({names[0]: Gates(use=use[2][:1])})
    assert "weights" not in only


@pytest.mark.parametrize("variant", ["mose", "gate", "hydra"])
def test_gates_of_a_batch_are_those_of_each_prompt_alone(
    shared: tuple[Path, Path], tmp_path: Path, variant: str
) -> None:
    """Prompts differ in length, and some lack media."""
    world = shared[0]
    lines = (world / "test_conflict.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[::3]:
        row["messages"][0]["content"] = "<audio>" + "And what does the voice say? " * 4
        row["videos"] = row["faces"] = []
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"manifests": [str(manifest)], "media_root": str(world)}
    found: list[list[Any]] = []
    for size in (1, 9):
        out = tmp_path / str(size)
        evaluate(shared, out, variant, data=data, per_device_eval_batch_size=size)
        found.append(read_predictions(out / "gates.jsonl"))
    differ = 0.0
    for alone, together in zip(*found, strict=True):
        assert alone["sample_id"] == together["sample_id"]
        for name in ("weights", "use"):
            assert (name in alone) == (name in together)
            if name in alone:
                assert np.allclose(alone[name], together[name], atol=2e-4)
                differ += float(np.abs(np.array(alone[name]) - found[0][1][name]).max())
    assert differ > 0.1  # it depends on the clip
    lacking = found[1][0]
    picture = lacking["modalities"].index("video")
    for name in {"weights", "use"} & set(lacking):
        first = np.array(lacking[name])
        at = first[..., 1 + picture] if name == "weights" else first[:, :, picture]
        assert not at.any()


def test_files_hold_what_the_notes_say(shared: tuple[Path, Path], tmp_path: Path) -> None:
    result = evaluate(shared, tmp_path)
    found, rows = found_in(result), read_predictions(tmp_path / "gates.jsonl")
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in result.rows()]
    assert found["modalities"] == rows[0]["modalities"] == ["video", "audio", "face", "fusion"]
    assert found["layers"] == [0, 1]
    weights = np.array([row["weights"] for row in rows])
    assert weights.sum(-1) == pytest.approx(1, abs=1e-5)
    voice = found["weights"]["subsets"]["all"]["audio"]
    assert voice["value"] == pytest.approx(weights[..., 2].mean(), abs=1e-5)
    assert voice["low"] <= voice["value"] <= voice["high"]
    with (tmp_path / "gates.csv").open() as handle:
        table = list(csv.DictReader(handle))
    (one,) = [
        row for row in table
        if (row["measure"], row["of"], row["subset"], row["layer"]) ==
        ("weight", "audio", "consistent", "1")
    ]  # fmt: skip
    assert float(one["value"]) == found["weights"]["by_layer"]["consistent"]["audio"][1]
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Expert routing of model" in page


def test_a_run_that_stopped_goes_on_without_repeating(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(shared, tmp_path / "whole").folder
    plain, batches = AnswerGenerator.gates, list[int]()

    def cut(self: AnswerGenerator, questions: Any) -> Any:
        batches.append(len(questions))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return plain(self, questions)

    monkeypatch.setattr(AnswerGenerator, "gates", cut)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(shared, out)
    assert not (out / "gates.json").exists()
    evaluate(shared, out)
    assert batches == [3] * 4  # two, the one that was cut, and it again
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    events = [e for e in read_events(out / "events.jsonl") if e["kind"] == "gates"]
    assert [event["kept"] for event in events] == [0, 6]


def test_a_model_that_chooses_nothing_leaves_no_file(
    shared: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluate(shared, tmp_path)
    assert all((tmp_path / name).exists() for name in FILES)
    evaluate(shared, tmp_path, "moka")
    assert not any((tmp_path / name).exists() for name in FILES)
    evaluate(shared, tmp_path)
    evaluate(shared, tmp_path, model={"path": str(shared[1])})
    assert not any((tmp_path / name).exists() for name in FILES)
    world = shared[0]
    unseen = {"manifests": [str(world / "test_conflict.jsonl")], "media_root": str(world),
              "modalities": []}  # fmt: skip
    assert read_gates(evaluate(shared, tmp_path, data=unseen)) is None


def test_gates_of_another_model_are_noted_anew_or_refused(
    shared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(shared, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    evaluate(shared, tmp_path, "hydra")
    assert all((tmp_path / name).read_bytes() != data for name, data in before.items())

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gates, "gate_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(shared, tmp_path)
    with pytest.raises(EvaluationError, match=r"gates\.json: does not fit the answers beside it"):
        build_report(tmp_path, tmp_path / "report.html")


def test_a_native_model(shared: tuple[Path, Path], tmp_path: Path) -> None:
    world = shared[0]
    data = {"manifests": [str(world / "test_conflict.jsonl")], "media_root": str(world),
            "modalities": ["video", "audio"]}  # fmt: skip
    model = {"path": str(save_omni(tmp_path / "omni")), "native": FED, "sampling": {"frames": 4},
             "lora": lora()}  # fmt: skip
    found = found_in(evaluate(shared, tmp_path / "out", model=model, data=data))
    assert found["modalities"] == ["video", "audio"]
    assert found["layers"] == list(range(len(found["layers"])))
    sums = sum(one["value"] for one in found["weights"]["subsets"]["all"].values())
    assert sums == pytest.approx(1, abs=1e-4)
    assert {len(experts) for experts in found["use"]["subsets"]["video"].values()} == {3}
