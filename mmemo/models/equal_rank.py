"""Plain LoRA of the same size as experts: the baseline that they must beat.

``lora.experts: {variant: lora, ...}`` asks for it where ``{variant: mose, ...}`` asks for experts.
"""

from __future__ import annotations

import re
from typing import Any, cast

from mmemo.config import dump
from mmemo.models.adapters import Model, media_of, targets
from mmemo.models.config import LoraSection
from mmemo.models.experts import ExpertsConfig, count_weights, sizes


def equal_rank(model: Model, section: LoraSection) -> int:
    """The rank at which plain LoRA on the same layers has about as many weights as the experts of
    ``section``: the baseline that they must beat. ``model`` has no adapter yet."""
    values = dump(section)
    wanted = re.compile(targets(model, section.target_modules))
    layers = [m for n, m in model.named_modules() if wanted.fullmatch(n)]
    one = sum(sum(sizes(layer)) for layer in layers)
    if section.experts is None:
        return section.r
    experts = values.pop("experts")
    del values["use_dora"]
    config = ExpertsConfig(**values, **experts, modalities=media_of(model))
    width = cast(Any, model.language_model).get_input_embeddings().weight.shape[1]
    return max(1, round(count_weights(layers, config, width) / one))


def as_plain(model: Model, section: LoraSection) -> LoraSection:
    """``section``, or the plain LoRA that its variant ``lora`` stands for: of :func:`equal_rank`'s
    rank, scaled as the experts are. ``model`` has no adapter yet."""
    experts = section.experts
    if experts is None or experts.variant != "lora":
        return section
    as_mose = experts.model_copy(update={"variant": "mose"})
    rank = equal_rank(model, section.model_copy(update={"experts": as_mose}))
    grown = rank / section.r
    alpha = section.lora_alpha * (grown**0.5 if section.use_rslora else grown)
    return section.model_copy(update={"r": rank, "lora_alpha": alpha, "experts": None})
