"""Every use of what TRL does not promise to keep, and the list of it that tests hold TRL to.

mmemo's GRPO and DPO have trainers of their own: TRL's see images only, copy each prompt for every
answer, and GRPO's splits groups up. What a step computes is TRL's, and tests prove it on
:class:`Recorder`, TRL's own trainer with its rollouts given, and on :class:`PairRecorder`. When TRL
moves, :func:`moved` says by name what to look at.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "trl.GRPOTrainer.compute_loss": (
        *("self", "model", "inputs"),
        *("return_outputs", "num_items_in_batch"),
    ),
    "trl.GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    "trl.GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "trl.GRPOTrainer._calculate_rewards": (
        *("self", "inputs", "prompts", "completions", "completion_ids_list"),
    ),
    "trl.GRPOTrainer._send_telemetry": ("self",),
    "trl.DPOTrainer.compute_loss": (
        *("self", "model", "inputs"),
        *("return_outputs", "num_items_in_batch"),
    ),
    "trl.DPOTrainer._compute_loss": ("self", "model", "inputs", "return_outputs"),
    "trl.DPOTrainer._send_telemetry": ("self",),
    "trl.trainer.utils.add_fused_lm_head": (
        *("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    ),
    "trl.trainer.utils.nanstd": ("tensor", "dim", "keepdim"),
}
"""What is relied on, and its parameters: the loss and the advantages whose definitions
``losses/grpo.py`` and ``rewards/advantages.py`` follow, and what :class:`Recorder` overrides."""

OPTIONS: Mapping[str, Any] = {
    "num_generations": 8,
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "use_bias_correction_kl": True,
    "num_iterations": 1,
    "steps_per_generation": None,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "mask_truncated_completions": False,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
    "vllm_importance_sampling_clip_min": None,
    "max_completion_length": 512,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
}
"""``GRPOConfig`` fields that mmemo has under the same names, and their defaults; for
``vllm_importance_sampling_correction`` what mmemo's None stands for with another engine."""

LOSS_INPUTS = ("prompt_ids", "completion_ids", "completion_mask", "advantages")
"""Among the keys of what TRL's loss is given."""

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric")
"""Among the keywords that TRL calls a reward function with; dataset columns come beside them."""


def moved() -> list[str]:
    """Names in TRL that are not what mmemo relies on, each with what was found instead."""
    found = [
        f"{name} has parameters {now}"
        for name, wanted in SIGNATURES.items()
        if (now := _parameters(name)) != wanted
    ]
    defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    for name, wanted in OPTIONS.items():
        if name not in defaults:
            found.append(f"trl.GRPOConfig.{name} is gone")
        elif defaults[name] != wanted:
            found.append(f"trl.GRPOConfig.{name} is {defaults[name]!r} by default")
    return found


def _parameters(name: str) -> tuple[str, ...] | None:
    """Parameter names of a dotted function; None if there is no such thing."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return None if value is None else tuple(inspect.signature(value).parameters)
    return None


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt's group: token ids of the prompt and of its completions, and their rewards.

    ``logps``: the sampler's log-probabilities of the completions' tokens, where it is not the
    trainer itself.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[Sequence[int]]
    rewards: Sequence[float | None]
    logps: Sequence[Sequence[float]] | None = None


@dataclass(slots=True)
class Step:
    """One optimizer step of TRL's. ``inputs`` and ``losses``: of each micro-batch, losses as they
    are accumulated. ``gradients`` and ``weights``: by name, before the optimizer's step."""

    inputs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    losses: list[float] = field(default_factory=list[float])
    gradients: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Recorder(GRPOTrainer):
    """TRL's trainer with given rollouts, which keeps what each of its steps computed.

    Args:
        model: a causal LM. With ``beta``, the reference is loaded from where it came from.
        tokenizer: the model's.
        rollouts: all completions must differ, since rewards are found by them.
        options: ``GRPOConfig``'s; ``num_generations`` is the size of the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        rollouts: Sequence[Rollout],
        options: Mapping[str, Any],
    ) -> None:
        from datasets import Dataset

        self.steps: list[Step] = [Step()]
        self.reward_arguments: set[str] = set()
        self._rollouts = rollouts
        rewards = {
            tuple(ids): reward
            for group in rollouts
            for ids, reward in zip(group.completion_ids, group.rewards, strict=True)
        }

        def reward(completion_ids: list[list[int]], **rest: Any) -> list[float | None]:
            self.reward_arguments |= {"completion_ids", *rest}
            return [rewards[tuple(ids)] for ids in completion_ids]

        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType] - it takes any module
            reward_funcs=reward,  # pyright: ignore[reportArgumentType] - None is allowed
            args=GRPOConfig(
                num_generations=len(rollouts[0].completion_ids),
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": [str(at) for at in range(len(rollouts))]}),
            processing_class=tokenizer,
            rollout_func=self._given,
            callbacks=[_Keep(lambda model: _keep(self.steps, model))],
        )
        if rollouts[0].logps is not None:
            # As with a vLLM server, of which nothing is asked: the rollouts are given.
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation: Any = SimpleNamespace(sync_weights=lambda: None)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def _given(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The rollouts of these prompts; each prompt comes as often as its group is large."""
        places = [int(prompt) for prompt in prompts]
        taken = [places[:at].count(place) for at, place in enumerate(places)]
        groups = [self._rollouts[place] for place in places]
        return {
            "prompt_ids": [list(group.prompt_ids) for group in groups],
            "completion_ids": [
                list(group.completion_ids[at]) for group, at in zip(groups, taken, strict=True)
            ],
            "logprobs": [
                list(group.logps[at])
                for group, at in zip(groups, taken, strict=True)
                if group.logps is not None
            ]
            or None,
        }

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps[-1].inputs.append(dict(inputs))
        self.steps[-1].losses.append(float(loss.detach()))
        return loss


class _Keep(TrainerCallback):
    def __init__(self, keep: Callable[[nn.Module], None]) -> None:
        self._call = keep

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._call(model)


def record_steps(
    model: nn.Module, tokenizer: Any, rollouts: Sequence[Rollout], **options: Any
) -> tuple[list[Step], set[str]]:
    """Train with :class:`Recorder`: the steps it took, and the keywords it calls rewards with."""
    trainer = Recorder(model, tokenizer, rollouts, options)
    trainer.train()
    return trainer.steps[:-1], trainer.reward_arguments


class PairRecorder(DPOTrainer):
    """TRL's preference trainer, which keeps what each of its steps computed.

    Args:
        model: a causal LM; ``reference`` is another, which is never changed.
        rows: ``prompt``, ``chosen``, ``rejected`` as texts or as turns.
        options: ``DPOConfig``'s.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        from datasets import Dataset

        self.steps: list[Step] = [Step()]
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType] - it takes any module
            ref_model=reference,  # pyright: ignore[reportArgumentType]
            args=DPOConfig(
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **options,
            ),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=tokenizer,
            callbacks=[_Keep(lambda model: _keep(self.steps, model))],
        )

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps[-1].inputs.append(dict(inputs))
        self.steps[-1].losses.append(float(loss.detach()))
        return loss


def record_pair_steps(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    **options: Any,
) -> list[Step]:
    """Train with :class:`PairRecorder`: the steps it took."""
    trainer = PairRecorder(model, reference, tokenizer, rows, options)
    trainer.train()
    return trainer.steps[:-1]


def _keep(steps: list[Step], model: nn.Module) -> None:
    """Note weights and gradients of the step that ends here, and begin the next."""
    for name, parameter in model.named_parameters():
        steps[-1].weights[name] = parameter.detach().clone()
        if parameter.grad is not None:
            steps[-1].gradients[name] = parameter.grad.detach().clone()
    steps.append(Step())
