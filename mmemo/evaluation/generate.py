"""A model answers questions, batch by batch. B rows, L prompt tokens, C generated tokens."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import LogitsProcessorList

from mmemo.data.collate import Collator, render, sized_by_clip
from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import AnswerGenerationConfig
from mmemo.evaluation.reliance.perturb import BlankedSource
from mmemo.features.keys import Digests, Identifier, MemoryMap
from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.experts import ExpertsConfig, gates_of
from mmemo.models.adapters.lora import unwrap
from mmemo.models.adapters.routing import Gates
from mmemo.models.attention.contrast import Contrast
from mmemo.models.attention.reallocation import reallocating
from mmemo.models.attention.record import KINDS
from mmemo.models.build import Loaded
from mmemo.models.generation import stop_token_ids


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every weight and of the settings that shape an answer: 32 hex digits."""
    digest = xxhash.xxh3_128()
    config = unwrap(model).config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        if isinstance(adapter, ExpertsConfig):
            settings = adapter.deciding()
        else:
            settings = (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.use_dora)
        digest.update(repr((name, settings)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Attention:
    """How the attention of one answer's tokens is spread over kinds of token, as the mean over the
    tokens. ``before``, ``after``: (A, Q, M), without and with the change that the config asks for,
    of A ``layers`` and Q heads, M kinds in the order of
    :data:`~mmemo.models.attention.record.KINDS`. ``prompt``: tokens of the prompt of each kind."""

    layers: tuple[int, ...]
    before: Tensor
    after: Tensor
    prompt: Sequence[int]


class AnswerGenerator:
    """Generates answers of one model. A context manager, for the feature source's sake."""

    def __init__(
        self,
        loaded: Loaded,
        samples: Sequence[Sample],
        store: FeatureStore | None,
        media_root: Path,
        limits: DecodeConfig,
        *,
        generation: AnswerGenerationConfig,
        seed: int,
        max_length: int | None,
    ) -> None:
        self.model, self.processor = loaded.model, loaded.processor
        self.generation, self.seed = generation, seed
        check_change(self.model, generation)  # before anything is asked
        backbone = unwrap(loaded.model)
        digests = Digests(store.digests if store is not None else MemoryMap())
        self._identifier = Identifier(backbone, media_root, limits, digests)
        self.source = FeatureSource(samples, backbone, store, media_root, limits)
        self._collate = Collator(self.processor, self.source, max_length)
        self._known = inspect.signature(type(backbone).forward).parameters
        tokenizer: Any = self.processor.tokenizer
        self._stops = stop_token_ids(backbone.generation_config, tokenizer)
        self._silent = {*self._stops, tokenizer.pad_token_id, tokenizer.bos_token_id}

    def __enter__(self) -> AnswerGenerator:
        self.model.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def prompt_text(self, question: Question) -> str:
        """The rendered prompt, media tokens written out."""
        sample = asked(question)
        sized = sized_by_clip(self.processor) and sample.media
        clip = self.source.outline(sample) if sized else None
        return render(self.processor, sample, generation=True, clip=clip).text

    def stream_keys(self, question: Question) -> dict[str, str]:
        """Modality to the key of its features: what file, span, sampling and tower they are of."""
        spans = self._identifier.spans(question.sample)
        return {m: self._identifier.stream(m, span).key for m, span in spans.items()}

    def blanked(self, streams: Sequence[Modality]) -> AnswerGenerator:
        """This one, shown every clip with these streams empty."""
        other = copy.copy(self)
        source = BlankedSource(self.source, streams)
        other._collate = Collator(self.processor, source, self._collate.max_length)
        return other

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The prompts as a batch on the model's device."""
        batch = self._collate(samples, generation=True)
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def answer(self, questions: Sequence[Question], draw: str) -> list[tuple[str, int, bool]]:
        """Text, number of tokens and whether it came to its end, of each answer; see
        :meth:`speak`."""
        return [self._text(row) for row in self._ids([asked(one) for one in questions], draw)]

    def speak(self, samples: Sequence[Sample], draw: str) -> list[list[int]]:
        """The tokens that the model says to each prompt, without its end.

        ``draw`` names the batch: with ``do_sample`` it and the seed fix the random numbers, so
        that a resumed run draws what an uninterrupted one draws.
        """
        return [self._spoken(row) for row in self._ids(samples, draw)]

    @torch.inference_mode()
    def _ids(self, samples: Sequence[Sample], draw: str) -> list[list[int]]:
        inputs = self._inputs(samples)
        processors = LogitsProcessorList()
        if self.generation.contrast is not None:
            processors.append(Contrast(self.model, inputs, self.generation.contrast))
        change = self.generation.change
        with nullcontext() if change is None else reallocating(self.model, change):
            return self._generate(inputs, draw, processors)

    @torch.inference_mode()
    def attention(self, questions: Sequence[Question], draw: str) -> list[Attention]:
        """Where the model looks while it answers. ``contrast`` is left out: it would have the
        model answer other prompts too.

        Raises:
            ConfigError: the model's attention does not go through transformers' interface.
        """
        inputs = self._inputs([asked(question) for question in questions])
        with reallocating(self.model, self.generation.change, record=True) as switch:
            rows = self._generate(inputs, draw, LogitsProcessorList())
        (mass,) = switch.take()
        kinds = inputs["modality_ids"].masked_fill(inputs["attention_mask"] == 0, -1).tolist()
        found: list[Attention] = []
        for place, row in enumerate(rows):
            # The prompt's last token and all but the last of the answer's say what comes next.
            said = max(1, len(self._spoken(row)))
            before, after = (x[place, :said].mean(0) for x in (mass.before, mass.after))
            tokens = [kinds[place].count(kind) for kind in range(len(KINDS))]
            found.append(Attention(mass.layers, before, after, tokens))
        return found

    @torch.inference_mode()
    def gates(self, questions: Sequence[Question]) -> dict[str, Gates]:
        """Layer -> what its experts choose from each prompt. No setting of generation has a part
        in it: what changes attention does so behind the media."""
        inputs = self._inputs([asked(question) for question in questions])
        self._generate(inputs, "gates", LogitsProcessorList(), max_new_tokens=1)
        return gates_of(self.model)

    def _inputs(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        batch = self.collate(samples)
        return {
            name: value
            for name, value in batch.items()
            if isinstance(value, Tensor) and name in self._known and name != "labels"
        }

    def _generate(
        self, inputs: Mapping[str, Tensor], draw: str, processors: LogitsProcessorList, **more: Any
    ) -> list[list[int]]:
        """The tokens behind each prompt, those behind an answer's end included. ``more``: in place
        of the generation settings."""
        tokenizer: Any = self.processor.tokenizer
        with torch.random.fork_rng(enabled=self.generation.do_sample):
            if self.generation.do_sample:
                torch.manual_seed(xxhash.xxh3_64_intdigest(f"{self.seed}:{draw}".encode()) % 2**63)
            model: Any = self.model
            ids: Tensor = model.generate(
                **inputs,
                **{**self.generation.kwargs(), **more},
                logits_processor=processors,
                eos_token_id=self._stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def _text(self, ids: list[int]) -> tuple[str, int, bool]:
        """Tags such as ``<answer>`` may be special tokens, so only the padding and the ends of
        turns are left out of the text."""
        spoken = self._spoken(ids)
        kept = [token for token in spoken if token not in self._silent]
        tokenizer: Any = self.processor.tokenizer
        text: str = tokenizer.decode(kept, skip_special_tokens=False)
        return text.strip(), len(spoken), len(spoken) < len(ids)

    def _spoken(self, ids: list[int]) -> list[int]:
        """Without the end of the turn and what comes behind."""
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        return ids if end is None else ids[:end]


def check_change(model: nn.Module, generation: AnswerGenerationConfig) -> None:
    """Raises:
    ConfigError: a change of attention does not fit the model.
    """
    if generation.change is not None:
        with reallocating(model, generation.change):
            pass


def check_generation(generation: AnswerGenerationConfig, questions: Sequence[Question]) -> None:
    """Raises:
    ConfigError: attention is to be reallocated, and no question shows both sides.
    """
    if generation.reallocation is None:
        return
    sides = [{*side} for side in generation.reallocation.sides]
    shown = [{"text", "fusion", *question.sample.media} for question in questions]
    if not any(all(side & there for side in sides) for there in shown):
        first, second = (" or ".join(side) for side in generation.reallocation.sides)
        raise ConfigError(
            f"generation.reallocation: no question shows both {first} and {second}, so that there "
            "is nothing to move; widen data.modalities, or leave it out"
        )


def asked(question: Question) -> Sample:
    """The sample with the benchmark's own turns and no answer."""
    return replace(question.sample, turns=question.turns)
