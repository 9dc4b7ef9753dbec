"""A reward model of text: a transformer with one ordinal head for each dimension of the judge.

EmotionThinker's reward model (arXiv 2601.15668) writes its four grades as JSON. Here four heads
read them off one representation: a score costs one forward pass, is finer than whole numbers, and
is never malformed. The heads are CORAL's (Cao, Mirjalili, Raschka, "Rank consistent ordinal
regression", arXiv 1901.07884): one direction w per dimension and a threshold between each two
grades, logit P(grade > k) = w·h + b_k on the representation h. Grades are ordered and pile up at
the top; a squared error would take their steps for equal and draw everything to the mean.

B rows, L tokens, D hidden size, K = 4 dimensions, T = 4 thresholds between five grades.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from mmemo import checkpoint
from mmemo.config import Config
from mmemo.errors import CheckpointError, ConfigError
from mmemo.rewards.judge.rubric import (
    DIMENSIONS,
    HIGHEST,
    LOWEST,
    WORST,
    Grades,
    JudgeItem,
    shown,
    speaks_of_grades,
)

STEPS = HIGHEST - LOWEST
LEAST_TOKENS = 8
"""Of the candidate that must fit beside question and facts for it to be scored."""

_BACKBONE, _HEADS, _SETTINGS = "backbone", "heads.safetensors", "scorer.json"
_FORMAT = 1  # of the folder and of the text that is read; raise it when either changes
_GIVEN = "QUESTION\n{prompt}\n\nFACTS\n{facts}\n\nCANDIDATE\n"


class Scorer(nn.Module):
    """A backbone that gives ``last_hidden_state`` (B, L, D), and the heads on the mean of the
    candidate's states and on its last one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        width = 2 * int(self.config.get_text_config().hidden_size)
        self.norm = nn.LayerNorm(width)
        self.direction = nn.Linear(width, len(DIMENSIONS), bias=False)
        self.thresholds = nn.Parameter(torch.linspace(2, -1, STEPS).repeat(len(DIMENSIONS), 1))

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.backbone.config

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As transformers' models have it."""
        inner: Any = self.backbone
        inner.gradient_checkpointing_enable(**options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, candidate: Tensor) -> Tensor:
        """(B, L) ids, mask, and mask of the candidate's tokens -> (B, K, T) logits that a grade is
        above 1, 2, 3 and 4."""
        states: Tensor = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        states = states.float()
        share = candidate.float()[..., None]
        mean = (states * share).sum(1) / share.sum(1)
        last = candidate.shape[1] - 1 - candidate.flip(1).int().argmax(1)
        pooled = torch.cat([mean, states[torch.arange(len(states)), last]], dim=-1)
        return self.direction(self.norm(pooled))[..., None] + self.thresholds

    def heads(self) -> dict[str, Tensor]:
        """All weights beside the backbone's."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("backbone.")
        }


def ordinal_loss(logits: Tensor, grades: Tensor) -> Tensor:
    """(B, K, T) logits, (B, K) grades 1 to 5 -> (B,) mean binary cross-entropy of the thresholds,
    in nats."""
    above = grades[..., None] > torch.arange(LOWEST, HIGHEST, device=grades.device)
    losses = F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none")
    return losses.mean((1, 2))


def expected_grades(logits: Tensor) -> Tensor:
    """(B, K, T) logits -> (B, K) expected grades, 1 to 5: 1 and the chance of each step above."""
    return LOWEST + torch.sigmoid(logits).sum(-1)


class Reader:
    """Turns items into tokens: question and facts, then the candidate.

    The candidate is tokenised by itself, and as plain text: nothing that it writes becomes a
    special token. One that is too long is cut; question and facts never are.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.end: list[int] = [
            token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None
        ][:1]
        self.pad = int(tokenizer.pad_token_id or 0)

    def read(self, item: JudgeItem) -> tuple[list[int], int] | None:
        """Ids, and how many of the last ones are the candidate's; None where it does not fit."""
        given = _GIVEN.format(prompt=item.prompt, facts=item.facts)
        before = self._ids(given)
        start: list[int] = [] if (one := self.tokenizer.cls_token_id) is None else [one]
        room = self.max_length - len(start) - len(before) - len(self.end)
        if room < LEAST_TOKENS:
            return None
        said = [*self._ids(shown(item.completion))[:room], *self.end]
        if not said:
            return None
        return [*start, *before, *said], len(said)

    def batch(self, read: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """What :class:`Scorer` takes, padded on the right."""
        lengths = [len(ids) for ids, _ in read]
        places = torch.arange(max(lengths))
        ends = torch.tensor(lengths)[:, None]
        starts = ends - torch.tensor([said for _, said in read])[:, None]
        ids = [torch.tensor(one) for one, _ in read]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": (places < ends).long(),
            "candidate": (places >= starts) & (places < ends),
        }

    def _ids(self, text: str) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(found["input_ids"])


def save_scorer(scorer: Scorer, reader: Reader, folder: Path) -> None:
    """Write backbone, heads and tokenizer as safetensors and JSON. Adapters must be merged."""
    backbone: Any = scorer.backbone
    backbone.save_pretrained(folder / _BACKBONE)
    reader.tokenizer.save_pretrained(folder / _BACKBONE)
    heads = {name: value.detach().cpu().contiguous() for name, value in scorer.heads().items()}
    save_file(heads, folder / _HEADS)
    settings = {"format": _FORMAT, "dimensions": DIMENSIONS, "max_length": reader.max_length}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_scorer(folder: Path) -> tuple[Scorer, Reader]:
    """What :func:`save_scorer` wrote, ready to score on the CPU.

    Raises:
        ConfigError: the folder holds no reward model, or one of another version.
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
        wrong = scorer.load_state_dict(load_file(folder / _HEADS), strict=False)
        reader = Reader(
            AutoTokenizer.from_pretrained(folder / _BACKBONE), int(settings["max_length"])
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{folder}: the reward model cannot be loaded ({reason}); train or fetch it again"
        ) from error
    missing = [*info["missing_keys"], *wrong.unexpected_keys]
    missing += [name for name in wrong.missing_keys if not name.startswith("backbone.")]
    if missing:
        raise CheckpointError(
            f"{folder}: lacks or has too many weights, such as {min(missing)}; train or fetch the "
            "reward model again"
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
    """The expected grades, 1 to 5, of each item's four dimensions, in order; None where an item
    does not fit. Batches are made of items of like length, which changes only rounding."""
    device = next(scorer.parameters()).device
    read = [reader.read(item) for item in items]
    order = sorted(
        (index for index, one in enumerate(read) if one is not None),
        key=lambda index: len(cast("tuple[list[int], int]", read[index])[0]),
    )
    found: list[tuple[float, ...] | None] = [None] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = reader.batch([cast("tuple[list[int], int]", read[index]) for index in chosen])
        logits = scorer(**{name: value.to(device) for name, value in batch.items()})
        for index, row in zip(chosen, expected_grades(logits).tolist(), strict=True):
            found[index] = tuple(row)
    return found


# The judge that mmemo trains: grades reasoning in this process, without a server.
#
# What holds for every judge holds here: a candidate that speaks the language of verdicts gets the
# lowest grades unseen, and what cannot be graded has no grade.


class LocalJudgeConfig(Config):
    """A reward model and how it is run."""

    model: str
    """The ``final`` folder of ``mmemo reward-model``."""
    batch_size: int = Field(default=32, ge=1)
    """Items of one forward pass."""
    use_cpu: bool = False
    """Score on the CPU although there is a GPU."""
    rounded: bool = True
    """Whole grades, as an endpoint gives them. False keeps the expected grades between them: a
    group then ties less often, and its advantages say more."""


class LocalJudge:
    """A :class:`~mmemo.rewards.judge.rubric.Judge`. ``counts``: ``items``, ``flagged`` (graded
    lowest unseen) and ``too_long`` (question and facts alone fill the model).

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
        """One result per item, in order. Runs in a thread, so that other rewards go on."""
        return await asyncio.to_thread(self.grade, items)

    def grade(
        self, items: Sequence[JudgeItem], advance: Callable[[int], None] = lambda _: None
    ) -> list[Grades | None]:
        """The same, here and now. ``advance`` is told how many items are done."""
        found: list[Grades | None] = []
        step = 16 * self.config.batch_size
        for start in range(0, len(items), step):
            found += self._grade(items[start : start + step])
            advance(len(items[start : start + step]))
        return found

    def _grade(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        self.counts["items"] += len(items)
        flagged = [speaks_of_grades(item.completion) for item in items]
        asked = [item for item, bad in zip(items, flagged, strict=True) if not bad]
        scores = iter(score_items(self.scorer, self.reader, asked, self.config.batch_size))
        found: list[Grades | None] = []
        for bad in flagged:
            if bad:
                self.counts["flagged"] += 1
                found.append(WORST)
                continue
            one = next(scores)
            self.counts["too_long"] += one is None
            found.append(None if one is None else self._grades(one))
        return found

    def _grades(self, expected: Sequence[float]) -> Grades:
        if self.config.rounded:  # half up: Python's round() goes to the even grade
            expected = [int(grade + 0.5) for grade in expected]
        return Grades(*(min(HIGHEST, max(LOWEST, grade)) for grade in expected))
