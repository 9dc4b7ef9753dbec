"""Preference optimisation with AVEm-DPO's objectives: an SFT model in, a better grounded one out.

Each step holds a pair's chosen answer against its rejected ones, after the clip, after a worse
clip and without any, as the config's terms ask for. The loop, its checkpoints and its promises are
those of SFT.

Sources: Rafailov et al., arXiv 2305.18290; AVEm-DPO, arXiv 2602.07054; see ``mmemo/losses``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mmemo.config import dump, save_resolved
from mmemo.console import console
from mmemo.data.collate import Collator, check_lengths, sized_by_clip
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError
from mmemo.features.encode import open_store
from mmemo.features.store import FeatureStore
from mmemo.losses.objective import (
    AnswerKey,
    Branch,
    BuiltTerm,
    LogpRequest,
    build_terms,
    describe_terms,
    merge_requests,
)
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, load_model, set_trainable
from mmemo.run_log import RunRecord
from mmemo.train import runtime
from mmemo.train.distributed import Ranks, StopRequest, run_lock
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
from mmemo.train.reference import disable_dropout, reference
from mmemo.train.resume import Identity
from mmemo.train.stage import (
    check_deepspeed,
    input_digests,
    save_final,
    say_what_learns,
    stored_rows,
    versions,
)
from mmemo.train.trainer import Trainer

__all__ = ["DpoConfig", "DpoData", "run_dpo"]


def run_dpo(config: DpoConfig) -> Path:
    """Run the stage, from its newest checkpoint if it was stopped; returns ``output_dir/final``.

    Raises:
        ConfigError: config, data, terms or model do not fit, or changed since the checkpoint.
        DataError: a row is wrong.
        TrainingError: too many bad clips or non-finite steps.
        CheckpointError: a checkpoint could not be written, or does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    check_deepspeed(config.run, config.store)
    folder = Path(config.output_dir)
    with ExitStack() as exits:
        stop = exits.enter_context(StopRequest())
        ranks = Ranks(cpu=config.run.use_cpu)
        exits.enter_context(run_lock(folder, ranks))
        return _Stage(config, folder, ranks, stop, exits).run()


@dataclass
class _Stage:
    config: DpoConfig
    folder: Path
    ranks: Ranks
    stop: StopRequest
    exits: ExitStack

    def __post_init__(self) -> None:
        self.terms: list[BuiltTerm] = build_terms(self.config.objective.terms)
        self.wanted: tuple[LogpRequest, ...] = merge_requests(self.terms)
        self.refers = any(one.reference for one in self.wanted)

    def run(self) -> Path:
        config, ranks = self.config, self.ranks
        check_reference(config, self.wanted)
        record = RunRecord(self.folder, enabled=ranks.is_main)
        if ranks.is_main:
            save_resolved(config, self.folder / "config.yaml")
        record.event(
            "dpo",
            config=dump(config),
            losses=describe_terms(config.objective.terms),
            versions=versions(),
            ranks=ranks.size,
        )
        pairs = stage_pairs(load_preferences(config.data), config.curriculum)
        eval_pairs = load_preferences(config.eval_data) if config.eval_data else []
        loaded = load_model(config.model, pair_texts(pairs), base_dir=self.folder / "base")
        say_what_learns(loaded, set_trainable(loaded.model, config.trainable), ranks)
        if config.dpo.disable_dropout:
            disable_dropout(loaded.model)
        runtime.prepare(config.train, config.run, ranks)
        nn.Module.to(loaded.model, ranks.device)
        base = self._reference(loaded)
        store = open_store(config.store, self.folder)
        if store is not None:
            self.exits.enter_context(store)
        objective = DpoObjective(self.terms, self.wanted, config.dpo, ranks)
        data = self._data(pairs, loaded, store, record, objective)
        evaluation = None
        if config.eval_data is not None:
            evaluation = self._data(eval_pairs, loaded, store, record, objective, "eval")
        loop = Trainer(
            model=loaded.model,
            objective=objective,
            data=data,
            eval_data=evaluation,
            folder=self.folder,
            train=config.train,
            run=config.run,
            identity=self._identity(data),
            record=record,
            ranks=ranks,
            stop=self.stop,
        )
        if base is not None:
            # With the engine's own weights and number types, and before any of them changes.
            given = {**base, "engine": loop.engine.kind, "bf16": config.train.bf16}
            references = ReferenceStore(config.store, store, self.folder, given)
            self.exits.callback(references.close)
            for one in (data, evaluation):
                if one is not None:
                    self._fill(references, one, loop, record)
        loop.run()
        return save_final(loaded, loop, self.folder, ranks, record)

    def _reference(self, loaded: Loaded) -> dict[str, Any] | None:
        """What names the reference; None where none is stored."""
        if not self.refers or not self.config.dpo.stored_reference:
            return None
        on = not starts_new_adapter(self.config.model)
        return {
            "weights": weights_fingerprint(loaded.model, adapter=on),
            "dtype": str(unwrap(loaded.model).config.dtype),
            "temperature": self.config.dpo.temperature,
        }

    def _fill(
        self, references: ReferenceStore, data: DpoData, loop: Trainer, record: RunRecord
    ) -> None:
        data.references = references
        model = loop.engine.model
        new = starts_new_adapter(self.config.model)
        with reference(model) if new else nullcontext():
            fill_references(
                references,
                data,
                model,
                loop.engine.autocast,
                self.config.run.per_device_eval_batch_size,
                self.ranks,
                record,
            )

    def _data(
        self,
        pairs: Sequence[Preference],
        loaded: Loaded,
        store: FeatureStore | None,
        record: RunRecord,
        objective: DpoObjective,
        what: str = "train",
    ) -> DpoData:
        config, ranks = self.config, self.ranks
        data = config.data if what == "train" or config.eval_data is None else config.eval_data
        sized = sized_by_clip(loaded.processor)
        given = (loaded, self.terms, self.wanted, data)
        measured = [] if sized else measure_pairs(pairs, *given)
        kept, source = stored_rows(
            media_samples(pairs, self.wanted),
            loaded,
            store,
            record,
            data=data,
            decode=config.decode,
            run=config.run,
            out_dir=self.folder if what == "train" else self.folder / "eval_data",
            ranks=ranks,
            exits=self.exits,
        )
        names = {sample.sample_id for sample in kept}
        left = [at for at, pair in enumerate(pairs) if pair.sample.sample_id in names]
        pairs = [pairs[at] for at in left]
        if sized:
            measured = measure_pairs(pairs, *given, source.outline)
        else:
            measured = [measured[at] for at in left]
        counts = print_pair_counts(pairs, self.terms, self.wanted, quiet=not ranks.is_main)
        record.event("pairs", of=what, pairs=len(pairs), counted=counts)
        train = config.train
        if what == "train":
            size = train.per_device_train_batch_size * train.gradient_accumulation_steps
            curriculum = config.curriculum
        else:
            size = config.run.per_device_eval_batch_size
            curriculum = CurriculumConfig(longest_first=False)
        collator = Collator(loaded.processor, source)
        frames = unwrap(loaded.model).sampling.frames
        made = DpoData(
            pairs,
            measured,
            PairBatcher(collator, source, self.terms, self.wanted, frames),
            curriculum,
            size * ranks.size,
            train.seed,
            alternate=config.dpo.alternate_queries and what == "train",
            live=self.refers and not config.dpo.stored_reference,
        )
        made.objective = objective
        return made

    def _identity(self, data: DpoData) -> Identity:
        """Everything that decides the weights: config, manifests, loss files, pairs with their
        negatives' features, tokens."""
        whole = dump(self.config)
        left_out = ("output_dir", "run", "store", "decode", "eval_data")
        deciding = {key: value for key, value in whole.items() if key not in left_out}
        deciding["dpo"].pop("grad_share_steps")
        # Only their product decides which pairs make a step.
        deciding["train"].pop("gradient_accumulation_steps")
        deciding["train"]["rows_per_step"] = data.batch_size
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
        inputs["rows"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Identity(deciding, inputs)


def check_reference(config: DpoConfig, wanted: Sequence[LogpRequest]) -> None:
    """Raises:
    ConfigError: the reference is to be computed in every step, and no adapter can be switched off
        to have it.
    """
    if config.dpo.stored_reference or not any(one.reference for one in wanted):
        return
    if not starts_new_adapter(config.model):
        raise ConfigError(
            "dpo.stored_reference is off, so the reference is the model without its adapter, and "
            "this one has no new adapter; give model.lora (with model.adapter=merge on an "
            "adapter), or set dpo.stored_reference=true"
        )


# ``mmemo check`` for what only a preference config has: pairs, negatives, terms, the reference.


def chosen_rows(data: DataConfig) -> list[Sample]:
    """The pairs as rows with their chosen answers."""
    return [_answered(pair, pair.sample) for pair in load_preferences(data)]


def negative_rows(config: DpoConfig, data: DataConfig) -> list[Sample]:
    """The same of the negatives that are clips of their own, as far as a term reads them."""
    asked = {one.branch for one in merge_requests(build_terms(config.objective.terms))}
    replaced: tuple[Branch, ...] = ("negative", "irrelevant")
    return [
        _answered(pair, branch_sample(pair, branch))
        for pair in load_preferences(data)
        for branch in replaced
        if branch in asked and has_branch(pair, branch)
    ]


def check_dpo(config: DpoConfig, loaded: Loaded, limit: int | None) -> tuple[int, int] | None:
    """Check terms, reference and the lengths of all answers, and print what was found.

    Returns:
        Tokens that a pair's forward passes with gradient have together, and those of them whose
        logits are needed: the most of any pair. None where the clip decides how many.

    Raises:
        ConfigError: there is no reference, or a term can be computed for no pair.
        DataError: a prompt with one of its answers has more tokens than fit.
    """
    terms = build_terms(config.objective.terms)
    wanted = merge_requests(terms)
    check_reference(config, wanted)
    packed: tuple[int, int] | None = None
    for data in (config.data, config.eval_data):
        if data is None:
            continue
        pairs = load_preferences(data)
        print_pair_counts(pairs, terms, wanted)
        if sized_by_clip(loaded.processor):
            continue
        measured = measure_pairs(pairs, loaded, terms, wanted, data)
        check_lengths([p.sample for p in pairs], [one.longest for one in measured], limit)
        if data is config.data:
            learnt = [one.key for one in wanted if one.grad]
            sizes = [_size(pair, one, learnt) for pair, one in zip(pairs, measured, strict=True)]
            packed = max(sizes)
            longest = max(one.longest for one in measured)
            console.print(
                f"longest prompt with an answer: {longest} tokens; of one pair at most "
                f"{packed[0]} tokens are learnt from together"
            )
    stored = sum(one.reference for one in wanted)
    if stored:
        how = "stored before training" if config.dpo.stored_reference else "computed in each step"
        console.print(f"reference: {stored} log-probabilities of each pair, {how}")
    return packed


def _answered(pair: Preference, sample: Sample) -> Sample:
    turns = (*sample.prompt, Turn("assistant", pair.answers["chosen"]))
    return replace(sample, turns=turns)


def _size(pair: Preference, measured: PairLengths, learnt: Sequence[AnswerKey]) -> tuple[int, int]:
    there = [
        place for place in learnt if place[1] in measured.answers and has_branch(pair, place[0])
    ]
    answers = sum(measured.answers[place[1]] for place in there)
    return measured.prompt * len({place[0] for place in there}) + answers, answers
