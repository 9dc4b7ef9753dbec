"""MME-Emotion: recognition and reasoning in 6,500 clips and eight tasks, rated by a judge.

(Zhang et al., arXiv 2508.09210), MIT for the code; get the questions from
https://github.com/FunAudioLLM/MME-Emotion and the clips from
https://huggingface.co/datasets/Karl28/MME-Emotion. Layout of --data::

    MME-Emotion-Dataset/ER-Lab/question/ER_Lab.json       video_id, label, label_set
    MME-Emotion-Dataset/ER-Lab/audio_clue/ER_Lab_....json  video_id, audio_clue: shown to the judge
    IEMOCAP/video/....mp4                                 the clips, as `video_id` names them

Assumed: the clips' folder (the root, ``videos`` or the task's). The question is ours.

The judge lists the steps of each answer and says which are right: recognition is the last step,
reasoning the mean of the others, CoT the mean of both. In the release one model lists the steps and
another, which also sees frames, rates them; ours does both at once, and sees the audio clue only.
`official` leaves out answers whose rating cannot be read; ours counts them as 0.

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
from mmemo.data.choices import manifest_rows, media_path, text_of
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.judge import left_out
from mmemo.evaluation.task import Task

COLUMNS = ("task", "gold", "facts")
PUBLISHED = {"": {"": 6500}}
WHAT = {
    "ER-Lab": "emotion",
    "ER-Wild": "emotion",
    "Noise-ER": "emotion",
    "FG-ER": "emotion",
    "ML-ER": "emotions",
    "SA": "sentiment",
    "FG-SA": "sentiment",
    "IR": "intent",
}
QUESTION = (
    "What {what} does the person in the video show? Explain step by step what you see in the face "
    "and hear in the voice and the words, and end with your conclusion. Choose from: {labels}."
)
RATED = "The steps by which an answer reasons about a person in a video, and its conclusion."
JUDGE = use("judge", name="mme", form="steps", shown="all", criterion=RATED)
OPEN = Task(answers=Text(), scorers=(JUDGE,), official=left_out("mme", "steps"))
TASKS = dict.fromkeys(WHAT, OPEN)


def rows(root: Path) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip of each task."""
    for task in WHAT:
        folder = root / "MME-Emotion-Dataset" / task
        heard = [one for file in folder.glob("audio_clue/*.json") for one in read_table(file)]
        told = [one for one in heard if not isinstance(one, Excluded)]
        clues = {text_of(one, "video_id"): text_of(one, "audio_clue") for one in told}
        for file in tables(folder / "question") if folder.is_dir() else ():
            make = partial(_row, root=root, task=task, clues=clues)
            yield from manifest_rows(read_table(file), make, prefix=f"mme-{task}")


def _row(
    values: Values, name: str, *, root: Path, task: str, clues: dict[Any, str | None]
) -> dict[str, Any] | Excluded:
    video, label = text_of(values, "video_id"), text_of(values, "label")
    given = values.get("label_set")
    labels = [str(one).strip() for one in given] if isinstance(given, list) else []
    clip = media_path(root, video, "", "videos", task)
    if clip is None or label is None:
        return Excluded(name, "no clip or label")
    named = {one.strip().lower() for one in label.split(",")}
    if labels and not named <= {one.lower() for one in labels}:
        return Excluded(name, "label outside the set", label)
    asked = QUESTION.format(what=WHAT[task], labels=", ".join(labels) or "your own words")
    clue = clues.get(video)
    row = {"video": clip, "audio": clip, "prompt": asked, "task": task, "gold": label}
    return {**row, "facts": f"what can be heard: {clue}"} if clue else row


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
