"""EmoTrans: how emotions change within a video, 1,000 clips and more than 3,000 questions.

(Hu et al., arXiv 2604.23348); get it from https://github.com/Emo-gml/EmoTrans, where its licence
stands. Four tasks: is there a change (ECD), which emotion when (ESI), why it changes (ETR), and
which comes next (NEP).

Its files were not seen. Assumed layout of --data: tables (.json, .jsonl, .csv) anywhere below, with
a question, choices and an answer, the clip under ``video``, ``video_path`` or ``video_id``, and the
task in a column ``task`` or ``task_type`` or in the file's name; clips in the root, ``videos``,
``video`` or ``clips``. A question without choices that is answered by yes or no gets these two.

Accuracy of each task, also by ``scenario``. There is no `official` reading for lack of the script.

    mmemo eval eval/suites/emotrans.py --data EMOTRANS --model MODEL
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.choices import Choice, choice_rows, groups_of, media_path, read_choice, text_of
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
NAMES = {
    "ECD": ("ecd", "changedetection"),
    "ESI": ("esi", "stateidentification"),
    "ETR": ("etr", "transitionreasoning"),
    "NEP": ("nep", "nextemotion"),
}
TASKS = dict.fromkeys(NAMES, Task(labels="choices", slices=("scenario",)))


def rows(root: Path) -> Iterator[dict[str, Any] | Excluded]:
    """One row per question."""
    for file in tables(root, "**/*"):
        more = partial(_more, root=root, file=file.stem)
        table = map(_yes_no, read_table(file))
        yield from choice_rows(table, more, prefix=f"emotrans-{file.stem}")


def _more(values: Values, choice: Choice, *, root: Path, file: str) -> dict[str, Any] | Excluded:
    told = text_of(values, "task", "task_type", "task_name", "type") or ""
    written = [re.sub(r"[\W_]", "", one.lower()) for one in (told, file)]
    tasks = [name for one in written for name, own in NAMES.items() if any(w in one for w in own)]
    clip = text_of(values, "video", "video_path", "video_id", "video_name", "clip") or ""
    named = clip if Path(clip).suffix or not clip else f"{clip}.mp4"
    found = media_path(root, named, "", "videos", "video", "clips")
    if not tasks or found is None:
        reason = "no clip" if tasks else "unknown task"
        return Excluded(f"{file}: {choice.question[:60]}", reason, told)
    group = groups_of(values, scenario="scenario")
    return {"video": found, "audio": found, "task": tasks[0], "group": group}


def _yes_no(values: Values | Excluded) -> Values | Excluded:
    if isinstance(values, Excluded) or isinstance(read_choice(values, ""), Choice):
        return values
    answer = (text_of(values, "answer", "label", "ground_truth") or "").strip(" .").lower()
    yes_no = {"choices": ["yes", "no"], "answer": answer}
    return {**values, **yes_no} if answer in ("yes", "no") else values


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
