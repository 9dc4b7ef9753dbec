"""Generates a model's answers to questions, batch by batch."""

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

from mmemo.data.collate import Collator, Rendered, render, sized_by_clip
from mmemo.data.sample import Modality, Sample
from mmemo.errors import ConfigError, MmemoError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import AnswerGenerationConfig, EvalRunConfig
from mmemo.evaluation.reliance.perturb import BlankedSource
from mmemo.features.keys import Digests, Identifier, MemoryMap
from mmemo.features.source import FeatureSource
from mmemo.features.store import FeatureStore
from mmemo.generation.questions import answer_greedily, can_share, plan_questions
from mmemo.generation.rollout import RolloutConfig, rollout_seed
from mmemo.generation.vllm.connect import connect
from mmemo.generation.vllm.engine import VllmRollouts
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.experts import ExpertsConfig, gates_of
from mmemo.models.adapters.lora import deciding_settings, unwrap
from mmemo.models.adapters.routing import Gates
from mmemo.models.attention.contrast import Contrast
from mmemo.models.attention.reallocation import reallocating
from mmemo.models.attention.record import KINDS
from mmemo.models.build import Loaded
from mmemo.models.generation import stop_token_ids

_USUAL = ("r", "lora_alpha", "use_rslora", "use_dora")


def model_fingerprint(model: nn.Module) -> str:
    """A hash of every weight and of the settings that affect an answer, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    config = unwrap(model).config.to_dict()
    # Where the model lies and which version wrote it do not affect an answer.
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    # The scaling of an adapter affects answers, but stands in none of its weights.
    for name, adapter in sorted(getattr(model, "peft_config", {}).items()):
        if isinstance(adapter, ExpertsConfig):
            settings = adapter.deciding()
        else:
            settings = (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.use_dora)
        digest.update(repr((name, settings)).encode())
        # Those of other people's adapters, as the scaling of single layers.
        rare = {k: v for k, v in deciding_settings(adapter).items() if k not in _USUAL}
        if rare and not isinstance(adapter, ExpertsConfig):
            digest.update(repr(rare).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            # numpy has no bfloat16, so bytes are hashed. A scalar has no last axis that view could
            # split into bytes, so all values are flattened.
            plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class AttentionShares:
    """How the attention of one answer's tokens is distributed over kinds of token, averaged over
    the tokens.

    Shapes: A layers, Q heads, M kinds in the order of
    :data:`~mmemo.models.attention.record.KINDS`.
    """

    layers: tuple[int, ...]
    before: Tensor
    """(A, Q, M) without the change of attention that the config asks for."""
    after: Tensor
    """(A, Q, M) with that change; equal to ``before`` where there is none."""
    prompt: Sequence[int]
    """(M,) number of prompt tokens of each kind."""


class AnswerGenerator:
    """Generates the answers of one model. Use it as a context manager, which closes its feature
    source."""

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
        run: EvalRunConfig | None = None,
        served: VllmRollouts | None = None,
    ) -> None:
        """``run``: None answers each question with a prompt of its own. ``served``: what answers in
        place of the model."""
        self.model, self.processor = loaded.model, loaded.processor
        self.generation, self.seed, self._run, self._served = generation, seed, run, served
        check_change(self.model, generation)  # before anything is generated
        backbone = unwrap(loaded.model)
        digests = Digests(store.digests if store is not None else MemoryMap())
        self._identifier = Identifier(backbone, media_root, limits, digests)
        self.source = FeatureSource(samples, backbone, store, media_root, limits)
        self._collate = Collator(self.processor, self.source, max_length)
        # generate() refuses inputs that the model's forward does not take, such as the collator's
        # own.
        self._known = inspect.signature(type(backbone).forward).parameters
        tokenizer: Any = self.processor.tokenizer
        self.opened = self.processor.opened
        """What the generation prompt leaves open, such as ``<think>``; begins every answer."""
        self._stops = stop_token_ids(backbone.generation_config, tokenizer)
        self._silent = {*self._stops, tokenizer.pad_token_id, tokenizer.bos_token_id}

    def __enter__(self) -> AnswerGenerator:
        self.model.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()
        if self._served is not None:
            self._served.close()

    def prompt_text(self, question: Question) -> str:
        """The rendered prompt, with its media tokens written out."""
        return self._rendered(prompt_sample(question)).text

    def _rendered(self, sample: Sample) -> Rendered:
        sized = sized_by_clip(self.processor) and sample.media
        clip = self.source.outline(sample) if sized else None
        return render(self.processor, sample, generation=True, clip=clip)

    def stream_keys(self, question: Question) -> dict[str, str]:
        """Modality to the key of its features: it identifies file, span, sampling and encoder."""
        spans = self._identifier.spans(question.sample)
        return {m: self._identifier.stream(m, span).key for m, span in spans.items()}

    def blanked(self, streams: Sequence[Modality]) -> AnswerGenerator:
        """A copy of this generator that sees every clip with ``streams`` blanked."""
        # Shallow, so that both share the model and the feature source.
        other = copy.copy(self)
        source = BlankedSource(self.source, streams)
        other._collate = Collator(self.processor, source, self._collate.max_length)
        other._served = None  # which reads the clips themselves
        return other

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The prompts of some samples as a batch on the model's device."""
        batch = self._collate(samples, generation=True)
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def answer(self, questions: Sequence[Question], draw: str) -> list[tuple[str, int, bool]]:
        """Text, number of tokens and whether it ended, of the answer to each question.

        ``draw`` is as in :meth:`generate_ids`.
        """
        prompts = [prompt_sample(one) for one in questions]
        if self._served is not None:
            found = self._served_ids(prompts, draw)
        else:
            found = self._shared_ids(prompts) if self._shares() else self._ids(prompts, draw)
        return [self._text(ids) for ids in found]

    def _served_ids(self, samples: Sequence[Sample], draw: str) -> list[list[int]]:
        """The tokens after each prompt, by a server."""
        assert self._served is not None
        if self._served.media is not None:
            self._served.media.know(samples)  # a control may have given a row other media
        seeds = [rollout_seed(self.seed, draw, one.sample_id, 0) for one in samples]
        found = self._served.generate(self.model, self.collate(samples), seeds)
        sizes: list[int] = found.mask.sum(1).tolist()
        return [ids[:size] for ids, size in zip(found.ids.tolist(), sizes, strict=True)]

    def _shares(self) -> bool:
        """Whether questions about one clip are answered together."""
        given = self.generation
        plain = given.change is None and given.contrast is None and given.repetition_penalty == 1
        wanted = self._run is not None and self._run.share_prefixes
        return wanted and plain and not given.do_sample and can_share(self.model)

    def _shared_ids(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The tokens after each prompt, up to and with the end of the answer."""
        room, run = self.generation.max_new_tokens, self._run
        prompts = [list(self._rendered(sample).input_ids) for sample in samples]
        clips = [frozenset(sample.media.items()) for sample in samples]  # as the collator has them
        plan = plan_questions(prompts, clips, room, run.max_tokens_per_batch if run else None)
        found: dict[int, list[int]] = {}
        for rows in plan:
            batch = self.collate([samples[row] for row in rows])
            ids = answer_greedily(self.model, batch, stops=self._stops, max_new_tokens=room)
            found.update(zip(rows, ids, strict=True))
        return [found[row] for row in range(len(samples))]

    def generate_ids(self, samples: Sequence[Sample], draw: str) -> list[list[int]]:
        """The token ids that the model generates after each prompt, without the end of the turn.

        ``draw`` names the batch. When sampling, it seeds the random numbers together with the
        config's seed, so that a resumed run samples what an uninterrupted run samples.
        """
        return [self._before_end(ids) for ids in self._ids(samples, draw)]

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
    def attention(self, questions: Sequence[Question], draw: str) -> list[AttentionShares]:
        """Attention by kind of token while the model answers. Contrastive decoding is left out,
        since it would have the model answer other prompts too.

        Raises:
            ConfigError: the model's attention does not go through transformers' interface.
        """
        inputs = self._inputs([prompt_sample(question) for question in questions])
        with reallocating(self.model, self.generation.change, record=True) as switch:
            rows = self._generate(inputs, draw, LogitsProcessorList())
        (mass,) = switch.take()
        # Padding becomes -1, so that it counts as no kind of token.
        kinds = inputs["modality_ids"].masked_fill(inputs["attention_mask"] == 0, -1).tolist()
        found: list[AttentionShares] = []
        for place, row in enumerate(rows):
            # The prompt's last token and all but the answer's last predict the answer's tokens.
            length = max(1, len(self._before_end(row)))
            before, after = (x[place, :length].mean(0) for x in (mass.before, mass.after))
            tokens = [kinds[place].count(kind) for kind in range(len(KINDS))]
            found.append(AttentionShares(mass.layers, before, after, tokens))
        return found

    @torch.inference_mode()
    def gates(self, questions: Sequence[Question]) -> dict[str, Gates]:
        """Layer -> the gates of its experts for each prompt. The generation settings have no
        influence on them: changes of attention take effect behind the media tokens."""
        inputs = self._inputs([prompt_sample(question) for question in questions])
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
        """The tokens generated after each prompt, including those after the end of an answer.
        ``more`` overrides the generation settings."""
        tokenizer: Any = self.processor.tokenizer
        # The caller's random numbers go on as if nothing had been sampled.
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
        """Text, number of tokens, and whether the answer ended. Tags such as ``<answer>`` may be
        special tokens, so only padding and end-of-turn tokens are left out of the text, which
        begins with what the prompt has opened."""
        ids_before_end = self._before_end(ids)
        kept = [token for token in ids_before_end if token not in self._silent]
        tokenizer: Any = self.processor.tokenizer
        text: str = tokenizer.decode(kept, skip_special_tokens=False)
        return (self.opened + text).strip(), len(ids_before_end), len(ids_before_end) < len(ids)

    def _before_end(self, ids: list[int]) -> list[int]:
        """The tokens before the end of the turn."""
        end = next((i for i, token in enumerate(ids) if token in self._stops), None)
        return ids if end is None else ids[:end]


def serve(
    loaded: Loaded,
    samples: Sequence[Sample],
    folder: Path,
    *,
    generation: AnswerGenerationConfig,
    run: EvalRunConfig,
    media_root: Path,
    decode: DecodeConfig,
    max_length: int | None,
) -> VllmRollouts | None:
    """The server of ``run.vllm``, ready to answer; None where the model itself answers.

    Args:
        folder: of this process, for the adapter and the server's log.

    Raises:
        ConfigError: it cannot answer as ``generation`` asks, or with this model.
        RolloutError: it does not answer.
    """
    if run.engine == "hf":
        return None
    if generation.change is not None or generation.contrast is not None:
        raise ConfigError("vLLM changes no attention; leave that out, or set run.engine: hf")
    if generation.repetition_penalty != 1 or not 0.01 <= generation.temperature <= 2:
        raise ConfigError(
            "with run.engine: vllm set generation.repetition_penalty: 1 and a temperature from "
            "0.01 to 2"
        )
    drawing = RolloutConfig(
        engine="vllm",
        vllm=run.vllm,
        max_completion_length=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k if generation.do_sample else 1,
    )
    found = connect(
        drawing,
        loaded,
        folder,
        samples=samples,
        media_root=media_root,
        decode=decode,
        max_length=max_length,
        scored=False,
    )
    try:
        found.check()
    except MmemoError:
        found.close()
        raise
    return found


def check_change(model: nn.Module, generation: AnswerGenerationConfig) -> None:
    """Check that the change of attention in ``generation``, if any, fits the model.

    Raises:
        ConfigError: it does not.
    """
    if generation.change is not None:
        with reallocating(model, generation.change):
            pass


def check_generation(generation: AnswerGenerationConfig, questions: Sequence[Question]) -> None:
    """Check that reallocation of attention, if any, has a question to apply to.

    Raises:
        ConfigError: no question shows both sides of the reallocation.
    """
    if generation.reallocation is None:
        return
    sides = [{*side} for side in generation.reallocation.sides]
    shown = [{"text", "fusion", *question.sample.media} for question in questions]
    if not any(all(side & there for side in sides) for there in shown):
        first, second = (" or ".join(side) for side in generation.reallocation.sides)
        raise ConfigError(
            f"generation.reallocation: no question shows both {first} and {second}, so there is no "
            "attention to move; add modalities to data.modalities, or leave reallocation out"
        )


def prompt_sample(question: Question) -> Sample:
    """The question's sample with the benchmark's turns and without an answer."""
    return replace(question.sample, turns=question.turns)
