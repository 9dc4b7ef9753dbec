"""Emotion where the voice and the face disagree, on the synthetic world's held-out speakers.

The conflict set has CA-MER's form (MoSEAR, arXiv 2508.01181): equal numbers of video-aligned,
audio-aligned and consistent clips; the headline is the mean of the three accuracies. The world's
probes (EmoReAlM's form, arXiv 2602.07054) may stand beside it; each kind is a task of its own:
``basic_video`` and ``basic_audio`` (which of four cues is there), ``modality_agreement``,
``stress_video`` and ``stress_audio`` (does a cue support an emotion, or is it imagined).

    python eval/world_conflict.py MANIFEST...    prints the questions and proves the scoring
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
    """The conflict set first, then the probes by kind, each in its manifest's order."""
    columns = [*data.columns, *(name for name in COLUMNS if name not in data.columns)]
    rows = load_samples(data.model_copy(update={"columns": columns}))
    order = {name: index for index, name in enumerate(("emotion", *PROBES))}
    return sorted(rows, key=lambda row: order.get(task(row), len(order)))  # a stable sort


def task(sample: Sample) -> str:
    """``emotion``, or the kind of probe."""
    return str(sample.columns.get("task", "emotion"))


def labels(sample: Sample) -> LabelSet:
    """The six emotions, four letters, or yes and no."""
    if task(sample) == "emotion":
        return EMOTIONS
    return CHOICES if task(sample).startswith("basic") else YES_NO


def truth(sample: Sample) -> str:
    """The clip's emotion; a probe's gold answer."""
    found = sample.truth.label if task(sample) == "emotion" else sample.columns.get("gold")
    if found is None:
        what = "'label'" if task(sample) == "emotion" else "'gold'"
        raise EvaluationError(f"{sample.sample_id} has no {what}; this benchmark needs one")
    return str(found)


def main() -> None:
    """Show what the benchmark asks, and check that its scoring is sound."""
    from mmemo.evaluation.benchmark import load_benchmark, validate

    if not sys.argv[1:]:
        raise EvaluationError("name the manifests: python eval/world_conflict.py MANIFEST...")
    benchmark = load_benchmark(__file__)
    questions = benchmark.questions(DataConfig(manifests=sys.argv[1:]))
    validate(benchmark, questions)
    for name in dict.fromkeys(question.task for question in questions):
        asked = [question for question in questions if question.task == name]
        print(f"\n{name}: {len(asked)} questions; {asked[0].turns[-1].text!r}")
        print("  truth ", dict(Counter(question.truth for question in asked)))
        print("  subset", dict(Counter(str(q.sample.truth.conflict) for q in asked)))
    print("\nEvery right answer scores 1, an empty one 0, a list of all labels is malformed.")


if __name__ == "__main__":
    try:
        main()
    except MmemoError as error:
        sys.exit(f"error: {error}")
