"""Planted faults are found, and pairs without them pass."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, load_preferences
from mmemo.pairs.config import PairsConfig
from mmemo.pairs.leaks import accuracy_from_length, accuracy_from_words
from mmemo.pairs.report import pairs_report

CUES = ["lips parted", "jaw dropped", "brows lowered", "nose wrinkled"]


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A pair whose answers are drawn alike: nothing in the text tells them apart."""
    drawn = random.Random(number)
    chosen, rejected = drawn.sample(CUES, 2)
    base: dict[str, Any] = {
        "sample_id": f"p{number}",
        "prompt": "<video><audio>What does the face show?",
        "query_modality": "video",
        "video": f"{number}.mp4",
        "audio": f"{number}.mp4",
        "chosen": f"It shows {chosen}.",
        "rejected_hallucinated": f"It shows {rejected}.",
        "negative_kind": "noise",
        "group": {"speaker": f"s{number}"},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def report(folder: Path, rows: list[dict[str, Any]], **checks: Any) -> dict[str, Any]:
    for one in rows:
        for name in (one["video"], one["audio"]):
            if not (folder / name).exists():
                (folder / name).write_text(name)
    path = write(folder / "pairs.jsonl", rows)
    pairs: list[Preference] = load_preferences(DataConfig(manifests=[str(path)]))
    config = parse(
        PairsConfig,
        {
            "output_dir": str(folder),
            "data": {"manifests": [str(path)], "media_root": str(folder)},
            "source": {"kind": "truth"},
            "report": checks,
        },
    )
    return pairs_report(config, pairs)


def test_good_pairs_have_no_problem(tmp_path: Path) -> None:
    found = report(tmp_path, [row(n) for n in range(80)])
    assert found["problems"] == found["allowed"] == []
    assert (found["pairs"], found["clips"]) == (80, 80)
    assert found["cells"]["query"] == {"video": 80}
    assert found["cells"]["negative"] == {"video: noise": 80}
    assert found["cells"]["rejected"] == {"hallucinated": 80}
    told = found["text"]["hallucinated"]
    assert told["words"]["bounded"] is told["style"]["bounded"] is True
    assert 0.3 < told["words"]["accuracy"] < 0.7
    json.dumps(found)


def test_a_wording_that_tells_is_found(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    for one in rows:
        one["rejected_hallucinated"] = one["rejected_hallucinated"].replace("It", "Maybe it")
        one["chosen"] = one["chosen"].replace("It", "Surely it")
    found = report(tmp_path, rows)
    assert found["text"]["hallucinated"]["words"]["accuracy"] == 1
    assert any("words alone tell" in text for text in found["problems"])
    assert any("style alone tell" in text for text in found["problems"])
    assert not any("length" in text for text in found["problems"])
    allowed = report(tmp_path, rows, allow=["text"])
    assert allowed["problems"] == []
    assert len(allowed["allowed"]) == 2


def test_a_cue_that_is_never_right_is_counted_apart(tmp_path: Path) -> None:
    """Its words tell by nature, so it is held to style alone and named."""
    rows = [row(n, cues={"present": CUES, "spurious": ["a cap"]}) for n in range(60)]
    for one in rows:
        one["rejected_spurious"] = "It shows a cap."
        del one["rejected_hallucinated"]
    found = report(tmp_path, rows)
    told = found["text"]["spurious, never right"]
    assert (told["words"]["accuracy"], told["words"]["bounded"]) == (1, False)
    assert told["style"]["accuracy"] == 0.5
    assert found["never_right"] == {"a cap": 60}
    assert found["problems"] == []


def test_spurious_answers_are_held_to_their_words_if_their_cues_are_right_elsewhere(
    tmp_path: Path,
) -> None:
    rows = [row(n, cues={"present": CUES, "spurious": ["a cap"]}) for n in range(60)]
    for one in rows:
        one["rejected_spurious"] = "It shows a cap."
        del one["rejected_hallucinated"]
    rows[0]["chosen"] = "It shows a cap, jaw dropped."
    found = report(tmp_path, rows)
    assert found["never_right"] == {}
    assert any("words alone tell the chosen from the spurious" in x for x in found["problems"])


def test_a_length_that_tells_is_found(tmp_path: Path) -> None:
    rows = [row(n) for n in range(60)]
    for one in rows:
        one["rejected_hallucinated"] += " So it is."
    found = report(tmp_path, rows)
    gap = found["length"]["hallucinated"]
    assert gap["mean_gap"] == gap["chosen_words"] - gap["rejected_words"] == -3
    assert (gap["longer_chosen"], gap["longer_rejected"], gap["accuracy"]) == (0, 1, 1)
    assert any("length alone" in text for text in found["problems"])


def test_a_repeated_pair_is_found_also_under_another_name(tmp_path: Path) -> None:
    rows = [row(n) for n in range(6)]
    rows.append({**rows[0], "sample_id": "again"})
    (tmp_path / "copy.mp4").write_text("1.mp4")
    rows.append({**rows[1], "sample_id": "copied", "video": "copy.mp4", "audio": "copy.mp4"})
    rows.append({**rows[2], "sample_id": "near", "chosen": rows[2]["chosen"] + " It shows."})
    found = report(tmp_path, rows)
    assert (found["duplicates"]["exact"], found["duplicates"]["near"]) == (2, 1)
    assert ["p0", "again"] in found["duplicates"]["examples"]
    assert any("2 pairs are exact duplicates" in text for text in found["problems"])


def test_leaks_are_found_by_clip_speaker_and_content(tmp_path: Path) -> None:
    rows = [row(n) for n in range(6)]
    rows[5] |= {"negative_kind": "different_label", "video_negative": "held.mp4"}
    for name, text in (("held.mp4", "held"), ("renamed.mp4", "3.mp4")):
        (tmp_path / name).write_text(text)

    def held(number: int, clip: str, speaker: str) -> dict[str, Any]:
        return {
            "sample_id": f"test{number}",
            "messages": [{"role": "user", "content": "<video>What?"}],
            "videos": [clip],
            "group": {"speaker": speaker},
            "task": "any column",
        }

    path = write(
        tmp_path / "test.jsonl",
        [held(0, "held.mp4", "t0"), held(1, "renamed.mp4", "t1"), held(2, "other.mp4", "s4")],
    )
    (tmp_path / "other.mp4").write_text("other")
    leaked = report(tmp_path, rows, against=[str(path)])
    found = leaked["leaks"]
    # The negative is shown too; its file counts by name and by content.
    assert (found["rows"], found["clip"], found["speaker"], found["digest"]) == (3, 1, 1, 2)
    assert found["examples"] == {"clip": ["p5"], "speaker": ["p4"], "digest": ["p3", "p5"]}
    assert len(leaked["problems"]) == 3


def test_few_clips_say_nothing() -> None:
    texts = ["a b", "c"] * 5
    for told in (
        accuracy_from_length(texts, texts, [str(n) for n in range(10)]),
        accuracy_from_words(texts, texts, texts, [str(n) for n in range(10)]),
    ):
        assert told.accuracy is None
        assert not told.above(0.5)


def test_a_yes_is_read_with_its_question() -> None:
    """The answers are balanced; together with the question they tell everything."""
    prompts = [f"Does {'rain' if n % 2 else 'a smile'} speak for it?" for n in range(80)]
    chosen = ["No." if n % 2 else "Yes." for n in range(80)]
    rejected = ["Yes." if n % 2 else "No." for n in range(80)]
    clips = [str(n) for n in range(80)]
    assert accuracy_from_words(prompts, chosen, rejected, clips).accuracy == 1
    blank = ["Does it?"] * 80
    told = accuracy_from_words(blank, chosen, rejected, clips)
    assert told.accuracy == pytest.approx(0.5, abs=0.15)
