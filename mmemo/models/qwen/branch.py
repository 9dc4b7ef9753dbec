"""A branch on a native model: a short text-like span whose tokens say what a trained module says.

The span stands in the prompt as text before video and sound, so that positions and everything else
remain the model's own. The embeddings of its tokens are those of a token that no text uses, plus
what the module says. The module's last layer begins at zero: an untrained branch answers exactly as
the released model does on that text.

What a branch holds lies in a folder of its own beside the files of a model or an adapter, which
other programs therefore read as they are.

Shapes: N clips in the batch, B rows, L tokens of a row, K tokens of the branch, E the LM's width.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmemo.data.sample import Modality
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.models.backbone import MODALITY_ID, FeatureBatch

SPARE = ("<|vision_pad|>", "<|quad_start|>", "<|object_ref_start|>", "<|box_start|>")
"""Tokens of Qwen's tokenizers that mmemo's prompts never contain."""


class Branch(ABC):
    """What a native model's backbone needs to know of one of its branches. The modules themselves
    are attributes of the model."""

    name: ClassVar[str]
    """As in the config, in ``modality_ids`` and in the folder ``mmemo_{name}``."""
    part: ClassVar[str]
    """Attribute of the model that holds what is trained, by PEFT's name for it."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Attributes of the model that hold an encoder that is not trained."""

    def __init__(self, model: Any, token: str) -> None:
        """``token`` stands for one token of the branch in the text."""
        self.model, self.token = model, token
        convert: Any = model.backbone.tokenizer.convert_tokens_to_ids
        self.token_id: int = convert(token)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """K."""

    @property
    @abstractmethod
    def needs(self) -> tuple[Modality, ...]:
        """The streams that a clip needs for the branch."""

    @abstractmethod
    def sizes(self) -> Mapping[Modality, tuple[int, int]]:
        """Width of the features that it reads of each stream, and layers of a mix (0 without)."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What its folder says of it, beside the token."""

    @property
    def kind(self) -> int:
        """Its value in ``modality_ids``."""
        return MODALITY_ID[self.name]

    @property
    def module(self) -> Any:
        """What is trained."""
        return getattr(self.model, self.part)

    def shown(self, streams: Container[str]) -> bool:
        """Whether a row with these streams has the branch's tokens."""
        return all(name in streams for name in self.needs)

    def spell(self) -> str:
        """Its tokens as text."""
        return self.token * self.tokens

    def connect(self, features: FeatureBatch) -> Tensor:
        """(N, K, E). A stream that the batch lacks is one masked step, because every rank must run
        every branch under ZeRO-3 and DDP."""
        weight = next(self.module.parameters())
        held = [features[f"{name}_features"] for name in self.needs if _has(features, name)]
        clips = len(held[0]) if held else 1
        given: dict[str, Tensor] = {}
        for name, (size, layers) in self.sizes().items():
            x, mask = f"{name}_features", f"{name}_features_mask"
            if _has(features, name):
                # Behind the width stand a deepstack's features, which enter other layers.
                given[x] = features[x][..., :size]
                if mask in features:
                    given[mask] = features[mask]
                continue
            given[x] = weight.new_zeros((clips, *([layers] if layers else []), 1, size))
            given[mask] = torch.zeros((clips, 1), dtype=torch.bool, device=weight.device)
        return self.module(given)

    def add(self, embeds: Tensor, modality_ids: Tensor, features: FeatureBatch) -> Tensor:
        """Embeddings (B, L, E) with the branch's output added at its tokens.

        Raises:
            DataError: a row has another number of its tokens than the branch makes, or its clip
                lacks a stream.
        """
        where = modality_ids == self.kind
        counts = where.sum(1)
        rows = counts > 0
        clips = features["clip_index"]
        connected = self.connect(features)
        seen = clips >= 0
        for name in self.needs:
            mask = features.get(f"{name}_features_mask")
            here = seen & False if mask is None else mask.bool().any(1)[clips.clamp(min=0)]
            seen = seen & here
        wrong = rows & ((counts != self.tokens) | ~seen)
        # One read for all rows, because each waits until a GPU has caught up.
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            if not bool(seen[row]):
                raise DataError(
                    f"row {row} has {self.name} tokens but no clip with "
                    f"{' and '.join(self.needs)}; check the batch"
                )
            raise DataError(
                f"row {row} has {int(counts[row])} {self.name} tokens but the branch makes "
                f"{self.tokens}; render the text with this model's processor and never cut it"
            )
        values = connected[clips.clamp(min=0, max=len(connected) - 1)][rows]
        # An empty sum keeps the branch in the graph of a batch without its tokens.
        values = values.flatten(0, 1).to(embeds)
        added = torch.zeros_like(embeds).masked_scatter(where[..., None], values)
        return embeds + added + (0.0 * connected.sum()).to(embeds)

    def weights(self, whole: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The trained weights among those of a model, by their names in the module."""
        begin = f"{prefix}{self.part}."
        return {n.removeprefix(begin): x for n, x in whole.items() if n.startswith(begin)}

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the branch to its folder in ``folder``; ``weights`` are the module's."""
        place = folder / home(self.name)
        place.mkdir(parents=True, exist_ok=True)
        for name in self.frozen:
            getattr(self.model, name).save_pretrained(place / name)
        values = {"token": self.token, **self.record()}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (place / f"{self.name}.json").write_text(text, encoding="utf-8")
        kept = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
        save_file(kept, place / f"{self.part}.safetensors", metadata={"format": "pt"})

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The module's weights in ``folder``.

        Raises:
            CheckpointError: the file is missing or damaged, or is of another branch.
        """
        file = folder / home(self.name) / f"{self.part}.safetensors"
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
        own = self.module
        # PEFT has put its own around a module that it saves.
        own = getattr(own, "original_module", own)
        wanted = {name: x.shape for name, x in own.state_dict().items()}
        if {name: x.shape for name, x in found.items()} != wanted:
            raise unreadable(file, ValueError("its weights are not those of the branch"))
        return found


def home(name: str) -> str:
    """The folder of a branch beside a model's or an adapter's own files."""
    return f"mmemo_{name}"


def unreadable(place: Path, error: Exception) -> CheckpointError:
    """The error of a branch whose files are missing or damaged."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return CheckpointError(
        f"{place}: the branch cannot be loaded ({reason}); save or fetch the model again"
    )


def spare_token(tokenizer: Any, taken: Sequence[str], name: str) -> str:
    """A token for a new branch.

    Raises:
        ConfigError: there is none.
    """
    known = tokenizer.get_vocab()
    found = next((token for token in SPARE if token in known and token not in taken), None)
    if found is None:
        raise ConfigError(
            f"{name}: the tokenizer has none of {', '.join(SPARE)} left for the branch's place in "
            "the text; use another model"
        )
    return found


def _has(features: FeatureBatch, name: str) -> bool:
    return f"{name}_features" in features
