"""Forecasts of a config and of the same with other values, from one model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mmemo.check.memory import MemoryEstimate, Workload, forecast, kept_bytes
from mmemo.check.plan import CheckPlan, TrainingPlan
from mmemo.check.shapes import changed
from mmemo.check.workload import Lengths, workload
from mmemo.config import Config, dump
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.quantization import quantization_of

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass
class Forecaster:
    """Forecasts of the memory of one device.

    ``model``: of ``config``, its trainable parts chosen; it may be shapes alone. ``training_of``:
    how a config trains; None: the stage trains nothing. ``ranks``: devices on all machines; None:
    as the config says. ``limit``: bytes of a device.
    """

    config: Any
    model: nn.Module
    plan: CheckPlan
    lengths: Lengths
    training_of: Callable[[Any], TrainingPlan] | None = None
    ranks: int | None = None
    limit: int | None = None
    on_gpu: bool = True
    _models: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    def __call__(self, config: Config | None = None) -> MemoryEstimate:
        """The forecast for a config that differs in values alone; None: for the config itself."""
        return forecast(*self._work(config))

    def kept(self, config: Config) -> int:
        """What the same needs at least: the bytes that are there in every phase."""
        return kept_bytes(*self._work(config))[0].kept

    def _work(self, config: Config | None) -> tuple[nn.Module, Workload]:
        given: Any = self.config if config is None else config
        plan, model = self.plan, self.model
        if self.training_of is not None:
            plan = replace(plan, training=self.training_of(given))
            model = self._model(given)
        work = workload(
            plan, model, self.lengths, ranks=self.ranks, limit=self.limit, on_gpu=self.on_gpu
        )
        kind = given.model.quantization
        done = quantization_of(unwrap(model)) is not None
        return model, replace(work, quantization=None if done else kind)

    def _model(self, given: Any) -> nn.Module:
        """The model of a config: the one at hand, or a copy of its shapes."""
        own = self.config.model
        if (given.model.dtype, given.model.lora) == (own.dtype, own.lora):
            return self.model
        key = repr((given.model.dtype, dump(given)["model"]["lora"]))
        if key not in self._models:
            self._models[key] = changed(self.model, own, given.model, given.trainable)
        return self._models[key]


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (powers of 1000) or ``24GiB`` (of 1024).

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise ConfigError(f"--memory: '{text}' is no size; write for example 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_lengths(text: str) -> Lengths:
    """Lengths of ``2048+256``: tokens of a prompt and of its answer.

    Raises:
        ConfigError: it is no such pair.
    """
    found = re.fullmatch(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*", text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise ConfigError(
            f"--lengths: '{text}' must be tokens of the longest prompt and of the longest answer, "
            "such as 2048+256"
        )
    return Lengths(int(found[1]), int(found[2]))
