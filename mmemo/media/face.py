"""Face crops: detect faces, track one through the clip, crop it and align it by its eyes.

Shapes: F frames, H x W pixels of a frame. All images are RGB uint8. Boxes and points are
continuous pixel coordinates (see :mod:`mmemo.media.face_detectors`). This module
does not import torch, because it runs in the decoding workers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmemo.data.sample import FaceBox
from mmemo.media.clip import FaceTrack
from mmemo.media.config import FaceConfig
from mmemo.media.face_detectors import Box, Detection, Point, make_detector

Frames = NDArray[np.uint8]

LINK_OVERLAP = 0.2
"""Minimum IoU at which two boxes, each grown to twice its side, count as the same face."""

# Eye centres in a crop without margin, as shares of its side, as in a typical detector's box.
_EYE_X, _EYE_Y = 0.30, 0.40
_MIN_EYE_DISTANCE = 2.0  # pixels; closer eyes do not give a reliable direction


@dataclass(slots=True)
class Track:
    """One face in the clip, as a map from frame index to detection."""

    faces: dict[int, Detection] = field(default_factory=dict[int, Detection])
    last: Box = (0.0, 0.0, 0.0, 0.0)

    def add(self, index: int, face: Detection) -> None:
        self.faces[index] = face
        self.last = face.box


def crop_faces(
    frames: Frames,
    times: NDArray[np.float64],
    config: FaceConfig,
    boxes: Sequence[FaceBox] = (),
) -> FaceTrack:
    """Crop the main face of the clip.

    Args:
        frames: (F, H, W, 3) uint8 RGB.
        times: (F,) seconds from the file's start.
        boxes: for the ``boxes`` detector, in pixels of ``frames``.

    Returns:
        (F, size, size, 3) crops. A frame without the face is kept whole, resized to the size of
        a crop, and marked in ``found``.

    Raises:
        ConfigError: the detector's model file or package is missing.
        ValueError: ``frames`` or ``times`` has the wrong shape or type.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    if times.shape != frames.shape[:1]:
        raise ValueError(f"times must be ({len(frames)},), not {times.shape}")
    count, size = len(frames), config.size
    if config.detector == "none":
        crops = [_resize(frame, size) for frame in frames]
        found, scores = np.ones(count, np.bool_), np.ones(count, np.float32)
        return FaceTrack(_stack(crops, size), found, scores, "none")
    faces = _faces_by_frame(frames, times, config, boxes)
    crops = [
        _resize(frame, size) if (face := faces.get(index)) is None else crop(frame, face, config)
        for index, frame in enumerate(frames)
    ]
    found = np.array([index in faces for index in range(count)], np.bool_)
    scores = np.array(
        [faces[index].score if index in faces else 0.0 for index in range(count)], np.float32
    )
    return FaceTrack(_stack(crops, size), found, scores, config.detector)


def _faces_by_frame(
    frames: Frames, times: NDArray[np.float64], config: FaceConfig, boxes: Sequence[FaceBox]
) -> dict[int, Detection]:
    height, width = frames.shape[1:3]
    if config.detector == "boxes":
        given = [box_at(boxes, float(time), config.max_gap) for time in times]
        per_frame = [[] if face is None else [face] for face in given]
    else:
        detector = make_detector(config)
        per_frame = [detector.detect(frame) for frame in frames]
    inside = [
        [
            clipped
            for face in found
            if face.score >= config.min_score
            and (clipped := clip_to_frame(face, width, height)) is not None
        ]
        for found in per_frame
    ]
    if config.detector == "boxes":  # the manifest gives one face, so none has to be chosen
        return {index: found[0] for index, found in enumerate(inside) if found}
    chosen = main_track(link(inside), width, height, len(frames))
    return {} if chosen is None else chosen.faces


# --- boxes of the manifest ------------------------------------------------------------------


def box_at(boxes: Sequence[FaceBox], time: float, max_gap: float) -> Detection | None:
    """Interpolate the face at ``time`` between two boxes at most ``max_gap`` seconds apart.

    Elsewhere, the nearest box applies if it is at most half of ``max_gap`` away; otherwise there is
    no face. The eyes are interpolated only if both boxes have them.
    """
    ordered = sorted(boxes, key=lambda box: box.time)
    after = bisect_left([box.time for box in ordered], time)
    before_box = ordered[after - 1] if after > 0 else None
    after_box = ordered[after] if after < len(ordered) else None
    if before_box and after_box and after_box.time - before_box.time <= max_gap:
        span = after_box.time - before_box.time
        share = (time - before_box.time) / span if span > 0 else 0.0
        return _between(before_box, after_box, share)
    near = [box for box in (before_box, after_box) if box is not None]
    nearest = min(near, key=lambda box: abs(box.time - time), default=None)
    if nearest is None or abs(nearest.time - time) > max_gap / 2:
        return None
    return _between(nearest, nearest, 0.0)


def _between(first: FaceBox, second: FaceBox, share: float) -> Detection:
    def mix(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x + (y - x) * share for x, y in zip(a, b, strict=True)]

    x0, y0, x1, y1 = mix(first.box, second.box)
    eyes: tuple[Point, Point] | None = None
    if first.left_eye and first.right_eye and second.left_eye and second.right_eye:
        left_x, left_y = mix(first.left_eye, second.left_eye)
        right_x, right_y = mix(first.right_eye, second.right_eye)
        eyes = ((left_x, left_y), (right_x, right_y))
    return Detection((x0, y0, x1, y1), 1.0, eyes)


# --- which face -------------------------------------------------------------------------------


def clip_to_frame(face: Detection, width: int, height: int) -> Detection | None:
    """The detection with its box clipped to the frame, or None if it lies outside."""
    x0, y0, x1, y1 = face.box
    box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if not all(math.isfinite(value) for value in box) or box[2] - box[0] < 1 or box[3] - box[1] < 1:
        return None
    return replace(face, box=box)


def link(per_frame: Sequence[Sequence[Detection]]) -> list[Track]:
    """Link detections into tracks by the overlap of their boxes.

    The frames of a clip may be seconds apart, so boxes are grown to twice their side before their
    IoU is computed, and a track may skip frames. Pairs are matched greedily by overlap; ties go to
    the older track and the earlier detection.
    """
    tracks: list[Track] = []
    for index, faces in enumerate(per_frame):
        pairs = [
            (-overlap, number, place)
            for number, track in enumerate(tracks)
            for place, face in enumerate(faces)
            if (overlap := iou(_grown(track.last), _grown(face.box))) >= LINK_OVERLAP
        ]
        used_tracks: set[int] = set()
        used_faces: set[int] = set()
        for _, number, place in sorted(pairs):
            if number not in used_tracks and place not in used_faces:
                used_tracks.add(number)
                used_faces.add(place)
                tracks[number].add(index, faces[place])
        for place, face in enumerate(faces):
            if place not in used_faces:
                tracks.append(Track())
                tracks[-1].add(index, face)
    return tracks


def main_track(tracks: Sequence[Track], width: int, height: int, frames: int) -> Track | None:
    """The largest and most central track of the clip; the first one if several are equal.

    The score of a track is the mean, over all frames, of the share of the frame that the face
    fills times its nearness to the centre (1 at the centre, 0 in a corner). A frame without the
    face scores 0.
    """
    centre_x, centre_y = width / 2, height / 2
    corner = math.hypot(centre_x, centre_y)

    def score(track: Track) -> float:
        total = 0.0
        for face in track.faces.values():
            x0, y0, x1, y1 = face.box
            off = math.hypot((x0 + x1) / 2 - centre_x, (y0 + y1) / 2 - centre_y)
            total += (x1 - x0) * (y1 - y0) / (width * height) * (1 - off / corner)
        return total / max(frames, 1)

    return max(tracks, key=score, default=None)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _grown(box: Box) -> Box:
    x, y = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    return (box[0] - x, box[1] - y, box[2] + x, box[3] + y)


# --- cropping ---------------------------------------------------------------------------------


def eye_targets(size: int, margin: float) -> tuple[Point, Point]:
    """Positions of the image-left and image-right eye in an aligned crop, in pixels of the crop."""
    # The margin widens the crop on both sides, which moves the eyes towards its middle.
    shrink = 1 + 2 * margin
    y = size * (0.5 + (_EYE_Y - 0.5) / shrink)
    return (size * (0.5 + (_EYE_X - 0.5) / shrink), y), (
        size * (0.5 + (0.5 - _EYE_X) / shrink),
        y,
    )


def crop(frame: Frames, face: Detection, config: FaceConfig) -> Frames:
    """Crop an (H, W, 3) frame to (size, size, 3). Its edge is repeated outside the frame."""
    return _warp(frame, crop_transform(face, config), config.size)


def crop_transform(face: Detection, config: FaceConfig) -> NDArray[np.float64]:
    """The (2, 3) similarity transform from frame to crop coordinates.

    With ``align`` and known eyes, it maps the eyes to :func:`eye_targets`. Otherwise it maps the
    square around the box, widened by the margin, to the crop without a rotation.
    """
    if config.align and face.eyes is not None:
        (left_x, left_y), (right_x, right_y) = face.eyes
        across = complex(right_x - left_x, right_y - left_y)
        if abs(across) >= _MIN_EYE_DISTANCE:
            (target_x, target_y), (target_right, _) = eye_targets(config.size, config.margin)
            # A similarity in the plane is z -> turn * z + shift on complex numbers.
            turn = (target_right - target_x) / across
            shift = complex(target_x, target_y) - turn * complex(left_x, left_y)
            return np.array(
                [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]]
            )
    x0, y0, x1, y1 = face.box
    scale = config.size / (max(x1 - x0, y1 - y0) * (1 + 2 * config.margin))
    middle = config.size / 2
    return np.array(
        [[scale, 0, middle - scale * (x0 + x1) / 2], [0, scale, middle - scale * (y0 + y1) / 2]]
    )


def _warp(frame: Frames, transform: NDArray[np.float64], size: int) -> Frames:
    scale = math.hypot(transform[0, 0], transform[1, 0])
    if scale < 0.5:  # a bilinear warp would skip pixels, so downscale by area first
        height, width = frame.shape[:2]
        target = (max(round(width * scale), 1), max(round(height * scale), 1))
        small: Any = cv2.resize(frame, target, interpolation=cv2.INTER_AREA)
        frame = small
        # The target is rounded to whole pixels, so the two axes have slightly different factors.
        back = np.array([width / target[0], height / target[1]])
        transform = transform * np.array([[back[0], back[1], 1.0]])
    # OpenCV counts from pixel centres, our coordinates from pixel corners.
    linear = transform[:, :2]
    offset = transform[:, 2] + linear @ np.array([0.5, 0.5]) - 0.5
    matrix = np.concatenate([linear, offset[:, None]], axis=1)
    warped: Any = cv2.warpAffine(
        frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return warped


def _resize(frame: Frames, size: int) -> Frames:
    shrinks = frame.shape[0] > size and frame.shape[1] > size
    # INTER_AREA repeats pixels like INTER_NEAREST when it enlarges.
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Any = cv2.resize(frame, (size, size), interpolation=method)
    return resized


def _stack(crops: Sequence[Frames], size: int) -> Frames:
    return np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)
