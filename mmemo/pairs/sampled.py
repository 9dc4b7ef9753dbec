"""Pairs of a model's own answers: of several to one prompt, the best and the worst grounded.

Answers are kept in ``answers.jsonl`` of the run folder as they come; a killed run goes on. They are
scored afterwards, so that another reward draws nothing anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import think_text
from mmemo.config import dump
from mmemo.console import progress
from mmemo.data.collate import Collator
from mmemo.data.preference import Answer
from mmemo.data.sample import Sample
from mmemo.errors import DataError
from mmemo.evaluation.generate import model_fingerprint
from mmemo.features.encode import FeatureSource, ensure_features, open_store
from mmemo.generation.rollout import HFRollouts, rollout_seed
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import load_model
from mmemo.pairs.config import ModelSource, PairsConfig
from mmemo.pairs.rows import Draft, Left, prompt_only, query_of
from mmemo.pairs.steps import StepFile
from mmemo.rewards.rewards import FailureWatch, RewardSet
from mmemo.rewards.score_rollouts import GroupRollouts, score_completions
from mmemo.run_log import RunRecord
from mmemo.train.runtime import to_device

FILE = "answers.jsonl"
Answers = dict[str, list[int]]
"""The different answers to one prompt, and their tokens."""
_AT_ONCE = 64  # prompts whose answers are scored in one call


def from_model(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    left: Left,
    record: RunRecord,
) -> list[Draft]:
    """One draft for each prompt whose best and worst answer are far enough apart.

    Left out and counted: ``other_query``, ``bad_clip``, ``unscored`` (fewer than two answers that
    ended and have a score), ``tie``.

    Raises:
        ConfigError: the reward cannot be loaded.
        TrainingError: the reward fails too often, or too many clips are bad.
    """
    rewards = RewardSet([source.reward])
    asked = [prompt_only(sample) for sample in samples]
    kept = [one for one in asked if query_of(one, source.asks) in config.queries]
    for sample in asked:
        if query_of(sample, source.asks) not in config.queries:
            left.out("other_query", sample.sample_id)
    if not kept:
        raise DataError("no row asks one of the config's queries; widen queries")
    texts = _answers(config, source, kept, left, record)
    kept = [sample for sample in kept if sample.sample_id in texts]
    scores = _scores(source, rewards, kept, texts, record)
    drafts: list[Draft] = []
    for sample, values in zip(kept, scores, strict=True):
        draft = _pair(sample, [*texts[sample.sample_id]], values, source, left)
        if draft is not None:
            drafts.append(draft)
    return drafts


def _pair(
    sample: Sample,
    answers: Sequence[str],
    scores: Sequence[float],
    source: ModelSource,
    left: Left,
) -> Draft | None:
    scored = [(x, text) for x, text in zip(scores, answers, strict=True) if not math.isnan(x)]
    if len(scored) < 2:
        left.out("unscored", sample.sample_id)
        return None
    # The first of the best and of the worst, so that equal scores pair the same on every run.
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    if best[0] - worst[0] < source.min_gap:
        left.out("tie", sample.sample_id)
        return None
    kind = source.rejected_kind or _kind(sample, worst[1])
    pair = prompt_only(sample, "-pair")
    query = query_of(sample, source.asks)
    answered: dict[Answer, str] = {"chosen": best[1], kind or "spurious": worst[1]}
    return Draft(pair, query, answers=answered, plain=kind is None)


def _kind(sample: Sample, text: str) -> Answer | None:
    """What is wrong with an answer's cues, where the row says: an absent one comes first."""
    cues = sample.truth.cues
    present = set(cues.get("present", ()))
    wrong: list[tuple[Answer, set[str]]] = [
        ("hallucinated", set(cues.get("absent", ())) - present),
        ("spurious", set(cues.get("spurious", ())) - present),
    ]
    named = read_claims(think_text(text), {cue: (cue,) for kind in cues.values() for cue in kind})
    return next((name for name, listed in wrong if listed & named.asserted), None)


def _answers(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    left: Left,
    record: RunRecord,
) -> dict[str, Answers]:
    """Sample id -> its different answers that came to their end."""
    folder, root = Path(config.output_dir), Path(config.data.media_root)
    loaded = load_model(source.model, [turn.text for one in samples for turn in one.turns])
    model: Any = loaded.model
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
    backbone: Any = unwrap(model)
    with ExitStack() as exits:
        store = open_store(config.store, folder)
        ingest = ensure_features(
            list(samples),
            backbone,
            store,
            media_root=root,
            limits=config.decode,
            record=record,
            out_dir=folder,
        )
        usable = {sample.sample_id for sample in ingest.kept}
        for sample in samples:
            if sample.sample_id not in usable:
                left.out("bad_clip", sample.sample_id)
        reader = FeatureSource(ingest.kept, backbone, store, root, config.decode)
        exits.callback(reader.close)
        collate = Collator(loaded.processor, reader, config.data.max_length)
        file = StepFile(folder / FILE, _mark(config, source, model))
        engine = HFRollouts(loaded.processor.tokenizer, backbone, source.rollout)
        _draw(config, source, ingest.kept, model, engine, collate, file)
    record.event("answers", file=file.path, prompts=len(file.known))
    found: dict[str, Answers] = {}
    for sample in ingest.kept:
        values = file.known[_key(sample)]
        left.counts["answers_cut"] += sum(not ended for ended in values["ended"])
        drawn = zip(values["texts"], values["ids"], values["ended"], strict=True)
        found[sample.sample_id] = {text: ids for text, ids, ended in drawn if ended and text}
    return found


def _draw(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    model: nn.Module,
    engine: HFRollouts,
    collate: Collator,
    file: StepFile,
) -> None:
    """Draw what is not in the file. An answer depends on its prompt and number alone."""
    size, count = source.per_device_batch_size, source.rollout.num_generations
    todo = [sample for sample in samples if _key(sample) not in file.known]
    device = next(model.parameters()).device
    with progress("answers", len(samples), done=len(samples) - len(todo), unit="prompts") as bar:
        for start in range(0, len(todo), size):
            rows = todo[start : start + size]
            batch = to_device(collate(rows, generation=True), device)
            seeds = [
                rollout_seed(config.seed, "pairs", row.sample_id, copy)
                for row in rows
                for copy in range(count)
            ]
            drawn = engine.generate(model, batch, seeds)
            ended: list[bool] = drawn.ended.tolist()
            sizes: list[int] = drawn.mask.sum(1).tolist()
            ids = [one[:n] for one, n in zip(drawn.ids.tolist(), sizes, strict=True)]
            file.add(
                {
                    _key(row): {
                        "texts": drawn.texts[at * count : (at + 1) * count],
                        "ids": ids[at * count : (at + 1) * count],
                        "ended": ended[at * count : (at + 1) * count],
                    }
                    for at, row in enumerate(rows)
                }
            )
            bar.advance(len(rows))


def _scores(
    source: ModelSource,
    rewards: RewardSet,
    samples: Sequence[Sample],
    texts: dict[str, Answers],
    record: RunRecord,
) -> list[list[float]]:
    """For each sample the scores of its answers; NaN where the reward gave none."""
    watch = FailureWatch([source.reward])
    found: list[list[float]] = []
    state = SimpleNamespace(global_step=0, max_steps=0)
    for start in range(0, len(samples), _AT_ONCE):
        rows = [one for one in samples[start : start + _AT_ONCE] if texts[one.sample_id]]
        drawn = [
            GroupRollouts(0, [row], [*own], [*own.values()], [True] * len(own))
            for row in rows
            if (own := texts[row.sample_id])
        ]
        values: list[float] = []
        if drawn:
            scores = score_completions(rewards, drawn, state)
            for failure in scores.failures:
                record.event("reward_failed", **failure.event())
            watch.update(scores.failed(), len(scores.values))
            values = scores.values[:, 0].tolist()
        for row in samples[start : start + _AT_ONCE]:
            number = len(texts[row.sample_id])
            found.append(values[:number])
            values = values[number:]
    return found


def _key(sample: Sample) -> str:
    """The row's name, and a hash of what the model is asked and shown."""
    parts = [[(turn.role, turn.text) for turn in sample.turns], repr(sorted(sample.media.items()))]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{sample.sample_id}/{digest}"


def _mark(config: PairsConfig, source: ModelSource, model: nn.Module) -> str:
    """Of all that decides the answers beside the prompts."""
    parts = [model_fingerprint(model), dump(source.rollout), config.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
