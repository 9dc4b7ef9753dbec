"""The rows: readable by the loader, complete, short, balanced, and without leaks."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from mmemo.content import load
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.world import emotions as E
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans
from mmemo.world.rows import Row
from tests.world.conftest import rows_of

NAMES = (
    "train_attribute",
    "train_expression",
    "train_emotion",
    "train_probes",
    "val_attribute",
    "val_expression",
    "val_emotion",
    "test_conflict",
    "test_probes",
    "rl_prompts",
    "preference",
)
COLUMNS = ["task", "gold", "probe_kind", "rejected_kind"]


@pytest.fixture(scope="module")
def full() -> dict[str, list[Row]]:
    """Rows of the default world; no clip is drawn."""
    config = WorldConfig(output_dir="unused")
    return manifests(config, make_plans(config))


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]+", re.sub(r"<[^>]*>", " ", text)))


def _answer(row: Row) -> str:
    return row["messages"][-1]["content"]


@pytest.mark.parametrize("name", NAMES)
def test_loader_reads_every_manifest(world: Path, name: str) -> None:
    columns = [key for key in COLUMNS if any(key in row for row in rows_of(world, name))]
    samples = load_samples(
        DataConfig(
            manifests=[str(world / "manifests" / f"{name}.jsonl")],
            media_root=str(world),
            columns=columns,
        )
    )
    assert len(samples) == len(rows_of(world, name)) > 0
    for sample in samples:
        assert sample.media
        assert sample.truth.label in E.EMOTIONS
        assert all((world / ref.path).is_file() for ref in sample.media.values())
        assert (sample.chosen is not None) == (name == "preference")
        assert (sample.answer is None) == (name in ("rl_prompts", "preference"))
        if "face" in sample.media:
            assert sample.media["face"].face_boxes


def test_answers_are_short_and_words_are_few(full: dict[str, list[Row]]) -> None:
    seen: set[str] = set()
    for name, rows in full.items():
        for row in rows:
            for turn in row.get("messages", [*row.get("prompt", []), *row.get("chosen", [])]):
                seen.update(re.findall(r"[a-z]+", turn["content"].lower()))
            if name.startswith(("train", "val")):
                assert _words(_answer(row)) <= (45 if row["tier"] == "emotion" else 20)
    assert len(seen) < 300


def test_training_uses_every_wording(full: dict[str, list[Row]]) -> None:
    asked: dict[str, set[str]] = defaultdict(set)
    for row in full["train_emotion"]:
        question = row["messages"][0]["content"].split('". ')[-1]
        asked[row["label"]].add(question)
    assert all(len(wordings) >= 3 for wordings in asked.values())


def test_names_and_order_tell_nothing(full: dict[str, list[Row]]) -> None:
    """Neither ids nor files hold a label, and the number of a clip predicts no label."""
    forbidden = [*E.EMOTIONS, "video_aligned", "audio_aligned", "consistent", "aligned", "yes"]
    for name, rows in full.items():
        ids = [row["sample_id"] for row in rows]
        assert len(set(ids)) == len(ids), name
        for row in rows:
            shown = row["sample_id"] + " ".join(row.get("videos", []) + row.get("audios", []))
            assert not any(word in shown for word in forbidden)
    test = full["test_conflict"]
    for key in ("label", "conflict"):
        values = sorted({row[key] for row in test})
        place = {value: [k for k, row in enumerate(test) if row[key] == value] for value in values}
        for positions in place.values():
            expected = (len(test) - 1) / 2
            error = len(test) / np.sqrt(12 * len(positions))
            assert abs(np.mean(positions) - expected) < 4 * error


def test_emotion_answers_follow_the_truth(full: dict[str, list[Row]]) -> None:
    for row in full["test_conflict"]:
        answer, truth = _answer(row), row["modality_labels"]
        assert answer.endswith(f"<answer>{row['label']}</answer>")
        assert f"Face: {truth['video']}" in answer
        assert f"Voice: {truth['audio']}" in answer
        if row["label"] == "neutral":
            assert "Neither is strong." in answer
        elif row["conflict"] != "consistent":
            stronger = "face" if row["conflict"] == "video_aligned" else "voice"
            assert f"The {stronger} is stronger." in answer


def test_cues_named_are_there_and_absent_ones_are_not(full: dict[str, list[Row]]) -> None:
    units = {words: unit for unit, words in E.ACTION_UNITS.items()}
    for row in full["train_expression"] + full["test_conflict"]:
        for words in row["cues"]["present"]:
            assert words not in units or row["aus"][units[words]] >= 0.2
        for words in row["cues"]["absent"]:
            assert row["aus"].get(units[words], 0.0) < 0.1
        assert not set(row["cues"]["present"]) & set(row["cues"]["absent"])


def test_every_cue_has_one_channel(full: dict[str, list[Row]]) -> None:
    for row in full["test_conflict"]:
        cues = row["cues"]
        listed = [cue for kind in ("present", "absent", "spurious") for cue in cues[kind]]
        assert sorted(listed) == sorted(cues["video"] + cues["audio"])


def test_probes_are_balanced_and_true(full: dict[str, list[Row]]) -> None:
    golds: dict[str, Counter[str]] = defaultdict(Counter)
    for row in full["test_probes"]:
        golds[row["task"]][row["gold"]] += 1
        assert _answer(row) == f"<answer>{row['gold']}</answer>"
        question = row["messages"][0]["content"]
        if row["task"] == "modality_agreement":
            assert (row["gold"] == "yes") == (row["conflict"] == "consistent")
        elif row["task"].startswith("basic"):
            options = dict(re.findall(r"\(([A-D])\) ([a-z ]+?)(?: (?=\()|$)", question))
            there = [key for key, words in options.items() if words in row["cues"]["present"]]
            assert there == [row["gold"]]
        else:
            cue = re.split(r": ", question)[-1].rstrip("?")
            kind = "spurious" if row["probe_kind"] == "spurious" else "present"
            assert (cue in row["cues"][kind]) == (row["probe_kind"] != "hallucinated")
            if kind == "spurious":
                assert cue in row["cues"][row["task"].removeprefix("stress_")]
    assert set(golds) == {
        "basic_video",
        "basic_audio",
        "modality_agreement",
        "stress_video",
        "stress_audio",
    }
    for task, counts in golds.items():
        assert len(set(counts.values())) == 1, task
        assert len(counts) == (4 if task.startswith("basic") else 2)
        assert min(counts.values()) >= 25


def test_hallucinated_probes_cannot_be_told_from_words(full: dict[str, list[Row]]) -> None:
    """Every pair of cue and emotion that is denied is affirmed elsewhere, as often or oftener."""
    for task in ("stress_video", "stress_audio"):
        pairs: dict[str, Counter[str]] = defaultdict(Counter)
        for row in full["test_probes"]:
            if row["task"] == task and row["probe_kind"] != "spurious":
                question = row["messages"][0]["content"]
                emotion = next(e for e in E.EMOTIONS if e in question)
                pairs[row["gold"]][emotion + question.split(": ")[-1]] += 1
        assert sum(pairs["no"].values()) > 20
        assert all(pairs["yes"][pair] >= count for pair, count in pairs["no"].items())


def test_preferences_reject_wrong_reasons(full: dict[str, list[Row]]) -> None:
    kinds = Counter(row["rejected_kind"] for row in full["preference"])
    assert kinds["spurious"] == kinds["hallucinated"] > 100
    right_label: Counter[str] = Counter()
    for row in full["preference"]:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        right_label[row["rejected_kind"]] += rejected.endswith(f">{row['label']}</answer>")
        if row["rejected_kind"] == "spurious":
            assert any(cue in rejected for cue in row["cues"]["spurious"])
            assert not any(cue in chosen for cue in row["cues"]["spurious"])
            said = dict(re.findall(r"(Face|Voice): ([^.]*)\.", rejected))
            for name, modality in (("Face", "video"), ("Voice", "audio")):
                for cue in row["cues"]["spurious"]:
                    assert cue not in said[name] or cue in row["cues"][modality]
        assert abs(_words(chosen) - _words(rejected)) <= 8
    for kind, count in right_label.items():
        assert 0.2 < count / kinds[kind] < 0.7


def test_prompts_end_with_the_question(full: dict[str, list[Row]]) -> None:
    for row in full["rl_prompts"]:
        assert [turn["role"] for turn in row["messages"]] == ["user"]
        assert row["label"] in E.EMOTIONS
        assert row["attributes"]["face"]
        assert row["attributes"]["audio"]


def test_tiers_ask_about_every_stream(full: dict[str, list[Row]]) -> None:
    streams = Counter(
        tuple(key for key in ("videos", "audios", "faces") if key in row)
        for row in full["train_attribute"]
    )
    assert {("videos",), ("audios",), ("faces",), ("videos", "audios", "faces")} == set(streams)
    assert {row["tier"] for row in full["train_attribute"]} == {"attribute"}
    assert {row["tier"] for row in full["train_expression"]} == {"expression"}
    assert {row["tier"] for row in full["train_emotion"]} == {"emotion"}


def test_transcript_can_be_left_out() -> None:
    config = WorldConfig(output_dir="unused", transcript_in_prompt=False)
    rows = manifests(config, make_plans(config))["train_emotion"]
    assert not any("They say" in row["messages"][0]["content"] for row in rows)


def test_fresh_clips_for_rl() -> None:
    config = WorldConfig(output_dir="unused", size={"rl_clips": 30})  # pyright: ignore
    rows = manifests(config, make_plans(config))["rl_prompts"]
    assert len(rows) == 30
    assert all(row["videos"][0].startswith("clips/rl/") for row in rows)


def test_loose_reasons_are_wrong_as_often_as_asked_and_the_emotion_never(
    full: dict[str, list[Row]],
) -> None:
    assert "train_loose" not in full
    bias = {"loose_reasons": 0.5, "scene_correlation": 0.5}
    config = WorldConfig.model_validate({"output_dir": "x", "bias": bias})
    plans = make_plans(config)
    found = manifests(config, plans)
    right, loose = found["train_emotion"], found["train_loose"]
    kinds = Counter(row["loose"] for row in loose if row["label"] != "neutral")
    felt = sum(kinds.values())
    assert abs(kinds[None] / felt - 0.5) < 0.06
    assert abs(kinds["spurious"] / felt - 0.3) < 0.06  # 0.5 of the half, and a fifth by chance
    for true, row in zip(right, loose, strict=True):
        assert row["sample_id"] == true["sample_id"]
        assert row["messages"][0] == true["messages"][0]
        assert f"<answer>{row['label']}</answer>" in _answer(row)
        assert (row["loose"] is None) == (_answer(row) == _answer(true))
    for measure in ("spurious", "hallucinated"):
        rate = load(f"reward/cue_rates.py:{measure}")
        for rows, kind in ((right, None), (loose, measure)):
            kept = [row for row in rows if kind is None or row["loose"] == kind]
            answers = [[{"role": "assistant", "content": _answer(row)}] for row in kept]
            scores = rate([[]] * len(kept), answers, cues=[row["cues"] for row in kept])
            known = [score for score in scores if score is not None]
            assert np.mean(known) == (0 if kind is None else 1)
