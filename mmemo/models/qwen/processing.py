"""Text of a native model, with its own tokenizer, chat template and placeholder tokens.

The number of tokens of a clip depends on its size and length, so rows are rendered with features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from mmemo.config import Config, dump, parse
from mmemo.data.sample import Modality
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import Features
from mmemo.models.chat import ChatRenderer, check_placeholders, control_tokens
from mmemo.models.qwen.base import QwenBackbone, QwenConfig, QwenVisionConfig

NOTES = "mmemo_native.json"
"""File in a saved model's folder with what the model's own files cannot hold."""
_KEPT = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Files of the model's own processor, which are copied unchanged."""


class Notes(Config):
    """What mmemo needs to know about a native model beyond the model's own files."""

    sampling: dict[str, Any] | None = None
    """:class:`~mmemo.media.config.SamplingConfig`."""
    settings: dict[str, Any] | None = None
    """Settings of the backbone, as in ``model.native``."""
    source: dict[str, str | None] | None = None
    """Where the model came from: :func:`~mmemo.models.saved.part_source`."""
    branches: list[str] = []
    """Branches whose folders lie beside the model or the adapter."""


def find_file(path: str, name: str) -> Path | None:
    """A file of a folder, the hub's cache or the hub; None if there is none."""
    folder = Path(path)
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        found: Any = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON object of a model's folder; empty if the file does not exist.

    Raises:
        CheckpointError: the file holds no JSON object.
    """
    file = find_file(path, name)
    try:
        found: Any = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read; save or fetch the model again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: is no JSON object; save or fetch the model again")
    return cast(dict[str, Any], found)


def read_notes(path: str) -> Notes | None:
    """The notes that mmemo saved with a native model; None if it was not saved by mmemo."""
    found = read_json(path, NOTES)
    return parse(Notes, found, where=NOTES) if found else None


def own_pixels(path: str, settings: QwenConfig) -> QwenConfig:
    """``settings`` with the pixel mean and deviation of the model's own processor file."""
    if not isinstance(settings, QwenVisionConfig):
        return settings
    for name in _KEPT:
        found = read_json(path, name)
        for part in (found, found.get("video_processor"), found.get("image_processor")):
            if isinstance(part, dict) and "image_mean" in part and "image_std" in part:
                values = cast(dict[str, Any], part)
                update = {key: tuple(values[key]) for key in ("image_mean", "image_std")}
                return settings.model_copy(update=update)
    return settings


class NativeProcessor(ChatRenderer):
    """Renders rows for a native model. Placeholders need the clip's features."""

    sized_by_clip = True

    def __init__(
        self, backbone: QwenBackbone, chat_template: str | None, path: str, notes: Notes
    ) -> None:
        """``path`` has the model's own processor files; ``notes`` are saved with the model."""
        self.backbone, self.tokenizer = backbone, backbone.tokenizer
        self.chat_template = chat_template
        self.sampling: SamplingConfig = backbone.sampling
        self.notes = notes
        self._control = control_tokens(backbone.tokenizer)
        files = {name: find_file(path, name) for name in _KEPT}
        self._kept = {name: file.read_bytes() for name, file in files.items() if file is not None}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What prompts may contain."""
        return self.backbone.modalities

    def expand(
        self, text: str, modalities: Mapping[Modality, Features | None] | None = None
    ) -> str:
        """Replace ``<video>``, ``<audio>`` and ``<face>`` by the model's own tokens.

        Raises:
            DataError: a placeholder is repeated, or has no encoder, stream or features.
        """
        names = check_placeholders(text, self.modalities, modalities)
        streams = modalities or {}
        given: dict[Modality, Features] = {m: x for m, x in streams.items() if x is not None}
        for name in names:
            if name not in given:
                raise DataError(f"<{name}> has no {name} features; encode the clip first")
        inside = getattr(self.backbone.settings, "audio_in_video", False)
        inside = inside and {"video", "audio"} <= set(names)
        return self.backbone.write(text, given, inside=inside)

    def modality_ids(self, input_ids: Sequence[int]) -> list[int]:
        return self.backbone.modality_ids(input_ids)

    def row_positions(
        self, input_ids: Sequence[int], features: Mapping[Modality, Features]
    ) -> Tensor | None:
        """(3, L) positions of a row's tokens, made once on the CPU; None for plain positions, which
        cost nothing."""
        if not self.backbone.mrope:
            return None
        return self.backbone.row_positions(torch.tensor(input_ids), features)

    def save_pretrained(self, folder: Path | str) -> None:
        """Save the tokenizer with its template, the model's own processor files, and the notes."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(target)
        for name, content in self._kept.items():
            (target / name).write_bytes(content)
        values = {**dump(self.notes), "branches": list(self.backbone.branches)}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (target / NOTES).write_text(text, encoding="utf-8")


def own_template(path: str, tokenizer: Any) -> str | None:
    """The tokenizer's chat template, or that of an older processor beside it."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    found = read_json(path, "chat_template.json").get("chat_template")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{path}: chat_template.json holds no template; set chat_template_path")
    return found
