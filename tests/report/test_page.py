"""The report and the terminal table, without a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mmemo.config import parse
from mmemo.errors import EvaluationError
from mmemo.evaluation.results import compare
from mmemo.evaluation.tables import results_table
from mmemo.report.charts import line_chart, log_ticks, smooth, ticks
from mmemo.report.collect import read_losses, read_run
from mmemo.report.gallery import MAX_SIDE, choose, embed, poster, shrink
from mmemo.report.page import ReportConfig, build_report, run_report
from tests.media_files import write_clip
from tests.report.fake_run import invent_rows, make_run, write_evaluation


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return build_report(finished, finished / "report.html").read_text()


class Links(HTMLParser):
    """Everything in a page that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "poster", "srcset", "action", "data") and value:
                self.found.append(value)


def test_it_is_one_file_that_needs_no_other(html: str) -> None:
    links = Links()
    links.feed(html)
    assert links.scripts == 1
    assert {link.split(",")[0].split(";")[0][:10] for link in links.found} <= {
        *("data:video", "data:image", "data:"),
        *("#results", "#reliance", "#confusion", "#training", "#gallery", "#data", "#made"),
    }
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)
    assert not re.search(r"https?://", html)


def test_anchors_lead_somewhere(html: str) -> None:
    targets = set(re.findall(r'href="#(\w+)"', html))
    assert targets <= set(re.findall(r'id="(\w+)"', html))
    assert len(targets) == 7


def test_the_numbers_are_those_of_the_results_files(finished: Path, html: str) -> None:
    for name in ("eval", "eval_text", "eval_audio", "eval_video"):
        block = json.loads((finished / name / "results.json").read_text())["tasks"]["emotion"]
        for found in (block["average"], *(s["war"] for s in block["subsets"].values())):
            cell = f"{100 * found['value']:.1f}<small>{100 * found['low']:.1f}–"
            assert cell in html, (name, found)
        if name != "eval":
            paired = compare(finished / "eval", finished / name)[0].tasks["emotion"]["discordant"]
            assert f"<td>{paired['only_a']}</td><td>{paired['only_b']}</td>" in html
    assert "majority (always “sad”)" in html
    assert "1 excluded (1 bad clip)<" in html
    assert "truncated 1" in html


def text_of(page: str) -> str:
    """The words of a page, without its markup."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_majority_answer_says_where_it_comes_from(html: str) -> None:
    text = text_of(html)
    assert "“sad” to every question" in text
    assert "angry 11, sad 31; 42 rows" in text
    assert "world/train_emotion.jsonl , SHA-256 eeeeeeeeeeeeeeee" in text


def test_what_could_not_be_read_is_in_both_bounds(finished: Path, html: str) -> None:
    statuses = json.loads((finished / "eval/results.json").read_text())["tasks"]["emotion"]
    invalid = statuses["statuses"]["refused"] + statuses["statuses"]["malformed"]
    assert (
        f"{invalid} answers of curriculum SFT could not be parsed and 1 question could not be "
        "asked. Its accuracy over all questions would be 80.0% if all of these were right, and "
        "50.0% if all were wrong."
    ) in text_of(html)


def changed(finished: Path, folder: Path, **extra: object) -> Path:
    """A copy of the run in which some rows' fields are others."""
    shutil.copytree(finished, folder)
    for path in folder.glob("*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, **extra}) + "\n" for row in rows))
    return folder


def test_speakers_are_named_only_where_the_rows_name_them(finished: Path, tmp_path: Path) -> None:
    run = changed(finished, tmp_path / "run", group={})
    page = text_of(build_report(run, run / "report.html").read_text())
    assert "about 4 clips," in page
    assert "intervals over 4 clips" in page
    assert "Caution: only 4 clips stand behind these numbers." in page
    assert "No p is given: with 4 clips it could not fall below 0.05" in page
    assert "10 speakers" not in page
    out = io.StringIO()
    Console(file=out, width=100).print(results_table(read_run(run).runs))
    assert "95% intervals over 4 clips" in " ".join(out.getvalue().split())


def test_the_coverage_of_the_intervals_is_the_configured_one(
    finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in run.glob("*/results.json"):
        path.write_text(path.read_text().replace('"confidence": 0.95', '"confidence": 0.9'))
    page = text_of(build_report(run, run / "report.html").read_text())
    assert "with 90% intervals" in page
    assert "bars 90% intervals" in page
    assert "95%" not in page
    out = io.StringIO()
    Console(file=out, width=100).print(results_table(read_run(run).runs))
    assert "95%" not in out.getvalue()


@pytest.mark.parametrize("trained_on", ["t", "other"])
def test_speakers_are_held_out_where_training_is_known_to_lack_them(
    finished: Path, tmp_path: Path, trained_on: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = tmp_path / "train.jsonl"
    rows = [{"videos": ["c.mp4"], "group": {"speaker": f"{trained_on}{n:02d}"}} for n in range(9)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = text_of(build_report(run, run / "report.html").read_text())
    assert "10 speakers" in page  # no record of what was trained on
    assert "held-out" not in page
    config = {"data": {"manifests": [str(manifest)]}}
    for name in ("attribute", "expression", "emotion"):
        page = text_of(build_report(run, run / "report.html").read_text())
        assert "held-out" not in page  # one stage's rows are not known yet
        event = {"kind": "stage_started", "stage": name, "config": config}
        with (run / "events.jsonl").open("a") as handle:
            handle.write(json.dumps(event) + "\n")
    page = text_of(build_report(run, run / "report.html").read_text())
    assert ("about 10 held-out speakers" in page) == (trained_on == "other")
    manifest.unlink()
    assert "held-out" not in build_report(run, run / "report.html").read_text()


def test_clips_that_only_a_record_names_count_as_left_out(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "attribute/bad_clips.jsonl").unlink()
    assert "No stage or evaluation left a clip out" in text_of(
        build_report(run, run / "report.html").read_text()
    )
    event = {"kind": "bad_clip", "path": "clips/7.mp4", "reason": "no_audio", "detail": "silent"}
    (run / "expression/events.jsonl").write_text(2 * (json.dumps(event) + "\n"))
    page = text_of(build_report(run, run / "report.html").read_text())
    assert "left a clip out" not in page
    assert "expression: 1 bad clip (no_audio 1)" in page
    assert "clips/7.mp4 : no_audio, silent" in page


def test_clips_that_a_lone_evaluation_left_out_are_shown(tmp_path: Path) -> None:
    write_evaluation(tmp_path, invent_rows(0.7), tmp_path)
    bad = {"path": "clips/0099.mp4", "kind": "truncated", "detail": "cut"}
    (tmp_path / "bad_clips.jsonl").write_text(json.dumps(bad) + "\n")
    page = text_of(build_report(tmp_path, tmp_path / "report.html").read_text())
    assert "1 bad clip (truncated 1)" in page


@pytest.mark.parametrize("damage", [b"", b'{"stages": {"wor', b"[]", b'{"stages": 3}', b"\xff"])
def test_a_damaged_state_file_is_one_sentence(
    finished: Path, tmp_path: Path, damage: bytes
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "state.json").write_bytes(damage)
    with pytest.raises(EvaluationError, match=r"state\.json: is damaged; delete it"):
        build_report(run, run / "report.html")
    (run / "state.json").unlink()
    build_report(run, run / "report.html")  # as the sentence says


def test_what_models_and_manifests_say_is_text_and_not_markup(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script><img src="http://x/y">'
    rows = invent_rows(0.5, n=30)
    for row in rows:
        row.update(raw=nasty, question=nasty, modality_labels={"audio": nasty, "video": "sad"})
        row["group"] = {"speaker": row["group"]["speaker"], nasty: nasty + row["group"]["gender"]}
        row["media"] = {"video": nasty}
    write_evaluation(tmp_path / "eval", rows, tmp_path, name=nasty)
    page = build_report(tmp_path, tmp_path / "r.html", title=nasty).read_text()
    links = Links()
    links.feed(page)
    assert links.scripts == 1
    assert not [link for link in links.found if link.startswith("http")]
    assert "&lt;script&gt;" in page
    assert "no longer where the run found it" in page


def test_stages_run_by_hand_are_shown_in_the_order_they_ran(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "state.json").unlink()
    for time, name in enumerate(["emotion", "attribute", "eval"]):
        (run / name / "events.jsonl").write_text(json.dumps({"time": time, "kind": "x"}) + "\n")
    overview = read_run(run)
    assert [stage.name for stage in overview.stages] == ["emotion", "attribute", "eval"]
    assert len(overview.stages[0].losses["training"]) == 120
    assert overview.main.name == "curriculum SFT"


def test_a_run_folder_without_a_pipeline_and_without_clips(tmp_path: Path) -> None:
    rows = [{**row, "conflict": None, "modality_labels": {}, "media": {}} for row in invent_rows(1)]
    write_evaluation(tmp_path, rows, tmp_path, baselines={})
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert 'id="reliance"' not in page
    assert 'id="gallery"' not in page
    assert "100.0" in page


def test_a_folder_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="contains no evaluation; run `mmemo eval`"):
        build_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(EvaluationError, match="is not a folder"):
        build_report(tmp_path / "nothing", tmp_path / "report.html")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(EvaluationError, match="is damaged"):
        build_report(tmp_path, tmp_path / "report.html")


def test_the_report_stage_writes_its_folder_and_the_runs(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = parse(ReportConfig, {"output_dir": str(run / "report"), "title": "A title"})
    assert run_report(config) == run / "report.html"
    assert (run / "report.html").read_bytes() == (run / "report/report.html").read_bytes()
    assert "<h1>A title</h1>" in (run / "report.html").read_text()
    before = (run / "report.html").read_bytes()
    run_report(config)
    assert (run / "report.html").read_bytes() == before  # the same run, the same page


def test_models_stand_before_baselines_whatever_their_names(finished: Path) -> None:
    runs = read_run(finished).runs
    assert [run.role for run in runs] == ["model"] + ["baseline"] * 4
    assert [run.name for run in runs[1:4]] == ["text only", "audio only", "video only"]
    assert all(run.difference for run in runs[1:])
    named = read_run(finished, [finished / "eval_video", finished / "eval"]).runs
    assert [run.name for run in named[:2]] == ["curriculum SFT", "video only"]


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_the_terminal_table_fits_and_cuts_no_number(finished: Path, width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    console.print(results_table(read_run(finished).runs, width=width))
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert "curriculum SFT" in text
    assert "majority" in text
    shown = [name for name in ("Average", "Consistent", "UAR", "Macro") if name in text]
    assert len(shown) >= {72: 1, 80: 1, 100: 3, 140: 4}[width]


def test_losses_of_steps_done_twice_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 2, "loss": 1.4},
        {"step": 2, "eval_loss": 1.8},
        {"step": 3, "loss": float("nan"), "eval_loss": 1.8},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    assert read_losses(path) == {"training": [(1, 2.0), (2, 1.4)], "validation": [(2, 1.8)]}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_cover_the_range(low: float, length: float) -> None:
    high = low + length
    if high <= low:
        return
    found = ticks(low, high)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 12
    assert found[0] <= low + 1e-6 * step + 1e-9
    assert found[-1] >= high - 1e-6 * step - 1e-9


@given(st.floats(1e-6, 1e3), st.floats(8, 1e6))
def test_logarithmic_ticks_are_few_and_cover_the_range(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 12
    assert found[0] <= low * (1 + 1e-6)
    assert found[-1] >= low * factor * (1 - 1e-6)


def heights(chart: str) -> list[float]:
    """Where the points of a chart's first line are, from above."""
    path = re.search(r'<path class="s0" d="([^"]+)"', chart)
    assert path is not None
    return [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path.group(1))]


def test_a_chart_is_logarithmic_where_the_loss_falls_far_and_says_so() -> None:
    far = line_chart([("training", [(1, 8.0), (2, 2.0), (3, 0.5)])], title="x")
    assert "loss, logarithmic" in far
    first, second, third = heights(far)
    assert second - first == pytest.approx(third - second, abs=0.2)
    near = line_chart([("training", [(1, 2.0), (2, 1.0), (3, 0.5)])], title="x")
    assert ">loss<" in near
    first, second, third = heights(near)
    assert second - first == pytest.approx(2 * (third - second), abs=0.2)
    assert "logarithmic" not in line_chart([("training", [(1, 2.0), (2, 0.0)])], title="x")


def test_a_chart_of_one_point_and_of_many() -> None:
    assert "<circle" in line_chart([("training", [(1, 2.0)])], title="x & y")
    many = [(step, 1.0 / step) for step in range(1, 200)]
    chart = line_chart([("training", many), ("validation", many[::50])], title="x & y")
    assert chart.count("<path") == 3
    assert "faint" in chart
    assert "x &amp; y" in chart
    assert "nan" not in chart
    assert [x for x, _ in smooth(many)] == [x for x, _ in many]


def test_the_gallery_takes_every_kind_in_turn_and_always_the_same() -> None:
    rows = invent_rows(0.6)
    chosen = choose(rows, 12)
    kinds = [(row["conflict"], row["answer"] == row["truth"]) for row in chosen]
    assert {kinds.count(kind) for kind in set(kinds)} == {2}
    assert len(set(kinds)) == 6
    assert chosen == choose(rows[::-1], 12)
    assert len({row["sample_id"] for row in choose(rows, 500)}) == len(rows)
    assert choose(rows, 0) == []


def streams(data: bytes) -> dict[str, str]:
    with av.open(io.BytesIO(data)) as container:
        return {stream.type: stream.codec_context.name for stream in container.streams}


def test_a_small_clip_is_embedded_as_it_is(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4")
    data = embed(tmp_path / "a.mp4")
    assert data == (tmp_path / "a.mp4").read_bytes()
    picture = poster(data)
    assert picture is not None
    assert base64.b64decode(picture.split(",")[1])[:3] == b"\xff\xd8\xff"


def test_a_large_clip_is_made_small_and_a_span_is_cut(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", seconds=4.0, size=(640, 360))
    small = embed(tmp_path / "a.mp4")
    assert small is not None
    assert streams(small) == {"video": "h264", "audio": "aac"}
    with av.open(io.BytesIO(small)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (320, 180)
        assert container.streams.video[0].width <= MAX_SIDE
        assert container.duration / 1e6 == pytest.approx(4.0, abs=0.3)
    cut = embed(tmp_path / "a.mp4", 1.0, 2.5)
    assert cut is not None
    with av.open(io.BytesIO(cut)) as container:
        assert container.duration / 1e6 == pytest.approx(1.5, abs=0.3)


def test_a_clip_of_one_stream_is_embedded_with_that(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", audio=False, size=(640, 360))
    write_clip(tmp_path / "a.mp4", video=False)
    assert streams(shrink(tmp_path / "v.mp4")) == {"video": "h264"}
    sound = shrink(tmp_path / "a.mp4")
    assert streams(sound) == {"audio": "aac"}
    assert poster(sound) is None


def test_a_clip_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert embed(tmp_path / "gone.mp4") is None
    (tmp_path / "bad.mp4").write_bytes(b"<html>not found</html>")
    assert embed(tmp_path / "bad.mp4") is None
