"""Reads an item to grade as the tokens of a reward model.

B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmemo.data.sample import Modality
from mmemo.models.backbone import MODALITY_ID
from mmemo.rewards.judge.rubric import JudgeItem, sanitized

MIN_CANDIDATE_TOKENS = 8
"""Tokens of the candidate that must fit besides question and facts for it to be scored."""

_QUESTION, _FACTS = "QUESTION\n{prompt}\n\n", "FACTS\n{facts}\n\nCANDIDATE\n"
_NO_FACTS = "CANDIDATE\n"


class Tokens(NamedTuple):
    """The tokens of an item; the last ``candidate`` ones are the candidate's, and the ``facts``
    ones before them those of the clip and of the facts."""

    ids: list[int]
    candidate: int
    facts: int
    lines: list[int]
    """Tokens of each line of facts."""
    heads: list[int]
    """Tokens of the head of each line."""
    clip: list[int] = []
    """The modality id of each token of the clip."""


class Reader:
    """Tokenises items: question, places for the clip's tokens, facts, then the candidate.

    The candidate is tokenised separately and as plain text, so nothing in it becomes a special
    token. A candidate that is too long is truncated; question and facts never are.

    Args:
        clip_tokens: tokens of each branch of the clip's features.
        with_facts: False leaves the facts out.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        clip_tokens: Mapping[Modality, int] | None = None,
        with_facts: bool = True,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.clip_tokens, self.with_facts = dict(clip_tokens or {}), with_facts
        # BERT's tokenizers end a text with sep, GPT's with eos. Where both are named, one is
        # enough.
        self.end: list[int] = [
            token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None
        ][:1]
        # The mask hides padding, so any id will do where the tokenizer names none.
        self.pad = int(tokenizer.pad_token_id or 0)
        self._words = _same_words(tokenizer)
        # All answers to a prompt have the same facts.
        self._facts = lru_cache(maxsize=4096)(self._read_facts)

    def read(self, item: JudgeItem) -> Tokens | None:
        """The item's tokens; None if it does not fit into ``max_length``. A branch has tokens if
        the item's clip has its stream."""
        start: list[int] = [] if (one := self.tokenizer.cls_token_id) is None else [one]
        start += self._ids(_QUESTION.format(prompt=item.prompt))
        facts, lines, heads = self._facts(item.facts)
        clip = [
            MODALITY_ID[name]
            for name, count in self.clip_tokens.items()
            if item.clip is not None and getattr(item.clip, name) is not None
            for _ in range(count)
        ]
        facts = [self.pad] * len(clip) + facts
        room = self.max_length - len(start) - len(facts) - len(self.end)
        if room < MIN_CANDIDATE_TOKENS:
            return None
        candidate = [*self._ids(sanitized(item.completion))[:room], *self.end]
        if not candidate:
            return None
        ids = [*start, *facts, *candidate]
        return Tokens(ids, len(candidate), len(facts), lines, heads, clip)

    def _read_facts(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the facts, and the tokens of each line and of its head."""
        ids, lines, heads = [], [], []
        # The head of "- present cues: brows lowered" ends with its colon.
        said = _FACTS.format(facts=text) if self.with_facts else _NO_FACTS
        for line in said.splitlines(keepends=True):
            head, colon, rest = line.partition(":")
            first, second = self._ids(head + colon), self._ids(rest)
            ids += first + second
            lines.append(len(first) + len(second))
            heads.append(len(first))
        return ids, lines, heads

    def batch(self, read: Sequence[Tokens]) -> dict[str, Tensor]:
        """The arguments of :class:`Scorer` for results of :meth:`read`, padded on the right."""
        lengths = [len(one.ids) for one in read]
        positions = torch.arange(max(lengths))
        ends = torch.tensor(lengths)[:, None]
        starts = ends - torch.tensor([one.candidate for one in read])[:, None]
        before = starts - torch.tensor([one.facts for one in read])[:, None]
        ids = [torch.tensor(one.ids) for one in read]
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad)
        words, clip = self._words[padded], torch.zeros_like(padded)
        for row, (one, start) in enumerate(zip(read, before[:, 0].tolist(), strict=True)):
            clip[row, start : start + len(one.clip)] = torch.tensor(one.clip, dtype=torch.long)
        after = [at + len(one.clip) for at, one in zip(before[:, 0].tolist(), read, strict=True)]
        return {
            "input_ids": padded,
            "attention_mask": (positions < ends).long(),
            "candidate": (positions >= starts) & (positions < ends),
            "facts": (positions >= before) & (positions < starts),
            # A place of the clip is no word, so that nothing equals it.
            "words": words.masked_fill(clip > 0, -1),
            **_line_masks(read, padded.shape, after),
            **({"clip": clip} if self.clip_tokens else {}),
        }

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(found["input_ids"])


def _line_masks(
    read: Sequence[Tokens], shape: Sequence[int], starts: Sequence[int]
) -> dict[str, Tensor]:
    lines, heading = torch.zeros(*shape, dtype=torch.long), torch.zeros(*shape, dtype=torch.bool)
    for row, (one, start) in enumerate(zip(read, starts, strict=True)):
        at = start
        for number, (count, head) in enumerate(zip(one.lines, one.heads, strict=True), 1):
            lines[row, at : at + count] = number
            heading[row, at : at + head] = True
            at += count
    return {"lines": lines, "heading": heading}


def _same_words(tokenizer: Any) -> Tensor:
    """(V,) for each token the first one that is the same word but for case and spaces."""
    first: dict[str, int] = {}
    return torch.tensor(
        [
            first.setdefault(tokenizer.decode([token]).strip().casefold() or f"\0{token}", token)
            for token in range(len(tokenizer))
        ]
    )
