"""How much of a model's numbers DeepSpeed leaves on each device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mmemo import content
from mmemo.errors import ConfigError
from mmemo.train.config import RunConfig, zero_stage


@dataclass(frozen=True, slots=True)
class Sharding:
    """ZeRO over ``ranks`` devices: it shards the optimizer's state in stage 1, also the gradients
    in stage 2, also the weights in stage 3. ``optimizer_away``, ``weights_away``: they are kept in
    the CPU's memory (``offload_optimizer``, ``offload_param``). ``live``: weights that stage 3
    holds whole at most. ``bucket``: gradients that are summed together.

    Source: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 5; DeepSpeed's config.
    """

    stage: int = 0
    ranks: int = 1
    optimizer_away: bool = False
    weights_away: bool = False
    live: int = 0
    bucket: int = 0

    def own(self, size: int) -> int:
        """Bytes of weights of this size that are this device's own."""
        if self.stage < 3:
            return size
        return 0 if self.weights_away else size // self.ranks

    def weights(self, size: int, each: int, largest: int) -> int:
        """Bytes of all weights: its own, and those of the others that are gathered.

        Args:
            each: bytes of a number. largest: numbers of the largest weight.
        """
        if self.stage < 3:
            return size
        # Even where less may be live, a layer is computed from its whole weights.
        gathered = max(min(self.live * each, size), min(2 * largest * each, size))
        return min(self.own(size) + gathered, size)

    def optimizer(self, size: int) -> int:
        """Bytes of the optimizer's state."""
        if self.optimizer_away:
            return 0
        return size // self.ranks if self.stage >= 1 else size

    def gradients(self, trainable: int) -> int:
        """Bytes of the gradients of so many parameters, in float32; and two buckets of them."""
        if self.stage < 2:
            return 4 * trainable
        own = 0 if self.optimizer_away else 4 * trainable // self.ranks
        return own + 2 * 2 * min(self.bucket, trainable)


def sharding_of(run: RunConfig, *, ranks: int | None = None, width: int = 1024) -> Sharding:
    """How the run's DeepSpeed config shards.

    Args:
        ranks: of all machines; None: ``run.processes``.
        width: the hidden size, for what is ``auto``.

    Raises:
        ConfigError: the file is no DeepSpeed config.
    """
    stage = zero_stage(run)
    if run.deepspeed is None:
        return Sharding()
    values: Any = json.loads(content.find(run.deepspeed).read_text(encoding="utf-8"))
    zero: dict[str, Any] = values.get("zero_optimization", {})

    def away(name: str) -> bool:
        section = zero.get(name) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"{run.deepspeed}: zero_optimization.{name} must be a section")
        return section.get("device", "none") != "none"  # pyright: ignore[reportUnknownMemberType]

    def number(name: str, default: int) -> int:
        value = zero.get(name, default)
        return width * width if value == "auto" else int(float(value))

    return Sharding(
        stage=stage,
        ranks=ranks or run.processes,
        optimizer_away=away("offload_optimizer"),
        weights_away=away("offload_param"),
        live=number("stage3_max_live_parameters", 10**9),
        bucket=number("reduce_bucket_size", 5 * 10**8),
    )
