"""What autograd keeps of a layer, where the layer cannot be passed through without values."""

from __future__ import annotations

from typing import Any

import pytest

from mmemo.check.layers import Numbers, Passes, layer_bytes, rule_of_thumb
from tests.models.parts import tiny


def test_a_rule_of_thumb_says_that_it_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Any = tiny().model
    lm, passes = made.language_model, Passes(2, 40, 20)
    kind = type(lm.layers[0])

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("values are needed here")

    monkeypatch.setattr(kind, "forward", fails)
    found = layer_bytes(lm, passes, Numbers())
    assert found == rule_of_thumb(lm.config, passes, Numbers())
    assert layer_bytes(lm, Passes(1, 40, 20), Numbers()).layer == found.layer // 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("by a rule of thumb") == 1
    assert "(values are needed here)" in said
