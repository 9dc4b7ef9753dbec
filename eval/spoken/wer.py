"""A scorer of transcripts: word error rate, (S + D + I) / N over all words, by jiwer.

``use("eval/spoken/wer.py:wer")``. Case and punctuation do not count. An answer that cannot be read
is an empty text, whose words are all deleted. Insertions may take the rate above 1. The reference
is the first text of the truth.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmemo.errors import EvaluationError
from mmemo.evaluation.metrics import ratio
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scorer import Mask, Metric, Scorer
from mmemo.statistics import Floats


def wer() -> Scorer:
    """The scorer; sums (..., 2) of word errors and words of the reference.

    Raises:
        EvaluationError: jiwer is not installed.
    """
    try:
        import jiwer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise EvaluationError("word error rates need jiwer; pip install jiwer") from error
    process: Any = jiwer.process_words

    def values(rows: Sequence[Row]) -> tuple[Floats, Mask]:
        found = np.zeros((len(rows), 2))
        for place, row in enumerate(rows):
            truth = row["truth"]
            words = plain(str(truth[0] if isinstance(truth, list) else truth))  # pyright: ignore[reportUnknownArgumentType]
            given = plain(str(row["answer"] or ""))
            if words and given:
                done = process(" ".join(words), " ".join(given))
                errors = done.substitutions + done.deletions + done.insertions
            else:
                errors = len(words) + len(given)
            found[place] = errors, len(words)
        return found, np.ones(len(rows), dtype=np.bool_)

    def rate(sums: Floats) -> Floats:
        return ratio(sums[..., 0], sums[..., 1], np.nan)

    return Scorer(values, {"wer": Metric(rate, limits=(0, np.inf), lower_is_better=True)})


def plain(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.sub(r"[^\w\s']|_", " ", unicodedata.normalize("NFKC", text).casefold()).split()
