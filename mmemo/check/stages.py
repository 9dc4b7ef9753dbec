"""What the built-in stages read, and what ``mmemo check`` looks at in their configs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mmemo.check.plan import CheckPlan, TrainingPlan
from mmemo.console import console
from mmemo.data.curriculum import CurriculumConfig, stage_rows
from mmemo.data.manifest import load_samples
from mmemo.data.preference import Preference, load_preferences
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import load_benchmark, tell_excluded, validate
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.generate import check_change, check_generation
from mmemo.evaluation.reward_scores import load_scores
from mmemo.features.inputs import ClipRows, StageInputs
from mmemo.losses.objective import AnswerKey, build_terms, merge_requests
from mmemo.models.build import Loaded
from mmemo.pairs.config import PairsConfig
from mmemo.rewards.opened import check_opened
from mmemo.rewards.rewards import label_set
from mmemo.train.dpo import train as dpo
from mmemo.train.dpo.batch import has_branch
from mmemo.train.dpo.config import DpoConfig
from mmemo.train.dpo.dataset import pair_texts, stage_pairs
from mmemo.train.encoders import EncodersConfig
from mmemo.train.grpo import train as grpo
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.sft import SftConfig
from mmemo.train.stage import row_texts


def sft_inputs(config: SftConfig) -> StageInputs:
    """The rows of the stage's tiers and of those that it replays, and ``eval_data``."""
    rows = load_samples(config.data)
    parts = [ClipRows(config.data, drawn_rows(rows, config.curriculum))]
    if config.eval_data is not None:
        parts.append(ClipRows(config.eval_data, load_samples(config.eval_data), "eval_data"))
    return _inputs(config, parts, row_texts(rows))


def grpo_inputs(config: GrpoConfig) -> StageInputs:
    """The prompts of the stage's tiers and of those that it replays."""
    rows = load_samples(config.data)
    parts = [ClipRows(config.data, drawn_rows(rows, config.curriculum))]
    return _inputs(config, parts, row_texts(rows))


def dpo_inputs(config: DpoConfig) -> StageInputs:
    """The pairs with their chosen answers, and their negatives' clips where a loss term needs
    them; the same for ``eval_data``."""
    parts: list[ClipRows] = []
    for title, data in (("", config.data), ("eval_data", config.eval_data)):
        if data is None:
            continue
        rows = dpo.chosen_rows(data)
        if data is config.data:
            rows = drawn_rows(rows, config.curriculum)
        parts.append(ClipRows(data, rows, title))
        drawn = {row.sample_id for row in rows}
        negatives = [row for row in dpo.negative_rows(config, data) if row.sample_id in drawn]
        if negatives:
            parts.append(ClipRows(data, negatives, f"{title}: negatives".removeprefix(": ")))
    pairs = stage_pairs(load_preferences(config.data), config.curriculum)
    return _inputs(config, parts, pair_texts(pairs))


def eval_inputs(config: EvalConfig) -> StageInputs:
    """The benchmark's questions about their clips.

    Raises:
        EvaluationError, ConfigError, DataError: the benchmark, a score or a row is unsound.
    """
    found = load_benchmark(config.benchmark.path, config.benchmark.params)
    selected = found.select(config.data)
    questions = found.ask(selected, config.data)
    validate(found, questions)
    load_scores(config.scores, questions)
    check_generation(config.generation, questions)
    console.print(
        f"{config.benchmark.path}: {len(questions)} questions; the right answer scores 1."
    )
    tell_excluded(selected)
    # The model sees the benchmark's question, not the turns of the manifest.
    rows = [replace(question.sample, turns=question.turns) for question in questions]
    texts = [turn.text for question in questions for turn in question.sample.turns]
    return _inputs(config, [ClipRows(config.data, rows)], texts)


def sft_training(config: SftConfig) -> TrainingPlan:
    """How SFT trains."""
    return TrainingPlan(
        config.train,
        config.run,
        config.curriculum,
        config.trainable,
        packing=None if config.packing is None else config.packing.max_tokens,
    )


def grpo_training(config: GrpoConfig) -> TrainingPlan:
    """How GRPO trains."""
    reference = grpo.reference_kind(config)
    iterations = config.generation_steps * config.grpo.num_iterations
    return TrainingPlan(
        config.train,
        config.run,
        config.curriculum,
        config.trainable,
        rollout=config.rollout,
        max_tokens_per_batch=config.grpo.max_tokens_per_batch,
        reference=reference,
        scores=reference is not None or iterations > 1,
        dropout=not config.grpo.disable_dropout,
        shared_prefix=config.grpo.shared_prefix,
        drawn_batches=config.generation_steps * config.train.gradient_accumulation_steps,
    )


def dpo_training(config: DpoConfig, pairs: Sequence[Preference] = ()) -> TrainingPlan:
    """How DPO trains. Without ``pairs``, each has all answers and negatives that the terms read."""
    requests = merge_requests(build_terms(config.objective.terms))
    reference = dpo.live_reference(config, requests)
    keys = _pair_keys(config)
    keys = max((_present(one, keys) for one in pairs), key=len, default=keys)
    return TrainingPlan(
        config.train,
        config.run,
        config.curriculum,
        config.trainable,
        reference=reference,
        scores=reference is not None,
        dropout=not config.dpo.disable_dropout,
        shared_prefix=config.dpo.shared_prefix,
        branches=max(1, len({branch for branch, _ in keys})),
        answers=max(1, len(keys)),
    )


def plan_without_rows(config: Any) -> CheckPlan:
    """The plan of a stage by its config alone, for a forecast of memory.

    Raises:
        ConfigError: the stage has no model that is trained or answers.
    """
    trainings: dict[type[Any], Callable[[Any], TrainingPlan]] = {
        SftConfig: sft_training,
        GrpoConfig: grpo_training,
        DpoConfig: dpo_training,
    }
    found = next((make for kind, make in trainings.items() if isinstance(config, kind)), None)
    if found is not None:
        new = config.rollout.max_completion_length if isinstance(config, GrpoConfig) else 0
        return CheckPlan((), config.decode, None, found(config), found, new_tokens=new)
    if isinstance(config, EvalConfig):
        return CheckPlan(
            (),
            config.decode,
            new_tokens=config.generation.max_new_tokens,
            batch_size=config.per_device_eval_batch_size,
        )
    raise ConfigError("--lengths forecasts the memory of sft, grpo, dpo and eval; leave it out")


def _pair_keys(config: DpoConfig) -> list[AnswerKey]:
    requests = merge_requests(build_terms(config.objective.terms))
    return [one.key for one in requests if one.grad]


def _present(pair: Preference, keys: Sequence[AnswerKey]) -> list[AnswerKey]:
    """Those of the keys that a pair has."""
    return [key for key in keys if key[1] in pair.answers and has_branch(pair, key[0])]


def _answer_tokens(pair: Preference, keys: Sequence[AnswerKey], loaded: Loaded) -> int:
    """Tokens of a pair's answers, with the tokens that end them."""
    tokens: Any = loaded.processor.tokenizer
    texts = [pair.answers[answer] for _, answer in _present(pair, keys)]
    return sum(len(tokens.encode(text, add_special_tokens=False)) + 2 for text in texts)


def check_sft(config: SftConfig) -> CheckPlan:
    """``mmemo check`` for SFT."""
    inputs = sft_inputs(config)
    return CheckPlan(
        inputs.parts,
        config.decode,
        inputs,
        sft_training(config),
        sft_training,
        generation=False,
    )


def check_grpo(config: GrpoConfig) -> CheckPlan:
    """``mmemo check`` for GRPO: every reward is proved, and a few samples are shown, too."""
    rows = load_samples(config.data)
    drawn = drawn_rows(rows, config.curriculum)

    def check_model(loaded: Loaded, _: int | None) -> None:
        check_opened(config.rewards, drawn, loaded.processor.opened)
        grpo.sample_for_check(config, drawn, loaded)

    inputs = _inputs(config, [ClipRows(config.data, drawn)], row_texts(rows))
    return CheckPlan(
        inputs.parts,
        config.decode,
        inputs,
        grpo_training(config),
        grpo_training,
        new_tokens=config.rollout.max_completion_length,
        check_rows=lambda: grpo.check_grpo(config, drawn, label_set(rows)),
        check_model=check_model,
    )


def check_dpo(config: DpoConfig) -> CheckPlan:
    """``mmemo check`` for DPO: terms, reference and the lengths of all answers, too."""
    inputs = dpo_inputs(config)
    pairs = stage_pairs(load_preferences(config.data), config.curriculum)
    keys = _pair_keys(config)

    def check_model(loaded: Loaded, limit: int | None) -> tuple[int, int]:
        found = dpo.check_dpo(config, loaded, limit)
        return found or (0, max(_answer_tokens(one, keys, loaded) for one in pairs))

    return CheckPlan(
        inputs.parts,
        config.decode,
        inputs,
        dpo_training(config, pairs),
        lambda changed: dpo_training(changed, pairs),
        generation=False,
        check_model=check_model,
    )


def check_eval(config: EvalConfig) -> CheckPlan:
    """``mmemo check`` for an evaluation: the benchmark and its scores, too."""
    inputs = eval_inputs(config)

    def majority() -> None:
        if config.majority_from is not None:
            load_samples(config.majority_from)

    return CheckPlan(
        inputs.parts,
        config.decode,
        inputs,
        new_tokens=config.generation.max_new_tokens,
        batch_size=config.per_device_eval_batch_size,
        check_rows=majority,
        check_model=lambda loaded, _: check_change(loaded.model, config.generation),
    )


def check_encoders(config: EncodersConfig) -> CheckPlan:
    """``mmemo check`` for the training of encoders: rows and files."""
    return CheckPlan([ClipRows(config.data, load_samples(config.data))], config.decode)


def check_pairs(config: PairsConfig) -> CheckPlan:
    """``mmemo check`` for preference pairs: rows and files."""
    return CheckPlan([ClipRows(config.data, load_samples(config.data))], config.decode)


def drawn_rows(samples: list[Sample], curriculum: CurriculumConfig) -> list[Sample]:
    """The rows that a stage of the curriculum can draw: those of its tiers, and of earlier ones
    if it replays them.

    Raises:
        DataError: no row has one of the tiers.
    """
    own = set(stage_rows(samples, curriculum))
    earlier = curriculum.earlier() if curriculum.replay_share > 0 else []
    return [
        sample for index, sample in enumerate(samples) if index in own or sample.tier in earlier
    ]


def _inputs(
    config: SftConfig | GrpoConfig | DpoConfig | EvalConfig,
    parts: Sequence[ClipRows],
    texts: Sequence[str],
) -> StageInputs:
    return StageInputs(
        output_dir=config.output_dir,
        model=config.model,
        parts=parts,
        texts=texts,
        decode=config.decode,
        store=config.store,
    )
