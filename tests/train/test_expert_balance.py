"""Training with experts: what is added to the loss and logged, and what becomes of the gates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from mmemo.config import parse
from mmemo.errors import CheckpointError, ConfigError
from mmemo.evaluation.generate import model_fingerprint
from mmemo.export.stage import export_run
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.models.adapters.experts import ExpertsConfig
from mmemo.models.adapters.lora import in_adapter
from mmemo.models.adapters.routing import last_route
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.train import run_dpo
from mmemo.train.expert_balance import ExpertBalance, balance_of, count_prompts, expert_terms
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.objective import GrpoObjective
from mmemo.train.grpo.train import run_grpo
from mmemo.train.sft import SftObjective, run_sft, sft_batch
from tests.generation.test_logprobs import continuations
from tests.models.composed.test_modeling import batch_of
from tests.models.parts import clip, features, shake, tiny, values
from tests.train.dpo.test_objective import Bench, learn, same
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.grpo.tiny import grpo_config, grpo_values
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
    from mmemo.train import trainer

    kind: Any = trainer.Trainer
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
    from mmemo.models.adapters.lora import unwrap

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
    optimizer, objective = torch.optim.AdamW(weights, lr=5e-3), SftObjective()
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
            **{name: batch[name] for name in batch["inputs"]},
        ).logits
    plain = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
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


STRONG = {"r": 4, "lora_dropout": 0.0, "experts": {"weight_penalty": 3.0, "load_penalty": 0.5}}


def gate_gradients(model: Any) -> list[torch.Tensor]:
    gates = [p for n, p in model.named_parameters() if "experts_gate" in n or "experts_weigh" in n]
    assert all(p.grad is not None for p in gates)
    return [p.grad for p in gates]


def test_the_penalty_counts_each_prompt_once_however_it_is_scored() -> None:
    """Four prompts with one to four answers each: naive rows repeat them, packed ones do not."""
    loaded = tiny(lora=STRONG)
    model: Any = loaded.model
    set_trainable(model, ["lm", "connectors"])
    shake(model, 0.15)
    batch = batch_of(loaded, [0, 1, 2, 3])
    found: list[Any] = []
    for way in (packed_logps, naive_logps):
        model.zero_grad()
        way(model, batch, *continuations())
        terms = expert_terms(model)
        assert terms is not None
        terms.penalty.backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((terms, gradient))
    (packed, wanted), (naive, gradient) = found
    assert packed.penalty > 0.1
    torch.testing.assert_close(naive.penalty, packed.penalty, atol=1e-6, rtol=1e-6)
    same(gradient, wanted, 1e-4)
    assert packed.metrics.keys() == naive.metrics.keys()
    for name, (total, count) in packed.metrics.items():
        torch.testing.assert_close(naive.metrics[name][0], total, atol=1e-5, rtol=1e-5)
        assert int(naive.metrics[name][1]) == int(count), name
    # Two passes are one batch of all their prompts.
    routes: list[Any] = []
    for rows in ([0, 1], [2, 3]):
        model(**batch_of(loaded, rows))
        routes.append(last_route(model))
    both = expert_terms(model, routes)
    assert both is not None
    torch.testing.assert_close(both.penalty, packed.penalty, atol=1e-6, rtol=1e-6)


SOFT = {**STRONG, "experts": {**STRONG["experts"], "routing": "soft"}}  # type: ignore[dict-item]


def step_gradients(loaded: Loaded, split: list[list[int]], earlier: list[int]) -> list[Any]:
    """The penalty's gradient of the gates in a step of four prompts, split into micro-batches,
    after a step of the prompts ``earlier``."""
    model: Any = loaded.model
    model.train()
    balance = balance_of(model)
    assert balance is not None
    balance.load_state_dict({})
    for rows in ([earlier], split):
        model.zero_grad()
        # 4 of any unit: the step divides by it.
        balance.begin(4.0, sum(map(len, rows)))
        for part in rows:
            batch = batch_of(loaded, part)
            model(**batch)
            terms = expert_terms(model, weight=float(len(part)))
            assert terms is not None
            if terms.penalty.requires_grad:
                (terms.penalty / 4).backward()
            balance.keep()
        balance.finish(applied=True)
    return gate_gradients(model)


def test_eight_times_one_is_one_times_eight() -> None:
    """Prompts of differing media, in one micro-batch, in two uneven ones, and each alone."""
    loaded = tiny(lora=SOFT)
    set_trainable(loaded.model, ["lm", "connectors"])
    shake(loaded.model, 0.15)
    whole = step_gradients(loaded, [[0, 1, 2, 3]], [1, 2, 3])
    assert max(float(grad.abs().max()) for grad in whole) > 1e-2
    for split in ([[0], [1, 2, 3]], [[0], [1], [2], [3]]):
        for found, wanted in zip(step_gradients(loaded, split, [1, 2, 3]), whole, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
    # Each micro-batch on its own, as with penalty_decay null, does depend on the split.
    parts: list[list[torch.Tensor]] = []
    for split in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        loaded.model.zero_grad()
        for part in split:
            loaded.model(**batch_of(loaded, part))
            terms = expert_terms(loaded.model, weight=float(len(part)))
            assert terms is not None
            (terms.penalty / 4).backward()
        parts.append(gate_gradients(loaded.model))
    assert max(float((a - b).abs().max()) for a, b in zip(*parts, strict=True)) > 1e-3


def test_the_gradient_is_that_of_the_penalty_at_the_running_mean() -> None:
    """By hand, for one layer, one medium and two experts."""
    config = ExpertsConfig(
        modalities=["audio"],
        per_modality=2,
        weight_penalty=2.0,
        load_penalty=0.5,
        penalty_decay=0.5,
    )
    balance = ExpertBalance(1, 1, config)
    there = torch.ones(1, 1, dtype=torch.bool)

    def step(weights: list[float], use: list[float], *, applied: bool = True) -> Any:
        w = torch.tensor([[weights]], requires_grad=True)
        u = torch.tensor([[[use]]], requires_grad=True)
        balance.begin(10.0, 1.0)
        penalty = balance.penalty(w, u, there)
        if penalty.requires_grad:
            penalty.backward()
        balance.keep()
        return penalty.detach() / 10, w.grad, u.grad, balance.finish(applied)

    value, gradient, _, logged = step([0.2, 0.8], [1.0, 0.0])
    assert (float(value), gradient) == (0.0, None)  # nothing is known before the first step
    kl = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    assert float(logged["experts/weight_divergence"][0]) == pytest.approx(kl)
    assert float(logged["experts/load_variation"][0]) == pytest.approx(1.0)
    # The penalty of what is known, however decisive the step's only prompt is, and the gradient
    # there: 2 (log(m / u) + 1) and 0.5 * 2 (load - 1/2) / (1/2)^2 / 2, times the weight of 10.
    value, gradient, used, logged = step([0.5, 0.5], [0.0, 1.0])
    assert float(value) == pytest.approx(2 * kl + 0.5)
    wanted = [10 * 2 * (math.log(0.4) + 1), 10 * 2 * (math.log(1.6) + 1)]
    torch.testing.assert_close(gradient.flatten(), torch.tensor(wanted))
    torch.testing.assert_close(used.flatten(), torch.tensor([10.0, -10.0]))
    # (0.5 * first + second) / 1.5 prompts.
    state = balance.state_dict()
    assert state["sums"] == pytest.approx([1.5, 0.75, 0.75, 1.5, 0.6, 0.9, 0.5, 1.0])
    # A skipped step leaves no trace; a resumed run goes on to the bit.
    step([float("nan"), 0.5], [0.0, 1.0], applied=False)
    assert balance.state_dict() == state
    other = ExpertBalance(1, 1, config)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.state_dict() == state
    with pytest.raises(CheckpointError, match="running mean of 3 values"):
        other.load_state_dict({"sums": [1.0, 2.0, 3.0]})


def test_a_batch_of_one_may_be_decisive() -> None:
    """Prompts that take turns between text and voice, one a step: no pull in the long run."""
    config = ExpertsConfig(modalities=["audio"], per_modality=2, penalty_decay=0.9)
    balance = ExpertBalance(1, 1, config)
    there, pulls = torch.ones(1, 1, dtype=torch.bool), list[float]()
    for number in range(60):
        share = 0.95 if number % 2 else 0.05
        w = torch.tensor([[[share, 1 - share]]], requires_grad=True)
        use = torch.eye(2)[number % 2].expand(1, 1, 1, 2)
        balance.begin(1.0, 1.0)
        penalty = balance.penalty(w, use, there)
        if penalty.requires_grad:
            penalty.backward()
            assert w.grad is not None
            pulls.append(abs(float(w.grad[0, 0, 0] - w.grad[0, 0, 1])))
        balance.keep()
        balance.finish(applied=True)
    alone = 0.1 * abs(math.log(0.95 / 0.05))  # the micro-batch's own mean pulls this much
    assert max(pulls[-10:]) < 0.1 * alone


def test_padding_counts_nothing_and_evaluation_is_left_alone() -> None:
    loaded = tiny(lora=SOFT)
    model: Any = loaded.model
    balance = balance_of(model)
    assert balance is not None
    assert balance_of(model) is balance
    model.train()
    balance.begin(2.0, 2.0)
    for part, counted in (([0, 1], True), ([2], False)):
        model(**batch_of(loaded, part))
        expert_terms(model)
        balance.keep(counted)
    balance.finish(applied=True)
    assert balance.state_dict()["sums"][0] == 2.0
    model.eval()
    model(**batch_of(loaded, [0]))
    terms = expert_terms(model)
    assert terms is not None
    assert "experts/weight_divergence" in terms.metrics  # of these rows alone
    for lora in (
        SOFT | {"experts": {"penalty_decay": None}},
        SOFT | {"experts": {"variant": "moka"}},
    ):
        assert balance_of(tiny(lora=lora).model) is None


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_grpo_has_the_penalty_once(tmp_path: Path, loss_type: str) -> None:
    """Without any advantage there is nothing else in the loss."""
    loaded = tiny(lora=STRONG)
    model: Any = loaded.model
    set_trainable(model, ["lm", "connectors"])
    shake(model, 0.15)
    prompts = batch_of(loaded, [0, 1, 2, 3])
    ids, mask, index = continuations([3, 1, 4, 2, 5, 3, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3])
    given = grpo_values(tmp_path, tmp_path, grpo={"loss_type": loss_type})
    nothing: Any = None
    ranks = Ranks(cpu=True)
    objective = GrpoObjective(parse(GrpoConfig, given), nothing, nothing, {}, ranks, tmp_path, 0)
    batch: dict[str, Any] = {
        **prompts,
        "inputs": list(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "loss_mask": mask,
        "prompt_index": index,
        "advantages": torch.zeros(8),
    }
    batch["weight"] = {"dapo": 22.0, "bnpo": 1.0}.get(loss_type, 8.0)
    model.train()
    out = objective(model, batch)
    assert len(out.rows) == 8
    terms = expert_terms(model)
    assert terms is not None
    torch.testing.assert_close(out.rows.sum() / batch["weight"], terms.penalty)
    assert terms.metrics["experts/weight/text"][1] == 4 == count_prompts(batch)
    out.rows.sum().backward()
    assert all(grad.abs().sum() > 0 for grad in gate_gradients(model))
    assert out.metrics.keys() >= {
        "experts/weight/audio",
        "experts/load/face/2",
        "clip_ratio/low_mean",
    }
    model.eval()
    assert float(objective(model, batch).rows.detach().abs().max()) == 0


def test_dpo_has_the_penalty_once_on_all_that_is_learnt_from() -> None:
    """Of three pairs the clips and their negatives, but not the prompts without media."""
    bench = Bench(["avem_dpo", "mod_dpo"], lora=STRONG)
    shake(bench.model, 0.05)
    batch = bench.batch()
    assert [one.grad for one in batch["passes"]] == [True, False, False]
    plain = bench.objective(bench.model, batch)
    bench.model.train()
    out, gradient = learn(bench.objective, bench.model, batch)
    extra = out.rows - plain.rows
    parts = [out.metrics[f"experts/{n}"][0] for n in ("weight_divergence", "load_variation")]
    torch.testing.assert_close(extra, (3 * parts[0] + 0.5 * parts[1]).expand(3).to(extra.dtype))
    assert float(extra[0].detach()) > 0.1
    prompts = sum(len(one.prompts["input_ids"]) for one in batch["passes"] if one.grad)
    assert out.metrics["experts/weight/text"][1] == prompts == count_prompts(batch)
    assert all(grad.abs().sum() > 0 for grad in gate_gradients(bench.model))
    naive, found = learn(bench.with_(shared_prefix=False), bench.model, batch)
    torch.testing.assert_close(naive.rows, out.rows, atol=1e-5, rtol=1e-5)
    same(found, gradient, 1e-4)


@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_a_preference_stage_logs_its_gates_and_moves_them(
    rows: Path, tmp_path: Path, stage: str
) -> None:
    write_pairs(rows)
    model = {**values(), "lora": STRONG}
    lines: list[list[dict[str, Any]]] = []
    for shared in (True, False):
        folder = tmp_path / f"{stage}-{shared}"
        common: dict[str, Any] = {"model": model, "train": {"max_steps": 3}}
        if stage == "grpo":
            section = {"shared_prefix": shared, "beta": 0.04}
            final = run_grpo(grpo_config(rows, folder, **common, grpo=section))
        else:
            final = run_dpo(dpo_config(rows, folder, **common, dpo={"shared_prefix": shared}))
        lines.append(metrics(folder))
    for one, other in zip(*lines, strict=True):
        names = [n for n in one if n.startswith("experts/")]
        assert {"experts/weight/text", "experts/weight_divergence"} <= {*names}
        for name in ("loss", "grad_norm", *names):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    # What gates start from is zero, and only learning moves it.
    saved = load_file(final / "adapter_model.safetensors")
    assert all(x.abs().max() > 0 for n, x in saved.items() if "experts_weigh" in n)
