"""The leaderboard in a real browser: it opens cleanly, asks for nothing, and sorts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.report.leaderboard import build_leaderboard
from tests.report.browser import Browser
from tests.report.fake_run import invent_rows, probe_rows, write_evaluation

pytestmark = pytest.mark.browser

NASTY = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("board")
    for name, skill in (("a low one", 0.3), ("the best", 0.95), ("middle", 0.6)):
        rows = invent_rows(skill)
        write_evaluation(root / name, [*rows, *probe_rows(rows, seed=int(10 * skill))], root)
    rows = invent_rows(0.7)[:60]
    write_evaluation(root / "part", rows, root, name=NASTY, role="baseline")
    return build_leaderboard(root, root / "leaderboard.html", title="Ours")


def names(browser: Browser) -> list[str]:
    script = "[...document.querySelectorAll('tbody th')].map(th => th.firstChild.textContent)"
    return browser.run(script)


def click(browser: Browser, column: int) -> Any:
    return browser.run(
        f"(() => {{ const head = document.querySelectorAll('thead th')[{column}];"
        "head.querySelector('button').click(); return head.getAttribute('aria-sort'); })()"
    )


def test_it_opens_without_a_complaint_and_asks_for_nothing(page: Path) -> None:
    with Browser() as browser:
        browser.open(page)
        assert browser.problems == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
        assert browser.run("document.title") == "Ours · mmemo leaderboard"
        assert names(browser) == ["the best", NASTY, "middle", "a low one"]


def test_a_click_sorts_either_way_and_missing_numbers_stay_last(page: Path) -> None:
    with Browser() as browser:
        browser.open(page)
        # The page comes sorted by its first number, so the first click turns it round.
        assert click(browser, 1) == "ascending"
        assert names(browser) == ["a low one", "middle", NASTY, "the best"]
        assert click(browser, 1) == "descending"
        assert names(browser) == ["the best", NASTY, "middle", "a low one"]
        assert click(browser, 0) == "ascending"
        assert names(browser)[-1] == "the best"
        task = browser.run(
            "[...document.querySelectorAll('thead th')].findIndex("
            "th => th.textContent.includes('probe_cue'))"
        )
        for order in ("descending", "ascending"):
            assert click(browser, task) == order
            assert names(browser)[-1] == NASTY
        assert browser.run("document.querySelectorAll('[aria-sort]').length") == 1
        assert browser.problems == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_only_the_table_scrolls_sideways(page: Path, width: int, dark: bool) -> None:
    with Browser() as browser:
        browser.open(page, width=width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.screenshot()[:4] == b"\x89PNG"
