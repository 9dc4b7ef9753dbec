"""What a study file says, and the pipelines that it stands for.

A study is three levels of ordinary pipelines, each in its own folder::

    <output_dir>/shared               made once
    <output_dir>/seeds/<seed>/start   made once a seed
    <output_dir>/seeds/<seed>/<arm>   one for each arm and seed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from mmemo import content
from mmemo.config import Config, apply_overrides, nearest, parse, read_yaml
from mmemo.errors import ConfigError
from mmemo.train.pipeline import StageConfig, filled

VARIABLES = ("run", "seed", "arm", "shared", "start")
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class ArmConfig(Config):
    """One arm: how it differs from the common ``stages``."""

    overrides: dict[str, list[str]] = {}
    """Stage name to overrides, which come after the stage's own."""
    skip: list[str] = []
    """Common stages that this arm does without."""
    stages: list[StageConfig] | None = None
    """This arm's own stages, in place of the common ones."""


class MetricConfig(Config):
    """Where a run's number stands."""

    stage: str
    """The stage whose folder holds the file: one of the arm's, or of the levels above."""
    path: str
    """Keys into the file, joined by dots: ``tasks.emotion.average.value``."""
    file: str = "results.json"
    """A JSON file in the stage's folder."""
    better: Literal["higher", "lower"] | None = None
    percent: bool = False
    """Show a share as percent."""


class StudyConfig(Config):
    """Arms times seeds, each an ordinary pipeline; what they share is made once.

    ``${run}`` in a stage's config is the folder of the level that the stage belongs to, but
    ``${run}/NAME`` is the folder of stage NAME wherever that is made, and ``${run}/store`` is the
    study's one feature store: configs written for a single pipeline serve as they are. Also known:
    ``${seed}``, ``${arm}``, ``${shared}`` and ``${start}``.
    """

    name: str
    output_dir: str
    seeds: list[int] = Field(min_length=1)
    """One run of every arm for each. In ``shared`` stages ``${seed}`` is 0."""
    shared: list[StageConfig] = []
    """Made once for the study: the world, the towers, the features."""
    start: list[StageConfig] = []
    """Made once for each seed: what the seed's arms start from."""
    stages: list[StageConfig] = []
    """Run by every arm, unless it says otherwise."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """In the order of the table."""
    metrics: dict[str, MetricConfig] = Field(min_length=1)
    reference: str | None = None
    """The arm that every other arm is compared with, unless ``comparisons`` says otherwise."""
    comparisons: list[tuple[str, str]] | None = None
    """Pairs of arms: the first minus the second."""
    workers: int = Field(default=1, ge=1)
    """Runs at a time. Each gets its share of the processor's cores."""
    publish: str | None = None
    """A folder that gets a copy of the results, the table and the plots at the end."""

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different numbers of 0 or more")
        return seeds

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons: arm minus reference."""
        if self.comparisons is not None:
            return self.comparisons
        return [(arm, self.reference) for arm in self.arms if self.reference not in (None, arm)]  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Cell:
    """One pipeline of the study. ``arm`` is None for what arms share; ``needs`` come before."""

    label: str
    folder: Path
    stages: Mapping[str, tuple[str, Config]]
    """Stage name to verb and resolved config."""
    needs: tuple[str, ...] = ()
    arm: str | None = None
    seed: int = 0
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Stage name to its folder, for this level and those above."""


def read_study(
    path: Path, overrides: list[str], known: Mapping[str, type[Config]]
) -> tuple[StudyConfig, list[Cell]]:
    """A study file, and its pipelines in the order to run them, every config validated.

    Raises:
        ConfigError: something is wrong; the sentence names the level or arm, and the stage.
    """
    path = content.find(path)
    given = apply_overrides(read_yaml(path, later=VARIABLES), overrides)
    study = parse(StudyConfig, given, where=str(path))
    _check_names(study, str(path))
    return study, _Planner(study, path, known).cells()


def arm_stages(study: StudyConfig, name: str) -> list[StageConfig]:
    """The stages of one arm, with its overrides.

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
    if not left:
        raise ConfigError(f"arm '{name}' has no stages; give it some, or `stages` to all arms")
    return [
        stage.model_copy(
            update={"overrides": [*stage.overrides, *arm.overrides.get(stage.name, [])]}
        )
        for stage in left
    ]


def _known(name: str, names: list[str], sentence: str) -> None:
    if name not in names:
        guess = nearest(name, names)
        hint = f"did you mean '{guess}'?" if guess else f"there are: {', '.join(names) or 'none'}"
        raise ConfigError(f"{sentence} '{name}', which is not there; {hint}")


def _check_names(study: StudyConfig, where: str) -> None:
    import re

    for arm in study.arms:
        if arm == "start" or not re.match(_NAME, arm):
            raise ConfigError(f"{where}: '{arm}' cannot name an arm; use letters, digits, _ and -")
    arms = list(study.arms)
    for pair in study.pairs:
        for arm in pair:
            _known(arm, arms, f"{where}: a comparison names arm")
        if pair[0] == pair[1]:
            raise ConfigError(f"{where}: arm '{pair[0]}' is compared with itself; name another")
    if study.reference is not None:
        _known(study.reference, arms, f"{where}: `reference` names arm")
    for arm in arms:
        above = [stage.name for stage in [*study.shared, *study.start]]
        names = [*above, *(stage.name for stage in arm_stages(study, arm))]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{where}: arm '{arm}': stage name '{twice[0]}' is used twice, here or in the "
                "levels above; rename one"
            )
        for metric, config in study.metrics.items():
            _known(config.stage, names, f"{where}: metric '{metric}', arm '{arm}': names stage")


class _Planner:
    def __init__(self, study: StudyConfig, path: Path, known: Mapping[str, type[Config]]) -> None:
        self.study, self.path, self.known = study, path, known
        self.root = Path(study.output_dir)

    def cells(self) -> list[Cell]:
        study, cells = self.study, list[Cell]()
        shared = self.root / "shared"
        needs: tuple[str, ...] = ()
        places: dict[str, Path] = {"store": shared / "store"}
        variables = {"shared": str(shared)}
        if study.shared:
            cells.append(self._cell("shared", shared, study.shared, variables, places))
            needs, places = ("shared",), dict(cells[-1].places)
        for seed in study.seeds:
            folder = self.root / "seeds" / str(seed)
            mine = {**variables, "start": str(folder / "start"), "seed": str(seed)}
            after, above = needs, places
            if study.start:
                label = f"seed {seed}, start"
                cells.append(
                    self._cell(label, folder / "start", study.start, mine, places, needs, seed)
                )
                after, above = (*needs, label), cells[-1].places
            for arm in study.arms:
                stages, label = arm_stages(study, arm), f"seed {seed}, arm {arm}"
                own = {**mine, "arm": arm}
                cells.append(self._cell(label, folder / arm, stages, own, above, after, seed, arm))
        return cells

    def _cell(
        self,
        label: str,
        folder: Path,
        stages: list[StageConfig],
        variables: Mapping[str, str],
        above: Mapping[str, Path],
        needs: tuple[str, ...] = (),
        seed: int = 0,
        arm: str | None = None,
    ) -> Cell:
        where = {f"run/{name}": str(place) for name, place in above.items()}
        variables = {"seed": "0", **variables, "run": str(folder), **where}
        resolved: dict[str, tuple[str, Config]] = {}
        for stage in stages:
            title = f"{label}, stage '{stage.name}'"
            try:
                values: Any = filled(stage, self.path, variables)
            except ConfigError as error:
                raise ConfigError(f"{title}: {error}") from None
            resolved[stage.name] = (
                stage.verb,
                parse(self.known[stage.verb], values, where=title),
            )
        places = {**above, **{stage.name: folder / stage.name for stage in stages}}
        return Cell(label, folder, resolved, needs, arm, seed, places)
