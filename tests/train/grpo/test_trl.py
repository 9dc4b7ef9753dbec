"""What a GRPO step computes is what TRL's own trainer computes, on a text-only Llama."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mmemo.config import parse
from mmemo.generation.logprobs import naive_logps, packed_logps
from mmemo.losses.grpo import grpo_loss, grpo_weight
from mmemo.losses.off_policy import importance_ratio
from mmemo.models.build import ModelConfig, load_model, set_trainable
from mmemo.models.composed.scratch import build_llama, train_tokenizer
from mmemo.models.config import ScratchConfig
from mmemo.rewards.advantages import group_advantages
from mmemo.train.reference import FrozenCopy
from tests import trl_bridge
from tests.models.parts import TEXTS, shake
from tests.trl_bridge import Rollout, Step, record_steps

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

EOS = 2
LONGEST = 9
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo")


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Each end of a training collects garbage, which takes longer than the training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, saved: the reference, and where policies start from."""
    path = tmp_path_factory.mktemp("llama")
    assert tokenizer().eos_token_id == EOS
    torch.manual_seed(0)
    config = ScratchConfig(hidden_size=32, layers=2, heads=2, vocab_size=300)
    model = build_llama(config, tokenizer())
    shake(model, 0.05)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def rollouts(seed: int = 0) -> list[Rollout]:
    """Two groups of four: ragged, with length one, some ended, one reward missing."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(20, 280, (count,), generator=generator).tolist()

    return [
        Rollout(
            tokens(7),
            [tokens(LONGEST), [*tokens(3), EOS], tokens(1), [*tokens(5), EOS]],
            [1.0, 0.0, 0.25, 1.3],
        ),
        Rollout(
            tokens(4),
            [[*tokens(LONGEST - 1), EOS], [*tokens(2), EOS], [*tokens(6), EOS], tokens(4)],
            [0.0, None, 1.0, 0.5],
        ),
    ]


def trl_steps(
    folder: Path,
    rows: int,
    accumulation: int,
    *,
    moved: bool = True,
    drawn: Sequence[Rollout] | None = None,
    **options: Any,
) -> list[Step]:
    """TRL's steps on a policy that is no longer the reference, or is it still."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if moved:
        shake(model, 0.02)
    steps, _ = record_steps(
        model,
        tokenizer(),
        drawn or rollouts(),
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        max_completion_length=LONGEST,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    return steps


@cache
def base(folder: Path) -> Any:
    """The composed model around the same Llama."""
    model: Any = load_model(parse(ModelConfig, {"text": str(folder)})).model
    set_trainable(model, ["lm"])
    return model.eval()


def ours(folder: Path, weights: dict[str, Tensor] | None) -> nn.Module:
    """The composed model with TRL's weights of a step, or with the reference's."""
    model = deepcopy(base(folder))
    if weights is not None:
        named = dict(model.named_parameters())
        for name, value in weights.items():
            named[our_name(name)].data.copy_(value)
    return model


def shaken(folder: Path) -> dict[str, Tensor]:
    """The weights that TRL's policy starts with."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shake(model, 0.02)
    return dict(model.named_parameters())


def our_name(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


class Ours:
    """A step of ours on the rollouts, from ids and rewards alone."""

    def __init__(self, folder: Path, scale_rewards: Any = "group", masked: bool = False) -> None:
        self.folder, groups = folder, rollouts()
        rewards = [x for group in groups for x in group.rewards]
        self.advantages = group_advantages(
            torch.tensor([float("nan") if x is None else x for x in rewards]), 4, scale_rewards
        )
        self.rows = {
            tuple(c): at for at, c in enumerate(c for g in groups for c in g.completion_ids)
        }
        self.prompts = {"input_ids": torch.full((2, 7), 0), "attention_mask": torch.zeros(2, 7)}
        for at, group in enumerate(groups):
            width = len(group.prompt_ids)
            self.prompts["input_ids"][at, 7 - width :] = torch.tensor(group.prompt_ids)
            self.prompts["attention_mask"][at, 7 - width :] = 1
        self.ids = torch.zeros(8, LONGEST, dtype=torch.long)
        self.mask = torch.zeros(8, LONGEST, dtype=torch.long)
        for completion, at in self.rows.items():
            self.ids[at, : len(completion)] = torch.tensor(completion)
            self.mask[at, : len(completion)] = 1
        self.counted = self.mask.clone()
        if masked:
            ended = (self.ids * self.mask == EOS).any(1)
            self.counted *= ended[:, None]

    def logps(self, model: nn.Module, rows: Sequence[int] = range(8), way: Any = None) -> Tensor:
        chosen = list(rows)
        index = torch.tensor([at // 4 for at in chosen])
        score = way or packed_logps
        return score(model, self.prompts, self.ids[chosen], self.mask[chosen], index).logps

    def gradients(
        self,
        step: Step,
        old: Tensor | None,
        ref: Tensor | None,
        loss_type: Any,
        way: Any = None,
        mean: float | None = None,
        ratio: Tensor | None = None,
        **options: Any,
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss and its gradients with TRL's micro-batches, at the weights TRL had.

        Args:
            mean: tokens a row, over a generation of several steps.
            ratio: what corrects the sampler, of all rows.
        """
        model = ours(self.folder, step.weights)
        cuts = [self.rows_of(inputs) for inputs in step.inputs]
        whole = sum(
            grpo_weight(self.counted[rows], loss_type, tokens_per_row=mean) for rows in cuts
        )
        total = 0.0
        for rows in cuts:
            out = grpo_loss(
                self.logps(model, rows, way),
                None if old is None else old[rows],
                None if ref is None else ref[rows],
                self.advantages[rows],
                self.counted[rows],
                loss_type=loss_type,
                max_completion_length=LONGEST,
                importance_ratio=None if ratio is None else ratio[rows],
                **options,
            )
            loss = out.rows.sum() / whole
            loss.backward()
            total += float(loss.detach())
        return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def rows_of(self, inputs: dict[str, Any]) -> list[int]:
        """Which of our rows TRL's micro-batch is made of; its rewards became our advantages."""
        found: list[int] = []
        ids: Tensor = inputs["completion_ids"]
        for at, row in enumerate(ids.tolist()):
            place = next(p for c, p in self.rows.items() if row[: len(c)] == list(c))
            found.append(place)
            assert float(inputs["advantages"][at]) == pytest.approx(
                float(self.advantages[place]), rel=1e-5, abs=1e-6
            )
        return found


def equal(step: Step, found: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = found
    assert loss == pytest.approx(sum(step.losses), rel=1e-5, abs=1e-7)
    assert {our_name(name) for name in step.gradients} == gradients.keys()
    for name, wanted in step.gradients.items():
        scale = float(wanted.abs().max())
        assert scale > 0, name
        assert float((gradients[our_name(name)] - wanted).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize(("rows", "accumulation"), [(1, 8), (8, 1)])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients(
    folder: Path, loss_type: str, beta: float, rows: int, accumulation: int
) -> None:
    (step,) = trl_steps(folder, rows, accumulation, loss_type=loss_type, beta=beta, max_steps=1)
    assert len(step.losses) == accumulation
    mine = Ours(folder)
    with torch.no_grad():
        ref = mine.logps(ours(folder, None)) if beta else None
    equal(step, mine.gradients(step, None, ref, loss_type, beta=beta))


@pytest.mark.parametrize(
    ("loss_type", "rows", "accumulation", "scale_rewards", "masked"),
    [
        ("grpo", 2, 4, "none", False),
        ("dapo", 4, 2, "batch", True),
        ("bnpo", 2, 4, "batch", False),
        ("grpo", 8, 1, "group", True),
        ("dr_grpo", 4, 2, "none", True),
    ],
)
def test_scaled_rewards_and_masked_truncated_completions(
    folder: Path, loss_type: str, rows: int, accumulation: int, scale_rewards: str, masked: bool
) -> None:
    (step,) = trl_steps(
        folder,
        rows,
        accumulation,
        loss_type=loss_type,
        beta=0.04,
        scale_rewards=scale_rewards,
        mask_truncated_completions=masked,
        max_steps=1,
    )
    mine = Ours(folder, scale_rewards, masked)
    with torch.no_grad():
        ref = mine.logps(ours(folder, None))
    equal(step, mine.gradients(step, None, ref, loss_type, beta=0.04))


@pytest.mark.parametrize(
    ("loss_type", "rows", "accumulation", "epsilon", "epsilon_high"),
    [
        ("grpo", 8, 1, 0.2, None),
        ("dapo", 2, 4, 0.02, 0.05),
        ("bnpo", 4, 2, 0.02, 0.05),
    ],
)
def test_a_second_iteration_on_the_same_rollouts(
    folder: Path,
    loss_type: str,
    rows: int,
    accumulation: int,
    epsilon: float,
    epsilon_high: float | None,
) -> None:
    """The policy has moved, so the ratio is not 1 and some tokens are clipped."""
    first, second = trl_steps(
        folder,
        rows,
        accumulation,
        loss_type=loss_type,
        beta=0.04,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        num_iterations=2,
        max_steps=2,
    )
    mine = Ours(folder)
    options = {"beta": 0.04, "epsilon": epsilon, "epsilon_high": epsilon_high}
    with torch.no_grad():
        ref = mine.logps(ours(folder, None))
        old = mine.logps(ours(folder, first.weights))
        now = mine.logps(ours(folder, second.weights))
    assert (now - old).abs().max() > 0.05
    equal(first, mine.gradients(first, old, ref, loss_type, **options))
    equal(second, mine.gradients(second, old, ref, loss_type, **options))
    out = grpo_loss(now, old, ref, mine.advantages, mine.mask, **options)
    if epsilon < 0.1:
        assert float(out.metrics["clip_ratio/low_mean"][0]) > 0
        assert float(out.metrics["clip_ratio/high_mean"][0]) > 0


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.6}
KINDS: dict[str, dict[str, Any]] = {
    "gspo": {"loss_type": "grpo", **SEQUENCE},
    "gspo dapo": {"loss_type": "dapo", **SEQUENCE},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.02},
    "cispo sequence": {
        "loss_type": "cispo",
        "importance_sampling_level": "sequence",
        "epsilon_high": 1.05,
    },
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 3.0, "sapo_temperature_pos": 2.0},
    "luspo": {"loss_type": "luspo", **SEQUENCE},
    "delta": {"loss_type": "grpo", "epsilon": 0.1, "delta": 1.15},
}


def as_ours(options: dict[str, Any]) -> dict[str, Any]:
    """TRL's options as arguments of our loss."""
    found = dict(options)
    if "sapo_temperature_pos" in found:
        found["sapo_temperatures"] = (
            found.pop("sapo_temperature_pos"),
            found.pop("sapo_temperature_neg"),
        )
    return found


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("kind", KINDS)
def test_ratios_of_sequences_and_soft_limits(folder: Path, kind: str, beta: float) -> None:
    """In the second iteration the policy has moved; with and without the shared prefix."""
    options, masked = {**KINDS[kind], "beta": beta}, beta > 0
    steps = trl_steps(
        folder, 4, 2, num_iterations=2, max_steps=2, mask_truncated_completions=masked, **options
    )
    mine = Ours(folder, masked=masked)
    with torch.no_grad():
        ref = mine.logps(ours(folder, None)) if beta else None
        old = mine.logps(ours(folder, steps[0].weights))
    for step in steps:
        for way in (packed_logps, naive_logps):
            found = mine.gradients(step, old, ref, way=way, **as_ours(options))
            equal(step, found)
            for name, wanted in step.gradients.items():
                assert float((found[1][our_name(name)] - wanted).abs().max()) <= 1e-6, name
    # What the kind limits is limited, and is not the plain loss.
    plain = {"loss_type": "grpo", "epsilon": 1e3, "epsilon_high": 1e3, "beta": beta}
    with pytest.raises(AssertionError):
        equal(steps[1], mine.gradients(steps[1], old, ref, **plain))


@pytest.mark.parametrize("kind", ["dapo", "gspo", "cispo", "sapo", "luspo"])
def test_a_generation_of_two_steps_taken_twice(folder: Path, kind: str) -> None:
    """TRL takes all steps of a generation in turn, and then all of them again, as ``GrpoData``
    plans them; old log-probabilities are those of the generation."""
    options = KINDS.get(kind, {"loss_type": "dapo", "epsilon": 0.02})
    steps = trl_steps(
        folder, 2, 2, steps_per_generation=4, num_iterations=2, max_steps=4, beta=0.04, **options
    )
    mine = Ours(folder)
    rows = [[row for inputs in step.inputs for row in mine.rows_of(inputs)] for step in steps]
    assert rows[:2] == rows[2:]
    assert sorted(rows[0] + rows[1]) == list(range(8))
    with torch.no_grad():
        ref = mine.logps(ours(folder, None))
        old = mine.logps(ours(folder, steps[0].weights))
    mean = float(mine.mask.sum()) / len(mine.mask)
    for step in steps:
        equal(step, mine.gradients(step, old, ref, mean=mean, beta=0.04, **as_ours(options)))


MODES: dict[str, dict[str, Any]] = {
    "token_truncate": {"clip_max": 1.3},
    "token_mask": {"clip_max": 1.5, "clip_min": 0.7},
    "sequence_truncate": {"clip_max": 1.2, "clip_min": 0.8},
    "sequence_mask": {"clip_max": 1.2},
}
"""Limits that some of the ratios below are outside of, and others not."""


def from_a_server(mine: Ours, at_the_draw: Tensor) -> tuple[list[Rollout], Tensor]:
    """The rollouts with log-probabilities that a biased sampler reports for them, also as (8, C)
    with junk in the padding."""
    noise = torch.randn(at_the_draw.shape, generator=torch.Generator().manual_seed(3))
    sampled = torch.where(mine.mask == 1, at_the_draw + 0.3 * noise, torch.nan)
    sizes = mine.mask.sum(1).tolist()
    given = [row[:size] for row, size in zip(sampled.tolist(), sizes, strict=True)]
    groups = [replace(one, logps=given[4 * at : 4 * at + 4]) for at, one in enumerate(rollouts())]
    return groups, sampled


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("dapo", mode) for mode in MODES),
        ("gspo", "token_mask"),
        ("gspo", "sequence_mask"),
        ("dr_grpo", "token_truncate"),
        ("bnpo", "sequence_truncate"),
        ("cispo", "token_mask"),
        ("cispo sequence", "sequence_truncate"),
        ("sapo", "sequence_mask"),
        ("luspo", "token_truncate"),
        ("luspo", "sequence_mask"),
    ],
)
def test_the_correction_of_a_sampler(folder: Path, kind: str, mode: Any) -> None:
    """Two steps on one generation, with the KL penalty and masked truncated completions."""
    options = {"beta": 0.04, **KINDS.get(kind, {"loss_type": kind, "epsilon": 0.05})}
    mine = Ours(folder, masked=True)
    with torch.no_grad():
        # TRL's policy is made by the same shake, before it is given the rollouts.
        start = shaken(folder)
        groups, sampled = from_a_server(mine, mine.logps(ours(folder, start)))
        ref = mine.logps(ours(folder, None))
    limits = {f"vllm_importance_sampling_{name}": x for name, x in MODES[mode].items()}
    steps = trl_steps(
        folder,
        4,
        2,
        drawn=groups,
        num_iterations=2,
        max_steps=2,
        mask_truncated_completions=True,
        vllm_importance_sampling_mode=mode,
        **limits,
        **options,
    )
    with torch.no_grad():
        old = mine.logps(ours(folder, steps[0].weights))
    found = importance_ratio(old, sampled, mine.counted, mode=mode, **MODES[mode])
    assert 0 < int(found.outside.sum()) < found.outside.numel()
    for step in steps:
        wanted = torch.cat([inputs["importance_sampling_ratio"] for inputs in step.inputs])
        rows = [row for inputs in step.inputs for row in mine.rows_of(inputs)]
        torch.testing.assert_close(found.values[rows], wanted[:, : found.values.shape[1]])
        got = mine.gradients(step, old, ref, ratio=found.values, **as_ours(options))
        equal(step, got)
        for name, gradient in step.gradients.items():
            assert float((got[1][our_name(name)] - gradient).abs().max()) <= 1e-6, name
        with pytest.raises(AssertionError):  # without the correction it is another step
            equal(step, mine.gradients(step, old, ref, **as_ours(options)))


def test_the_kl_without_the_ratio(folder: Path) -> None:
    options = {"beta": 0.04, "use_bias_correction_kl": False}
    (step,) = trl_steps(folder, 4, 2, loss_type="grpo", max_steps=1, **options)
    mine = Ours(folder)
    with torch.no_grad():
        ref = mine.logps(ours(folder, None))
    equal(step, mine.gradients(step, None, ref, "grpo", **options))
    with pytest.raises(AssertionError):  # it is not the default's gradient
        equal(step, mine.gradients(step, None, ref, "grpo", beta=0.04))


def test_rollouts_used_over_two_steps(folder: Path) -> None:
    """TRL's dapo then divides each step by the mean of the generation's steps."""
    steps = trl_steps(folder, 2, 2, loss_type="dapo", steps_per_generation=4, max_steps=2)
    mine = Ours(folder)
    with torch.no_grad():
        old = mine.logps(ours(folder, steps[0].weights))
    for step in steps:
        rows = [row for inputs in step.inputs for row in mine.rows_of(inputs)]
        model = ours(folder, step.weights)
        out = grpo_loss(
            mine.logps(model, rows), old[rows], None, mine.advantages[rows], mine.mask[rows]
        )
        mean = float(mine.mask.sum()) / len(mine.mask)
        weight = grpo_weight(mine.mask[rows], "dapo", tokens_per_row=mean)
        assert weight != grpo_weight(mine.mask[rows], "dapo")
        loss = out.rows.sum() / weight
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        equal(step, (float(loss.detach()), grads))


def test_the_off_switch_and_temperature(folder: Path) -> None:
    (step,) = trl_steps(folder, 4, 2, loss_type="dapo", temperature=0.6, max_steps=1)
    mine = Ours(folder)
    for way in (packed_logps, naive_logps):

        def score(*args: Any, way: Any = way) -> Any:
            return way(*args, temperature=0.6)

        equal(step, mine.gradients(step, None, None, "dapo", score))


@pytest.mark.parametrize("moved", [False, True], ids=["at step 0", "later"])
def test_a_copy_of_all_weights_is_trls_reference(folder: Path, moved: bool) -> None:
    (step,) = trl_steps(folder, 8, 1, moved=moved, loss_type="dapo", beta=0.4, max_steps=1)
    mine, policy = Ours(folder), ours(folder, None)
    reference = FrozenCopy(policy, offload=True)
    reference.at_start(policy)
    for name, value in step.weights.items():
        dict(policy.named_parameters())[our_name(name)].data.copy_(value)
    with torch.no_grad(), reference.of(policy) as start:
        ref, now = mine.logps(start), mine.logps(policy)
    out = grpo_loss(now, None, ref, mine.advantages, mine.mask, beta=0.4)
    assert (float(out.metrics["kl"][0]) == 0) != moved
    equal(step, mine.gradients(step, None, ref, "dapo", beta=0.4))


@pytest.mark.parametrize("name", [*trl_bridge.SIGNATURES, *trl_bridge.OPTIONS])
def test_trl_has_not_moved(name: str) -> None:
    assert [found for found in trl_bridge.moved() if name in found] == []


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_bridge, "SIGNATURES", {"trl.GRPOTrainer._gone": ("self",)})
    monkeypatch.setattr(trl_bridge, "OPTIONS", {"beta": 0.04, "epsilon_middle": 1})
    assert trl_bridge.moved() == [
        "trl.GRPOTrainer._gone has parameters None",
        "trl.GRPOConfig.beta is 0.0 by default",
        "trl.GRPOConfig.epsilon_middle is gone",
    ]


def test_what_trl_hands_over(folder: Path) -> None:
    (step,) = trl_steps(folder, 8, 1, max_steps=1)
    assert set(trl_bridge.LOSS_INPUTS) <= set(step.inputs[0])
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _, names = record_steps(
        model,
        tokenizer(),
        rollouts(),
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=8,
        max_steps=1,
        bf16=False,
        use_cpu=True,
    )
    assert set(trl_bridge.REWARD_ARGUMENTS) <= names
