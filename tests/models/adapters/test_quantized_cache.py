"""Quantized layers that were kept are those that were made, and nothing else is taken for them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from mmemo.models.adapters import quantization, quantized_cache
from mmemo.models.adapters.quantization import Quantization, dequantize, quantize

KINDS: tuple[Quantization, ...] = ("nf4", "int8")


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    lm: Any = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32, bias=False)).to(dtype)
    lm.get_input_embeddings = lambda: SimpleNamespace(weight=torch.zeros(1, dtype=dtype))
    return SimpleNamespace(language_model=lm, config=None)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMEMO_QUANTIZED", str(tmp_path / "kept"))
    return tmp_path / "kept"


def no_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring gives the weight of each layer, and quantizing would leave it out."""
    real = quantization._layer

    def layer(linear: Any, kind: Any, weight: Any = None) -> Any:
        assert weight is not None, "quantized again"
        return real(linear, kind, weight)

    monkeypatch.setattr(quantization, "_layer", layer)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def same(one: Any, other: Any) -> bool:
    mine, theirs = one.language_model.state_dict(), other.language_model.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(x, theirs[key]) for key, x in mine.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_computes_the_same(
    kept: Path, monkeypatch: pytest.MonkeyPatch, kind: Quantization, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("MMEMO_QUANTIZED", "0")
    plain = model(dtype=dtype)
    quantize(plain, kind)
    assert not kept.exists()
    monkeypatch.setenv("MMEMO_QUANTIZED", str(kept))
    made = model(dtype=dtype)
    quantize(made, kind)
    assert len(files(kept)) == 1
    no_quantizing(monkeypatch)
    found = model(dtype=dtype)
    quantize(found, kind)
    assert len(files(kept)) == 1
    assert same(made, plain)
    assert same(found, plain)
    x = torch.randn(5, 128, dtype=dtype)
    for mode in (True, False):
        answers = [one.language_model.train(mode)(x) for one in (plain, made, found)]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])
    # Gradients reach what is below, as an adapter needs.
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for one, given in zip((plain, found), inputs, strict=True):
        one.language_model(given).float().sum().backward()
    assert torch.equal(*[given.grad for given in inputs])
    for one in (plain, found):
        dequantize(one)
    assert same(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_other_files(kept: Path, kind: Quantization) -> None:
    one = model(0)
    quantize(one, kind)
    other = model(1)
    quantize(other, kind)
    assert len(files(kept)) == 2
    assert not same(one, other)
    biased = model(0)
    with torch.no_grad():
        biased.language_model[0].bias += 1
    quantize(biased, kind)
    assert len(files(kept)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_made_again(kept: Path, kind: Quantization) -> None:
    plain = model()
    quantize(plain, kind)
    (file,) = files(kept)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-40] ^= 16
    for damaged in (bytes(flipped), whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        found = model()
        quantize(found, kind)
        assert same(found, plain)
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMEMO_QUANTIZED", str(tmp_path / "file/kept"))
    found = model()
    quantize(found)
    assert found.is_loaded_in_4bit
    assert "quantized layers are not kept" in capsys.readouterr().err


def _rank(number: int, results: Any) -> None:
    count = 0
    real = quantization._layer

    def layer(linear: Any, kind: Any, weight: Any = None) -> Any:
        nonlocal count
        count += weight is None
        return real(linear, kind, weight)

    quantization._layer = layer  # pyright: ignore[reportPrivateUsage]
    quantize(model())
    results.put((number, count))


def test_one_rank_of_several_quantizes(kept: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    ranks = [context.Process(target=_rank, args=(number, results)) for number in range(2)]
    for rank in ranks:
        rank.start()
    counts = sorted(results.get(timeout=60)[1] for _ in ranks)
    for rank in ranks:
        rank.join()
    assert counts == [0, 2]
    assert len(files(kept)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_costs_no_run_and_no_second_quantizing(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    def full(_: object, part: Path) -> None:
        part.write_bytes(b"half")
        raise error

    calls: list[int] = []
    real = quantization._layer
    monkeypatch.setattr(quantization, "_layer", lambda *given: (calls.append(1), real(*given))[1])
    monkeypatch.setattr(quantized_cache, "save_file", full)
    found = model()
    quantize(found)
    assert found.is_loaded_in_4bit
    assert len(calls) == 2  # once for each layer
    assert not [path for path in kept.iterdir() if path.suffix != ".lock"]
    assert "quantized layers are not kept" in capsys.readouterr().err
