"""What a benchmark's file gives its adapter, and what the rows of the adapter become."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import load_benchmark
from mmemo.evaluation.script import adapter_of, columns_of_adapter, options_of, run_zero_shot
from tests.media_files import write_wav

ADAPTER = """
from mmemo.data.adapter import Excluded

COLUMNS = ("weather",)
PUBLISHED = {"part=b": {"sad": 1}, "part=b,size=2": {"": 5}}


def rows(root, *, part="a", size="1"):
    yield Excluded("known", "known bad clip", expected=True)
    yield {"sample_id": part, "prompt": "<audio>?", "audio": "a.wav", "label": "sad",
           "weather": "rain", "transcript": "It <audio> rains.\\nStill."}
    if size == "3":
        yield Excluded("new", "no label")
"""
BENCHMARK = """
from mmemo.evaluation.task import Task

ADAPTER = "{adapter}"
OPTIONS = {{"part": "b"}}
TASKS = {{"emotion": Task(labels=("happy", "sad"), question="{{transcript}}Which of {{labels}}?")}}
"""


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER)
    file = tmp_path / "bench.py"
    file.write_text(BENCHMARK.format(adapter=adapter.as_posix()))
    write_wav(tmp_path / "data/a.wav", 0.2)
    return str(file)


def test_options_of_the_benchmark_hold_unless_others_are_given(benchmark: str) -> None:
    assert options_of(benchmark, {}) == {"part": "b"}
    assert options_of(benchmark, {"part": "c", "size": "2"}) == {"part": "c", "size": "2"}
    assert columns_of_adapter(adapter_of(benchmark)) == ["weather"]


def test_a_copy_is_whole_without_what_every_copy_leaves_out(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*options: str) -> str:
        more = [part for option in options for part in ("--option", option)]
        run_zero_shot(benchmark, ["--data", str(tmp_path / "data"), "--dry-run", *more])
        return " ".join(capsys.readouterr().out.split())

    # An option that is not named has its default, so size=1 is asked with the same counts.
    for text in (told(), told("size=1")):
        assert "1 row left out (known bad clip)" in text
        assert "published" not in text
        assert "This copy is whole." in text
    assert "1 rows here, 5 published" in told("size=2")
    text = told("size=3")
    assert "published" not in text  # nothing is known of these options
    assert "1 row left out (no label)" in text
    assert "This copy is not whole" in text


def test_the_words_are_quoted_in_the_question(benchmark: str, tmp_path: Path) -> None:
    row = '{"sample_id": "a", "prompt": "<audio>?", "audio": "a.wav", "label": "sad"'
    manifest = tmp_path / "m.jsonl"
    said = '"transcript": "It <audio> rains.\\nStill {labels}."'
    other = row.replace('"sample_id": "a"', '"sample_id": "b"')
    manifest.write_text(f"{row}, {said}}}\n{other}}}\n")
    loaded = load_benchmark(benchmark)
    asked = loaded.questions(DataConfig(manifests=[str(manifest)], media_root=str(tmp_path)))
    assert [one.turns[-1].text for one in asked] == [
        '<audio>The person says: "It rains. Still {labels}."\nWhich of happy, sad?',
        "<audio>Which of happy, sad?",
    ]
