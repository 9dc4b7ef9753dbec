"""LoRA with modality-specific experts, and simpler ways of adapting to each modality.

``mose`` is MoSEAR's mixture of modality-specific experts. For a prompt with media m, each with K
matrices B and one matrix A shared by all, a layer adds

    alpha / r * (w_t B_t + sum_m w_m B_m,k(m)) A x

to its output, for every token x of the prompt and of its answers. k(m) is the expert picked by a
softmax over G_m h_m, where h_m is the mean of the layer's input at m's tokens. w is a softmax, over
text and the media that are present, of a linear layer of all h_m. Answers are text and choose
nothing, so the choice made for a prompt holds while its answers are generated. MoSEAR's code is not
public: gates, weights and penalties are a reconstruction, and each is a field. B_t, which adapts
rows without media too, is our addition. All media are treated alike.

``gate`` adds to plain LoRA a scale of each medium's embeddings, a softmax over their means.
``moka`` has one matrix A for text and for each medium, and one B; MokA's attention to the question
is left out, because it would need to know where the question ends. ``hydra`` has one A, K matrices
B and a softmax over them for each token, without a penalty.

PEFT's list of methods is closed: our name is added to it before ``register_peft_method``.

Sources: MoSEAR, ACM MM 2025, arXiv 2508.01181; MokA, arXiv 2506.05191; HydraLoRA, NeurIPS 2024,
arXiv 2404.19245.

Shapes: M media, K experts of each, r rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmemo.models.adapters.expert_layers import (
    NAME,
    PREFIX,
    EmbeddingGate,
    ExpertsConfig,
    ExpertsLayer,
    ExpertsLinear,
    sizes,
)
from mmemo.models.adapters.routing import EMBEDDING_GATE, ROUTER, ExpertRouter, Gates, find_router
from mmemo.models.transformers_compat import pre_hooks, remove_pre_hooks

__all__ = [
    "NAME",
    "PREFIX",
    "ExpertsConfig",
    "ExpertsModel",
    "choosing",
    "count_weights",
    "gates_of",
    "sizes",
]


class ExpertsModel(BaseTuner):
    """PEFT's tuner of :class:`ExpertsConfig`."""

    prefix = PREFIX
    tuner_layer_cls = ExpertsLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        lm, router = self._home(peft_config, current_key)
        embedding: Any = lm.get_input_embeddings()
        width = embedding.weight.shape[1]
        if peft_config.variant == "gate":
            # Every target comes here, but the one gate belongs to the language model.
            if not hasattr(lm, EMBEDDING_GATE):
                setattr(lm, EMBEDDING_GATE, EmbeddingGate(adapter_name))
            gate = getattr(lm, EMBEDDING_GATE)
            if adapter_name not in gate.settings:
                gate.update_layer(adapter_name, peft_config, width, embedding.weight.device)
        if isinstance(target, ExpertsLinear):
            target.update_layer(adapter_name, peft_config, width)
            return
        if _no_linear(target):
            raise ValueError(f"'{current_key}' is no linear layer, so it can have no experts")
        made = ExpertsLinear(target, adapter_name, current_key, router)
        made.update_layer(adapter_name, peft_config, width)
        # A further adapter does not train before it is made active, as in PEFT's own tuners.
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT's own method also copies weights, which the new layer shares with the old one.
        setattr(parent, child_name, new_module)

    def _home(self, config: ExpertsConfig, key: str) -> tuple[Any, ExpertRouter]:
        """The language model around a layer and its router, which is set up on the first call."""
        pieces = key.split(".")
        paths = [".".join(pieces[:end]) for end in range(1, len(pieces))]
        found = [p for p in paths if isinstance(self.model.get_submodule(p), _DECODER)]
        if not found:
            raise ValueError(f"'{key}' is in no decoder layer, so its experts cannot be told apart")
        layer = self.model.get_submodule(found[0])
        lm: Any = self.model.get_submodule(found[0].rpartition(".")[0].rpartition(".")[0])
        if ROUTER not in vars(lm):
            setattr(lm, ROUTER, ExpertRouter(tuple(config.modalities)))
        router: ExpertRouter = getattr(lm, ROUTER)
        router.settings.update(self.peft_config)
        if router.media != tuple(config.modalities):
            raise ValueError(
                f"this model's other adapter has experts for {', '.join(router.media)}"
            )
        if not any(pre_hooks(child, router.enter) for child in layer.children()):
            takers = [child for child in layer.children() if _takes_keywords(child)]
            if not takers:
                raise ValueError(f"'{found[0]}' hands no keyword arguments to its attention")
            for child in takers:
                child.register_forward_pre_hook(router.enter, with_kwargs=True)
        return lm, router

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            # Every layer refuses to be merged; asking one keeps the sentence in one place.
            ExpertsLayer("").merge()
        # Gates are deleted on the way, so the modules are listed first.
        for module in list(self.model.modules()):
            router = vars(module).pop(ROUTER, None)
            if hasattr(module, EMBEDDING_GATE):
                delattr(module, EMBEDDING_GATE)
            if router is not None:
                for child in module.modules():
                    remove_pre_hooks(child, router.enter)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def gates(self) -> dict[str, Gates]:
        """The gates of the active adapter in the last forward pass, by layer."""
        return gates_of(self.model)


def count_weights(layers: Sequence[nn.Module], config: ExpertsConfig, embedding: int) -> int:
    """Number of weights of an adapter on linear ``layers``; ``embedding`` is the LM's width."""
    media, total = len(config.modalities), 0
    for layer in layers:
        # Nothing is allocated, however large the model is.
        with torch.device("meta"):
            base = nn.Linear(*sizes(layer), bias=False)
        made = ExpertsLinear(base, "counted", "", ExpertRouter(()))
        made.update_layer("counted", config, embedding)
        total += sum(p.numel() for p in made.parameters()) - base.weight.numel()
    return total + (media * (media * embedding + 1) if config.variant == "gate" else 0)


# transformers derives the decoder layers of all its models from this class.
_DECODER = GradientCheckpointingLayer


def _no_linear(layer: nn.Module) -> bool:
    return not (hasattr(layer, "in_features") or type(layer).__name__ == "Conv1D")


def _takes_keywords(module: nn.Module) -> bool:
    kinds = inspect.signature(module.forward).parameters.values()
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in kinds)


def gates_of(model: nn.Module) -> dict[str, Gates]:
    """Layer -> its gates in the model's last forward pass. Empty without experts; layers whose
    adapter is disabled are missing."""
    router = find_router(model)
    if router is None or router.last is None:
        return {}
    return {place: gates for (place, _), gates in router.last.gates.items()}


def choosing(model: nn.Module) -> tuple[str, ...]:
    """The media whose experts or weights a model chooses for each prompt. Empty for a model without
    experts and for ``moka``, which chooses nothing."""
    router = find_router(model)
    chooses = router is not None and any(one.variant != "moka" for one in router.settings.values())
    return router.media if router is not None and chooses else ()


register_peft_method(
    name=NAME.lower(), config_cls=ExpertsConfig, model_cls=ExpertsModel, prefix=PREFIX
)
