"""Jobs and clips as JSON and raw arrays, for the pipe between a training process and its decoders.

A decoder reads files that nobody has vetted, so what comes back from it is data only: nothing in
it is run when it is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mmemo import errors
from mmemo.data.sample import FaceBox
from mmemo.media.clip import BadClip, DecodedClip, DecodeJob, FaceTrack
from mmemo.media.config import DecodeConfig, SamplingConfig

_PLAIN: dict[str, type[errors.MmemoError]] = {"ConfigError": errors.ConfigError}
_TYPES = frozenset({"uint8", "bool", "float32", "float64"})


def send_job(pipe: Connection, job: DecodeJob) -> None:
    """Write one job."""
    fields: dict[str, Any] = {
        "path": str(job.path),
        "name": job.name,
        "want": sorted(job.want),
        "sampling": job.sampling.model_dump(mode="json"),
        "limits": job.limits.model_dump(mode="json"),
        "start": job.start,
        "end": job.end,
        "face_boxes": [asdict(box) for box in job.face_boxes],
    }
    pipe.send_bytes(json.dumps(fields).encode())


def receive_job(pipe: Connection) -> DecodeJob:
    """Read one job. Raises EOFError when the other side has closed."""
    fields = json.loads(pipe.recv_bytes())
    return DecodeJob(
        path=Path(fields["path"]),
        name=fields["name"],
        want=frozenset(fields["want"]),
        sampling=SamplingConfig.model_validate(fields["sampling"]),
        limits=DecodeConfig.model_validate(fields["limits"]),
        start=fields["start"],
        end=fields["end"],
        face_boxes=tuple(_box(row) for row in fields["face_boxes"]),
    )


def _box(row: dict[str, Any]) -> FaceBox:
    x0, y0, x1, y1 = row["box"]
    left, right = row["left_eye"], row["right_eye"]
    return FaceBox(
        time=row["time"],
        box=(x0, y0, x1, y1),
        left_eye=None if left is None else (left[0], left[1]),
        right_eye=None if right is None else (right[0], right[1]),
    )


def send_result(pipe: Connection, result: DecodedClip | BadClip | errors.MmemoError) -> None:
    """Write a clip, a bad clip, or an error that is no clip's fault."""
    if isinstance(result, errors.MmemoError):
        pipe.send_bytes(json.dumps({"error": [type(result).__name__, str(result)]}).encode())
        return
    if isinstance(result, BadClip):
        pipe.send_bytes(json.dumps({"bad": [result.path, result.kind, result.detail]}).encode())
        return
    arrays: dict[str, Any] = {
        "frames": result.frames,
        "times": result.times,
        "waveform": result.waveform,
    }
    clip: dict[str, Any] = {
        "name": result.name,
        "digest": result.digest,
        "duration": result.duration,
        "sample_rate": result.sample_rate,
    }
    face: dict[str, str] | None = None
    if result.faces is not None:
        track = result.faces
        arrays |= {"crops": track.crops, "found": track.found, "scores": track.scores}
        face = {"detector": track.detector, "colour": track.colour}
    sent = {key: np.ascontiguousarray(a) for key, a in arrays.items() if a is not None}
    shapes = {key: [array.dtype.name, *array.shape] for key, array in sent.items()}
    pipe.send_bytes(json.dumps({"clip": clip, "face": face, "arrays": shapes}).encode())
    for array in sent.values():
        pipe.send_bytes(array.reshape(-1).view(np.uint8).data)


def receive_result(pipe: Connection) -> DecodedClip | BadClip:
    """Read what :func:`send_result` wrote.

    Raises:
        EOFError: the other side has died.
        MmemoError: the other side sent one, or sent what cannot be read.
    """
    fields = json.loads(pipe.recv_bytes())
    if "bad" in fields:
        return BadClip(*fields["bad"])
    if "error" in fields:
        name, message = fields["error"]
        raise _PLAIN.get(name, errors.MmemoError)(message)
    arrays: dict[str, Any] = {}
    for key, (dtype, *shape) in fields["arrays"].items():
        if dtype not in _TYPES:
            raise errors.MmemoError(f"a decoder sent an array of type {dtype!r}")
        arrays[key] = np.frombuffer(bytearray(pipe.recv_bytes()), dtype=dtype).reshape(shape)
    faces = None
    if fields["face"] is not None:
        parts = {key: arrays.pop(key) for key in ("crops", "found", "scores")}
        faces = FaceTrack(**parts, **fields["face"])
    return DecodedClip(**fields["clip"], **arrays, faces=faces)
