"""What a preference step computes: the same numbers however it is computed, and only what it
must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mmemo.config import parse
from mmemo.data.collate import Collator
from mmemo.data.curriculum import CurriculumConfig
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Negative, Preference, with_noised_audio
from mmemo.data.sample import MediaRef, Sample, Turn
from mmemo.errors import DataError, StoreError
from mmemo.losses.objective import LogpRequest, ObjectiveConfig, build_terms, merge_requests
from mmemo.media.config import StoreConfig
from mmemo.models.build import Loaded, set_trainable
from mmemo.run_log import RunRecord
from mmemo.train.dataloader import MicroBatch, OptimizerStep
from mmemo.train.distributed import Ranks
from mmemo.train.dpo.batch import PairBatcher, changed_tokens
from mmemo.train.dpo.config import DpoLossConfig
from mmemo.train.dpo.dataset import DpoData, measure_pairs
from mmemo.train.dpo.objective import DpoObjective, grad_shares
from mmemo.train.dpo.reference_store import ReferenceStore, fill_references, reference_fingerprint
from mmemo.train.engine import PlainEngine, TrainConfig
from mmemo.train.reference import reference
from tests.models.parts import clip, features, shake, tiny

ALL = ("avem_dpo", "mod_dpo", "mod_dpo_plus_plus", "mdpo", "dpo", "ddpo", "ipo", "anchor", "sft")
STREAMS: Any = ("video", "audio", "face")


def pair(number: int, query: Any, answers: dict[Any, str], worse: Negative | None) -> Preference:
    other: Any = tuple(m for m in STREAMS if (m == "audio") != (query == "audio"))
    noise = Negative("noise", True, {}, other, seed=number)
    return Preference(
        sample=Sample(
            sample_id=f"p{number}",
            turns=(Turn("user", "<video><audio><face>Which emotion?" + " Look closely." * number),),
            media={name: MediaRef(f"{number % 2}.mp4") for name in STREAMS},
            source=("pairs.jsonl", number + 1),
        ),
        query=query,
        answers=answers,
        negative=worse,
        irrelevant=None if query == "joint" else noise,
    )


def clips_of(path: str, *streams: Any) -> Negative:
    return Negative("different_label", False, {m: MediaRef(path) for m in streams}, streams, 0)


SPURIOUS = "<think>the wall is blue.</think><answer>happy</answer>"
HALLUCINATED = "<think>loud</think>happy"
PAIRS = [
    pair(0, "joint", {"chosen": "angry", "spurious": SPURIOUS}, clips_of("2.mp4", *STREAMS)),
    pair(
        1,
        "audio",
        {"chosen": "it is sad " * 3, "spurious": SPURIOUS, "hallucinated": HALLUCINATED},
        clips_of("2.mp4", "audio"),
    ),
    pair(
        2,
        "video",
        {"chosen": "<think>low brows</think>sad", "hallucinated": HALLUCINATED},
        Negative("reversed", True, {}, ("video", "face"), seed=5),
    ),
]


class Clips:
    """Features by path, made once; addresses are the paths."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found
        self.change: Mapping[str, str] = {}

    def get(self, sample: Sample) -> dict[Any, Any]:
        return {m: self.found[ref.path][m] for m, ref in sample.media.items()}

    def keys(self, sample: Sample) -> dict[Any, str]:
        return {m: self.change.get(ref.path, ref.path) for m, ref in sample.media.items()}


_MADE: dict[str, tuple[Loaded, dict[str, Any]]] = {}


def made(changes: dict[str, Any]) -> tuple[Loaded, dict[str, Any]]:
    """A model of one's own and the features of three clips; each kind is built once."""
    name = repr(sorted(changes.items()))
    if name not in _MADE:
        loaded = tiny(**changes)
        _MADE[name] = loaded, {f"{n}.mp4": features(loaded, clip(n)) for n in range(3)}
    loaded, found = _MADE[name]
    return replace(loaded, model=deepcopy(loaded.model)), deepcopy(found)


class Bench:
    """A tiny model with what a run has around it."""

    def __init__(
        self,
        terms: Sequence[Any] = ALL,
        pairs: Sequence[Preference] = PAIRS,
        section: dict[str, Any] | None = None,
        **model: Any,
    ) -> None:
        self.loaded, found = made({"lora": {"r": 4, "lora_dropout": 0.0}, **model})
        self.model: Any = self.loaded.model
        set_trainable(self.model, ["lm", "connectors", "fusion"])
        self.model.eval()
        self.source, self.pairs = Clips(found), list(pairs)
        values = [{"kind": t} if isinstance(t, str) else t for t in terms]
        self.terms = build_terms(parse(ObjectiveConfig, {"terms": values}).terms)
        self.requests = merge_requests(self.terms)
        self.batcher = PairBatcher(
            Collator(self.loaded.processor, self.source), self.source, self.terms, self.requests, 4
        )
        self.objective = self.with_(**(section or {}))

    def with_(self, **section: Any) -> DpoObjective:
        return DpoObjective(
            self.terms, self.requests, parse(DpoLossConfig, section), Ranks(cpu=True)
        )

    def batch(self, rows: Sequence[int] = range(3), *, live: bool = True) -> dict[str, Any]:
        return self.batcher([self.pairs[row] for row in rows], reference=live)

    def data(self, references: ReferenceStore | None = None) -> DpoData:
        measured = [self.batcher.measure(one) for one in self.pairs]
        return DpoData(
            self.pairs, measured, self.batcher, CurriculumConfig(), 2, 0, references=references
        )

    def references(self, folder: Path, **base: Any) -> ReferenceStore:
        named = {"model": reference_fingerprint(self.model, adapter=False), **base}
        return ReferenceStore(StoreConfig(), None, folder, named)

    def fill(self, data: DpoData, folder: Path) -> dict[str, Any]:
        """Store the references of the data; the event that says what was computed."""
        assert data.references is not None
        record, ranks = RunRecord(folder), Ranks(cpu=True)
        engine = PlainEngine(self.model, parse(TrainConfig, {}), ranks)
        with reference(self.model):
            fill_references(data.references, data, self.objective, engine, 2, ranks, record)
        return record.events("reference")[-1]

    def stored(self, folder: Path, **base: Any) -> tuple[DpoData, dict[str, Any]]:
        """Data with its references stored, and the event."""
        data = self.data(self.references(folder, **base))
        return data, self.fill(data, folder)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def learn(objective: DpoObjective, model: nn.Module, batch: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = objective(model, batch)
    out.rows.sum().backward()
    return out, gradients(model)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(x.abs().max()) for x in theirs.values())
    assert largest > 1e-3
    for name, value in theirs.items():
        scale = max(float(value.abs().max()), 1e-2 * largest)
        assert float((ours[name] - value).abs().max()) <= allowed * scale, name


@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [0, 2]], ids=["mixed", "both", "one of them"])
def test_the_shared_prefix_equals_naive(rows: list[int]) -> None:
    """Video, audio, face and fusion, ragged answers, LoRA, one or two rejected answers."""
    bench = Bench()
    shake(bench.model, 0.05)
    batch = bench.batch(rows)
    packed, wanted = learn(bench.objective, bench.model, batch)
    naive, found = learn(bench.with_(shared_prefix=False), bench.model, batch)
    torch.testing.assert_close(packed.rows, naive.rows, atol=1e-5, rtol=1e-5)
    same(wanted, found)
    for name, (total, count) in naive.metrics.items():
        torch.testing.assert_close(packed.metrics[name][0], total, atol=1e-4, rtol=1e-4)
        assert packed.metrics[name][1] == count, name


def test_the_initial_margin_is_zero() -> None:
    """A new adapter does nothing, so every reward is 0, through the model and all."""
    terms = [{"kind": "avem_dpo", "gamma": 0}, *(t for t in ALL if t not in ("avem_dpo",))]
    bench = Bench(terms)
    out = bench.objective(bench.model, bench.batch())
    margins = {n: float(x[0]) for n, x in out.metrics.items() if "margins" in n or "rewards" in n}
    assert len(margins) > 20
    assert max(abs(x) for n, x in margins.items() if "accuracies" not in n) < 1e-6
    half = float(torch.log(torch.tensor(2.0)))
    for name in ("dpo", "ddpo", "anchor"):
        total, count = out.metrics[f"{name}/loss"]
        assert float(total / count) == pytest.approx(half, abs=1e-6)
    assert float(out.metrics["avem_dpo/loss"][0] / 3) == pytest.approx(2 * half, abs=1e-6)


def test_each_term_moves_the_policy_from_each_rejected_answer() -> None:
    """And the reference's weights get no gradient."""
    bench = Bench(ALL)
    shake(bench.model, 0.05)
    learnt = {n: p for n, p in bench.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in learnt)
    for at in range(3):  # the spurious answer, both, the hallucinated one
        logps = bench.objective.logps(bench.model, bench.batch([at]))
        assert not any(x.requires_grad for x in logps.reference.values())
        for name, _, term in bench.terms:
            rows = term(logps).rows.sum()
            if name.startswith("mod_dpo") and at == 0:  # a joint question
                assert float(rows.detach()) == 0
                continue
            moved = torch.autograd.grad(rows, [*learnt.values()], retain_graph=True)
            assert max(float(x.abs().max()) for x in moved) > 1e-5, (name, at)


def test_stored_equals_live(tmp_path: Path) -> None:
    bench = Bench()
    data, event = bench.stored(tmp_path)
    assert event["computed"] == 3
    shake(bench.model, 0.05)  # the policy moves, the reference stays
    stored = data.collate([0, 1, 2])
    live = bench.objective.live_reference(bench.model, bench.batch())
    assert set(stored["reference"]) == {p.key for p in bench.requests if p.reference}
    for place, logps in stored["reference"].items():
        torch.testing.assert_close(logps, live[place], atol=1e-5, rtol=1e-5)
    assert stored["reference_passes"] == []
    one, wanted = learn(bench.objective, bench.model, stored)
    other, found = learn(bench.objective, bench.model, bench.batch())
    torch.testing.assert_close(one.rows, other.rows, atol=1e-5, rtol=1e-5)
    same(found, wanted)


def test_only_what_is_the_same_is_matched(tmp_path: Path) -> None:
    bench = Bench(["avem_dpo"])
    data, event = bench.stored(tmp_path)
    assert event["computed"] == 3
    digests = [data.reference_digests(row) for row in range(3)]
    assert bench.stored(tmp_path)[1]["computed"] == 0
    shake(bench.model, 0.1)  # an adapter is no part of the reference
    assert bench.stored(tmp_path)[1]["computed"] == 0

    def changed(row: int, place: Any, **values: Any) -> bool:
        other = Bench(["avem_dpo"], [replace(PAIRS[row], **values)]).data()
        return other.reference_digests(0)[place] != digests[row][place]

    # The prompt, the chosen answer, the negative: each changes what it is part of and no more.
    asked = replace(PAIRS[1].sample, turns=(Turn("user", "<video><audio><face>Why?"),))
    assert changed(1, ("input", "spurious"), sample=asked)
    answers = {**PAIRS[1].answers, "chosen": "happy"}
    assert changed(1, ("input", "chosen"), answers=answers)
    assert not changed(1, ("input", "spurious"), answers=answers)
    worse = clips_of("0.mp4", "audio")
    assert changed(1, ("negative", "chosen"), negative=worse)
    assert not changed(1, ("input", "chosen"), negative=worse)
    made = Negative("reversed", True, {}, ("video", "face"), seed=6)
    assert changed(2, ("negative", "chosen"), negative=made)
    # The features: those of one clip, which the others do not show.
    bench.source.change = {"1.mp4": "another"}
    assert bench.stored(tmp_path)[1]["computed"] == 2  # the batch that the pair is computed in
    # The reference, and how it is computed.
    assert bench.stored(tmp_path, temperature=0.5)[1]["computed"] == 3
    with torch.no_grad():
        bench.model.get_base_model().lm_head.weight[0, 0] += 0.01
    assert bench.stored(tmp_path)[1]["computed"] == 3


def test_a_fingerprint_knows_the_reference_and_not_its_adapter() -> None:
    bench = Bench()
    before = {on: reference_fingerprint(bench.model, adapter=on) for on in (False, True)}
    other = Bench(lora={"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj"]})
    assert reference_fingerprint(other.model, adapter=False) == before[False]
    assert reference_fingerprint(other.model, adapter=True) != before[True]
    plain = Bench(lora=None)
    assert reference_fingerprint(plain.model, adapter=True) == before[False]
    shake(bench.model, 0.1)
    after = {on: reference_fingerprint(bench.model, adapter=on) for on in (False, True)}
    assert after[False] == before[False]
    assert after[True] != before[True]


def test_a_lost_reference_is_said(tmp_path: Path) -> None:
    bench = Bench(["dpo"])
    bench.stored(tmp_path)
    for file in (tmp_path / "reference" / "shards").iterdir():
        file.unlink()
    data = bench.data(bench.references(tmp_path))
    with pytest.raises(StoreError, match="start the run again"):
        data.collate([0])


def branches(batch: Any) -> list[set[str]]:
    return [{place[0] for place in one.keys} for one in batch["passes"]]


def test_only_what_the_terms_read_is_computed() -> None:
    assert branches(Bench(["dpo"]).batch(live=False)) == [{"input"}]
    plain = {"kind": "avem_dpo", "gamma": 0}
    assert branches(Bench([plain]).batch(live=False)) == [{"input", "negative"}]
    assert branches(Bench(["avem_dpo"]).batch(live=False)) == [{"input", "negative"}, {"text"}]
    alone = {"kind": "avem_dpo", "gamma": 0, "lambda_av": 0}
    assert branches(Bench([alone]).batch(live=False)) == [{"input"}]
    mod = Bench(["mod_dpo"]).batch([1], live=True)
    grads = {next(iter({p[0] for p in one.keys})): one.grad for one in mod["passes"]}
    assert grads["input"]
    assert not any(grad for name, grad in grads.items() if name != "input")
    assert len(Bench(["sft"]).batch(live=True)["reference_passes"]) == 0


def test_one_sequence_holds_each_prompt_once_and_the_text_branch_no_media() -> None:
    bench = Bench(["avem_dpo"])
    media, text = bench.batch(live=False)["passes"]
    # Three clips and three negatives; two or three answers after each of the former.
    assert len(media.prompts["input_ids"]) == 6
    assert len(media.ids) == 2 + 3 + 2 + 3
    assert media.prompt_index.unique().tolist() == list(range(6))
    assert len(text.prompts["input_ids"]) == 3
    assert text.prompts["clip_index"].tolist() == [-1] * 3
    assert not any("features" in name for name in text.prompts)
    special = [getattr(bench.loaded.processor, f"{n}_token_id") for n in (*STREAMS, "fusion")]
    assert not bool(torch.isin(text.prompts["input_ids"], torch.tensor(special)).any())
    assert bool(torch.isin(media.prompts["input_ids"], torch.tensor(special)).any())
    assert text.prompts["input_ids"].shape[1] < media.prompts["input_ids"].shape[1]


def test_the_other_modality_is_untouched_to_the_bit() -> None:
    """AVERE's loader replaces the sound of every pair, whatever is asked."""
    bench = Bench(["avem_dpo", "mod_dpo"])
    for row, asked in ((1, {"audio"}), (2, {"video", "face"})):
        found: dict[str, Any] = {}
        for one in bench.batch([row], live=False)["passes"]:
            for place, prompt in zip(one.keys, one.prompt_index.tolist(), strict=True):
                clip_at = int(one.prompts["clip_index"][prompt])
                if clip_at >= 0:
                    found[place[0]] = {m: one.prompts[f"{m}_features"][clip_at] for m in STREAMS}
        for stream in STREAMS:
            negative = torch.equal(found["input"][stream], found["negative"][stream])
            assert negative == (stream not in asked), (row, stream)
            irrelevant = torch.equal(found["input"][stream], found["irrelevant"][stream])
            assert irrelevant == (stream in asked), (row, stream)


def shown(bench: Bench, row: int) -> dict[Any, dict[Any, Tensor]]:
    """branch -> features of each stream that the pair's prompt shows."""
    found: dict[Any, dict[Any, Tensor]] = {}
    for one in bench.batch([row], live=False)["passes"]:
        for place, prompt in zip(one.keys, one.prompt_index.tolist(), strict=True):
            at = int(one.prompts["clip_index"][prompt])
            if at >= 0:
                found[place[0]] = {m: one.prompts[f"{m}_features"][at] for m in STREAMS}
    return found


@pytest.mark.parametrize("row", range(3), ids=["joint", "about the sound", "about the picture"])
def test_the_sound_of_every_negative_may_be_noise(row: int) -> None:
    """``negative_audio: noise``, as AVERE's released loader: also where the question is about the
    picture, whose own negative stays as it is."""
    noised = with_noised_audio(PAIRS[row])
    given, found = shown(Bench(["avem_dpo"]), row), shown(Bench(["avem_dpo"], [noised]), 0)
    assert all(torch.equal(given["input"][m], found["input"][m]) for m in STREAMS)
    assert all(torch.equal(given["negative"][m], found["negative"][m]) for m in ("video", "face"))
    own, noise = found["input"]["audio"], found["negative"]["audio"]
    assert not torch.equal(noise, own)
    assert not torch.equal(noise, given["negative"]["audio"])
    # Uniform, around each layer's own mean: the farthest is sqrt(3) standard deviations away.
    mean, spread = own.mean((-2, -1), keepdim=True), own.std((-2, -1), correction=0, keepdim=True)
    away = (noise - mean) / spread
    assert 1.5 < float(away.abs().max()) <= 3**0.5 + 1e-5
    # It is made once, and stored references know it.
    assert torch.equal(shown(Bench(["avem_dpo"], [noised]), 0)["negative"]["audio"], noise)
    assert with_noised_audio(noised) == noised
    digests = [
        Bench(["avem_dpo"], [one]).batcher.branch_digest(one, "negative")
        for one in (PAIRS[row], noised)
    ]
    assert digests[0] != digests[1]


def test_without_sound_or_negative_there_is_nothing_to_replace() -> None:
    silent = replace(PAIRS[2].sample, media={m: MediaRef("0.mp4") for m in ("video", "face")})
    for one in (replace(PAIRS[2], sample=silent), replace(PAIRS[0], negative=None)):
        assert with_noised_audio(one) == one


def test_how_a_step_is_split_changes_nothing() -> None:
    """Each term is a mean over the pairs that it counts in the whole step."""
    bench = Bench(["avem_dpo", "mod_dpo", {"kind": "dpo", "rejected": "spurious"}])
    shake(bench.model, 0.05)
    engine: Any = PlainEngine(bench.model, parse(TrainConfig, {}), Ranks(cpu=True))

    def step(*cuts: list[int]) -> tuple[float, dict[str, Tensor]]:
        micro_batches = [MicroBatch(bench.batch(rows), at) for at, rows in enumerate(cuts)]
        step = bench.objective.prepare(engine, OptimizerStep(0, 0, micro_batches), 0, 1)
        bench.model.zero_grad()
        weight = sum(bench.objective.weight(m.batch) for m in step.micro_batches)
        total = 0.0
        for micro in step.micro_batches:
            loss = bench.objective(bench.model, micro.batch).rows.sum() / weight
            loss.backward()
            total += float(loss.detach())
        return total, gradients(bench.model)

    whole, wanted = step([0, 1, 2])
    for cuts in (([0], [1], [2]), ([0, 2], [1])):
        loss, found = step(*cuts)
        assert loss == pytest.approx(whole, rel=1e-5)
        same(found, wanted)
    # It is the weighted sum of the terms' own means.
    out = bench.objective(bench.model, bench.batch())
    means = [
        float(out.metrics[f"{t.name}/loss"][0] / out.metrics[f"{t.name}/loss"][1])
        for t in bench.terms
    ]
    assert sum(means) == pytest.approx(whole, rel=1e-5)
    assert [int(out.metrics[f"{t.name}/counted"][0]) for t in bench.terms] == [3, 2, 2]


def test_pairs_that_no_term_counts_reach_the_weights_with_zeros() -> None:
    bench = Bench(["mod_dpo"])
    batch = bench.batch([0])  # a joint question
    # Ranks with sharded weights compute as often as each other, whatever pairs they have.
    passes = [(one.grad, one.idle) for one in batch["passes"]]
    assert passes == [(one.grad, False) for one in bench.batch([1])["passes"]]
    alone = {"kind": "mod_dpo", "beta_sens": 0}
    idle = [(one.grad, one.idle) for one in Bench([alone]).batch([0])["passes"]]
    assert idle[:2] == [(True, False), (False, True)]
    out, found = learn(bench.objective, bench.model, batch)
    assert out.rows.tolist() == [0.0]
    assert found
    assert all(float(x.abs().max()) == 0 for x in found.values())


def test_a_weight_of_zero_only_observes() -> None:
    bench = Bench(["dpo", {"kind": "mdpo", "weight": 0}])
    shake(bench.model, 0.05)
    out, found = learn(bench.objective, bench.model, bench.batch())
    alone = Bench(["dpo"])
    shake(alone.model, 0.05)
    wanted, theirs = learn(alone.objective, alone.model, alone.batch())
    torch.testing.assert_close(out.rows, wanted.rows, atol=1e-6, rtol=1e-6)
    same(found, theirs)
    assert float(out.metrics["mdpo/loss"][0]) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_shares_are_the_terms_own_and_change_no_gradient(checkpointing: bool) -> None:
    bench = Bench([{"kind": "dpo", "weight": 2.0}, "sft", {"kind": "anchor", "weight": 0}])
    shake(bench.model, 0.05)
    if checkpointing:
        bench.model.train()
        bench.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    batch = bench.batch()
    _, plain = learn(bench.objective, bench.model, batch)
    out, found = learn(bench.objective, bench.model, {**batch, "log_shares": True})
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    norms: list[float] = []
    for terms in ([{"kind": "dpo", "weight": 2.0}], ["sft"]):
        alone = Bench(terms)
        shake(alone.model, 0.05)
        _, own = learn(alone.objective, alone.model, alone.batch())
        norms.append(float(torch.stack([x.square().sum() for x in own.values()]).sum().sqrt()))
    shares = {n: float(x[0] / x[1]) for n, x in out.metrics.items() if n.endswith("grad_share")}
    assert shares == pytest.approx(
        {"dpo/grad_share": norms[0] / sum(norms), "sft/grad_share": norms[1] / sum(norms)},
        rel=1e-4,
    )
    nothing = grad_shares({"x": torch.zeros(2)}, bench.model.parameters())
    assert float(nothing["x/grad_share"][0]) == 0


def test_the_gradient_is_the_loss_s() -> None:
    """A finite difference along the gradient, in float64."""
    bench = Bench(["avem_dpo", "mod_dpo", "ddpo"])
    shake(bench.model, 0.05)
    bench.model.double()
    for found in bench.source.found.values():
        for stream in found.values():
            stream.update({name: x.double() for name, x in stream.items()})
    batch = bench.batch()
    # What a term takes no gradient through is a constant of it, though it moves.
    fixed = bench.objective.logps(bench.model, batch)
    _, grads = learn(bench.objective, bench.model, batch)
    named = dict(bench.model.named_parameters())
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()

    def loss(step: float) -> float:
        with torch.no_grad():
            for name, grad in grads.items():
                named[name].add_(grad * (step / norm))
            now = bench.objective.logps(bench.model, batch)
            for name, grad in grads.items():
                named[name].sub_(grad * (step / norm))
        total = 0.0
        for _, _, term in bench.terms:
            moving = {p.key for p in term.needs() if p.grad and p.policy}
            policy = {p: (now if p in moving else fixed).policy[p] for p in fixed.policy}
            out = term(replace(fixed, policy=policy))
            total += 3 * float(out.rows.detach().sum() / out.counted.sum())
        return total

    # Scores are float32: a smaller step would measure their rounding.
    slope = (loss(3e-4) - loss(-3e-4)) / 6e-4
    assert slope == pytest.approx(float(norm), rel=2e-3)


def test_a_row_that_is_too_long_is_refused_and_nothing_is_cut() -> None:
    bench = Bench(["dpo"])

    def measure(data: DataConfig) -> int:
        given = (bench.pairs, bench.loaded, bench.terms, bench.requests, data)
        return max(one.longest for one in measure_pairs(*given))

    longest = max(one.longest for one in bench.data().measured)
    fits = parse(DataConfig, {"manifests": ["x"], "max_length": longest})
    assert measure(fits) == longest
    short = fits.model_copy(update={"max_length": longest - 1})
    with pytest.raises(DataError, match="nothing is truncated"):
        measure(short)


@given(
    st.lists(st.integers(0, 4), max_size=12),
    st.lists(st.integers(0, 4), max_size=12),
)
def test_what_is_left_of_two_answers_is_the_same(one: list[int], other: list[int]) -> None:
    here, there = changed_tokens(one, other)
    kept = [x for x, moved in zip(one, here, strict=True) if not moved]
    assert kept == [x for x, moved in zip(other, there, strict=True) if not moved]
    if one == other:
        assert not any(here)


def test_changed_spans_of_pairs() -> None:
    bench = Bench(["ddpo"])
    batch = bench.batch()
    mask, changed = batch["mask"], batch["changed"]
    for name in ("chosen", "spurious", "hallucinated"):
        assert not bool((changed[name] & ~mask[name]).any())
    # Only the end of the answer is shared by "angry" and the spurious one.
    assert int(changed["chosen"][0].sum()) >= int(mask["chosen"][0].sum()) - 2
    assert not bool(changed["chosen"][0, int(mask["chosen"][0].sum()) - 1])
    assert bool(changed["spurious"][0].any())
    assert isinstance(bench.requests[0], LogpRequest)
