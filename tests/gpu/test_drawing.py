"""Fast paths of drawing on one GPU say what the plain ones say there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmemo.generation.questions import answer_greedily, can_share
from mmemo.generation.rollout import HFRollouts
from mmemo.models.adapters.lora import unwrap
from tests.generation.test_questions import ROWS, STOPS, composed, generated
from tests.generation.test_rollout import PLAIN, SEEDS, batch_of, frequent_stops, same, section
from tests.models.parts import shake, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def to_gpu(batch: Any) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_graphs_and_polls_change_no_token(graphs: bool, dropping: bool) -> None:
    made = tiny(lora={"r": 4})
    shake(made.model, 0.1)
    model = made.model.eval().cuda()
    prompts = to_gpu(batch_of(made, [0, 1, 2]))

    def rolled(**changes: Any) -> Any:
        engine = HFRollouts(made.processor.tokenizer, unwrap(model), section(**changes))
        found = frequent_stops(engine).generate(model, prompts, SEEDS)
        for name in ("ids", "mask", "logps", "ended"):
            object.__setattr__(found, name, getattr(found, name).cpu())
        return found

    same(rolled(cuda_graphs=graphs, drop_finished=dropping, poll_steps=4), rolled(**PLAIN))


def test_a_graph_draws_under_autocast() -> None:
    made = tiny(lora={"r": 4})
    shake(made.model, 0.1)
    model = made.model.eval().cuda()
    prompts = to_gpu(batch_of(made, [0, 1, 2]))
    texts = []
    for graphs in (False, True):
        engine = HFRollouts(made.processor.tokenizer, unwrap(model), section(cuda_graphs=graphs))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            texts.append(engine.generate(model, prompts, SEEDS).texts)
    # bfloat16 rounds another order of sums otherwise, so only most of the texts need be equal.
    assert sum(one == other for one, other in zip(*texts, strict=True)) >= len(SEEDS) // 2


def test_questions_share_a_beginning() -> None:
    model, collate = composed(lora={"r": 4})
    model.cuda()
    batch = to_gpu(collate(ROWS, generation=True))
    wanted = generated(model, batch)
    assert can_share(model)
    assert answer_greedily(model, batch, stops=STOPS, max_new_tokens=20) == wanted
