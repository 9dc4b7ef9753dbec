"""MTMEUR: 5,101 questions with choices in turns about 1,451 videos of people.

(Hu et al., arXiv 2508.16859), Apache-2.0 by its badge; get it from
https://huggingface.co/datasets/MindIntLab/MTMEUR. Layout of --data::

    data/*.json    video_path, questions: question, options {A, B, C, D}, correct_answer
    *.mp4          the clips: in the root, videos/ or data/ (assumed)

The questions about a video are turns: with ``history=right``, the default, each is asked after the
earlier ones with their right answers; with ``history=none`` each alone, as the release's script
does. Questions with several right answers are left out; the script counts them as wrong.

Accuracy; `official` is the script's way of finding a letter: the first A to D anywhere.

    mmemo eval eval/suites/mtmeur.py --data MTMEUR --model MODEL
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.choices import media_path, read_choice
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.released.letters import mtmeur
from mmemo.evaluation.task import Task

COLUMNS = ("gold", "choices")
PUBLISHED = {"": {"": 5101}, "history=none": {"": 5101}}
TASKS = {"mtmeur": Task(labels="choices", official=mtmeur, slices=("turn",))}


def rows(root: Path, *, history: str = "right") -> Iterator[dict[str, Any] | Excluded]:
    """One row per question; ``history``: right or none."""
    need_option("history", history, ("right", "none"))
    seen: list[Any] = []
    for file in tables(root / "data" if (root / "data").is_dir() else root):
        for place, values in enumerate(read_table(file)):
            name = f"mtmeur-{file.stem}-{place}"
            row: Values = {} if isinstance(values, Excluded) else values
            clip = media_path(root, row.get("video_path"), "", "videos", "data", "data/videos")
            asked: Any = row.get("questions")
            if isinstance(values, Excluded):
                yield values
            elif clip is None or not isinstance(asked, list) or values in seen:
                yield Excluded(name, "repeated video" if values in seen else "no clip or questions")
            else:
                seen.append(values)
                yield from _turns(asked, name, clip, history == "right")


def _turns(
    questions: list[Any], name: str, clip: str, history: bool
) -> Iterator[dict[str, Any] | Excluded]:
    before: list[dict[str, Any]] = []
    for turn, asked in enumerate(questions, start=1):
        own = f"{name}-{turn}"
        read = read_choice(asked if isinstance(asked, dict) else {}, own, answer="letter")
        if isinstance(read, Excluded):
            yield read
            continue
        marks = "" if history and before else "<video><audio>"
        last = {"role": "user", "content": marks + read.question}
        prompt = [*before, last] if history else [last]
        clips = {"video": clip, "audio": clip, "group": {"video": clip, "turn": str(turn)}}
        yield {**read.row(), **clips, "sample_id": own, "prompt": prompt}
        right = read.choices[ord(read.answer) - ord("A")]
        before += [last, {"role": "assistant", "content": f"{read.answer}. {right}"}]


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
