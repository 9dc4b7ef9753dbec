"""HumanVBench: people in videos, 17 tasks with choices, five of them on emotion.

(Zhou et al., arXiv 2412.17574), Apache-2.0; get it from
https://huggingface.co/datasets/datajuicer/HumanVBench. Layout of --data::

    for_Eval/Emotion_Recognition.jsonl    Video, Question, choices, Answer, Question_id
    Emotion_Recognition/....mp4           or under HumanVBench_videos/ or videos/

``choices`` is one text, ``Option A: {...}`` and so on. Assumed: the folder of the tables and those
of the clips; a file of a task that is none of the 17 is left out, and later releases have 16.

Accuracy of each task; `official` is the release's way of finding a letter, and ``random`` guessing.
The release asks five times and takes the mean, which greedy answers need not.

    mmemo eval eval/suites/humanvbench.py --data HUMANVBENCH --model MODEL --option group=emotion
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.choices import Choice, choice_rows, media_path
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.released.letters import humanvbench
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "choices")
GROUPS = {
    "emotion": (
        *("Emotion_Recognition", "Emotion_Temporal_Analysis", "Attitude_Recognition"),
        *("Emotion_Intensity_Compare", "Emotion_Recognition_in_Conversation"),
    ),
    "person": ("Text2Human", "Human2Text", "Human_Count", "Appearance_Time_Detection"),
    "behavior": (
        *("Behavior_Temporal_Analysis", "Behavior_Causualty_Analysis"),  # spelt so
        *("Action_at_Specified_Time", "Time_of_Specific_Action"),
    ),
    "speech": (
        *("Audio_Visual_Speaker_Matching", "Active_Speaker_Detection"),
        *("Audio_Visual_Alignment_Detection", "Speech_Content_Matching"),
    ),
}
NAMES = [name for names in GROUPS.values() for name in names]
TASKS = dict.fromkeys(NAMES, Task(labels="choices", official=humanvbench))


def rows(root: Path, *, group: str = "all") -> Iterator[dict[str, Any] | Excluded]:
    """One row per question; ``group``: all, emotion, person, behavior or speech."""
    need_option("group", group, ("all", *GROUPS))
    known = {name.lower(): name for name in NAMES}
    folder = root / "for_Eval" if (root / "for_Eval").is_dir() else root
    for file in tables(folder, "*.jsonl"):
        task = known.get(file.stem.lower())
        if task is None:
            yield Excluded(file.name, "unknown task")
        elif group == "all" or task in GROUPS[group]:
            more = partial(_more, root=root, task=task)
            prefix = f"humanvbench-{task}"
            yield from choice_rows(read_table(file), more, prefix=prefix, answer="letter")


def _more(values: Values, choice: Choice, *, root: Path, task: str) -> dict[str, Any] | Excluded:
    folders = (task, f"HumanVBench_videos/{task}", f"videos/{task}", "", "videos")
    clip = media_path(root, values.get("Video"), *folders)
    if clip is None:
        return Excluded(f"{task}: {choice.question[:60]}", "no clip")
    return {"video": clip, "audio": clip, "task": task}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
