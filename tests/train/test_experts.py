"""Training with experts: what is added to the loss and logged, and what becomes of the gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.evaluation.answering import model_fingerprint
from mmemo.export import export_run
from mmemo.losses.sft import answer_loss
from mmemo.models.adapters import in_adapter
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.train.experts import expert_terms
from mmemo.train.sft import SftObjective, run_sft, sft_batch
from tests.models.parts import clip, features, tiny, values
from tests.train.tiny import sft_config

MOSE = {"r": 4, "lora_dropout": 0.0, "experts": {}}


def lora(**experts: Any) -> dict[str, Any]:
    return {**MOSE, "experts": experts}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", ["mose", "gate", "moka", "hydra"])
def test_a_stage_trains_saves_resumes_and_exports(rows: Path, tmp_path: Path, variant: str) -> None:
    model = {**values(), "lora": lora(variant=variant)}
    config = sft_config(rows, tmp_path / "run", model=model, train={"max_steps": 4})
    final = run_sft(config)
    line: dict[str, Any] = {}  # a step's rows may lack a medium
    for one in metrics(tmp_path / "run"):
        line |= one
    media = ("video", "audio", "face", "fusion")
    if variant in ("mose", "gate"):
        shares = [line[f"experts/weight/{name}"] for name in media]
        assert all(0 < share <= 1 for share in shares)  # alone, a medium has it all
    if variant in ("mose", "hydra"):
        for name in media:
            loads = [line[f"experts/load/{name}/{k}"] for k in range(3)]
            assert sum(loads) == pytest.approx(1, abs=1e-4)
    assert ("experts/load_variation" in line) == (variant == "mose")
    # Stopped half way and gone on, to the bit.
    half = sft_config(rows, tmp_path / "again", model=model, train={"max_steps": 4})
    _stop_after(half, 2)
    again = run_sft(half)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (final / name).read_bytes()
    # Loaded, exported, refused to be merged.
    loaded = load_model(parse(ModelConfig, {"path": str(final)}))
    assert any(in_adapter(n) for n, _ in loaded.model.named_parameters())
    export_run(final.parent, adapter=tmp_path / "out")
    exported = load_model(parse(ModelConfig, {"path": str(tmp_path / "out")}))
    assert model_fingerprint(exported.model) == model_fingerprint(loaded.model)
    with pytest.raises(ConfigError, match="cannot be merged"):
        export_run(final.parent, merged=tmp_path / "merged")
    onwards = {"path": str(final), "lora": lora(variant=variant)}
    assert load_model(parse(ModelConfig, onwards)).base == final.parent / "base"
    for other, message in (
        (MOSE | {"experts": None}, "is not set"),
        (lora(variant=variant, temperature=2), "temp"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_model(parse(ModelConfig, {"path": str(final), "lora": other}))


def _stop_after(config: Any, steps: int) -> None:
    from mmemo.train import loop

    kind: Any = loop.Loop
    real = kind._log

    def logged(self: Any, bar: Any) -> None:
        real(self, bar)
        if self.state.step == steps:
            self.stop.signal = 15

    kind._log = logged
    try:
        with pytest.raises(SystemExit):
            run_sft(config)
    finally:
        kind._log = real


def asked(loaded: Loaded, clips: int = 8) -> dict[str, Any]:
    """A batch in which half of the questions are about the voice and half about the face, of clips
    whose streams say different things."""
    found = [features(Loaded(loaded.model, loaded.processor), clip(n)) for n in range(clips)]
    words = [f" {word}" for word in ("angry", "happy", "sad", "calm")]
    texts, given, answers = list[str](), list[Any](), list[str]()
    for number, one in enumerate(found):
        for part, label in (("audio", number % 4), ("video", (number // 2) % 4)):
            texts.append(f"<video><audio><face>The {part}?")
            given.append(one)
            answers.append(words[label])
    tokenizer = loaded.processor.tokenizer
    ends = [tokenizer.encode(word, add_special_tokens=False)[-1] for word in answers]
    batch: dict[str, Any] = dict(loaded.processor(texts, given))
    last = torch.tensor(ends)[:, None]
    ids = torch.cat([batch["input_ids"], last], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = last[:, 0]
    ones = torch.ones_like(last)
    grown = {
        "input_ids": ids,
        "attention_mask": torch.cat([batch["attention_mask"], ones], 1),
        "modality_ids": torch.cat([batch["modality_ids"], 0 * ones], 1),
        "labels": labels,
    }
    return sft_batch({**batch, **grown})


def base_of(loaded: Loaded) -> Loaded:
    from mmemo.models.adapters import unwrap

    return Loaded(unwrap(loaded.model), loaded.processor)


@pytest.mark.parametrize("routing", ["straight_through", "soft"])
def test_routers_do_not_collapse_where_both_channels_are_needed(routing: str) -> None:
    loaded = tiny(lora=lora(routing=routing, load_penalty=0.05))
    batch = asked(base_of(loaded), 4)
    model: Any = loaded.model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # or no hidden state could say much
    names = set(set_trainable(model, ["lm", "connectors", "fusion"]))
    weights = [p for n, p in model.named_parameters() if n in names]
    optimizer, objective = torch.optim.AdamW(weights, lr=1e-2), SftObjective()
    model.train()
    losses: list[float] = []
    for _ in range(60):
        loss = objective(model, batch).rows.sum() / objective.weight(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    found = {n: float(a) / float(b) for n, (a, b) in objective(model, batch).metrics.items()}
    assert losses[-1] < 0.35 * losses[0], losses
    for medium in ("video", "audio", "face", "fusion", "text"):
        assert 0.05 < found[f"experts/weight/{medium}"] < 0.5  # of an equal 0.2
    for medium in ("video", "audio", "face", "fusion"):
        loads = [found[f"experts/load/{medium}/{k}"] for k in range(3)]
        assert max(loads) < 0.7, found
        assert min(loads) > 0.05, found


def test_the_penalty_is_in_the_training_loss_once_and_not_in_the_evaluated_one() -> None:
    loaded = tiny(lora=lora(weight_penalty=3.0, load_penalty=0.5))
    batch = asked(base_of(loaded), 3)
    model: Any = loaded.model
    for name, weight in model.named_parameters():
        if "experts_weigh" in name:
            torch.nn.init.normal_(weight, std=1.0)
    with torch.no_grad():
        logits = model(
            **{name: batch[name] for name in batch["inputs"]}, logits_to_keep=batch["positions"]
        ).logits
    plain = answer_loss(logits, batch["labels"], batch["positions"]).rows.sum()
    terms = expert_terms(model)
    assert terms is not None
    assert terms.penalty > 0.1
    model.eval()
    torch.testing.assert_close(SftObjective()(model, batch).rows.sum(), plain)
    model.train()
    found = SftObjective()(model, batch)
    torch.testing.assert_close(found.rows.sum(), plain + terms.penalty * batch["answer_tokens"])
    parts = [found.metrics[f"experts/{n}"][0] for n in ("weight_divergence", "load_variation")]
    torch.testing.assert_close(3 * parts[0] + 0.5 * parts[1], terms.penalty)
    found.rows.sum().backward()
    gates = [p for n, p in model.named_parameters() if "experts_gate" in n or "experts_weigh" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gates)
    with model.disable_adapter():
        assert "experts/weight/audio" not in SftObjective()(model, batch).metrics


def test_penalties_with_recomputed_activations() -> None:
    loaded = tiny(lora=lora(weight_penalty=3.0, load_penalty=0.5))
    batch = asked(base_of(loaded), 3)
    model: Any = loaded.model
    set_trainable(model, ["lm", "connectors"])
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        SftObjective()(model, batch).rows.sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        SftObjective()(model, batch)
