"""HitEmotion: 24 sets at three levels of theory of mind, from perceiving an emotion to explaining.

20,114 items (Luo et al., arXiv 2602.00971); get it from https://hitemotion.github.io, where its
licence stands. Metrics are the paper's: ACC and WAF (weighted F1), and an LLM's rating of texts.

Its files were not seen. Assumed layout of --data: tables (.json, .jsonl, .csv) anywhere below, each
of one task, whose abbreviation is a word of the file's name (``L1/MER.json``), with a question, an
answer, perhaps choices, and a clip under ``video`` or ``audio``, in the root, ``videos`` or
``audios``. The choices of a table without any are all answers in it. A judge rates the texts of EI
and LR (``--benchmark.judge.base_url``). Pictures, and tasks whose answers are tuples (``MF`` in the
paper's table, and EBIA), are left out and counted.

    mmemo eval eval/suites/hitemotion.py --data HITEMOTION --model MODEL --option level=1
"""

import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmemo.answers.kinds import Text
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases import choices
from mmemo.data.releases.choices import media_path, text_of
from mmemo.data.releases.tables import Values, read_table, tables
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
LEVELS = {
    "1": ("MER", "FESD", "ISA", "MESA", "MSA", "OSA", "SIA", "SOER", "SPER", "SCEA"),
    "2": ("DPTM", "EBIA", "HU", "IAVE", "MABSA", "MQE", "MSD", "MDER"),
    "3": ("EER", "EI", "LR", "MECPE", "SD", "SFA"),
}
_Row = dict[str, Any]
TUPLES = ("DPTM", "EBIA", "MABSA", "MQE", "MECPE", "SFA")
RATED = "How far the answer gives the causes that the known explanation gives, and no others."
OPEN = Task(answers=Text(), scorers=(use("judge", criterion=RATED),))
ASKED = [one for names in LEVELS.values() for one in names if one not in TUPLES]
TASKS = {one: OPEN if one in ("EI", "LR") else Task(labels="choices") for one in ASKED}


def rows(root: Path, *, level: str = "all") -> Iterator[_Row | Excluded]:
    """One row per item; ``level``: all, 1, 2 or 3."""
    need_option("level", level, ("all", *LEVELS))
    for file in tables(root, "**/*"):
        words = re.split(r"[\W_]+", file.stem.upper())
        found = [(at, one) for at, names in LEVELS.items() for one in names if one in words]
        at, task = found[0] if found else ("", "")
        if task not in TASKS:
            yield Excluded(file.name, "tuples are not asked" if task else "unknown task")
        elif level in ("all", at):
            make = partial(_row, root=root, task=task, level=at)
            table = read_table(file)
            table = choices.answers_as_choices(table) if TASKS[task].labels else table
            yield from choices.manifest_rows(table, make, prefix=f"hitemotion-{task}")


def _row(values: Values, name: str, *, root: Path, task: str, level: str) -> _Row | Excluded:
    video = media_path(root, text_of(values, "video", "video_path"), "", "videos")
    sound = media_path(root, text_of(values, "audio", "audio_path"), "", "audios") or video
    if sound is None:
        return Excluded(name, "no clip")
    clips = {"audio": sound, "video": video} if video else {"audio": sound}
    row = {**clips, "task": task, "group": {"level": level}}
    if TASKS[task].labels:
        read = choices.read_choice(values, name)
        return read if isinstance(read, Excluded) else {**read.row(), **row}
    question, gold = text_of(values, "question"), text_of(values, "answer", "reference")
    if question is None or gold is None:
        return Excluded(name, "no question or answer")
    return {**row, "prompt": question, "gold": gold}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
