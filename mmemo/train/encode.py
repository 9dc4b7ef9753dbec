"""``mmemo encode`` in one process or in several ranks, on one machine or several."""

from __future__ import annotations

from pathlib import Path

from mmemo.features.encode import EncodeConfig, EncodeRunConfig, IngestReport, run_encode
from mmemo.features.inputs import StageInputs
from mmemo.train.distributed import Ranks
from mmemo.train.preflight import preflight


def run_encode_stage(config: EncodeConfig | StageInputs) -> IngestReport:
    """Fill the feature store, together with the other ranks if there are any. Every rank returns
    the report of all.

    Raises:
        ConfigError, TrainingError: as :func:`~mmemo.features.encode.run_encode`.
        TrainingError: the ranks differ, or one of them has ended.
    """
    run = config.run if isinstance(config, EncodeConfig) else EncodeRunConfig()
    ranks = Ranks(timeout=run.ddp_timeout)
    preflight(_compared(config), Path(config.output_dir), ranks)
    return run_encode(config, ranks=ranks)


def _compared(config: EncodeConfig | StageInputs) -> EncodeConfig:
    """What all ranks must have alike."""
    if isinstance(config, EncodeConfig):
        return config
    return EncodeConfig(
        output_dir=config.output_dir,
        model=config.model,
        data=config.parts[0].data,
        store=config.store,
        decode=config.decode,
    )
