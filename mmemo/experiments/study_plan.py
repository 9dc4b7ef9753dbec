"""The pipelines of a study, each with a folder, resolved configs, and what must be done before it.

::

    <output_dir>/shared                            made once
    <output_dir>/seeds/<seed>/start                made once for each seed
    <output_dir>/seeds/<seed>/<arm>                one for each arm and seed
    <output_dir>/tuning/<seed>/start               the same for the tuning seeds,
    <output_dir>/tuning/<seed>/<arm>/<point>       with one for each point of an arm's grid
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from mmemo import content, stages
from mmemo.config import Config, parse, save_resolved
from mmemo.errors import ConfigError
from mmemo.experiments.pipeline import HOW, StageConfig, filled
from mmemo.experiments.study_config import (
    Point,
    StudyConfig,
    arm_stages,
    grid_of,
    load_study,
)


@dataclass(frozen=True)
class Cell:
    """One pipeline of the study. ``arm`` is None for what arms share. ``needs`` are the labels of
    the pipelines that must be done first."""

    label: str
    folder: Path
    stages: Mapping[str, tuple[str, Config]]
    """Stage name to what kind of stage it is and its resolved config."""
    needs: tuple[str, ...] = ()
    arm: str | None = None
    seed: int = 0
    point: int | None = None
    """The point of the arm's grid, in tuning."""
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Stage name to its folder, for this level and those above."""
    fingerprint: str = ""
    """Hash of the configs of this level and those above: the same on every machine."""


class Planner:
    """Makes the pipelines of a study file.

    Raises:
        ConfigError: the file or the config of a stage is wrong; the sentence names the level or
            arm, and the stage.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        _file_digest.cache_clear()  # a file may have changed since another study was planned
        self.path = content.find(path)
        self.study: StudyConfig = load_study(path, overrides)
        self.root = Path(self.study.output_dir)
        self._cells: dict[tuple[Any, ...], Cell] = {}
        """What was planned before: a choice changes few of hundreds of configs."""

    def main(self, chosen: Mapping[str, int]) -> list[Cell]:
        """Every arm with every seed. ``chosen``: the point of its grid that each arm uses; the
        first by default."""
        cells = self._shared()
        for seed in self.study.seeds:
            folder = self.root / "seeds" / str(seed)
            made = self._start(cells, folder, seed, "")
            arms: dict[str, Cell] = {}
            # An arm that others are of comes first, whatever its place in the table.
            for arm in sorted(self.study.arms, key=lambda name: self.study.arms[name].of or ""):
                grid = grid_of(self.study, arm)
                point = grid[chosen.get(arm, 0)] if grid else None
                label = f"seed {seed}, arm {arm}"
                arms[arm] = self._arm(label, folder / arm, arm, seed, point, made, arms)
            cells += [arms[arm] for arm in self.study.arms]
        return cells

    def tuning(self, chosen: Mapping[str, int], *, dependent: bool) -> list[Cell]:
        """Every point of every arm's grid with every tuning seed.

        Args:
            chosen: the points that are chosen already.
            dependent: the arms that are of another one, which must have its point by then; else
                the others.
        """
        study = self.study
        arms = [name for name in study.arms if (study.arms[name].of is not None) == dependent]
        arms = [name for name in arms if grid_of(study, name) or name in self._bases()]
        cells = self._shared() if arms else []
        for seed in study.tuning.seeds if study.tuning and arms else []:
            folder = self.root / "tuning" / str(seed)
            made = self._start(cells, folder, seed, "tuning ")
            bases: dict[str, Cell] = {}
            for base in self._bases() if dependent else ():
                bases[base] = self._point(base, chosen.get(base, 0), seed, made, {})
            cells += bases.values()
            for arm in arms:
                points = range(max(1, len(grid_of(study, arm))))
                cells += [self._point(arm, number, seed, made, bases) for number in points]
        return cells

    def check(self) -> list[Cell]:
        """All pipelines of the study, for arms as with the first point of their grids."""
        tuned = [*self.tuning({}, dependent=False), *self.tuning({}, dependent=True)]
        return list({cell.label: cell for cell in [*tuned, *self.main({})]}.values())

    def _bases(self) -> list[str]:
        """The arms on whose models a tuned arm runs."""
        arms = self.study.arms
        found = {arms[name].of for name in arms if arms[name].of and grid_of(self.study, name)}
        return [name for name in arms if name in found]

    def _point(
        self, arm: str, number: int, seed: int, made: Cell | None, bases: Mapping[str, Cell]
    ) -> Cell:
        grid = grid_of(self.study, arm)
        label = f"tuning seed {seed}, arm {arm}, point {number + 1}"
        folder = self.root / "tuning" / str(seed) / arm / str(number + 1)
        return self._arm(
            label, folder, arm, seed, grid[number] if grid else None, made, bases, number
        )

    def _shared(self) -> list[Cell]:
        if not self.study.shared:
            return []
        folder = self.root / "shared"
        above = Cell("", folder, {}, places={"store": folder / "store"})
        return [self._cell("shared", folder, self.study.shared, {}, above)]

    def _start(self, cells: list[Cell], folder: Path, seed: int, kind: str) -> Cell:
        """What the arms of a seed start from; it is added to ``cells`` if it has stages."""
        if cells and cells[0].label == "shared":
            above = cells[0]
        else:
            above = Cell("", folder, {}, places={"store": folder / "store"})
        if not self.study.start:
            return above
        variables = {"start": str(folder / "start"), "seed": str(seed)}
        label = f"{kind}seed {seed}, start"
        made = self._cell(label, folder / "start", self.study.start, variables, above, seed)
        cells.append(made)
        return made

    def _arm(
        self,
        label: str,
        folder: Path,
        arm: str,
        seed: int,
        point: Point | None,
        made: Cell | None,
        arms: Mapping[str, Cell],
        number: int | None = None,
    ) -> Cell:
        base = self.study.arms[arm].of
        above = arms[base] if base is not None else made
        assert above is not None
        first = self.root / ("seeds" if number is None else "tuning") / str(seed) / "start"
        variables = {"start": str(first), "seed": str(seed), "arm": arm}
        stages_ = arm_stages(self.study, arm, point)
        return self._cell(label, folder, stages_, variables, above, seed, arm, number)

    def _cell(
        self,
        label: str,
        folder: Path,
        configs: Sequence[StageConfig],
        variables: Mapping[str, str],
        above: Cell,
        seed: int = 0,
        arm: str | None = None,
        point: int | None = None,
    ) -> Cell:
        key = (label, above.label, above.fingerprint, str([dict(stage) for stage in configs]))
        if key in self._cells:
            return self._cells[key]
        where = {f"run/{name}": str(place) for name, place in above.places.items()}
        shared = {"seed": "0", "shared": str(self.root / "shared")}
        variables = {**shared, **variables, "run": str(folder), **where}
        resolved: dict[str, tuple[str, Config]] = {}
        for stage in configs:
            title = f"{label}, stage '{stage.name}'"
            try:
                values: Any = filled(stage, self.path, variables)
            except ConfigError as error:
                raise ConfigError(f"{title}: {error}") from None
            config = parse(stage.kind.config_class, values, where=title)
            resolved[stage.name] = (stage.stage, config)
        places = {**above.places, **{stage.name: folder / stage.name for stage in configs}}
        needs = (*above.needs, *([above.label] if above.label else []))
        print_ = _fingerprint(resolved, above.fingerprint, self.root)
        made = Cell(label, folder, resolved, needs, arm, seed, point, places, print_)
        return self._cells.setdefault(key, made)


def write_pipeline(cell: Cell) -> None:
    """Write a pipeline file, with every stage's resolved config beside it."""
    rows: list[dict[str, str]] = []
    for name, (stage, config) in cell.stages.items():
        save_resolved(config, cell.folder / "configs" / f"{name}.yaml")
        rows.append({"name": name, "stage": stage, "config": f"configs/{name}.yaml"})
    values = {
        "name": cell.label,
        "output_dir": str(cell.folder),
        "seed": cell.seed,
        "stages": rows,
    }
    (cell.folder / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _fingerprint(resolved: Mapping[str, tuple[str, Config]], above: str, root: Path) -> str:
    """Hash of what decides a pipeline's results, wherever the study's folder lies.

    It holds the settings that the files set, so a later version's new setting, whose default keeps
    the numbers, does not change it. Files that settings name count by their content, those under
    ``root`` by what makes them: the levels above.
    """
    rows: list[Any] = [above]
    for name, (stage, config) in resolved.items():
        values = config.model_dump(mode="json", exclude_unset=True)
        rows.append([name, stage, {key: item for key, item in values.items() if key not in HOW}])
        if stages.is_path(stage):
            rows.append(_file_digest(stage))
    whole = str(root)

    def portable(value: Any) -> Any:
        if isinstance(value, str):
            if value == whole or value.startswith(f"{whole}/"):
                return f"<study>{value.removeprefix(whole)}"
            digest = _file_digest(value)
            return value if digest is None else [Path(value).name, digest]
        if isinstance(value, dict):
            return {key: portable(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, list):
            return [portable(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    text = json.dumps(portable(rows), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=4096)
def _file_digest(text: str) -> str | None:
    """SHA-256 of the file that a setting names; None for any other text."""
    name = text.rpartition(":")[0] if re.search(r"\.py:\w+$", text) else text
    if not name or len(name) > 1024 or "\n" in name:
        return None
    try:
        path = content.find(name)
        return content.sha256(path) if path.is_file() else None
    except (ConfigError, OSError, ValueError):
        return None
