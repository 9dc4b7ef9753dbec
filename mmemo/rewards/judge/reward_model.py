"""A reward model: a transformer with one ordinal head per dimension, used as a judge.

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

With :class:`~mmemo.rewards.judge.clip_features.ClipTokens`, features of the clip stand between the
question and the facts, as tokens to which the text model and the comparison attend. The facts may
then be left out, and the candidate is graded beside what the encoders saw and heard.

:class:`LocalJudge` runs a trained model in this process, without a server. As with every judge, a
candidate that mentions the rubric gets the lowest grades without being scored, and what cannot be
scored gets no grade.

B rows, L tokens, D hidden size, H heads, K = 4 dimensions, T = 4 thresholds between five grades.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from transformers import AutoModel, AutoTokenizer

from mmemo import checkpoint, content
from mmemo.config import Config, dump, parse
from mmemo.data.sample import Modality
from mmemo.errors import CheckpointError, ConfigError
from mmemo.features.store import open_store
from mmemo.media.config import DecodeConfig, StoreConfig
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.connectors import collate_features
from mmemo.rewards.judge.calibration import read_calibration, refusal
from mmemo.rewards.judge.clip_features import (
    ClipEncoders,
    ClipFeatures,
    ClipSettings,
    ClipTokens,
)
from mmemo.rewards.judge.comparison import Comparison
from mmemo.rewards.judge.reader import Reader, Tokens
from mmemo.rewards.judge.rubric import (
    DIMENSIONS,
    HIGHEST,
    LOWEST,
    WORST,
    Grades,
    JudgeItem,
    mentions_rubric,
)

THRESHOLDS = HIGHEST - LOWEST
_BACKBONE, _HEADS, _SETTINGS = "backbone", "heads.safetensors", "scorer.json"
_FORMAT = 2  # version of the folder and of the prompt; increase it when either changes


class Scorer(nn.Module):
    """A backbone with ``last_hidden_state`` (B, L, D), and ordinal heads on the candidate: the mean
    and the last of its states, and the mean and the maximum of its :class:`Comparison`.

    Args:
        branches: of the clip's features; without any, it reads text alone.
    """

    def __init__(
        self, backbone: nn.Module, branches: Mapping[Modality, SavedBranchConfig] | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        text = self.config.get_text_config()
        width, heads = 4 * int(text.hidden_size), int(text.num_attention_heads)
        self.comparison = Comparison(int(text.hidden_size), heads, clip=bool(branches))
        self.norm = nn.LayerNorm(width)
        self.direction = nn.Linear(width, len(DIMENSIONS), bias=False)
        # The thresholds fall from the start, as P(grade > k) falls with k. Most are positive,
        # because grades concentrate at the top.
        self.thresholds = nn.Parameter(torch.linspace(2, -1, THRESHOLDS).repeat(len(DIMENSIONS), 1))
        self.clip_tokens = ClipTokens(branches, int(text.hidden_size)) if branches else None

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
        clip: Tensor | None = None,
        **features: Tensor,
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
            clip, features: as for :class:`~mmemo.rewards.judge.clip_features.ClipTokens`.

        Returns:
            (B, K, T).
        """
        inner: Any = self.backbone
        given: dict[str, Tensor] = {"input_ids": input_ids}
        if self.clip_tokens is not None and clip is not None:
            embeds: Tensor = inner.get_input_embeddings()(input_ids)
            given = {"inputs_embeds": self.clip_tokens(embeds, clip, features)}
        states: Tensor = inner(**given, attention_mask=attention_mask).last_hidden_state
        # The backbone may compute in bfloat16, in which a sum over many tokens loses digits.
        states = states.float()
        share = candidate.float()[..., None]
        mean = (states * share).sum(1) / share.sum(1)
        # argmax knows no bools and finds the first maximum, which from the end is the last
        # candidate token. (B,)
        last = candidate.shape[1] - 1 - candidate.flip(1).int().argmax(1)
        embeddings: Tensor = inner.get_input_embeddings()(input_ids).float()
        heads = self.comparison.line_heads(embeddings, lines, heading)
        compared, there = self.comparison(states, heads, words, candidate, facts, clip)
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


def save_scorer(
    scorer: Scorer, reader: Reader, folder: Path, clip: ClipSettings | None = None
) -> None:
    """Write backbone, heads and tokenizer as safetensors and JSON. Merge adapters first.

    Args:
        clip: the branches of the clip's features, if it reads any.
    """
    backbone: Any = scorer.backbone
    backbone.save_pretrained(folder / _BACKBONE)
    reader.tokenizer.save_pretrained(folder / _BACKBONE)
    heads = {name: value.detach().cpu().contiguous() for name, value in scorer.heads().items()}
    save_file(heads, folder / _HEADS)
    settings = {"format": _FORMAT, "dimensions": DIMENSIONS, "max_length": reader.max_length}
    if clip is not None:
        settings |= {"facts": reader.with_facts, "clip": dump(clip)}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_encoders(
    folder: Path, instead: Mapping[Modality, str] | None = None
) -> ClipEncoders | None:
    """The encoders of a reward model, with the features that it was trained on; None if it reads
    text alone.

    Args:
        instead: where encoders are now, by modality.

    Raises:
        ConfigError: the folder holds no reward model, or an encoder is not there or not the same.
    """
    values = _settings(folder).get("clip")
    if values is None:
        if instead:
            raise ConfigError(f"'{folder}' reads text alone; leave encoders out")
        return None
    settings = parse(ClipSettings, values, where=f"{folder / _SETTINGS}: clip")
    branches = dict(settings.branches)
    for name, place in (instead or {}).items():
        if name not in branches or branches[name].encoder is None:
            raise ConfigError(f"encoders.{name}: '{folder}' has no such encoder; leave it out")
        branches[name] = branches[name].model_copy(update={"encoder": place})
    return ClipEncoders(settings.model_copy(update={"branches": branches}))


def load_scorer(folder: Path, encoders: ClipEncoders | None = None) -> tuple[Scorer, Reader]:
    """Load what :func:`save_scorer` wrote, in eval mode on the CPU.

    Args:
        encoders: those of :func:`load_encoders`; None loads them.

    Raises:
        ConfigError: the folder holds no reward model, or one of another version of mmemo.
        CheckpointError: its weights are damaged or missing.
    """
    settings = _settings(folder)
    if (folder / checkpoint.MANIFEST).exists():
        checkpoint.verify(folder, extra_ok=True)
    encoders = encoders or load_encoders(folder)
    branches = {} if encoders is None else encoders.specs
    kind: Any = AutoModel
    try:
        backbone, info = kind.from_pretrained(
            folder / _BACKBONE, use_safetensors=True, output_loading_info=True
        )
        scorer = Scorer(backbone, branches)
        # The backbone's weights are loaded already; strict would ask for them in this file too.
        wrong = scorer.load_state_dict(load_file(folder / _HEADS), strict=False)
        reader = Reader(
            AutoTokenizer.from_pretrained(folder / _BACKBONE),
            int(settings["max_length"]),
            clip_token_counts(branches),
            bool(settings.get("facts", True)),
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


def clip_token_counts(branches: Mapping[Modality, SavedBranchConfig]) -> dict[Modality, int]:
    """Tokens of each branch, in the order of the branches."""
    return {name: spec.tokens for name, spec in branches.items()}


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
    scorer: Scorer,
    reader: Reader,
    items: Sequence[JudgeItem],
    batch_size: int,
    clips: ClipFeatures | None = None,
) -> list[tuple[float, ...] | None]:
    """The expected grades, 1 to 5, of each item's four dimensions, in order; None for an item that
    does not fit, or whose clip has no features in ``clips``. Batches group items of similar length,
    which saves padding and changes only rounding."""
    device = next(scorer.parameters()).device
    read = [reader.read(item) for item in items]
    order = sorted(
        (index for index, one in enumerate(read) if one is not None),
        key=lambda index: len(cast("Tokens", read[index]).ids),
    )
    found: list[tuple[float, ...] | None] = [None] * len(items)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        features: dict[str, Tensor] = {}
        if clips is not None:
            given = {index: clips.get(items[index].clip) for index in chosen}
            chosen = [index for index in chosen if given[index] is not None]
            if not chosen:
                continue
            features = collate_features([given[index] or {} for index in chosen])
        batch = reader.batch([cast("Tokens", read[index]) for index in chosen]) | features
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
    store: StoreConfig = StoreConfig()
    """For a model that reads the clip's features: where they are stored. None as ``path`` is where
    the stages of its own pipeline keep them, ``features`` beside the folder of its run."""
    decode: DecodeConfig = DecodeConfig()
    """Limits on decoding clips whose features are not stored yet."""
    encoders: dict[Modality, str] = {}
    """Where the encoders are now, by modality, if they are no longer where they were in training.
    They must give the same features."""
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
    being scored) and ``too_long`` (question and facts alone exceed the maximum length); with
    features ``no_clip`` and ``bad_clip``
    (:class:`~mmemo.rewards.judge.clip_features.ClipFeatures`).

    Raises:
        ConfigError: the folder holds no reward model, or its encoders are not the same.
        CheckpointError: its weights are damaged.
        StoreError: the feature store cannot be used.
    """

    def __init__(self, config: LocalJudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        folder = Path(config.model)
        encoders = load_encoders(folder, config.encoders)
        scorer, self.reader = load_scorer(folder, encoders)
        gpu = torch.cuda.is_available() and not config.use_cpu
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.scorer = scorer.to(device)
        self.clips: ClipFeatures | None = None
        if encoders is not None:
            store = open_store(config.store, folder.resolve().parent)
            self.clips = ClipFeatures(encoders.to(device), store, config.decode, self.counts)

    def close(self) -> None:
        """End the processes that decode clips. A judge that grades on starts them again."""
        if self.clips is not None:
            self.clips.close()

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
        size, without = self.config.batch_size, self._without_clip
        scores = iter(score_items(self.scorer, self.reader, scored, size, self.clips))
        without = self._without_clip - without
        grades: list[Grades | None] = []
        for bad in flagged:
            if bad:
                self.counts["flagged"] += 1
                grades.append(WORST)
                continue
            expected = next(scores)
            self.counts["too_long"] += expected is None
            grades.append(None if expected is None else self._grades(expected))
        # Those whose clips have no features have no grade either, and a count of their own.
        self.counts["too_long"] -= without
        if self.clips is not None:
            self.clips.flush()
        return grades

    @property
    def _without_clip(self) -> int:
        return self.counts["no_clip"] + self.counts["bad_clip"]

    def _grades(self, expected: Sequence[float]) -> Grades:
        if self.config.rounded:  # half up, because Python's round() rounds half to even
            expected = [int(grade + 0.5) for grade in expected]
        return Grades(*(min(HIGHEST, max(LOWEST, grade)) for grade in expected))
