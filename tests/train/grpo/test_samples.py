"""What is sampled must be language: the garble of tokens that a head never learnt, seen, named and
cured; and no word about an honest model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.config import parse
from mmemo.data.sample import Sample, Turn
from mmemo.errors import TrainingError
from mmemo.generation.logprobs import token_ranks
from mmemo.generation.readable import Reading, shares, vocabulary
from mmemo.generation.rollout import HFRollouts, RolloutConfig
from mmemo.models.adapters import lora
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.run_log import RunRecord
from mmemo.train.distributed import Ranks
from mmemo.train.grpo import samples
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.samples import (
    Sampled,
    SampleWatch,
    check_before_training,
    known_words,
    read_rollouts,
    spread,
    warnings,
)
from tests.train.grpo.tiny import grpo_values

ASK = "What do you see?\n"
FIRST = [f"{a} lips, {b} brows." for a in ("open", "thin", "wide") for b in ("low", "high", "calm")]
SECOND = [f"Voice: {a}. The {b} is stronger." for a in ("open", "thin") for b in ("lips", "brows")]
OTHER = ["Zebra quilt jumps vexed fox dwarf glyph. Nymph waltz bad chord. Sphinx of black quartz."]
TEXT = {"scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 400}}
ROW = Sample("one", (Turn("user", ASK.strip()),), {})


def learn(loaded: Loaded, answers: list[str], steps: int) -> None:
    """Answers to one question, all at once."""
    model: Any = loaded.model
    tokenizer = loaded.processor.tokenizer
    names = set(set_trainable(model, ["lm"]))
    weights = [p for name, p in model.named_parameters() if name in names]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.05)
    asked = tokenizer.encode(ASK)
    rows = [[*asked, *tokenizer.encode(one), tokenizer.eos_token_id] for one in answers]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    sizes = torch.tensor([len(row) for row in rows])[:, None]
    at = torch.arange(longest)[None]
    labels = ids.masked_fill((at < len(asked)) | (at >= sizes), -100)
    inputs = {"attention_mask": (at < sizes).long(), "modality_ids": torch.zeros_like(ids)}
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def sampled(loaded: Loaded) -> list[Sampled]:
    tokenizer = loaded.processor.tokenizer
    ids = torch.tensor([tokenizer.encode(ASK)])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "modality_ids": torch.zeros_like(ids),
        "clip_index": torch.tensor([-1]),
        "sample_ids": ["one"],
    }
    config = RolloutConfig(num_generations=32, max_completion_length=20, temperature=0.7)
    engine = HFRollouts(tokenizer, lora.unwrap(loaded.model), config)
    rollouts = engine.generate(loaded.model, batch, list(range(32)))
    known = vocabulary([*FIRST, *SECOND] * 3, [ASK])
    return read_rollouts(loaded.model, batch, rollouts, [ROW], known, ranked=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt answers in which some tokens of its vocabulary never occur."""
    folder = tmp_path_factory.mktemp("start") / "model"
    texts = [*FIRST, *SECOND, *OTHER * 3]
    loaded = load_model(parse(ModelConfig, {"text": TEXT}), texts)
    learn(loaded, FIRST, 120)
    found = sampled(loaded)
    assert shares([one.reading for one in found])["readable"] == 1
    assert warnings(found, loaded.processor.tokenizer) == {}  # an honest model
    lora.save_model(loaded.model, loaded.processor, folder)
    return folder


def tuned(start: Path, **more: Any) -> tuple[Loaded, list[Sampled]]:
    section = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, **more}
    loaded = load_model(parse(ModelConfig, {"path": str(start), "lora": section}))
    learn(loaded, SECOND, 80)
    return loaded, sampled(loaded)


def test_tokens_that_the_head_never_learnt_garble_samples_and_are_named(start: Path) -> None:
    loaded, found = tuned(start)
    share = shares([one.reading for one in found])
    assert share["readable"] < 0.3
    told = warnings(found, loaded.processor.tokenizer)
    assert {"invalid_utf8", "unknown_words"} <= told.keys()
    for sentence in told.values():
        assert "model.lora.trainable_tokens" in sentence
        assert "rollout.temperature" in sentence
    # What the model cannot say are tokens of the new answers.
    assert any(f"'{name}'" in told["unknown_words"] for name in ("Voice", " The", " stronger"))

    _, cured = tuned(start, trainable_tokens="all")
    assert shares([one.reading for one in cured])["readable"] >= 0.99


def fake(kind: str | None, count: int) -> list[Sampled]:
    unknown = ("ise",) if kind == "unknown_words" else ()
    reading = Reading(kind == "invalid_utf8", kind == "outside_nucleus", unknown)
    return [Sampled(ROW, "Face: sad.ise", reading)] * count


class NoTokens:
    all_special_ids = ()


def test_reading_takes_passes_of_the_size_of_those_that_train(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(parse(ModelConfig, {"path": str(start)}))
    loaded.model.eval()
    tokenizer = loaded.processor.tokenizer
    asked = [tokenizer.encode(ASK * times) for times in (1, 3, 2)]
    wide = max(map(len, asked))
    ids = torch.tensor([[tokenizer.pad_token_id] * (wide - len(row)) + row for row in asked])
    sizes = torch.tensor([len(row) for row in asked])[:, None]
    batch = {
        "input_ids": ids,
        "attention_mask": (torch.arange(wide)[None] >= wide - sizes).long(),
        "modality_ids": torch.zeros_like(ids),
        "clip_index": torch.full((3,), -1),
        "sample_ids": ["a", "b", "c"],
    }
    config = RolloutConfig(num_generations=4, max_completion_length=12, temperature=2.0)
    engine = HFRollouts(tokenizer, lora.unwrap(loaded.model), config)
    rollouts = engine.generate(loaded.model, batch, list(range(12)))
    # Where all completions end early, they are a slice of longer rows.
    longer = torch.nn.functional.pad(rollouts.mask, (0, 5))
    rollouts = replace(rollouts, mask=longer[:, : rollouts.mask.shape[1]])
    assert not rollouts.mask.is_contiguous()
    seen: list[int] = []

    def counted(model: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        seen.append(len(prompts["input_ids"]))
        return token_ranks(model, prompts, *rest, **more)

    monkeypatch.setattr(samples, "token_ranks", counted)
    known = vocabulary([])
    whole, split = (
        read_rollouts(loaded.model, batch, rollouts, [ROW] * 3, known, ranked=True, max_tokens=most)
        for most in (None, 1)
    )
    assert seen == [3, 1, 1, 1]
    assert whole == split
    assert {one.reading.outside for one in whole} == {True, False}


@pytest.mark.parametrize("kind", ["invalid_utf8", "outside_nucleus", "unknown_words"])
def test_a_sign_is_told_above_the_limit_and_never_for_one_sample(kind: str) -> None:
    assert warnings([*fake(kind, 1), *fake(None, 5)], NoTokens()) == {}
    assert warnings([*fake(kind, 5), *fake(None, 95)], NoTokens()) == {}
    told = warnings([*fake(kind, 6), *fake(None, 94)], NoTokens())
    assert list(told) == [kind]
    assert told[kind].startswith("6% of 100 sampled answers hold")
    assert "'ise'" in told[kind] or kind != "unknown_words"


def config_of(tmp_path: Path, **watch: Any) -> GrpoConfig:
    return parse(GrpoConfig, grpo_values(tmp_path, tmp_path / "out", watch=watch))


def test_only_a_limit_stops_a_run(tmp_path: Path) -> None:
    record, ranks = RunRecord(tmp_path), Ranks(cpu=True)
    found = [*fake("unknown_words", 30), *fake(None, 70)]
    check_before_training(found, NoTokens(), config_of(tmp_path), ranks, record)
    (event,) = record.events("samples")
    assert (event["step"], event["samples"], event["readable"]) == (0, 100, 0.7)
    assert list(event["warnings"]) == ["unknown_words"]
    strict = config_of(tmp_path, min_readable=0.71)
    with pytest.raises(TrainingError, match=r"70% of 100 .*min_readable is 0\.71: 30% of 100"):
        check_before_training(found, NoTokens(), strict, ranks, record)


def test_a_run_tells_each_sign_once(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    watch = SampleWatch(config_of(tmp_path), vocabulary([]), NoTokens(), record, Ranks(cpu=True))
    for step in (1, 2):
        found = [*fake("unknown_words", 50), *fake(None, 50)]
        assert watch.metrics(found, step)["readable"] == 0.5
    watch.metrics([*fake("unknown_words", 50), *fake("invalid_utf8", 50)], 3)
    told = [(event["step"], event["sign"]) for event in record.events("samples")]
    assert told == [(1, "unknown_words"), (3, "invalid_utf8")]


def test_words_come_from_answers_questions_and_what_may_be_cited(tmp_path: Path) -> None:
    answer = Turn("assistant", "Face: sad.")
    rows = [replace(ROW, turns=(*ROW.turns, answer), transcript="Oh well")] * 40
    known = known_words(config_of(tmp_path), rows)
    assert known.is_closed
    assert known.known >= {"face", "sad", "what", "see", "oh", "well"}
    assert not known_words(config_of(tmp_path), [ROW]).is_closed  # prompts alone


def test_rows_are_spread_over_the_data() -> None:
    rows = [replace(ROW, sample_id=str(at)) for at in range(10)]
    assert [row.sample_id for row in spread(rows, 3)] == ["0", "3", "6"]
    assert len(spread(rows, 99)) == 10
    assert spread([], 3) == []
