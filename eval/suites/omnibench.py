"""OmniBench: a picture and a sound that only together answer a question with four choices.

1,142 questions (Li et al., arXiv 2409.15272); get them with their files from
https://github.com/multimodal-art-projection/OmniBench, where the licence stands. Layout of --data::

    dataset/batch-5_1142_20240817.jsonl    index, task type, audio type, question, options, answer,
                                           audio_path, image_path, audio content, image content
    mm_data/audio/1_1.mp3  mm_data/image/1_001.png

``answer`` is the text of an option. mmemo shows clips, no pictures: make one of each picture, and
name the folder (``picture=mm_data/clips``, the default), or ask about the release's description of
it (``picture=content``), as lmms-eval's task ``omni_bench_image_caption`` does::

    for f in mm_data/image/*; do ffmpeg -loop 1 -i "$f" -t 1 -r 2 -pix_fmt yuv420p \\
        -vf "crop=trunc(iw/2)*2:trunc(ih/2)*2" mm_data/clips/"$(basename "${f%.*}")".mp4; done

Accuracy, also by type of task and sound; `official` is the release's way of finding a letter.

    mmemo eval eval/suites/omnibench.py --data OMNIBENCH --model MODEL --option picture=content
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded
from mmemo.data.choices import Choice, choice_rows, groups_of, media_path, text_of
from mmemo.data.tables import Values, read_table, tables
from mmemo.evaluation.released.letters import omnibench
from mmemo.evaluation.task import Task

COLUMNS = ("gold", "choices")
PUBLISHED = {"": {"": 1142}, "picture=content": {"": 1142}}
TASKS = {
    "omnibench": Task(labels="choices", official=omnibench, slices=("task_type", "audio_type"))
}


def rows(root: Path, *, picture: str = "mm_data/clips") -> Iterator[dict[str, Any] | Excluded]:
    """One row per question; ``picture``: the folder of the pictures' clips, or content."""

    def more(values: Values, choice: Choice) -> dict[str, Any] | Excluded:
        sound = media_path(root, values.get("audio_path"), "mm_data/audio")
        image, content = text_of(values, "image_path"), text_of(values, "image_content")
        if sound is None or image is None or (picture == "content" and content is None):
            return Excluded(f"omnibench-{text_of(values, 'index')}", "no sound or picture")
        row: dict[str, Any] = {"audio": sound}
        if picture == "content":
            row["prompt"] = f"What the picture shows: {content}\n{choice.question}"
        else:
            row["video"] = media_path(root, f"{Path(image).stem}.mp4", picture)
        types = groups_of(values, task_type="task_type", audio_type="audio_type")
        return {**row, "group": {name: one.lower() for name, one in types.items()}}

    for file in tables(root / "dataset"):
        yield from choice_rows(read_table(file), more, prefix="omnibench", answer="text")


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
