"""Rollouts from vLLM itself, on the CPU: the same tokens and probabilities as the trainer's, and a
run that learns although the server is killed.

The tests run in mmemo's environment and start vLLM from the one that ``launch/vllm_env.sh`` makes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.sample import MediaRef, Modality, Sample, Turn
from mmemo.features.source import FeatureSource
from mmemo.generation.logprobs import packed_logps
from mmemo.generation.rollout import HFRollouts, RolloutConfig, Rollouts, rollout_seed
from mmemo.generation.vllm.connect import connect
from mmemo.generation.vllm.engine import VllmRollouts
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.train.grpo.train import GrpoConfig, run_grpo
from tests.export.native import release_omni
from tests.media_files import write_clip
from tests.models.native_files import FED
from tests.models.parts import shake
from tests.train.grpo.test_vllm import text_rows, text_values
from tests.train.grpo.tiny import last_step, metrics, said
from tests.vllm_server import Server, program

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

GROUP, LONGEST = 4, 12
PATIENCE = 900.0
"""Seconds for a server to start; a minute where the machine has nothing else to do."""
NATS = 1e-4
"""How far log-probabilities in float32 may be apart. 1.6e-5 were seen; a wrong position of one
medium costs more than 1e-2."""
KINDS: Mapping[str, tuple[Modality, ...]] = {
    "text": (),
    "audio": ("audio",),
    "video": ("video",),
    "video and audio": ("video", "audio"),
}
OPTIONS = (
    *("--max-model-len", "256", "--max-num-seqs", "32", "--enable-lora", "--max-lora-rank", "8"),
    *("--enable-scale-out", "--skip-mm-profiling"),
    *("--limit-mm-per-prompt", '{"audio": 1, "video": 1, "image": 0}'),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``omni`` as released, clips of two lengths and shapes, and rows of text."""
    found = tmp_path_factory.mktemp("vllm")
    release_omni(found / "omni", media=True)
    text_rows(found / "rows")
    for number, size in enumerate(((32, 32), (64, 32))):
        seconds, tone = 0.6 + 0.3 * number, 200.0 + 100 * number
        write_clip(found / f"{number}.mp4", seconds=seconds, size=size, tone=tone)
    return found


@pytest.fixture(scope="module")
def raw(folder: Path) -> Iterator[Server]:
    """A server with vLLM's own ``--logprobs-mode``."""
    server = Server(program(), folder / "omni", folder / "raw.log", *OPTIONS)
    try:
        server.wait(time.monotonic() + PATIENCE)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    """The released model with an adapter that has moved away from its initialisation."""
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    values = {"path": str(folder / "omni"), "lora": lora, "native": FED, "sampling": {"frames": 4}}
    found = load_model(parse(ModelConfig, values))
    shake(found.model, 0.2)
    found.model.eval()
    return found


def rows_of(kind: str) -> list[Sample]:
    media = KINDS[kind]
    text = "".join(f"<{name}>" for name in media)
    return [
        Sample(
            sample_id=f"{kind} {number}",
            turns=(Turn("user", f"{text}Which emotion{' then' * number}?"),),
            media={name: MediaRef(f"{number}.mp4") for name in media},
        )
        for number in range(2)
    ]


def batch_of(loaded: Loaded, rows: list[Sample], folder: Path) -> dict[str, Any]:
    limits = parse(DecodeConfig, {"workers": 1})
    model = unwrap(loaded.model)
    with FeatureSource(rows, model, None, folder, limits, isolate=False) as source:
        return Collator(loaded.processor, source)(rows, generation=True)


def section(**changes: Any) -> RolloutConfig:
    sizes = {"num_generations": GROUP, "max_completion_length": LONGEST}
    return parse(RolloutConfig, {**sizes, **changes})


def engine(
    loaded: Loaded, server: Server, folder: Path, rows: list[Sample], **changes: Any
) -> VllmRollouts:
    url = f"http://127.0.0.1:{server.port}"
    config = section(engine="vllm", vllm={"url": url, "patience_s": PATIENCE}, **changes)
    made = connect(config, loaded, folder / "run", samples=rows, media_root=folder)
    made.check()
    return made


def seeds_of(rows: list[Sample]) -> list[int]:
    return [rollout_seed(1, 2, row.sample_id, copy) for row in rows for copy in range(GROUP)]


def trainers(loaded: Loaded, batch: dict[str, Any], drawn: Rollouts, heat: float) -> torch.Tensor:
    """The log-probabilities that the loss computes."""
    prompts = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    index = torch.arange(len(batch["input_ids"])).repeat_interleave(GROUP)
    with torch.no_grad():
        scores = packed_logps(loaded.model, prompts, drawn.ids, drawn.mask, index, temperature=heat)
    return scores.logps * drawn.mask


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_sampled_probabilities_are_the_trainers(
    loaded: Loaded, raw: Server, folder: Path, kind: str
) -> None:
    rows = rows_of(kind)
    batch, seeds = batch_of(loaded, rows, folder), seeds_of(rows)
    greedy = engine(loaded, raw, folder, rows, top_k=1).generate(loaded.model, batch, seeds)
    own = HFRollouts(loaded.processor.tokenizer, unwrap(loaded.model), section(top_k=1))
    wanted = own.generate(loaded.model, batch, seeds)
    assert torch.equal(greedy.ids * greedy.mask, wanted.ids * wanted.mask)
    assert greedy.texts == wanted.texts
    torch.testing.assert_close(greedy.logps, wanted.logps, atol=NATS, rtol=0)

    drawn = engine(loaded, raw, folder, rows).generate(loaded.model, batch, seeds)
    assert len({tuple(row) for row in drawn.ids.tolist()}) > GROUP
    found = trainers(loaded, batch, drawn, 1.0)
    torch.testing.assert_close(drawn.logps, found, atol=NATS, rtol=0)
    again = engine(loaded, raw, folder, rows).generate(loaded.model, batch, seeds)
    assert torch.equal(again.ids, drawn.ids)


def test_a_run_learns_although_its_server_is_killed(
    loaded: Loaded, raw: Server, folder: Path
) -> None:
    """The second server is started with another ``--logprobs-mode``, which is as good here."""
    url, out = f"http://127.0.0.1:{raw.port}", folder / "grpo"
    values = text_values(folder / "omni", folder / "rows", out, url)
    values["rollout"] |= {"num_generations": 8, "max_completion_length": LONGEST}
    values["rollout"]["vllm"] = {"url": url, "patience_s": PATIENCE}
    values["train"] |= {"max_steps": 10, "learning_rate": 3e-2}
    second: list[Server] = []

    def replace() -> None:
        while last_step(out) < 3:
            time.sleep(0.05)
        raw.kill()
        mode, log = ("--logprobs-mode", "processed_logprobs"), folder / "second.log"
        made = Server(program(), folder / "omni", log, *OPTIONS, *mode, port=raw.port)
        second.append(made)

    killer = threading.Thread(target=replace, daemon=True)
    killer.start()
    try:
        run_grpo(parse(GrpoConfig, values))
        killer.join(5)
        assert second
        rewards = [line["rewards/even/mean"] for line in metrics(out)]
        assert len(rewards) == 10
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
        versions = {line["step"]: line["version"] for line in said(out)}
        assert len(versions) == 10
        assert len(set(versions.values())) >= 9  # a step whose rewards are all equal changes none

        rows = rows_of("video and audio")
        batch = batch_of(loaded, rows, folder)
        warm = engine(loaded, second[0], folder, rows, temperature=0.7)
        warm.never = []  # their probability is gone from what a server says in this mode
        drawn = warm.generate(loaded.model, batch, seeds_of(rows))
        found = trainers(loaded, batch, drawn, 0.7)
        torch.testing.assert_close(drawn.logps, found, atol=NATS, rtol=0)
    finally:
        for one in second:
            one.stop()
