"""The curriculum: which rows an epoch uses, and how they are batched.

The plan is a pure function of the samples, the config, the seed and the epoch, so a resumed run
needs no random state and every rank computes the same plan.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from mmemo.config import Config
from mmemo.data.sample import Sample
from mmemo.errors import DataError


class CurriculumConfig(Config):
    """The order in which a stage trains on its rows."""

    tiers: list[str] | None = None
    """Tiers that this stage trains on. None mixes all rows without a curriculum (the ablation)."""
    tier_order: list[str] = ["attribute", "expression", "emotion"]
    """All tiers from early to late. Replay draws from the tiers before the stage's first tier."""
    replay_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of an epoch's rows that are replayed from earlier tiers, resampled every epoch."""
    order: Literal["shuffle", "difficulty"] = "shuffle"
    """``difficulty`` trains on easy rows first, except for the batch of ``longest_first``."""
    group_by_length: bool = True
    """Batch rows of similar length together, which reduces padding."""
    mega_batches: int = Field(default=32, ge=1)
    """Number of batches within which rows are sorted by length; at most 4 if ``order`` is
    ``difficulty``."""
    longest_first: bool = True
    """Start with the batch that needs the most memory, so that a lack of memory shows early."""

    @model_validator(mode="after")
    def _replay_needs_tiers(self) -> CurriculumConfig:
        if self.replay_share > 0 and not self.earlier():
            raise ValueError("replay_share needs tiers that come after others in tier_order")
        return self

    def earlier(self) -> list[str]:
        """The tiers before this stage's first one."""
        places = [self.tier_order.index(t) for t in self.tiers or () if t in self.tier_order]
        return self.tier_order[: min(places)] if places else []


def plan_epoch(
    samples: Sequence[Sample],
    config: CurriculumConfig,
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Plan the batches of one epoch as indices into ``samples``. Only the last batch may be short.

    Args:
        lengths: number of tokens of each sample, in the order of ``samples``.

    Raises:
        DataError: no row has one of the stage's tiers, or a row lacks the difficulty to order by.
    """
    if len(lengths) != len(samples):
        raise ValueError(f"{len(samples)} samples but {len(lengths)} lengths")
    rows = _epoch_order(samples, config, seed, epoch)
    if config.group_by_length:
        # Sorting a long span by length would undo the order by difficulty.
        most = min(config.mega_batches, 4) if config.order == "difficulty" else config.mega_batches
        span = most * batch_size
        megas = [rows[start : start + span] for start in range(0, len(rows), span)]
    else:
        megas = [rows]
    batches: list[list[int]] = []
    for number, mega in enumerate(megas):
        if config.group_by_length:
            mega = sorted(mega, key=lambda index: -lengths[index])  # stable: ties stay shuffled
        cut = [mega[start : start + batch_size] for start in range(0, len(mega), batch_size)]
        if config.group_by_length:
            # A short batch stays at the end: only the last one of an epoch may be short.
            short = [cut.pop()] if len(cut[-1]) < batch_size else []
            # Otherwise each span would be trained on from its longest rows to its shortest.
            _random(seed, epoch, f"batches {number}").shuffle(cut)
            cut += short
        batches += cut
    if config.longest_first and len(batches) > 1:
        # Only full batches count, because a short one must stay last.
        full = [place for place, batch in enumerate(batches) if len(batch) == batch_size]
        worst = max(full, key=lambda place: max(lengths[index] for index in batches[place]))
        # The padded width, and so the memory, is decided by the longest row of a batch.
        batches.insert(0, batches.pop(worst))
    return batches


def stage_rows(samples: Sequence[Sample], config: CurriculumConfig) -> list[int]:
    """Indices of the stage's own rows in file order, without replay.

    Raises:
        DataError: one of the stage's tiers has no row.
    """
    if config.tiers is None:
        return list(range(len(samples)))
    rows = [index for index, sample in enumerate(samples) if sample.tier in config.tiers]
    for tier in config.tiers:
        if not any(samples[index].tier == tier for index in rows):
            known = sorted({sample.tier for sample in samples if sample.tier})
            has = f"the rows have {', '.join(known)}" if known else "no row names a tier"
            raise DataError(f"no row has the tier '{tier}'; {has}", field="curriculum.tiers")
    return rows


def _epoch_order(
    samples: Sequence[Sample], config: CurriculumConfig, seed: int, epoch: int
) -> list[int]:
    own = stage_rows(samples, config)
    _random(seed, epoch, "rows").shuffle(own)
    if config.order == "difficulty":
        # The sort is stable, so rows of one difficulty stay shuffled.
        own.sort(key=lambda index: _difficulty(samples[index]))
    replay = _replay(samples, config, len(own), seed, epoch)
    # Replayed rows are spread evenly over the epoch, whatever the order of the stage's own rows.
    placed = [
        ((rank + 0.5) / len(rows), row) for rows in (own, replay) for rank, row in enumerate(rows)
    ]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _replay(
    samples: Sequence[Sample], config: CurriculumConfig, own: int, seed: int, epoch: int
) -> list[int]:
    if config.replay_share == 0:
        return []
    earlier = config.earlier()
    pool = [index for index, sample in enumerate(samples) if sample.tier in earlier]
    if not pool:
        raise DataError(
            f"there is no row of the earlier tiers {', '.join(earlier)} to replay; add their "
            "manifests to data.manifests, or set curriculum.replay_share to 0",
            field="curriculum.replay_share",
        )
    # The share is of the whole epoch: replay / (own + replay).
    wanted = round(own * config.replay_share / (1 - config.replay_share))
    drawn = _random(seed, epoch, "replay")
    return drawn.sample(pool, min(wanted, len(pool)))


def _difficulty(sample: Sample) -> float:
    if sample.difficulty is None:
        file, line = sample.source
        raise DataError(
            "is missing, but curriculum.order is 'difficulty'; add it or set order to 'shuffle'",
            file=file,
            line=line,
            field="difficulty",
        )
    return sample.difficulty


def _random(seed: int, epoch: int, purpose: str) -> random.Random:
    """A separate random generator for each purpose.

    ``random`` hashes string seeds with SHA-512, so they do not depend on PYTHONHASHSEED.
    """
    return random.Random(f"{seed}/{epoch}/{purpose}")
