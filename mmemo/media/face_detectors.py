"""Face detectors behind one small interface.

Frames are RGB; a detector that needs BGR converts them itself.

Shapes: H x W pixels. Boxes and points are continuous pixel coordinates, x right and y down, with
(0, 0) at the top-left corner of the frame and (W, H) at its bottom-right corner.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from mmemo.errors import ConfigError
from mmemo.media.config import FaceConfig

Point = tuple[float, float]
Box = tuple[float, float, float, float]

DETECTION_SIDE = 640
"""Frames are downscaled to this longer side, in pixels, before a face is detected in them."""

_HUB_FILE = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w./-]+)$")
_YUNET_HELP = (
    "set face.model to a YuNet ONNX file, or to a file on the hub such as "
    "'opencv/face_detection_yunet:face_detection_yunet_2023mar.onnx'"
)
_MEDIAPIPE_HELP = "set face.model to MediaPipe's face_landmarker.task file"
_HELP = {"yunet": _YUNET_HELP, "mediapipe": _MEDIAPIPE_HELP}
# Corners of the two eyes in MediaPipe's 478-point face mesh, image-left eye first.
_MESH_EYES = ((33, 133), (362, 263))


@dataclass(frozen=True, slots=True)
class Detection:
    """One face in one frame. ``eyes`` are their centres, image-left first for an upright face."""

    box: Box  # x0, y0, x1, y1
    score: float = 1.0
    eyes: tuple[Point, Point] | None = None


class Detector(Protocol):
    """Detects faces in one frame."""

    def detect(self, frame: NDArray[np.uint8]) -> Sequence[Detection]:
        """Faces in an (H, W, 3) uint8 RGB frame, in any order."""
        ...


class YuNetDetector:
    """OpenCV's YuNet (Wu et al., Machine Intelligence Research 2023): box, five points, score.

    Raises:
        ConfigError: OpenCV cannot read the file.
    """

    def __init__(self, path: Path, min_score: float) -> None:
        logging: Any = cv2.utils.logging
        level = logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # it warns about its own defaults
        try:
            # The input size is a placeholder: detect sets that of each frame.
            self._net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), min_score)
        except cv2.error as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"face.model '{path}' is not a YuNet model that OpenCV {cv2.__version__} reads "
                f"({reason}); {_YUNET_HELP}"
            ) from error
        finally:
            logging.setLogLevel(level)

    def detect(self, frame: NDArray[np.uint8]) -> list[Detection]:
        small, factor = _shrink(frame)
        self._net.setInputSize((small.shape[1], small.shape[0]))
        # YuNet was trained on OpenCV's channel order; BGR is used nowhere else.
        # The stubs promise an array, but without a face it returns None.
        rows: Any = self._net.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1]
        found: list[Detection] = []
        for row in np.empty((0, 15)) if rows is None else np.asarray(rows, np.float64):
            x, y, width, height = (row[:4] * factor).tolist()
            eyes = (row[4:8] * factor).reshape(2, 2)
            found.append(Detection((x, y, x + width, y + height), float(row[14]), _eye_pair(eyes)))
        return found


class MediaPipeDetector:
    """MediaPipe's face landmarker: the box and the eyes are taken from its 478-point mesh.

    MediaPipe returns no score per face: it drops faces below ``min_score``, and the others get a
    score of 1.

    Raises:
        ConfigError: the package is not installed, or the file is not a face landmarker.
    """

    def __init__(self, path: Path, min_score: float, most: int = 4) -> None:
        try:
            import mediapipe  # pyright: ignore[reportMissingImports]
            from mediapipe.tasks import python as tasks  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"face.detector 'mediapipe' needs the mediapipe package ({error}); install it "
                "with 'pip install mediapipe', or choose face.detector 'yunet'"
            ) from error
        vision: Any = tasks.vision
        options = vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_path=str(path)),
            num_faces=most,
            min_face_detection_confidence=min_score,
        )
        try:
            self._net: Any = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"face.model '{path}' is not a MediaPipe face landmarker; {_MEDIAPIPE_HELP}"
            ) from error
        self._mediapipe: Any = mediapipe

    def detect(self, frame: NDArray[np.uint8]) -> list[Detection]:
        height, width = frame.shape[:2]
        image = self._mediapipe.Image(
            image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(frame)
        )
        found: list[Detection] = []
        for face in self._net.detect(image).face_landmarks:
            mesh = np.array([(mark.x * width, mark.y * height) for mark in face])
            x0, y0 = mesh.min(axis=0).tolist()
            x1, y1 = mesh.max(axis=0).tolist()
            eyes = np.stack([mesh[list(corners)].mean(axis=0) for corners in _MESH_EYES])
            found.append(Detection((x0, y0, x1, y1), 1.0, _eye_pair(eyes)))
        return found


def make_detector(config: FaceConfig) -> Detector:
    """The detector that ``config`` names, created once per process.

    Raises:
        ConfigError: the model file or the package is missing.
    """
    return _make(config.detector, config.model, config.min_score)


@lru_cache(maxsize=4)
def _make(name: str, model: str | None, min_score: float) -> Detector:
    if name == "yunet":
        return YuNetDetector(model_file(model, _HELP[name]), min_score)
    if name == "mediapipe":
        return MediaPipeDetector(model_file(model, _HELP[name]), min_score)
    raise ConfigError(f"face.detector '{name}' needs no detector, because it does not read pixels")


def detector_file(config: FaceConfig) -> Path | None:
    """The model file of the detector, or None for a detector that does not read pixels.

    Raises:
        ConfigError: ``face.model`` is not set or cannot be found.
    """
    if config.detector not in _HELP:
        return None
    return model_file(config.model, _HELP[config.detector])


def model_file(model: str | None, help_text: str) -> Path:
    """The model file: a path, or ``owner/name:file`` downloaded with ``huggingface_hub``.

    Raises:
        ConfigError: ``model`` is None or cannot be found.
    """
    if model is None:
        raise ConfigError(f"face.model is not set; {help_text}")
    path = Path(model).expanduser()
    if path.is_file():
        return path
    hub = _HUB_FILE.match(model)
    if hub is None:
        raise ConfigError(f"face.model '{model}' is not a file; {help_text}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub["repo"], hub["file"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"face.model '{model}' could not be downloaded from the hub ({reason}); {help_text}"
        ) from error


def _shrink(frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Downscale the frame to ``DETECTION_SIDE``; returns also the factors of x, y, x, y back."""
    height, width = frame.shape[:2]
    ratio = DETECTION_SIDE / max(height, width)
    if ratio >= 1:
        return frame, np.ones(4)
    target = (max(round(width * ratio), 1), max(round(height * ratio), 1))
    small: Any = cv2.resize(frame, target, interpolation=cv2.INTER_AREA)
    return small, np.array([width / target[0], height / target[1]] * 2)


def _eye_pair(eyes: NDArray[np.float64]) -> tuple[Point, Point]:
    (x0, y0), (x1, y1) = eyes.tolist()
    return (x0, y0), (x1, y1)
