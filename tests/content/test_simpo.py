"""``losses/simpo.py``: SimPO by hand and against TRL's, and in a run that names it by path."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemo import content
from mmemo.check.run import run_check
from mmemo.config import dump, parse
from mmemo.errors import ConfigError
from mmemo.losses.base import AnswerKey, LogpRequest, PreferenceLogps, TermLoss
from mmemo.losses.objective import ObjectiveConfig, build_terms, merge_requests
from mmemo.run_log import RunRecord
from mmemo.train.dpo.train import DpoConfig, run_dpo
from tests.losses.pairs import draw, metric, with_gradient
from tests.train.dpo.tiny import dpo_config, write_pairs
from tests.train.tiny import write_rows

with warnings.catch_warnings():  # it warns that it may move
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer

KIND = "losses/simpo.py:Simpo"


def simpo(**options: Any) -> Any:
    config = parse(ObjectiveConfig, {"terms": [{"kind": KIND, **options}]})
    return build_terms(config.terms)[0].term


def pair(chosen: list[float], rejected: list[float]) -> PreferenceLogps:
    """One pair with these token log-probabilities, and no hallucinated answer."""
    width = max(len(chosen), len(rejected))

    def padded(values: list[float]) -> Tensor:
        return torch.tensor([values + [math.nan] * (width - len(values))], dtype=torch.float64)

    def mask(values: list[float]) -> Tensor:
        return torch.arange(width)[None] < len(values)

    yes, no = torch.tensor([True]), torch.tensor([False])
    return PreferenceLogps(
        {
            ("input", "chosen"): padded(chosen),
            ("input", "spurious"): padded(rejected),
            ("input", "hallucinated"): padded([]),
        },
        {},
        {"chosen": mask(chosen), "spurious": mask(rejected), "hallucinated": mask([])},
        {},
        {("input", "chosen"): yes, ("input", "spurious"): yes, ("input", "hallucinated"): no},
    )


def test_a_pair_by_hand() -> None:
    """Mean log-probabilities -0.5 and -1: rewards -1 and -2, a margin of 1 less gamma 0.4."""
    out = simpo(beta=2.0, gamma=0.4)(pair([-0.2, -0.8], [-1.0, -0.5, -1.5]))
    assert float(out.rows[0]) == pytest.approx(math.log(1 + math.exp(-0.6)))
    assert metric(out, "rewards/chosen") == pytest.approx(-1)
    assert metric(out, "rewards/spurious") == pytest.approx(-2)
    assert metric(out, "rewards/margins") == pytest.approx(1)
    # Ahead by just gamma, a pair has still half of the largest gradient.
    even = simpo(beta=2.0, gamma=1.0)(pair([-0.2, -0.8], [-1.0, -0.5, -1.5]))
    assert float(even.rows[0]) == pytest.approx(math.log(2))


def test_length_alone_decides_nothing() -> None:
    one = simpo()(pair([-0.5, -0.5], [-0.7]))
    longer = simpo()(pair([-0.5] * 6, [-0.7] * 3))
    assert float(one.rows[0]) == pytest.approx(float(longer.rows[0]))


def test_the_gradient_raises_the_chosen_answer_and_lowers_the_rejected() -> None:
    logps = pair([-0.2, -0.8], [-1.0, -0.5, -1.5])
    leaves = with_gradient(logps)
    simpo(beta=2.0, gamma=0.4)(leaves).rows.sum().backward()
    chosen, rejected = (leaves.policy["input", a].grad for a in ("chosen", "spurious"))
    assert chosen is not None
    assert rejected is not None
    share = 1 / (1 + math.exp(0.6))  # sigmoid(-margin)
    assert chosen[0, :2].tolist() == pytest.approx([-2 * share / 2] * 2)
    assert rejected[0].tolist() == pytest.approx([2 * share / 3] * 3)


def test_pairs_that_lack_an_answer_change_no_other() -> None:
    absent: Any = {0: {("input", "spurious"), ("input", "hallucinated")}, 1: {("input", "chosen")}}
    out = simpo()(draw(0, 4, absent))
    assert out.counted.tolist() == [False, False, True, True]
    assert out.rows[:2].tolist() == [0, 0]
    alone = simpo()(draw(0, 4))
    assert torch.equal(out.rows[2:], alone.rows[2:])


@pytest.mark.parametrize(
    ("beta", "gamma", "eps"), [(2.0, 1.0, 0), (0.1, 0.5, 0), (2.5, 0.3, 0), (2.0, 1.0, 0.2)]
)
def test_loss_rewards_and_gradients_are_trls(beta: float, gamma: float, eps: float) -> None:
    """From the same logits, through TRL's own log-probabilities and loss."""
    torch.manual_seed(0)
    rows, length, vocabulary = 5, 9, 17
    labels = torch.randint(0, vocabulary, (2 * rows, length))
    for at in range(2 * rows):  # prompts and padding of different lengths
        labels[at, : 1 + at % 4] = -100
        labels[at, length - at % 3 :] = -100
    logits = torch.randn(2 * rows, length, vocabulary, dtype=torch.float64)

    theirs = logits.clone().requires_grad_()
    means = CPOTrainer.get_batch_logps(theirs, labels.clone(), average_log_prob=True)
    trainer: Any = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=gamma,
        beta=beta,
        label_smoothing=eps,
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, means[:rows], means[rows:])
    losses.mean().backward()

    ours = logits.clone().requires_grad_()
    one = simpo(beta=beta, gamma=gamma, label_smoothing=eps, rejected="spurious")
    out = one(from_logits(ours, labels, rows))
    (out.rows.sum() / out.counted.sum()).backward()
    torch.testing.assert_close(out.rows, losses)
    assert metric(out, "rewards/chosen") == pytest.approx(float(chosen.mean()))
    assert metric(out, "rewards/rejected") == pytest.approx(float(rejected.mean()))
    torch.testing.assert_close(ours.grad, theirs.grad)


def from_logits(logits: Tensor, labels: Tensor, rows: int) -> PreferenceLogps:
    """Chosen answers first, as TRL stacks them."""
    targets = labels[:, 1:].clamp(min=0)
    every = logits[:, :-1].log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    mask = labels[:, 1:] != -100
    keys: list[AnswerKey] = [("input", "chosen"), ("input", "spurious")]
    halves = (slice(rows), slice(rows, None))
    return PreferenceLogps(
        {key: every[half] for key, half in zip(keys, halves, strict=True)},
        {},
        {key[1]: mask[half] for key, half in zip(keys, halves, strict=True)},
        {},
        {key: torch.ones(rows, dtype=torch.bool) for key in keys},
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simpo")
    write_rows(folder)
    write_pairs(folder)
    return folder


SHORT: dict[str, Any] = {"train": {"max_steps": 12, "learning_rate": 1e-2}}


def test_a_run_by_path_learns_without_a_reference(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dpo_config(clips, tmp_path / "run", {"kind": KIND, "gamma": 0.5}, **SHORT)
    assert parse(DpoConfig, dump(config)) == config
    run_check(config)
    printed = capsys.readouterr().out
    assert "simpo: 16 of 16 pairs" in printed
    assert "reference:" not in printed
    run_dpo(config)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["simpo/loss"] < lines[0]["simpo/loss"] - 0.05
    assert lines[-1]["simpo/rewards/margins"] > lines[0]["simpo/rewards/margins"] + 0.1
    record = RunRecord(tmp_path / "run")
    assert not record.events("reference")
    assert not (clips / "features" / "reference").exists()
    (started,) = record.events("dpo")
    (loss,) = started["losses"]
    file = content.find("losses/simpo.py")
    assert (loss["path"], loss["sha256"]) == (KIND, content.sha256(file))


def test_no_reference_even_where_none_could_be_had(clips: Path, tmp_path: Path) -> None:
    """A live reference needs a new adapter; a term that asks for no reference needs neither."""
    live: dict[str, Any] = {"dpo": {"reference": "adapter_off"}, "train": {"max_steps": 1}}
    model = dpo_config(clips, tmp_path).model_copy(update={}).model.model_dump(exclude={"lora"})
    run_dpo(dpo_config(clips, tmp_path / "run", {"kind": KIND}, model=model, **live))
    with pytest.raises(ConfigError, match=r"set model\.lora"):
        run_dpo(dpo_config(clips, tmp_path / "dpo", {"kind": KIND}, "dpo", model=model, **live))


def test_beside_a_term_that_needs_one_the_reference_is_that_terms() -> None:
    terms = [{"kind": KIND}, {"kind": "dpo", "rejected": "spurious"}]
    requests = {
        one.key: one
        for one in merge_requests(
            build_terms(parse(ObjectiveConfig, {"terms": terms}).terms),
        )
    }
    assert requests["input", "spurious"] == LogpRequest("input", "spurious")
    alone = LogpRequest("input", "hallucinated", reference=False)
    assert requests["input", "hallucinated"] == alone


def test_an_edited_loss_forbids_a_resume(clips: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(content.find("losses/simpo.py").read_bytes())

    def run(steps: int) -> None:
        term = {"kind": f"{file}:Simpo", "name": "mine"}
        given: Any = {"train": {"max_steps": steps}, "run": {"save_steps": 1}}
        run_dpo(dpo_config(clips, tmp_path / "run", term, **given))

    run(2)
    run(2)  # nothing changed: it goes on
    file.write_text(file.read_text() + "\n# another loss\n")
    with pytest.raises(ConfigError, match=r"made with other settings: inputs\.loss mine"):
        run(2)


def test_it_returns_what_a_term_returns() -> None:
    assert isinstance(simpo()(draw(0)), TermLoss)
