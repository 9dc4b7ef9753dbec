"""What the small task asks: the face and the voice, each a task of its own."""

from __future__ import annotations

from mmemo.answers.parsing import LabelSet
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.sample import Sample

LABELS = LabelSet(("sad", "happy"))


def samples(data: DataConfig) -> list[Sample]:
    """The questions of the manifests, in their order."""
    return load_samples(data)


def labels(sample: Sample) -> LabelSet:
    """Sad and happy."""
    return LABELS


def truth(sample: Sample) -> str:
    """What the asked channel shows."""
    return str(sample.truth.label)


def task(sample: Sample) -> str:
    """``face`` or ``audio``, the channel asked about."""
    return sample.sample_id.rpartition("-")[2]
