"""Collated prompts as requests to vLLM: the trainer's ids, and media at their placeholders."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.errors import ConfigError, DataError
from mmemo.features.source import FeatureSource
from mmemo.generation.vllm.prompts import Clips, Prompt, read_prompts
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.media_files import write_clip
from tests.models.native_files import FED, save_omni, save_vl
from tests.vllm_server import program

LIMITS = parse(DecodeConfig, {"workers": 1})
BOTH: tuple[Modality, ...] = ("video", "audio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of different lengths and shapes, and two models."""
    found = tmp_path_factory.mktemp("prompts")
    for number, size in enumerate(((32, 32), (64, 32))):
        write_clip(found / f"{number}.mp4", seconds=0.6 + 0.3 * number, size=size, tone=200.0)
    save_omni(found / "omni")
    save_vl(found / "vl")
    return found


def native(folder: Path, kind: str, **fed: Any) -> Loaded:
    values = {"path": str(folder / kind), "native": {**FED, **fed}, "sampling": {"frames": 4}}
    return load_model(parse(ModelConfig, values))


def rows_of(*asked: tuple[Modality, ...]) -> list[Sample]:
    return [
        Sample(
            sample_id=f"row-{number}",
            turns=(Turn("user", "".join(f"<{name}>" for name in media) + "Which emotion?"),),
            media={name: MediaRef(f"{number % 2}.mp4") for name in media},
        )
        for number, media in enumerate(asked)
    ]


def read(loaded: Loaded, folder: Path, rows: list[Sample]) -> tuple[dict[str, Any], list[Prompt]]:
    model: Any = unwrap(loaded.model)
    with FeatureSource(rows, model, None, folder, LIMITS, isolate=False) as source:
        batch = Collator(loaded.processor, source)(rows, generation=True)
    clips = Clips(rows, model.backbone, folder, LIMITS)
    return batch, read_prompts(batch, model.backbone, clips)


def tensors(prompt: Prompt, modality: str, at: int = 0) -> dict[str, Tensor]:
    """What the request holds of a medium."""
    assert prompt.features is not None
    raw = base64.b64decode(prompt.features["kwargs_data"][modality][at])
    values = msgpack.unpackb(raw, ext_hook=lambda code, data: (code, data))
    found: dict[str, Tensor] = {}
    for name, one in values.items():
        dtype, shape, (code, data) = one["data"]
        assert code == 3
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found[name] = flat.view(getattr(torch, dtype)).reshape(shape)
    return found


def test_prompts_keep_the_trainers_ids_and_have_media_at_their_placeholders(folder: Path) -> None:
    loaded = native(folder, "omni")
    rows = rows_of(BOTH, ("audio",), (), ("video",))
    batch, found = read(loaded, folder, rows)
    backbone: Any = unwrap(loaded.model).backbone
    config = backbone.model.config
    for row, prompt in enumerate(found):
        kept = batch["attention_mask"][row].bool()
        assert prompt.ids == batch["input_ids"][row][kept].tolist()
    assert found[2].features is None
    both = found[0].features
    assert both is not None
    assert list(both["mm_placeholders"]) == list(both["mm_hashes"]) == ["video", "audio"]
    for modality, token in (("video", config.video_token_id), ("audio", config.audio_token_id)):
        ((place,),) = [both["mm_placeholders"][modality]]
        begin, end = place["offset"], place["offset"] + place["length"]
        assert found[0].ids[begin:end] == [token] * place["length"]
        assert found[0].ids.count(token) == place["length"]
    # The encoders make of what is sent the features that the trainer reads.
    sound, film = tensors(found[0], "audio"), tensors(found[0], "video")
    frames = sound["audio_feature_lengths"]
    with torch.no_grad():
        heard = backbone._encoder("audio")(
            sound["input_audio_features"], feature_lens=frames[None]
        ).last_hidden_state
        seen = backbone._encoder("video")(
            film["pixel_values_videos"], grid_thw=film["video_grid_thw"][None]
        ).pooler_output
    clip = int(batch["clip_index"][0])
    for x, name in ((heard, "audio"), (seen, "video")):
        wanted = batch[f"{name}_features"][clip][batch[f"{name}_features_mask"][clip]]
        torch.testing.assert_close(x, wanted, atol=1e-6, rtol=1e-5)
    assert int(frames) == int(batch["audio_mel_frames"][clip])
    assert torch.equal(film["second_per_grid_ts"], batch["video_seconds_per_grid"][clip].float())


def test_the_same_clip_has_the_same_name_and_another_has_another(folder: Path) -> None:
    rows = rows_of(("audio",), ("audio",), ("audio",))  # the third is the first again
    _, found = read(native(folder, "omni"), folder, rows)
    names = [prompt.features["mm_hashes"]["audio"][0] for prompt in found if prompt.features]
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize("stills", [False, True])
def test_stored_features_are_sent_where_vllm_reads_them(folder: Path, stills: bool) -> None:
    rows = rows_of(("video",), ("video",))
    batch, found = read(native(folder, "vl", stills=stills), folder, rows)
    name = "image" if stills else "video"
    for row, prompt in enumerate(found):
        clip = int(batch["clip_index"][row])
        wanted = batch["video_features"][clip][batch["video_features_mask"][clip]]
        grid = batch["video_grid"][clip].tolist()
        number = grid[0] if stills else 1
        parts = [tensors(prompt, name, at) for at in range(number)]
        assert torch.equal(torch.cat([one[f"{name}_embeds"] for one in parts]), wanted)
        for one in parts:
            assert one[f"{name}_grid_thw"].tolist() == [1 if stills else grid[0], *grid[1:]]
        assert prompt.features is not None
        places = prompt.features["mm_placeholders"][name]
        assert sum(one["length"] for one in places) == len(wanted)


def test_what_cannot_be_sent_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set model\.native\.audio_in_video: false"):
        read(native(folder, "omni", audio_in_video=True), folder, rows_of(BOTH))
    loaded = native(folder, "omni")
    batch, _ = read(loaded, folder, rows_of(("audio",)))
    clips = Clips(rows_of((), ("audio",)), unwrap(loaded.model).backbone, folder, LIMITS)
    clips.know([replace(rows_of((), ("audio",))[1], sample_id="row-0")])  # the other clip
    with pytest.raises(DataError, match="'row-0' is no longer the one that was encoded"):
        read_prompts(batch, unwrap(loaded.model).backbone, clips)
    with pytest.raises(ConfigError, match=r"sounds of a .* cannot be sent to vLLM; set rollout"):
        read_prompts(batch, unwrap(loaded.model).backbone, None)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["omni", "vl", "stills"])
def test_requests_hold_what_vllms_processor_makes(folder: Path, tmp_path: Path, kind: str) -> None:
    """vLLM's own code reads the request and compares it with what it makes of the same tensors."""
    fed = {"stills": True} if kind == "stills" else {}
    loaded = native(folder, "omni" if kind == "omni" else "vl", **fed)
    rows = rows_of(BOTH if kind == "omni" else ("video",))
    batch, (prompt,) = read(loaded, folder, rows)
    clip = int(batch["clip_index"][0])
    grid = batch["video_grid"][clip]
    given: dict[str, Tensor] = {}
    if kind == "omni":
        backbone: Any = unwrap(loaded.model).backbone
        clips = Clips(rows, backbone, folder, LIMITS)
        mel = clips.mel("row-0")
        given |= {"pixel_values_videos": clips.pixels("row-0"), "input_audio_features": mel}
        given["feature_attention_mask"] = torch.ones(1, mel.shape[1], dtype=torch.long)
        given["audio_feature_lengths"] = torch.tensor([mel.shape[1]])
    else:
        name = "image_embeds" if kind == "stills" else "video_embeds"
        given[name] = batch["video_features"][clip][batch["video_features_mask"][clip]]
    if kind == "stills":
        given["image_grid_thw"] = torch.tensor([[1, *grid[1:].tolist()]] * int(grid[0]))
    else:
        given["video_grid_thw"] = grid[None]
        given["second_per_grid_ts"] = batch["video_seconds_per_grid"][clip][None].float()
    save_file({n: x.contiguous() for n, x in given.items()}, tmp_path / "given.safetensors")
    body = {"token_ids": prompt.ids, "sampling_params": {}, "features": prompt.features}
    (tmp_path / "request.json").write_text(json.dumps(body))
    done = subprocess.run(
        [
            *(str(program()), str(Path(__file__).with_name("read_by_vllm.py"))),
            *(str(tmp_path / "request.json"), str(tmp_path / "given.safetensors"), kind),
        ],
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same" in done.stdout
