"""Whether rewards can pay for completions that begin with what the chat template opens.

Every completion begins with ``<think>`` where the generation prompt ends with it. A reward whose
format has no such tag then pays nothing, whatever the model writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmemo import content
from mmemo.answers.prefill import opened_tag
from mmemo.data.sample import Sample
from mmemo.errors import ConfigError
from mmemo.rewards.rewards import RewardConfig, RewardSet, wrong_on_purpose
from mmemo.rewards.validate import proof_rows, score_rows

_ROWS = 4
"""Rows that are tried: the format of a gold answer does not depend on the row."""
_LOOKED_AT = 64
"""Rows among which those are looked for to which a reward applies."""


def check_opened(rewards: Sequence[RewardConfig], samples: Sequence[Sample], opened: str) -> None:
    """Check that each reward with a ``gold`` pays for it also behind what the prompt opens.

    Args:
        samples: rows of the run, of which the first few are tried.
        opened: as :attr:`~mmemo.models.chat.ChatRenderer.opened`.

    Raises:
        ConfigError: a reward pays for its gold answers, and for none of them that begins with the
            opened tag.
    """
    tag = opened_tag(opened)
    if tag is None:
        return
    rows = proof_rows(samples[:_LOOKED_AT])
    for config in rewards:
        module: Any = content.load_module(config.path.rpartition(":")[0])
        if not hasattr(module, "gold") or wrong_on_purpose(config) is not None:
            continue
        golds = [(row, gold) for row in rows if (gold := module.gold(row)) is not None][:_ROWS]
        written = [_behind(tag, opened, gold) for _, gold in golds]
        least = getattr(module, "MINIMUM", 0.0) + getattr(module, "PROOF_TOLERANCE", 0.0)
        tried, reward = [row for row, _ in golds], RewardSet([config])
        if _pays(reward, tried, [gold for _, gold in golds], least) and not _pays(
            reward, tried, written, least
        ):
            raise ConfigError(
                f"reward '{config.title}' ({config.path}) pays nothing for a completion that "
                f"begins with {tag}, which the chat template's generation prompt opens; give its "
                "format that tag, or set model.chat_template_path to a template that opens none"
            )


def _behind(tag: str, opened: str, gold: str) -> str:
    """The gold answer as a completion can be: behind the opened tag, which it closes."""
    if gold.lstrip().lower().startswith(tag.lower()):
        return gold
    return f"{opened}The face and the voice agree.</{tag[1:]}{gold}"


def _pays(
    reward: RewardSet, rows: Sequence[Mapping[str, Any]], answers: Sequence[str], least: float
) -> bool:
    scores = score_rows(reward, rows, answers) if rows else []
    return any(not math.isnan(score) and score > least for score in scores)
