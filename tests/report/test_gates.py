"""What experts choose, as the report says and draws it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmemo.evaluation.reliance.gates import gate_numbers, write_gates
from mmemo.evaluation.reliance.sidecar import answers_key
from mmemo.report.collect import read_run
from mmemo.report.gates import GatesView, gates_of_runs
from mmemo.report.page import build_report
from mmemo.statistics import BootstrapConfig
from tests.evaluation.test_gates_summary import choosing
from tests.report.fake_run import write_evaluation

CONFIG = BootstrapConfig(resamples=200)


def note(folder: Path, *, name: str = "MoSE", role: str = "model", **kept: Any) -> Path:
    """An evaluation beside which gates were noted."""
    rows = choosing(90, **kept)
    write_evaluation(folder, rows, folder, name=name, role=role)
    write_gates(folder, {"answers": answers_key(rows), **gate_numbers(rows, CONFIG)})
    return folder


def view_of(folder: Path) -> GatesView:
    (view,) = gates_of_runs(read_run(folder).runs)
    return view


def test_a_sentence_says_what_weighs_more_where_which_is_right(tmp_path: Path) -> None:
    view = view_of(note(tmp_path))
    found = re.fullmatch(
        r"Where the face is right, MoSE gives the face (\d+)% and the voice (\d+)% of the weight; "
        r"where the voice is right, the face (\d+)% and the voice (\d+)%\. From the first to the "
        r"second, the weight of the face falls by ([\d.]+) points \(−[\d.]+ to −[\d.]+\) and that "
        r"of the voice rises by ([\d.]+) points \(\+[\d.]+ to \+[\d.]+\)\.",
        view.weighed,
    )
    assert found is not None, view.weighed
    face, voice, face_after, voice_after, fall, rise = map(float, found.groups())
    assert face_after - face == pytest.approx(-fall, abs=1)
    assert voice_after - voice == pytest.approx(rise, abs=1)
    assert "% against" in view.used
    assert "100% against" in view.used  # the voice's expert goes by emotion


def test_what_does_not_clearly_change_is_said_so(tmp_path: Path) -> None:
    rows = choosing(90)
    for row, conflict in zip(rows, ["video_aligned", "video_aligned", "audio_aligned"] * 30,
                             strict=True):  # fmt: skip
        row["weights"] = [[0.25] * 4 + [0.0]] * 3
        row["conflict"] = conflict
    write_evaluation(tmp_path, rows, tmp_path, name="MoSE")
    write_gates(tmp_path, {"answers": answers_key(rows), **gate_numbers(rows, CONFIG)})
    assert view_of(tmp_path).weighed.endswith(
        "the weight of the face does not clearly change and that of the voice does not clearly "
        "change."
    )


def test_bars_fill_their_width_and_name_every_part(tmp_path: Path) -> None:
    view = view_of(note(tmp_path))
    assert [bar.name for bar in view.subsets] == [
        "All clips", "Where the face is right", "Where the voice is right", "Where both agree"
    ]  # fmt: skip
    for bar in (*view.subsets, *view.emotions):
        assert sum(part.width for part in bar.segments) == pytest.approx(100, abs=0.1)
        for name in ("text", "video", "voice", "face"):
            named = [part.inside for part in bar.segments if part.inside.startswith(name)]
            assert len(named) + bar.beside.count(name) == 1
            assert re.search(rf"{name} \d+%", bar.text)
    assert {bar.name: bar.n for bar in view.emotions}.keys() == {
        "happy", "sad", "angry", "fear", "surprise"
    }  # fmt: skip
    assert [drawing.title for drawing in view.layers] == [
        "Where the face is right (n = 30)", "Where the voice is right (n = 30)",
        "Where both agree (n = 30)",
    ]  # fmt: skip
    for drawing in view.layers:
        for label in ("text", "video", "voice", "face"):
            assert len(re.findall(rf'class="end"[^>]*>{label} \d+<', drawing.chart)) == 1


@pytest.mark.parametrize("kept", ["weights", "use"])
def test_what_is_not_chosen_is_not_shown(tmp_path: Path, kept: str) -> None:
    gate = kept == "weights"
    note(tmp_path, weights=gate, use=not gate, layers=[None] if gate else (0, 1, 2))
    view = view_of(tmp_path)
    assert bool(view.weighed) == bool(view.subsets) == gate
    assert bool(view.used) == bool(view.experts) == (not gate)
    assert not view.layers
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert ("embeddings are scaled" in page) == gate
    assert ("every token mixes all experts" in page) == (not gate)
    assert "Weights by layer" not in page


def test_the_page_shows_models_first_and_baselines_folded(tmp_path: Path) -> None:
    note(tmp_path / "eval")
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    for words in (
        'href="#gates"',
        "Expert routing of MoSE",
        "Experts of the voice",
        'aria-label="Where the voice is right: text',
        "Weights by layer",
        "layer 2",
        ">most used<",
    ):
        assert words in page
    assert "Experts of the fusion" not in page
    note(tmp_path / "voice", name="voice only", role="baseline")
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "<summary>Expert routing of voice only</summary>" in page
    write_evaluation(tmp_path / "eval", choosing(90), tmp_path, name="MoSE")
    for name in ("eval", "voice"):
        (tmp_path / name / "gates.json").unlink()
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert "#gates" not in page
    assert "Expert routing" not in page
