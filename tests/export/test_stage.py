"""Exported adapters and merged weights load in a fresh process and answer the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmemo import checkpoint
from mmemo.data.collate import Collator
from mmemo.data.sample import MediaRef, Sample, Turn
from mmemo.errors import CheckpointError, ConfigError
from mmemo.export.card import model_card
from mmemo.export.stage import ExportConfig, export_run, run_export
from mmemo.features.source import FeatureSource
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import save_model, unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.run_log import RunRecord
from mmemo.train.sft import run_sft
from tests.media_files import write_clip
from tests.models.parts import VIT, shake, tiny, values
from tests.train.tiny import sft_config, write_rows

LORA = {"r": 4, "lora_alpha": 8}
WIDE = {"scratch": {"hidden_size": 64, "layers": 2, "heads": 2, "vocab_size": 400}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "dora": {"lora": {**LORA, "use_dora": True}},
    "qlora": {"lora": LORA, "quantization": "nf4", "text": WIDE},
    "bfloat16": {"lora": LORA, "dtype": "bfloat16"},
}
CLIP = "clip.mp4"


def answer(loaded: Loaded, root: Path) -> dict[str, Any]:
    """What a model says of the real clip: logits of the next token, and the words it goes on
    with."""
    refs: Any = {name: MediaRef(CLIP) for name in ("video", "audio", "face")}
    rows = [Sample("a", (Turn("user", "<video><audio><face>Which emotion?"),), refs)]
    backbone: Any = unwrap(loaded.model).eval()
    with FeatureSource(rows, backbone, None, root, DecodeConfig(), isolate=False) as source:
        batch = Collator(loaded.processor, source)(rows, generation=True)
    inputs = {n: x for n, x in batch.items() if isinstance(x, torch.Tensor) and n != "labels"}
    model: Any = loaded.model
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, -1].float()
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {
        "logits": logits.tolist(),
        "ids": ids[0, inputs["input_ids"].shape[1] :].tolist(),
        "dtype": str(backbone.dtype),
        "fingerprint": backbone.feature_fingerprint("video"),
    }


def in_a_fresh_process(root: Path, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The same of saved models, with nothing but their folders given."""
    code = "import sys; from tests.export.test_stage import answer_all; answer_all(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(root), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer_all(root: str, *folders: str) -> None:
    loaded = [load_model(ModelConfig(path=folder)) for folder in folders]
    print(json.dumps([answer(one, Path(root)) for one in loaded]))


def trained(folder: Path, **changes: Any) -> Loaded:
    """A run folder whose model has moved away from its initialisation."""
    loaded = tiny(folder / "base", **changes)
    shake(loaded.model, 0.1)

    def write(staged: Path) -> None:
        save_model(loaded.model, loaded.processor, staged, base=loaded.base)

    checkpoint.save(folder / "final", write)
    return loaded


def away(one: dict[str, Any], other: dict[str, Any]) -> float:
    return (torch.tensor(one["logits"]) - torch.tensor(other["logits"])).abs().max().item()


def test_adapter_and_merged_answer_as_the_run_does(tmp_path: Path) -> None:
    """On a real clip, for every kind of adapter, loaded without a word about its kind."""
    write_clip(tmp_path / CLIP, seconds=1.0, fps=4)
    ours: dict[str, dict[str, Any]] = {}
    for kind, changes in KINDS.items():
        ours[kind] = answer(trained(tmp_path / kind, **changes), tmp_path)
        export_run(
            tmp_path / kind,
            adapter=tmp_path / kind / "a/b/adapter",
            merged=tmp_path / kind / "merged",
        )
    names = ("base", "final", "a/b/adapter", "merged")
    found = in_a_fresh_process(tmp_path, [tmp_path / kind / n for kind in KINDS for n in names])
    for number, (kind, own) in enumerate(ours.items()):
        base, final, adapter, merged = found[4 * number : 4 * number + 4]
        # A bfloat16 number has three digits, and merging rounds each weight once more.
        same, close = (1e-5, 1e-4) if kind != "bfloat16" else (0.01, 0.05)
        assert away(base, own) > 5 * close, kind
        assert away(final, own) < same, kind
        assert away(adapter, own) < same, kind
        assert away(merged, own) < close, kind
        for other in (final, adapter, merged):
            assert other["ids"] == own["ids"] or (kind == "bfloat16" and other is merged), kind
            assert other["dtype"] == own["dtype"], kind
            assert other["fingerprint"] == own["fingerprint"], kind  # a warm store stays warm
    assert ours["bfloat16"]["dtype"] == "torch.bfloat16"


def test_a_run_in_bfloat16_hands_its_number_type_on(tmp_path: Path) -> None:
    """To its export, and to a next stage, which finds its features and learns in float32."""
    write_rows(tmp_path, clips=2, rows=8)
    model = values(dtype="bfloat16", lora={**LORA, "lora_dropout": 0.0})
    short = {"max_steps": 1, "bf16": True}
    final = run_sft(sft_config(tmp_path, tmp_path / "first", model=model, train=short))
    (first,) = RunRecord(tmp_path / "first").events("ingest")
    export_run(final, merged=tmp_path / "merged")
    for name, start in (("second", final), ("third", tmp_path / "merged")):
        loaded = load_model(ModelConfig(path=str(start)))
        assert {p.dtype for p in unwrap(loaded.model).encoder("audio").parameters()} == {
            torch.bfloat16
        }
        out = tmp_path / name
        run_sft(sft_config(tmp_path, out, model={"path": str(start)}, train=short))
        (ingest,) = RunRecord(out).events("ingest")
        assert (ingest["new"], ingest["reused"]) == (0, first["new"])
    learnt = load_file(tmp_path / "second/final/adapter_model.safetensors")
    assert {x.dtype for x in learnt.values()} == {torch.float32}
    lm = load_file(tmp_path / "third/final/model.safetensors")
    assert lm["model.language_model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert unwrap(load_model(ModelConfig(path=str(tmp_path / "third/final"))).model).dtype == (
        torch.bfloat16
    )


def test_the_card_says_where_the_parts_are_from_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModel, ViTImageProcessorPil

    parts = {"licensed": "---\nlicense: apache-2.0\n---\nAn encoder.", "bare": "---\n: [\n---\n"}
    for name, card in parts.items():
        folder = tmp_path / name
        AutoModel.from_config(AutoConfig.for_model(**VIT)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
        (folder / "README.md").write_text(card)
    monkeypatch.chdir(tmp_path)
    trained(
        tmp_path / "run",
        lora=LORA,
        video={"encoder": str(tmp_path / "licensed")},
        face={"encoder": "bare"},
    )
    run = {"data": {"manifests": [str(tmp_path / "rows.jsonl")], "media_root": str(tmp_path)}}
    (tmp_path / "run/config.yaml").write_text(json.dumps(run))
    export_run(tmp_path / "run", adapter=tmp_path / "a/adapter", merged=tmp_path / "merged")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("a/adapter", "merged")]
    for card in cards:
        assert str(tmp_path) not in card
        assert "| language model | llama | made for this model | none needed |" in card
        assert (
            "| video | vit, layer -1, 16 wide, mean pooling | local folder `licensed` | apac"
            in card
        )
        assert "pooling | local folder `bare` | unknown |" in card
        assert "- rows.jsonl" in card
        assert "base_model" not in card.split("---")[1]  # none of the parts is on the hub
    assert "the base model `path/to/base`" in cards[0]
    assert str(tmp_path) not in (tmp_path / "merged/manifest.json").read_text()


def test_the_card_links_parts_of_the_hub(tmp_path: Path) -> None:
    loaded = trained(tmp_path / "run")
    config: Any = unwrap(loaded.model).config
    hub = {"hub": "some/encoder", "folder": None, "license": None}
    config.parts = {**config.parts, "video": hub, "face": hub}
    card = model_card(loaded, tmp_path / "run/final", "merged", tmp_path / "out")
    assert 'base_model: ["some/encoder"]' in card.split("---")[1]
    assert "| [some/encoder](https://huggingface.co/some/encoder) | unknown |" in card
    config.parts = None  # as of a model saved before parts were kept
    card = model_card(loaded, tmp_path / "run/final", "merged", tmp_path / "out")
    assert "| language model | llama | unknown | unknown |" in card


def test_the_card_tells_every_stage_and_what_no_export_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = trained(tmp_path / "second", audio=None, fusion=None)
    checkpoint.save(
        tmp_path / "first/final", lambda staged: (staged / "x").write_text("x"), meta={"step": 7}
    )
    start = {"path": str(tmp_path / "first/final")}
    for name, model in (("first", {}), ("second", start)):
        data = {"manifests": [str(tmp_path / f"{name}.jsonl")]}
        config = {"model": model, "data": data}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
    RunRecord(tmp_path / "first").event("sft")
    config: Any = unwrap(loaded.model).config
    text = {"hub": "some/llm", "folder": None, "license": "llama3"}
    config.parts = {**config.parts, "text": text}
    row = {"name": "e", "n": 3, "war": "50", "uar": "50", "benchmark": "b.py"}
    asked = {**row, "attention": ["reallocation"]}
    monkeypatch.setattr("mmemo.export.card._evaluations", lambda final: [asked])
    card = model_card(loaded, tmp_path / "second/final", "merged", tmp_path / "out")
    told = [line for line in card.splitlines() if ".jsonl |" in line]
    assert told == [
        "| first | sft | first.jsonl | 7 | parts |",
        "| second | – | second.jsonl | – | first |",
    ]
    assert "e was asked with reallocation, which mmemo does" in card
    assert "from the face and the scene, trained" in card
    assert 'license: other\nlicense_name: "llama3"' in card.split("---")[1]


def test_a_whole_model_has_no_adapter_to_export(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    with pytest.raises(ConfigError, match="use --merged"):
        export_run(tmp_path / "run", adapter=tmp_path / "adapter")
    run_export(ExportConfig(output_dir=str(tmp_path / "e"), source=str(tmp_path / "run")))
    load_model(ModelConfig(path=str(tmp_path / "e/merged")))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapter DIR"):
        export_run(tmp_path)
    with pytest.raises(ConfigError, match="mmemo sft"):
        export_run(tmp_path, merged=tmp_path / "m")
    trained(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    for out in ("mine", "mine/notes.txt"):
        with pytest.raises(ConfigError, match="holds other files"):
            export_run(tmp_path / "run", merged=tmp_path / out)
    weights = tmp_path / "run/final/model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_run(tmp_path / "run", merged=tmp_path / "m")


@pytest.mark.parametrize(
    "target", ["run/final", "run", "run/final/in", "run/base", "run/base/in", "run/checkpoint-2/in"]
)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_no_export_replaces_a_model(tmp_path: Path, target: str, kind: str) -> None:
    trained(tmp_path / "run", lora=LORA)
    checkpoint.save(tmp_path / "run/checkpoint-2", lambda staged: (staged / "x").write_text("x"))
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="export to another folder"):
        export_run(tmp_path / "run", **{kind: tmp_path / target})
    assert snapshot(tmp_path) == before


def test_only_an_untouched_export_is_replaced(tmp_path: Path) -> None:
    trained(tmp_path / "run", lora=LORA)
    out = tmp_path / "out"
    export_run(tmp_path / "run", adapter=out)
    export_run(tmp_path / "run", merged=out)
    assert (out / "model.safetensors").exists()
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="export to another folder"):
        export_run(tmp_path / "run", adapter=tmp_path / "both", merged=tmp_path / "both")
    trained(tmp_path / "other")
    for kept in (tmp_path / "other/final", tmp_path / "other/base"):
        if kept.exists():
            with pytest.raises(ConfigError, match="holds other files"):
                export_run(tmp_path / "run", merged=kept)
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds other files"):
        export_run(tmp_path / "run", merged=out)
    (out / "notes.txt").unlink()
    assert {n: x for n, x in snapshot(tmp_path).items() if not n.startswith("other")} == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
