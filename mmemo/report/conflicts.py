"""``mmemo reliance``: one table over the conflict benchmarks of any number of models.

Three kinds of benchmarks can say whether a model follows the voice or something else:

- clips whose voice and face were labelled apart, in CA-MER's subsets (CA-MER, EmotionTalk, CREMA-D,
  the synthetic world): the accuracy where the voice is right and where the face is, and the signed
  reliance over all conflict clips (:mod:`mmemo.evaluation.answer_source`);
- questions about one channel each, in tasks that end in ``_audio`` and ``_video`` (EmoReAlM): the
  mean accuracy of either side;
- answers that the voice or the words imply (VoxParadox): their shares, and the signed difference.
  There the voice is always right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from mmemo import files
from mmemo.console import console
from mmemo.errors import EvaluationError
from mmemo.evaluation.clusters import clusters_of
from mmemo.evaluation.metrics import mean_of, mean_of_sums
from mmemo.evaluation.results import RESULTS, EvalResult, read_results
from mmemo.evaluation.scoring import is_right
from mmemo.formats import confidence, percent, plain_signed, plain_span, signed, signed_span, span
from mmemo.statistics import Floats

Number = Mapping[str, Any]
SIDES: Mapping[str, str] = {"audio": "voice", "video": "face"}


@dataclass(frozen=True, slots=True)
class RelianceRow:
    """One model on one benchmark. Each number is a value with its interval and n, as in
    ``results.json``; None where the benchmark does not have it.

    Attributes:
        voice, face: accuracy where the voice, or the face, is right.
        consistent: accuracy where both agree.
        worse: the side with the lower accuracy.
        gap: accuracy of the voice minus that of the face.
        reliance: the share of conflict answers that follow the voice minus the share that follow
            the other channel, from -1 to 1; of a model that is always right, 0 where as many clips
            of either kind count.
        against: what the voice stands against: face or words.
    """

    benchmark: str
    model: str
    n: int
    voice: Number | None = None
    face: Number | None = None
    consistent: Number | None = None
    gap: Number | None = None
    reliance: Number | None = None
    against: str = "face"

    @property
    def worse(self) -> str | None:
        """``voice`` or ``face``; None where they are equal or one is not known."""
        found = [one["value"] if one else None for one in (self.voice, self.face)]
        if None in found or found[0] == found[1]:
            return None
        return "voice" if found[0] < found[1] else "face"

    def record(self) -> dict[str, Any]:
        """The row as a JSON value."""
        return {**asdict(self), "worse": self.worse}


def reliance_rows(folders: Sequence[Path]) -> list[RelianceRow]:
    """The rows of the evaluations in some folders, and below them, by benchmark.

    Raises:
        EvaluationError: a folder holds no evaluation, or none of them is of a conflict benchmark.
    """
    results = [read_results(path) for folder in folders for path in _evaluations(folder)]
    rows = [row for result in results for row in _rows_of(result)]
    if not rows:
        raise EvaluationError(
            f"none of {len(results)} evaluations is of a conflict benchmark; give those of "
            "eval/ca_mer.py, eval/crema_d.py and the like"
        )
    order = list(dict.fromkeys(row.benchmark for row in rows))
    return sorted(rows, key=lambda row: order.index(row.benchmark))


def print_reliance(folders: Sequence[Path], json_file: Path | None = None) -> list[RelianceRow]:
    """Print the table of some evaluations, and write its numbers to a file if one is given."""
    rows = reliance_rows(folders)
    results = [read_results(path) for folder in folders for path in _evaluations(folder)]
    console.print(reliance_table(rows, confidence(results)))
    if json_file is not None:
        values = {"rows": [row.record() for row in rows]}
        files.write_whole(json_file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return rows


def reliance_table(rows: Sequence[RelianceRow], level: str = "95%") -> Table:
    """One row per benchmark and model, with the interval in a dim second line."""
    caption = (
        f"Accuracy in percent with {level} intervals, where the voice is right, where the face is, "
        "and where both agree. Gap: voice minus face. Reliance: the share of answers that follow "
        "the voice minus the share that follow the other channel, from −1 to +1."
    )
    table = Table(title="Voice against face and words", caption=caption, box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("Voice\nright", "Face\nright", "Both\nagree", "Worse", "Gap", "Reliance", "n"):
        table.add_column(name, justify="left" if name == "Worse" else "right", no_wrap=True)
    for place, row in enumerate(rows):
        if place == 0 or rows[place - 1].benchmark != row.benchmark:
            table.add_row(Text(row.benchmark, style="bold"))
        table.add_row(
            Text(f" {row.model}"),
            *(_cell(one, percent, span) for one in (row.voice, row.face, row.consistent)),
            row.worse or "–",
            _cell(row.gap, signed, signed_span),
            _cell(row.reliance, plain_signed, plain_span),
            str(row.n),
        )
    return table


def _evaluations(folder: Path) -> list[Path]:
    """The folder, if it holds an evaluation, or else those below it that do."""
    if (folder / RESULTS).exists():
        return [folder]
    found = sorted(path.parent for path in folder.rglob(RESULTS))
    if not found:
        raise EvaluationError(f"{folder}: holds no evaluation; give the folder of a `mmemo eval`")
    return found


def _rows_of(result: EvalResult) -> list[RelianceRow]:
    name = Path(result.made["benchmark"]["file"]).stem
    found: list[RelianceRow] = []
    for task, block in result.tasks.items():
        title = name if task == next(iter(result.tasks)) else f"{name}, {task}"
        subsets, scored = block.get("subsets", {}), block.get("scored", {})
        if {"video_aligned", "audio_aligned"} & set(subsets):
            accuracy = {key: one["war"] for key, one in subsets.items()}
            found.append(
                RelianceRow(
                    title,
                    result.name,
                    block["n"],
                    accuracy.get("audio_aligned"),
                    accuracy.get("video_aligned"),
                    accuracy.get("consistent"),
                    block.get("conflict_gap"),
                    block.get("reliance", {}).get("all", {}).get("signed"),
                )
            )
        elif {"signed", "voice_share"} <= set(scored):
            other = next(key for key in ("words", "face") if f"{key}_share" in scored)
            signed_one, voice = scored["signed"], scored["voice_share"]
            found.append(
                RelianceRow(
                    title,
                    result.name,
                    signed_one["n"],
                    voice,
                    reliance=signed_one,
                    against=other,
                )
            )
    return found or _by_tasks(name, result)


def _by_tasks(name: str, result: EvalResult) -> list[RelianceRow]:
    """The mean accuracy over the tasks about the voice, and over those about the picture; nothing
    where the benchmark has no such tasks."""
    closed = [task for task, block in result.tasks.items() if block["labels"]]
    tasks = [task for task in closed if task.endswith(tuple(f"_{side}" for side in SIDES))]
    places = {
        side: [index for index, task in enumerate(tasks) if task.endswith(f"_{side}")]
        for side in SIDES
    }
    if not all(places.values()):
        return []
    rows = [row for row in result.rows() if row["task"] in tasks]
    counts = np.zeros((len(rows), len(tasks), 2))  # right answers, and all
    for one, row in zip(counts, rows, strict=True):
        one[tasks.index(row["task"])] = (is_right(row), 1.0)
    drawn = clusters_of(rows, result.bootstrap).sums(counts)

    def mean(side: str) -> Callable[[Floats], Floats]:
        return lambda sums: mean_of(mean_of_sums(sums[..., places[side], :]))

    sides = {
        side: drawn.interval(
            mean(side), sum(row["task"].endswith(f"_{side}") for row in rows), share=True
        ).row()
        for side in SIDES
    }
    gap = drawn.interval(
        lambda sums: mean("audio")(sums) - mean("video")(sums), len(rows), limits=(-1, 1)
    )
    return [
        RelianceRow(name, result.name, len(rows), sides["audio"], sides["video"], gap=gap.row())
    ]


def _cell(
    found: Number | None, value: Callable[[Any], str], interval: Callable[[Any], str]
) -> Text:
    if found is None:
        return Text("–", style="dim")
    text = Text(value(found["value"]))
    if found["low"] is not None:
        text.append("\n" + interval(found), style="dim")
    return text
