"""The truth: the labelling rule, its balance, and that no single cue gives it away."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from scipy.stats import ks_2samp

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.world import emotions as E
from mmemo.world.config import WorldConfig
from mmemo.world.plan import ClipPlan, make_plans, plan_hash


def _plans(split: str = "test", **changes: object) -> list[ClipPlan]:
    return make_plans(parse(WorldConfig, {"output_dir": "unused", **changes}))[split]


def test_stronger_channel_gives_the_label() -> None:
    for split, plans in make_plans(WorldConfig(output_dir="unused")).items():
        for plan in plans:
            felt = {"face": plan.face_emotion, "voice": plan.voice_emotion}
            if plan.label == "neutral":
                assert plan.conflict == "consistent"
                assert plan.face_strength == plan.voice_strength == 0
                continue
            assert plan.face_strength != plan.voice_strength
            assert plan.label == felt[plan.stronger], split
            if plan.conflict == "consistent":
                assert felt["face"] == felt["voice"]
            else:
                assert felt["face"] != felt["voice"]
                assert (
                    plan.conflict
                    == {"face": "video_aligned", "voice": "audio_aligned"}[plan.stronger]
                )


def test_subsets_are_equal_and_pairs_of_emotions_are_balanced() -> None:
    plans = _plans()
    assert set(Counter(plan.conflict for plan in plans).values()) == {100}
    for subset in ("video_aligned", "audio_aligned"):
        pairs = Counter(
            (plan.face_emotion, plan.voice_emotion) for plan in plans if plan.conflict == subset
        )
        assert len(pairs) == 20
        assert max(pairs.values()) - min(pairs.values()) <= 1


def test_strengths_follow_one_law_in_every_subset() -> None:
    plans = [p for p in _plans(size={"test_clips": 3000}) if p.label != "neutral"]
    both = {
        subset: np.array(
            [sorted((p.face_strength, p.voice_strength)) for p in plans if p.conflict == subset]
        )
        for subset in ("video_aligned", "audio_aligned", "consistent")
    }
    for subset in ("video_aligned", "audio_aligned"):
        for measure in (lambda s: s[:, 0], lambda s: s[:, 1], lambda s: s[:, 1] - s[:, 0]):
            assert ks_2samp(measure(both[subset]), measure(both["consistent"])).pvalue > 0.001
    same = [p for p in plans if p.conflict == "consistent"]
    by_face = np.mean([p.stronger == "face" for p in same])
    assert 0.45 < by_face < 0.55


def test_strength_gap_is_kept() -> None:
    plans = _plans(difficulty={"strength_gap": 0.3})
    gaps = [abs(p.face_strength - p.voice_strength) for p in plans if p.label != "neutral"]
    assert min(gaps) >= 0.3 - 1e-3
    assert (
        min(
            abs(p.face_strength - p.voice_strength)
            for p in _plans(difficulty={"strength_gap": 0.02})
            if p.label != "neutral"
        )
        < 0.1
    )


def test_speakers_of_test_never_occur_in_training() -> None:
    plans = make_plans(WorldConfig(output_dir="unused"))
    people = {split: {p.speaker.name for p in listed} for split, listed in plans.items()}
    looks = {split: {p.speaker for p in listed} for split, listed in plans.items()}
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        assert not people[one] & people[other]
        assert not looks[one] & looks[other]
    assert len(people["test"]) == 16


def test_scene_follows_the_label_in_training_only() -> None:
    changes = {"bias": {"scene_correlation": 1.0}}
    train = _plans("train", **changes)
    assert all(
        (p.scene.weather, p.scene.light, p.scene.cap, p.scene.music) == E.SCENES[p.label]
        for p in train
    )
    test = _plans("test", **changes)
    tied = np.mean([p.scene.weather == E.SCENES[p.label][0] for p in test])
    assert 0.1 < tied < 0.3


def test_text_leans_towards_the_label_as_often_as_asked() -> None:
    for share in (0.0, 1.0):
        plans = [p for p in _plans(bias={"text_correlation": share}) if p.label != "neutral"]
        assert np.mean([p.text_emotion == p.label for p in plans]) == share


def test_training_can_favour_a_channel() -> None:
    train = _plans("train", bias={"train_video_share": 0.9, "train_consistent": 0.5})
    counts = Counter(p.conflict for p in train)
    assert counts == {"video_aligned": 162, "audio_aligned": 18, "consistent": 180}


def test_strong_expressions_show_more() -> None:
    plans = [p for p in _plans(size={"test_clips": 900}) if p.label != "neutral"]
    face = [max(p.aus.values()) for p in plans]
    voice = [np.linalg.norm(list(p.prosody.values())) for p in plans]
    assert np.corrcoef([p.face_strength for p in plans], face)[0, 1] > 0.85
    assert np.corrcoef([p.voice_strength for p in plans], voice)[0, 1] > 0.85


def test_ambiguity_brings_in_the_neighbours_cues_and_drops_own() -> None:
    def fear(ambiguity: float) -> tuple[float, float]:
        plans = _plans(size={"test_clips": 900}, difficulty={"ambiguity": ambiguity})
        chosen = [p for p in plans if p.face_emotion == "fear"]
        jaw = float(np.mean([p.aus["AU26"] / p.face_strength for p in chosen]))
        return jaw, float(np.mean([p.aus["AU4"] == 0 for p in chosen]))

    clear, hard = fear(0.0), fear(1.0)
    assert clear[0] < 0.05 < hard[0]
    assert clear[1] == 0 < hard[1]


def test_plan_hash_changes_with_what_is_seen_and_only_then() -> None:
    config = WorldConfig(output_dir="unused")
    plan = make_plans(config)["test"][0]
    noisy = parse(WorldConfig, {"output_dir": "unused", "difficulty": {"video_noise": 9.0}})
    moved = WorldConfig(output_dir="elsewhere", workers=3)
    assert plan_hash(plan, config) == plan_hash(plan, moved)
    assert plan_hash(plan, config) != plan_hash(plan, noisy)


def test_impossible_gap_is_refused() -> None:
    with pytest.raises(ConfigError, match="strength_gap"):
        parse(WorldConfig, {"output_dir": "x", "difficulty": {"strength_gap": 0.8}})


def test_plan_hash_covers_every_module_that_renders() -> None:
    """The modules that rendering a clip runs through are those whose code is hashed."""
    code = """
import sys
from pathlib import Path
from mmemo.world import plan, render
from mmemo.world.config import WorldConfig

config = WorldConfig(output_dir="unused")
clip = plan.make_plans(config)["test"][0]
hashed, run = set(), set()
folder, sha256 = Path(plan.__file__).parent, plan.sha256
plan.sha256 = lambda path: (hashed.add(path.name), sha256(path))[1]
plan.plan_hash(clip, config)
sys.setprofile(lambda frame, *_: run.add(frame.f_code.co_filename))
render.render(clip, config)
sys.setprofile(None)
used = {Path(name).name for name in run if Path(name).parent == folder}
missing = used - hashed - {"plan.py", "__init__.py"}  # what a plan says is hashed itself
assert not missing, missing
assert len(hashed) >= 5, hashed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
