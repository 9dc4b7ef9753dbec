"""Emotion where voice and face disagree, on the held-out speakers of the synthetic world.

The conflict set has the form of CA-MER (MoSEAR, arXiv 2508.01181): equal numbers of video-aligned,
audio-aligned and consistent clips, whose mean accuracy is the headline. The world's probes, in the
form of EmoReAlM (arXiv 2602.07054), may be given as well. Each kind of probe is a task of its own:
``basic_video`` and ``basic_audio`` (which of four cues is present), ``modality_agreement``, and
``stress_video`` and ``stress_audio`` (does a cue support an emotion, or is it imagined).

``mmemo world`` makes the data. Run the benchmark with ``mmemo eval``; the script itself only prints
the questions and checks their scoring:

    python eval/world_conflict.py MANIFEST...
"""

from __future__ import annotations

import sys
from collections import Counter

from mmemo.answers.parsing import LabelSet, emotion_labels, yes_no
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample
from mmemo.errors import EvaluationError, MmemoError

PROBES = ("basic_video", "basic_audio", "modality_agreement", "stress_video", "stress_audio")
COLUMNS = ("task", "gold", "probe_kind")
EMOTIONS = emotion_labels(["happy", "sad", "angry", "fear", "surprise", "neutral"])
YES_NO = yes_no()
CHOICES = LabelSet(("A", "B", "C", "D"))


def samples(data: DataConfig) -> list[Sample]:
    """The conflict set, then the probes by kind, each in the order of its manifest."""
    columns = [*data.columns, *(name for name in COLUMNS if name not in data.columns)]
    rows = load_samples(data.model_copy(update={"columns": columns}))
    order = {name: index for index, name in enumerate(("emotion", *PROBES))}
    return sorted(rows, key=lambda row: order.get(task(row), len(order)))  # a stable sort


def task(sample: Sample) -> str:
    """``emotion``, or the kind of probe."""
    return str(sample.columns.get("task", "emotion"))


def labels(sample: Sample) -> LabelSet:
    """The six emotions, the four letters, or yes and no."""
    if task(sample) == "emotion":
        return EMOTIONS
    return CHOICES if task(sample).startswith("basic") else YES_NO


def truth(sample: Sample) -> str:
    """The emotion of the clip, or the gold answer of a probe."""
    found = sample.truth.label if task(sample) == "emotion" else sample.columns.get("gold")
    if found is None:
        what = "'label'" if task(sample) == "emotion" else "'gold'"
        raise EvaluationError(f"{sample.sample_id} has no {what}; this benchmark requires it")
    return str(found)


def main() -> None:
    """Print the questions of the benchmark, and check their scoring."""
    from mmemo.evaluation.benchmark import load_benchmark, validate

    if not sys.argv[1:]:
        raise EvaluationError("no manifests given; use python eval/world_conflict.py MANIFEST...")
    benchmark = load_benchmark(__file__)
    questions = benchmark.questions(DataConfig(manifests=sys.argv[1:]))
    validate(benchmark, questions)
    for name in dict.fromkeys(question.task for question in questions):
        asked = [question for question in questions if question.task == name]
        print(f"\n{name}: {len(asked)} questions; {asked[0].turns[-1].text!r}")
        print("  truth ", dict(Counter(question.truth for question in asked)))
        print("  subset", dict(Counter(str(q.sample.truth.conflict) for q in asked)))
    print("\nEvery right answer scores 1; empty answers and lists of all labels score 0.")


if __name__ == "__main__":
    try:
        main()
    except MmemoError as error:
        sys.exit(f"error: {error}")
