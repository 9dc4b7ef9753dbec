"""MME-Emotion: recognition and reasoning in 6,500 clips and eight tasks, rated by a judge.

(Zhang et al., arXiv 2508.09210), code MIT; get https://github.com/FunAudioLLM/MME-Emotion and the
clips of https://huggingface.co/datasets/Karl28/MME-Emotion. Layout of --data::

    MME-Emotion-Dataset/ER-Lab/question/ER_Lab.json       video_id, label, label_set
    MME-Emotion-Dataset/ER-Lab/audio_clue/ER_Lab_....json  video_id, audio_clue: for the judge
    IEMOCAP/video/....mp4                                 assumed: in the root, videos or the task's

The judge lists the steps of each answer and says which are right: recognition is the last step,
reasoning the mean of the others, CoT the mean of both. The release lets two models do this, one of
which sees frames. `official` leaves out unreadable ratings; ours counts them as 0.

    mmemo eval eval/judged/mme_emotion.py --data MME_EMOTION --model MODEL \\
        --benchmark.judge.base_url=http://localhost:8000/v1 --benchmark.judge.model=NAME
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmemo.answers.kinds import Text
from mmemo.data.adapter import Excluded
from mmemo.data.choices import manifest_rows, media_path, text_of, texts_of
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.judge import left_out
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "facts")
PUBLISHED = {"": {"": 6500}}
WHAT: dict[str, str] = {
    **dict.fromkeys(("ER-Lab", "ER-Wild", "Noise-ER", "FG-ER"), "emotion"),
    "ML-ER": "emotions",
    "SA": "sentiment",
    "FG-SA": "sentiment",
    "IR": "intent",
}
QUESTION = (
    "What {} does the person show? Explain step by step what face, voice and words tell, and end "
    "with your conclusion. Choose from: {}."
)
RATED = "The steps by which an answer reasons about a person in a video, and its conclusion."
JUDGE = use("judge", name="mme", form="steps", shown="all", criterion=RATED)
OFFICIAL = left_out("mme", "steps")
TASKS = dict.fromkeys(WHAT, Task(answers=Text(), scorers=(JUDGE,), official=OFFICIAL))
Row = dict[str, Any] | Excluded


def rows(root: Path) -> Iterator[Row]:
    """One row per clip of each task."""
    for task in WHAT:
        folder = root / "MME-Emotion-Dataset" / task
        heard = (one for file in folder.glob("audio_clue/*.json") for one in read_table(file))
        told = (one for one in heard if not isinstance(one, Excluded))
        clues = {text_of(one, "video_id"): text_of(one, "audio_clue") for one in told}
        for file in tables(folder / "question") if folder.is_dir() else ():
            make = partial(_row, root=root, task=task, clues=clues)
            yield from manifest_rows(read_table(file), make, prefix=f"mme-{task}")


def _row(values: Values, name: str, *, root: Path, task: str, clues: dict[Any, Any]) -> Row:
    video, label = text_of(values, "video_id"), text_of(values, "label")
    named, known = (texts_of(values, column) for column in ("label", "label_set"))
    clip = media_path(root, video, "", "videos", task)
    if clip is None or label is None:
        return Excluded(name, "no clip or label")
    if not {one.lower() for one in named} <= {one.lower() for one in known}:
        return Excluded(name, "label outside the set", label)
    asked = QUESTION.format(WHAT[task], ", ".join(known))
    row = {"video": clip, "audio": clip, "prompt": asked, "task": task, "gold": label}
    return {**row, "facts": f"what can be heard: {clues[video]}"} if clues.get(video) else row


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
