"""The config of a study: stages by level, arms, metrics, tuning and claims."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mmemo import content
from mmemo.config import Config, apply_overrides, nearest, parse, read_yaml
from mmemo.errors import ConfigError
from mmemo.experiments.pipeline import StageConfig

VARIABLES = ("run", "seed", "arm", "shared", "start")
"""Names that ``${...}`` may have in the configs of a study."""
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"

Point = dict[str, list[str]]
"""One point of a grid: stage name to overrides."""


class ArmConfig(Config):
    """One arm: how it differs from the common ``stages``."""

    overrides: dict[str, list[str]] = {}
    """Stage name to overrides, which are applied after the stage's own."""
    skip: list[str] = []
    """Common stages that this arm leaves out."""
    stages: list[StageConfig] | None = None
    """Stages of this arm, in place of the common ones."""
    of: str | None = None
    """Another arm that runs before this one for each seed. ``${run}/NAME`` is then the folder of
    that arm's stage NAME, so that two ways to evaluate can share one trained model."""
    grid: list[Point] | None = None
    """Tuning grid of this arm's own, with as many points as the common one; ``[]`` does not tune
    this arm. By default the common grid, if the arm has the stages that it names."""


class MetricConfig(Config):
    """Where a number of a run is found, or how it is made of other metrics of the same run."""

    stage: str | None = None
    """The stage whose folder holds the file: a stage of the arm or of a level above."""
    path: str | None = None
    """Keys that lead to the number, joined by dots: ``tasks.emotion.average.value``."""
    file: str = "results.json"
    """A JSON file in the stage's folder."""
    min_of: list[str] = []
    """Instead of ``stage`` and ``path``: the smallest of these metrics, such as the accuracy of the
    worse side."""
    sum_of: dict[str, float] = {}
    """Instead of ``stage`` and ``path``: the sum of these metrics, each times its weight."""
    better: Literal["higher", "lower"] | None = None
    """Shown as an arrow beside the metric's name."""
    percent: bool = False
    """Show the number, a share from 0 to 1, as a percentage."""
    margin: float | None = Field(default=None, gt=0)
    """How much worse a comparison may be and still count as equal. The table then says of each
    comparison whether this metric was kept: whether the 95% interval of its difference excludes a
    loss of more than this (a test of non-inferiority). Needs ``better``."""

    @model_validator(mode="after")
    def _from_one_source(self) -> MetricConfig:
        made_of = (self.min_of, self.sum_of)
        if sum([self.stage is not None or self.path is not None, *map(bool, made_of)]) != 1:
            raise ValueError("give one of: stage and path, min_of, sum_of")
        if (self.stage is None) != (self.path is None):
            raise ValueError("stage and path belong together; give both")
        if self.margin is not None and self.better is None:
            raise ValueError("margin needs better: higher or lower")
        return self

    @property
    def sources(self) -> list[str]:
        """The metrics that it is made of."""
        return [*self.min_of, *self.sum_of]


class TuningConfig(Config):
    """A grid of settings that every arm gets, on worlds of its own.

    Each arm runs once with every point of the grid and every tuning seed. The point with the best
    mean of ``maximise`` is the one that the arm uses with the study's seeds; of equal ones, the
    first.
    """

    seeds: list[int] = Field(min_length=1)
    """None of them may be among the study's ``seeds``."""
    grid: list[Point] = Field(min_length=2)
    """The points, each a mapping of stage name to overrides, which are applied last."""
    maximise: str
    """The metric to choose by. With ``sum_of`` it weighs one against another; a metric that is
    better lower has a negative weight there."""


class ClaimConfig(Config):
    """A row of the table of methods: what a method did beside its control."""

    method: str
    """Name of the method, as a paper has it."""
    arm: str
    control: str
    """The arm that differs in the method alone. The two must be among the comparisons."""
    metrics: list[str] = Field(min_length=1)
    """The metrics that the method is meant to change, and those that it must not."""


class StudyConfig(Config):
    """Arms times seeds, each an ordinary pipeline. What they share is made once.

    In a stage's config, ``${run}`` is the folder of the level that the stage belongs to, but
    ``${run}/NAME`` is the folder of stage NAME, whichever level makes it, and ``${run}/store`` is
    the feature store: one for each seed, or one for the whole study if there are ``shared`` stages.
    So configs that were written for a single pipeline work unchanged. ``${seed}``, ``${arm}``,
    ``${shared}`` and ``${start}`` are known as well.
    """

    name: str
    output_dir: str
    seeds: list[int] = Field(min_length=1)
    """Every arm runs once with each seed. In ``shared`` stages ``${seed}`` is 0."""
    shared: list[StageConfig] = []
    """Stages that run once for the whole study."""
    start: list[StageConfig] = []
    """Stages that run once for each seed: what the arms of that seed start from. With the data and
    the encoders here, intervals cover these too; with them in ``shared``, training alone."""
    stages: list[StageConfig] = []
    """Stages that every arm runs, unless it has its own."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The arms by name, in the order of the table."""
    metrics: dict[str, MetricConfig] = Field(min_length=1)
    reference: str | None = None
    """The arm that every other arm is compared with, unless ``comparisons`` is given."""
    comparisons: list[tuple[str, str]] | None = None
    """Pairs of arms to compare: the first minus the second."""
    tuning: TuningConfig | None = None
    claims: list[ClaimConfig] = []
    """The rows of this study in the table of methods."""
    keep: Literal["all", "results"] = "all"
    """``results`` deletes what is large as soon as nothing needs it: an arm's checkpoints once it
    is evaluated, a seed's data, features and models once its arms are done."""
    workers: int = Field(default=1, ge=1)
    """Runs at a time. The CPU cores are divided among them."""
    publish: str | None = None
    """A folder to which the results are copied after every run, and the plots at the end. Runs that
    its ``results.json`` holds with the same config are not run again. A study that is started with
    other seeds replaces what is there, so give it another folder."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different numbers of 0 or more")
        return seeds

    @model_validator(mode="after")
    def _tuning_apart(self) -> StudyConfig:
        both = sorted(set(self.seeds) & set(self.tuning.seeds)) if self.tuning else []
        if both:
            raise ValueError(f"seed {both[0]} is used to tune and to test; use another")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons, each an arm and its reference."""
        if self.comparisons is not None:
            return self.comparisons
        return [(arm, self.reference) for arm in self.arms if self.reference not in (None, arm)]  # pyright: ignore[reportReturnType]


def load_study(path: Path, overrides: list[str]) -> StudyConfig:
    """A study file whose names all lead somewhere. The stages' configs are not read.

    Raises:
        ConfigError: something is wrong.
    """
    given = apply_overrides(read_yaml(content.find(path), later=VARIABLES), overrides)
    study = parse(StudyConfig, given, where=str(path))
    _check_names(study, str(path))
    return study


def arm_stages(study: StudyConfig, name: str, point: Point | None = None) -> list[StageConfig]:
    """The stages of one arm, with its overrides and then those of a point of its grid.

    Raises:
        ConfigError: it skips or overrides a stage that is not there.
    """
    arm = study.arms[name]
    stages = study.stages if arm.stages is None else arm.stages
    names = [stage.name for stage in stages]
    for stage in arm.skip:
        _known(stage, names, f"arm '{name}' skips stage")
    left = [stage for stage in stages if stage.name not in arm.skip]
    for stage in arm.overrides:
        _known(stage, [stage.name for stage in left], f"arm '{name}' overrides stage")
    for stage in point or {}:
        _known(stage, [stage.name for stage in left], f"the grid of arm '{name}' names stage")
    if not left:
        raise ConfigError(
            f"arm '{name}' has no stages; give it `stages` of its own, or `stages` for all arms"
        )
    return [
        stage.model_copy(
            update={
                "overrides": [
                    *stage.overrides,
                    *arm.overrides.get(stage.name, []),
                    *(point or {}).get(stage.name, []),
                ]
            }
        )
        for stage in left
    ]


def grid_of(study: StudyConfig, name: str) -> list[Point]:
    """The points that an arm is tuned over; empty for an arm that is not tuned.

    Raises:
        ConfigError: its own grid has another number of points than the common one.
    """
    if study.tuning is None:
        return []
    own, common = study.arms[name].grid, study.tuning.grid
    if own is None:
        names = {stage.name for stage in arm_stages(study, name)}
        return common if all(set(point) <= names for point in common) else []
    if own and len(own) != len(common):
        raise ConfigError(
            f"arm '{name}' has {len(own)} points in its grid where the others have {len(common)}; "
            "give every arm the same number"
        )
    return own


def _known(name: str, names: list[str], sentence: str) -> None:
    if name not in names:
        guess = nearest(name, names)
        hint = f"did you mean '{guess}'?" if guess else f"there are: {', '.join(names) or 'none'}"
        raise ConfigError(f"{sentence} '{name}', which does not exist; {hint}")


def _check_names(study: StudyConfig, where: str) -> None:
    arms = list(study.arms)
    for arm, config in study.arms.items():
        # The folder seeds/<seed>/start holds what the arms of a seed start from.
        if arm in ("start", "store") or not re.match(_NAME, arm):
            raise ConfigError(f"{where}: '{arm}' cannot name an arm; use letters, digits, _ and -")
        if config.of is not None:
            _known(config.of, arms, f"{where}: arm '{arm}' is of arm")
            if study.arms[config.of].of is not None or config.of == arm:
                raise ConfigError(
                    f"{where}: arm '{arm}' is of '{config.of}', which is no arm by itself; name "
                    "the arm that trains the model"
                )
        if config.grid and study.tuning is None:
            raise ConfigError(f"{where}: arm '{arm}' has a grid; add `tuning` to the study")
        for point in grid_of(study, arm):
            arm_stages(study, arm, point)
    for pair in study.pairs:
        for arm in pair:
            _known(arm, arms, f"{where}: a comparison names arm")
        if pair[0] == pair[1]:
            raise ConfigError(f"{where}: arm '{pair[0]}' is compared with itself; name another")
    if study.reference is not None:
        _known(study.reference, arms, f"{where}: `reference` names arm")
    for arm in arms:
        _check_stages(study, arm, where)
    _check_metrics(study, where)
    for claim in study.claims:
        if (claim.arm, claim.control) not in study.pairs:
            raise ConfigError(
                f"{where}: the claim of '{claim.method}' compares {claim.arm} with "
                f"{claim.control}, which no comparison does; add [{claim.arm}, {claim.control}]"
            )
        for metric in claim.metrics:
            _known(metric, list(study.metrics), f"{where}: a claim names metric")


def _check_stages(study: StudyConfig, arm: str, where: str) -> None:
    above = [stage.name for stage in [*study.shared, *study.start]]
    own = [stage.name for stage in arm_stages(study, arm)]
    twice = sorted({name for name in [*above, *own] if [*above, *own].count(name) > 1})
    if twice:
        raise ConfigError(
            f"{where}: arm '{arm}': stage name '{twice[0]}' is used twice, here or in the "
            "levels above; rename one"
        )
    base = study.arms[arm].of
    names = [*above, *own, *(stage.name for stage in (arm_stages(study, base) if base else []))]
    for metric, config in study.metrics.items():
        if config.stage is not None:
            _known(config.stage, names, f"{where}: metric '{metric}', arm '{arm}': names stage")


def _check_metrics(study: StudyConfig, where: str) -> None:
    read = [name for name, metric in study.metrics.items() if not metric.sources]
    for name, metric in study.metrics.items():
        for source in metric.sources:
            _known(source, read, f"{where}: metric '{name}' is made of metric")
    if study.tuning is not None:
        _known(study.tuning.maximise, list(study.metrics), f"{where}: `tuning.maximise` names")
        if study.metrics[study.tuning.maximise].better == "lower":
            raise ConfigError(
                f"{where}: `tuning.maximise` names '{study.tuning.maximise}', which is better "
                "lower; name a metric with `sum_of` in which it has a negative weight"
            )
