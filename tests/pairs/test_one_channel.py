"""Sound alone, picture alone, face alone, and a mixture: from files to pairs to a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import load_preferences
from mmemo.data.sample import MediaRef, Modality, Sample, Truth, Turn
from mmemo.errors import ConfigError, DataError
from mmemo.pairs.build import run_pairs
from mmemo.pairs.config import PairsConfig
from mmemo.pairs.rows import can_be_asked, emotion_of, one_channel, query_of
from tests.evaluation.world import save_model
from tests.media_files import write_clip, write_wav
from tests.models.parts import values
from tests.pairs.test_build import caption
from tests.rewards.stub_judge import Reply, judge_server
from tests.train.dpo.tiny import dpo_values
from tests.train.grpo.tiny import reward

EMOTIONS = ("happy", "sad", "angry")
CUES = {
    "audio": {"happy": ["high pitch"], "sad": ["low voice"], "angry": ["loud voice"]},
    "video": {"happy": ["wide smile"], "sad": ["lips pressed"], "angry": ["low brows"]},
}
ROWS = 12


def row_of(number: int, *streams: Modality, asked: str = "What does the person feel?") -> Any:
    """A row whose label alone says what its one modality shows."""
    emotion = EMOTIONS[number % 3]
    name = f"c{number % 6}"
    paths = {"audio": f"{name}.wav", "video": f"{name}.mp4", "face": f"{name}.mp4"}
    about = "audio" if streams == ("audio",) else "video"
    present = CUES[about][emotion]
    return {
        "sample_id": f"r{number}-{'-'.join(streams)}",
        "messages": [
            {"role": "user", "content": "".join(f"<{one}>" for one in streams) + asked},
            {
                "role": "assistant",
                "content": f"<think>There is {present[0]}.</think><answer>{emotion}</answer>",
            },
        ],
        **{f"{one}s": [paths[one]] for one in streams},
        "label": emotion,
        "cues": {
            "present": present,
            "absent": [cue for e in EMOTIONS for cue in CUES[about][e] if e != emotion],
            "spurious": ["room sound" if about == "audio" else "a red cap"],
        },
        "group": {"speaker": f"s{number % 4}"},
    }


def write(folder: Path, *streams: Modality) -> Path:
    """Real files, and a manifest of rows that show these streams."""
    for number in range(6):
        write_wav(folder / f"c{number}.wav", seconds=1.0, tone=200.0 + 60 * number)
        write_clip(folder / f"c{number}.mp4", seconds=1.0, fps=8, audio=False)
    return manifest(folder, [row_of(number, *streams) for number in range(ROWS)])


def manifest(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "pairs"),
        "data": {"manifests": [str(folder / "rows.jsonl")], "media_root": str(folder)},
        "source": {"kind": "truth"},
        "negatives": {"kinds": {"different_label": 1, "noise": 1, "other_speaker": 1}},
        "report": {"allow": ["text", "length", "duplicates"]},
        "decode": {"workers": 1},
        **changes,
    }


def mmemo(verb: str, folder: Path, name: str, found: dict[str, Any]) -> str:
    """The command line on a config file; returns what it prints."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(found), encoding="utf-8")  # JSON is YAML
    done = CliRunner().invoke(app, [verb, str(path)])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.output


@pytest.mark.parametrize(
    ("streams", "query"), [(("audio",), "audio"), (("video",), "video"), (("face",), "video")]
)
def test_from_files_to_a_model_by_the_command_line(
    tmp_path: Path, streams: tuple[Modality, ...], query: str
) -> None:
    write(tmp_path, *streams)
    mmemo("pairs", tmp_path, "pairs", config(tmp_path))
    pairs = load_preferences(DataConfig(manifests=[str(tmp_path / "pairs/pairs.jsonl")]))
    assert len(pairs) == ROWS
    kinds: set[str] = set()
    for pair in pairs:
        assert (pair.query, tuple(pair.sample.media)) == (query, streams)
        assert set(pair.answers) == {"chosen", "spurious", "hallucinated"}
        assert pair.negative is not None
        assert pair.negative.modalities == streams
        assert set(pair.negative.media) <= set(streams)
        assert pair.irrelevant is None
        kinds.add(pair.negative.kind)
    assert {"different_label", "noise"} <= kinds
    report = json.loads((tmp_path / "pairs/report.json").read_text())
    assert set(report["cells"]["query"]) == {query}
    branches = {name: None for name in ("audio", "video", "face") if name not in streams}
    found = dpo_values(
        tmp_path / "pairs",
        tmp_path / "dpo",
        "avem_dpo",
        data={"media_root": str(tmp_path)},
        model={**values(**branches, fusion=None), "lora": {"r": 4, "lora_dropout": 0.0}},
        train={"max_steps": 3},
    )
    shown = mmemo("check", tmp_path, "dpo", found)
    assert f"avem_dpo: {ROWS} of {ROWS} pairs" in shown
    mmemo("dpo", tmp_path, "dpo", found)
    lines = (tmp_path / "dpo/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 3
    assert abs(last["avem_dpo/rewards/margins"]) > 0


def test_a_mixture_is_asked_about_what_each_row_shows(tmp_path: Path) -> None:
    write(tmp_path, "audio")
    both = {**row_of(20, "video", "audio"), "modality_labels": {"video": "angry"}}
    odd = row_of(30, "audio", asked="What does the face show?")
    rows = [row_of(number, "audio") for number in range(6)]
    rows += [row_of(number, "video") for number in range(6)]
    manifest(tmp_path, [*rows, both, odd])
    run_pairs(parse(PairsConfig, config(tmp_path)))
    pairs = load_preferences(DataConfig(manifests=[str(tmp_path / "pairs/pairs.jsonl")]))
    queries = [pair.query for pair in pairs]
    assert queries.count("audio") == queries.count("video") == 6
    for pair in pairs:
        assert pair.negative is not None
        assert set(pair.negative.media) <= set(pair.sample.media)
    report = json.loads((tmp_path / "pairs/report.json").read_text())
    assert report["left_out"]["no_such_stream"] == 1
    assert report["left_out_examples"]["no_such_stream"] == ["r30-audio"]
    kept = parse(PairsConfig, config(tmp_path, one_channel=False, output_dir=str(tmp_path / "no")))
    run_pairs(kept)
    report = json.loads((tmp_path / "no/report.json").read_text())
    assert report["pairs"] == queries.count("joint") == 1
    assert report["left_out"]["one_channel"] == 13


def test_a_typed_row_names_its_field(tmp_path: Path) -> None:
    write(tmp_path, "audio")
    wrong = row_of(0, "audio")
    wrong["audois"] = wrong.pop("audios")
    manifest(tmp_path, [row_of(1, "audio"), wrong])
    with pytest.raises(DataError, match="'audois': is unknown; did you mean 'audios'"):
        run_pairs(parse(PairsConfig, config(tmp_path)))


def test_kinds_of_one_modality_are_enough_for_it_and_refused_for_both(tmp_path: Path) -> None:
    write(tmp_path, "audio")
    muted = config(tmp_path, negatives={"kinds": {"muted": 1}})
    run_pairs(parse(PairsConfig, muted))
    pairs = load_preferences(DataConfig(manifests=[str(tmp_path / "pairs/pairs.jsonl")]))
    assert {pair.negative.kind for pair in pairs if pair.negative} == {"muted"}
    manifest(tmp_path, [row_of(0, "video", "audio")])
    with pytest.raises(ConfigError, match="none of muted can replace video and audio, which 'r0-v"):
        run_pairs(parse(PairsConfig, muted))


def test_captions_of_one_modality_ask_about_that_one(tmp_path: Path) -> None:
    """A mixture: sound alone, face alone, and picture and sound in two files."""
    write(tmp_path, "audio")
    rows = [row_of(0, "audio"), row_of(1, "face"), row_of(2, "video", "audio")]
    # The scripted endpoint sees "happy" and hears "sad".
    labels = ("sad", "happy", "happy")
    manifest(tmp_path, [{**row, "label": x} for row, x in zip(rows, labels, strict=True)])

    def answer(request: dict[str, Any], number: int) -> Reply:
        reply = caption(request, number)
        content = request["messages"][-1]["content"]
        if isinstance(content, str):
            about = json.loads(content)
            listed = json.loads(reply.content)
            reply = Reply(json.dumps({k: v for k, v in listed.items() if k in about}))
            system = request["messages"][0]["content"]
            assert ("picture and of the sound" in system) == ({"video", "audio"} <= set(about))
        return reply

    with judge_server(answer) as server:
        endpoint = {"base_url": server.url, "model": "m", "backoff_s": 0.0, "max_retries": 0}
        source = {"kind": "captions", "endpoint": endpoint, "frames": 2}
        noise = {"kinds": {"noise": 1}}
        run_pairs(parse(PairsConfig, config(tmp_path, source=source, negatives=noise)))
        assert len(server.seen) == 1 + 1 + 2 + 3
    pairs = load_preferences(DataConfig(manifests=[str(tmp_path / "pairs/pairs.jsonl")]))
    asked = {(tuple(pair.sample.media), pair.query) for pair in pairs}
    assert asked == {
        (("audio",), "audio"),
        (("face",), "video"),
        (("video", "audio"), "video"),
        (("video", "audio"), "audio"),
    }


def test_a_models_answers_about_one_modality(tmp_path: Path) -> None:
    """A question about a missing modality is left out before anything is sampled."""
    write(tmp_path, "audio")
    odd = row_of(9, "audio", asked="What does the face show?")
    manifest(tmp_path, [*(row_of(number, "audio") for number in range(3)), odd])
    source = {
        "kind": "model",
        "readable": False,  # the model is untrained
        "model": {"path": str(save_model(tmp_path / "model"))},
        "reward": reward("short"),
        "rollout": {"num_generations": 8, "max_completion_length": 160},
        "min_gap": 1e-6,
    }
    run_pairs(parse(PairsConfig, config(tmp_path, source=source)))
    report = json.loads((tmp_path / "pairs/report.json").read_text())
    assert report["left_out"]["no_such_stream"] == 1
    assert set(report["cells"]["query"]) == {"audio"}
    assert len((tmp_path / "pairs/answers.jsonl").read_text().splitlines()) == 4


def sample(text: str, *streams: Modality, **columns: Any) -> Sample:
    media = {name: MediaRef("a.mp4") for name in streams}
    truth = Truth(label="sad", modality_labels={"video": "happy"} if len(streams) > 1 else {})
    return Sample("a", (Turn("user", text),), media, truth, columns=columns)


@pytest.mark.parametrize(
    ("text", "streams", "columns", "query", "possible"),
    [
        ("What now?", ("audio",), {}, "audio", True),
        ("What now?", ("face",), {}, "video", True),
        ("What now?", ("video", "face"), {}, "video", True),
        ("What now?", ("video", "audio"), {}, "joint", True),
        ("What now?", (), {}, "joint", True),
        ("Do face and voice agree?", ("audio",), {}, "audio", True),
        ("Is the face calm?", ("audio",), {}, "video", False),
        ("Is the voice calm?", ("video", "face"), {}, "audio", False),
        ("Is the voice calm?", (), {}, "audio", True),
        ("What now?", ("audio",), {"query_modality": "joint"}, "audio", True),
        ("What now?", ("audio",), {"query_modality": "vision"}, "video", False),
        ("What now?", ("video", "audio"), {"query_modality": "visual"}, "video", True),
    ],
)
def test_the_query_of_a_row(
    text: str, streams: tuple[Modality, ...], columns: Any, query: Any, possible: bool
) -> None:
    asks: Any = {"video": ["face"], "audio": ["voice"]}
    found = sample(text, *streams, **columns)
    assert query_of(found, asks) == query
    assert can_be_asked(found, query) == possible


def test_the_label_of_one_modality_is_that_modalitys() -> None:
    assert emotion_of(sample("?", "audio"), "audio") == "sad"
    assert emotion_of(sample("?", "audio"), "video") is None
    both = sample("?", "audio", "video")
    assert (emotion_of(both, "audio"), emotion_of(both, "video")) == (None, "happy")
    assert [one_channel(sample("?", *s).media) for s in ((), ("audio",), ("face",))] == [
        None,
        "audio",
        "video",
    ]
