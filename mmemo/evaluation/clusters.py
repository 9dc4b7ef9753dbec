"""The clusters behind the intervals of an evaluation: speakers, or clips without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmemo.evaluation.predictions import Row
from mmemo.formats import counted
from mmemo.statistics import FEW_CLUSTERS, BootstrapConfig, Clusters, carries_p, smallest_p


def cluster_of(row: Row, config: BootstrapConfig) -> str:
    """The cluster that the row's answer belongs to: its speaker, or its media file where the row
    names no speaker."""
    named = row.get("group", {}).get(config.cluster)
    if named is not None:
        # The prefix keeps a speaker apart from a clip of the same name, and tells the kind of
        # cluster.
        return f"{config.cluster}:{named}"
    media = sorted(set(row.get("media", {}).values()))
    return f"media:{media[0]}" if media else f"sample:{row['sample_id']}"


def cluster_words(rows: Sequence[Row], config: BootstrapConfig) -> str:
    """The clusters behind the intervals, in words: ``20 speakers``, or ``18 speakers and 3 clips``
    where some rows name no speaker."""
    names = {cluster_of(row, config) for row in rows}
    kinds = Counter(name.partition(":")[0] for name in names)
    nouns = {"speaker": "speaker", "media": "clip", "sample": "question"}
    return " and ".join(
        counted(kinds[kind], nouns[kind]) if kind in nouns else f"{kinds[kind]} clusters by {kind}"
        for kind in sorted(kinds, key=lambda kind: kind != config.cluster)
    )


def claim_notes(clusters: int, words: str, config: BootstrapConfig, tests: int = 0) -> list[str]:
    """What a reader of intervals and p-values over few clusters must know, in whole sentences.

    Args:
        words: the clusters in words, such as ``7 speakers``.
        tests: the number of p-values that are corrected together; 0 where none are shown.
    """
    if clusters < 2:
        return [f"No interval and no p: all answers come from {words}."]
    notes: list[str] = []
    if clusters < FEW_CLUSTERS:
        notes.append(f"Caution: only {words} stand behind these numbers.")
    least, level = smallest_p(clusters), round(1 - config.confidence, 6)
    if tests and not carries_p(clusters, config):
        notes.append(
            f"No p is given: with {words} it could not fall below {level:g} (the smallest possible "
            f"is {least:.2g})."
        )
    elif tests and tests * least > level:
        notes.append(
            f"With {words}, no p of {tests} can be below {level:g} after Holm's correction."
        )
    return notes


def clusters_of(rows: Sequence[Row], config: BootstrapConfig) -> Clusters:
    """The clusters of some answers."""
    return Clusters([cluster_of(row, config) for row in rows], config)
