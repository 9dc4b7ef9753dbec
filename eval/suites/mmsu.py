"""MMSU: spoken language understanding, 5,000 questions with choices in 47 tasks, sound only.

(Wang et al., arXiv 2506.04779); get it from https://huggingface.co/datasets/ddwang2000/MMSU, where
its licence stands. Layout of --data::

    question/mmsu.jsonl    id, task_name, audio_path, question, choice_a to choice_d, answer_gt,
                           category, sub-category, sub-sub-category, linguistics_sub_discipline
    audio/...              the sounds, as `audio_path` names them

``answer_gt`` is the text of a choice, and C and D may be missing. Accuracy, also by category;
``slice=paralinguistics`` or ``slice=emotion`` asks these questions only.

`official` gives two released scorers: MMSU's own, which drops unreadable answers and lets an empty
one repeat the letter before it, and lmms-eval's, which draws a letter at random. Assumed: the names
of the categories, in which "paralinguistic" and "emotion" are looked for.

    mmemo eval eval/suites/mmsu.py --data MMSU --model MODEL --option slice=emotion
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.choices import Choice, choice_rows, groups_of, media_path, text_of
from mmemo.data.tables import Values, read_table
from mmemo.evaluation.released.letters import SPELT, in_order, mmsu, mmsu_lmms_eval, spelt
from mmemo.evaluation.task import Task

COLUMNS = ("gold", "choices")
PUBLISHED = {"": {"": 5000}}
FIELDS = {"category": "category", "sub_category": "sub_category", "kind": "task_name"}
TASKS = {
    "mmsu": Task(
        labels="choices", official=in_order(mmsu, mmsu_lmms_eval), slices=(*FIELDS, "detail")
    )
}
WORDS = {"all": "", "paralinguistics": "paralinguistic", "emotion": "emotion"}


def rows(root: Path, *, slice: str = "all") -> Iterator[dict[str, Any] | Excluded]:
    """One row per question; ``slice``: all, paralinguistics or emotion."""
    need_option("slice", slice, tuple(WORDS))

    def more(values: Values, choice: Choice) -> dict[str, Any] | Excluded:
        sound = media_path(root, values.get("audio_path"), "", "audio")
        if sound is None:
            return Excluded(f"mmsu-{text_of(values, 'id')}", "no sound")
        group = groups_of(values, **FIELDS, detail="sub_sub_category")
        return {"audio": sound, "group": {**group, SPELT: spelt(choice.exact)}}

    for row in choice_rows(
        read_table(root / "question" / "mmsu.jsonl"), more, prefix="mmsu", answer="text"
    ):
        said = "" if isinstance(row, Excluded) else " ".join(row["group"].values())
        if isinstance(row, Excluded) or WORDS[slice] in said.lower():
            yield row


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
