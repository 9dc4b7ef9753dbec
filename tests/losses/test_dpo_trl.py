"""dpo (smoothed too), ipo and the loss on the chosen answer are TRL's: loss, gradients, rewards.

TRL's own ``DPOTrainer`` computes its loss on a tiny text-only Llama; ours starts from the token
log-probabilities of an untouched copy of it, by plain torch.
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mmemo.losses.dpo import Dpo
from mmemo.losses.objective import Answer, AnswerKey, PreferenceLogps, TermLoss
from mmemo.models.composed.scratch import build_llama, train_tokenizer
from mmemo.models.config import ScratchConfig
from tests.losses.pairs import term
from tests.models.parts import TEXTS, shake

with warnings.catch_warnings():  # it warns that it may move
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer

SIDES: tuple[Answer, Answer] = ("chosen", "hallucinated")


class Quiet(DPOTrainer):
    """TRL's trainer; nothing is sent anywhere."""

    def _send_telemetry(self) -> None:
        pass


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@cache
def models() -> tuple[Any, Any]:
    """A policy and the reference that it has moved from."""
    torch.manual_seed(0)
    config = ScratchConfig(hidden_size=32, layers=2, heads=2, vocab_size=300)
    reference: Any = build_llama(config, tokenizer()).eval()
    shake(reference, 0.05)
    policy = deepcopy(reference)
    shake(policy, 0.02)
    return policy, reference


def examples(count: int) -> list[dict[str, list[int]]]:
    """Ragged: prompts of 2 to 7 tokens, answers of 1 to 8."""
    generator = torch.Generator().manual_seed(count)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(20, 280, (size,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(2, 7), "chosen_ids": tokens(1, 8), "rejected_ids": tokens(1, 8)}
        for _ in range(count)
    ]


def theirs(folder: Path, batch: Any, **options: Any) -> tuple[float, dict[str, Tensor], Any]:
    """TRL's loss, its gradients, and the metrics it logs."""
    policy, reference = (deepcopy(model) for model in models())
    trainer: Any = Quiet(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder),
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        processing_class=tokenizer(),
    )
    policy.train()
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), gradients(policy), metrics


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def logps(model: Any, batch: Any) -> dict[AnswerKey, Tensor]:
    """Each token's log-probability, chosen answers first; junk before the answer's first token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    every = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return {("input", side): part for side, part in zip(SIDES, every.chunk(2), strict=True)}


def ours(batch: Any, kind: str, **options: Any) -> tuple[TermLoss, dict[str, Tensor]]:
    """Our loss of the same rows, and the gradients of its mean."""
    policy, reference = (deepcopy(model) for model in models())
    masks = batch["completion_mask"][:, 1:].bool().chunk(2)
    rows = len(masks[0])
    present: dict[AnswerKey, Tensor] = {
        ("input", side): torch.full((rows,), side in SIDES)
        for side in ("chosen", "spurious", "hallucinated")
    }
    absent: dict[AnswerKey, Tensor] = {("input", "spurious"): torch.zeros(masks[0].shape)}
    mask: dict[Answer, Tensor] = {"spurious": masks[0], **dict(zip(SIDES, masks, strict=True))}
    with torch.no_grad():
        stored = logps(reference, batch)
    out = term(kind, **options)(
        PreferenceLogps(logps(policy, batch) | absent, stored | absent, mask, mask, present)
    )
    (out.rows.sum() / out.counted.sum()).backward()
    return out, gradients(policy)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("kind", "loss_type", "rows"),
    [("dpo", "sigmoid", 4), ("dpo", "sigmoid", 1), ("ipo", "ipo", 4), ("sft", "sft", 1)],
)
def test_loss_gradients_and_rewards(
    tmp_path: Path, kind: str, loss_type: str, rows: int, beta: float
) -> None:
    batch = DataCollatorForPreference(pad_token_id=0)(examples(rows))
    loss, wanted, metrics = theirs(tmp_path, batch, loss_type=[loss_type], beta=beta)
    out, found = ours(batch, kind, **({} if kind == "sft" else {"beta": beta}))
    assert float(out.rows.sum() / out.counted.sum()) == pytest.approx(loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = float(grad.abs().max())
        assert scale > 0, name
        assert float((found[name] - grad).abs().max()) <= 1e-5 * scale, name
    if kind != "sft":
        margin = metrics["rewards/margins"]
        assert abs(margin) > 1e-4
        for name in ("chosen", "rejected", "margins", "accuracies"):
            total, count = out.metrics[f"rewards/{name}"]
            value = float(total) / int(count)
            assert value == pytest.approx(metrics[f"rewards/{name}"], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("eps", [0.1, 0.3])
@pytest.mark.parametrize(
    ("loss_type", "their_type", "rows"),
    [("robust", "robust", 4), ("sigmoid", "aot_unpaired", 1), ("sigmoid", "aot", 1)],
)
def test_label_smoothing(
    tmp_path: Path, loss_type: str, their_type: str, rows: int, eps: float
) -> None:
    """TRL's sigmoid loss ignores ``label_smoothing``; with one row, its ``aot`` losses, which sort
    the margins of a batch, are the smoothed sigmoid loss."""
    batch = DataCollatorForPreference(pad_token_id=0)(examples(rows))
    loss, wanted, _ = theirs(tmp_path, batch, loss_type=[their_type], beta=0.5, label_smoothing=eps)
    out, found = ours(batch, "dpo", beta=0.5, loss_type=loss_type, label_smoothing=eps)
    assert float(out.rows.detach().sum() / out.counted.sum()) == pytest.approx(loss, rel=1e-5)
    plain, _ = ours(batch, "dpo", beta=0.5)
    assert abs(float(plain.rows.detach().sum() / plain.counted.sum()) - loss) > 1e-5
    # The pulls of the two labels nearly cancel, so that rounding weighs more than above.
    for name, grad in wanted.items():
        scale = float(grad.abs().max())
        assert scale > 0, name
        assert float((found[name] - grad).abs().max()) <= 1e-4 * scale, name


def test_trls_sigmoid_loss_ignores_label_smoothing(tmp_path: Path) -> None:
    """If this fails, TRL smooths again, and ours can be compared with it directly."""
    batch = DataCollatorForPreference(pad_token_id=0)(examples(4))
    plain, smoothed = (
        theirs(tmp_path, batch, loss_type=["sigmoid"], label_smoothing=eps)[0] for eps in (0, 0.3)
    )
    assert plain == smoothed


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_the_smoothed_sigmoid_loss_is_cpos_on_log_ratios(eps: float) -> None:
    """CPO has no reference; given log-ratios for log-probabilities, its loss is cDPO's."""
    trainer: Any = SimpleNamespace(
        alpha=0.0,
        loss_type="sigmoid",
        beta=0.5,
        label_smoothing=eps,
        accelerator=SimpleNamespace(device="cpu"),
    )
    chosen, rejected = torch.randn(
        2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    one = Dpo(beta=0.5, label_smoothing=eps)
    torch.testing.assert_close(one.margin_loss(0.5 * (chosen - rejected)), losses)


def test_ipo_of_sums_is_not_trls(tmp_path: Path) -> None:
    batch = DataCollatorForPreference(pad_token_id=0)(examples(4))
    loss, _, _ = theirs(tmp_path, batch, loss_type=["ipo"])
    out, _ = ours(batch, "ipo", average=False)
    assert float(out.rows.mean()) != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(("kind", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_the_options_and_defaults_are_trls(kind: str, loss_type: str) -> None:
    one: Any = term(kind)
    config = DPOConfig(loss_type=[loss_type], use_cpu=True, bf16=False)
    assert one.beta == config.beta
    assert (config.ld_alpha, config.f_divergence_type) == (None, "reverse_kl")
    assert not config.use_weighting
