"""The report in a real browser: it opens cleanly, asks for nothing, its clips play."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mmemo.report.page import build_report
from tests.report.browser import Browser
from tests.report.fake_run import add_grpo, add_scores, invent_rows, make_run, write_evaluation
from tests.report.test_gates import note
from tests.report.test_reliance import measure

pytestmark = pytest.mark.browser

PLAY_ALL = """
(async () => {
  const times = [];
  for (const screen of document.querySelectorAll(".screen")) {
    const video = screen.querySelector("video");
    screen.querySelector(".play").click();
    const from = performance.now();
    while (video.currentTime < 0.3 && performance.now() - from < 8000)
      await new Promise(done => setTimeout(done, 20));
    times.push([video.currentTime, video.videoWidth, video.error && video.error.message,
                document.querySelectorAll(".screen.playing").length]);
  }
  return times;
})()
"""
HEARD = """
(async () => {
  const video = document.querySelector("video");
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaElementSource(video).connect(analyser);
  await context.resume();
  video.currentTime = 0;
  await video.play();
  const samples = new Float32Array(2048);
  let peak = 0;
  const from = performance.now();
  while (performance.now() - from < 1500) {
    analyser.getFloatTimeDomainData(samples);
    for (const sample of samples) peak = Math.max(peak, Math.abs(sample));
    await new Promise(done => setTimeout(done, 20));
  }
  return peak;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"))
    return build_report(run, run / "report.html", title="Quickstart")


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with scores and two stages that learn from rewards, one of them gamed."""
    run = make_run(tmp_path_factory.mktemp("rewarded"))
    rows = invent_rows(0.75)
    write_evaluation(run / "eval", rows, run / "world", name="after GRPO")
    add_scores(run / "eval", {"grounding": [0.5] * 45 + [0.9] * 45, "format": [None, 1.0] * 45})
    add_scores(run / "eval_video", {"grounding": [0.2, 0.6] * 45})
    add_grpo(run, "grpo")
    add_grpo(run, "gamed", gamed=True, same=True)
    return build_report(run, run / "report.html")


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def pixels(png: bytes) -> NDArray[np.uint8]:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)  # type: ignore[return-value]


def test_it_opens_without_a_complaint_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.problems == []
    outside = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    assert outside == []
    assert [url for url in browser.requests if url.startswith("file:")] == [page.as_uri()]
    assert browser.run("document.querySelector('h1').textContent") == "Quickstart"


def test_a_request_from_inside_the_page_would_be_refused(browser: Browser, page: Path) -> None:
    browser.open(page)
    refused = browser.run("fetch('https://example.org/').then(() => false, () => true)")
    assert refused
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_every_clip_of_the_gallery_plays_one_at_a_time(browser: Browser, page: Path) -> None:
    browser.open(page)
    found = browser.run(PLAY_ALL)
    assert len(found) == 12
    for seconds, width, error, playing in found:
        assert error is None
        assert seconds >= 0.3
        assert width > 0
        assert playing == 1
    assert browser.problems == []


def test_a_clip_can_be_heard(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run(HEARD) > 0.05


def test_the_buttons_filter_the_gallery(browser: Browser, page: Path) -> None:
    browser.open(page)
    for kind in ("audio_aligned", "wrong", "all"):
        browser.run(f"document.querySelector('[data-show={kind}]').click()")
        shown = browser.run(
            "[...document.querySelectorAll('.clip:not([hidden])')].map(clip => clip.dataset.kinds)"
        )
        assert 0 < len(shown) <= 12
        assert kind == "all" or all(kind in kinds.split() for kinds in shown)
    assert len(shown) == 12


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_first_screen_is_seen(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    view = pixels(browser.screenshot())
    assert view.shape == (900, width, 3)
    paper = np.median(view.reshape(-1, 3), axis=0)
    assert (paper.max() < 60) if dark else (paper.min() > 240)
    inked = (np.abs(view.astype(int) - paper).max(axis=-1) > 60).mean()
    assert 0.01 < inked < 0.5


def test_there_is_something_to_see_all_the_way_down(browser: Browser, page: Path) -> None:
    browser.open(page)
    whole = pixels(browser.screenshot(whole=True))
    assert whole.shape[0] > 3000
    assert whole.shape[1] == 1200
    paper = np.median(whole[:200].reshape(-1, 3), axis=0)
    for part in np.array_split(whole, 10):
        assert (np.abs(part.astype(int) - paper).max(axis=-1) > 60).mean() > 0.005


def test_no_table_is_cut_off(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    cut = browser.run(
        "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth)"
        ".map(one => one.textContent.slice(0, 200))"
    )
    assert cut == []


@pytest.mark.parametrize("width", [1200, 390])
def test_what_was_learnt_from_rewards_is_seen_without_a_complaint(
    browser: Browser, rewarded: Path, width: int
) -> None:
    browser.open(rewarded, width=width)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    if width == 1200:
        cut = browser.run(
            "[...document.querySelectorAll('.scroll')]"
            ".filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent)"
        )
        assert cut == []
    boxes = browser.run(
        "[...document.querySelectorAll('.moment, .charts.small figure, .flags li')]"
        ".map(one => one.getBoundingClientRect()).map(one => [one.left, one.right, one.height])"
    )
    assert len(boxes) == 3 * (2 + 1) + 2 * 12 + 3
    assert all(left >= 0 and right <= width and height > 20 for left, right, height in boxes)
    drawn = browser.run(
        "[...document.querySelectorAll('.charts.small path')]"
        ".map(one => [getComputedStyle(one).stroke, one.getTotalLength()])"
    )
    assert all(stroke.startswith("rgb") and length > 50 for stroke, length in drawn)
    beside = browser.run(
        "[...document.querySelectorAll('.moments')][0].children.length === 3 && "
        "new Set([...document.querySelectorAll('.moments')[0].children]"
        ".map(one => one.getBoundingClientRect().top)).size"
    )
    assert beside == (1 if width == 1200 else 3)
    assert browser.problems == []


def test_the_clips_beside_completions_play(browser: Browser, rewarded: Path) -> None:
    browser.open(rewarded)
    found = browser.run(PLAY_ALL)
    assert len(found) == 12 + 3 * (2 + 1)
    assert all(seconds >= 0.3 and not error for seconds, _, error, _ in found)
    browser.run("document.querySelector('[data-show=wrong]').click()")
    assert browser.run("document.querySelectorAll('.moment').length") == 9
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(
    browser: Browser, rewarded: Path, dark: bool
) -> None:
    browser.open(rewarded, dark=dark)
    ratios = browser.run("""
    (() => {
      const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const rgb = colour => {
        probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
        return [...probe.getImageData(0, 0, 1, 1).data];
      };
      const light = c => c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4;
      const luminance = c => 0.2126 * light(c[0]) + 0.7152 * light(c[1]) + 0.0722 * light(c[2]);
      const behind = node => {
        for (; node; node = node.parentElement) {
          const colour = rgb(getComputedStyle(node).backgroundColor);
          if (colour[3] > 250) return colour;
        }
        return [255, 255, 255, 255];
      };
      const found = {};
      for (const name of ["p", "caption", "td", "td small", "thead th", ".clip .answer.right",
          ".clip .answer.wrong", ".clip dt", ".stack .bg-voice", ".stack .bg-face",
          ".stack .bg-neither", ".matrix td.deep", "summary", ".note",
          ".said .right", ".said .wrong", ".said .note", ".flags li", ".calm"]) {
        const node = [...document.querySelectorAll(name)].find(n => n.textContent.trim());
        if (!node) { found[name] = null; continue; }
        const [a, b] = [luminance(rgb(getComputedStyle(node).color)), luminance(behind(node))];
        found[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      }
      return found;
    })()""")
    assert all(ratio is not None for ratio in ratios.values()), ratios
    low = {name: round(ratio, 2) for name, ratio in ratios.items() if ratio < 4.5}
    assert not low


@pytest.mark.parametrize("width", [1200, 390])
def test_what_answers_hang_on_is_drawn_and_none_of_it_is_cut_off(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    measured = build_report(measure(tmp_path), tmp_path / "report.html", title="Measured")
    browser.open(measured, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    rows = browser.run("""
    [...document.querySelectorAll(".kinds .row:has(.dot)")].map(row => {
      const box = name => row.querySelector(name).getBoundingClientRect();
      const [name, track, n, dot] = [".name", ".track", ".n", ".dot"].map(box);
      const cut = [...row.children].some(one => one.scrollWidth > Math.ceil(one.clientWidth) + 8);
      return [name.right, track.left, track.right, n.left, n.right, cut, row.className,
              getComputedStyle(row.querySelector(".link")).backgroundColor];
    })""")
    assert len(rows) == 3 + 4 * 3 + 4
    for name_right, left, right, n_left, n_right, cut, _, _ in rows:
        assert not cut
        assert right - left > 50
        assert n_right <= width
        if width == 1200:
            assert name_right <= left
            assert right <= n_left
    colours = {css: colour for *_, css, colour in rows}
    assert len(set(colours.values())) >= 3  # voice, face, video and text differ
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_what_experts_choose_and_attention_by_layer_need_no_legend(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    measure(tmp_path / "measured")
    note(tmp_path / "noted")
    browser.open(build_report(tmp_path, tmp_path / "report.html"), width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    charts = browser.run("""
    [...document.querySelectorAll("svg.chart:has(.end)")].map(chart => {
      const whole = chart.getBoundingClientRect();
      return [...chart.querySelectorAll("g")].map(line => {
        const [name, path] = [line.querySelector(".end"), line.querySelector(".kind")];
        const box = name.getBoundingClientRect();
        return [name.textContent, box.top, box.bottom, whole.right - box.right,
                getComputedStyle(name).fill, getComputedStyle(path).stroke];
      });
    })""")
    assert [len(lines) for lines in charts] == [3] * 3 + [4] * 3  # attention, then weights
    for lines in charts:
        boxes = sorted((top, bottom) for _, top, bottom, *_ in lines)
        assert all(one[1] <= two[0] + 3 for one, two in itertools.pairwise(boxes))
        assert all(room >= 0 and fill == stroke for *_, room, fill, stroke in lines)
        assert len({fill for *_, fill, _ in lines}) == len(lines)
    bars = browser.run("""
    [...document.querySelectorAll("#gates ~ .bars .stack")].map(bar => [
      bar.getAttribute("aria-label"), bar.clientWidth,
      [...bar.children].map(one => [one.textContent, one.clientWidth, one.scrollWidth])])""")
    assert len(bars) == 4 + 5
    for label, whole, parts in bars:
        assert "voice" in label
        assert sum(inside for _, inside, _ in parts) == pytest.approx(whole, abs=5)
        assert all(needed <= inside + 1 for _, inside, needed in parts)
        assert sum(bool(name) for name, *_ in parts) >= 3
    cells = browser.run("""
    [...document.querySelectorAll(".charts.tables td:not(.n)")].map(cell => [
      cell.textContent, getComputedStyle(cell).backgroundColor, cell.getBoundingClientRect().right])
    """)
    assert len(cells) == 3 * 3 * (4 + 5 + 3)
    assert all(text.isdigit() and right <= width for text, _, right in cells)
    assert len({colour for _, colour, _ in cells}) > 10
    assert browser.problems == []
