"""Measured numbers, and the likeness of voices, by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mmemo.data.sample import MediaRef, Sample, Turn
from mmemo.errors import EvaluationError, MediaError
from mmemo.evaluation.scorer import score_with, use
from mmemo.evaluation.scorers.measured import voice_similarity
from mmemo.statistics import BootstrapConfig


def test_means_leave_out_what_was_not_measured() -> None:
    rows = [
        {"sample_id": str(place), "media": {}, "group": {}, **({"measured": own} if own else {})}
        for place, own in enumerate(({"a": 1.0, "b": 0.5}, {"a": 0.0, "b": None}, None))
    ]
    found = score_with([use("measured", names=["a", "b"])], rows, BootstrapConfig(resamples=100))
    assert (found["a"]["value"], found["a"]["n"], found["a"]["unscored"]) == (0.5, 2, 1)
    assert found["b"]["value"] == 0.5
    for names in ([], ["a", "a"]):
        with pytest.raises(EvaluationError, match="different names"):
            use("measured", names=names).load()


FEATURES = {
    "own.wav": torch.tensor([[3.0, 0.0], [0.0, 4.0]]),  # mean (1.5, 2)
    "target.wav": torch.tensor([[0.0, 2.0]]),
    "layers.wav": torch.tensor([[[9.0, 9.0]], [[-2.0, 1.5]]]),  # the last layer is orthogonal
    "zero.wav": torch.zeros(3, 2),
}


def encode(sample: Sample) -> Mapping[Any, Mapping[str, Any]]:
    path = sample.media["audio"].path
    if path not in FEATURES:
        raise MediaError(path, "missing", "is not there")
    return {"audio": {"x": FEATURES[path]}}


def sample(**columns: Any) -> Sample:
    return Sample("a", (Turn("user", "<audio>?"),), {"audio": MediaRef("own.wav")}, columns=columns)


def test_the_cosine_of_mean_embeddings() -> None:
    found = voice_similarity(encode, sample(target="target.wav", other="layers.wav"))
    assert found["similarity"] == pytest.approx(2 / math.sqrt(1.5**2 + 2**2))
    assert found["similarity_to_other"] == pytest.approx(0, abs=1e-9)
    lost = voice_similarity(encode, sample(target="gone.wav", other="zero.wav"))
    assert lost == {"similarity": None, "similarity_to_other": None}
    assert voice_similarity(encode, sample())["similarity"] is None
    with pytest.raises(EvaluationError, match="no audio"):
        voice_similarity(encode, Sample("a", (), {}))
