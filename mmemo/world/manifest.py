"""The world's manifests: curriculum tiers, RL prompts, preferences, conflict test and probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmemo import files
from mmemo.world import emotions as E
from mmemo.world import questions as Q
from mmemo.world.config import WorldConfig
from mmemo.world.graded import contrast_rows, graded_rows
from mmemo.world.plan import ClipPlan
from mmemo.world.preferences import preference_rows, wrong_reason
from mmemo.world.probes import probe_rows
from mmemo.world.rows import Row, base_row, row_of

Plans = Mapping[str, Sequence[ClipPlan]]


def write_manifests(config: WorldConfig, plans: Plans, folder: Path) -> dict[str, int]:
    """Write all manifests to ``folder/manifests``; returns the number of rows of each."""
    target = folder / "manifests"
    target.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for name, rows in manifests(config, plans).items():
        files.write_rows(target / f"{name}.jsonl", rows, ensure_ascii=False)
        counts[name] = len(rows)
    return counts


def manifests(config: WorldConfig, plans: Plans) -> dict[str, list[Row]]:
    """Manifest name -> rows; depends on the config alone."""
    bases = {split: [base_row(plan, config) for plan in listed] for split, listed in plans.items()}
    # A world without clips of its own for RL draws the prompts from its training clips.
    drawn = "rl" if plans["rl"] else "train"
    rl_clips, rl_bases = plans[drawn], bases[drawn]
    train, held, test = plans["train"], plans["val"], plans["test"]
    found = {
        "train_attribute": list(_tier(config, train, bases["train"], "attribute")),
        "train_expression": list(_tier(config, train, bases["train"], "expression")),
        "train_emotion": list(_tier(config, train, bases["train"], "emotion")),
        "train_probes": probe_rows(config, train, bases["train"]),
        "val_attribute": list(_tier(config, held, bases["val"], "attribute")),
        "val_expression": list(_tier(config, held, bases["val"], "expression")),
        "val_emotion": list(_tier(config, held, bases["val"], "emotion")),
        "test_conflict": list(_tier(config, test, bases["test"], "emotion")),
        "test_probes": probe_rows(config, test, bases["test"]),
        "rl_prompts": list(_prompts(config, rl_clips, rl_bases)),
        "preference": preference_rows(config, rl_clips, rl_bases),
    }
    if config.bias.loose_reasons:
        found["train_loose"] = list(_loose(config, train, bases["train"]))
    if config.size.graded_answers:
        for split in ("train", "val", "test"):
            clips = plans[split], bases[split]
            found[f"{split}_graded"] = graded_rows(config, *clips) + contrast_rows(config, *clips)
    return found


def _tier(
    config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row], tier: str
) -> Iterator[Row]:
    sizes = config.size
    for plan, base in zip(plans, bases, strict=True):
        # The names of the tiers differ in length, so each tier has random numbers of its own.
        rng = np.random.default_rng([plan.seed, 10, len(tier)])
        if tier == "attribute":
            asked = Q.attribute_questions(plan, rng, sizes.attribute_questions)
        elif tier == "expression":
            asked = Q.expression_questions(plan, rng, sizes.expression_questions)
        else:
            asked = [Q.emotion_question(plan, rng, config.transcript_in_prompt)]
        for number, one in enumerate(asked):
            yield row_of(plan, base, one, tier, number)


def _loose(config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]) -> Iterator[Row]:
    """The emotion tier as a careless annotator would write it. Where the weather fits the emotion,
    the wrong reason is the scene. Extra column ``loose``: the kind of wrong reason, or null."""
    for plan, row in zip(plans, _tier(config, plans, bases, "emotion"), strict=True):
        # Random numbers of their own, so that loose reasons change the wording of no question.
        rng = np.random.default_rng([plan.seed, 14])
        fits = plan.scene.weather == E.SCENES[plan.label][0]
        kind = "spurious" if fits else "hallucinated"
        loose = plan.label != "neutral" and rng.uniform() < config.bias.loose_reasons
        if loose:
            text = wrong_reason(plan, kind, plan.label)
            if f"<answer>{plan.label}</answer>" not in text:  # all typical cues are present
                kind = "spurious"
                text = wrong_reason(plan, kind, plan.label)
            row["messages"][-1]["content"] = text
        yield {**row, "loose": kind if loose else None}


def _prompts(config: WorldConfig, plans: Sequence[ClipPlan], bases: Sequence[Row]) -> Iterator[Row]:
    for plan, base in zip(plans, bases, strict=True):
        rng = np.random.default_rng([plan.seed, 11])
        asked = Q.emotion_question(plan, rng, config.transcript_in_prompt)
        prompt = Q.Asked(asked.kind, asked.media, asked.question, "")
        yield row_of(plan, base, prompt, "emotion", 0)
