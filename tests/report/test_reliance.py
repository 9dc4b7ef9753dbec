"""Which modalities a model relies on, as the report words and draws it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmemo.evaluation.reliance.sidecar import answers_key
from mmemo.evaluation.reliance.summary import (
    attention_numbers,
    changed_numbers,
    shapley_numbers,
    write_reliance,
)
from mmemo.report.collect import read_run
from mmemo.report.page import build_report
from mmemo.report.reliance import DotChart, errors_title, views_of
from mmemo.statistics import BootstrapConfig
from tests.evaluation.test_reliance_summary import attending, valued
from tests.report.fake_run import invent_rows, write_evaluation

CONFIG = BootstrapConfig(resamples=200)


def measure(folder: Path, **changes: Any) -> Path:
    """An evaluation beside which everything was measured: without the voice it answers at random,
    without the face as before."""
    plain = invent_rows(0.9, n=150)
    result = write_evaluation(folder, plain, folder, name="SFT")
    deaf = invent_rows(0.1, n=150, seed=5)
    lent = [{**row, "shown": ["calm"]} for row in deaf]
    conditions = [
        ("blanked", ["audio"], deaf, 0),
        ("swapped", ["audio"], lent, 0),
        ("blanked", ["video", "face"], plain, 3),
    ]
    values: dict[str, Any] = {
        "task": "emotion",
        "answers": answers_key(plain),
        "changes": {
            "_".join([kind, *streams]): {
                "kind": kind,
                "streams": streams,
                "n": len(rows) - left_out,
                "left_out": left_out,
                "subsets": changed_numbers(rows, plain, CONFIG),
            }
            for kind, streams, rows, left_out in conditions
        },
        "attention": attention_numbers(attending(), CONFIG),
        "attention_missing": None,
        "shapley": shapley_numbers(valued(), CONFIG),
        "made": {"instruction": "Answer with one of these: {labels}."},
    }
    write_reliance(folder, {**values, **changes}, result.tasks)
    return folder


def chart_of(folder: Path, name: str) -> DotChart:
    (view,) = views_of(read_run(folder).runs)
    return getattr(view, name)


def test_sentences_say_what_the_numbers_say(tmp_path: Path) -> None:
    title = chart_of(measure(tmp_path), "changes").title
    found = re.fullmatch(
        r"Accuracy falls by ([\d.]+) points when the voice is blanked and does not clearly "
        r"change when the video and face are blanked\.",
        title,
    )
    assert found is not None
    rows = chart_of(tmp_path, "changes").rows
    assert rows[0].text == f"−{found.group(1)} points"
    assert [row.kind for row in rows] == ["audio", "audio", "face"]
    assert [row.note for row in rows] == [
        *("", "names the other clip’s emotion: 0%, without the swap 0%", "n = 147")
    ]


def test_bars_stand_where_their_numbers_are(tmp_path: Path) -> None:
    (view,) = views_of(read_run(measure(tmp_path)).runs)
    assert view.changes is not None
    assert view.attention is not None
    for chart in (view.changes, view.attention, *view.shapley):
        for row in chart.rows:
            places = [row.value_at, row.baseline_at, row.low_at, row.high_at]
            assert all(place is not None and 0 <= place <= 100 for place in places)
            assert row.low_at is not None
            assert row.high_at is not None
            assert row.low_at - 0.01 <= row.value_at <= row.high_at + 0.01
    shapley = view.shapley[0]
    assert len(view.shapley) == 4
    for row in shapley.rows:
        assert (row.value_at > row.baseline_at) == row.text.startswith("+")
    zeros = {row.baseline_at for chart in view.shapley for row in chart.rows}
    assert len(zeros) == 1  # one scale
    (zero,) = zeros
    assert (zero, "0") in shapley.axis


def test_attention_by_layer_is_drawn_for_each_subset_on_one_scale(tmp_path: Path) -> None:
    (view,) = views_of(read_run(measure(tmp_path)).runs)
    titles = ["Where the face is right", "Where the voice is right", "Where both agree"]
    assert [one.title for one in view.attention_layers] == [f"{title} (n = 4)" for title in titles]
    scales = {tuple(re.findall(r'text-anchor="end">([\d.]+)<', one.chart))
              for one in view.attention_layers}  # fmt: skip
    assert len(scales) == 1
    found = attention_numbers(attending(), CONFIG)
    for one, place in zip(view.attention_layers, list(found["by_subset"])[1:], strict=True):
        shares = found["by_subset"][place]
        for kind, name in (("video", "video"), ("audio", "voice"), ("face", "face")):
            assert f">{name} {100 * shares[kind][-1]:.0f}</text>" in one.chart
            assert f"{name} {100 * shares[kind][0]:.0f}%, " in one.chart  # for those who hear it
    voice = found["by_layer"]["audio"]
    layer = voice.index(max(voice))
    assert f"to the voice in layer {layer} ({100 * voice[layer]:.1f}%)" in view.attention_peaks


def test_a_measurement_without_layers_of_subsets_is_shown_without_them(tmp_path: Path) -> None:
    """As older ones are."""
    attention = attention_numbers(attending(), CONFIG)
    del attention["by_subset"]
    measure(tmp_path, attention=attention)
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "to the face; the rest goes to text" in page
    assert "Percent of the attention in each layer" not in page


def test_the_page_shows_a_section_only_where_something_was_measured(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", invent_rows(0.7), tmp_path, name="before")
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "relies on" not in page
    measure(tmp_path / "b")
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "Which modalities SFT relies on" in page
    assert "Which modalities before relies on" not in page
    for words in (
        "voice blanked",
        "Where the voice is right",
        "to the face; the rest goes to text",
        "log-probability of the right answer: ",
    ):
        assert words in page
    assert "{labels}" not in page


@pytest.mark.parametrize("skill", [0.4, 1.0])
def test_wrong_answers_are_named_in_a_sentence(tmp_path: Path, skill: float) -> None:
    result = write_evaluation(tmp_path, invent_rows(skill, n=200), tmp_path, name="SFT")
    title = errors_title("SFT", result.main)
    errors = result.main["reliance"]["errors"]
    if skill == 1.0:
        assert title == "SFT gives no wrong answer on a conflict clip."
    else:
        assert title is not None
        assert f"voice’s emotion in {100 * errors['voice']['value']:.0f}% of cases" in title
        assert f"face’s in {100 * errors['face']['value']:.0f}%." in title
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert str(title) in page
    assert ("no such answers" in page) == (skill == 1.0)


def test_nothing_is_said_of_errors_where_there_are_no_conflicts(tmp_path: Path) -> None:
    rows = [{**row, "conflict": None} for row in invent_rows(0.5)]
    assert errors_title("SFT", write_evaluation(tmp_path, rows, tmp_path).main) is None


def test_parts_that_were_not_measured_are_not_shown(tmp_path: Path) -> None:
    measure(tmp_path, attention=None, shapley=None, attention_missing="no interface")
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "log-probability of the right answer: " not in page
    assert "Attention could not be measured: no interface." in page
