"""Log-probabilities in chunks: the same numbers and gradients, in a fraction of the memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmemo.generation.token_scores import TokenScores, token_scores
from tests.generation.test_logprobs import fresh
from tests.memory import peak_bytes
from tests.models.composed.test_modeling import batch_of

K, D, V = 37, 16, 211


def backbone(*, learns: bool = False, cap: float | None = None, bias: bool = False) -> Any:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).requires_grad_(learns)
    found: dict[str, Any] = {"lm_head": head}
    if cap is not None:
        found["_scale"] = lambda logits: torch.tanh(logits / cap) * cap
    return SimpleNamespace(**found)


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(K, D, generator=generator).requires_grad_()
    return hidden, torch.randint(V, (K,), generator=generator)


def learn(model: Any, limit: int, **asked: Any) -> tuple[TokenScores, list[Tensor]]:
    hidden, targets = states()
    model.lm_head.zero_grad()
    out = token_scores(model, hidden, targets, max_logits=limit, **asked)
    (out.logps * torch.linspace(-1, 2, K)).sum().backward()
    grads = [p.grad for p in (hidden, *model.lm_head.parameters()) if p.grad is not None]
    return out, [grad.clone() for grad in grads]


@pytest.mark.parametrize("limit", [1, 5 * V, (K - 1) * V, K * V])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "head", [{}, {"learns": True}, {"cap": 3.0}, {"bias": True}, {"learns": True, "bias": True}]
)
def test_chunks_change_no_number(head: dict[str, Any], temperature: float, limit: int) -> None:
    model = backbone(**head)
    asked: Any = {"temperature": temperature, "entropies": True, "correct": True}
    whole, wanted = learn(model, 0, **asked)
    found, grads = learn(model, limit, **asked)
    close: Any = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(found.logps, whole.logps, **close)
    torch.testing.assert_close(found.entropies, whole.entropies, **close)
    assert torch.equal(found.correct, whole.correct)  # pyright: ignore
    assert len(grads) == len(wanted) == 1 + sum(p.requires_grad for p in model.lm_head.parameters())
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_the_numbers_are_those_of_cross_entropy() -> None:
    model, (hidden, targets) = backbone(), states()
    out = token_scores(model, hidden, targets, correct=True, entropies=True, max_logits=4 * V)
    logits = model.lm_head(hidden)
    wanted = -functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(out.logps, wanted, atol=1e-6, rtol=1e-6)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(out.entropies, entropy, atol=1e-5, rtol=1e-5)
    likeliest = token_scores(model, hidden, logits.argmax(-1), correct=True, max_logits=4 * V)
    assert likeliest.correct is not None
    assert likeliest.correct.all()
    assert out.correct is not None
    assert not out.correct.all()


def test_a_gradient_can_be_asked_for_twice() -> None:
    """As the log of the terms' shares does."""
    hidden, targets = states()
    out = token_scores(backbone(), hidden, targets, max_logits=5 * V)
    first, second = (
        torch.autograd.grad(out.logps.sum(), hidden, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_head_with_hooks_is_called_once_whatever_the_number_of_chunks() -> None:
    """ZeRO-3's hooks gather the weight over the ranks, which have different numbers of chunks."""
    for learns in (False, True):
        model = backbone(learns=learns)
        wanted = learn(model, 0, entropies=True)
        calls: list[int] = []

        def count(*_: Any, calls: list[int] = calls) -> None:
            calls.append(1)

        hook = model.lm_head.register_forward_pre_hook(count)
        found = learn(model, 5 * V, entropies=True)
        assert len(calls) == 1
        torch.testing.assert_close(found[0].logps, wanted[0].logps, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-6)
        hook.remove()
        assert "forward" not in vars(model.lm_head)


def test_no_token_is_no_error() -> None:
    hidden, targets = states()
    out = token_scores(backbone(), hidden[:0], targets[:0], correct=True, max_logits=V)
    assert out.logps.shape == (0,)
    assert out.logps.requires_grad


def peak(limit: int, *, learns: bool, tokens: int = 256, words: int = 4096) -> int:
    """Bytes of the largest moment of a forward and backward pass, beside its inputs."""
    model: Any = SimpleNamespace(lm_head=nn.Linear(D, words, bias=False).requires_grad_(learns))
    hidden = torch.randn(tokens, D).requires_grad_()
    targets = torch.randint(words, (tokens,))

    def run() -> None:
        out = token_scores(model, hidden, targets, correct=True, max_logits=limit)
        out.logps.sum().backward()

    return peak_bytes(run)


@pytest.mark.parametrize("learns", [False, True])
def test_the_logits_of_all_tokens_are_never_held(learns: bool) -> None:
    whole = 256 * 4096 * 4
    assert peak(0, learns=learns) >= 2 * whole
    # 16 tokens at a time: four such tensors, the gradients of hidden states and head, and no more.
    chunk = 16 * 4096 * 4
    beside = 3 * 256 * D * 4 + (2 * D * 4096 * 4 if learns else 0)
    assert peak(16 * 4096, learns=learns) <= 4 * chunk + beside + 2**14


def test_a_whole_model_in_chunks_has_the_same_gradients() -> None:
    """SFT's objective, with a head that is tied to an embedding that learns."""
    from mmemo.train.sft import SftObjective, sft_batch

    loaded = fresh()
    batch = batch_of(loaded, [0, 1, 2, 3])
    ids = batch["input_ids"]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 5, -100)
    rows = sft_batch({**batch, "labels": labels})
    found: list[dict[str, Tensor]] = []
    for limit in (0, 1):
        loaded.model.zero_grad()
        out = SftObjective(limit)(loaded.model, rows)
        out.rows.sum().backward()
        grads = {n: p.grad for n, p in loaded.model.named_parameters() if p.grad is not None}
        found.append({"rows": out.rows.detach(), **{n: g.clone() for n, g in grads.items()}})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        allowed = 1e-6 * max(1.0, float(value.abs().max()))
        assert float((found[1][name] - value).abs().max()) <= allowed, name
