"""Text of a native model: its own tokenizer and chat template, placeholders written as it knows
them. A clip has as many tokens as its size and length ask for, so rows are rendered with features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers.utils.hub import cached_file

from mmemo.config import Config, dump, parse
from mmemo.data.sample import Modality
from mmemo.errors import CheckpointError, ConfigError, DataError
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import Features
from mmemo.models.chat import PLACEHOLDER, ChatRenderer, check_placeholders, control_tokens
from mmemo.models.qwen.base import QwenBackbone, QwenVisionConfig

NOTES = "mmemo_native.json"
"""In a saved model's folder: what its own files have no place for."""
_KEPT = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""Files of the model's own processor, which are handed on as they are."""


class Notes(Config):
    """What mmemo has to know of a native model beside its own files."""

    sampling: dict[str, Any] | None = None
    """:class:`~mmemo.media.config.SamplingConfig`."""
    settings: dict[str, Any] | None = None
    """Of the backbone."""
    source: dict[str, str | None] | None = None
    """Where the model came from: :func:`~mmemo.models.saved.part_source`."""


def find_file(path: str, name: str) -> Path | None:
    """A file of a folder, or of what the hub's cache or the hub has; None when there is none."""
    folder = Path(path)
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        found: Any = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON object of a model's folder; empty when it is not there.

    Raises:
        CheckpointError: it is no JSON object.
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
    """What mmemo wrote beside a native model; None where it never did."""
    found = read_json(path, NOTES)
    return parse(Notes, found, where=NOTES) if found else None


def own_pixels(path: str, settings: QwenVisionConfig) -> QwenVisionConfig:
    """With the mean and deviation of pixels that the model's own processor has on disk."""
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
        """``path``: where the model's own processor files are; ``notes``: what is saved."""
        self.backbone, self.tokenizer = backbone, backbone.tokenizer
        self.chat_template = chat_template
        self.sampling: SamplingConfig = backbone.sampling
        self.modalities = backbone.modalities
        self.notes = notes
        self._control = control_tokens(backbone.tokenizer)
        files = {name: find_file(path, name) for name in _KEPT}
        self._kept = {name: file.read_bytes() for name, file in files.items() if file is not None}

    def expand(
        self, text: str, modalities: Mapping[Modality, Features | None] | None = None
    ) -> str:
        """Write ``<video>`` and ``<audio>`` out to the model's own tokens.

        Raises:
            DataError: a placeholder twice, without a tower, or without its stream or features.
        """
        names = check_placeholders(text, self.modalities, modalities)
        streams = modalities or {}
        given: dict[Modality, Features] = {m: x for m, x in streams.items() if x is not None}
        for name in names:
            if name not in given:
                raise DataError(f"<{name}> has no {name} features; encode the clip first")
        inside = getattr(self.backbone.settings, "audio_in_video", False)
        inside = inside and {"video", "audio"} <= set(names)
        spelt = {name: self.backbone.spell(name, given, inside=inside) for name in names}
        tokens: Any = self.tokenizer.convert_ids_to_tokens
        return PLACEHOLDER.sub(lambda found: "".join(tokens(spelt[found.group(1)])), text)

    def modality_ids(self, input_ids: Sequence[int]) -> list[int]:
        return self.backbone.modality_ids(input_ids)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the tokenizer with its template, the model's own processor files, and the notes."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(target)
        for name, content in self._kept.items():
            (target / name).write_bytes(content)
        text = json.dumps(dump(self.notes), indent=2, sort_keys=True) + "\n"
        (target / NOTES).write_text(text, encoding="utf-8")


def own_template(path: str, tokenizer: Any) -> str | None:
    """The tokenizer's chat template, or that of an older processor beside it."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    found = read_json(path, "chat_template.json").get("chat_template")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{path}: chat_template.json holds no template; set chat_template_path")
    return found
