"""A reward model of text: a transformer with one ordinal head per dimension, used as a judge.

EmotionThinker's reward model (arXiv 2601.15668) generates its four grades as JSON. Here four heads
predict them from one representation: scoring costs one forward pass, is finer than whole numbers,
and is never malformed. The heads are those of CORAL (Cao, Mirjalili, Raschka, "Rank consistent
ordinal regression", arXiv 1901.07884): one direction w per dimension and a threshold between each
two grades, logit P(grade > k) = w·h + b_k on the representation h. Grades are ordered and
concentrate at the top; a squared error would treat their steps as equal and pull all predictions to
the mean.

A candidate is right or wrong only beside the clip's facts, and a small transformer does not learn
by itself to look up there what it reads here: without help it graded by the text alone. The heads
therefore also read a :class:`Comparison` of the candidate with the facts, in which equal words find
each other from the start.

:class:`LocalJudge` runs a trained model in this process, without a server. As with every judge, a
candidate that mentions the rubric gets the lowest grades without being scored, and what cannot be
scored gets no grade.

B rows, L tokens, D hidden size, H heads, K = 4 dimensions, T = 4 thresholds between five grades.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from mmemo import checkpoint, content
from mmemo.config import Config
from mmemo.errors import CheckpointError, ConfigError
from mmemo.rewards.judge.calibration import read_calibration, refusal
from mmemo.rewards.judge.rubric import (
    DIMENSIONS,
    HIGHEST,
    LOWEST,
    WORST,
    Grades,
    JudgeItem,
    mentions_rubric,
    sanitized,
)

THRESHOLDS = HIGHEST - LOWEST
MIN_CANDIDATE_TOKENS = 8
"""Tokens of the candidate that must fit besides question and facts for it to be scored."""

SCORER_INPUTS: tuple[str, ...] = (
    *("input_ids", "attention_mask", "candidate", "facts", "words", "lines", "heading"),
)
"""The arguments of :class:`Scorer`."""

_BACKBONE, _HEADS, _SETTINGS = "backbone", "heads.safetensors", "scorer.json"
_FORMAT = 2  # version of the folder and of the prompt; increase it when either changes
_QUESTION, _FACTS = "QUESTION\n{prompt}\n\n", "FACTS\n{facts}\n\nCANDIDATE\n"
_PHRASE = 3
"""Longest run of equal words that the comparison tells from shorter ones; cues have up to three."""


class Comparison(nn.Module):
    """Attention of the candidate's tokens to those of the facts, and a comparison of each token
    with what it found there.

    It attends and compares as the ESIM does (Chen et al., arXiv 1609.06038, sections 3.2 and 3.3).
    That a word occurs in the other text is an input, as DrQA's exact match is (arXiv 1704.00051,
    section 3.2): runs of 1, 2 and 3 equal words each have a learned weight in the attention. What
    stands at the head of a line of facts ("present cues:") is an input at each of its tokens. What
    a match means is learned.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.head_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        # (H, n): the weight of each length of match. The first heads start with single words, the
        # last ones with phrases, and all with enough to outweigh a page of facts.
        steps = torch.linspace(0, 4, heads)[:, None]
        self.match = nn.Parameter(torch.cat([6 - steps, *[2 + steps] * (_PHRASE - 1)], dim=1))
        # What a token attends to that finds nothing.
        self.nothing = nn.Parameter(torch.full((heads,), 5.0))
        self.compare = nn.Sequential(
            nn.Linear(3 * width + heads, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )

    def forward(
        self, states: Tensor, heads: Tensor, words: Tensor, candidate: Tensor, facts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compare C candidate tokens with F tokens of the facts.

        Args:
            states: (B, L, D).
            heads: (B, L, D) what the head of each token's line says; 0 outside of the facts.
            words: (B, L) ids of words.
            candidate: (B, L), True for the candidate's tokens, which are consecutive.
            facts: (B, L), True for the tokens of the facts, which are consecutive.

        Returns:
            (B, C, D) comparisons, and (B, C) True where there is a token.
        """
        states = self.norm(states)
        # Only these two parts are compared: the whole text with itself would take several times as
        # long as the backbone.
        (mine, is_mine), (theirs, is_theirs) = _places(candidate), _places(facts)
        said, known = _taken(states, mine), _taken(states + heads, theirs)
        q, k, v = map(self._split, (self.query(said), self.key(known), known))
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, C, F)
        run = torch.ones((), dtype=torch.bool, device=states.device)
        for length in range(_PHRASE):  # the word itself, then those before it
            one, other = (words.gather(1, (at - length).clamp(min=0)) for at in (mine, theirs))
            run = run & (one[:, :, None] == other[:, None, :])  # (B, C, F)
            logits = logits + self.match[:, length, None, None] * run[:, None]
        logits = logits.masked_fill(~is_theirs[:, None, None, :], -torch.inf)
        nothing = self.nothing[None, :, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, nothing], dim=-1).softmax(-1)
        found = (weights[..., :-1] @ v).transpose(1, 2).flatten(2)  # (B, C, D)
        missed = weights[..., -1].transpose(1, 2)  # (B, C, H)
        compared = torch.cat([said, found, said * found, missed], dim=-1)
        return self.compare(compared), is_mine

    def line_heads(self, embeddings: Tensor, lines: Tensor, heading: Tensor) -> Tensor:
        """The mean embedding of the head of each token's line.

        Args:
            embeddings: (B, L, D).
            lines: (B, L), number of each fact's line from 1; 0 outside of the facts.
            heading: (B, L), True for the tokens of the heads.

        Returns:
            (B, L, D), normalised; 0 outside of the facts.
        """
        # (B, N, L): the tokens of each line's head.
        number = torch.arange(1, int(lines.max()) + 1, device=lines.device)[None, :, None]
        mine = (lines[:, None, :] == number).float()
        head = mine * heading[:, None, :]
        means = head @ embeddings / head.sum(-1, keepdim=True).clamp(min=1)
        return mine.transpose(1, 2) @ self.head_norm(means)

    def _split(self, states: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _places(part: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) True for N consecutive tokens of each row -> (B, N) their places, and which exist."""
    counts = part.sum(1, keepdim=True)
    steps = torch.arange(int(counts.max()), device=part.device)
    places = part.int().argmax(1, keepdim=True) + steps
    return places.clamp(max=part.shape[1] - 1), steps < counts


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(B, L, D) at (B, N) -> (B, N, D)."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


class Scorer(nn.Module):
    """A backbone with ``last_hidden_state`` (B, L, D), and ordinal heads on the candidate: the mean
    and the last of its states, and the mean and the maximum of its :class:`Comparison`."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        text = self.config.get_text_config()
        width, heads = 4 * int(text.hidden_size), int(text.num_attention_heads)
        self.comparison = Comparison(int(text.hidden_size), heads)
        self.norm = nn.LayerNorm(width)
        self.direction = nn.Linear(width, len(DIMENSIONS), bias=False)
        # The thresholds fall from the start, as P(grade > k) falls with k. Most are positive,
        # because grades concentrate at the top.
        self.thresholds = nn.Parameter(torch.linspace(2, -1, THRESHOLDS).repeat(len(DIMENSIONS), 1))

    @property
    def config(self) -> Any:
        """The backbone's config."""
        return self.backbone.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Enable gradient checkpointing of the backbone, as for transformers' models."""
        inner: Any = self.backbone
        inner.gradient_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidate: Tensor,
        facts: Tensor,
        words: Tensor,
        lines: Tensor,
        heading: Tensor,
    ) -> Tensor:
        """The logits that each grade is above 1, 2, 3 and 4.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            candidate: (B, L), True for the candidate's tokens.
            facts: (B, L), True for the tokens of the facts.
            words: (B, L), equal for tokens that are the same word but for case and spaces.
            lines: (B, L), the number of the fact from 1; 0 for other tokens.
            heading: (B, L), True for the tokens that say what kind of fact follows.

        Returns:
            (B, K, T).
        """
        states: Tensor = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        # The backbone may compute in bfloat16, in which a sum over many tokens loses digits.
        states = states.float()
        share = candidate.float()[..., None]
        mean = (states * share).sum(1) / share.sum(1)
        # argmax knows no bools and finds the first maximum, which from the end is the last
        # candidate token. (B,)
        last = candidate.shape[1] - 1 - candidate.flip(1).int().argmax(1)
        inner: Any = self.backbone
        embeddings: Tensor = inner.get_input_embeddings()(input_ids).float()
        heads = self.comparison.line_heads(embeddings, lines, heading)
        compared, there = self.comparison(states, heads, words, candidate, facts)
        found = (compared * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        most = compared.masked_fill(~there[..., None], -torch.inf).amax(1)
        pooled = torch.cat([mean, states[torch.arange(len(states)), last], found, most], dim=-1)
        # (B, K, 1) + (K, T): one direction per dimension, which keeps the thresholds rank
        # consistent.
        return self.direction(self.norm(pooled))[..., None] + self.thresholds

    def heads(self) -> dict[str, Tensor]:
        """All weights except the backbone's, by name."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("backbone.")
        }


def ordinal_loss(logits: Tensor, grades: Tensor) -> Tensor:
    """CORAL's loss: the mean binary cross-entropy of the thresholds.

    Args:
        logits: (B, K, T).
        grades: (B, K), 1 to 5.

    Returns:
        (B,) in nats.
    """
    # (B, K, T)
    above = grades[..., None] > torch.arange(LOWEST, HIGHEST, device=grades.device)
    losses = F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none")
    return losses.mean((1, 2))


def expected_grades(logits: Tensor) -> Tensor:
    """(B, K, T) logits -> (B, K) expected grades, 1 to 5: 1 plus the probability of each
    threshold being exceeded."""
    return LOWEST + torch.sigmoid(logits).sum(-1)


class Tokens(NamedTuple):
    """The tokens of an item; the last ``candidate`` ones are the candidate's, and the ``facts``
    ones before them those of the facts."""

    ids: list[int]
    candidate: int
    facts: int
    lines: list[int]
    """Tokens of each line of facts."""
    heads: list[int]
    """Tokens of the head of each line."""


class Reader:
    """Tokenises items: question, facts, then the candidate.

    The candidate is tokenised separately and as plain text, so nothing in it becomes a special
    token. A candidate that is too long is truncated; question and facts never are.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
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
        """The item's tokens; None if it does not fit into ``max_length``."""
        start: list[int] = [] if (one := self.tokenizer.cls_token_id) is None else [one]
        start += self._ids(_QUESTION.format(prompt=item.prompt))
        facts, lines, heads = self._facts(item.facts)
        room = self.max_length - len(start) - len(facts) - len(self.end)
        if room < MIN_CANDIDATE_TOKENS:
            return None
        candidate = [*self._ids(sanitized(item.completion))[:room], *self.end]
        if not candidate:
            return None
        ids = [*start, *facts, *candidate]
        return Tokens(ids, len(candidate), len(facts), lines, heads)

    def _read_facts(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of the facts, and the tokens of each line and of its head."""
        ids, lines, heads = [], [], []
        # The head of "- present cues: brows lowered" ends with its colon.
        for line in _FACTS.format(facts=text).splitlines(keepends=True):
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
        return {
            "input_ids": padded,
            "attention_mask": (positions < ends).long(),
            "candidate": (positions >= starts) & (positions < ends),
            "facts": (positions >= before) & (positions < starts),
            "words": self._words[padded],
            **_line_masks(read, padded.shape, before[:, 0].tolist()),
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


def save_scorer(scorer: Scorer, reader: Reader, folder: Path) -> None:
    """Write backbone, heads and tokenizer as safetensors and JSON. Merge adapters first."""
    backbone: Any = scorer.backbone
    backbone.save_pretrained(folder / _BACKBONE)
    reader.tokenizer.save_pretrained(folder / _BACKBONE)
    heads = {name: value.detach().cpu().contiguous() for name, value in scorer.heads().items()}
    save_file(heads, folder / _HEADS)
    settings = {"format": _FORMAT, "dimensions": DIMENSIONS, "max_length": reader.max_length}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_scorer(folder: Path) -> tuple[Scorer, Reader]:
    """Load what :func:`save_scorer` wrote, in eval mode on the CPU.

    Raises:
        ConfigError: the folder holds no reward model, or one of another version of mmemo.
        CheckpointError: its weights are damaged or missing.
    """
    settings = _settings(folder)
    if (folder / checkpoint.MANIFEST).exists():
        checkpoint.verify(folder, extra_ok=True)
    kind: Any = AutoModel
    try:
        backbone, info = kind.from_pretrained(
            folder / _BACKBONE, use_safetensors=True, output_loading_info=True
        )
        scorer = Scorer(backbone)
        # The backbone's weights are loaded already; strict would ask for them in this file too.
        wrong = scorer.load_state_dict(load_file(folder / _HEADS), strict=False)
        reader = Reader(
            AutoTokenizer.from_pretrained(folder / _BACKBONE), int(settings["max_length"])
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder}: the reward model cannot be loaded ({reason}); train or fetch it again"
        ) from error
    # from_pretrained only warns of missing weights, and fills them in at random.
    missing = [*info["missing_keys"], *wrong.unexpected_keys]
    missing += [name for name in wrong.missing_keys if not name.startswith("backbone.")]
    if missing:
        raise CheckpointError(
            f"{folder}: weights are missing or unexpected, such as {min(missing)}; train or fetch "
            "the reward model again"
        )
    return scorer.eval(), reader


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        settings: Any = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"'{folder}' is no reward model; name the 'final' folder of mmemo reward-model"
        ) from error
    if not isinstance(settings, dict):
        settings = {}
    found = cast("dict[str, Any]", settings)
    if found.get("format") != _FORMAT or found.get("dimensions") != list(DIMENSIONS):
        raise ConfigError(
            f"'{folder}' is a reward model of another version of mmemo; train it again"
        )
    return found


@torch.inference_mode()
def score_items(
    scorer: Scorer, reader: Reader, items: Sequence[JudgeItem], batch_size: int
) -> list[tuple[float, ...] | None]:
    """The expected grades, 1 to 5, of each item's four dimensions, in order; None for an item that
    does not fit. Batches group items of similar length, which saves padding and changes only
    rounding."""
    device = next(scorer.parameters()).device
    read = [reader.read(item) for item in items]
    order = sorted(
        (index for index, one in enumerate(read) if one is not None),
        key=lambda index: len(cast("Tokens", read[index]).ids),
    )
    found: list[tuple[float, ...] | None] = [None] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = reader.batch([cast("Tokens", read[index]) for index in chosen])
        logits = scorer(**{name: value.to(device) for name, value in batch.items()})
        for index, row in zip(chosen, expected_grades(logits).tolist(), strict=True):
            found[index] = tuple(row)
    return found


class LocalJudgeConfig(Config):
    """A trained reward model as a judge."""

    model: str
    """Folder of the reward model: the ``final`` folder of ``mmemo reward-model``."""
    batch_size: int = Field(default=32, ge=1)
    """Number of items per forward pass."""
    use_cpu: bool = False
    """Score on the CPU even if there is a GPU."""
    rounded: bool = True
    """Round to whole grades, as an endpoint gives them. False keeps the expected grades: groups
    then have fewer ties, and their advantages carry more information."""
    uncalibrated: bool = False
    """Use it even if its calibration is missing or fails (:func:`require_calibration`). The run
    record keeps this with the reward's parameters."""


def require_calibration(config: LocalJudgeConfig, where: str = "judge") -> None:
    """Check that a reward model was shown to read the facts.

    Raises:
        ConfigError: there is no calibration of these weights, or it fails
            (:func:`mmemo.rewards.judge.calibration.refusal`), and ``uncalibrated`` is not set.
    """
    if config.uncalibrated:
        return
    folder = Path(config.model)
    found = read_calibration(folder, scorer_digest(folder))
    reason = (
        "there is no calibration of these weights in it or beside it"
        if found is None
        else refusal(found)
    )
    if reason is not None:
        raise ConfigError(
            f"{where}: the reward model '{config.model}' is refused, because {reason}; train it on "
            "contrasts (mmemo reward-model), or set uncalibrated: true to use it all the same"
        )


def scorer_digest(folder: Path) -> str:
    """SHA-256 of the weights of a reward model, by which its calibration is found."""
    digest = hashlib.sha256()
    for path in (folder / _HEADS, *sorted((folder / _BACKBONE).glob("*.safetensors"))):
        digest.update(path.name.encode())
        if path.exists():
            digest.update(content.sha256(path).encode())
    return digest.hexdigest()


class LocalJudge:
    """A :class:`~mmemo.rewards.judge.rubric.Judge` that runs a reward model in this process.

    ``counts``: ``items``, ``flagged`` (mention the rubric, so they get the lowest grades without
    being scored) and ``too_long`` (question and facts alone exceed the maximum length).

    Raises:
        ConfigError: the folder holds no reward model.
        CheckpointError: its weights are damaged.
    """

    def __init__(self, config: LocalJudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        scorer, self.reader = load_scorer(Path(config.model))
        gpu = torch.cuda.is_available() and not config.use_cpu
        self.scorer = scorer.to(torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu")

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        """The grades of each item, in order. Runs in a thread, so that other rewards continue."""
        return await asyncio.to_thread(self.grade, items)

    def grade(
        self, items: Sequence[JudgeItem], advance: Callable[[int], None] = lambda _: None
    ) -> list[Grades | None]:
        """The grades of each item, in order. ``advance`` is called with the number of items done
        since its last call."""
        grades: list[Grades | None] = []
        # Enough items to group by length, and few enough to report progress in between.
        step = 16 * self.config.batch_size
        for start in range(0, len(items), step):
            grades += self._grade(items[start : start + step])
            advance(len(items[start : start + step]))
        return grades

    def _grade(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        self.counts["items"] += len(items)
        flagged = [mentions_rubric(item.completion) for item in items]
        scored = [item for item, bad in zip(items, flagged, strict=True) if not bad]
        scores = iter(score_items(self.scorer, self.reader, scored, self.config.batch_size))
        grades: list[Grades | None] = []
        for bad in flagged:
            if bad:
                self.counts["flagged"] += 1
                grades.append(WORST)
                continue
            expected = next(scores)
            self.counts["too_long"] += expected is None
            grades.append(None if expected is None else self._grades(expected))
        return grades

    def _grades(self, expected: Sequence[float]) -> Grades:
        if self.config.rounded:  # half up, because Python's round() rounds half to even
            expected = [int(grade + 0.5) for grade in expected]
        return Grades(*(min(HIGHEST, max(LOWEST, grade)) for grade in expected))
