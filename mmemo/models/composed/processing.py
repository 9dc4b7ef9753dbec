"""Text of the composed model: chat turns to token ids, labels and modality ids.

The processor expands every placeholder to as many special tokens as its branch makes, so that the
sequence length never changes inside the model. Shapes: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mmemo.config import dump, parse
from mmemo.data.sample import MODALITIES, Modality
from mmemo.errors import ConfigError, DataError
from mmemo.media.config import SamplingConfig
from mmemo.models.backbone import MODALITY_ID, TEXT, Features
from mmemo.models.chat import PLACEHOLDER, ChatRenderer, check_placeholders, control_tokens
from mmemo.models.composed.configuration import SPECIAL_TOKEN
from mmemo.models.composed.connectors import collate_features


class MmemoProcessor(ChatRenderer, ProcessorMixin):
    """Tokenizer, token counts of the branches, and the sampling of clips.

    Args:
        tokenizer: holds the special tokens of
            :data:`~mmemo.models.composed.configuration.SPECIAL_TOKEN` for every branch.
        chat_template: as in transformers; None is the tokenizer's own.
        token_counts: branch (fusion included) -> LM tokens per clip.
        fusion_visual: the branch that pre-fusion joins with audio.
        sampling: :class:`~mmemo.media.config.SamplingConfig` or its values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        token_counts: Mapping[str, int] | None = None,
        fusion_visual: str | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
    ) -> None:
        template = chat_template or tokenizer.chat_template
        super().__init__(tokenizer, chat_template=template)
        self.token_counts = dict(token_counts or {})
        self.fusion_visual = fusion_visual
        self.sampling: SamplingConfig = (
            sampling
            if isinstance(sampling, SamplingConfig)
            else parse(SamplingConfig, sampling or {}, where="processor_config.json: sampling")
        )
        self.modalities: tuple[Modality, ...] = tuple(
            name for name in MODALITIES if name in self.token_counts
        )
        # Other programs look for a processor's media tokens under these names of transformers.
        self.video_token = self.audio_token = self.face_token = self.fusion_token = None
        self.video_token_id = self.audio_token_id = self.face_token_id = None
        self.fusion_token_id = None
        self._token_modality: dict[int, int] = {}
        for name in self.token_counts:
            token: Any = tokenizer.convert_tokens_to_ids(SPECIAL_TOKEN[name])
            if token is None or token == tokenizer.unk_token_id:
                raise ConfigError(f"the tokenizer has no '{SPECIAL_TOKEN[name]}'; add it first")
            self._token_modality[int(token)] = MODALITY_ID[name]
            setattr(self, f"{name}_token", SPECIAL_TOKEN[name])
            setattr(self, f"{name}_token_id", int(token))
        self._control = control_tokens(tokenizer, list(SPECIAL_TOKEN.values()))

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["sampling"] = dump(self.sampling)
        return values

    @property
    def model_input_names(self) -> list[str]:
        features = [f"{m}_features{end}" for m in self.modalities for end in ("", "_mask")]
        return ["input_ids", "attention_mask", "modality_ids", "clip_index", *features]

    def expand(self, text: str, modalities: Container[Modality] | None = None) -> str:
        """Replace ``<video>``, ``<audio>`` and ``<face>`` by their special tokens.

        Fusion tokens come directly before the first placeholder if both fused streams are present.
        ``modalities`` are the streams that the row has; None trusts the text.

        Raises:
            DataError: a placeholder is repeated, or has no branch or no stream.
        """
        for token in SPECIAL_TOKEN.values():
            if token in text:
                raise DataError(f"the text holds the reserved token '{token}'; remove it")
        names = check_placeholders(text, self.modalities, modalities)
        fused = "fusion" in self.token_counts and {self.fusion_visual, "audio"} <= set(names)
        if fused:
            run = self._run("fusion")
            text = PLACEHOLDER.sub(lambda found: run + found.group(), text, count=1)
        return PLACEHOLDER.sub(lambda found: self._run(found.group(1)), text)

    def _run(self, name: str) -> str:
        return SPECIAL_TOKEN[name] * self.token_counts[name]

    def modality_ids(self, input_ids: Sequence[int]) -> list[int]:
        """Which branch each token belongs to, as :data:`~mmemo.models.backbone.MODALITY_ID`."""
        return [self._token_modality.get(token, TEXT) for token in input_ids]

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        features: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for any text-only chat template.

        Content parts ``{"type": "video"}``, ``audio`` and ``face`` become placeholders; files that
        they name are not opened. With ``tokenize=True``, ``features`` are passed to
        :meth:`__call__`, and ``return_dict=True`` returns its batch.

        Raises:
            DataError: a part has another type.
        """
        one = not conversation or isinstance(conversation[0], Mapping)
        chats = [conversation] if one else conversation
        plain = [[{**message, **_plain(message)} for message in chat] for chat in chats]
        passed = dict(processor_kwargs or {})
        if features is not None:
            passed["features"] = features
        return super().apply_chat_template(
            plain[0] if one else plain, chat_template, processor_kwargs=passed, **kwargs
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        text: str | Sequence[str],
        features: Mapping[Modality, Features] | Sequence[Mapping[Modality, Features]] | None = None,
        *,
        # `generate` appends to the right end, which must not be padding.
        padding_side: str = "left",
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch ready for ``model.generate(**batch)``, without mmemo's data code.

        Args:
            text: texts with placeholders; apply ``apply_chat_template`` to a chat first.
            features: for each text, results of :meth:`~mmemo.models.backbone.Backbone.encode` by
                modality.

        Returns:
            ``input_ids``, ``attention_mask`` and ``modality_ids`` (B, L), ``clip_index`` (B,) and
            the features, as tensors that are padded and never truncated.

        Raises:
            TypeError: media were passed instead of features, or an argument is not supported.
        """
        for name, value in kwargs.items():
            if name in ("images", "videos", "audio"):
                if value is not None:
                    raise TypeError(f"{name}: encode the clip first and pass its features")
            elif (name, value) not in (("return_tensors", "pt"), ("padding", True)):
                raise TypeError(f"unknown argument '{name}'")
        texts = [text] if isinstance(text, str) else list(text)
        given = [features] if isinstance(features, Mapping) else features
        if given is not None and len(given) != len(texts):
            raise DataError(f"{len(texts)} texts need as many features, not {len(given)}")
        expanded = [
            self.expand(one, None if given is None else given[row]) for row, one in enumerate(texts)
        ]
        batch = self.tokenizer(
            expanded,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=add_special_tokens,
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        values: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": batch["attention_mask"],
            "modality_ids": torch.tensor([self.modality_ids(row) for row in ids.tolist()]),
        }
        if given is not None:
            values["clip_index"] = torch.arange(len(texts))
            values.update(collate_features(given))
        return BatchFeature(values)


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """The content of a message as text, if it is given in parts."""
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return {}
    parts: list[str] = []
    for part in content:
        kind = part.get("type")
        if kind != "text" and kind not in MODALITIES:
            raise DataError(f"a content part is a '{kind}'; use text, {', '.join(MODALITIES)}")
        parts.append(part["text"] if kind == "text" else f"<{kind}>")
    return {"content": "".join(parts)}
