"""VoxParadox: does a model listen to the voice, or believe the words that contradict it?

2,000 multiple-choice questions in 10 paralinguistic tasks about synthetic speech whose words claim
something else than the voice shows ("Do Audio LLMs Listen or Read?", arXiv 2605.27772, ICML 2026).
Licence: USC-Research. Get it from ihp-lab/VoxParadox on the Hugging Face Hub. Metrics: accuracy, in
all and by task, and the share of answers that the words imply (``words_share``).

Read are the JSONL, JSON or CSV files of the folder with the columns ``question``, ``choice_a`` to
``choice_d``, ``answer_gt``, ``adversarial_labels`` and ``task_name``, in MMSU's form. Assumed, for
the card does not say it: a clip's path, relative to the folder, is in ``audio_path`` (or
``audio=COLUMN``), and answers are the texts of choices, or their letters. Save Parquet files as
JSONL and their clips as files first.

    mmemo eval eval/voxparadox.py --model MODEL --data VoxParadox
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.releases.choice_columns import answers_of, choices_of, tables
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
PUBLISHED = {"": {"": 2000}}
TASKS = {"choice": Task(labels="choices", scorers=(use("sides"),), slices=("task",))}


def rows(root: Path, *, audio: str = "audio_path") -> Iterator[dict[str, Any] | Excluded]:
    """One question per row; ``audio`` is the column of the clip's path."""
    for row in tables(root):
        name = str(row.get("id") or f"{Path(row.file).stem}-{row.line}")
        path, choices = row.get(audio), choices_of(row)
        gold = answers_of(row.get("answer_gt"), choices)
        misled = answers_of(row.get("adversarial_labels"), choices)
        if not isinstance(path, str) or not path.strip():
            yield Excluded(name, f"no {audio}")
        elif len(choices) < 2:
            yield Excluded(name, "fewer than two choices")
        elif len(gold) != 1:
            yield Excluded(name, "the answer is no choice", str(row.get("answer_gt")))
        elif not misled or gold[0] in misled:
            yield Excluded(name, "words do not contradict", str(row.get("adversarial_labels")))
        else:
            yield {
                "sample_id": name,
                "prompt": f"<audio>{row.get('question')}",
                "audio": path.strip(),
                "choices": choices,
                "gold": gold[0],
                "modality_labels": {"audio": gold[0], "text": ",".join(misled)},
                "group": {"task": str(row.get("task_name") or "unknown")},
            }


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
