"""What the report shows of a stage that learns from rewards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mmemo.report.charts import line_chart
from mmemo.report.collect import read_run
from mmemo.report.grpo import GrpoLog, completions_of, read_grpo, side_by_side, view_of
from mmemo.report.page import build_report
from mmemo.rewards.hacking import ALERT_RULES
from mmemo.run_log import RunRecord
from tests.report.fake_run import REWARDS, add_grpo, make_run, said_by_a_group


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of one's own, without a GRPO stage."""
    return shutil.copytree(finished, tmp_path / "run")


def log_of(folder: Path) -> GrpoLog:
    log = read_grpo(folder)
    assert log is not None
    return log


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return unescape(" ".join(re.sub(r"<[^>]+>", " ", body).split()))


def built(run: Path) -> str:
    return build_report(run, run / "report.html").read_text()


def test_a_run_without_rewards_shows_nothing_of_it(run: Path) -> None:
    page = built(run)
    assert "Learning from rewards" not in page
    assert "#rewards" not in page
    assert read_grpo(run / "emotion") is None
    assert read_grpo(run / "nowhere") is None


def test_a_stage_run_by_hand_beside_a_pipeline_is_found(run: Path) -> None:
    add_grpo(run)
    overview = read_run(run)
    assert [stage.name for stage in overview.stages if stage.grpo] == ["grpo"]
    assert overview.stages[-1].name == "grpo"
    (counts,) = [found for found in overview.manifests if found.name == "grpo.jsonl"]
    assert (counts.rows, counts.used_by) == (9, ["grpo"])
    page = built(run)
    assert '<h2 id="rewards">' in page
    assert page.count('<a href="#rewards">') == 1
    titles = re.findall(r"<figcaption>(.*?)[ <]", page)
    assert titles[:3] == ["attribute", "expression", "emotion"]  # GRPO's loss is not among them
    assert "Loss of grpo" not in page


def test_steps_that_were_done_again_count_once(run: Path) -> None:
    path = add_grpo(run) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:8], *lines[4:], '{"step": 9']))
    log = log_of(run / "grpo")
    assert [line["step"] for line in log.lines] == list(range(2, 42, 2))


def test_every_number_of_the_log_has_its_chart(run: Path) -> None:
    view = view_of("grpo", log_of(add_grpo(run)))
    titles = [panel.title for panel in view.panels]
    assert titles == [
        *("Reward", "Spread within groups", "Share of the advantage"),
        *("Correlation with the outcome", "Trust", "Gate", "KL to the reference", "Entropy"),
        *("Completion length", "Groups without a signal", "Labels", "Unscored"),
    ]
    charts = {panel.title: panel for panel in view.panels}
    by_reward = [name for _, name in charts["Reward"].legend]
    assert by_reward == list(REWARDS)
    # A reward has one colour throughout, also where another has no line.
    colours = dict(map(reversed, charts["Reward"].legend))
    assert charts["Correlation with the outcome"].legend == [
        (colours["format"], "format"),
        (colours["grounding"], "grounding"),
    ]
    assert charts["Gate"].chart.count('class="guide"') == 1  # the threshold of the config
    page = built(run)
    assert page.count('class="chart"') == 3 + len(titles)


def test_what_a_run_did_not_log_has_no_chart(run: Path) -> None:
    folder = add_grpo(run)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in x.items() if not k.startswith(("trust/", "kl"))} for x in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (folder / "completions.jsonl").unlink()
    titles = [panel.title for panel in view_of("grpo", log_of(folder)).panels]
    assert not {"Trust", "Gate", "KL to the reference"} & set(titles)
    assert "What it said early" not in built(run)


def test_a_reward_behind_the_gate_is_shown_from_where_it_was_asked(run: Path) -> None:
    log = log_of(add_grpo(run))
    assert log.points("hack/grounding/unscored_rate", "grounding")[0] == (14, 0.0)
    assert log.points("hack/format/unscored_rate", "format")[0] == (2, 0.0)
    page = text_of(built(run))
    assert "grounding not computed yet · advantage" in page
    assert "grounding 0.25 · advantage" in page


def test_a_gamed_run_is_named_and_a_sound_one_is_not(run: Path) -> None:
    add_grpo(run, "sound")
    calm = text_of(built(run))
    assert "no warning sign is past its threshold" in calm
    for sign in ALERT_RULES:  # each with its threshold, and where it is defined
        assert f"{sign.title} {sign.metric} {sign.threshold}" in calm
    assert "mmemo/rewards/hacking.py" in calm
    add_grpo(run, "gamed", gamed=True)
    flags = {(flag.rule.metric, flag.reward) for flag in log_of(run / "gamed").flags}
    assert flags == {
        ("hack/{reward}/outcome_correlation", "grounding"),
        ("hack/length_drift", None),
        ("completions/mean_length", None),
    }
    page = text_of(built(run))
    assert "A reward goes against the outcome: grounding." in page
    assert "the threshold is below −0.1" in page
    assert page.count("no warning sign is past") == 1  # that of the sound stage


def test_the_report_says_when_a_run_named_its_signs(run: Path) -> None:
    folder = add_grpo(run, gamed=True)
    # A run of a version that did not record such events.
    assert "first warned of it" not in text_of(built(run))
    record = RunRecord(folder)
    for step, metric in ((24, "hack/length_drift"), (30, "kl"), (34, "hack/length_drift")):
        record.event("sign", step=step, metric=metric)
    page = text_of(built(run))
    assert page.count("The run first warned of it at step 24.") == 1
    assert "step 34" not in page
    assert "Warned of during the run, but no longer present at its end: kl (step 30)." in page


def test_the_table_holds_both_ends_of_each_component(run: Path) -> None:
    log = log_of(add_grpo(run, gamed=True))
    rows = {one.name: one for one in view_of("grpo", log).rewards}
    assert [rows[name].weight for name in REWARDS] == list(REWARDS.values())
    assert (rows["outcome"].role, rows["grounding"].role) == ("the outcome", "trusted")
    early, late = rows["outcome"].numbers["Mean"] or (0.0, 0.0)
    assert early == pytest.approx(0.6 - 0.3 * 6 / 40, abs=0.02)
    assert late == pytest.approx(0.6 - 0.3 * 36 / 40, abs=0.02)
    assert rows["outcome"].numbers["Correlation with outcome"] is None


def groups(*given: tuple[int, str, str]) -> list[dict[str, Any]]:
    return [said_by_a_group(*one) for one in given]


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        # one prompt that is there in all three thirds comes first, though others are nearer
        (
            [(1, "a", "sad"), (2, "b", "sad"), (5, "b", "sad"), (6, "c", "sad"), (9, "b", "sad"),
             (10, "d", "sad")],
            [[(2, "b"), (5, "b"), (9, "b")], [(1, "a"), (6, "c"), (10, "d")]],
        ),
        # else one label
        (
            [(1, "a", "sad"), (1, "b", "shy"), (5, "c", "shy"), (9, "d", "sad"), (9, "e", "shy")],
            [[(1, "b"), (5, "c"), (9, "e")]],
        ),
        # else what there is
        ([(1, "a", "sad"), (5, "b", "fear"), (9, "c", "happy")], [[(1, "a"), (5, "b"), (9, "c")]]),
        ([(1, "a", "sad"), (5, "a", "sad")], []),
    ],
    ids=["same prompt", "same label", "any", "too few"],
)  # fmt: skip
def test_completions_stand_beside_their_like(
    logged: list[tuple[int, str, str]], expected: list[list[tuple[int, str]]]
) -> None:
    found = side_by_side(groups(*logged))
    assert [[(g["step"], g["sample_id"]) for g in row] for row in found] == expected


def test_answers_are_judged_and_ordered_by_what_they_earned() -> None:
    said = completions_of(said_by_a_group(20, "a", "sad"))
    assert [one.advantage for one in said] == [1.4, -0.3, -0.4, -0.7]
    assert [(one.label, one.right) for one in said] == [
        ("sad", True),
        (None, False),
        ("fear", False),
        (None, False),
    ]
    assert [one.ended for one in said] == [True, True, True, False]
    assert said[0].rewards == {"format": 1.0, "outcome": 1.0, "grounding": 0.25}
    without = completions_of({**said_by_a_group(20, "a", "sad"), "label": None})
    assert {one.right for one in without} == {None}


@pytest.mark.parametrize("same", [True, False])
def test_early_middle_and_late_are_shown_with_their_clips(run: Path, same: bool) -> None:
    before = built(run).count('<div class="screen">')
    add_grpo(run, same=same)
    page = built(run)
    rows = 1 if same else 2
    assert page.count('class="moment"') == 3 * rows
    assert page.count('<div class="screen">') == before + 3 * rows
    assert "<b>brows</b>" not in page.replace("&lt;b&gt;", "")  # what a model says is no markup
    assert "&lt;b&gt;brows&lt;/b&gt;" in page
    text = text_of(page)
    for when in ("Early step 2", "Middle step 22", "Late step 40"):
        assert when in text or not same
    assert "✓ sad highest advantage" in text
    assert "✗ no label lowest advantage, truncated" in text
    assert "1 of 4 right" in text


def test_clips_that_are_gone_are_said_to_be(run: Path) -> None:
    add_grpo(run)
    for path in (run / "world/clips").glob("*.mp4"):
        path.unlink()
    assert built(run).count("no longer where the run found it") == 6


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])


def junk(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b'\xff\xfe{}\n[1]\n{"step": "x", "completions": 3}\n{"kind": 1}\n')


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "events.jsonl"])
@pytest.mark.parametrize("damage", [drop, cut, junk], ids=lambda one: one.__name__)
def test_a_damaged_log_is_still_a_report(
    run: Path, name: str, damage: Callable[[Path, str], None]
) -> None:
    damage(add_grpo(run), name)
    assert "Results" in built(run)


def test_a_chart_reaches_its_guides_and_bounds() -> None:
    points = [(0.0, 0.4), (10.0, 0.6)]
    plain = line_chart([("a", points)], title="t", linear=True)
    reached = line_chart(
        [("a", points)], title="t", linear=True, guides=[2.0], bounds=(-1, 0), colours=[3]
    )
    ticks = [float(t) for t in re.findall(r'text-anchor="end">(-?[\d.]+)<', reached)]
    assert (min(ticks), max(ticks)) == (-1, 2)
    assert 'class="guide"' in reached
    assert 'class="guide"' not in plain
    assert 'class="s3"' in reached
    spread = [("a", [(0.0, 0.01), (1.0, 1.0)])]
    assert "logarithmic" in line_chart(spread, title="t")
    assert "logarithmic" not in line_chart(spread, title="t", linear=True)
