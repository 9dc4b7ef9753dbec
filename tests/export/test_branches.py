"""A native model with branches: mmemo loads them from every export, and other programs the rest."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mmemo import checkpoint
from mmemo.errors import CheckpointError
from mmemo.export.stage import Kind, export_to
from mmemo.models.adapters.lora import save_model, unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.models.layouts import LAYOUTS
from tests.models.parts import shake
from tests.models.qwen.kinds import KINDS, ours, untouched
from tests.models.qwen.test_face import batch_of, load, release, rows

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def make_whole(name: str, folder: Path) -> None:
    """Qwen's Omni models are released as a whole, with the Thinker inside."""
    inside = json.loads((folder / "config.json").read_text())
    layout = LAYOUTS[inside["model_type"]].whole
    if layout is None:
        return
    file = folder / "model.safetensors"
    names = {n: n if n.startswith("thinker.") else f"thinker.{n}" for n in load_file(file)}
    save_file({names[n]: x for n, x in load_file(file).items()}, file, {"format": "pt"})
    given: dict[str, Any] = {layout.key: inside, **layout.values}
    AutoConfig.for_model(layout.model_type, **given).save_pretrained(folder)


def branches_of(name: str) -> dict[str, Any]:
    """What is added to a model beside the face: a fusion, if it hears."""
    heard = "audio_config" in KINDS[name].parts
    return {"fusion": {"kind": "attention"}} if heard else {}


@dataclass
class Run:
    name: str
    folder: Path
    own: Loaded

    @property
    def base(self) -> Path:
        return self.folder / "released"


def train(name: str, folder: Path, **changes: Any) -> Run:
    """A run whose adapter and branches have moved away from their start, and its exports."""
    release(name, folder / "released")
    make_whole(name, folder / "released")
    values = {"lora": LORA, **branches_of(name), **changes}
    loaded = load(name, folder / "released", **values)
    shake(loaded.model, 0.2)
    shake(unwrap(loaded.model).connectors, 0.2)
    checkpoint.save(
        folder / "run/final",
        lambda to: save_model(loaded.model, loaded.processor, to, base=loaded.base),
    )
    return Run(name, folder, loaded)


def exported(name: str, folder: Path) -> Run:
    found = train(name, folder)
    kinds: list[Kind] = ["peft", "merged"]
    if name != "qwen2_audio":
        kinds.append("vllm")
    export_to(folder / "run", {kind: folder / kind for kind in kinds})
    return found


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return exported("qwen2_5_omni", tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module", params=["qwen2_5_omni", "qwen2_audio", "qwen3_vl"])
def run(request: pytest.FixtureRequest, omni: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    name: str = request.param
    return omni if name == omni.name else exported(name, tmp_path_factory.mktemp(name))


def asked(run: Run) -> dict[str, Any]:
    media = max(KINDS[run.name].media, key=len)
    return batch_of(run.own, rows([f"<face>{media}", media, "<face>"]))


def test_mmemo_loads_the_branches_from_every_export(run: Run) -> None:
    batch = asked(run)
    wanted = ours(unwrap(run.own.model), batch)
    kept = load_model(ModelConfig(path=str(run.folder / "peft")))
    assert torch.equal(ours(unwrap(kept.model), batch), wanted)
    assert set(unwrap(kept.model).backbone.branches) == {"face", *branches_of(run.name)}
    merged = load_model(ModelConfig(path=str(run.folder / "merged")))
    torch.testing.assert_close(ours(merged.model, batch), wanted, atol=1e-4, rtol=0)
    # The branches say something.
    for branch in unwrap(kept.model).backbone.branches.values():
        branch.module.load_state_dict({n: x * 0 for n, x in branch.module.state_dict().items()})
    assert (ours(unwrap(kept.model), batch) - wanted).abs().max() > 1e-2


def stock(run: Run, kind: str) -> Any:
    """As a user without mmemo loads an export: transformers' class, then PEFT's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of weights that are missing or unexpected
        place = run.base if kind == "peft" else run.folder / kind
        model: Any = KINDS[run.name].model.from_pretrained(place)
        if kind == "peft":
            PeftModel.from_pretrained(model, str(run.folder / "peft"))
    return model.eval()


def test_other_programs_load_the_rest(run: Run) -> None:
    """Their logits are those of rows without the branches' tokens."""
    kind, model = KINDS[run.name], unwrap(run.own.model)
    media = min((one for one in kind.media if one), key=len)
    batch = batch_of(run.own, rows([media] * 2))
    wanted = ours(model, batch)
    adapted = untouched(kind, model, batch, media, stock(run, "peft"))
    assert torch.equal(adapted, wanted)
    merged = untouched(kind, model, batch, media, stock(run, "merged"))
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=0)


def test_the_adapter_for_vllm_has_no_branch_in_its_file(run: Run) -> None:
    if run.name == "qwen2_audio":
        pytest.skip("vLLM serves no adapters on it")
    names = load_file(run.folder / "vllm/adapter_model.safetensors")
    assert all(re.search(r"\.layers\..*\.lora_[AB]\.weight$", name) for name in names)
    config = json.loads((run.folder / "vllm/adapter_config.json").read_text())
    assert not config["modules_to_save"]
    for branch in ("face", *branches_of(run.name)):
        assert (run.folder / f"vllm/mmemo_{branch}/{branch}.json").exists()


def test_the_card_says_what_other_programs_do(run: Run) -> None:
    for kind in ("peft", "merged", *(["vllm"] if run.name != "qwen2_audio" else [])):
        card = (run.folder / kind / "README.md").read_text()
        assert "see no face" in card
        assert "`mmemo_face`" in card
        assert ("fuse no streams" in card) == bool(branches_of(run.name))
        assert "| face | vit," in card
        assert "cannot load it without mmemo" not in card
        digest = checkpoint.verify(run.folder / kind).files["mmemo_face/connectors.safetensors"][1]
        assert f"| `mmemo_face/connectors.safetensors` | `{digest}` |" in card


def test_the_terminal_says_it(
    omni: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_to(omni.folder / "run", {"peft": tmp_path / "peft"})
    said = " ".join(capsys.readouterr().out.split())
    assert "The face and fusion branches lie in mmemo_face and mmemo_fusion: PEFT," in said


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    save_file({}, file)


DAMAGE: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("peft", "mmemo_face/face.json", truncate),
    ("merged", "mmemo_face/connectors.safetensors", truncate),
    ("peft", "mmemo_face/connectors.safetensors", Path.unlink),
    ("peft", "mmemo_face/face_tower/model.safetensors", truncate),
    ("peft", "mmemo_fusion/fusion.safetensors", emptied),
    ("merged", "mmemo_fusion/fusion.safetensors", emptied),
    ("peft", "mmemo_face", shutil.rmtree),
    ("merged", "mmemo_fusion", shutil.rmtree),
]


def test_a_damaged_branch_is_refused(omni: Run, tmp_path: Path) -> None:
    for number, (kind, file, spoil) in enumerate(DAMAGE):
        copy = tmp_path / str(number)
        shutil.copytree(omni.folder / kind, copy)
        spoil(copy / file)
        with pytest.raises(CheckpointError, match=re.escape(file)):
            load_model(ModelConfig(path=str(copy)))
        # Without the sums of the files, as after a copy of some of them.
        (copy / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=file.split("/")[0]):
            load_model(ModelConfig(path=str(copy)))


def test_experts_have_their_branches(tmp_path: Path) -> None:
    """An adapter with experts per modality, which only mmemo loads."""
    run = train("qwen2_5_omni", tmp_path, lora={**LORA, "experts": {}})
    export_to(run.folder / "run", {"adapter": tmp_path / "adapter"})
    kept = load_model(ModelConfig(path=str(tmp_path / "adapter")))
    batch = asked(run)
    assert torch.equal(ours(unwrap(kept.model), batch), ours(unwrap(run.own.model), batch))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modalities"] == ["video", "audio", "face", "fusion"]
