"""One tiny data set, with its features stored, for all tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny import write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``rows.jsonl``, ``clips`` and the shared feature store."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    return folder
