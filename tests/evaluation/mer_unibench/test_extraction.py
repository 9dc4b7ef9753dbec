"""Words of free answers by an endpoint: what is asked, resuming, and failures that are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmemo.errors import EvaluationError
from mmemo.evaluation.mer_unibench.extraction import extract_run, main, read_sentiment, read_words
from mmemo.rewards.judge.openai_client import EndpointConfig
from tests.rewards.stub_judge import Reply, judge_server

ANSWERS = [
    ("meld", "<think>sad</think>She is happy, not angry."),
    ("meld", "She is happy, not angry."),
    ("mosi", "He sounds sad."),
    ("mosi", ""),
    ("meld", "broken"),
]


def extractor(request: dict[str, Any], number: int) -> Reply:
    """Finds happy and sad, and their sentiment; fails on "broken"."""
    text = json.loads(request["messages"][1]["content"])
    if "broken" in text:
        return Reply("no JSON")
    if request["messages"][0]["content"].startswith("You get words"):
        return Reply(json.dumps({"sentiment": "negative" if "sad" in text else "positive"}))
    found = [word for word in ("happy", "sad") if word in text]
    return Reply(f"```json\n{json.dumps({'emotions': found})}\n```")


def write_run(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        {"key": str(place), "sample_id": f"s{place}", "task": task, "raw": raw}
        for place, (task, raw) in enumerate(ANSWERS)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)
    return folder


def config(url: str) -> EndpointConfig:
    return EndpointConfig(base_url=url, model="m", max_retries=1, backoff_s=0)


def test_a_run_becomes_a_file_of_words(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "words.jsonl"
    with judge_server(extractor) as server:
        counts = extract_run(run, output, config(server.url))
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(line["sample_id"], line["raw"]) for line in lines] == [
            *(("s0", "[happy]"), ("s1", "[happy]"), ("s2", "negative"), ("s3", "neutral")),
            ("s4", ""),
        ]
        assert [line["extracted"] for line in lines] == [True] * 4 + [False]
        # One request for the two equal answers, one of sentiment, two for the broken one.
        assert counts == {"answers": 5, "failed": 1, "requests": 5, "malformed": 2}
        # What was extracted is not asked again; the failed answer is.
        assert extract_run(run, output, config(server.url))["requests"] == 2
        assert len(output.read_text().splitlines()) == 5


def test_a_dead_endpoint_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "predictions.jsonl").write_text(
        json.dumps({"key": "a", "sample_id": "a", "task": "meld", "raw": "broken"}) + "\n"
    )
    with (
        judge_server(extractor) as server,
        pytest.raises(EvaluationError, match="extracted nothing"),
    ):
        extract_run(run, tmp_path / "words.jsonl", config(server.url))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = write_run(tmp_path / "run"), tmp_path / "endpoint.yaml"
    with judge_server(extractor) as server:
        values = {"base_url": server.url, "model": "m", "max_retries": 0}
        file.write_text(yaml.safe_dump(values))
        main([str(run), str(file), str(tmp_path / "words.jsonl")])
    assert "5 answers, 1 of them not extracted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="usage"):
        main([])
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path), str(file), str(tmp_path / "other.jsonl")])


def test_replies_by_hand() -> None:
    assert read_words('{"emotions": ["Happy", "at ease", "[a, b]", ""]}') == [
        *("happy", "at ease", "a b"),
    ]
    assert read_words('{"emotions": []}') == []
    for reply in ("", "{}", '{"emotions": "happy"}', '{"emotions": [1]}', "[]", "{" * 5000):
        assert read_words(reply) is None
    assert read_words(json.dumps({"emotions": ["a"] * 65})) is None
    assert read_sentiment('{"sentiment": "negative"}') == "negative"
    assert read_sentiment('{"sentiment": "mixed"}') is None
    assert read_sentiment('{"sentiment": ["negative"]}') is None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(st.text(max_size=40) | JSON.map(lambda value: json.dumps({"emotions": value})))
def test_no_reply_breaks_the_reader(reply: str) -> None:
    words = read_words(reply)
    assert words is None or all(word and "," not in word for word in words)
    assert read_sentiment(reply) is None
