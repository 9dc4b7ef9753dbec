"""From a stored frame to the picture that a player shows: fields, pixel shape, orientation.

A decoded frame is deinterlaced if it consists of two fields, then stretched until its pixels are
square, then mirrored and turned as its display matrix says. The ffmpeg program and players show
the same picture. Crops, face detection, ``max_side`` and the manifest's face boxes all refer to
this picture. H x W are pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

_MAX_ASPECT = 8.0  # a pixel that is longer than this is a fault of the header


@dataclass(frozen=True, slots=True)
class Display:
    """How a stored frame becomes the picture that is shown.

    ``aspect``: width of a stored pixel divided by its height. ``transposed`` swaps rows and columns
    (of the frame with square pixels); after that, ``flip_x`` swaps left and right, and ``flip_y``
    top and bottom.
    """

    aspect: float = 1.0
    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether text in the stored frame would be shown as in a mirror, or the reverse."""
        return (self.flip_x != self.flip_y) != self.transposed

    @property
    def rotation(self) -> int:
        """Degrees clockwise by which the frame is turned, after left and right were swapped."""
        if self.transposed:
            # Transposing is a mirror image that is turned by 270 degrees.
            return 90 if self.flip_x else 270
        return 180 if self.flip_y else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height on display of a frame stored as ``width`` x ``height``.

        The side that is too short is enlarged, so that no stored line or column is lost.
        """
        if self.aspect > 1:
            width = max(1, round(width * self.aspect))
        elif self.aspect < 1:
            height = max(1, round(height / self.aspect))
        return (height, width) if self.transposed else (width, height)

    def orient(self, frame: Frame) -> Frame:
        """Mirror and turn (H, W, 3)."""
        if self.transposed:
            frame = frame.transpose(1, 0, 2)
        frame = frame[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        # A view with negative strides is nothing that OpenCV takes.
        return np.ascontiguousarray(frame)

    def stretch(self, frame: Frame) -> Frame:
        """Make the pixels of an already oriented (H, W, 3) frame square."""
        height, width = frame.shape[:2]
        stored = (height, width) if self.transposed else (width, height)
        size = self.size(*stored)
        if size == (width, height):
            return frame
        import cv2

        return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def pixel_aspect(stream: Any) -> float:
    """Width of a pixel of a video stream divided by its height; 1 if it is not known.

    The container's value takes precedence over the codec's, as in the ffmpeg program.
    """
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT else 1.0


def display_of(frame: Any, aspect: float) -> Display:
    """How to show a PyAV frame whose stored pixels have this aspect."""
    # frame.side_data would hold the frame and be held by it, so that the picture stays in memory.
    container: Any = SideDataContainer
    return oriented(container(frame).get(Type.DISPLAYMATRIX), aspect)


def oriented(matrix: Any | None, aspect: float) -> Display:
    """How to show frames with this display matrix, nine 16.16 numbers, or None without one.

    It maps (x, y) to (a x + c y, b x + d y) with y pointing down (ISO/IEC 14496-12, 8.5.3). One
    that does not turn by a right angle counts as the nearest that does.
    """
    if matrix is None:
        return Display(aspect)
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if a * d == b * c:  # maps the picture to a line: not a matrix for display
        return Display(aspect)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Display(aspect, False, a < 0, d < 0)
    return Display(aspect, True, c < 0, b < 0)


def deinterlace(before: Any | None, frame: Any, after: Any | None) -> Any:
    """One whole PyAV frame from the two fields of ``frame``, with FFmpeg's bwdif filter.

    Args:
        before, after: its neighbours in time, or None at the ends of the stream. The filter
            reads the missing lines from them where the picture does not move.
    """
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    graph.link_nodes(
        source, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")
    ).configure()
    same = [
        near
        if near is not None and (near.width, near.height) == (frame.width, frame.height)
        else None
        for near in (before, after)
    ]
    for given in (same[0], frame, same[1]):
        if given is not None:
            graph.push(given)
    graph.push(None)
    if same[0] is not None:
        graph.pull()  # the neighbour itself
    return graph.pull()
