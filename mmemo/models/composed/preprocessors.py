"""An encoder's own preprocessor, built from the values of its ``preprocessor_config.json``.

Hugging Face's ``AutoImageProcessor`` and ``AutoFeatureExtractor`` decide which class that is, so
any encoder that transformers can preprocess for works as a branch. Image processors always run in
their PIL/NumPy form, even where torchvision is installed: the two forms round differently, and a
feature must not depend on which packages a machine happens to have.

Shapes: F frames, H x W pixels of a frame before and h x w after preprocessing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    BatchFeature,
    VivitImageProcessor,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
)

from mmemo.errors import ConfigError


class RescaleFirstImageProcessor(PilBackend):
    """DINOv3's order of steps without torchvision: rescale, resize in floating point, normalise.

    transformers has this processor (``DINOv3ViTImageProcessor``) for torchvision only. The steps
    below are the torch kernels that torchvision calls for float images, so the pixels are the same.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True

    _MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}

    def _preprocess(self, images: list[Any], **steps: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(3, H, W) uint8 arrays -> ``pixel_values`` (F, 3, h, w) float32."""
        pixels = [self._one(torch.from_numpy(np.ascontiguousarray(x)), steps) for x in images]
        return BatchFeature({"pixel_values": torch.stack(pixels)})

    def _one(self, image: Tensor, steps: Mapping[str, Any]) -> Tensor:
        x = image.float()
        if steps["do_rescale"]:
            x = image * steps["rescale_factor"]
        if steps["do_resize"]:
            mode = self._MODES.get(steps["resample"])
            size = steps["size"]
            if mode is None or not (size.height and size.width):
                raise ValueError(
                    "DINOv3's image processor needs size with height and width, and resample 2 "
                    "(bilinear) or 3 (bicubic)"
                )
            x = F.interpolate(x[None], (size.height, size.width), mode=mode, antialias=True)[0]
        if steps["do_center_crop"]:
            x = torch.from_numpy(self.center_crop(x.numpy(), steps["crop_size"]))
        if steps["do_normalize"]:
            mean, std = (torch.tensor(steps[key]) for key in ("image_mean", "image_std"))
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x


_WITHOUT_TORCHVISION: dict[str, Any] = {
    "DINOv3ViTImageProcessor": RescaleFirstImageProcessor,
    "VivitImageProcessor": VivitImageProcessor,
    "TimmWrapperImageProcessor": transformers.TimmWrapperImageProcessor,
}
"""Image processors that AutoImageProcessor cannot make from a file without torchvision: DINOv3's
has our form, ViViT's is plain NumPy although it is listed for torchvision, and timm's settings
stand in the model's own config. timm needs torchvision to be imported at all."""

_VIDEO_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "VideoMAEVideoProcessor": ("VideoMAEImageProcessor", {}),
    "TimesformerVideoProcessor": (
        "VideoMAEImageProcessor",
        {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD},
    ),
    "VivitVideoProcessor": ("VivitImageProcessor", {}),
    "VJEPA2VideoProcessor": (
        "VideoMAEImageProcessor",
        {
            "size": {"shortest_edge": 292},
            "crop_size": {"height": 256, "width": 256},
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
        },
    ),
}
"""Video processors exist for torchvision only. These take the steps of an image processor that has
a PIL form, frame by frame: its class, and the settings in which the two differ by default."""


_PLAIN = {"image_processor_type": "ViTImageProcessor", "resample": int(PILImageResampling.BICUBIC)}
_FAILURES = (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError)


def load_image_processor(values: Mapping[str, Any], model_type: str = "") -> Any:
    """The image processor that a ``preprocessor_config.json`` describes, in its PIL/NumPy form.

    Args:
        values: the file's content. Video processors are given by their ``video_processor_type``.
        model_type: of the encoder, which decides when ``values`` name no processor.

    Raises:
        ConfigError: transformers does not know the processor, or it needs torchvision.
    """
    # The settings become text, because a dict cannot be the key of a cache.
    return _image_processor(json.dumps(dict(values), sort_keys=True), model_type)


@lru_cache(maxsize=32)
def _image_processor(text: str, model_type: str) -> Any:
    values = _as_image_processor(json.loads(text))
    name = str(values.get("image_processor_type") or "")
    # Files may name the torchvision form of a class, which ends in Fast.
    own = _WITHOUT_TORCHVISION.get(name.removesuffix("Fast"))
    options = {"backend": "pil", "trust_remote_code": False}
    try:
        if own is not None:
            return own(**{key: value for key, value in values.items() if "_type" not in key})
        try:
            return _from_file(AutoImageProcessor, values, model_type, options)
        except ValueError:
            if name or "feature_extractor_type" in values or "size" not in values:
                raise
            # The file names no class and transformers has none for this encoder: plain steps.
            return _from_file(AutoImageProcessor, {**_PLAIN, **values}, model_type, options)
    except _FAILURES as error:
        raise ConfigError(
            f"image processor {_named(name, 'image')} cannot be used: "
            f"{_why(name, error)}; give a preprocessor whose image_processor_type has a PIL form "
            "in transformers"
        ) from error


def _as_image_processor(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a video processor, as those of an image processor that does the same."""
    name = values.get("video_processor_type")
    if not name or values.get("image_processor_type"):
        return values
    if name not in _VIDEO_FORMS:
        raise ConfigError(
            f"video processor '{name}' needs torchvision; give a preprocessor with the "
            "image_processor_type and settings that it applies to each frame"
        )
    kind, defaults = _VIDEO_FORMS[name]
    given = {key: value for key, value in values.items() if value is not None}
    given.pop("video_processor_type")
    return {**defaults, **given, "image_processor_type": kind}


def load_feature_extractor(values: Mapping[str, Any], model_type: str = "") -> Any:
    """The feature extractor that an audio encoder's ``preprocessor_config.json`` describes.

    Raises:
        ConfigError: transformers does not know it, or a package that it needs is missing.
    """
    return _feature_extractor(json.dumps(dict(values), sort_keys=True), model_type)


@lru_cache(maxsize=32)
def _feature_extractor(text: str, model_type: str) -> Any:
    values = json.loads(text)
    try:
        return _from_file(AutoFeatureExtractor, values, model_type, {"trust_remote_code": False})
    except _FAILURES as error:
        name = str(values.get("feature_extractor_type") or "")
        raise ConfigError(
            f"audio preprocessor {_named(name, 'feature')} cannot be used: {_why(name, error)}; "
            "give the preprocessor_config.json of an encoder with one of transformers' feature "
            "extractors"
        ) from error


def _named(name: str, kind: str) -> str:
    suffix = "image_processor_type" if kind == "image" else "feature_extractor_type"
    return f"'{name}'" if name else f"without {suffix}"


def _why(name: str, error: Exception) -> str:
    """Why a preprocessor cannot be made, in a few words."""
    known = getattr(transformers, name, None) if name else None
    if getattr(known, "is_dummy", False):
        # transformers stands a dummy in for a class whose packages do not import.
        needs = [one for one in getattr(known, "_backends", ()) if one not in ("torch", "vision")]
        return f"it needs {' and '.join(needs)} (pip install {' '.join(needs)})"
    if known is None:
        return "transformers does not know it" if name else "none is known for this encoder"
    return reason(error)


def _from_file(
    auto: Any, values: Mapping[str, Any], model_type: str, options: Mapping[str, Any]
) -> Any:
    """The Auto classes read folders only; they resolve old names of classes, and missing ones by
    the encoder's config."""
    # A class that is named must not be exchanged for the config's where it cannot be imported.
    named = any(key in values for key in ("image_processor_type", "feature_extractor_type"))
    if model_type and not named:
        options = {**options, "config": AutoConfig.for_model(model_type)}
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(dict(values))
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
        return auto.from_pretrained(folder, **options)


def preprocess_frames(processor: Any, frames: NDArray[np.uint8]) -> dict[str, Tensor]:
    """(F, H, W, 3) uint8 RGB frames -> the processor's tensors, the first dimension of each F.

    ``pixel_values`` is (F, 3, h, w), or (F, patches, values) where the processor cuts patches.

    Raises:
        ValueError: the frames are not (F, H, W, 3) uint8.
        ConfigError: the processor does not make one image of each frame.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    # PIL images say themselves which dimension is colour; for arrays, processors have to guess.
    images = [Image.fromarray(frame) for frame in frames]
    made: Any = processor(images, return_tensors="pt")
    found: dict[str, Tensor] = {}
    for name, value in made.items():
        tensor: Tensor = value
        if tensor.ndim == 5 and len(tensor) == 1:  # a video: (1, F, 3, h, w)
            tensor = tensor[0]
        if len(tensor) != len(frames) or tensor.ndim > 4:
            raise ConfigError(
                f"{type(processor).__name__} makes {name} {tuple(tensor.shape)} of {len(frames)} "
                "frames; use an encoder whose image processor makes one image of each frame"
            )
        found[name] = tensor
    return found


def resolved_settings(processor: Any) -> dict[str, Any]:
    """Every setting of a preprocessor, defaults included, for the identity of features."""
    values: dict[str, Any] = json.loads(json.dumps(processor.to_dict(), default=str))
    for volatile in ("processor_class", "_processor_class", "_name_or_path"):
        values.pop(volatile, None)
    return {**values, "class": type(processor).__name__}


def reason(error: Exception) -> str:
    """The first sentence of an error's text, for a message of one sentence."""
    text = str(error).strip()
    return text.splitlines()[0].partition(". ")[0].rstrip(".:") if text else type(error).__name__
