"""The stages: one record each, which everything that knows about stages reads.

A stage is a unit of work with a config file and an output folder: it makes data, trains, evaluates
or reports. ``mmemo STAGE CONFIG`` runs one, and a pipeline runs several. The command line,
pipelines, studies, ``check``, ``encode``, ``schema`` and the report all read this registry, so a
new stage is one file and one row of ``STAGES``. A stage may also live outside the engine:
``my_stage.py:STAGE`` names a :class:`Stage` in a file, wherever the name of a stage is accepted.

References such as ``mmemo.train.sft:SftConfig`` are imported when they are needed, so that
``mmemo --help`` does not import torch.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmemo import content
from mmemo.config import Config, nearest
from mmemo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a stage's command beside CONFIG, ``--run`` and overrides."""

    flag: str
    """With its dashes: ``--dry-run``."""
    help: str
    metavar: str | None = None
    """Names the option's value in the help. ``N`` is an integer, anything else a path. None: the
    option is a switch."""
    override: str | None = None
    """A config override that the option stands for; ``{}`` is replaced by its value."""
    run: str | Callable[..., Any] | None = None
    """A function that is called in place of the stage's: with the config, and the value if the
    option has one."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What the rest of the suite needs to know about one kind of stage."""

    name: str
    """The command, and the value of ``stage:`` in a pipeline."""
    config: str | type[Config]
    """The config class. It must have a field ``output_dir``."""
    run: str | Callable[..., Any]
    """Does the work, given a config. It must be safe to call again after a kill."""
    check: str | Callable[[Any], Any] | None = None
    """Checks a config and its data before a run, given the config. It raises what is wrong, and
    may return a ``mmemo.check.plan.CheckPlan`` for the common checks. None: the rows of ``inputs``
    are checked, if there are any."""
    inputs: str | Callable[[Any], Any] | None = None
    """Returns the ``mmemo.features.inputs.StageInputs`` of a config: the rows whose clips the stage
    reads, and the model that encodes them. None: the stage reads no encoded clips."""
    trains: bool = False
    """Weights are fitted to the rows that the config names. The report calls nobody from these
    rows held out."""
    ranks: bool = False
    """Can run as several processes: its config has ``run.processes``."""
    shares: bool = False
    """Several processes (``run.processes``) can do parts of its work first, which it then uses."""
    keeps_answers: bool = False
    """Continues in its folder when its inputs changed, because each of its results is stored with
    a key of everything that it depends on."""
    takes_inputs: bool = False
    """Also accepts the config of any encodable stage: ``run`` is then given its inputs."""
    script: str | Callable[..., Any] | None = None
    """Runs a content file in place of a config (``mmemo STAGE FILE.py ...``): it is given the path
    and the other arguments."""
    help: str = ""
    """What the stage does, in one sentence."""
    needs: str = ""
    writes: str = ""
    then: str = ""
    """What to run next."""
    example: str = "CONFIG"
    """Arguments of an example call."""
    options: tuple[Option, ...] = ()
    path: str | None = None
    """``file.py:NAME``, for a stage that was loaded from a file. Set by :func:`stage`."""

    @property
    def encodable(self) -> bool:
        """Whether ``mmemo encode`` can fill the feature store for this stage."""
        return self.inputs is not None

    @property
    def reference(self) -> str:
        """What names this stage on a command line and in a pipeline."""
        return self.path or self.name

    @property
    def config_class(self) -> type[Config]:
        return resolve(self.config)

    @property
    def runner(self) -> Callable[..., Any]:
        """The function that does the stage's work."""
        quiet()
        return resolve(self.run)

    @property
    def checker(self) -> Callable[[Any], Any] | None:
        return None if self.check is None else resolve(self.check)

    def read_inputs(self, config: Config) -> Any:
        """The ``StageInputs`` of a config.

        Raises:
            ConfigError: the stage reads no encoded clips.
            DataError: a row is wrong.
        """
        if self.inputs is None:
            known = ", ".join(one.name for one in STAGES.values() if one.encodable)
            raise ConfigError(
                f"stage '{self.name}' reads no encoded clips, so there is nothing to encode for "
                f"it; give the config of one of these stages: {known}"
            )
        return resolve(self.inputs)(config)


_PROCESSES = Option(
    "--processes",
    "Number of ranks to start on this machine, or on each node (run.processes).",
    metavar="N",
    override="run.processes={}",
)
_RESUMES = "a killed run resumes from its newest checkpoint when the same command is run again"

_BUILT_IN = (
    Stage(
        "manifests",
        config="mmemo.data.manifests:ManifestsConfig",
        run="mmemo.data.manifests:run_manifests",
        help="Turn a released data set into manifests, as the first stage of a pipeline.",
        needs="the folder of the release, and an adapter for it such as data/emodb.py.",
        writes="one JSONL manifest for each name, with every row validated.",
        then="mmemo sft on these manifests; mmemo manifest makes a single one.",
        example="train_configs/emodb/manifests.yaml --run runs/emodb",
    ),
    Stage(
        "world",
        config="mmemo.world.config:WorldConfig",
        run="mmemo.world.render:run_world",
        help="Render a synthetic audiovisual data set whose emotions and cues are known.",
        needs="nothing; no download and no GPU.",
        writes="mp4 clips and JSONL manifests for training, validation, testing and RL.",
        then="mmemo encoders, to train small encoders on these clips.",
        example="train_configs/quickstart/world.yaml --preview sheet.png",
        options=(
            Option(
                "--preview",
                "Write a contact sheet of a few clips instead of the data set.",
                metavar="PNG",
                run="mmemo.world.preview:run_preview",
            ),
        ),
    ),
    Stage(
        "encoders",
        config="mmemo.train.encoders:EncodersConfig",
        run="mmemo.train.encoders:run_encoders",
        check="mmemo.check.stages:check_encoders",
        trains=True,
        help="Train small video, audio and face encoders from scratch on known attributes.",
        needs="a manifest whose rows state attributes of each clip, such as one of mmemo world.",
        writes="one Hugging Face encoder folder for each modality.",
        then="mmemo encode, or mmemo sft with these folders as encoders.",
        example="train_configs/quickstart/encoders.yaml --run runs/quickstart",
    ),
    Stage(
        "encode",
        config="mmemo.features.encode:EncodeConfig",
        run="mmemo.train.encode:run_encode_stage",
        inputs="mmemo.features.encode:encode_inputs",
        ranks=True,
        takes_inputs=True,
        help=(
            "Fill the feature store ahead of training: decode and encode each clip once.\n\n"
            "CONFIG may also be that of a stage that reads clips (sft, grpo, dpo, eval): the "
            "features of all of its rows are then stored where that stage looks for them."
        ),
        needs="a manifest with its media, and the encoders that the config's model names.",
        writes="the feature store, and a list of the clips that cannot be used.",
        then="the stage that reads these clips; it finds their features in the store.",
        example="train_configs/quickstart/encode.yaml --run runs/quickstart --dry-run",
        options=(
            Option(
                "--dry-run",
                "Forecast time and size on disk from a few clips; write nothing.",
                run="mmemo.features.encode:forecast_encode",
            ),
            _PROCESSES,
        ),
    ),
    Stage(
        "pairs",
        config="mmemo.pairs.config:PairsConfig",
        run="mmemo.pairs.build:run_pairs_stage",
        check="mmemo.check.stages:check_pairs",
        shares=True,
        help="Build preference pairs with rejected answers and rejected inputs, and audit them.",
        needs="a manifest, and a source of rejected answers: the truth, a model or an endpoint.",
        writes="pairs.jsonl for mmemo dpo, and report.json with what gives the pairs away.",
        then="mmemo dpo.",
        example="train_configs/quickstart/pairs.yaml --run runs/quickstart",
        options=(_PROCESSES,),
    ),
    Stage(
        "sft",
        config="mmemo.train.sft:SftConfig",
        run="mmemo.train.sft:run_sft",
        check="mmemo.check.stages:check_sft",
        inputs="mmemo.check.stages:sft_inputs",
        trains=True,
        ranks=True,
        help="Fine-tune a model on answers: one stage of the curriculum.",
        needs="a manifest with answers and its media, and a model: a folder, hub ids or scratch.",
        writes=f"checkpoints, metrics and the model in final/; {_RESUMES}.",
        then="mmemo grpo or mmemo dpo to align the model, mmemo eval to test it.",
        example="train_configs/small_real/sft.yaml --train.learning_rate=1e-4",
        options=(_PROCESSES,),
    ),
    Stage(
        "grpo",
        config="mmemo.train.grpo.config:GrpoConfig",
        run="mmemo.train.grpo.train:run_grpo",
        check="mmemo.check.stages:check_grpo",
        inputs="mmemo.check.stages:grpo_inputs",
        trains=True,
        ranks=True,
        help="Improve an SFT model by its rewards (GRPO), with progressive trust in a judge.",
        needs="a model from mmemo sft, a manifest of prompts with labels, and reward functions.",
        writes=f"checkpoints, metrics, completions.jsonl and the model in final/; {_RESUMES}.",
        then="mmemo dpo to ground the answers, mmemo eval to test them.",
        example="train_configs/quickstart/grpo.yaml --run runs/quickstart",
        options=(_PROCESSES,),
    ),
    Stage(
        "dpo",
        config="mmemo.train.dpo.config:DpoConfig",
        run="mmemo.train.dpo.train:run_dpo",
        check="mmemo.check.stages:check_dpo",
        inputs="mmemo.check.stages:dpo_inputs",
        trains=True,
        ranks=True,
        help="Optimise preferences (DPO) for what a clip shows over spurious and imagined cues.",
        needs="a model from mmemo sft or mmemo grpo, and the pairs.jsonl of mmemo pairs.",
        writes=f"checkpoints, metrics and the model in final/; {_RESUMES}.",
        then="mmemo eval to test the model, mmemo export to hand it on.",
        example="train_configs/quickstart/dpo.yaml --run runs/quickstart",
        options=(_PROCESSES,),
    ),
    Stage(
        "reward-model",
        config="mmemo.train.reward_model:RewardModelConfig",
        run="mmemo.train.reward_model:run_reward_model",
        check="mmemo.train.reward_model:check_reward_model",
        trains=True,
        ranks=True,
        help="Train a judge of reasoning on graded answers, and measure how calibrated it is.",
        needs="manifests of graded answers for training and, of other speakers, for testing.",
        writes=f"the judge in final/, and calibration.json; {_RESUMES}.",
        then="mmemo grpo with the judge in reward/reasoning.py.",
        example="train_configs/quickstart/reward_model.yaml --run runs/judge",
        options=(_PROCESSES,),
    ),
    Stage(
        "eval",
        config="mmemo.evaluation.config:EvalConfig",
        run="mmemo.evaluation.runner:run_eval_stage",
        check="mmemo.check.stages:check_eval",
        inputs="mmemo.check.stages:eval_inputs",
        shares=True,
        keeps_answers=True,
        script="mmemo.evaluation.script:run_zero_shot",
        help=(
            "Answer a benchmark with a model and score it, with confidence intervals.\n\n"
            "CONFIG may also be a benchmark itself, with the folder of its release and a model: "
            "mmemo eval eval/dfew.py --data DIR --model MODEL. With --dry-run in place of a model "
            "it checks this copy of the data.\n\n"
            "Reward functions listed under 'scores' grade whole answers too."
        ),
        needs="a model, and a benchmark with its manifest and media.",
        writes="predictions.jsonl and results.json; a killed evaluation keeps its answers.",
        then="mmemo report on the run's folder, or mmemo compare with another evaluation.",
        example="train_configs/quickstart/eval.yaml --run runs/quickstart",
        options=(
            _PROCESSES,
            Option(
                "--engine",
                "What answers: the model in this process (hf), or a vLLM server, which "
                "--run.vllm.url=ADDRESS names (run.engine).",
                metavar="hf|vllm",
                override="run.engine={}",
            ),
            Option(
                "--reliance",
                "Also measure which modalities the answers rely on (reliance.enabled).",
                override="reliance.enabled=true",
            ),
            Option(
                "--baselines",
                "Also ask without the clip and with one stream alone, and add the majority answer "
                "(controls.baselines).",
                override="controls.baselines=true",
            ),
            Option(
                "--paraphrases",
                "Also ask in two more wordings (controls.paraphrases).",
                override="controls.paraphrases=true",
            ),
            Option(
                "--robustness",
                "Also ask about slightly edited sounds and pictures (controls.robustness).",
                override="controls.robustness=true",
            ),
            Option(
                "--nbest",
                "Count the right label among the n most probable ones, such as 1,2,3 "
                "(controls.nbest).",
                metavar="N,...",
                override="controls.nbest=[{}]",
            ),
        ),
    ),
    Stage(
        "export",
        config="mmemo.export.stage:ExportConfig",
        run="mmemo.export.stage:run_export",
        help="Export a trained model as a PEFT adapter, as merged weights, or both.",
    ),
    Stage(
        "report",
        config="mmemo.report.page:ReportConfig",
        run="mmemo.report.page:run_report",
        help="Write one self-contained HTML page about the results of a run.",
    ),
)

STAGES: dict[str, Stage] = {}
"""Every registered stage by name, in the order in which a full run uses them."""

COMPOSITES = {
    "pipeline": "mmemo.experiments.pipeline:PipelineConfig",
    "study": "mmemo.experiments.study_config:StudyConfig",
}
"""Config classes of the files that are made of stages."""

RENAMED = {"towers": "encoders"}
"""Names that stages had in older versions."""


def register(stage: Stage) -> Stage:
    """Add a stage to the registry, and return it.

    Raises:
        ConfigError: the name is taken, or cannot be a command.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stage.name):
        raise ConfigError(
            f"'{stage.name}' cannot name a stage; use lower-case letters, digits, - and _"
        )
    if stage.name in STAGES or stage.name in COMPOSITES or stage.name in RENAMED:
        raise ConfigError(f"there is a stage '{stage.name}' already; give yours another name")
    STAGES[stage.name] = stage
    return stage


for _row in _BUILT_IN:
    register(_row)


def stage(name: str) -> Stage:
    """The stage of a name, or the one that ``file.py:NAME`` names.

    Raises:
        ConfigError: there is none; the sentence names the nearest one.
    """
    if name in STAGES:
        return STAGES[name]
    if name in RENAMED:
        new = RENAMED[name]
        raise ConfigError(f"stage '{name}' is now called '{new}'; write {new} (mmemo {new})")
    if is_path(name):
        found = content.load(name)
        if not isinstance(found, Stage):
            raise ConfigError(f"'{name}' is not a Stage; make it one: mmemo.stages.Stage(...)")
        fields: Any = getattr(found.config_class, "model_fields", {})
        for field in ("output_dir", "run") if found.ranks else ("output_dir",):
            if field not in fields:
                raise ConfigError(f"the config class of '{name}' has no '{field}'; add that field")
        # The stage is not registered, so its path is what names it later (see `reference`).
        return replace(found, path=name)
    guess = nearest(name, list(STAGES))
    hint = f"did you mean '{guess}'?" if guess else f"stages: {', '.join(STAGES)}"
    raise ConfigError(f"there is no stage '{name}'; {hint}")


def recorded(name: str) -> Stage | None:
    """The stage of a name as it stands in the record of a run, which may be that of an older
    version. None: it is not known, as a stage that came from a file, which is not run again to find
    out: a report reads folders that others made."""
    name = RENAMED.get(name, name)
    return STAGES.get(name) or STAGES.get(name.replace("_", "-"))


def trains(name: str) -> bool:
    """Whether the recorded stage of a name trains on its rows. What is not known counts as
    training, so that nobody is called held out by mistake."""
    found = recorded(name)
    return found is None or found.trains


def is_path(name: str) -> bool:
    """Whether a stage's name is that of an object in a file."""
    return ".py:" in name


def config_class(name: str) -> type[Config]:
    """The config class of a stage, of ``pipeline`` or of ``study``.

    Raises:
        ConfigError: there is no such stage.
    """
    return resolve(COMPOSITES[name]) if name in COMPOSITES else stage(name).config_class


def guess(values: dict[str, Any]) -> str:
    """The name of the stage, ``pipeline`` or ``study`` that a config file is for.

    It is the stage whose config class knows most of the keys. Ties go to a class whose required
    keys are all there, then to stages that train in ranks: ``output_dir``, ``model`` and ``data``
    alone are a config of SFT.
    """
    if "arms" in values:
        return "study"
    if "stages" in values:
        return "pipeline"

    def fit(one: Stage) -> tuple[int, bool, bool]:
        fields = one.config_class.model_fields
        complete = all(name in values for name, field in fields.items() if field.is_required())
        return len(set(values) & set(fields)), complete, one.ranks and one.trains

    return max(STAGES.values(), key=fit).name


def stage_of(config: Config) -> Stage | None:
    """The registered stage that a config object belongs to."""
    return next((one for one in STAGES.values() if one.config_class is type(config)), None)


def quiet() -> None:
    """Keep libraries' progress bars and advice from hiding our own; their errors still show."""
    # Imported here, because `mmemo --help` must not wait for torch.
    import torch
    from transformers.utils import logging as transformers_logging

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it has to guess
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides on a command line: ``--section.key=value``.

    Raises:
        ConfigError: there is something else; the sentence says how to write it.
    """
    for place, text in enumerate(arguments):
        if text.startswith("--") and "=" in text:
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else "value"
        hint = f"write {text}={following}" if text.startswith("--") else "remove it"
        raise ConfigError(
            f"'{text}' is not understood; {hint}, or see --help (overrides look like "
            "--section.key=value)"
        )
    return list(arguments)


def resolve(reference: Any) -> Any:
    """The function or class that a field of a :class:`Stage` or an :class:`Option` refers to:
    ``module:name`` is imported, ``file.py:name`` is loaded, anything but text is returned as it is.
    """
    if not isinstance(reference, str):
        return reference
    if is_path(reference):
        return content.load(reference)
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
