"""Weights in other formats to transformers folders. Each function: (unpacked, finished folder).

Run by fetch.py in a process of its own. Reads arrays only; runs nothing of what it reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

Weights = dict[str, torch.Tensor]


def load_strictly(model: torch.nn.Module, weights: Weights, may_lack: tuple[str, ...] = ()) -> None:
    """Every weight of the model is given, and every given one is used."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in may_lack]
    if missing or unexpected:
        raise SystemExit(f"missing {missing}, unexpected {unexpected}")


# --- SmolLM2: GGUF --------------------------------------------------------------------------


def causal_lm(source: Path, into: Path) -> None:
    """Dequantised by transformers, then saved as an ordinary bf16 model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # what it was read from, not what it now is
        del config.quantization_config
    model = type(read)(config)
    load_strictly(model, read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(into)
    tokenizer.save_pretrained(into)


# --- Whisper: CTranslate2 ---------------------------------------------------------------------

_CT2_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def _ct2_variables(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of a CTranslate2 model.bin: a header, then name, shape, type and bytes of each."""
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from("<" + kind, data, place)
        place += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    number("I")  # format version
    text()  # model kind
    number("I")  # its revision
    found: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = _CT2_TYPES[number("B")], number("I")
        flat = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, place)
        found[name] = flat.reshape(shape)
        place += size
    for _ in range(number("I")):  # aliases
        alias = text()
        found[alias] = found[text()]
    return found


def _ct2_names(layers: int, decoder: bool) -> Iterator[tuple[str, str]]:
    """(CTranslate2 module, transformers module) of one side's layers."""
    side = "decoder" if decoder else "encoder"
    for index in range(layers):
        ours, theirs = f"model.{side}.layers.{index}.", f"{side}/layer_{index}/"
        yield theirs + "self_attention/linear_0", ours + "self_attn.q_proj k_proj v_proj"
        yield theirs + "self_attention/linear_1", ours + "self_attn.out_proj"
        yield theirs + "self_attention/layer_norm", ours + "self_attn_layer_norm"
        if decoder:
            yield theirs + "attention/linear_0", ours + "encoder_attn.q_proj"
            yield theirs + "attention/linear_1", ours + "encoder_attn.k_proj v_proj"
            yield theirs + "attention/linear_2", ours + "encoder_attn.out_proj"
            yield theirs + "attention/layer_norm", ours + "encoder_attn_layer_norm"
        yield theirs + "ffn/linear_0", ours + "fc1"
        yield theirs + "ffn/linear_1", ours + "fc2"
        yield theirs + "ffn/layer_norm", ours + "final_layer_norm"


def _ct2_weights(found: dict[str, np.ndarray], layers: int) -> Weights:
    pairs = [
        ("encoder/conv1", "model.encoder.conv1"),
        ("encoder/conv2", "model.encoder.conv2"),
        ("encoder/layer_norm", "model.encoder.layer_norm"),
        ("decoder/layer_norm", "model.decoder.layer_norm"),
        *_ct2_names(layers, decoder=False),
        *_ct2_names(layers, decoder=True),
    ]
    weights: Weights = {
        f"model.{side}.embed_positions.weight": torch.tensor(
            found[f"{side}/position_encodings/encodings"].astype(np.float32)
        )
        for side in ("encoder", "decoder")
    }
    tokens = torch.tensor(found["decoder/embeddings/weight"].astype(np.float32))
    weights["model.decoder.embed_tokens.weight"] = tokens
    for theirs, ours in pairs:
        base, *more = ours.split(" ")
        names = [base, *(f"{base.rpartition('.')[0]}.{name}" for name in more)]
        for kinds, ending in ((("weight", "gamma"), "weight"), (("bias", "beta"), "bias")):
            array = next((found[f"{theirs}/{k}"] for k in kinds if f"{theirs}/{k}" in found), None)
            if array is None:
                continue
            # CTranslate2 stacks the projections of one input; transformers keeps them apart.
            for name, piece in zip(names, np.split(array, len(names)), strict=True):
                if ending == "bias" and name.endswith("k_proj"):
                    continue  # always zero: Whisper's keys have no bias
                weights[f"{name}.{ending}"] = torch.tensor(piece.astype(np.float32))
    return weights


def whisper(source: Path, into: Path) -> None:
    """Whisper tiny.en with its tokenizer and feature extractor."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    settings = json.loads((source / "config.json").read_text())
    weights = _ct2_weights(_ct2_variables((source / "model.bin").read_bytes()), layers=4)
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    special = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    load_strictly(model, weights, may_lack=("proj_out.weight",))
    model.tie_weights()
    model.generation_config = GenerationConfig(
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        is_multilingual=False,
        max_length=448,
        **special,
    )
    model.save_pretrained(into)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(into)
    extractor.save_pretrained(into)


# --- DINOv2: the backbone inside of an ONNX saliency network ------------------------------------


def dinov2(source: Path, into: Path) -> None:
    """DINOv2 ViT-S/14 and the preprocessing that its authors give."""
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(source / "model.onnx").graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights: Weights = {
        name.removeprefix("backbone."): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        # A linear layer's weight has no name of its own; its MatMul has the module's path.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            array = arrays.get(node.input[1])
            if array is not None:
                module = node.name.removeprefix("/backbone/").rsplit("/MatMul", 1)[0]
                weights[module.replace("/", ".") + ".weight"] = torch.tensor(array.T.copy())
    width, grid = 384, 518 // 14
    places = _only(array for array in arrays.values() if array.shape == (1, grid * grid, width))
    first = _only(
        array
        for name, array in arrays.items()
        if array.shape == (1, 1, width) and not name.startswith("backbone.")
    )
    weights["embeddings.position_embeddings"] = torch.tensor(np.concatenate([first, places], 1))
    weights["embeddings.mask_token"] = torch.zeros(1, width)
    config = Dinov2Config(
        hidden_size=width, num_attention_heads=6, image_size=518, architectures=["Dinov2Model"]
    )
    # The names are the hub's, which transformers renames while it loads.
    config.save_pretrained(into)
    plain = {name: array.contiguous() for name, array in weights.items()}
    save_file(plain, into / "model.safetensors", metadata={"format": "pt"})
    info = Dinov2Model.from_pretrained(into, output_loading_info=True)[1]
    if problems := {name: found for name, found in info.items() if found}:
        raise SystemExit(f"the weights do not fit: {problems}")
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (into / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))


def _only(arrays: Iterator[np.ndarray]) -> np.ndarray:
    """The one array; several equal ones count as one."""
    first, *others = arrays
    if any(not np.array_equal(first, other) for other in others):
        raise SystemExit("the ONNX file does not look as expected: an array is ambiguous")
    return first


# --- face-api: TensorFlow.js ----------------------------------------------------------------------


def face_expression(source: Path, into: Path) -> None:
    """The expression network; its bytes are linear codes with a scale and a least value."""
    from mmemo.models.composed.face_expression import (
        PREPROCESSOR,
        FaceExpressionConfig,
        FaceExpressionModel,
    )

    (group,) = json.loads((source / "face_expression_model-weights_manifest.json").read_text())
    data, place, arrays = (source / "face_expression_model.bin").read_bytes(), 0, {}
    for item in group["weights"]:
        codes = item.get("quantization")
        kind = np.dtype(np.uint8 if codes else np.float32)
        count = int(np.prod(item["shape"]))
        array = np.frombuffer(data, kind, count, place).astype(np.float32)
        place += count * kind.itemsize
        if codes:
            array = array * np.float32(codes["scale"]) + np.float32(codes["min"])
        arrays[item["name"]] = torch.tensor(array.reshape(item["shape"]))
    if place != len(data):
        raise SystemExit(f"read {place} of {len(data)} bytes")
    weights: Weights = {
        "classifier.weight": arrays["fc/weights"].T,
        "classifier.bias": arrays["fc/bias"],
    }
    for stage in range(4):
        for index in range(4):
            ours, theirs = f"stages.{stage}.convolutions.{index}.", f"dense{stage}/conv{index}/"
            weights[ours + "mix.bias"] = arrays[theirs + "bias"]
            # TensorFlow: height, width, input, output. Torch: output, input, height, width.
            if theirs + "filters" in arrays:
                weights[ours + "mix.weight"] = arrays[theirs + "filters"].permute(3, 2, 0, 1)
                continue
            depth, point = arrays[theirs + "depthwise_filter"], arrays[theirs + "pointwise_filter"]
            weights[ours + "depthwise.weight"] = depth.permute(2, 3, 0, 1)
            weights[ours + "mix.weight"] = point.permute(3, 2, 0, 1)
    model = FaceExpressionModel(FaceExpressionConfig())
    load_strictly(model, {name: array.contiguous() for name, array in weights.items()})
    model.save_pretrained(into)
    (into / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
