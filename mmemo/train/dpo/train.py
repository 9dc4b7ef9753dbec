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

from mmemo.config import dump
from mmemo.console import console
from mmemo.data.collate import Collator, check_lengths, sized_by_clip
from mmemo.data.manifest import DataConfig
from mmemo.data.pair_names import reading
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import Sample, Turn
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
from mmemo.train.config import zero_stage
from mmemo.train.dpo.batch import PairBatcher, PairLengths, branch_sample, has_branch, media_samples
from mmemo.train.dpo.config import DpoConfig
from mmemo.train.dpo.dataset import (
    DpoData,
    check_pair_counts,
    measure_pairs,
    pair_texts,
    print_pair_counts,
    stage_pairs,
)
from mmemo.train.dpo.objective import DpoObjective
from mmemo.train.dpo.reference_store import ReferenceStore, fill_references, reference_fingerprint
from mmemo.train.dpo.selection import Selection, load_pairs, negative_counts
from mmemo.train.engine import engine_kind
from mmemo.train.reference import (
    ReferenceKind,
    check_adapter_off,
    disable_dropout,
    make_reference,
    reference,
    starts_new_adapter,
)
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    MediaStage,
    RunContext,
    Split,
    StageContext,
    StageParts,
    check_packs,
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
        check_packs(config.model, config.dpo.shared_prefix, "dpo.shared_prefix=false")
        check_reference(config, merge_requests(build_terms(config.objective.terms)))

    def build(self) -> StageParts:
        config, ranks = self.config, self.context.ranks
        pairs = stage_pairs(load_pairs(config.data, self.requests, config.dpo), config.curriculum)
        held = config.eval_data
        eval_pairs = [] if held is None else load_pairs(held, self.requests, config.dpo)
        context = self.load(pair_texts(pairs))
        model = context.loaded.model
        if config.dpo.disable_dropout:
            disable_dropout(model)
        references = self._references(context)
        kind = live_reference(config, self.requests)
        zero = zero_stage(config.run)
        start = None if kind is None else make_reference(model, kind, zero_stage=zero)
        limit, balance = config.train.max_logits, config.train.router_aux_loss_coef
        given = (self.terms, self.requests, config.dpo, ranks, start)
        objective = DpoObjective(*given, max_logits=limit, router_aux_loss_coef=balance)
        data = self._data(pairs, context, references, "train")
        evaluation = None
        if config.eval_data is not None:
            evaluation = self._data(eval_pairs, context, references, "eval")

        def keep_reference(trainer: Trainer) -> None:
            # With the engine's own weights and number types, and before any of them changes.
            objective.reference.at_start(trainer.engine.model)
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
            before_training=keep_reference,
        )

    def _references(self, context: StageContext) -> ReferenceStore | None:
        """Where the reference's log-probabilities are kept; None where none is stored. Opened
        before the engine has the model, whose weights it may cast or shard."""
        config = self.config
        if not self.uses_reference or config.dpo.reference != "stored":
            return None
        adapter_on = not starts_new_adapter(config.model)
        # The same model gives other last bits on another device, with another engine, number type
        # or kind of forward pass, so these are part of each address.
        base = {
            "model": reference_fingerprint(context.loaded.model, adapter=adapter_on),
            "dtype": str(context.backbone.config.dtype),
            "temperature": config.dpo.temperature,
            "engine": engine_kind(config.run),
            "bf16": config.train.bf16,
            "device": self.context.ranks.device.type,
            "shared_prefix": config.dpo.shared_prefix,
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
        given = loaded, self.terms, self.requests, plan.data
        check_pair_counts(pairs, self.terms, self.requests)
        selection = Selection.of(pairs)
        selection.drop_unlearnable(self.terms, self.requests)
        # Lengths are checked before the clips are encoded, which may take hours, unless clips
        # decide them.
        measured: dict[int, PairLengths] = {}
        if not sized:
            measured = self._measured(selection, measure_pairs(selection.pairs, *given))
        shown = media_samples(selection.pairs, self.requests)
        samples, source = stored_rows(shown, context, plan.data, split=split)
        names = {sample.sample_id for sample in samples}
        selection.keep(lambda pair: pair.sample.sample_id in names)
        if sized:
            outline = source.outline
            measured = self._measured(selection, measure_pairs(selection.pairs, *given, outline))
        frames = context.backbone.sampling.frames
        collator = Collator(loaded.processor, source)
        batcher = PairBatcher(collator, source, self.terms, self.requests, frames)
        selection.drop_same_clip(batcher.branch_digest, self.requests)
        selection.drop_unlearnable(self.terms, self.requests)
        selection.check_any()
        self._tell(selection, split)
        return DpoData(
            selection.pairs,
            [measured[row] for row in selection.rows],
            batcher,
            plan.curriculum,
            plan.batch_size,
            config.train.seed,
            alternate=config.dpo.alternate_queries and split == "train",
            live=live_reference(config, self.requests) is not None,
            references=references,
        )

    def _measured(
        self, selection: Selection, lengths: Sequence[PairLengths]
    ) -> dict[int, PairLengths]:
        """The measures by the pairs' places, once equal answers are left out."""
        found = dict(zip(selection.rows, lengths, strict=True))
        selection.drop_same_tokens(lengths)
        selection.drop_unlearnable(self.terms, self.requests)
        selection.check_any()
        return found

    def _tell(self, selection: Selection, split: Split) -> None:
        """Print and record which pairs the run learns from."""
        pairs, main = selection.pairs, self.context.ranks.is_main
        counts = print_pair_counts(pairs, self.terms, self.requests, quiet=not main)
        if main:
            selection.tell(self.requests)
        self.context.record.event(
            "pairs",
            of=split,
            pairs=len(pairs),
            counted=counts,
            negatives=negative_counts(pairs, self.requests),
            left_out=selection.left_out,
            read_as=reading(pair.names for pair in pairs),
        )

    def _identity(self, data: DpoData) -> Identity:
        """Everything that decides the weights: config, manifests, loss files, pairs with their
        negatives' features, tokens."""
        whole = dump(self.config)
        left_out = ("output_dir", "run", "store", "decode", "eval_data")
        deciding = {key: value for key, value in whole.items() if key not in left_out}
        deciding["dpo"].pop("grad_share_steps")  # only looks at gradients
        # Under the name that checkpoints of version 0.3 have. Where it is kept decides nothing.
        deciding["dpo"]["stored_reference"] = deciding["dpo"].pop("reference") == "stored"
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


def live_reference(config: DpoConfig, requests: Sequence[LogpRequest]) -> ReferenceKind | None:
    """What computes the reference in every step; None where it is stored, or not needed."""
    kind = config.dpo.reference
    return None if kind == "stored" or not any(one.reference for one in requests) else kind


def check_reference(config: DpoConfig, requests: Sequence[LogpRequest]) -> None:
    """Check that disabling the adapter gives the reference, if it is to be computed in this way.

    Raises:
        ConfigError: the model has no new adapter.
    """
    if live_reference(config, requests) == "adapter_off":
        check_adapter_off(config.model, "dpo.reference", "stored, copy or copy_cpu")


def chosen_rows(data: DataConfig) -> list[Sample]:
    """A row for each pair: its prompt with the chosen answer."""
    return [_answered(pair, pair.sample) for pair in load_preferences(data)]


def negative_rows(config: DpoConfig, data: DataConfig) -> list[Sample]:
    """A row for each negative that uses another clip, if any loss term needs it: the prompt about
    that clip, with the chosen answer."""
    requests = merge_requests(build_terms(config.objective.terms))
    asked = {one.branch for one in requests}
    replaced: tuple[Branch, ...] = ("negative", "irrelevant")
    return [
        _answered(pair, branch_sample(pair, branch))
        for pair in load_pairs(data, requests, config.dpo)
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
        pairs = load_pairs(data, requests, config.dpo)
        print_pair_counts(pairs, terms, requests)
        selection = Selection.of(pairs)
        selection.drop_unlearnable(terms, requests)
        pairs = selection.pairs
        if sized_by_clip(loaded.processor):
            selection.tell(requests)
            continue
        measured = measure_pairs(pairs, loaded, terms, requests, data)
        check_lengths([p.sample for p in pairs], [one.longest for one in measured], limit)
        selection.drop_same_tokens(measured)
        selection.drop_unlearnable(terms, requests)
        selection.check_any()
        selection.tell(requests)
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
        kind = live_reference(config, requests)
        how = "stored before training" if kind is None else f"computed in each step ({kind})"
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
