"""``mmemo pairs``: builds preference pairs, gives them negatives, and reports their faults."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from mmemo import content, files
from mmemo.config import save_resolved
from mmemo.console import console
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.preference import Negative, Side, load_preferences
from mmemo.data.sample import Sample
from mmemo.errors import DataError
from mmemo.pairs.config import CaptionSource, ModelSource, PairsConfig
from mmemo.pairs.negatives import Negatives
from mmemo.pairs.report import pairs_report, print_report
from mmemo.pairs.rows import PairDraft, SkippedRows, one_channel, row_of
from mmemo.pairs.truth import from_truth
from mmemo.run_log import RunRecord

__all__ = ["FILE", "REPORT", "PairsConfig", "run_pairs"]

FILE, REPORT = "pairs.jsonl", "report.json"


def run_pairs(config: PairsConfig) -> Path:
    """Write ``pairs.jsonl`` and ``report.json``, and return the path of ``pairs.jsonl``.

    Raises:
        DataError: no row gives a pair, or the report has a problem that is not allowed. In the
            second case both files have been written.
    """
    folder = Path(config.output_dir)
    save_resolved(config, folder / "config.yaml")
    record = RunRecord(folder)
    samples = load_samples(config.data)
    record.event(
        "manifests",
        rows=len(samples),
        files={name: content.sha256(Path(name)) for name in config.data.manifests},
    )
    skipped = SkippedRows()
    drafts = _drafts(config, samples, skipped, record)
    if not drafts:
        reasons = ", ".join(f"{name} {count}" for name, count in skipped.counts.items())
        raise DataError(f"no row gives a pair ({reasons or 'no rows'}); check the config's source")
    negatives = Negatives(config.negatives, samples, config.seed)
    chosen = [negatives.choose(draft) for draft in drafts]
    sources: dict[str, tuple[str, ...]] = {}
    if config.negatives.level == "media":
        chosen, sources = _written(config, drafts, chosen, negatives, record)
    rows = [row_of(draft, found) for draft, found in zip(drafts, chosen, strict=True)]
    path = folder / FILE
    files.write_rows(path, rows, ensure_ascii=False)
    # The report reads the written file as training will, and not the drafts.
    columns = [name for name in config.data.columns if name != "query_modality"]
    pairs = load_preferences(DataConfig(manifests=[str(path)], columns=columns))
    report: dict[str, Any] = {
        **pairs_report(config, pairs, sources),
        "left_out": dict(sorted(skipped.counts.items())),
        "left_out_examples": skipped.examples,
        "channels": skipped.channels,
        "no_rejected": dict(sorted(skipped.missing.items())),
        "without": dict(negatives.without),
        "given_up": dict(sorted(negatives.given_up.items())),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    files.write_whole(folder / REPORT, text + "\n")
    print_report(report)
    record.event(
        "pairs",
        file=path,
        sha256=content.sha256(path),
        pairs=len(rows),
        guessed_channels=skipped.channels.get("guessed", {}),
        unknown_channels=skipped.channels.get("unknown", {}),
    )
    console.print(Text.assemble("Pairs: ", (str(path), "bold")), soft_wrap=True)
    if report["problems"]:
        problems = "; ".join(report["problems"])
        raise DataError(f"{problems} (or list the check in report.allow)", file=str(path))
    return path


def run_pairs_stage(config: PairsConfig) -> Path | None:
    """:func:`run_pairs`; or, in one of several processes, its share of a model's answers, which
    :func:`run_pairs` then finds.

    Raises:
        DataError: as :func:`run_pairs`.
    """
    size, rank = (
        int(os.environ.get(name, one)) for name, one in (("WORLD_SIZE", "1"), ("RANK", "0"))
    )
    if size == 1:
        return run_pairs(config)
    from mmemo.pairs.sampled import PARTS, sample_share

    assert isinstance(config.source, ModelSource)  # which the config has checked
    # What each process notes, of its clips too, stays out of the others' files.
    record = RunRecord(Path(config.output_dir) / PARTS / f"rank-{rank}")
    samples = _paired(config, load_samples(config.data), SkippedRows())
    sample_share(config, config.source, samples, record, (rank, size))
    return None


def _written(
    config: PairsConfig,
    drafts: Sequence[PairDraft],
    chosen: Sequence[Mapping[Side, Negative]],
    negatives: Negatives,
    record: RunRecord,
) -> tuple[list[dict[Side, Negative]], dict[str, tuple[str, ...]]]:
    """The negatives as files. One that cannot be written is left out, counted and recorded."""
    from mmemo.pairs.written import write_negatives

    made = write_negatives(config, drafts, chosen)
    for side, negative, detail in made.failed:
        negatives.without[side] += 1
        negatives.given_up[negative.kind] += 1
        record.event("negative_not_written", side=side, made_by=negative.kind, detail=detail)
    record.event("negatives_written", files=len(made.sources), kept=made.kept)
    return made.negatives, made.sources


def _drafts(
    config: PairsConfig, samples: Sequence[Sample], skipped: SkippedRows, record: RunRecord
) -> list[PairDraft]:
    source, samples = config.source, _paired(config, samples, skipped)
    if isinstance(source, ModelSource):
        from mmemo.pairs.sampled import from_model

        return from_model(config, source, samples, skipped, record)
    if isinstance(source, CaptionSource):
        from mmemo.pairs.captions import from_captions

        return from_captions(config, source, samples, skipped, record)
    return from_truth(samples, source, config.queries, config.seed, skipped)


def _paired(
    config: PairsConfig, samples: Sequence[Sample], skipped: SkippedRows
) -> Sequence[Sample]:
    """The rows that may give pairs."""
    if config.one_channel:
        return samples
    kept = [one for one in samples if one_channel(one.media) is None]
    for sample in samples:
        if one_channel(sample.media) is not None:
            skipped.add("one_channel", sample.sample_id)
    return kept
