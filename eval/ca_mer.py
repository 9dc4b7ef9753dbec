"""CA-MER: emotion where voice and picture disagree; also other data with labels of both.

CA-MER (MoSEAR, arXiv 2508.01181; ask its authors) has 500 clips in each of ``video-aligned.json``,
``audio-aligned.json`` and ``consistent.json``, beside folders of the same names. Any other table
with labels of voice, picture and whole clip is split by its rule (``mmemo/data/releases``). Tasks:
``emotion``, the accuracy over nine classes (VISTA, arXiv 2609.37324), and ``open_vocabulary``, the
precision (called Acc), recall, average and F1 of free words, which cannot be compared with it.

    mmemo eval eval/ca_mer.py --model MODEL --data CA-MER
    mmemo eval eval/ca_mer.py --model MODEL --data meta.csv --benchmark.params.audio_key=label_A
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmemo.answers.kinds import Text
from mmemo.answers.parsing import emotion_labels, label_set
from mmemo.data.manifest import DataConfig
from mmemo.data.releases.conflict_tables import find_subsets as find_data
from mmemo.data.releases.conflict_tables import read_clips
from mmemo.data.sample import Sample
from mmemo.evaluation.scorers.open_words import word_scores, words
from mmemo.evaluation.task import Excluded, Task, ask

__all__ = ["DEFAULTS", "TASKS", "find_data", "samples", "words"]
ASKED = "Which {} the person in the clip feel? Consider both the face and the voice. Answer with "
ONE = ASKED.format("emotion does") + "one of these words only: {labels}."
OPEN = ASKED.format("emotions does") + "emotion words only, separated by commas."
TASKS = {
    "emotion": Task(labels=lambda clip: clip.columns["classes"], question=ONE),
    "open_vocabulary": Task(answers=Text(), question=OPEN),
}
DEFAULTS: Mapping[str, Any] = {
    "benchmark": {"params": {"open_vocabulary": True}},
    "scores": word_scores("eval/ca_mer.py:words"),
    "data": {"modalities": ["video", "audio"]},
    "per_device_eval_batch_size": 8,
}


def samples(
    data: DataConfig,
    *,
    open_vocabulary: bool = False,
    classes: str | Sequence[str] = "ca_mer",
    question: str | None = None,
    open_question: str | None = None,
    name_key: str | None = None,
    label_key: str | None = None,
    audio_key: str | None = None,
    video_key: str | None = None,
    speaker_key: str | None = None,
    media: str | None = None,
    label_map: Mapping[Any, str] | None = None,
) -> Iterator[Sample | Excluded]:
    """The clips labelled with one of ``classes`` (a list, or the name of a label set), and then all
    clips with the open question. Other parameters are those of ``read_clips``."""
    keys = (name_key, label_key, audio_key, video_key, speaker_key)
    known = emotion_labels(label_set(classes).labels)
    clips, left = read_clips(data, classes=known, keys=keys, media=media, label_map=label_map)
    yield from left
    why = "no single class" + (", only the open question is asked" if open_vocabulary else "")
    for clip in clips:
        words = ", ".join(clip.truth.labels)
        if clip.truth.label:
            yield ask(clip, "emotion", TASKS, question, classes=known)
        else:
            yield Excluded(clip.sample_id, why, words)
        if open_vocabulary:
            again = replace(clip, sample_id=f"{clip.sample_id}/open")
            yield ask(again, "open_vocabulary", TASKS, open_question, gold=words)


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
