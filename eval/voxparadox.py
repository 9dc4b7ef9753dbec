"""VoxParadox: does a model listen to the voice, or believe the words that contradict it?

2,000 multiple-choice questions in 10 paralinguistic tasks about synthetic speech whose words claim
something else than the voice shows ("Do Audio LLMs Listen or Read?", arXiv 2605.27772, ICML 2026).
Licence: USC-Research. Get it from ihp-lab/VoxParadox on the Hugging Face Hub. Metrics: accuracy, in
all and by task, and the share of answers that the words imply (``words_share``).

Read is ``file``, a JSONL, JSON or CSV table with the columns ``question``, ``choice_a`` to
``choice_d``, ``answer_gt``, ``adversarial_labels`` and ``task_name``, in MMSU's form. Assumed, for
no public page says it: the table's name, that ``audio_path`` (or ``audio=COLUMN``) is a clip's path
in the folder, or in its folder ``audio``, and that answers are texts of choices, or letters. Save a
Parquet file as JSONL, and its sounds as files, first.

    mmemo eval eval/voxparadox.py --model MODEL --data VoxParadox --option file=test.jsonl
"""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.releases.choices import Choice, choice_rows, groups_of, media_path, read_choice
from mmemo.data.releases.tables import Values, read_table
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("gold", "choices")
PUBLISHED = {"": {"": 2000}}
TASKS = {"choice": Task(labels="choices", scorers=(use("sides"),), slices=("task",))}


def rows(
    root: Path, *, file: str = "test.jsonl", audio: str = "audio_path"
) -> Iterator[dict[str, Any] | Excluded]:
    """One question per row; ``audio`` is the column of the clip's path."""

    def more(values: Values, choice: Choice) -> dict[str, Any] | Excluded:
        name = f"voxparadox-{values.get('id', choice.question)}"
        sound = media_path(root, values.get(audio), "", "audio")
        if sound is None:
            return Excluded(name, f"no {audio}")
        given: Any = values.get("adversarial_labels")
        with suppress(TypeError, ValueError):  # a list in a cell of a table
            given = json.loads(given) if str(given).startswith("[") else given
        implied = [
            read_choice({**values, "answer_gt": label}, name)
            for label in (given if isinstance(given, list) else [given])  # pyright: ignore
        ]
        letters = {one.answer for one in implied if isinstance(one, Choice)}
        if not letters or choice.answer in letters or any(isinstance(o, Excluded) for o in implied):
            return Excluded(name, "words do not contradict", str(given))
        labels = {"audio": choice.answer, "text": ",".join(sorted(letters))}
        group = groups_of(values, task="task_name")
        return {"audio": sound, "modality_labels": labels, "group": group}

    yield from choice_rows(read_table(root / file), more, prefix="voxparadox")


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
