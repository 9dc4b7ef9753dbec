"""``mmemo manifests``: the manifests of a released data set, as the first stage of a pipeline."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from mmemo.config import Config
from mmemo.data.adapter import run_manifest


class ManifestConfig(Config):
    """One manifest of a release."""

    adapter: str
    """The data set adapter, such as ``data/emodb.py``."""
    options: dict[str, str] = Field(default_factory=dict[str, str])
    """Its options, such as ``split: train``."""

    @field_validator("options", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        # YAML reads "fold: 1" as a number, and options are texts.
        if not isinstance(value, dict):
            return value
        return {
            key: str(one) if isinstance(one, int | float) and not isinstance(one, bool) else one
            for key, one in value.items()  # pyright: ignore[reportUnknownVariableType]
        }


class ManifestsConfig(Config):
    """The manifests of one release."""

    output_dir: str
    """Folder for the manifests."""
    root: str
    """The release's folder, which the media paths of the rows are relative to."""
    manifests: dict[str, ManifestConfig] = Field(min_length=1)
    """Name of each manifest, without ``.jsonl``. A later one may read an earlier one."""


def run_manifests(config: ManifestsConfig) -> None:
    """Write the manifests in their order, each whole or not at all.

    Raises:
        ConfigError, DataError: see :func:`mmemo.data.adapter.write_manifest`.
    """
    for name, one in config.manifests.items():
        output = Path(config.output_dir) / f"{name}.jsonl"
        run_manifest(one.adapter, Path(config.root), output, one.options)
