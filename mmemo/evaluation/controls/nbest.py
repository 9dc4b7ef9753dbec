"""``mmemo eval --nbest 1,2,3``: how often the right label is among the n most probable ones.

The labels of a question are ranked by the model's own probabilities of them as whole answers, in
the place where the model answers: behind its reasoning, if it reasons, and in the tags that it
uses. So nothing else is asked than for the usual answer, and every label has a rank. A prompt for a
list of n labels (``answers: Ranked``) is another question, which a model may answer worse.

The first label may differ from the generated answer, where the model writes a label in another form
or no label at all; ``agreement`` says how often they are the same. Decoding methods that change
attention or contrast logits affect the reasoning, but not these probabilities.

The chance level is n of K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mmemo.console import console
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.cache import CachedEvaluator
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.generate import prompt_sample
from mmemo.evaluation.metrics import mean_of_sums
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.reliance.shapley import ShapleyEvaluator
from mmemo.evaluation.reliance.sidecar import Sidecar, answers_key
from mmemo.evaluation.results import EvalResult
from mmemo.evaluation.scoring import Block
from mmemo.formats import percent, span
from mmemo.statistics import BootstrapConfig, rounded

RANKS = "nbest.jsonl"
FILE = Sidecar(
    file="nbest.json",
    table="nbest.csv",
    schema=1,
    columns=("task", "n_best", "value", "low", "high", "n", "chance"),
    remedy="run the evaluation again with --nbest",
)


def measure_nbest(
    config: EvalConfig,
    evaluator: CachedEvaluator,
    questions: Sequence[Question],
    result: EvalResult,
) -> None:
    """Rank the labels of every question with labels, write ``nbest.jsonl``, ``nbest.json`` and
    ``nbest.csv``, and print the table; without ``controls.nbest``, remove those of other answers.
    """
    folder, answers = Path(config.output_dir), result.rows()
    if not config.controls.nbest:
        FILE.drop_other(folder, answers)
        return
    given = {row["sample_id"]: row for row in answers}
    asked = [one for one in questions if one.labels is not None]
    bare, tagged = (
        ShapleyEvaluator(
            evaluator.generator,
            instruction=config.reliance.instruction,
            answer=form,
            batch_size=config.per_device_eval_batch_size,
        )
        for form in ("{label}", config.reliance.answer)
    )

    def rank(batch: Sequence[Question], draw: str) -> list[Row]:
        found: list[Row] = []
        for place, question in enumerate(batch):
            uses_tags = "<answer>" in str(given[question.sample.sample_id]["raw"]).lower()
            scorer = tagged if uses_tags else bare
            first = scorer.before_answer(question, f"{draw}/{place}")
            scores = scorer.label_logps(question, [prompt_sample(question)], [first])[0]
            labels = question.labels.labels if question.labels is not None else ()
            # A stable sort, so that labels of equal probability keep the benchmark's order.
            order = scores.sort(descending=True, stable=True)
            ranked = [labels[int(one)] for one in order.indices]
            values = [round(float(one), 6) for one in order.values]
            found.append({"ranked": ranked, "logps": values, "tags": uses_tags})
        return found

    notes = [{"measure": "nbest", "answer": config.reliance.answer}] * len(asked)
    rows = evaluator.each("n-best", folder / RANKS, asked, rank, noted=notes, kind="nbest")
    tasks: dict[str, Block] = {}
    for task in dict.fromkeys(str(row["task"]) for row in rows):
        own = [row for row in rows if row["task"] == task]
        tasks[task] = summarise_nbest(own, given, config.controls.nbest, config.bootstrap)
    values = {"schema": FILE.schema, "answers": answers_key(answers), "tasks": tasks}
    FILE.write(folder, values, _csv(tasks))
    console.print(nbest_table(tasks))


def summarise_nbest(
    rows: Sequence[Row], given: dict[str, Row], counts: Sequence[int], config: BootstrapConfig
) -> Block:
    """``best``: for each n the share of the questions whose right label is among the first n, with
    its interval and the chance level; ``mean_rank`` of the right label, from 1; ``agreement`` of
    the first label with the generated answer.

    Args:
        rows: those of ``nbest.jsonl`` of one task, with ``ranked`` labels.
        given: sample id to the generated answer's row.
    """
    clusters = clusters_of(rows, config)

    def share(hits: Sequence[bool]) -> Block:
        sums = clusters.sums(np.array([[float(hit), 1.0] for hit in hits]))
        return sums.interval(mean_of_sums, len(rows), share=True).row()

    places = [row["ranked"].index(row["truth"]) for row in rows]
    best: dict[str, Any] = {}
    for n in counts:
        chance = sum(min(1.0, n / len(row["ranked"])) for row in rows) / len(rows)
        best[str(n)] = {**share([place < n for place in places]), "chance": rounded(chance)}
    same = [given[row["sample_id"]]["answer"] == row["ranked"][0] for row in rows]
    mean_rank = rounded(1 + sum(places) / len(rows))
    return {"n": len(rows), "best": best, "mean_rank": mean_rank, "agreement": share(same)}


def nbest_table(tasks: dict[str, Block]) -> Table:
    """The n-best accuracies of each task."""
    table = Table(title="n-best", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "Percent of the questions whose right label is among the n labels that the model finds "
        "most probable. Alike: the most probable label is the generated answer."
    )
    for name in ("", "n-best", "Right", "Interval", "Chance", "Alike", "n"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for task, block in tasks.items():
        for place, (n, found) in enumerate(block["best"].items()):
            alike = percent(block["agreement"]["value"]) if place == 0 else ""
            table.add_row(
                *(task if place == 0 else "", n, percent(found["value"]), span(found)),
                *(percent(found["chance"]), alike, str(block["n"])),
            )
    return table


def _csv(tasks: dict[str, Block]) -> list[Row]:
    return [
        {
            "task": task,
            "n_best": n,
            **{key: found[key] for key in ("value", "low", "high", "n", "chance")},
        }
        for task, block in tasks.items()
        for n, found in block["best"].items()
    ]
