"""Tracks, crops and detectors. Detectors that need a file run for real in tests/real_weights."""

from __future__ import annotations

import sys
import types

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.data.sample import FaceBox
from mmemo.errors import ConfigError
from mmemo.media import face, face_detectors
from mmemo.media.config import FaceConfig
from mmemo.media.face_detectors import Detection

RED = (220, 20, 40)


def solid(colour=RED, count=3, height=80, width=120):
    return np.tile(np.array(colour, np.uint8), (count, height, width, 1))


def seconds(count, step=0.5):
    return np.arange(count) * step


def run_with(monkeypatch, per_frame, frames, **settings_):
    """``crop_faces`` with a detector that says what we want, frame by frame."""
    answers = iter(per_frame)
    fake = types.SimpleNamespace(detect=lambda frame: next(answers))
    monkeypatch.setattr(face, "make_detector", lambda config: fake)
    config = FaceConfig(detector="yunet", model="x", **settings_)
    return face.crop_faces(frames, seconds(len(frames)), config)


# --- given boxes ------------------------------------------------------------------------------


def test_boxes_are_interpolated_in_time_with_their_eyes():
    boxes = (
        FaceBox(0.0, (0, 0, 10, 10), (2, 3), (8, 3)),
        FaceBox(1.0, (10, 20, 40, 50), (12, 23), (18, 33)),
    )
    found = face.box_at(boxes, 0.25, max_gap=1.0)
    assert found is not None
    assert found.box == pytest.approx((2.5, 5, 17.5, 20))
    assert found.eyes is not None
    assert found.eyes[0] == pytest.approx((4.5, 8))
    assert found.eyes[1] == pytest.approx((10.5, 10.5))


@pytest.mark.parametrize(
    ("time", "there"),
    [
        (-0.6, False),
        (-0.4, True),
        (0.0, True),
        (0.4, True),
        (1.5, False),
        (2.9, True),
        (3.6, False),
    ],
)
def test_no_face_beyond_the_gap(time, there):
    boxes = (FaceBox(0.0, (0, 0, 10, 10)), FaceBox(3.0, (5, 5, 15, 15)))
    assert (face.box_at(boxes, time, max_gap=1.0) is not None) == there


def test_boxes_need_not_be_sorted_and_no_box_is_no_face():
    boxes = (FaceBox(1.0, (10, 10, 20, 20)), FaceBox(0.0, (0, 0, 10, 10)))
    found = face.box_at(boxes, 0.5, max_gap=2.0)
    assert found is not None
    assert found.box == pytest.approx((5, 5, 15, 15))
    assert face.box_at((), 0.5, max_gap=2.0) is None


def test_missing_box_falls_back_to_the_whole_frame_and_is_flagged():
    frames = solid(count=3)
    frames[:, 30:50, 50:70] = (0, 255, 0)
    track = face.crop_faces(
        frames,
        np.array([0.0, 0.1, 9.0]),
        FaceConfig(detector="boxes", size=32, margin=0),
        [FaceBox(0.0, (50, 30, 70, 50))],
    )
    assert track.found.tolist() == [True, True, False]
    assert track.scores.tolist() == [1.0, 1.0, 0.0]
    assert track.crops.shape == (3, 32, 32, 3)
    assert (track.crops[0, 2:-2, 2:-2] == (0, 255, 0)).all()
    whole = cv2.resize(frames[2], (32, 32), interpolation=cv2.INTER_AREA)
    assert (track.crops[2] == whole).all()
    assert (track.detector, track.colour) == ("boxes", "RGB")


# --- colour -----------------------------------------------------------------------------------


class _RememberingNet:
    """Stands where OpenCV's network stands, and keeps the pixels it is given."""

    def __init__(self):
        self.seen = []

    def setInputSize(self, size):
        self.size = size

    def detect(self, image):
        self.seen.append(image)
        return 1, np.array([[30, 20, 40, 40, 40, 35, 60, 35, 50, 45, 42, 55, 58, 55, 0.9]], "f4")


@pytest.fixture
def net(monkeypatch):
    net = _RememberingNet()
    factory = types.SimpleNamespace(create=lambda *_: net)
    monkeypatch.setattr(cv2, "FaceDetectorYN", factory)
    return net


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "yunet.onnx"
    path.write_bytes(b"not read: the network is replaced")
    return str(path)


@pytest.mark.parametrize("name", ["yunet", "boxes", "none"])
@pytest.mark.parametrize("align", [True, False])
def test_red_stays_red_through_every_detector(name, align, net, model):
    config = FaceConfig(detector=name, model=model, align=align, size=48)
    boxes = [FaceBox(0.0, (30, 20, 70, 60), (40, 35), (60, 36))]
    track = face.crop_faces(solid(), seconds(3, 0.1), config, boxes)
    assert track.found.all()
    assert (track.crops == np.array(RED, np.uint8)).all()
    if name == "yunet":  # the network itself wants blue first
        assert (net.seen[0] == np.array(RED[::-1], np.uint8)).all()


def test_yunet_answers_in_the_pixels_of_a_frame_that_was_shrunk(net, model):
    detector = face_detectors.YuNetDetector(face_detectors.model_file(model, ""), 0.6)
    (found,) = detector.detect(np.zeros((720, 1280, 3), np.uint8))
    assert net.size == (640, 360)
    assert found.box == pytest.approx((60, 40, 140, 120))
    assert found.eyes == ((80, 70), (120, 70))
    assert found.score == pytest.approx(0.9)


def test_mediapipe_mesh_becomes_a_box_and_eyes(monkeypatch, tmp_path):
    seen = []
    mesh = [types.SimpleNamespace(x=0.5, y=0.5) for _ in range(478)]
    mesh[0], mesh[1] = types.SimpleNamespace(x=0.25, y=0.1), types.SimpleNamespace(x=0.75, y=0.9)
    for index, (x, y) in {
        33: (0.3, 0.4),
        133: (0.4, 0.4),
        362: (0.6, 0.4),
        263: (0.7, 0.5),
    }.items():
        mesh[index] = types.SimpleNamespace(x=x, y=y)
    answer = types.SimpleNamespace(face_landmarks=[mesh])
    landmarker = types.SimpleNamespace(detect=lambda image: seen.append(image.data) or answer)
    tasks = types.ModuleType("mediapipe.tasks.python")
    tasks.BaseOptions = dict
    tasks.vision = types.SimpleNamespace(
        FaceLandmarkerOptions=dict,
        FaceLandmarker=types.SimpleNamespace(create_from_options=lambda options: landmarker),
    )
    package = types.ModuleType("mediapipe")
    package.Image = lambda image_format, data: types.SimpleNamespace(data=data)
    package.ImageFormat = types.SimpleNamespace(SRGB=1)
    parent = types.ModuleType("mediapipe.tasks")
    parent.python = tasks
    for name, module in (("", package), (".tasks", parent), (".tasks.python", tasks)):
        monkeypatch.setitem(sys.modules, "mediapipe" + name, module)
    (found,) = face_detectors.MediaPipeDetector(tmp_path / "x.task", 0.5).detect(solid(count=1)[0])
    assert (seen[0] == np.array(RED, np.uint8)).all()
    assert found.box == pytest.approx((30, 8, 90, 72))
    assert found.eyes is not None
    assert found.eyes[0] == pytest.approx((42, 32))
    assert found.eyes[1] == pytest.approx((78, 36))


# --- tracks -----------------------------------------------------------------------------------


def square(x, y, side, score=0.9):
    return Detection((x, y, x + side, y + side), score)


def test_the_larger_and_more_central_face_is_followed_whatever_the_order(monkeypatch):
    def clip(flip):
        for index in range(4):
            faces = [square(40 + 2 * index, 25, 30), square(2, 2, 14, 0.99)]
            yield faces[::-1] if flip else faces

    for flip in (False, True):
        track = run_with(monkeypatch, clip(flip), solid(count=4))
        assert track.found.all()
        assert track.scores == pytest.approx([0.9] * 4)


def test_a_face_seen_once_does_not_beat_one_seen_throughout(monkeypatch):
    def clip():
        for index in range(6):
            yield [square(45, 25, 24)] + ([square(10, 10, 40, 0.95)] if index == 2 else [])

    track = run_with(monkeypatch, clip(), solid(count=6))
    assert track.scores == pytest.approx([0.9] * 6)


def test_two_faces_that_pass_each_other_keep_their_tracks():
    frames = [[square(10 + 8 * i, 10, 20), square(90 - 8 * i, 50, 20)] for i in range(10)]
    first, second = face.link(frames)
    assert [found.box[1] for found in first.faces.values()] == [10] * 10
    assert [found.box[1] for found in second.faces.values()] == [50] * 10


def test_a_track_survives_frames_without_it(monkeypatch):
    per_frame = [[square(40, 20, 30)], [], [square(46, 22, 30)]]
    track = run_with(monkeypatch, per_frame, solid(count=3))
    assert track.found.tolist() == [True, False, True]


def test_equal_tracks_go_to_the_first():
    frames = [[square(20, 30, 20, 0.7), square(80, 30, 20, 0.8)]]
    chosen = face.main_track(face.link(frames), 120, 80, 1)
    assert chosen is not None
    assert chosen.faces[0].score == 0.7


def test_weak_and_outside_detections_do_not_count(monkeypatch):
    per_frame = [[square(40, 20, 30, 0.3)], [square(-50, 20, 30)], [square(40, 20, 30)]]
    track = run_with(monkeypatch, per_frame, solid(count=3), min_score=0.5)
    assert track.found.tolist() == [False, False, True]


coordinate = st.floats(-300, 300, allow_nan=False)


@given(st.tuples(coordinate, coordinate, coordinate, coordinate))
def test_boxes_that_remain_lie_inside_the_frame(values):
    found = face.clip_to_frame(Detection(values), 120, 80)
    if found is not None:
        x0, y0, x1, y1 = found.box
        assert 0 <= x0 < x1 <= 120
        assert 0 <= y0 < y1 <= 80


@given(
    st.lists(st.lists(st.tuples(coordinate, coordinate, st.floats(5, 90)), max_size=4), max_size=6)
)
def test_every_detection_is_in_exactly_one_track(clip):
    frames = [[square(x, y, side) for x, y, side in faces] for faces in clip]
    tracks = face.link(frames)
    linked = [(index, found) for track in tracks for index, found in track.faces.items()]
    assert sorted(id(found) for _, found in linked) == sorted(
        id(found) for faces in frames for found in faces
    )
    assert all(any(found is one for one in frames[index]) for index, found in linked)


# --- cutting ----------------------------------------------------------------------------------


def centre_of(mask):
    """Centre of the marked pixels, in continuous coordinates."""
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5, rows.mean() + 0.5


@settings(max_examples=60)
@given(
    middle=st.tuples(st.floats(90, 230), st.floats(80, 160)),
    distance=st.floats(24, 90),
    angle=st.floats(-40, 40),
    size=st.integers(64, 224),
    margin=st.floats(0, 0.8),
)
def test_alignment_puts_the_eyes_within_a_pixel_of_their_places(
    middle, distance, angle, size, margin
):
    turn = np.deg2rad(angle)
    across = np.array([np.cos(turn), np.sin(turn)]) * distance / 2
    eyes = np.array(middle) - across, np.array(middle) + across
    frame = np.zeros((240, 320, 3), np.uint8)
    yy, xx = np.mgrid[:240, :320] + 0.5
    for colour, (x, y) in enumerate(eyes):
        radius = max(distance / 8, 2)
        frame[..., colour] = (255 * (np.hypot(xx - x, yy - y) < radius)).astype(np.uint8)
    config = FaceConfig(detector="boxes", size=size, margin=margin)
    box = (middle[0] - 40, middle[1] - 30, middle[0] + 40, middle[1] + 50)
    crop = face.crop(frame, Detection(box, 1.0, tuple(map(tuple, eyes))), config)
    for colour, target in enumerate(face.eye_targets(size, margin)):
        assert centre_of(crop[..., colour] > 127) == pytest.approx(target, abs=1.0)


@settings(max_examples=40)
@given(
    x=st.integers(0, 200),
    y=st.integers(0, 120),
    side=st.integers(20, 100),
    margin=st.floats(0, 0.5),
)
def test_without_eyes_the_square_around_the_box_fills_the_crop(x, y, side, margin):
    frame = np.zeros((240, 320, 3), np.uint8)
    frame[y : y + side, x : x + side] = 255
    config = FaceConfig(detector="boxes", size=100, margin=margin, align=False)
    crop = face.crop(frame, Detection((x, y, x + side, y + side)), config)
    assert crop[50, 50].tolist() == [255] * 3
    filled = (crop[..., 0] > 127).mean()
    # Beyond the frame's edge the face is repeated, so only inner boxes have an exact share.
    if (
        min(x, y) > 60 * margin * 2
        and x + side * (1 + margin) < 320
        and y + side * (1 + margin) < 240
    ):
        assert filled == pytest.approx(1 / (1 + 2 * margin) ** 2, abs=0.05)


def test_alignment_keeps_image_left_on_the_left_and_does_not_mirror():
    frame = np.zeros((100, 100, 3), np.uint8)
    frame[30:40, 25:35] = (255, 0, 0)
    frame[30:40, 65:75] = (0, 255, 0)
    config = FaceConfig(detector="boxes", size=80)
    crop = face.crop(frame, Detection((10, 10, 90, 90), 1.0, ((30, 35), (70, 35))), config)
    (left_x, left_y), (right_x, right_y) = face.eye_targets(80, 0.25)
    assert left_x < right_x
    assert crop[int(left_y), int(left_x)].tolist() == [255, 0, 0]
    assert crop[int(right_y), int(right_x)].tolist() == [0, 255, 0]


def test_coinciding_eyes_fall_back_to_the_box():
    config = FaceConfig(detector="boxes", size=50, margin=0)
    same = face.crop_transform(Detection((10, 10, 60, 60), 1.0, ((30, 30), (30, 30))), config)
    assert same == pytest.approx(face.crop_transform(Detection((10, 10, 60, 60)), config))


def test_a_large_face_is_averaged_and_not_subsampled():
    frame = np.zeros((800, 800, 3), np.uint8)
    frame[::2, ::2] = 255  # a quarter of the pixels: anything but an average gives 0 or 255
    config = FaceConfig(detector="boxes", size=40, margin=0, align=False)
    crop = face.crop(frame, Detection((0, 0, 800, 800)), config)
    assert np.abs(crop[4:-4, 4:-4].astype(int) - 64).max() <= 2


# --- bad input --------------------------------------------------------------------------------


def test_wrong_shapes_are_refused():
    config = FaceConfig(detector="none")
    with pytest.raises(ValueError, match=r"\(F, H, W, 3\) uint8"):
        face.crop_faces(solid().astype(np.float32), seconds(3), config)
    with pytest.raises(ValueError, match="times"):
        face.crop_faces(solid(), seconds(2), config)


def test_no_frames_give_no_crops():
    track = face.crop_faces(solid(count=0), seconds(0), FaceConfig(detector="boxes", size=32))
    assert track.crops.shape == (0, 32, 32, 3)
    assert track.found.shape == track.scores.shape == (0,)


@pytest.mark.parametrize("name", ["yunet", "mediapipe"])
@pytest.mark.parametrize("model", [None, "models/nowhere.onnx"])
def test_missing_model_says_what_to_do(name, model):
    with pytest.raises(ConfigError, match=r"face\.model .*; set face\.model to"):
        face.crop_faces(solid(), seconds(3), FaceConfig(detector=name, model=model))


def test_a_file_that_is_no_network_is_refused(model, capfd):
    with pytest.raises(ConfigError, match="not a YuNet model"):
        face_detectors.YuNetDetector(face_detectors.model_file(model, ""), 0.6)


def test_mediapipe_without_the_package_says_how_to_get_it(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ConfigError, match="pip install mediapipe"):
        face.crop_faces(solid(), seconds(3), FaceConfig(detector="mediapipe", model=model))


def test_a_hub_file_is_fetched_only_when_named(monkeypatch, tmp_path):
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(tmp_path / "got.onnx")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    got = face_detectors.model_file("opencv/face_detection_yunet:sub/face.onnx", "help")
    assert got == tmp_path / "got.onnx"
    assert asked == [("opencv/face_detection_yunet", "sub/face.onnx")]
    with pytest.raises(ConfigError, match="is not a file; help"):
        face_detectors.model_file("opencv/face_detection_yunet", "help")
    assert len(asked) == 1


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def download(repo, file):
        raise OSError("no\nroute")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        ConfigError, match=r"could not be downloaded from the hub \(no route\); help"
    ):
        face_detectors.model_file("a/b:c.onnx", "help")


def test_the_detector_is_made_once_per_process(net, model):
    config = FaceConfig(detector="yunet", model=model)
    assert face_detectors.make_detector(config) is face_detectors.make_detector(
        FaceConfig(detector="yunet", model=model, size=64)
    )


def test_face_imports_no_torch():
    import subprocess

    code = "import sys, mmemo.media.face, mmemo.media.image; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
