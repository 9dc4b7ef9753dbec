"""Linear layers with experts, and the gate of media embeddings.

:mod:`mmemo.models.adapters.experts` describes what they compute.

Shapes: B rows, L tokens, N prompts, M media, K experts of each, r rank, S = 1 + M K, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmemo.errors import ConfigError
from mmemo.models.adapters.peft_compat import add_peft_type
from mmemo.models.adapters.routing import EMBEDDING_GATE, ExpertRouter, Gates, Route
from mmemo.models.backbone import MODALITY_ID, TEXT

NAME = "MMEMO_EXPERTS"
"""Name of the method in PEFT."""
PREFIX = "experts_"
"""Prefix of every weight's name."""
Variant = Literal["mose", "gate", "moka", "hydra"]
GateInput = Literal["hidden", "embedding"]
Routing = Literal["straight_through", "soft"]
DECIDING = ("r", "lora_alpha", "use_rslora", "variant", "per_modality", "gate_input", "temperature")
"""Settings that determine an answer besides the weights, ``routing`` and ``modalities``."""


PEFT_TYPE = add_peft_type(NAME)


@dataclass
class ExpertsConfig(PeftConfig):
    """PEFT config of this method.

    The fields are those of :class:`~mmemo.models.config.LoraExpertsConfig` and PEFT's
    ``LoraConfig``; ``modalities`` are the media, in a fixed order.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str] | set[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | None = None
    modalities: list[str] = field(default_factory=lambda: ["video", "audio"])
    variant: Variant = "mose"
    per_modality: int = 3
    gate_input: GateInput = "hidden"
    temperature: float = 1.0
    routing: Routing = "straight_through"
    weight_penalty: float = 0.1
    load_penalty: float = 0.01
    penalty_decay: float | None = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._check()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def _check(self) -> None:
        """Check values, which PEFT does not: an unknown variant would silently be plain LoRA."""
        choices = {"variant": Variant, "gate_input": GateInput, "routing": Routing}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} is '{getattr(self, name)}'; use one of {known}")
        for name in ("r", "per_modality", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        media = [name for name in MODALITY_ID if MODALITY_ID[name] != TEXT]
        strange = sorted(set(self.modalities).difference(media))
        if strange or len(set(self.modalities)) < len(self.modalities):
            listed = ", ".join(self.modalities)
            raise ValueError(
                f"modalities are {listed}; use each of {', '.join(media)} at most once"
            )
        if not self.modalities and self.variant != "hydra":
            raise ValueError(f"'{self.variant}' experts need a model with media")

    @property
    def scaling(self) -> float:
        """Factor of an adapter's output."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def deciding(self) -> dict[str, Any]:
        """The settings that determine an answer, besides the weights."""
        return {name: getattr(self, name) for name in (*DECIDING, "routing", "modalities")}


class ExpertsLayer(nn.Module, BaseTunerLayer):
    """The interface that PEFT expects of a layer, for any variant."""

    adapter_layer_names: tuple[str, ...] = ("experts_gate",)

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.experts_gate = nn.ModuleDict()
        self.settings: dict[str, ExpertsConfig] = {}
        self._disable_adapters = False
        self._active_adapter = adapter
        self.merged_adapters: list[str] = []

    def _live(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.settings]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse to merge, because the adapter's output depends on the prompt.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "experts are chosen anew for every prompt and cannot be merged into the weights; keep "
            "them as an adapter"
        )

    def unmerge(self) -> None:
        """Nothing to undo."""


class ExpertsLinear(ExpertsLayer):
    """A linear layer with experts. ``place`` is its name in :attr:`Route.gates`."""

    adapter_layer_names = ("experts_A", "experts_B", "experts_gate", "experts_weigh")
    # PEFT deletes an adapter from the attributes named here and above.
    other_param_names = ("settings", "experts_dropout")
    sums_first = True
    """``mose``: sum a prompt's matrices B before multiplying its tokens, if there are more tokens
    than the rank. Otherwise each token is multiplied by all of them, as in packed sequences."""

    def __init__(
        self, base_layer: nn.Module, adapter: str, place: str, router: ExpertRouter
    ) -> None:
        super().__init__(adapter)
        self.base_layer, self.place, self.router = base_layer, place, router
        self.experts_A, self.experts_B = nn.ModuleDict(), nn.ModuleDict()
        self.experts_weigh, self.experts_dropout = nn.ModuleDict(), nn.ModuleDict()

    def update_layer(self, adapter: str, config: ExpertsConfig, embedding: int) -> None:
        """Add an adapter that is initially the identity; ``embedding`` is the LM's width."""
        base: Any = self.get_base_layer()
        inside, outside = sizes(base)
        media, number = len(config.modalities), config.per_modality
        made: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        copies_a = 1 + media if config.variant == "moka" else 1
        copies_b = {"mose": 1 + media * number, "hydra": number}.get(config.variant, 1)
        self.settings[adapter] = config
        self.experts_A[adapter] = nn.Linear(inside, copies_a * config.r, bias=False, **made)
        self.experts_B[adapter] = nn.Linear(copies_b * config.r, outside, bias=False, **made)
        drop = config.lora_dropout
        self.experts_dropout[adapter] = nn.Dropout(drop) if drop else nn.Identity()
        # Zeros make the adapter the identity and all media weigh the same. The gate stays random,
        # because argmax picks the first of equal scores, so that other experts would never be used.
        fresh: list[Any] = [self.experts_B[adapter]]
        if config.variant == "mose":
            read = inside if config.gate_input == "hidden" else embedding
            self.experts_gate[adapter] = nn.Linear(read, media * number, bias=False, **made)
            self.experts_weigh[adapter] = nn.Linear(media * read, 1 + media, **made)
            fresh.append(self.experts_weigh[adapter])
        elif config.variant == "hydra":
            self.experts_gate[adapter] = nn.Linear(inside, number, bias=False, **made)
        for weight in (one for layer in fresh for one in layer.parameters()):
            nn.init.zeros_(weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, out)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self._live():
            result = result + self._added(name, x).to(result.dtype)
        return result

    def _added(self, name: str, x: Tensor) -> Tensor:
        config, route = self.settings[name], self.router.route()
        reduce: Any = self.experts_A[name]
        x = x.to(reduce.weight.dtype)
        low: Tensor = reduce(self.experts_dropout[name](x))
        if config.variant == "mose":
            gates = self._chosen(name, x, route)
            assert gates.weights is not None
            assert gates.use is not None
            text, media = gates.weights[:, :1], gates.weights[:, 1:, None] * gates.use
            parts = route.spread(torch.cat([text, media.flatten(1)], 1))
            if self.sums_first and parts.shape[1] == 1 and low.shape[1] > config.r:
                # From weighted unit vectors, experts_B gives each prompt's own sum (B, r, out).
                ones = torch.eye(config.r, dtype=low.dtype, device=low.device)
                return torch.matmul(low, self.experts_B[name](_outer(parts, ones))) * config.scaling
            low = _outer(parts, low)
        elif config.variant == "hydra":
            parts = (self.experts_gate[name](x).float() / config.temperature).softmax(-1)
            # Later tokens are text, which has no media to report. Gates are detached, because this
            # variant has no penalty.
            if not route.decoding:
                self._note(name, route, Gates(use=route.pool(parts.detach())))
            low = _outer(parts, low)
        elif config.variant == "moka":
            mine = nn.functional.one_hot(route.token_slots(), 1 + len(route.media))
            low = low.unflatten(-1, (-1, config.r))
            low = (low * mine[..., None].to(low.dtype)).sum(-2)
        return self.experts_B[name](low) * config.scaling

    def _chosen(self, name: str, x: Tensor, route: Route) -> Gates:
        """The prompts' gates, of this forward pass or of the one that filled the cache."""
        if route.decoding:
            found = route.gates.get((self.place, name))
            if found is None:
                raise ConfigError(
                    f"the prompt was computed without the adapter '{name}'; compute it with the "
                    "adapter that goes on from it"
                )
            return found
        config = self.settings[name]
        pooled = route.pool(x) if config.gate_input == "hidden" else route.embedded
        assert pooled is not None
        pooled, present = pooled.to(x.dtype), route.present  # (N, M, D), (N, M)
        logits: Tensor = self.experts_gate[name](pooled)  # (N, M, M K), of which m asks its own K
        own = logits.unflatten(-1, (len(route.media), -1)).diagonal(dim1=1, dim2=2)  # (N, K, M)
        use = (own.transpose(1, 2).float() / config.temperature).softmax(-1)
        if config.routing == "straight_through":
            picked = nn.functional.one_hot(use.argmax(-1), use.shape[-1]).to(use.dtype)
            # The forward pass uses the pick, the backward pass the softmax. In this order the
            # difference is exactly 0, so that a pick is exactly 1.
            use = picked + (use - use.detach())
        asked: Tensor = self.experts_weigh[name](pooled.flatten(1)).float()
        # Text is always present, so that no row is -inf throughout, which would be NaN.
        weights = asked.masked_fill(~nn.functional.pad(present, (1, 0), value=True), float("-inf"))
        return self._note(name, route, Gates(weights.softmax(-1), use * present[..., None]))

    def _note(self, name: str, route: Route, gates: Gates) -> Gates:
        # Checkpointing recomputes gates; report those of the first computation.
        route.gates.setdefault((self.place, name), gates)
        return gates


def _outer(parts: Tensor, low: Tensor) -> Tensor:
    """(B, L or 1, S) and (B or none, L, r) -> (B, L, S r)."""
    return (parts.to(low.dtype)[..., None] * low[..., None, :]).flatten(-2)


def sizes(base: Any) -> tuple[int, int]:
    """Width of a linear layer's input and output."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features
    inside, outside = base.weight.shape  # transformers' Conv1D
    return inside, outside


class EmbeddingGate(ExpertsLayer):
    """Scales the embeddings of each medium. A prompt's scales have mean 1 and all start at 1."""

    other_param_names = ("settings",)

    def update_layer(self, adapter: str, config: ExpertsConfig, width: int, device: Any) -> None:
        """Add an adapter that is initially the identity."""
        media = len(config.modalities)
        gate = nn.Linear(media * width, media, device=device, dtype=torch.float32)
        for weight in gate.parameters():
            nn.init.zeros_(weight)
        self.settings[adapter], self.experts_gate[adapter] = config, gate
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, embeds: Tensor, route: Route) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        present = route.present  # (N, M)
        for name in self._live():
            gate: Any = self.experts_gate[name]
            asked = gate(route.pool(embeds).flatten(1).to(gate.weight.dtype)).float()
            lowest = torch.finfo(asked.dtype).min  # infinite would be NaN in rows without media
            asked = asked.masked_fill(~present, lowest) / self.settings[name].temperature
            # Without any media the softmax is uniform, but the gates of absent media are 0.
            share = asked.softmax(-1) * present
            # Slot 0 is text and padding, whose embeddings stay as they are.
            scale = nn.functional.pad(share * present.sum(1, keepdim=True), (1, 0), value=1.0)
            slots = route.token_slots()
            # Each token looks up the scale of its slot: (B, L, 1).
            each = route.spread(scale).expand(*slots.shape, -1).gather(-1, slots[..., None])
            embeds = embeds * each.to(embeds.dtype)
            route.gates[EMBEDDING_GATE, name] = Gates(nn.functional.pad(share, (1, 0)))
        return embeds
