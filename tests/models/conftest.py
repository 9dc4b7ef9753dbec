"""One tiny model for all tests of a file that do not change its weights."""

from __future__ import annotations

import pytest

from mmemo.models.build import Loaded
from tests.models.parts import shake, tiny


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Every branch, attention pre-fusion, eval mode."""
    found = tiny()
    shake(found.model)
    found.model.eval()
    return found
