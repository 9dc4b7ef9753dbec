"""EmoBench-M: emotional intelligence of multimodal LLMs, 13 sets of video with sound.

Over 5,000 samples (Hu et al., arXiv 2502.04424), Apache-2.0; the archive on Google Drive is linked
from https://github.com/Emo-gml/EmoBench-M. Layout of --data::

    benchmark_json/MC-EIU-test_500.json    one file a set: id, video, conversations (human, gpt)
    datasets/...                           the clips, as `video` names them

A file belongs to the set that its name holds; assumed: the names of the files but for two.
Eleven sets have one label, whose official scorer drops all answers that are not just a label.
MC-EIU has an emotion and an intent. SMILE asks why people laugh (without BERTScore and LLM judge).

    mmemo eval eval/suites/emobench_m.py --data EMOBENCH_M --model MODEL
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmemo.answers.kinds import Fields, Text
from mmemo.answers.parsing import LabelSet
from mmemo.data.adapter import Excluded
from mmemo.data.choices import manifest_rows, media_path, turns_of
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.released import classes
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold")
JOINT = Fields({name: LabelSet(one) for name, one in classes.EMOBENCH_JOINT.items()})
BOTH = use("fields", names=["emotion", "intent"])
REASON = use("text", metrics=["bleu", "rouge_l"])
SETS = classes.EMOBENCH_SETS
TASKS = {
    **{one: Task(labels=own, official=classes.emobench_labels(*own)) for one, own in SETS.items()},
    "MC-EIU": Task(answers=JOINT, scorers=(BOTH,), official=classes.emobench_joint),
    "SMILE": Task(answers=Text(), scorers=(REASON,), official=classes.emobench_texts),
}


def rows(root: Path, *, sets: str = "all") -> Iterator[dict[str, Any] | Excluded]:
    """One row per question; ``sets``: all, or names of tasks with commas between."""
    for file in tables(root / "benchmark_json"):
        stem = _letters(file.stem).replace("ravdess", "ravdss")
        task = max((one for one in TASKS if _letters(one) in stem), key=len, default=None)
        if task is None:
            yield Excluded(file.name, "unknown set")
        elif sets == "all" or task in sets.split(","):
            make = partial(_row, root=root, task=task)
            yield from manifest_rows(read_table(file), make, prefix=f"emobench_m-{task}")


def _row(values: Values, name: str, *, root: Path, task: str) -> dict[str, Any] | Excluded:
    question, answer = (*turns_of(values), "", "")[:2]
    clip = media_path(root, values.get("video"), "datasets", "")
    if not question or not answer or clip is None:
        return Excluded(name, "no question, answer or clip")
    gold: Any = JOINT.read(answer).answer if task == "MC-EIU" else answer
    if task in SETS and answer.lower() in SETS[task]:
        gold = answer.lower()
    elif task in SETS or gold is None:
        return Excluded(name, "label outside the set", answer[:80])
    return {"video": clip, "audio": clip, "prompt": question, "task": task, "gold": gold}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
