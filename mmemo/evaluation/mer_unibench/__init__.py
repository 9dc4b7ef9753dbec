"""MER-UniBench (AffectGPT, arXiv 2501.16566): its official scores, and words by an endpoint."""

from mmemo.evaluation.mer_unibench.scores import (
    MODES,
    PRIMARY,
    QUESTION,
    Recorded,
    aligned,
    official_of_rows,
    official_score,
    read_recorded,
    summary,
    tasks,
)

__all__ = [
    "MODES",
    "PRIMARY",
    "QUESTION",
    "Recorded",
    "aligned",
    "official_of_rows",
    "official_score",
    "read_recorded",
    "summary",
    "tasks",
]
