"""What mmemo uses of transformers and torch that they do not promise to keep.

``tests/test_compat.py`` fails by name when a release changes one of these. The names that a model
class must define for transformers (``_supports_sdpa``, ``_tied_weights_keys``, ...) stand on our
own classes and are listed here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "transformers.generation.GenerationMixin._expand_inputs_for_generation": (
        *("self", "expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
    ),
    "transformers.PreTrainedModel._init_weights": ("self", "module"),
    "transformers.PreTrainedModel._supports_sdpa": (),
    "transformers.PreTrainedModel._supports_flash_attn": (),
    "transformers.PreTrainedModel._supports_flex_attn": (),
    "transformers.PreTrainedModel._supports_attention_backend": (),
    "transformers.PreTrainedModel._skip_keys_device_placement": (),
    "transformers.PreTrainedModel._tied_weights_keys": (),
    "transformers.Qwen3OmniMoeThinkerTextModel._can_record_outputs": (),
    "transformers.PreTrainedConfig._attn_implementation": (),
}
"""Dotted name -> its parameters, for the methods that mmemo's models override and what they call;
() for what is no function."""

MODULE_ATTRIBUTES = (
    *("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "_non_persistent_buffers_set",
)
"""What every ``torch.nn.Module`` has."""


def attention_implementation(config: Any) -> str:
    """The name of the attention that a model of ``config`` computes with, such as ``sdpa``."""
    return config._attn_implementation


def takes_attention(model: nn.Module) -> bool:
    """Whether the model takes its attention from transformers' interface."""
    return bool(getattr(model, "_supports_attention_backend", False))


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that its state dict has, by name."""
    left_out = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    return {
        name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in left_out
    }


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anything hooks into the module's own forward pass, before or after."""
    own: Any = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def pre_hooks(module: nn.Module, hook: Any) -> list[int]:
    """The numbers under which ``hook`` is among the module's forward pre-hooks. Handles of hooks
    would not survive a copy of the model, which has the hooks all the same."""
    hooks: Any = vars(module)["_forward_pre_hooks"]
    return [number for number, one in hooks.items() if one == hook]


def remove_pre_hooks(module: nn.Module, hook: Any) -> None:
    """Remove ``hook`` from the module's forward pre-hooks, wherever it is among them."""
    hooks: Any = vars(module)
    for number in pre_hooks(module, hook):
        del hooks["_forward_pre_hooks"][number]
        # torch lists the hooks that take keyword arguments a second time.
        hooks["_forward_pre_hooks_with_kwargs"].pop(number, None)


def find_routers(lm: nn.Module) -> list[nn.Module]:
    """The routers of a mixture of experts, one for each of its layers: modules whose first output
    are their logits, (tokens, experts). Empty for a dense language model."""
    model: Any = lm
    recorder: Any = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    kind: Any = getattr(recorder, "target_class", None)
    return [] if kind is None else [one for one in lm.modules() if isinstance(one, kind)]
