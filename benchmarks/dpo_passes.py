"""The part of ``dpo_step.py`` that compares two ways to score the same pair with the same model."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpo_update import build
from timing import between, clock
from tiny_vlm import answer_text, shake
from torch import Tensor

from mmemo import console
from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.preference import Preference
from mmemo.data.sample import MODALITIES, MediaRef, Sample, Turn
from mmemo.generation.logprobs import naive_logps
from mmemo.losses.dpo import Dpo
from mmemo.losses.objective import build_terms, merge_requests
from mmemo.media.clip import DecodedClip, FaceTrack
from mmemo.media.config import StoreConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.train.config import TrainConfig
from mmemo.train.dataloader import MicroBatch, OptimizerStep
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.batch import ForwardPass, PairBatcher
from mmemo.train.dpo.config import DpoLossConfig
from mmemo.train.dpo.dataset import DpoData
from mmemo.train.dpo.objective import DpoObjective
from mmemo.train.dpo.reference_store import ReferenceStore, fill_references
from mmemo.train.engine import PlainEngine
from mmemo.train.reference import disable_dropout, reference
from mmemo.train.trainer import take_step

REJECTED = ("spurious", "hallucinated")


def make_data(
    loaded: Any,
    sample: Sample,
    answers: Sequence[str],
    source: Any,
    *,
    references: ReferenceStore | None = None,
    kind: type[DpoObjective] = DpoObjective,
) -> tuple[DpoData, DpoObjective]:
    """One pair, the chosen answer first, as a run makes its data, and its objective. Without
    ``references`` the reference is computed in every step."""
    disable_dropout(loaded.model)
    terms = build_terms([Dpo()])
    wanted = merge_requests(terms)
    names: Any = ("chosen", *REJECTED)
    pair = Preference(sample, "joint", dict(zip(names, answers, strict=False)), None, None)
    collator = Collator(loaded.processor, source)
    frames = unwrap(loaded.model).sampling.frames
    batcher = PairBatcher(collator, source, terms, wanted, frames)
    measured = [batcher.measure(pair, source.get)]
    stored = references is not None
    data = DpoData(
        [pair],
        measured,
        batcher,
        CurriculumConfig(),
        1,
        0,
        live=not stored,
        references=references,
    )
    section = DpoLossConfig(reference="stored" if stored else "adapter_off")
    return data, kind(terms, wanted, section, Ranks(cpu=True))


def open_references(folder: Path) -> ReferenceStore:
    """A store for the reference's log-probabilities."""
    return ReferenceStore(StoreConfig(), None, folder, {})


def store_reference(data: DpoData, objective: DpoObjective, loop: Any) -> None:
    """What a run does before its first step."""
    assert data.references is not None
    with reference(loop.engine.model):
        fill_references(data.references, data, objective, loop.engine, 1, loop.ranks, loop.record)


class Clips:
    """One clip of noise, encoded each time or, if ``cached``, once; ``seconds`` of computing that
    this took."""

    def __init__(self, backbone: Any, *, cached: bool = False) -> None:
        rng = np.random.default_rng(0)
        frames, crops = rng.integers(0, 256, (2, 4, 32, 32, 3), dtype=np.uint8)
        times, found = np.arange(4) / 4, np.ones(4, dtype=np.bool_)
        faces = FaceTrack(crops, found, np.ones(4, dtype=np.float32), "none")
        sound = rng.normal(0, 0.1, 16000).astype(np.float32)
        self._clip = DecodedClip("a", "0", 1.0, frames, times, sound, faces=faces)
        self._backbone, self.seconds = backbone, 0.0
        self._kept = None
        if cached:
            self._kept = self.get(None)

    def get(self, sample: Any) -> Any:
        if self._kept is not None:
            return self._kept
        began = time.process_time()
        found = {name: self._backbone.encode(name, [self._clip])[0] for name in MODALITIES}
        self.seconds += time.process_time() - began
        return found

    def keys(self, sample: Any) -> dict[str, str]:
        return dict.fromkeys(MODALITIES, "a")


class Separate(DpoObjective):
    """Every answer in a pass of its own that begins with the clip."""

    data: DpoData
    clips: Clips

    def _score(
        self,
        model: Any,
        passes: Sequence[ForwardPass],
        size: tuple[int, int],
        device: Any,
        routes: list[Any] | None = None,
    ) -> dict[Any, Tensor]:
        found: dict[Any, Tensor] = {}
        sample, collator = self.data.pairs[0].sample, self.data.batcher.collator
        for one in passes:
            for at, place in enumerate(one.keys):
                prompt = collator.assemble([sample], [0], [self.clips.get(sample)], generation=True)
                own = slice(at, at + 1)
                with torch.set_grad_enabled(one.grad and torch.is_grad_enabled()):
                    given = (prompt, one.ids[own], one.mask[own], torch.tensor([0]))
                    found[place] = naive_logps(model, *given).logps
        return found


class Arms:
    """Steps of both arms on one pair. They share the model, but no gradients."""

    def __init__(self, loaded: Any, rejected: int, options: argparse.Namespace) -> None:
        tokenizer = loaded.processor.tokenizer
        backbone = unwrap(loaded.model)
        self.clips = Clips(backbone)
        sample = make_sample(loaded.processor, options.prompt)
        answers = [answer_text(tokenizer, n, options.answer) for n in range(1 + rejected)]
        ours = make_data(loaded, sample, answers, self.clips)
        kept = Clips(backbone, cached=True)  # its objective encodes, not its batches
        baseline = make_data(loaded, sample, answers, kept, kind=Separate)
        separate: Any = baseline[1]
        separate.data, separate.clips = baseline[0], self.clips
        self.data = {"ours": ours, "baseline": baseline}
        self.engine = PlainEngine(loaded.model.train(), TrainConfig(), Ranks(cpu=True))
        measured = ours[0].measured[0]
        self.prompt, self.answers = measured.prompt, list(measured.answers.values())

    def step(self, arm: str) -> None:
        """Collate, score, backward, optimizer; its rate of 0 changes nothing."""
        objective, batches = self._batches(arm)
        take_step(self.engine, objective, batches, 0.0)

    def gradients(self, arm: str) -> tuple[float, dict[str, Tensor]]:
        """The loss and its gradients."""
        objective, batches = self._batches(arm)
        loss = objective(self.engine.model, batches[0]).rows.sum()
        named = self.engine.parameters
        loss.backward()
        found = {name: x.grad for name, x in named.items() if x.grad is not None}
        self.engine.optimizer.zero_grad()
        return float(loss.detach()), found

    def _batches(self, arm: str) -> tuple[Any, list[dict[str, Any]]]:
        data, objective = self.data[arm]
        step = OptimizerStep(0, 0, [MicroBatch(data.collate([0]), 0)])
        step = objective.prepare(self.engine, step, 0, 1)
        return objective, [micro.batch for micro in step.micro_batches]


def make_sample(processor: Any, tokens: int) -> Sample:
    """A question about the clip that makes a prompt of so many tokens."""
    media: Any = {name: MediaRef("a") for name in MODALITIES}

    def sample(text: str) -> tuple[Sample, int]:
        turns = (Turn("user", f"<video><audio><face>{text}"),)
        row = processor.render(turns, generation=True, modalities=media)
        return Sample("a", turns, media), len(row.input_ids)

    rest = tokens - sample("")[1]
    found, length = sample(answer_text(processor.tokenizer, 0, rest + 1) if rest > 0 else "")
    if length != tokens:
        raise SystemExit(f"--prompt {tokens} is too short for the media tokens")
    return found


def differences(arms: Arms) -> dict[str, float]:
    """Of the losses, and the largest of the gradients relative to each one's largest.

    Raises:
        SystemExit: the losses are not equal.
    """
    (ours, mine), (baseline, theirs) = (arms.gradients(arm) for arm in arms.data)
    if abs(ours - baseline) > 1e-4:
        raise SystemExit(f"the arms do different work: losses {ours} and {baseline}")
    largest = max(float(x.abs().max()) for x in theirs.values())
    apart = max(
        float((mine[name] - x).abs().max()) / max(float(x.abs().max()), 1e-6 * largest)
        for name, x in theirs.items()
    )
    return {"loss": ours, "losses_differ_by": abs(ours - baseline), "gradients_differ_by": apart}


def main(options: argparse.Namespace, rounds: int) -> None:
    """One JSON line for one rejected answer, and one for two."""
    torch.set_num_threads(1)
    console.console.quiet = True
    loaded = build(options)
    shake(loaded.model)
    for rejected in (1, 2):
        print(json.dumps(compare(Arms(loaded, rejected, options), rounds)))


def compare(arms: Arms, rounds: int) -> dict[str, Any]:
    """Both arms' steps, taking turns."""
    differ = differences(arms)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms.data}
    encoding: dict[str, list[float]] = {arm: [] for arm in arms.data}
    for number in range(rounds):
        for arm in arms.data if number % 2 == 0 else reversed(arms.data):
            arms.clips.seconds, began = 0.0, clock()
            arms.step(arm)
            times[arm] += between([began, clock()])
            encoding[arm].append(arms.clips.seconds)
            print(f"round {number + 1}: {arm} {times[arm][-1][0]:.2f} s", file=sys.stderr)
    wall, cpu = (
        {arm: statistics.median(x[at] for x in found) for arm, found in times.items()}
        for at in (0, 1)
    )
    P, C, K = arms.prompt, arms.answers[0], len(arms.answers)
    limit = K * (P + C) / (P + K * C)
    ratios = {name: x["baseline"] / x["ours"] for name, x in (("wall", wall), ("cpu", cpu))}
    return {
        "ours": round(wall["ours"], 3),
        "baseline": round(wall["baseline"], 3),
        "ratio": round(ratios["wall"], 2),
        "limit": round(limit, 2),
        "share_of_limit": round(ratios["wall"] / limit, 3),
        "unit": "s/step",
        "rounds": rounds,
        "cpu_ratio": round(ratios["cpu"], 2),
        "cpu_share_of_limit": round(ratios["cpu"] / limit, 3),
        "encoding": {arm: round(statistics.median(x), 3) for arm, x in encoding.items()},
        **differ,
        "rejected": K - 1,
        "shape": f"P={P}, C={C}",
    }
