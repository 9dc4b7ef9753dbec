"""Shapley values: how much each modality adds to the log-probability of the right answer.

The players are the streams of the clip and the text. v(S) is the log-probability, in nats, of the
right answer among the possible ones when only the players in S are present:

- An absent stream is left out of the prompt: it has no tokens and no placeholder, and nothing is
  fused with it.
- If the text is absent, so is everything that the question says and quotes, system turns included.
  One instruction takes its place, which names the possible answers and nothing about the clip, so
  that v of the empty set is what the model guesses.

For each prompt, the model first generates what it says before its answer, such as its reasoning.
The possible answers are then scored behind that text, in the model's own answer format: a model
that reasons, when asked for a bare label, would be asked for something it never does. Probabilities
are those of whole answers, normalised over the task's labels; otherwise a prompt that makes some
other form of answer more likely would seem to make the right answer less likely. Decoding methods
that change attention or contrast logits affect the text before the answer, but not these
probabilities.

Sources: Shapley, A Value for n-Person Games, 1953. Parcalabescu and Frank, MM-SHAP, arXiv
2212.08158, apply it to the modalities of a model; they mask tokens and sample subsets, whereas here
all 2^n subsets are computed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmemo.answers.parsing import answer_start
from mmemo.data.collate import IGNORE_INDEX, render
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.rows import restrict
from mmemo.data.sample import MODALITIES, Sample, Turn
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.generate import AnswerGenerator, prompt_sample
from mmemo.evaluation.predictions import Row
from mmemo.generation.logprobs import naive_logps, packed_logps

TEXT = "text"
PLAYERS: tuple[str, ...] = (*MODALITIES, TEXT)


def shapley_values(
    players: Sequence[str], worth: Mapping[frozenset[str], float]
) -> dict[str, float]:
    """The exact Shapley value of each player.

    Args:
        worth: v(S) for every subset S of the players, the empty one included.

    Returns:
        Values whose sum is v(all players) - v(no player).
    """
    n = len(players)
    values: dict[str, float] = {}
    for player in players:
        others = [other for other in players if other != player]
        values[player] = sum(
            # 1 / (n · C(n-1, s)) equals s! (n-s-1)! / n!, the share of orders in which the player
            # joins after exactly these s others.
            (worth[part | {player}] - worth[part]) / (n * math.comb(n - 1, len(part)))
            for part in subsets(others)
        )
    return values


def subsets(players: Sequence[str]) -> Iterator[frozenset[str]]:
    """Every subset of the players, the empty one first."""
    for size in range(len(players) + 1):
        yield from map(frozenset, itertools.combinations(players, size))


def players_of(question: Question) -> list[str]:
    """The players of a question: the streams of its clip, and the text."""
    return [name for name in PLAYERS if name in question.sample.media or name == TEXT]


def named(part: frozenset[str]) -> str:
    """The name of a subset in results: ``audio+text``, or ``none`` for the empty one."""
    return "+".join(name for name in PLAYERS if name in part) or "none"


def coalition(question: Question, part: frozenset[str], instruction: str) -> Sample:
    """The prompt in which only the players of ``part`` are present."""
    sample = prompt_sample(question)
    if TEXT not in part:
        # All placeholders stay, in their order; restrict() below removes those of absent streams.
        spoken = "".join(turn.text for turn in sample.turns)
        placeholders = sorted(
            (PLACEHOLDERS[name] for name in sample.media if PLACEHOLDERS[name] in spoken),
            key=spoken.index,
        )
        text = instruction.replace("{labels}", ", ".join(_labels(question)))
        sample = replace(sample, turns=(Turn("user", "".join(placeholders) + text),))
    return restrict(sample, [name for name in sample.media if name in part])


class ShapleyEvaluator:
    """Computes the Shapley values of questions for one model.

    Args:
        instruction: the prompt's text when the text is absent; ``{labels}`` is replaced by the
            possible answers.
        answer: the format of the model's answers; ``{label}`` is replaced by the label.
        batch_size: the number of prompts computed together.
    """

    def __init__(
        self, generator: AnswerGenerator, *, instruction: str, answer: str, batch_size: int
    ) -> None:
        self._generator, self._batch_size = generator, batch_size
        self._instruction, self._answer = instruction, answer

    def value(self, question: Question, draw: str) -> Row:
        """Returns ``players``, ``worth`` by subset name, and ``shapley`` by player.
        ``draw``: see :meth:`~mmemo.evaluation.generate.AnswerGenerator.generate_ids`."""
        players = players_of(question)
        parts = list(subsets(players))
        found: list[float] = []
        for at in range(0, len(parts), self._batch_size):
            some = parts[at : at + self._batch_size]
            prompts = [coalition(question, part, self._instruction) for part in some]
            # Each batch of subsets has a name of its own, so that a resumed run samples the same
            # texts.
            found += self._worth(question, prompts, f"{draw}/{at}")
        worth = dict(zip(parts, found, strict=True))
        values = shapley_values(players, worth)
        return {
            "players": players,
            "worth": {named(part): round(value, 6) for part, value in worth.items()},
            "shapley": {player: round(value, 6) for player, value in values.items()},
        }

    def _worth(self, question: Question, prompts: Sequence[Sample], draw: str) -> list[float]:
        """v of each prompt: every label is scored behind what the model says before it."""
        first = [self._before_answer(ids) for ids in self._generator.generate_ids(prompts, draw)]
        place = _labels(question).index(question.truth)
        return self.label_logps(question, prompts, first)[:, place].tolist()

    def before_answer(self, question: Question, draw: str) -> list[int]:
        """The tokens that the model generates before its answer to a question."""
        (ids,) = self._generator.generate_ids([prompt_sample(question)], draw)
        return self._before_answer(ids)

    @torch.inference_mode()
    def label_logps(
        self, question: Question, prompts: Sequence[Sample], first: Sequence[Sequence[int]]
    ) -> Tensor:
        """Log-probability of each label of a question as the whole answer, normalised over the
        labels, float64 (prompts, labels).

        Args:
            first: the tokens that stand before the answer to each prompt.
        """
        labels, device = _labels(question), self._generator.device
        answers = [self._answer_ids(question, label) for label in labels]
        # One row per prompt and label, with the labels of a prompt side by side.
        rows = [torch.tensor([*ids, *answer]) for ids in first for answer in answers]
        given = (
            self._generator.model,
            self._generator.collate(prompts),
            pad_sequence(rows, batch_first=True).to(device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
            torch.arange(len(prompts), device=device).repeat_interleave(len(labels)),
        )
        try:
            scores = packed_logps(*given)
        except ConfigError:  # attention without a shared prefix: slower, with the same result
            scores = naive_logps(*given)
        # (prompts, labels); in float64, because sums over long answers lose digits in float32.
        totals = scores.logps.double().sum(1).view(len(prompts), len(labels))
        return totals.log_softmax(1)

    def _before_answer(self, ids: list[int]) -> list[int]:
        """The tokens before the answer. Reasoning that was truncated is closed with its tag."""
        tokenizer: Any = self._generator.processor.tokenizer

        def text(tokens: int) -> str:
            said: str = tokenizer.decode(ids[:tokens], skip_special_tokens=False)
            return self._generator.opened + said

        start = answer_start(text(len(ids)))
        if start is None:
            return ids + tokenizer("</think>", add_special_tokens=False)["input_ids"]
        # Tokens and characters do not match one to one, so the boundary is searched for by the
        # length of decoded prefixes.
        lengths = range(len(ids) + 1)
        return ids[: max(0, bisect.bisect_right(lengths, start, key=lambda n: len(text(n))) - 1)]

    def _answer_ids(self, question: Question, label: str) -> list[int]:
        """The tokens of an answer and its end of turn. They do not depend on the prompt."""
        # Any prompt would do, and this one shows no clip whose features would have to be read.
        sample = coalition(question, frozenset(), self._instruction)
        turn = Turn("assistant", self._answer.replace("{label}", label))
        row = render(
            self._generator.processor,
            replace(sample, turns=(*sample.turns, turn)),
            generation=False,
        )
        if not self._generator.opened:
            return [token for token in row.labels if token != IGNORE_INDEX]
        # Reasoning that the prompt opens is closed before the answer, by what the model says.
        tokenizer: Any = self._generator.processor.tokenizer
        tail = row.text[row.text.rindex(turn.text.strip()) :]
        ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"]
        return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def _labels(question: Question) -> tuple[str, ...]:
    return () if question.labels is None else question.labels.labels
