"""The forecast of memory against what steps of the stages were measured to need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check.measured import CASES, config_of, forecast_of, measure, save_base, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("measured")
    write_rows(found)
    for name in {one.base for one in CASES.values()} - {"composed"}:
        save_base(found, name)
    return found


SLOW = {
    "SFT, full, bf16",
    "SFT, full, accumulation",
    "SFT, LoRA, checkpointing",
    "SFT, DoRA",
    "SFT, nf4",
    "SFT, LoRA, large vocabulary",
    "DPO, prompts not shared",
    "GRPO, nf4",
}
"""Cases that are near others, and for which there is no time in every run of the tests. They are in
the page's table like the rest."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.fault) if name in SLOW else name for name in CASES],
)
def test_the_forecast_is_what_a_step_needs(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CASES[name]
    config = config_of(one, folder, tmp_path / "run")
    estimate = forecast_of(config)
    measured = measure(one.stage, config, monkeypatch)
    ratio = estimate.total / measured
    print(f"{name}: forecast {ratio:.2f} of the measured {measured / 1e6:.1f} MB; {estimate}")
    assert 0.8 <= ratio <= 1.2
