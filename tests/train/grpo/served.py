"""Rollouts that say of themselves that they are no trainer's, as those of a server do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmemo.generation.rollout import HFRollouts, Rollouts
from tests.train.grpo.tiny import main

Report = Callable[[Rollouts], Any]
"""What is reported as the log-probabilities of some completions."""

_DRAW = HFRollouts.generate_all


def as_drawn(drawn: Rollouts) -> Tensor:
    """The trainer's, but for rounding."""
    return drawn.logps


def noisy(drawn: Rollouts) -> Tensor:
    """Up to 0.35 nats off, whatever else is in the batch; junk in the padding."""
    noise = ((drawn.ids * 37) % 11 - 5).float() * 0.07
    return (drawn.logps + noise).clamp(max=0).masked_fill(drawn.mask == 0, float("nan"))


def serve(report: Report, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let :class:`HFRollouts` report something else. ``put``: a monkeypatch's ``setattr``."""

    def generate_all(self: HFRollouts, model: Any, batches: Sequence[Any]) -> list[Rollouts]:
        return [replace(one, logps=report(one)) for one in _DRAW(self, model, batches)]

    put(HFRollouts, "exact", False)
    put(HFRollouts, "generate_all", generate_all)


if __name__ == "__main__":
    serve(noisy)
    main()
