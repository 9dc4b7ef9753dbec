"""Names of adapters as vLLM maps them, and what each program is not given."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from typer.testing import CliRunner

from mmemo import checkpoint
from mmemo.cli import app
from mmemo.errors import ConfigError
from mmemo.export.stage import export_to, parse_request
from mmemo.models.adapters.lora import save_model, unwrap
from mmemo.models.build import ModelConfig, load_model
from mmemo.models.layouts import LAYOUTS, extra_parts, max_rank, obstacle, vllm_name
from tests.export import native
from tests.export.native import LORA, logits, release_omni, release_vl
from tests.models.native_files import save_omni
from tests.models.parts import tiny

THINKER = {
    "thinker.lm_head.": "language_model.lm_head.",
    "thinker.model.": "language_model.model.",
    "thinker.": "",
}
VL = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
}
MAPPERS: dict[str, dict[str, str]] = {
    "qwen2_5_omni_thinker": THINKER,
    "qwen3_omni_moe_thinker": THINKER,
    "qwen2_vl": VL,
    "qwen2_5_vl": VL,
    "qwen3_vl": VL,
}
"""The beginnings of names that vLLM 0.32 maps (``hf_to_vllm_mapper``), as far as they apply here;
``test_vllm.py`` compares them with vLLM's own file."""
CLASSES = {
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


def in_vllm(kind: str, name: str) -> str:
    """A name of an adapter's weight as vLLM looks it up in its own model."""
    inner = name.removeprefix("base_model.model.")
    for begin, new in MAPPERS[kind].items():
        if inner.startswith(begin):
            return new + inner.removeprefix(begin)
    return inner


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_every_name_that_peft_gives_is_one_of_vllms_layers(kind: str) -> None:
    import transformers

    assert set(CLASSES) == {name for name, one in LAYOUTS.items() if one.lora is not None}
    small: dict[str, Any] = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 1}}
    if "omni" in kind:
        small["audio_config"] = {"encoder_layers": 1}
    with torch.device("meta"):
        model: Any = getattr(transformers, CLASSES[kind])(AutoConfig.for_model(kind, **small))
        layers = r".*\.language_model\.(.*\.)?(q_proj|o_proj)"
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    names = list(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # PEFT takes the end of the pattern alone for some mixtures of experts.
    names = [name for name in names if ".language_model." in name]
    assert len(names) == 2 * 2 * 2
    layer = r"language_model\.model\.layers\.[01]\.self_attn\.[qo]_proj\.lora_[AB]\.weight"
    found = {in_vllm(kind, vllm_name(kind, name)) for name in names}
    assert all(re.fullmatch(layer, name) for name in found)
    assert len(found) == len(names)
    if "omni" in kind:  # as PEFT names them, vLLM has no such layer
        assert not any(re.fullmatch(layer, in_vllm(kind, name)) for name in names)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.visual.blocks.0.attn.q.lora_A.weight",
        "base_model.model.model.language_model.embed_tokens.weight",
        "base_model.model.face_connector.proj.weight",
    ],
)
def test_a_weight_without_a_name_in_vllm_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)):
        vllm_name("qwen2_5_omni_thinker", name)


def test_ranks_are_those_that_vllm_takes() -> None:
    assert [max_rank(rank) for rank in (1, 4, 8, 9, 64, 65, 512)] == [1, 8, 8, 16, 64, 128, 512]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``omni`` as released, ``run``: an adapter trained on it, and its export of every kind."""
    found = tmp_path_factory.mktemp("layouts")
    release_omni(found / "omni")
    native.trained(found / "run", found / "omni")
    kinds: Any = ("adapter", "peft", "vllm", "merged")
    export_to(found / "run", {kind: found / kind for kind in kinds})
    return found


def run_cards_code(folder: Path, heading: str, base: Path) -> Any:
    """The model that the code under a heading of the card makes."""
    card = (folder / "README.md").read_text()
    (code,) = re.findall(rf"### {heading}\n\n```python\n(.*?)```", card, re.DOTALL)
    made: dict[str, Any] = {}
    exec(
        re.sub(r'"path/to/[^"]*"', repr(str(base)), code).replace("this/folder", str(folder)), made
    )
    return made["model"]


def test_every_way_of_the_card_gives_the_runs_logits(folder: Path) -> None:
    """In PEFT and transformers on the untouched classes, and in mmemo."""
    own = logits(load_model(ModelConfig(path=str(folder / "run/final"))).model)
    base = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder / "omni")
    assert (logits(base) - own).abs().max() > 0.1
    found = {
        "peft": run_cards_code(folder / "peft", "PEFT", folder / "omni"),
        "peft in mmemo": run_cards_code(folder / "peft", "mmemo", folder / "omni"),
        "merged": run_cards_code(folder / "merged", "transformers", folder / "omni"),
        "merged in mmemo": run_cards_code(folder / "merged", "mmemo", folder / "omni"),
    }
    for way, model in found.items():
        assert (logits(model) - own).abs().max() < 1e-4, way
    assert isinstance(found["peft"], PeftModel)
    assert type(found["merged"]) is Qwen2_5OmniThinkerForConditionalGeneration


def test_merged_weights_lie_in_the_whole_models_layout(folder: Path) -> None:
    weights = load_file(folder / "merged/model.safetensors")
    assert all(name.startswith("thinker.") for name in weights)
    config = json.loads((folder / "merged/config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni"
    assert config["architectures"] == ["Qwen2_5OmniForConditionalGeneration"]
    inside = config["thinker_config"]
    assert inside["text_config"]["tie_word_embeddings"] is inside["tie_word_embeddings"] is False
    # transformers' class of the whole model loads only with the released voices beside it.
    with torch.device("meta"):
        whole = Qwen2_5OmniForConditionalGeneration(AutoConfig.from_pretrained(folder / "merged"))
    names = (name.replace(".model.visual", ".visual") for name in whole.state_dict())
    names = (name.replace(".model.audio_tower", ".audio_tower") for name in names)
    assert set(weights) == {name.replace(".language_model", "") for name in names}


def test_an_adapter_for_vllm_has_its_names(folder: Path) -> None:
    config = json.loads((folder / "vllm/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    theirs = load_file(folder / "vllm/adapter_model.safetensors")
    ours = load_file(folder / "peft/adapter_model.safetensors")
    assert {name.split(".layers.")[0] for name in theirs} == {"base_model.model.thinker.model"}
    for name, weight in ours.items():
        assert torch.equal(theirs[vllm_name("qwen2_5_omni_thinker", name)], weight)
    card = (folder / "vllm/README.md").read_text()
    assert "vllm serve path/to/omni --enable-lora --max-lora-rank 8" in card
    for kind in ("adapter", "peft", "vllm", "merged"):
        card = (folder / kind / "README.md").read_text()
        assert str(folder) not in card
        assert "More Information Needed" not in card
        (file,) = (folder / kind).glob("*.safetensors")
        assert f"`{checkpoint.verify(folder / kind).files[file.name][1]}`" in card


def test_a_moved_export_finds_its_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "peft", tmp_path / "far/away/adapter")
    own = logits(load_model(ModelConfig(path=str(folder / "run/final"))).model)
    found = logits(load_model(ModelConfig(path=str(tmp_path / "far/away/adapter"))).model)
    assert torch.equal(found, own)


def base_named(export: Path) -> str:
    return json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_base_is_a_hub_id_where_the_run_began_with_one(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    # As a run leaves it that was given a hub id: a copy of the model under the adapter.
    base = run / "base"
    shutil.copytree(folder / "omni", base)
    hub = "Maker/Model-7B"
    made = {"config": {"path": hub}, "weights": "0" * 32}
    (base / "mmemo_base.json").write_text(json.dumps(made))
    (base / "mmemo_native.json").write_text(
        json.dumps({"source": {"hub": hub, "folder": None, "license": "apache-2.0"}})
    )
    file = run / "final/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    (run / "final/manifest.json").unlink()
    shutil.move(run / "final", run / "old")
    checkpoint.save(run / "final", lambda to: shutil.copytree(run / "old", to, dirs_exist_ok=True))

    export_to(run, {"adapter": tmp_path / "a"})
    assert base_named(tmp_path / "a") == hub
    assert f'"{hub}", dtype="float32"' in (tmp_path / "a/README.md").read_text()
    export_to(run, {"adapter": tmp_path / "b"}, base="Other/Copy")
    assert base_named(tmp_path / "b") == "Other/Copy"
    export_to(run, {"adapter": tmp_path / "c"}, base=str(folder / "omni"))
    assert base_named(tmp_path / "c") == str(folder / "omni")
    with pytest.raises(ConfigError, match="no folder"):
        export_to(run, {"adapter": tmp_path / "d"}, base="./nowhere")
    # With more tokens, or after a merge, the base is not the hub's any more.
    for change in ({"path": hub, "new_tokens": ["<au1>"]}, {"path": str(tmp_path)}):
        (base / "mmemo_base.json").write_text(json.dumps({**made, "config": change}))
        export_to(run, {"adapter": tmp_path / "a"})
        assert base_named(tmp_path / "a") == str(base.resolve())


def test_a_part_of_mmemos_own_is_for_mmemo_alone(folder: Path) -> None:
    """As a face branch, wherever in the model it is and whatever it is called."""
    for export in ("run/final", "merged"):
        model: Any = unwrap(load_model(ModelConfig(path=str(folder / export))).model)
        assert extra_parts(model) == []
        model.model.add_module("face_connector", torch.nn.Sequential(torch.nn.Linear(2, 2)))
        assert extra_parts(model) == ["model.face_connector"]
        for program in ("peft", "transformers", "vllm"):
            assert "face_connector" in str(obstacle(program, model, None, None))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_have_the_asked_number_type(folder: Path, tmp_path: Path, dtype: Any) -> None:
    export_to(folder / "run", {"peft": tmp_path / "p", "merged": tmp_path / "m"}, dtype=dtype)
    wanted = getattr(torch, dtype)
    for export in ("p", "m"):
        (file,) = (tmp_path / export).glob("*.safetensors")
        assert {x.dtype for x in load_file(file).values()} == {wanted}
    merged: Any = load_model(ModelConfig(path=str(tmp_path / "m"))).model
    assert merged.dtype == wanted
    full = load_file(folder / "merged/model.safetensors")
    for name, weight in load_file(tmp_path / "m/model.safetensors").items():
        assert torch.equal(weight, full[name].to(wanted)), name


def test_a_weight_that_does_not_fit_its_number_type_is_named(tmp_path: Path) -> None:
    release_omni(tmp_path / "omni")
    loaded = native.trained(tmp_path / "run", tmp_path / "omni")
    shutil.rmtree(tmp_path / "run/final")
    weight = next(x for n, x in loaded.model.named_parameters() if "lora_A" in n)
    weight.data[0, 0] = 1e6
    checkpoint.save(
        tmp_path / "run/final",
        lambda to: save_model(loaded.model, loaded.processor, to, base=loaded.base),
    )
    with pytest.raises(ConfigError, match="too large for float16"):
        export_to(tmp_path / "run", {"peft": tmp_path / "p"}, dtype="float16")
    assert not list(tmp_path.glob("p*"))


def test_a_4_bit_adapter_says_that_it_needs_the_4_bit_base(tmp_path: Path) -> None:
    """The card's code rounds the base as the run did; on the unrounded one the answer differs."""
    release_omni(tmp_path / "omni")
    own = logits(native.trained(tmp_path / "run", tmp_path / "omni", quantization="nf4").model)
    export_to(tmp_path / "run", {"peft": tmp_path / "p", "merged": tmp_path / "m"})
    assert "rounded to 4 bits" in (tmp_path / "p/README.md").read_text()
    plain = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "omni")
    off = (logits(PeftModel.from_pretrained(plain, str(tmp_path / "p"))) - own).abs().max()
    right = logits(run_cards_code(tmp_path / "p", "PEFT", tmp_path / "omni"))
    merged = logits(run_cards_code(tmp_path / "m", "transformers", tmp_path / "omni"))
    # Beside mmemo, bitsandbytes may pack the weights of some CPUs once more, in bfloat16.
    assert (right - own).abs().max() < 0.03 < 0.1 < off
    assert (merged - own).abs().max() < 1e-3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("vllm", {"lora": {**LORA, "use_dora": True}}, "DoRA"),
    "head": ("vllm", {"lora": {**LORA, "modules_to_save": ["lm_head"]}}, "trains tokens"),
    "tokens": ("vllm", {"lora": {**LORA, "trainable_tokens": [" sad"]}}, "trains tokens"),
    "new tokens": ("vllm", {"new_tokens": ["<au1>"]}, "is not a whole 'qwen2_5_omni'"),
    "experts": ("vllm", {"lora": {**LORA, "experts": {}}}, "experts per modality"),
    "experts in peft": ("peft", {"lora": {**LORA, "experts": {}}}, "experts per modality"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_program_cannot_carry_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    kind, changes, said = REFUSED[name]
    native.trained(tmp_path / "run", folder / "omni", **changes)
    outs: Any = {kind: tmp_path / "out"}
    with pytest.raises(ConfigError, match=said):
        export_to(tmp_path / "run", outs)
    assert not list(tmp_path.glob("out*"))
    # What mmemo loads is written, and says so.
    export_to(tmp_path / "run", {"adapter": tmp_path / "a"})
    assert said in (tmp_path / "a/README.md").read_text()


def test_a_thinker_without_the_whole_model_is_no_base_for_vllm(tmp_path: Path) -> None:
    save_omni(tmp_path / "thinker")
    native.trained(tmp_path / "run", tmp_path / "thinker")
    with pytest.raises(ConfigError, match=r"'thinker' is not a whole 'qwen2_5_omni'.*--for merged"):
        export_to(tmp_path / "run", {"vllm": tmp_path / "v"})
    export_to(tmp_path / "run", {"merged": tmp_path / "m"})
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == "qwen2_5_omni"


def test_a_model_of_parts_is_not_for_vllm(tmp_path: Path) -> None:
    loaded = tiny(tmp_path / "base", lora={"r": 4, "lora_alpha": 8})
    own = loaded.model
    checkpoint.save(
        tmp_path / "run/final",
        lambda to: save_model(own, loaded.processor, to, base=loaded.base),
    )
    with pytest.raises(ConfigError, match="built from parts"):
        export_to(tmp_path / "run", {"vllm": tmp_path / "v"})
    export_to(tmp_path / "run", {"peft": tmp_path / "p"})
    found = run_cards_code(tmp_path / "p", "PEFT", tmp_path / "base")
    assert torch.equal(logits(found), logits(own))


def test_other_models_keep_their_layout(tmp_path: Path) -> None:
    release_vl(tmp_path / "vl")
    own = logits(native.trained(tmp_path / "run", tmp_path / "vl").model)
    export_to(tmp_path / "run", {"vllm": tmp_path / "v", "merged": tmp_path / "m"})
    names = load_file(tmp_path / "v/adapter_model.safetensors")
    assert {name.split(".layers.")[0] for name in names} == {
        "base_model.model.model.language_model"
    }
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "m")
    assert (logits(merged) - own).abs().max() < 1e-4


def test_the_command_line_exports_for_a_program(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "v")
    given = ["--for", "vllm", "--out", out, "--dtype", "bfloat16", "--base", "Maker/Model-7B"]
    done = CliRunner().invoke(app, ["export", str(folder / "run"), *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert base_named(tmp_path / "v") == "Maker/Model-7B"
    names = load_file(tmp_path / "v/adapter_model.safetensors")
    assert {x.dtype for x in names.values()} == {torch.bfloat16}


def test_options_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    out = tmp_path / "x"
    for given, said in (
        ((None, out, None), "go together"),
        (("vllm", None, None), "go together"),
        (("tgi", out, None), "there is no 'tgi'"),
        (("peft", out, "int8"), "there is no 'int8'"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_request(*given)
    with pytest.raises(ConfigError, match="give one"):
        parse_request("merged", out, None, merged=out)
    assert parse_request("vllm", out, "bfloat16") == ({"vllm": out}, "bfloat16")
    assert parse_request(None, None, None, adapter=out) == ({"adapter": out}, None)
