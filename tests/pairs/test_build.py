"""``run_pairs`` end to end: from truth on a tiny world, from a scripted endpoint, from a model."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import load_preferences, queried, unqueried
from mmemo.errors import ConfigError, DataError
from mmemo.generation.rollout import HFRollouts
from mmemo.pairs.build import run_pairs, run_pairs_stage
from mmemo.pairs.config import PairsConfig
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import write_manifests
from mmemo.world.plan import make_plans
from tests.evaluation.world import CLIPS, save_model, write_world
from tests.rewards.stub_judge import Reply, judge_server
from tests.train.grpo.tiny import reward
from tests.world.conftest import SMALL


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of a small world; no clip is drawn."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = {**SMALL, "train_clips": 30}
    config = parse(WorldConfig, {"output_dir": str(folder), "size": sizes, "workers": 1})
    write_manifests(config, make_plans(config), folder)
    return folder


def truth(world: Path, out: Path, **changes: Any) -> PairsConfig:
    names = ("train_emotion", "train_expression")
    values: dict[str, Any] = {
        "output_dir": str(out),
        "data": {"manifests": [str(world / f"manifests/{name}.jsonl") for name in names]},
        "source": {"kind": "truth", "closed_vocabulary": True},
        "one_channel": False,
        "negatives": {"irrelevant": {"noise": 1}},
        "report": {
            "against": [str(world / "manifests/test_conflict.jsonl")],
            "digests": False,
            "allow": ["text", "length"],
        },
    }
    return parse(PairsConfig, {**values, **changes})


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_from_truth_are_what_they_say(world: Path, tmp_path: Path) -> None:
    path = run_pairs(truth(world, tmp_path))
    pairs = load_preferences(DataConfig(manifests=[str(path)]))
    assert {pair.query for pair in pairs} == {"video", "audio", "joint"}
    seen = {"spurious": 0, "hallucinated": 0}
    for pair in pairs:
        cues = {kind: set(listed) for kind, listed in pair.sample.truth.cues.items()}
        said = {name: text.lower() for name, text in pair.answers.items()}
        assert not any(cue in said["chosen"] for cue in cues["spurious"])
        if "spurious" in said:
            seen["spurious"] += 1
            added = {cue for cue in cues["spurious"] if cue in said["spurious"]}
            assert added
            where = {pair.sample.truth.cue_channels[cue] for cue in added}
            assert where == {pair.query} or (pair.query == "joint" and len(where) == 1)
        if "hallucinated" in said:
            seen["hallucinated"] += 1
            known = {*cues["present"], *cues["spurious"]}
            cited = re.findall(r"(?:face|voice): \w+, \w+, ([^.]*)\.", said["hallucinated"])
            named = {cue for listed in cited for cue in listed.split(", ")}
            assert named - known
        media = pair.sample.media
        assert pair.negative is not None
        assert pair.negative.modalities == queried(pair.query, media)
        assert (pair.irrelevant is None) == (pair.query == "joint")
        if pair.irrelevant is not None:
            assert pair.irrelevant.modalities == unqueried(pair.query, media)
        for name, ref in pair.negative.media.items():
            assert ref.path != media[name].path
            assert ref.face_boxes or name != "face"
    assert min(seen.values()) > 10
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["pairs"] == len(pairs)
    assert found["leaks"]["speaker"] == found["leaks"]["clip"] == 0
    assert found["left_out"]["one_channel"] > 0


def test_the_same_config_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    one = run_pairs(truth(world, tmp_path / "1"))
    two = run_pairs(truth(world, tmp_path / "2"))
    other = run_pairs(truth(world, tmp_path / "3", seed=1))
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_a_leak_stops_the_verb_and_leaves_the_report(world: Path, tmp_path: Path) -> None:
    leaky = {
        "against": [str(world / "manifests/train_probes.jsonl")],
        "digests": False,
        "allow": ["text", "length"],
    }
    with pytest.raises(DataError, match="share a clip with an evaluation set"):
        run_pairs(truth(world, tmp_path, report=leaky))
    assert json.loads((tmp_path / "report.json").read_text())["leaks"]["clip"] > 0


def caption(request: dict[str, Any], _: int) -> Reply:
    """What the scripted endpoint says; the sound of a clip never comes with its picture."""
    content = request["messages"][-1]["content"]
    if isinstance(content, list):
        kinds = {part["type"] for part in content}
        assert kinds in ({"image_url", "text"}, {"input_audio", "text"})
        seen = "image_url" in kinds
        emotion = "happy" if seen else "sad"
        return Reply(
            json.dumps(
                {
                    "caption": "a face" if seen else "a voice",
                    "emotion": emotion,
                    "relevant": ["wide smile" if seen else "low pitch"],
                    "irrelevant": ["a red wall" if seen else "a passing car"],
                }
            )
        )

    def cues(name: str) -> dict[str, str]:
        return {
            "grounded": f"real {name}",
            "spurious": f"idle {name}",
            "hallucinated": f"false {name}",
        }

    return Reply(
        json.dumps(
            {
                channel: {
                    "questions": [
                        {"question": f"Which {channel} cue?", **cues(channel), "other": "odd one"}
                    ],
                    "probes": [cues(channel)],
                }
                for channel in ("video", "audio")
            }
        )
    )


def captions(world: Path, out: Path, url: str) -> PairsConfig:
    endpoint = {"base_url": url, "model": "m", "backoff_s": 0.0, "max_retries": 1}
    return parse(
        PairsConfig,
        {
            "output_dir": str(out),
            "data": {
                "manifests": [str(world / "test_conflict.jsonl")],
                "media_root": str(world),
            },
            "source": {
                "kind": "captions",
                "endpoint": endpoint,
                "frames": 2,
                "max_failure_share": 0.5,
            },
            "negatives": {"kinds": {"noise": 1}},
            "report": {"allow": ["text", "length", "duplicates"]},
            "decode": {"workers": 1},
        },
    )


def test_captions_become_questions_by_cell_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    clips = write_world(tmp_path / "clips")

    def failing(request: dict[str, Any], number: int) -> Reply:
        # Fails for a while after the first captions, as a killed or broken server would.
        return caption(request, number) if number < 2 else Reply(status=500)

    failed = pytest.raises(DataError, match="the captioning endpoint failed on")
    with judge_server(failing) as server, failed:
        run_pairs(captions(clips, tmp_path / "out", server.url))
    kept = rows_of(tmp_path / "out/captions.jsonl")
    with judge_server(caption) as server:
        path = run_pairs(captions(clips, tmp_path / "out", server.url))
    # The first line is the fingerprint; every caption that was there is not asked for again.
    assert len(server.seen) == 2 * CLIPS - (len(kept) - 1) + CLIPS
    with judge_server(caption) as server:
        again = run_pairs(captions(clips, tmp_path / "out", server.url))
    assert server.seen == []
    assert again.read_bytes() == path.read_bytes()
    rows = rows_of(path)
    cells = {row["group"]["cell"] for row in rows}
    assert "video-driven/visual cue/visual_relevant" in cells
    assert "video-driven/audio cue/emotion_relevant" in cells
    for row in rows:
        cell = row["group"]["cell"]
        yes = cell.endswith("no_hallucination")
        if not cell.endswith("choice"):
            assert row["chosen"] == ("Yes." if yes else "No.")
            assert ("rejected" in row) == yes
        else:
            assert "real" in row["chosen"]
            assert "idle" in row["rejected_spurious"]
            assert "false" in row["rejected_hallucinated"]


def models(root: Path, out: str, **changes: Any) -> PairsConfig:
    """Pairs of the answers of ``root/model`` to the clips of ``root/clips``."""
    source = {
        "kind": "model",
        "readable": False,  # the model is untrained
        "model": {"path": str(root / "model")},
        "reward": reward("short"),
        "rollout": {"num_generations": 8, "max_completion_length": 160},  # it ends by chance
        "per_device_batch_size": 2,
        "min_gap": 1e-6,
        **changes,
    }
    manifest = str(root / "clips/test_conflict.jsonl")
    return parse(
        PairsConfig,
        {
            "output_dir": str(root / out),
            "data": {"manifests": [manifest], "media_root": str(root / "clips")},
            "source": source,
            "negatives": {"kinds": {"noise": 1}},
            "report": {"allow": ["text", "length", "duplicates"]},
            "decode": {"workers": 1},
        },
    )


def test_a_models_own_answers_are_paired_and_a_cut_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_world(tmp_path / "clips", 6)
    save_model(tmp_path / "model")
    config = partial(models, tmp_path)
    whole = run_pairs(config("whole"))
    rows = rows_of(whole)
    assert rows
    answers = (tmp_path / "whole/answers.jsonl").read_bytes()
    assert len(answers.splitlines()) == 7
    (tmp_path / "cut").mkdir()
    lines = answers.splitlines(keepends=True)
    (tmp_path / "cut/answers.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run_pairs(config("cut")).read_bytes() == whole.read_bytes()
    assert (tmp_path / "cut/answers.jsonl").read_bytes() == answers
    drawn = {
        line["key"].split("/")[0]: line["value"]
        for line in rows_of(tmp_path / "whole/answers.jsonl")[1:]
    }
    for row in rows:
        values = drawn[row["sample_id"].removesuffix("-pair")]
        sizes = dict(zip(values["texts"], map(len, values["ids"]), strict=True))
        assert sizes[row["chosen"]] == min(sizes.values()) < sizes[row["rejected"]]
    # Two processes sample two batches and one, and a third makes the pairs.
    calls: list[int] = []
    generate = HFRollouts.generate
    monkeypatch.setattr(
        HFRollouts,
        "generate",
        lambda *given, **named: calls.append(1) or generate(*given, **named),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, batches in (("0", 2), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        assert run_pairs_stage(config("two")) is None
        assert len(calls) == batches
        calls.clear()
    assert not (tmp_path / "two/pairs.jsonl").exists()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    made = run_pairs_stage(config("two"))
    assert made is not None
    assert made.read_bytes() == whole.read_bytes()
    assert calls == []
    # An unreachable gap makes everything a tie.
    with pytest.raises(DataError, match="tie"):
        run_pairs(config("ties", min_gap=9))


def test_only_a_models_answers_are_shared_by_processes(world: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"source\.kind=truth has no model.*leave --processes out"
    ):
        truth(world, tmp_path, run={"processes": 2})
