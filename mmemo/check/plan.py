"""What ``mmemo check`` needs to know about a config, whatever stage it is for.

A stage's check function returns a :class:`CheckPlan`, and :func:`mmemo.check.run.run_check` does
the checks that stages have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmemo.data.curriculum import CurriculumConfig
from mmemo.features.inputs import ClipRows, StageInputs
from mmemo.generation.rollout import RolloutConfig
from mmemo.media.config import DecodeConfig
from mmemo.train.config import RunConfig, TrainConfig

if TYPE_CHECKING:  # importing it imports transformers
    from mmemo.models.build import Loaded

ModelCheck = Callable[["Loaded", int | None], tuple[int, int] | None]
"""Called with the loaded model and the most tokens that fit. It may return a pair's tokens that are
trained on together (0: not known), and those of them whose logits are needed: the most of any
pair."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a stage trains, as far as memory, disk and the order of its rows depend on it."""

    train: TrainConfig
    run: RunConfig
    curriculum: CurriculumConfig
    trainable: Sequence[str]
    rollout: RolloutConfig | None = None
    """Completions that are drawn from the model while it trains."""
    max_tokens_per_batch: int | None = None
    """Bound on a forward pass of the update; None: ``per_device_train_batch_size`` prompts."""
    reference: str | None = None
    """A :data:`mmemo.train.reference.ReferenceKind` that is computed in every step, if any."""
    scores: bool = False
    """Each step also computes log-probabilities without gradient."""
    dropout: bool = True
    packing: int | None = None
    """Maximum number of tokens of a sequence of packed rows; None packs none."""
    shared_prefix: bool = True
    """Prompts are computed once for all of their answers."""
    branches: int = 1
    """Of a pair: prompts that answers are scored after with gradient."""
    answers: int = 0
    """Of a pair: answers that are scored with gradient, over all of its branches; 0: rows are no
    pairs."""
    drawn_batches: int = 1
    """Micro-batches of prompts whose completions are drawn together."""


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """Rows, model and sizes of a stage. Without ``inputs`` only rows and files are checked."""

    parts: Sequence[ClipRows]
    """Begins with the rows of the config's ``data``."""
    decode: DecodeConfig
    inputs: StageInputs | None = None
    training: TrainingPlan | None = None
    """None: nothing is trained, so the estimated memory is that of generating."""
    training_of: Callable[[Any], TrainingPlan] | None = None
    """How a config of this stage with other values trains."""
    generation: bool = True
    """Rows are shown as prompts that the model answers. Off: with their answers."""
    new_tokens: int = 0
    """Tokens that may be generated after each prompt, which need room beside it."""
    batch_size: int = 1
    """Rows that are generated together."""
    check_rows: Callable[[], object] | None = None
    """Checks what only this stage has, before the model is loaded."""
    check_model: ModelCheck | None = None
    """The same with the model."""


def plan_of(inputs: StageInputs) -> CheckPlan:
    """The plan of a stage that has no check function of its own: it trains nothing."""
    return CheckPlan(inputs.parts, inputs.decode, inputs)
