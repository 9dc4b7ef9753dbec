"""One self-contained HTML page about a run: it loads no script, style, font, image or clip."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import Field

from mmemo import __version__, files, formats
from mmemo.answers.parsing import answer_text
from mmemo.config import Config
from mmemo.console import console
from mmemo.evaluation import tables
from mmemo.evaluation.comparison import count_tests
from mmemo.evaluation.controls.run import read_controls
from mmemo.evaluation.controls.training import training_sentence
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.results import EvaluatedRun, claim_notes_of
from mmemo.report.charts import SMOOTHED, line_chart
from mmemo.report.collect import Overview, read_run
from mmemo.report.gallery import Card, make_cards
from mmemo.report.gates import gates_of_runs
from mmemo.report.grpo import REWARD_COLUMNS, view_of
from mmemo.report.reliance import errors_title, views_of
from mmemo.rewards.hacking import ALERT_RULES, DIVERGENCE

SUBSET_NAMES: Mapping[str, str] = {
    "video_aligned": "Video-aligned",
    "audio_aligned": "Audio-aligned",
    "consistent": "Consistent",
    "none": "No conflict field",
    "all": "All conflict clips",
}


class ReportConfig(Config):
    """Config of the ``report`` stage of a pipeline."""

    output_dir: str
    """Folder for ``report.html``. A copy is written to ``run_dir``."""
    run_dir: str | None = None
    """Folder of the pipeline run. None uses the parent of ``output_dir``."""
    evaluations: list[str] = []
    """Evaluation folders to show. An empty list shows every evaluation in ``run_dir``. List them in
    a pipeline, so that the report is built again when an evaluation changes."""
    title: str | None = None
    """Title of the page. None uses the name of the run folder."""
    gallery: int = Field(default=12, ge=0, le=60)
    """Number of clips in the gallery."""


def run_report(config: ReportConfig) -> Path:
    """Write ``report.html`` to the stage's folder, and a copy to the run's folder.

    Returns:
        The path of the copy.

    Raises:
        EvaluationError: nothing in the run's folder has been evaluated.
    """
    out = Path(config.output_dir) / "report.html"
    run_dir = Path(config.run_dir) if config.run_dir else Path(config.output_dir).parent
    build_report(
        run_dir,
        out,
        evaluations=[Path(name) for name in config.evaluations],
        title=config.title,
        gallery=config.gallery,
    )
    copy = run_dir / out.name
    if copy.resolve() != out.resolve():
        copy.write_bytes(out.read_bytes())
    return copy


def build_report(
    run_dir: Path,
    out: Path,
    *,
    evaluations: Sequence[Path] = (),
    title: str | None = None,
    gallery: int = 12,
) -> Path:
    """Write the report on the run in ``run_dir`` to ``out``, and return ``out``.

    Args:
        evaluations: the evaluation folders to show; every one in ``run_dir`` unless given.
        title: the title of the page; the name of ``run_dir`` unless given.
        gallery: the number of clips in the gallery.

    Raises:
        EvaluationError: nothing in the folder has been evaluated.
    """
    overview = read_run(run_dir, evaluations)
    page = render(overview, title=title or run_dir.resolve().name, gallery=gallery)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(out, page)
    return out


def print_results(run_dir: Path) -> None:
    """Print the results table of a run to the terminal.

    Raises:
        EvaluationError: nothing in the folder has been evaluated.
    """
    runs = read_run(run_dir).runs
    console.print()
    tables.print_results(runs, title="Results")


def render(overview: Overview, *, title: str, gallery: int) -> str:
    """The HTML text of the page."""
    environment = page_environment()
    source = environment.loader
    assert source is not None
    script = source.get_source(environment, "report.js")[0]
    style = source.get_source(environment, "report.css")[0]
    main = overview.main
    compared = [run.difference for run in overview.runs if run.difference]
    tests = count_tests(compared)
    return environment.get_template("report.html.j2").render(
        title=title,
        version=__version__,
        # These are our own files, which autoescaping would break.
        script=Markup(script),
        style=Markup(style),
        # The page's content security policy allows this script and no other.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        overview=overview,
        main=main,
        runs=overview.runs,
        scored=[run for run in overview.runs if run.block.get("scores")],
        closed=[(task, block) for task, block in main.tasks.items() if block["labels"]],
        open_tasks=tables.open_tasks(overview.runs),
        scored_tasks=tables.scored_tasks(overview.runs),
        metric_text=tables.metric_text,
        columns=tables.columns_of(overview.runs),
        readings=tables.readings_of(overview.runs),
        yes_no_columns=tables.YES_NO_COLUMNS,
        column_names=tables.COLUMNS,
        subset_names=SUBSET_NAMES,
        best=_best_baseline(overview.runs),
        confidence=formats.confidence(overview.results),
        clusters=main.cluster_words,
        tests=tests,
        notes=claim_notes_of(overview.results, tests if compared else None),
        charts=_charts(overview),
        grpo=[view_of(stage.name, stage.grpo) for stage in overview.stages if stage.grpo],
        grpo_columns=list(REWARD_COLUMNS.values()),
        signs=(DIVERGENCE, *ALERT_RULES),
        cards=_cards(overview, gallery),
        bad=_bad_counts(overview),
        reliance=views_of(overview.runs),
        gates=gates_of_runs(overview.runs),
        controls=read_controls(main),
        balanced=[
            (t, b["balanced_groups"]) for t, b in main.tasks.items() if "balanced_groups" in b
        ],
        training_sentence=training_sentence,
        errors_title=errors_title,
        answer_text=answer_text,
        thinking=_thinking,
        number=tables.number,
        counted=formats.counted,
        confidence_of=formats.confidence,
        smoothed=any(len(line) > SMOOTHED for s in overview.stages for line in s.losses.values()),
    )


def page_environment() -> Environment:
    """The templates of all pages, with the filters that write numbers. They escape every text."""
    environment = Environment(
        loader=PackageLoader("mmemo.report"),
        autoescape=True,
        # A mistyped name in a template raises, where jinja would otherwise print nothing.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        pct=formats.percent,
        span=formats.span,
        minutes=formats.minutes,
        signed=formats.signed,
        signed_span=formats.signed_span,
        pvalue=formats.p_value,
        plain=formats.plain,
        short=formats.short,
        plain_span=formats.plain_span,
        plain_signed=formats.plain_signed,
    )
    return environment


def _best_baseline(runs: Sequence[EvaluatedRun]) -> EvaluatedRun | None:
    baselines = [run for run in runs if run.role == "baseline"]
    closed = (run for run in baselines if run.block["labels"])
    return max(closed, key=lambda run: run.block["average"]["value"] or 0.0, default=None)


def _charts(overview: Overview) -> list[tuple[str, Markup, list[str]]]:
    """Title, chart and series names of each training stage."""
    charts: list[tuple[str, Markup, list[str]]] = []
    for stage in overview.stages:
        if stage.losses and stage.grpo is None:  # the loss of GRPO hovers around 0
            series = sorted(stage.losses.items())
            charts.append(
                (
                    stage.name,
                    line_chart(series, title=f"Loss of {stage.name}"),
                    [n for n, _ in series],
                )
            )
    return charts


def _cards(overview: Overview, count: int) -> list[Card]:
    main = overview.main
    task = next(iter(main.tasks))
    if not main.main["labels"]:  # no answer is right or wrong
        return []
    others: dict[str, dict[str, Row]] = {
        run.name: {row["sample_id"]: row for row in run.result.rows(task)}
        for run in overview.runs
        if run.result is not None and run.result is not main
    }
    return make_cards(main.rows(task), others, Path(main.made["data"]["media_root"]), count)


def _bad_counts(overview: Overview) -> list[tuple[str, int, dict[str, int], list[Any]]]:
    """Each stage that left out clips: its name, how many, how many by reason, and the first few."""
    return [
        (name, len(clips), dict(Counter(str(clip["reason"]) for clip in clips)), [*clips][:8])
        for name, clips in overview.bad.items()
    ]


def _thinking(raw: str) -> str:
    """The reasoning of a generation: its text before the answer."""
    head = raw.split("<answer>")[0]
    return head.replace("<think>", "").replace("</think>", "").strip()
