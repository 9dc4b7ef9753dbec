"""Each fetched part alone: the detectors on real clips, and what the encoders know."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mmemo.media.config import FaceConfig
from mmemo.media.face import crop_faces, eye_targets
from mmemo.media.face_detectors import make_detector
from mmemo.models.composed.face_expression import EXPRESSIONS, PREPROCESSOR
from mmemo.models.composed.preprocessors import load_image_processor, preprocess_frames
from tests.real_weights.voice import Prosody, Speaker

pytestmark = [pytest.mark.real_weights, pytest.mark.timeout(1800)]

PEXELS, SINGLE, EMPTY = "WolfgangLanger_Pexels.mp4", "single_face.mp4", "no_face.mp4"


def sampled(weights, name, count):
    """``count`` frames of a clip, evenly, and their times in seconds."""
    with av.open(str(weights / "clips" / name)) as container:
        read = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
    chosen = [read[index] for index in np.linspace(0, len(read) - 1, count).astype(int)]
    return np.stack([frame for frame, _ in chosen]), np.array([time for _, time in chosen])


def detector(weights, name, **settings):
    model = {
        "yunet": weights / "yunet" / "face_detection_yunet_2023mar.onnx",
        "mediapipe": weights / "mediapipe" / "face_landmarker.task",
    }[name]
    return FaceConfig(detector=name, model=str(model), **settings)


@pytest.mark.parametrize("name", ["yunet", "mediapipe"])
@pytest.mark.parametrize(("clip", "least"), [(PEXELS, 0.9), (SINGLE, 1.0)])
def test_a_real_detector_finds_the_face(weights, tools, name, clip, least):
    frames, times = sampled(weights, clip, 12)
    track = crop_faces(frames, times, detector(weights, name))
    assert track.found.mean() >= least
    assert track.detector == name
    assert track.crops.shape == (12, 112, 112, 3)
    # Skin is redder than it is blue: the crops are RGB.
    middle = track.crops[track.found][:, 40:80, 40:72].astype(float).mean((0, 1, 2))
    assert middle[0] > middle[1] > middle[2]


def test_the_detectors_agree_on_where_the_eyes_are(weights, tools):
    frames, _ = sampled(weights, SINGLE, 6)
    networks = [make_detector(detector(weights, name)) for name in ("yunet", "mediapipe")]
    for frame in frames:
        (ours,), (other,) = (network.detect(frame) for network in networks)
        apart = np.hypot(*np.subtract(*ours.eyes))
        for mine, theirs in zip(ours.eyes, other.eyes, strict=True):
            assert np.hypot(*np.subtract(mine, theirs)) < 0.15 * apart


def test_alignment_puts_real_eyes_at_their_places(weights, tools):
    """Detecting again in the crops finds the eyes where the alignment put them."""
    config = detector(weights, "yunet", size=256, margin=0.5)
    frames, times = sampled(weights, SINGLE, 6)
    track = crop_faces(frames, times, config)
    assert track.found.all()
    for crop in track.crops:
        (found,) = make_detector(config).detect(crop)
        for eye, target in zip(found.eyes, eye_targets(256, 0.5), strict=True):
            assert np.hypot(eye[0] - target[0], eye[1] - target[1]) < 0.03 * 256


def test_footage_without_a_face_falls_back_to_whole_frames(weights):
    frames, times = sampled(weights, EMPTY, 6)
    track = crop_faces(frames, times, detector(weights, "yunet"))
    assert not track.found.any()
    assert not track.scores.any()


def test_the_expression_encoder_sees_her_cry_and_then_smile(weights):
    model = AutoModel.from_pretrained(weights / "face-expression").eval()
    processor = load_image_processor(PREPROCESSOR)

    def shown(clip, count):
        frames, times = sampled(weights, clip, count)
        track = crop_faces(frames, times, detector(weights, "yunet", margin=0.0))
        with torch.no_grad():
            logits = model(preprocess_frames(processor, track.crops)["pixel_values"]).logits
        return [EXPRESSIONS[index] for index in logits.argmax(1).tolist()], times

    names, times = shown(PEXELS, 20)
    early = [name for name, time in zip(names, times, strict=True) if time < 5]
    late = [name for name, time in zip(names, times, strict=True) if time > 13]
    assert early.count("sad") > len(early) / 2
    assert set(late) == {"happy"}
    names, _ = shown(SINGLE, 12)
    assert names[0] == "neutral"
    assert names.count("happy") >= 6


def test_dinov2_features_tell_her_states_apart(weights):
    """Nearest neighbour by the patch mean of layer 8, across seconds of the clip."""
    model = AutoModel.from_pretrained(weights / "dinov2-small").eval()
    processor = load_image_processor(
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
    )
    frames, times = sampled(weights, PEXELS, 24)
    chosen = (times < 6) | (times > 12)
    track = crop_faces(frames[chosen], times[chosen], detector(weights, "yunet", size=224))
    with torch.no_grad():
        states = model(
            preprocess_frames(processor, track.crops)["pixel_values"], output_hidden_states=True
        ).hidden_states[8]
    vectors = torch.nn.functional.normalize(states[:, 1:].mean(1), dim=1)
    near = vectors @ vectors.T - 2 * torch.eye(len(vectors))
    truth = torch.from_numpy(times[chosen] > 12)
    assert (truth[near.argmax(1)] == truth).float().mean() > 0.9


@pytest.fixture(scope="module")
def speaker(weights):
    return Speaker(weights / "espeak")


def test_whisper_reads_what_espeak_says(weights, speaker):
    from scipy.signal import resample_poly
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = weights / "whisper-tiny.en"
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    text = "Please remember to bring your laptop and the report."
    sound = resample_poly(speaker.say(text, "en-us", Prosody()), 16000, speaker.rate)
    mel = processor(sound, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        ids = model.generate(mel, max_new_tokens=40)
    said = processor.batch_decode(ids, skip_special_tokens=True)[0].lower().strip(" .").split()
    want = text.lower().strip(" .").split()
    assert len(set(want) & set(said)) >= 7, said


def test_prosody_is_heard(speaker):
    slow = speaker.say("The window is on the left side.", "en-us+f1", Prosody(rate=110, volume=60))
    fast = speaker.say("The window is on the left side.", "en-us+f1", Prosody(rate=190, volume=120))
    assert len(slow) > 1.3 * len(fast)
    assert np.sqrt((fast**2).mean()) > 1.4 * np.sqrt((slow**2).mean())


def test_the_language_model_answers(weights):
    folder = weights / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert not hasattr(model, "hf_quantizer")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
