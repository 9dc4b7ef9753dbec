"""A plain preference step computes what TRL's own trainer does, on a text-only Llama: from texts to
gradients, through our batches, forward passes and stored reference."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.preference import Preference
from mmemo.data.sample import Sample, Turn
from mmemo.losses.objective import ObjectiveConfig, build_terms, merge_requests
from mmemo.models.build import Loaded, ModelConfig, load_model, set_trainable
from mmemo.models.composed.scratch import build_llama, train_tokenizer
from mmemo.models.config import ScratchConfig
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.batch import PairBatcher
from mmemo.train.dpo.config import DpoLossConfig
from mmemo.train.dpo.objective import DpoObjective
from mmemo.train.reference import FrozenCopy
from tests.models.parts import TEXTS, shake
from tests.trl_bridge import Step, record_pair_steps

ROWS = [
    ("Which emotion?", "<think>loud</think><answer>angry</answer>", "happy"),
    ("Is it sad?", "no", "<think>The lip corners rise.</think><answer>sad</answer>"),
    ("How loud is the voice?", "quiet calm neutral", "loud and sad, and loud again"),
    ("What does the person show? Look closely.", "surprised", "calm"),
]


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""An answer ends with its end token. TRL scores what a template writes after that too."""


@cache
def tokenizer() -> Any:
    made = train_tokenizer([*TEXTS, *(text for row in ROWS for text in row)], 300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """Each end of a training collects garbage, which takes longer than the training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = ScratchConfig(hidden_size=32, layers=2, heads=2, vocab_size=300)
    model = build_llama(config, tokenizer())
    shake(model, 0.05)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def theirs(folder: Path, moved: bool = True, **options: Any) -> Step:
    """TRL's first step, on a policy that is no longer the reference, or is it still."""
    policy, reference = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    if moved:
        shake(policy, 0.02)
    rows = [
        {
            "prompt": turns("user", prompt),
            "chosen": turns("assistant", chosen),
            "rejected": turns("assistant", rejected),
        }
        for prompt, chosen, rejected in ROWS
    ]
    (step,) = record_pair_steps(
        policy,
        reference,
        tokenizer(),
        rows,
        output_dir=str(folder / "trl"),
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        max_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    return step


@cache
def base(folder: Path) -> Loaded:
    loaded = load_model(parse(ModelConfig, {"text": str(folder)}))
    set_trainable(loaded.model, ["lm"])
    loaded.model.eval()
    return loaded


def ours(folder: Path, step: Step, **values: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of all rows and its gradients, at the weights that TRL had."""
    loaded = base(folder)
    model: nn.Module = deepcopy(loaded.model)
    reference = FrozenCopy(model, offload=values.pop("offload", False))
    reference.at_start(model)
    named = dict(model.named_parameters())
    for name, value in step.weights.items():
        named[our_name(name)].data.copy_(value)
    section = {"shared_prefix": values.pop("shared_prefix", True)}
    terms = build_terms(parse(ObjectiveConfig, {"terms": [values]}).terms)
    nothing: Any = None
    batcher = PairBatcher(
        Collator(loaded.processor, nothing), nothing, terms, merge_requests(terms), frames=1
    )
    pairs = [
        Preference(
            sample=Sample(f"row-{at}", (Turn("user", prompt),), {}),
            query="joint",
            answers={"chosen": chosen, "spurious": rejected},
            negative=None,
            irrelevant=None,
            plain=True,
        )
        for at, (prompt, chosen, rejected) in enumerate(ROWS)
    ]
    objective = DpoObjective(
        terms, merge_requests(terms), parse(DpoLossConfig, section), Ranks(cpu=True), reference
    )
    loss = objective(model, batcher(pairs, reference=True)).rows.sum() / len(pairs)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def our_name(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2)])
@pytest.mark.parametrize(("kind", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_and_gradients(
    folder: Path, kind: str, loss_type: str, rows: int, accumulation: int, shared_prefix: bool
) -> None:
    step = theirs(
        folder,
        loss_type=[loss_type],
        beta=0.3,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
    )
    assert len(step.losses) == accumulation
    loss, gradients = ours(folder, step, kind=kind, beta=0.3, shared_prefix=shared_prefix)
    assert loss == pytest.approx(sum(step.losses) / accumulation, rel=1e-5)
    assert {our_name(name) for name in step.gradients} == gradients.keys()
    for name, wanted in step.gradients.items():
        scale = float(wanted.abs().max())
        assert scale > 0, name
        assert float((gradients[our_name(name)] - wanted).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("moved", [False, True], ids=["at step 0", "later"])
def test_a_copy_of_all_weights_is_trls_reference(folder: Path, moved: bool) -> None:
    step = theirs(folder, moved, loss_type=["sigmoid"], beta=0.3, per_device_train_batch_size=4)
    loss, gradients = ours(folder, step, kind="dpo", beta=0.3, offload=True)
    assert loss == pytest.approx(sum(step.losses), rel=1e-5)
    assert (loss == pytest.approx(math.log(2), abs=1e-6)) != moved
    for name, wanted in step.gradients.items():
        scale = float(wanted.abs().max())
        assert float((gradients[our_name(name)] - wanted).abs().max()) <= 1e-5 * scale, name
