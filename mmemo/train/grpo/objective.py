"""One step of GRPO: generate completions, score them, train on them.

:class:`GrpoObjective` is the objective of the training loop, which prepares each step by generating
and scoring completions. :class:`Group` holds prompts with their completions, which
:func:`update_batches` turns into micro-batches of the update. :class:`CompletionLog` writes some of
the completions to disk.

Shapes: B prompts, P tokens of the longest, G completions of each, N = B * G completions prompt by
prompt, C tokens of the longest completion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmemo import files
from mmemo.answers.messages import prompt_text
from mmemo.data.sample import Sample
from mmemo.errors import MmemoError, RolloutError
from mmemo.generation.logprobs import Scores, naive_logps, packed_logps
from mmemo.generation.packing import plan_packs
from mmemo.generation.rollout import (
    JoiningEngine,
    RolloutEngine,
    Rollouts,
    exact,
    rollout_seed,
)
from mmemo.losses.grpo import PER_TOKEN, grpo_loss, grpo_weight
from mmemo.rewards.rewards import prompt_of
from mmemo.rewards.score_rollouts import GroupRewards, GroupRollouts, Scored
from mmemo.train import runtime
from mmemo.train.dataloader import Batch, MicroBatch, OptimizerStep, micro_batches
from mmemo.train.distributed import Ranks, on_all_ranks
from mmemo.train.engine import Engine
from mmemo.train.expert_balance import expert_terms
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.grpo.data import GrpoData, select_prompts
from mmemo.train.grpo.off_policy import OffPolicyCorrection, needs_correction
from mmemo.train.grpo.samples import Sampled, SampleWatch
from mmemo.train.metrics import up_to
from mmemo.train.reference import AdapterOff, ReferenceModel
from mmemo.train.router_balance import with_router_loss
from mmemo.train.trainer import Loss


@dataclass(frozen=True, slots=True)
class Group:
    """The prompts of a micro-batch with their completions, before they are packed.

    ``prompts``: the collated batch on the model's device. ``mask``: (N, C), 1 at tokens that count
    in the loss. ``advantages``: (N,).
    """

    prompts: Mapping[str, Any]
    rollouts: Rollouts
    mask: Tensor
    advantages: Tensor

    @property
    def size(self) -> int:
        """G, the number of completions of each prompt."""
        return len(self.mask) // len(self.prompts["input_ids"])


def update_batches(group: Group, kept: Sequence[int], budget: int | None) -> list[Batch]:
    """Micro-batches of at most ``budget`` tokens from the prompts ``kept`` and their completions.

    Returns:
        Batches with the prompts' tensors, whose names are in ``inputs``; ``completion_ids``,
        ``completion_mask``, ``loss_mask`` and, where the engine reported them, ``sampling_logps``
        (N, C); ``prompt_index`` and ``advantages`` (N,); and N ``sample_ids``.
    """
    if not kept:
        return []
    prompt_sizes = group.prompts["attention_mask"].sum(1).tolist()
    # (B,) tokens of all completions of each prompt together.
    sizes = group.rollouts.mask.view(-1, group.size, group.rollouts.mask.shape[1]).sum((1, 2))
    packs = [list(range(len(kept)))]
    if budget is not None:
        packs = plan_packs([prompt_sizes[b] for b in kept], sizes[list(kept)].tolist(), budget)
    return [_batch(group, [kept[at] for at in pack]) for pack in packs]


def _batch(group: Group, rows: Sequence[int]) -> Batch:
    G, device = group.size, group.mask.device
    prompts = select_prompts(group.prompts, rows)
    # (N,) the completions of the chosen prompts, prompt by prompt.
    at = torch.tensor([row * G + copy for row in rows for copy in range(G)], device=device)
    width = max(1, int(group.rollouts.mask[at].sum(1).max()))
    # An engine that is not corrected may report none.
    logps: Any = group.rollouts.logps
    reported = isinstance(logps, Tensor) and logps.shape == group.rollouts.ids.shape
    return {
        **prompts,
        "inputs": [name for name, value in prompts.items() if isinstance(value, Tensor)],
        "completion_ids": group.rollouts.ids[at, :width],
        "completion_mask": group.rollouts.mask[at, :width],
        "loss_mask": group.mask[at, :width],
        **({"sampling_logps": logps[at, :width]} if reported else {}),
        "prompt_index": torch.arange(len(rows), device=device).repeat_interleave(G),
        "advantages": group.advantages[at],
        "sample_ids": [name for name in prompts["sample_ids"] for _ in range(G)],
    }


def idle_batch(prompts: Mapping[str, Any], token: int) -> Batch:
    """The batch of a rank that has nothing to train on in a step: one token, with weight 0. Sharded
    weights need every rank to run as many passes as the others."""
    device = prompts["input_ids"].device
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    rollouts = Rollouts(one * token, one, torch.zeros(1, 1, device=device), one[0].bool(), [""])
    first = select_prompts(prompts, [0])
    return _batch(Group(first, rollouts, one, torch.zeros(1, device=device)), [0])


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The completions of a micro-batch of the generation's step number ``step``.

    ``micro.index`` counts the micro-batches of that step. ``groups.place`` counts those of the
    whole generation, and after them those of each resampling. ``read``: what was read of them.
    """

    step: int
    micro: MicroBatch
    groups: GroupRollouts
    rollouts: Rollouts
    read: list[Sampled]


class GrpoObjective:
    """The clipped policy-gradient loss, on completions that it generates and scores for each step.

    Args:
        engine: generates the completions.
        rewards: scores them and computes their advantages.
        samples: the rows by id.
        watch: reads whether the completions are language.
        folder: where ``completions.jsonl`` is written.
        idle_token: any token, for a rank that has nothing to train on.
        reference: what the KL divergence is from; None: the policy with its adapter disabled.
        data: the prompts, where completions of several steps are generated at once or groups are
            replaced by others; else the steps that are prepared bring all that is needed.

    Raises:
        ValueError: the config needs ``data`` and there is none.
    """

    def __init__(
        self,
        config: GrpoConfig,
        engine: RolloutEngine,
        rewards: GroupRewards,
        samples: Mapping[str, Sample],
        ranks: Ranks,
        folder: Path,
        idle_token: int,
        watch: SampleWatch | None = None,
        *,
        reference: ReferenceModel | None = None,
        data: GrpoData | None = None,
    ) -> None:
        if data is None and (config.generation_steps > 1 or config.grpo.max_resample_times):
            raise ValueError("grpo.steps_per_generation and grpo.max_resample_times need data")
        self.config, self.section, self.watch = config, config.grpo, watch
        self.engine, self.rewards, self.samples, self.ranks = engine, rewards, samples, ranks
        self.data, self.boundary = data, config.generation_steps * config.grpo.num_iterations
        path, groups = folder / "completions.jsonl", config.watch.groups
        self.log = CompletionLog(path, groups, ranks.is_main, list(samples))
        self._idle_token = idle_token
        self.reference = reference or AdapterOff()
        self.correction: OffPolicyCorrection | None = None
        if needs_correction(config.grpo, engine):
            self.correction = OffPolicyCorrection(config.grpo, engine, ranks)
        self._held: list[list[MicroBatch]] = []
        self._news: dict[str, float] = {}
        self._beta = config.grpo.beta

    def weight(self, batch: Batch) -> float:
        """What a prepared micro-batch adds to the step's normaliser."""
        return float(batch["weight"])

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a prepared micro-batch, plus the penalties on the model's experts, if any."""
        coefficient = self.config.train.router_aux_loss_coef
        weight = self.weight(batch)
        return with_router_loss(self._loss, model, batch, weight, coefficient, learning_only=True)

    def _loss(self, model: nn.Module, batch: Batch) -> Loss:
        section = self.section
        scores = self._score(model, batch, entropies=section.log_entropy)
        out = grpo_loss(
            scores.logps,
            batch.get("old_logps"),
            batch.get("ref_logps"),
            batch["advantages"],
            batch["loss_mask"],
            loss_type=section.loss_type,
            importance_sampling_level=section.importance_sampling_level,
            beta=self._beta,
            epsilon=section.epsilon,
            epsilon_high=section.epsilon_high,
            delta=section.delta,
            sapo_temperatures=(section.sapo_temperature_pos, section.sapo_temperature_neg),
            use_bias_correction_kl=section.use_bias_correction_kl,
            max_completion_length=self.config.rollout.max_completion_length,
            entropies=scores.entropies,
            importance_ratio=batch.get("importance_ratio"),
        )
        # Only with the step's first micro-batch: a step with many would weigh more in the logged
        # mean. That may be an idle one, where all groups of the step are left out.
        news, self._news = self._news, {}
        statistics = {name: (x, 1.0) for name, x in news.items()}
        experts = expert_terms(model, weight=self.weight(batch))
        if experts is None:
            return Loss(out.rows, out.metrics, statistics)
        share = experts.penalty / len(out.rows) if model.training else 0.0
        return Loss(out.rows + share, {**out.metrics, **experts.metrics}, statistics)

    def prepare(self, engine: Engine, item: OptimizerStep, step: int, total: int) -> OptimizerStep:
        """The micro-batches of the step, whose completions are generated and scored at the first
        of the ``boundary`` consecutive steps that use them."""
        place = item.batch % self.boundary
        # After a resume nothing is held; checkpoints wait for a boundary, so nothing is lost.
        if place == 0 or not self._held:
            model = engine.model
            model.eval()
            with torch.no_grad(), engine.autocast():
                self._held = self._make(engine, item, step, total)
            model.train()
        self._beta = self._scheduled_beta(step, total)
        if self.section.beta > 0:
            self._news["beta"] = self._beta
        return replace(item, micro_batches=self._held[place % len(self._held)])

    def state_dict(self) -> dict[str, Any]:
        """The state of trust, of reward failures and of the alerts."""
        return self.rewards.state_dict()

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Continue after ``step`` steps from :meth:`state_dict`."""
        self.log.rewind(step)
        if state:
            self.rewards.load_state_dict(state)

    def _make(
        self, engine: Engine, item: OptimizerStep, step: int, total: int
    ) -> list[list[MicroBatch]]:
        """The micro-batches of each step of a generation, ready to train on."""
        steps = self._steps(item)
        made, scored, flat = self._draw(engine, item, steps, step, total)
        if self.correction is not None:
            self.correction.check([one.rollouts for one in made])
        groups = [one.groups for one in made]
        due, read = self._due(step), [one.read for one in made]
        if due and self.watch is not None:
            self._news |= self.watch.metrics([x for some in read for x in some], step + 1)
        versions = [one.rollouts.version for one in made]
        self.log.write(step + 1, groups, scored, due=due, read=read, versions=versions)
        held: list[list[MicroBatch]] = [[] for _ in steps]
        for one in made:
            place = one.groups.place
            batches = self._batches(one, scored.advantages[place], flat.get(place))
            held[one.step] += [MicroBatch(batch, one.micro.index) for batch in batches]
        self._fill(engine, held, steps[0][0])
        mean = self._tokens_per_row(held)
        # Idle batches too, since sharded ranks score together.
        for batches in held:
            for one in batches:
                self._complete(engine.model, one, mean)
        if self.correction is not None:
            self._news |= self.correction.metrics()
        return held

    def _due(self, step: int) -> bool:
        """Whether one of the steps that the generation of ``step`` serves is a logging step."""
        every = self.config.run.logging_steps
        return (step + self.boundary) // every > step // every or step == 0

    def _steps(self, item: OptimizerStep) -> list[list[MicroBatch]]:
        """This rank's micro-batches of prompts, for each step of the generation."""
        if self.data is None or self.config.generation_steps == 1:
            return [item.micro_batches]
        accumulation = self.config.train.gradient_accumulation_steps
        return [
            micro_batches(self.data, rows, accumulation, self.ranks.rank, self.ranks.size)
            for rows in self.data.generation(item.epoch, item.batch)
        ]

    def _draw(
        self,
        engine: Engine,
        item: OptimizerStep,
        steps: Sequence[Sequence[MicroBatch]],
        step: int,
        total: int,
    ) -> tuple[list[_Drawn], Scored, dict[int, list[bool]]]:
        """Completions of the generation's prompts with their rewards, and which groups to leave
        out, by place. Groups that are left out are replaced by those of further prompts
        ``max_resample_times`` times at most (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2;
        its batches are filled from those of later steps)."""
        shards = self.config.train.gradient_accumulation_steps * self.ranks.size
        made = self._roll_all(engine, [list(micro) for micro in steps], step, 0)
        reports = self.rewards.gather([one.groups for one in made], step, total, self.ranks)
        flat: dict[int, list[bool]] = {}
        if self.section.filter_zero_variance:
            flat = self.rewards.flat_groups(reports)
        most, empty = self.section.max_resample_times, sum(map(sum, flat.values()))
        further = self.data.further(item.epoch, item.batch) if most and self.data else []
        rounds, replaced, latest = 0, 0, flat
        # All ranks decide by the same reports, so that none is left waiting for another.
        while empty and rounds < most and replaced < len(further):
            rounds += 1
            rows = iter(further[replaced:])
            wanted = {place: sum(latest[place]) for place in sorted(latest)}
            taken = {place: list(islice(rows, count)) for place, count in wanted.items()}
            refill = self._refill(taken, shards, len(steps))
            more = self._roll_all(engine, refill, step, rounds * len(steps) * shards)
            made += more
            groups = [one.groups for one in more]
            reports = self.rewards.gather(groups, step, total, self.ranks, reports)
            found = self.rewards.flat_groups(reports)
            latest = {place: found[place] for place in found.keys() - flat.keys()}
            flat |= latest
            drawn = sum(map(len, taken.values()))
            replaced, empty = replaced + drawn, empty - drawn + sum(map(sum, latest.values()))
        scored = self.rewards.conclude(reports, step, total, self.ranks)
        self._news = dict(scored.statistics)
        if most:
            self._news |= {
                "resampling/rounds": float(rounds),
                "resampling/prompts": float(replaced),
                "resampling/groups_missing": float(empty),
            }
        return made, scored, flat

    def _refill(
        self, taken: Mapping[int, Sequence[int]], shards: int, steps: int
    ) -> list[list[MicroBatch]]:
        """This rank's micro-batches of the further prompts that each place has taken: in the step
        and with the index of the micro-batch whose groups they replace."""
        found: list[list[MicroBatch]] = [[] for _ in range(steps)]
        for place, rows in taken.items():
            index = place % shards
            if rows and self.data is not None and index % self.ranks.size == self.ranks.rank:
                batch = self.data.collate(rows)
                found[place // shards % steps].append(MicroBatch(batch, index))
        return found

    def _fill(self, engine: Engine, held: list[list[MicroBatch]], any_one: MicroBatch) -> None:
        """Add idle batches: packing by tokens gives the ranks different numbers of micro-batches.
        Each needs at least one, since the ranks' metrics must have the same names."""
        wanted = [1] * len(held)
        if engine.in_step:
            counts = self.ranks.all_gather_text(json.dumps([len(batches) for batches in held]))
            wanted = [max(1, *column) for column in zip(*map(json.loads, counts), strict=True)]
        for batches, number in zip(held, wanted, strict=True):
            while len(batches) < number:
                prompts = runtime.to_device(any_one.batch, self.ranks.device)
                idle = idle_batch(prompts, self._idle_token)
                batches.append(MicroBatch(idle, any_one.index, padding=True))

    def _tokens_per_row(self, held: Sequence[Sequence[MicroBatch]]) -> float | None:
        """Mean number of tokens of a completion of the generation, by which each of its steps is
        normalised as in TRL; None where it is a single step, which is divided by its own tokens."""
        if len(held) == 1 or self.section.loss_type not in PER_TOKEN:
            return None
        masks = [one.batch["loss_mask"] for batches in held for one in batches if not one.padding]
        sums = [float(sum(int(mask.sum()) for mask in masks)), float(sum(map(len, masks)))]
        tokens, rows = self.ranks.sum(sums)
        return tokens / max(rows, 1.0)

    def _roll_all(
        self, engine: Engine, steps: Sequence[Sequence[MicroBatch]], step: int, start: int
    ) -> list[_Drawn]:
        """Completions of this rank's micro-batches, whose places count from ``start``."""
        shards = self.config.train.gradient_accumulation_steps * self.ranks.size
        found = [
            (
                (number, start + number * shards),
                MicroBatch(runtime.to_device(micro.batch, self.ranks.device), micro.index),
            )
            for number, batches in enumerate(steps)
            for micro in batches
            if not micro.padding
        ]
        batches = [micro.batch for _, micro in found]
        with engine.whole():
            drawn = self._generate(engine.model, batches, step)
            return [
                self._drawn(engine.model, micro, step, where, rollouts)
                for (where, micro), rollouts in zip(found, drawn, strict=True)
            ]

    def _generate(self, model: nn.Module, batches: Sequence[Batch], step: int) -> list[Rollouts]:
        """Completions of several batches of prompts, drawn together if the engine can."""
        group, seed = self.config.rollout.num_generations, self.config.train.seed
        given = [
            (
                batch,
                [
                    rollout_seed(seed, step, name, copy)
                    for name in batch["sample_ids"]
                    for copy in range(group)
                ],
            )
            for batch in batches
        ]
        drawing, whole = self.engine, self.config.rollout.whole_steps

        def draw() -> list[Rollouts]:
            if isinstance(drawing, JoiningEngine) and (whole or not exact(drawing)):
                return drawing.generate_all(model, given)
            return [drawing.generate(model, batch, seeds) for batch, seeds in given]

        if exact(drawing):
            return draw()
        # A server may fail on one rank alone.
        try:
            return on_all_ranks(self.ranks, draw, RolloutError)
        except MmemoError as error:
            raise error if isinstance(error, RolloutError) else RolloutError(str(error)) from error

    def _drawn(
        self,
        model: nn.Module,
        micro: MicroBatch,
        step: int,
        where: tuple[int, int],
        rollouts: Rollouts,
    ) -> _Drawn:
        """``where``: the step of the generation, and the place of its first micro-batch."""
        prompts: dict[str, Any] = micro.batch
        names: list[str] = prompts["sample_ids"]
        lengths = rollouts.mask.sum(1).tolist()
        drawn = GroupRollouts(
            place=where[1] + micro.index,
            samples=[self.samples[name] for name in names],
            texts=rollouts.texts,
            ids=[ids[:size] for ids, size in zip(rollouts.ids.tolist(), lengths, strict=True)],
            ended=rollouts.ended.tolist(),
        )
        read: list[Sampled] = []
        if self.watch is not None:
            due, rows = self._due(step), drawn.samples
            read = self.watch.read(model, prompts, rollouts, rows, self.reference, due=due)
        return _Drawn(where[0], micro, drawn, rollouts, read)

    def _batches(self, one: _Drawn, advantages: Tensor, flat: list[bool] | None) -> list[Batch]:
        """``flat``: whether to leave out each of the groups; None leaves out none."""
        rollouts, mask = one.rollouts, one.rollouts.mask
        if self.section.mask_truncated_completions:
            mask = mask * rollouts.ended[:, None]
        group = Group(one.micro.batch, rollouts, mask, advantages.to(mask.device))
        left_out = flat or [False] * len(one.groups.samples)
        kept = [row for row, out in enumerate(left_out) if not out]
        return update_batches(group, kept, self.section.max_tokens_per_batch)

    def _complete(
        self, model: nn.Module, micro: MicroBatch, tokens_per_row: float | None = None
    ) -> None:
        """Add the log-probabilities of the policy that generated the completions and of the
        reference, and the ratios that correct the sampler, where the loss needs them."""
        batch, mask = micro.batch, micro.batch["loss_mask"]
        batch["weight"] = grpo_weight(mask, self.section.loss_type, tokens_per_row=tokens_per_row)
        sampled = batch.pop("sampling_logps", None)
        # Scored as in training, and not taken from the rollout, whose kernels may round
        # differently. With one step per generation the old policy is the current one, and the loss
        # needs no copy.
        if self.boundary > 1 or self.correction is not None:
            batch["old_logps"] = self._score(model, batch).logps
        if self.correction is not None:
            batch["importance_ratio"] = self.correction.ratio(
                batch["old_logps"], sampled, mask, measured=not micro.padding
            )
        if self.section.beta > 0:
            with self.reference.of(model) as start:
                batch["ref_logps"] = self._score(start, batch).logps

    def _score(self, model: nn.Module, batch: Batch, *, entropies: bool = False) -> Scores:
        score = packed_logps if self.section.shared_prefix else naive_logps
        return score(
            model,
            {name: batch[name] for name in batch["inputs"]},
            batch["completion_ids"],
            batch["completion_mask"],
            batch["prompt_index"],
            temperature=self.config.rollout.temperature,
            entropies=entropies,
            max_logits=self.config.train.max_logits,
        )

    def _scheduled_beta(self, step: int, total: int) -> float:
        section = self.section
        if section.beta_end is None:
            return section.beta
        done = min(1.0, step / max(1.0, section.beta_decay_share * total))
        return section.beta + (section.beta_end - section.beta) * done


class CompletionLog:
    """``completions.jsonl``: completions of some prompts, with their rewards.

    A line is one prompt: ``step``, ``sample_id``, ``prompt``, ``label``, and for its G completions
    ``completions``, ``rewards`` (by name, null where unscored), ``advantages`` and ``flags`` (a
    list for each: what of :data:`~mmemo.generation.readable.KINDS` shows that it is no language),
    and ``version``, the name of the weights with which a server drew them.

    Two kinds of prompts are written: the first ``groups`` prompts of each step that is ``due``, and
    ``groups`` prompts that are the same throughout the run, whenever they come up, which is once an
    epoch. Only prompts of the main rank are written, with R ranks about one in R.
    """

    def __init__(self, path: Path, groups: int, enabled: bool, names: Sequence[str]) -> None:
        """``names``: of all prompts; which are followed depends on nothing else."""
        self.path, self.groups, self.enabled = path, groups, enabled and groups > 0
        self.followed = frozenset(sorted(names, key=_stable)[:groups])

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, which a resumed run writes again."""
        if not self.enabled or not self.path.exists():
            return
        files.keep_rows(self.path, up_to(step))

    def write(
        self,
        step: int,
        drawn: Sequence[GroupRollouts],
        scored: Scored,
        *,
        due: bool,
        read: Sequence[Sequence[Sampled]] = (),
        versions: Sequence[str] = (),
    ) -> None:
        """The followed prompts of this step, and if it is ``due`` its first ones. ``read``: what
        was read of the completions of each of ``drawn``. ``versions``: what drew each."""
        if not self.enabled:
            return
        signs, names = read or [[]] * len(drawn), versions or [""] * len(drawn)
        places = [
            (one, at, found, name)
            for one, found, name in zip(drawn, signs, names, strict=True)
            for at in range(len(one.samples))
        ]
        rows = [
            (one, at, found, name)
            for number, (one, at, found, name) in enumerate(places)
            if one.samples[at].sample_id in self.followed or (due and number < self.groups)
        ]
        files.append_rows(
            self.path,
            (
                {
                    "step": step,
                    **_line(one, at, scored, found),
                    **({"version": name} if name else {}),
                }
                for one, at, found, name in rows
            ),
        )


def _stable(name: str) -> bytes:
    """An order that has nothing to do with the manifest's."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _line(one: GroupRollouts, at: int, scored: Scored, read: Sequence[Sampled]) -> dict[str, Any]:
    sample, group = one.samples[at], len(one.texts) // len(one.samples)
    mine = slice(at * group, (at + 1) * group)
    values = scored.values[one.place][mine]
    advantages: list[float] = scored.advantages[one.place][mine].tolist()
    return {
        "sample_id": sample.sample_id,
        "prompt": prompt_text(prompt_of(sample)),
        "label": sample.truth.label,
        "completions": one.texts[mine],
        "ended": one.ended[mine],
        # NaN stands for an unscored completion and is not JSON; null is.
        "rewards": {
            name: [None if x != x else round(x, 6) for x in values[:, k].tolist()]
            for k, name in enumerate(scored.names)
        },
        "advantages": [round(x, 6) for x in advantages],
        **({"flags": [found.reading.flags for found in read[mine]]} if read else {}),
    }
