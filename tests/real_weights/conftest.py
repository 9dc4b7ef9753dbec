"""The fetched parts, and the tools that some of them need."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_weights import fetch


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest) -> Path:
    """Folder of the fetched parts; what is missing is fetched now, which takes minutes."""
    folder = request.config.getoption("--real-weights") or fetch.DEFAULT
    terminal = request.config.pluginmanager.getplugin("capturemanager")
    with terminal.global_and_fixture_disabled():  # so that the progress is seen
        command = [sys.executable, str(Path(fetch.__file__)), "--into", str(folder)]
        done = subprocess.run(command, check=False)
    if done.returncode != 0:
        pytest.fail("the pretrained parts could not be fetched; see the lines above")
    return Path(folder)


@pytest.fixture
def tools(weights: Path) -> Iterator[None]:
    """Lets the test import the packages of requirements.txt."""
    # Last, so that they never stand before the environment's own.
    sys.path.append(str(weights / "tools"))
    yield
    sys.path.remove(str(weights / "tools"))
