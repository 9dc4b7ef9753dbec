"""EMER: a person's emotion described with its clues; a judge compares with people's descriptions.

100 clips of MER2023 (Lian et al., arXiv 2306.15401), and 332 in the second version; the tables are
in https://github.com/zeroQiaoba/AffectGPT (EMER), the clips come with MER2023, which must be asked
for; the licences stand there. Layout of --data::

    *.csv          names, emotions, subtitles, reasons; or name(s), chinese, english
    video/*.mp4    or .avi, by the clip's name (assumed: video, videos or the root)

The judge rates from 1 to 10 how far the clues agree (clue overlap), and the emotions (label
overlap). `official` takes the first number of any reply, as the release does, and leaves replies
without one out; ours counts a reply that is not just the rating as 1. Question and criteria are in
our words: the released prompt for clues, in Chinese, compares descriptions of the emotion.

    mmemo eval eval/judged/emer.py --data EMER --model MODEL \\
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
from mmemo.evaluation.released.letters import in_order
from mmemo.evaluation.scorer import use
from mmemo.evaluation.scorers.judge import left_out
from mmemo.evaluation.task import Task

COLUMNS = ("gold", "facts")
QUESTION = (
    "Describe this person's emotional state. Name the clues in the face, the voice and the words, "
    "say what each of them tells, and conclude with the emotion."
)
CLUES = use(
    "judge",
    name="clue_overlap",
    shown="all",
    criterion="How far the clues that the answer names (face, gestures, voice, words) are those of "
    "the known description: its clues are found, and none is invented or contradicted.",
)
EMOTION = use(
    "judge",
    name="label_overlap",
    shown="all",
    criterion="How close the emotion that the answer concludes with is to the known one: sum each "
    "up as one emotion, and compare these two only.",
)
OFFICIAL = in_order(left_out("clue_overlap"), left_out("label_overlap"))
TASKS = {"emer": Task(answers=Text(), scorers=(CLUES, EMOTION), official=OFFICIAL)}


def rows(root: Path, *, table: str = "*.csv") -> Iterator[dict[str, Any] | Excluded]:
    """One row per description; ``table``: the file, where the folder has both versions."""
    for file in tables(root, table):
        yield from manifest_rows(read_table(file), partial(_row, root=root), prefix="emer")


def _row(values: Values, name: str, *, root: Path) -> dict[str, Any] | Excluded:
    clip = text_of(values, "names", "name")
    gold = text_of(values, "english", "reasons", "chinese")
    if clip is None or gold is None:
        return Excluded(clip or name, "no clip or description")
    tried = [media_path(root, f"{clip}{end}", "video", "videos", "") for end in (".mp4", ".avi")]
    found = next((one for one in tried if one and (root / one).is_file()), tried[0])
    row: dict[str, Any] = {"video": found, "audio": found, "prompt": QUESTION, "gold": gold}
    emotions = text_of(values, "emotions")
    return {**row, "facts": f"the emotions: {emotions}"} if emotions else row


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
