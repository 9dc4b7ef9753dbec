"""Options of the heavier tiers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow at random moments; how fast something is belongs to the benchmarks.
settings.register_profile("mmemo", deadline=None)
settings.load_profile("mmemo")

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every
# program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_caches_at_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the programs that they start, leave nothing in the user's own caches."""
    os.environ["MMEMO_QUANTIZED"] = str(tmp_path_factory.mktemp("quantized"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-weights",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="where the real_weights tier keeps what it fetches "
        "(default: ~/.cache/mmemo-tests/real_weights)",
    )
