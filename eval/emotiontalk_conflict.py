"""EmotionTalk's conflict subsets: emotion where voice and picture were labelled differently.

EmotionTalk (arXiv 2505.23018) has separate labels of the voice, the picture, the words and the
whole of each utterance. CA-MER's rule (``mmemo/data/conflict.py``) splits its clips into
video-aligned, audio-aligned and consistent ones. Accuracy is over the release's seven classes.

The release is licensed under CC BY-NC-SA 4.0; you need your own copy of its labels and clips. The
labels have one of two forms. Both have one manifest for the whole, one for the voice and one for
the picture, given in any order:

- ``mm.csv``, ``audio.csv`` and ``video.csv`` (``file_name,emotion``) of the released code;
- the folders ``Multimodal/json``, ``Audio/json`` and ``Video/json`` of the released data, with one
  JSON file per utterance.

The media root is the folder of the clips (``Multimodal/mp4``), or one that contains it.

    mmemo eval eval/emotiontalk_conflict.py --model MODEL --data EmotionTalk
    mmemo eval eval/emotiontalk_conflict.py --model MODEL --data mm-process --media-root CLIPS
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mmemo.answers.parsing import label_set
from mmemo.data.manifest import DataConfig
from mmemo.data.releases.conflict_files import find_tables as find_data
from mmemo.data.releases.conflict_files import read_utterances
from mmemo.data.sample import Sample
from mmemo.evaluation.task import Excluded, Task, ask

__all__ = ["DEFAULTS", "TASKS", "find_data", "samples"]
SPLITS = {"val": ("G00001", "G00012"), "test": ("G00003", "G00015")}
"""Sessions of the published splits; all others are ``train``."""
QUESTION = (
    "Which emotion does the speaker in the clip feel? Consider both the face and the voice. Answer "
    "with one of these words only: {labels}."
)
TASKS = {"emotion": Task(labels="emotiontalk", question=QUESTION)}
DEFAULTS: Mapping[str, Any] = {
    "data": {"modalities": ["video", "audio"]},
    "per_device_eval_batch_size": 8,
}


def samples(
    data: DataConfig, *, split: str = "test", question: str | None = None
) -> Iterator[Sample | Excluded]:
    """The utterances of the three subsets. ``split``: test, val, train or all; ``question``
    replaces the text of the task."""
    known = label_set("emotiontalk")
    utterances, left = read_utterances(data, classes=known, splits=SPLITS, split=split)
    yield from left
    for one in utterances:
        yield ask(one, "emotion", TASKS, question)


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
