"""The DPO stage: preference optimisation of a fine-tuned model with the config's loss terms.

Each step compares a pair's chosen answer with its rejected answers after the clip, after a negative
of the clip and without media, as far as the terms ask for it. The training loop, its checkpoints
and its guarantees are those of SFT. The last functions are ``mmemo check`` of what only a
preference config has: pairs, negatives, terms and the reference.

Sources: Rafailov et al., arXiv 2305.18290; AVEm-DPO, arXiv 2602.07054; see ``mmemo/losses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from mmemo.config import dump
from mmemo.console import console
from mmemo.data.collate import Collator, check_lengths, sized_by_clip
from mmemo.data.manifest import DataConfig
from mmemo.data.pair_names import reading
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError
from mmemo.losses.objective import (
    AnswerKey,
    Branch,
    BuiltTerm,
    LogpRequest,
    build_terms,
    describe_terms,
    merge_requests,
)
from mmemo.models.build import Loaded
from mmemo.train import runtime
from mmemo.train.dpo.batch import PairBatcher, PairLengths, branch_sample, has_branch, media_samples
from mmemo.train.dpo.config import DpoConfig, starts_new_adapter
from mmemo.train.dpo.dataset import (
    DpoData,
    measure_pairs,
    pair_texts,
    print_pair_counts,
    stage_pairs,
)
from mmemo.train.dpo.objective import DpoObjective
from mmemo.train.dpo.reference_store import ReferenceStore, fill_references, weights_fingerprint
from mmemo.train.engine import engine_kind
from mmemo.train.reference import disable_dropout, reference
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    MediaStage,
    RunContext,
    Split,
    StageContext,
    StageParts,
    input_digests,
    split_plan,
    stored_rows,
)
from mmemo.train.trainer import Trainer

__all__ = ["DpoConfig", "DpoData", "run_dpo"]


def run_dpo(config: DpoConfig) -> Path:
    """Run the stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Raises:
        ConfigError: config, data, terms or model do not fit, or changed since the checkpoint.
        DataError: a row is invalid.
        TrainingError: too many clips are bad, or too many steps in a row were not finite.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return DpoStage.start(config)


class DpoStage(MediaStage[DpoConfig]):
    """Preference optimisation: pairs of answers in, the loss of the config's terms down."""

    kind = "dpo"

    def __init__(self, config: DpoConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.terms: list[BuiltTerm] = build_terms(config.objective.terms)
        self.requests: tuple[LogpRequest, ...] = merge_requests(self.terms)
        self.uses_reference = any(one.reference for one in self.requests)

    def details(self) -> dict[str, Any]:
        return {"losses": describe_terms(self.config.objective.terms)}

    @classmethod
    def check_config(cls, config: DpoConfig) -> None:
        super().check_config(config)
        check_reference(config, merge_requests(build_terms(config.objective.terms)))

    def build(self) -> StageParts:
        config, ranks = self.config, self.context.ranks
        pairs = stage_pairs(load_preferences(config.data), config.curriculum)
        eval_pairs = load_preferences(config.eval_data) if config.eval_data else []
        context = self.load(pair_texts(pairs))
        model = context.loaded.model
        if config.dpo.disable_dropout:
            disable_dropout(model)
        runtime.prepare(config.train, config.run, ranks)
        nn.Module.to(model, ranks.device)
        references = self._references(context)
        objective = DpoObjective(self.terms, self.requests, config.dpo, ranks)
        data = self._data(pairs, context, references, "train")
        evaluation = None
        if config.eval_data is not None:
            evaluation = self._data(eval_pairs, context, references, "eval")

        def store_references(trainer: Trainer) -> None:
            # With the engine's own weights and number types, and before any of them changes.
            for one in (data, evaluation):
                if references is not None and one is not None:
                    self._fill(references, one, objective, trainer)

        return StageParts(
            model=model,
            objective=objective,
            data=data,
            eval_data=evaluation,
            identity=self._identity(data),
            save=context.save_final,
            before_training=store_references,
        )

    def _references(self, context: StageContext) -> ReferenceStore | None:
        """Where the reference's log-probabilities are kept; None where none is stored. Opened
        before the engine has the model, whose weights it may cast or shard."""
        config = self.config
        if not self.uses_reference or not config.dpo.stored_reference:
            return None
        adapter_on = not starts_new_adapter(config.model)
        # The same weights give other last bits with another engine or number type, so these are
        # part of each address.
        base = {
            "weights": weights_fingerprint(context.loaded.model, adapter=adapter_on),
            "dtype": str(context.backbone.config.dtype),
            "temperature": config.dpo.temperature,
            "engine": engine_kind(config.run),
            "bf16": config.train.bf16,
        }
        references = ReferenceStore(config.store, context.store, self.context.folder, base)
        self.context.exits.callback(references.close)
        return references

    def _fill(
        self, references: ReferenceStore, data: DpoData, objective: DpoObjective, trainer: Trainer
    ) -> None:
        size = self.config.run.per_device_eval_batch_size
        ranks, record = self.context.ranks, self.context.record
        new_adapter = starts_new_adapter(self.config.model)
        with reference(trainer.engine.model) if new_adapter else nullcontext():
            fill_references(references, data, objective, trainer.engine, size, ranks, record)

    def _data(
        self,
        pairs: Sequence[Preference],
        context: StageContext,
        references: ReferenceStore | None,
        split: Split,
    ) -> DpoData:
        config = self.config
        plan = split_plan(self, config, split)
        loaded = context.loaded
        sized = sized_by_clip(loaded.processor)
        # Lengths are checked before the clips are encoded, which may take hours, unless clips
        # decide them.
        if not sized:
            measured = measure_pairs(pairs, loaded, self.terms, self.requests, plan.data)
        else:
            measured = []
        shown = media_samples(pairs, self.requests)
        samples, source = stored_rows(shown, context, plan.data, split=split)
        names = {sample.sample_id for sample in samples}
        kept = [at for at, pair in enumerate(pairs) if pair.sample.sample_id in names]
        pairs = [pairs[at] for at in kept]
        if sized:
            outline = source.outline
            measured = measure_pairs(pairs, loaded, self.terms, self.requests, plan.data, outline)
        else:
            measured = [measured[at] for at in kept]
        quiet = not self.context.ranks.is_main
        counts = print_pair_counts(pairs, self.terms, self.requests, quiet=quiet)
        read_as = reading(pair.names for pair in pairs)
        self.context.record.event(
            "pairs", of=split, pairs=len(pairs), counted=counts, read_as=read_as
        )
        collator = Collator(loaded.processor, source)
        frames = context.backbone.sampling.frames
        return DpoData(
            pairs,
            measured,
            PairBatcher(collator, source, self.terms, self.requests, frames),
            plan.curriculum,
            plan.batch_size,
            config.train.seed,
            alternate=config.dpo.alternate_queries and split == "train",
            live=self.uses_reference and not config.dpo.stored_reference,
            references=references,
        )

    def _identity(self, data: DpoData) -> Identity:
        """Everything that decides the weights: config, manifests, loss files, pairs with their
        negatives' features, tokens."""
        whole = dump(self.config)
        left_out = ("output_dir", "run", "store", "decode", "eval_data")
        deciding = {key: value for key, value in whole.items() if key not in left_out}
        deciding["dpo"].pop("grad_share_steps")  # only looks at gradients
        rows = [
            [
                pair.sample.sample_id,
                data.lengths[row],
                sorted(data.measured[row].token_digests.items()),
                data.branch_digests(row),
                [None if n is None else repr(asdict(n)) for n in (pair.negative, pair.irrelevant)],
            ]
            for row, pair in enumerate(data.pairs)
        ]
        inputs = input_digests(self.config.model, self.config.data)
        for one in describe_terms(self.config.objective.terms):
            inputs[f"loss {one['name']}"] = one["sha256"]
        return self.identity(deciding, inputs, rows)


def check_reference(config: DpoConfig, requests: Sequence[LogpRequest]) -> None:
    """Check that disabling the adapter gives the reference, if it is computed in every step.

    Raises:
        ConfigError: the model has no new adapter.
    """
    if config.dpo.stored_reference or not any(one.reference for one in requests):
        return
    if not starts_new_adapter(config.model):
        raise ConfigError(
            "dpo.stored_reference is false, so the reference is the model without its adapter, but "
            "this model has no new adapter; set model.lora (with model.adapter=merge if model.path "
            "is an adapter), or dpo.stored_reference=true"
        )


def chosen_rows(data: DataConfig) -> list[Sample]:
    """A row for each pair: its prompt with the chosen answer."""
    return [_answered(pair, pair.sample) for pair in load_preferences(data)]


def negative_rows(config: DpoConfig, data: DataConfig) -> list[Sample]:
    """A row for each negative that uses another clip, if any loss term needs it: the prompt about
    that clip, with the chosen answer."""
    asked = {one.branch for one in merge_requests(build_terms(config.objective.terms))}
    replaced: tuple[Branch, ...] = ("negative", "irrelevant")
    return [
        _answered(pair, branch_sample(pair, branch))
        for pair in load_preferences(data)
        for branch in replaced
        if branch in asked and has_branch(pair, branch)
    ]


def check_dpo(config: DpoConfig, loaded: Loaded, limit: int | None) -> tuple[int, int] | None:
    """Check the terms, the reference and the lengths of all answers, and print a summary.

    Args:
        limit: most tokens of a prompt with an answer; None: any number.

    Returns:
        The tokens of a pair's forward passes with gradient, and how many of them need logits, both
        of the largest pair. None where the clip decides the number of tokens.

    Raises:
        ConfigError: there is no reference, or a term can be computed for no pair.
        DataError: a prompt with one of its answers has more than ``limit`` tokens.
    """
    terms = build_terms(config.objective.terms)
    requests = merge_requests(terms)
    check_reference(config, requests)
    packed: tuple[int, int] | None = None
    for data in (config.data, config.eval_data):
        if data is None:
            continue
        pairs = load_preferences(data)
        print_pair_counts(pairs, terms, requests)
        if sized_by_clip(loaded.processor):
            continue
        measured = measure_pairs(pairs, loaded, terms, requests, data)
        check_lengths([p.sample for p in pairs], [one.longest for one in measured], limit)
        if data is config.data:
            keys = [one.key for one in requests if one.grad]
            sizes = [_size(pair, one, keys) for pair, one in zip(pairs, measured, strict=True)]
            packed = max(sizes)
            longest = max(one.longest for one in measured)
            console.print(
                f"longest prompt with an answer: {longest} tokens; largest pair in training: "
                f"{packed[0]} tokens"
            )
    stored = sum(one.reference for one in requests)
    if stored:
        how = "stored before training" if config.dpo.stored_reference else "computed in each step"
        console.print(f"reference: {stored} log-probabilities of each pair, {how}")
    return packed


def _answered(pair: Preference, sample: Sample) -> Sample:
    turns = (*sample.prompt, Turn("assistant", pair.answers["chosen"]))
    return replace(sample, turns=turns)


def _size(pair: Preference, measured: PairLengths, keys: Sequence[AnswerKey]) -> tuple[int, int]:
    """Tokens of a pair's prompts and answers together, and of its answers."""
    present = [key for key in keys if key[1] in measured.answers and has_branch(pair, key[0])]
    answers = sum(measured.answers[answer] for _, answer in present)
    return measured.prompt * len({branch for branch, _ in present}) + answers, answers
