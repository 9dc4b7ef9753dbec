"""Pairs of a model's own answers: the best and the worst of several answers to one prompt.

Answers are written to ``answers.jsonl`` in the run folder as they are sampled, so a killed run
resumes. They are scored afterwards, so another reward can be tried without sampling again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmemo.answers.claims import read_claims
from mmemo.answers.messages import think_text
from mmemo.console import progress
from mmemo.data.collate import Collator
from mmemo.data.manifest import load_samples
from mmemo.data.preference import Answer
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.generate import model_fingerprint
from mmemo.features.encode import FeatureSource, ensure_features, open_store
from mmemo.generation.readable import Vocabulary, read_answer, vocabulary_of
from mmemo.generation.rollout import HFRollouts, RolloutEngine, rollout_seed
from mmemo.generation.vllm.connect import connect
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, load_model
from mmemo.pairs.config import ModelSource, PairsConfig
from mmemo.pairs.rows import PairDraft, SkippedRows, can_be_asked, prompt_only, query_of
from mmemo.pairs.steps import StepFile, read_steps
from mmemo.rewards.rewards import FailureWatch, RewardSet, label_set
from mmemo.rewards.score_rollouts import GroupRollouts, score_completions
from mmemo.run_log import RunRecord
from mmemo.train.runtime import to_device

FILE = "answers.jsonl"
PARTS = "parts"
"""Folder beside it for the answers that several processes sample."""
AnswerTokens = dict[str, list[int]]
"""The distinct answers to one prompt -> their tokens."""
_PROMPTS_PER_CALL = 64  # prompts whose answers are scored in one call of the reward


def from_model(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    skipped: SkippedRows,
    record: RunRecord,
) -> list[PairDraft]:
    """One draft for each prompt whose best and worst answer differ enough in their scores.

    Rows are skipped and counted as ``other_query``, ``no_such_stream`` (the question is about a
    modality that the clip lacks), ``bad_clip``, ``unscored`` (fewer than two answers that ended and
    have a score), or ``tie``.

    Raises:
        ConfigError: the reward cannot be loaded.
        DataError: no row asks one of the config's queries.
        TrainingError: the reward fails too often, or too many clips are bad.
    """
    rewards = RewardSet([source.reward], label_set(samples))
    kept = _asked(config, source, samples, skipped)
    texts = _sample_answers(config, source, kept, skipped, record)
    kept = [sample for sample in kept if sample.sample_id in texts]
    scores = _score_answers(source, rewards, kept, texts, record)
    drafts: list[PairDraft] = []
    for sample, values in zip(kept, scores, strict=True):
        draft = _best_and_worst(sample, [*texts[sample.sample_id]], values, source, skipped)
        if draft is not None:
            drafts.append(draft)
    return drafts


def sample_share(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    record: RunRecord,
    share: tuple[int, int],
) -> None:
    """Sample the answers that fall to one of several processes, and keep them for
    :func:`from_model`.

    Args:
        share: rank and number of the processes.

    Raises:
        DataError, TrainingError: as :func:`from_model`.
    """
    skipped = SkippedRows()
    kept = _asked(config, source, samples, skipped)
    _sample_answers(config, source, kept, skipped, record, share)


def _asked(
    config: PairsConfig, source: ModelSource, samples: Sequence[Sample], skipped: SkippedRows
) -> list[Sample]:
    """The rows whose question is one of the config's."""
    kept: list[Sample] = []
    for sample in map(prompt_only, samples):
        query = query_of(sample, source.asks)
        if query not in config.queries:
            skipped.add("other_query", sample.sample_id)
        elif not can_be_asked(sample, query):
            # Before sampling, which may take hours: such a pair could not be read back.
            skipped.add("no_such_stream", sample.sample_id)
        else:
            kept.append(sample)
    if not kept:
        raise DataError(
            "no row asks one of the config's queries about a clip that has what it asks about; add "
            "to queries, or to source.asks"
        )
    return kept


def _best_and_worst(
    sample: Sample,
    answers: Sequence[str],
    scores: Sequence[float],
    source: ModelSource,
    skipped: SkippedRows,
) -> PairDraft | None:
    scored = [(x, text) for x, text in zip(scores, answers, strict=True) if not math.isnan(x)]
    if len(scored) < 2:
        skipped.add("unscored", sample.sample_id)
        return None
    # max and min take the first of equal scores, so every run makes the same pairs.
    best, worst = max(scored, key=lambda one: one[0]), min(scored, key=lambda one: one[0])
    if best[0] - worst[0] < source.min_gap:
        skipped.add("tie", sample.sample_id)
        return None
    kind = source.rejected_kind or _rejected_kind(sample, worst[1])
    pair = prompt_only(sample, "-pair")
    query = query_of(sample, source.asks)
    answered: dict[Answer, str] = {"chosen": best[1], kind or "spurious": worst[1]}
    return PairDraft(pair, query, answers=answered, plain=kind is None)


def _rejected_kind(sample: Sample, text: str) -> Answer | None:
    """The kind of an answer's wrong cues, if the row lists them; an absent cue takes precedence."""
    cues = sample.truth.cues
    present = set(cues.get("present", ()))
    wrong: list[tuple[Answer, set[str]]] = [
        ("hallucinated", set(cues.get("absent", ())) - present),
        ("spurious", set(cues.get("spurious", ())) - present),
    ]
    named = read_claims(think_text(text), {cue: (cue,) for kind in cues.values() for cue in kind})
    return next((name for name, listed in wrong if listed & named.asserted), None)


def _sample_answers(
    config: PairsConfig,
    source: ModelSource,
    samples: Sequence[Sample],
    skipped: SkippedRows,
    record: RunRecord,
    share: tuple[int, int] | None = None,
) -> dict[str, AnswerTokens]:
    """Sample id -> its distinct answers that ended within the length limit; nothing where this
    process samples a share of them."""
    folder, root = Path(config.output_dir), Path(config.data.media_root)
    if share is not None and source.rollout.engine != "hf":
        raise ConfigError(
            "one process asks a vLLM server for all answers at once; leave --processes out"
        )
    loaded = load_model(source.model, [turn.text for one in samples for turn in one.turns])
    model: Any = loaded.model
    gpus, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    model.to(torch.device("cuda", place % gpus) if torch.cuda.is_available() else "cpu").eval()
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
            out_dir=folder if share is None else record.path.parent,
        )
        usable = {sample.sample_id for sample in ingest.kept}
        for sample in samples:
            if sample.sample_id not in usable:
                skipped.add("bad_clip", sample.sample_id)
        reader = FeatureSource(ingest.kept, backbone, store, root, config.decode)
        exits.callback(reader.close)
        collate = Collator(loaded.processor, reader, config.data.max_length)
        file = _answers_file(folder, _fingerprint(config, source, model), share)
        engine = _engine(config, source, loaded, ingest.kept, exits)
        own = ingest.kept
        if share is not None:
            done = read_steps(folder / FILE, file.fingerprint)
            left = [sample for sample in own if _key(sample) not in done]
            own = _share_of(left, source.per_device_batch_size, share)
        todo = [sample for sample in own if _key(sample) not in file.known]
        _generate(config, source, todo, model, engine, collate, file)
    if share is not None:
        return {}
    record.event("answers", file=file.path, prompts=len(file.known))
    known = None
    if source.readable:
        known = vocabulary_of(samples, load_samples(source.answers) if source.answers else ())
    return _whole_answers(ingest.kept, file, known, skipped)


def _whole_answers(
    samples: Sequence[Sample], file: StepFile, known: Vocabulary | None, skipped: SkippedRows
) -> dict[str, AnswerTokens]:
    """Sample id -> its distinct answers in the file that ended by themselves and are usable."""
    found: dict[str, AnswerTokens] = {}
    for sample in samples:
        values = file.known[_key(sample)]
        skipped.counts["answers_cut"] += sum(not ended for ended in values["ended"])
        drawn = zip(values["texts"], values["ids"], values["ended"], strict=True)
        whole = [(text, ids) for text, ids, ended in drawn if ended]
        found[sample.sample_id] = usable_answers(whole, known, skipped.counts)
    return found


def _engine(
    config: PairsConfig,
    source: ModelSource,
    loaded: Loaded,
    samples: Sequence[Sample],
    exits: ExitStack,
) -> RolloutEngine:
    """What draws the answers; ``exits`` ends it."""
    processor = loaded.processor
    if source.rollout.engine == "hf":
        model = unwrap(loaded.model)
        return HFRollouts(processor.tokenizer, model, source.rollout, opened=processor.opened)
    served = connect(
        source.rollout,
        loaded,
        Path(config.output_dir),
        samples=samples,
        media_root=Path(config.data.media_root),
        decode=config.decode,
        max_length=config.data.max_length,
        scored=False,
    )
    exits.callback(served.close)
    served.check()
    return served


def usable_answers(
    drawn: Sequence[tuple[str, list[int]]], known: Vocabulary | None, counts: Counter[str]
) -> AnswerTokens:
    """The answers that a pair may have, with their tokens; the others are counted.

    Args:
        known: the data's words, for what is language; None: that is not looked at.
    """
    fit = [(text, ids) for text, ids in drawn if can_be_answer(text)]
    spoken = fit
    if known is not None:
        spoken = [(text, ids) for text, ids in fit if not read_answer(text, known).flags]
    counts["answers_unreadable"] += len(drawn) - len(fit)
    counts["answers_garbled"] += len(fit) - len(spoken)
    return dict(spoken)


def _share_of(samples: Sequence[Sample], size: int, share: tuple[int, int]) -> list[Sample]:
    """Every so many whole batches, which are then those that one process would make."""
    rank, processes = share
    starts = range(rank * size, len(samples), processes * size)
    return [sample for at in starts for sample in samples[at : at + size]]


def _answers_file(folder: Path, fingerprint: str, share: tuple[int, int] | None) -> StepFile:
    """The file of all answers, with what several processes have sampled; or that of one of them."""
    parts = folder / PARTS
    if share is not None:
        return StepFile(parts / f"answers-{share[0]}.jsonl", fingerprint)
    file = StepFile(folder / FILE, fingerprint)
    for part in sorted(parts.glob("answers-*.jsonl")):
        found = read_steps(part, fingerprint)
        file.add({key: value for key, value in found.items() if key not in file.known})
        part.unlink()
    return file


def can_be_answer(text: str) -> bool:
    """Whether a pair may have this answer: it is not blank, and has no zero byte and no media
    placeholder, which training would refuse."""
    marks = ("\0", "<image>", *PLACEHOLDERS.values())
    return bool(text.strip()) and not any(mark in text for mark in marks)


def _generate(
    config: PairsConfig,
    source: ModelSource,
    todo: Sequence[Sample],
    model: nn.Module,
    engine: RolloutEngine,
    collate: Collator,
    file: StepFile,
) -> None:
    """Sample the answers to ``todo`` and add them to the file.

    The seed of an answer depends only on its prompt and its number, so that resuming or another
    batch size does not change it.
    """
    size, count = source.per_device_batch_size, source.rollout.num_generations
    device, done = next(model.parameters()).device, len(file.known)
    with progress("answers", done + len(todo), done=done, unit="prompts") as bar:
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


def _score_answers(
    source: ModelSource,
    rewards: RewardSet,
    samples: Sequence[Sample],
    texts: dict[str, AnswerTokens],
    record: RunRecord,
) -> list[list[float]]:
    """The scores of the answers of each sample; NaN where the reward gave none."""
    watch = FailureWatch([source.reward])
    found: list[list[float]] = []
    state = SimpleNamespace(global_step=0, max_steps=0)
    for start in range(0, len(samples), _PROMPTS_PER_CALL):
        rows = [one for one in samples[start : start + _PROMPTS_PER_CALL] if texts[one.sample_id]]
        drawn = [
            # Answers that were cut are gone by now, so all that are left have ended.
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
        for row in samples[start : start + _PROMPTS_PER_CALL]:
            number = len(texts[row.sample_id])
            found.append(values[:number])
            values = values[number:]
    return found


def _key(sample: Sample) -> str:
    """The row's id and a hash of its prompt and media."""
    # A prompt that has changed under the same id is answered anew.
    parts = [[(turn.role, turn.text) for turn in sample.turns], repr(sorted(sample.media.items()))]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return f"{sample.sample_id}/{digest}"


def _fingerprint(config: PairsConfig, source: ModelSource, model: nn.Module) -> str:
    """Fingerprint of everything that decides the answers, apart from the prompts."""
    parts = [model_fingerprint(model), source.rollout.deciding(), config.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
