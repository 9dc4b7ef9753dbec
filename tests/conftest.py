"""Options of the heavier tiers."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-weights",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="where the real_weights tier keeps what it fetches "
        "(default: ~/.cache/mmemo-tests/real_weights)",
    )
