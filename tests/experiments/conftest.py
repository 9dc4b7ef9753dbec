"""The toy stages are registered while the tests of this folder run."""

from __future__ import annotations

import pytest

from mmemo import stages
from tests.experiments.toy_stages import EVAL, MAKE


@pytest.fixture(autouse=True)
def toy_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (MAKE, EVAL):
        monkeypatch.setitem(stages.STAGES, stage.name, stage)
