"""Shapley values: how much each modality adds to the log-probability of the right answer.

The players are the clip's streams and the text. v(S) is the log-probability, in nats, of the right
answer among the possible ones, where only the players of S are there:

- a stream that is absent is not in the prompt: no tokens, no placeholder, and no fusion with it;
- text that is absent is the question with all it says and quotes, system turns included. In its
  place stands one instruction that names the possible answers and nothing of the clip, so that v of
  no player at all is what the model guesses.

The model first says to each prompt what it says before its answer, such as its reasoning, and the
answers are labels in its own form behind that: a model that reasons, asked for a bare label, would
be asked for what it never does. Probabilities are of whole answers, shared out among the task's
labels: else a prompt that makes some other form of answer likelier would seem to make the right one
less likely. Ways of decoding that change attention or contrast logits change what is said first,
and not the probabilities.

Source: Shapley, A Value for n-Person Games, 1953; for the modalities of a model Parcalabescu and
Frank, MM-SHAP, arXiv 2212.08158, who hide tokens and sample; here all 2^n subsets are computed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmemo.answers.parsing import answer_start
from mmemo.data.collate import IGNORE_INDEX, render
from mmemo.data.row_models import PLACEHOLDERS
from mmemo.data.rows import restrict
from mmemo.data.sample import MODALITIES, Sample, Turn
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.generate import AnswerGenerator, asked
from mmemo.evaluation.predictions import Row
from mmemo.generation.logprobs import naive_logps, packed_logps

TEXT = "text"
PLAYERS: tuple[str, ...] = (*MODALITIES, TEXT)


def shapley_values(
    players: Sequence[str], worth: Mapping[frozenset[str], float]
) -> dict[str, float]:
    """The exact Shapley value of each player.

    Args:
        worth: v(S) of every subset of the players, the empty one included.

    Returns:
        Values that add up to v(all) - v(none).
    """
    n = len(players)
    values: dict[str, float] = {}
    for player in players:
        others = [other for other in players if other != player]
        values[player] = sum(
            (worth[part | {player}] - worth[part]) / (n * math.comb(n - 1, len(part)))
            for part in subsets(others)
        )
    return values


def subsets(players: Sequence[str]) -> Iterator[frozenset[str]]:
    """Every subset, the empty one first."""
    for size in range(len(players) + 1):
        yield from map(frozenset, itertools.combinations(players, size))


def players_of(question: Question) -> list[str]:
    """The streams of a question's clip, and the text."""
    return [name for name in PLAYERS if name in question.sample.media or name == TEXT]


def named(part: frozenset[str]) -> str:
    """A subset as results have it: ``audio+text``; the empty one is ``none``."""
    return "+".join(name for name in PLAYERS if name in part) or "none"


def coalition(question: Question, part: frozenset[str], instruction: str) -> Sample:
    """The prompt in which only the players of ``part`` are there."""
    sample = asked(question)
    if TEXT not in part:
        spoken = "".join(turn.text for turn in sample.turns)
        marks = sorted(
            (PLACEHOLDERS[name] for name in sample.media if PLACEHOLDERS[name] in spoken),
            key=spoken.index,
        )
        text = instruction.replace("{labels}", ", ".join(_labels(question)))
        sample = replace(sample, turns=(Turn("user", "".join(marks) + text),))
    return restrict(sample, [name for name in sample.media if name in part])


class Valuer:
    """Shapley values of questions, with one model.

    Args:
        instruction: the text where text is absent; ``{labels}`` stands for the possible answers.
        answer: an answer in the form that the model gives it; ``{label}`` stands for the label.
        batch_size: prompts computed together.
    """

    def __init__(
        self, answerer: AnswerGenerator, *, instruction: str, answer: str, batch_size: int
    ) -> None:
        self._answerer, self._batch_size = answerer, batch_size
        self._instruction, self._answer = instruction, answer

    def value(self, question: Question, draw: str) -> Row:
        """``players``, ``worth`` of each subset by its name, and ``shapley`` of each player.
        ``draw``: see :meth:`~mmemo.evaluation.generate.AnswerGenerator.speak`."""
        players = players_of(question)
        parts = list(subsets(players))
        found: list[float] = []
        for at in range(0, len(parts), self._batch_size):
            some = parts[at : at + self._batch_size]
            prompts = [coalition(question, part, self._instruction) for part in some]
            found += self._worth(question, prompts, f"{draw}/{at}")
        worth = dict(zip(parts, found, strict=True))
        values = shapley_values(players, worth)
        return {
            "players": players,
            "worth": {named(part): round(value, 6) for part, value in worth.items()},
            "shapley": {player: round(value, 6) for player, value in values.items()},
        }

    @torch.inference_mode()
    def _worth(self, question: Question, prompts: Sequence[Sample], draw: str) -> list[float]:
        """v of each prompt: every label is scored behind what the model says first."""
        labels, device = _labels(question), self._answerer.device
        answers = [self._answer_ids(question, label) for label in labels]
        first = [self._before_answer(said) for said in self._answerer.speak(prompts, draw)]
        rows = [torch.tensor(said + answer) for said in first for answer in answers]
        given = (
            self._answerer.model,
            self._answerer.collate(prompts),
            pad_sequence(rows, batch_first=True).to(device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
            torch.arange(len(prompts), device=device).repeat_interleave(len(labels)),
        )
        try:
            scores = packed_logps(*given)
        except ConfigError:  # attention that cannot share prompts; the numbers are the same
            scores = naive_logps(*given)
        totals = scores.logps.double().sum(1).view(len(prompts), len(labels))
        return totals.log_softmax(1)[:, labels.index(question.truth)].tolist()

    def _before_answer(self, said: list[int]) -> list[int]:
        """The tokens before the answer; reasoning that was cut off is closed."""
        tokenizer: Any = self._answerer.processor.tokenizer

        def text(tokens: int) -> str:
            return tokenizer.decode(said[:tokens], skip_special_tokens=False)

        start = answer_start(text(len(said)))
        if start is None:
            return said + tokenizer("</think>", add_special_tokens=False)["input_ids"]
        lengths = range(len(said) + 1)
        return said[: bisect.bisect_right(lengths, start, key=lambda n: len(text(n))) - 1]

    def _answer_ids(self, question: Question, label: str) -> list[int]:
        """The tokens of an answer and its end, which are the same whatever the prompt."""
        sample = coalition(question, frozenset(), self._instruction)
        turn = Turn("assistant", self._answer.replace("{label}", label))
        row = render(
            self._answerer.processor,
            replace(sample, turns=(*sample.turns, turn)),
            generation=False,
        )
        return [token for token in row.labels if token != IGNORE_INDEX]


def _labels(question: Question) -> tuple[str, ...]:
    return () if question.labels is None else question.labels.labels
