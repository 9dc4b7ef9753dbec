"""Which of an encoder's hidden states become features.

Shapes: T feature steps, P tokens of one forward pass, D the encoder's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmemo.errors import ConfigError
from mmemo.models.composed.configuration import BranchBaseConfig


def select_states(outputs: Any, spec: BranchBaseConfig) -> list[Tensor]:
    """The hidden states that ``layer`` names, of an encoder's output.

    Raises:
        ConfigError: the encoder has no such hidden state.
    """
    if spec.layer == -1:
        return [_last(outputs)]
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        raise ConfigError(
            f"layer {spec.layer}: the encoder returns no hidden states; use -1, its output"
        )
    wanted = list(range(len(states))) if spec.layer == "mix" else spec.layer
    wanted = [wanted] if isinstance(wanted, int) else wanted
    beyond = [index for index in wanted if not -len(states) <= index < len(states)]
    if beyond or not wanted:
        raise ConfigError(
            f"layer {spec.layer}: the encoder has hidden states 0 to {len(states) - 1}"
        )
    # The last hidden state of many encoders lacks their final norm; -1 means what comes out.
    return [_last(outputs) if index == -1 else states[index] for index in wanted]


def _last(outputs: Any) -> Tensor:
    state = getattr(outputs, "last_hidden_state", None)
    if not isinstance(state, Tensor):
        raise ConfigError(
            f"{type(outputs).__name__} has no last_hidden_state; use an encoder that returns one, "
            "not a codec, classifier or detector"
        )
    return state


def stack_states(states: list[Tensor], spec: BranchBaseConfig) -> Tensor:
    """Flatten each state to (T, D); stack them to (layers, T, D) for a learned mix.

    Raises:
        ConfigError: states to be mixed differ in size.
    """
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    if isinstance(spec.layer, int):
        return flat[0]
    if any(state.shape != flat[0].shape for state in flat):
        raise ConfigError(
            "a learned layer mix needs hidden states of one size; name one layer instead"
        )
    return torch.stack(flat)
