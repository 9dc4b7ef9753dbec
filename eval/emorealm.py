"""EmoReAlM: are a model's emotion answers grounded in cues of the clip, or does it imagine them?

EmoReAlM (AVERE, arXiv 2602.07054) has five tasks: ``reasoning_basic_audio`` and ``_video`` (which
of four cues is present), ``modality_agreement``, and ``reasoning_stress_audio`` and ``_video`` (yes
or no). The headline is the unweighted mean of the five accuracies. The data has one of two forms:

- the released questions, a JSON list of ``{id, video, task, question, choices, answer}``. They are
  about clips of DFEW, of which you need your own copy under the media root;
- the probes that ``mmemo world`` writes (``test_probes.jsonl``), which become the same five tasks.

Run it as

    mmemo eval eval/emorealm.py --model MODEL --data emorealm_v1.json --media-root DFEW

or with the config ``train_configs/benchmarks/emorealm.yaml``.

Every answer is read three times, and the results are kept apart: ``verdict`` and ``strict`` are the
two readings of this suite (:mod:`mmemo.answers.parsing`), and ``official`` does what the released
scripts do, so that its numbers can be compared with published ones. Their regular expression takes
an answer for right if the right letter occurs in it as a word, even as the article "a" or as one of
several letters, and takes "Yes" without its letter for wrong. An answer to a yes-or-no question
that is not right counts as the opposite answer, whatever it says.
"""

import sys

from mmemo.answers.parsing import Parsed
from mmemo.data.manifest import DataConfig
from mmemo.data.releases.lettered_choices import (
    Release,
    letters,
    read_questions,
    released_reading,
    yes_or_no,
)
from mmemo.data.sample import Sample
from mmemo.evaluation.benchmark import STRICT, VERDICT, Question, Reading
from mmemo.evaluation.task import Task

CUE, YES_NO = Task(labels=letters), Task(labels=yes_or_no)
TASKS = {
    "reasoning_basic_audio": CUE,
    "reasoning_basic_video": CUE,
    "modality_agreement": YES_NO,
    "reasoning_stress_audio": YES_NO,
    "reasoning_stress_video": YES_NO,
}
CLOSED = [name for name, task in TASKS.items() if task is YES_NO]
WORLD = {name.removeprefix("reasoning_"): name for name in TASKS}


def samples(
    data: DataConfig, *, video_dir: str = "", audio_dir: str | None = None, instruction: str = ""
) -> list[Sample]:
    """The questions, with the folders under the media root that contain the release's
    ``part_1/1.mp4`` (and ``part_1/1.wav``; None uses the sound of the videos), and a text after the
    choices, such as "Answer with the letter only."; the release has none."""
    release = Release("EmoReAlM", tuple(TASKS), CLOSED, WORLD, video_dir, audio_dir, instruction)
    return read_questions(data, release)


def official(raw: str, question: Question) -> Parsed:
    """Reads an answer as the released scripts do."""
    return released_reading(raw, str(question.sample.columns["key"]), question.truth)


WHAT = (
    "the released regular expression: right where the letter of the right choice is a word of the "
    "answer"
)
readings = (VERDICT, STRICT, Reading("official", WHAT, missing="skipped", read=official))

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
