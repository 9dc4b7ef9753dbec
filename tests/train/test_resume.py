"""What a checkpoint has in common with the run that goes on from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmemo.config import Config, dump
from mmemo.train.resume import Identity


class _Terms(Config):
    weight: float = 1.0
    added: int = 5


class _Settings(Config):
    rate: float = 0.1
    later: str | None = "new"
    terms: list[_Terms] = []
    section: _Terms = _Terms()


def identity(**values: Any) -> Identity:
    config = _Settings(**values)
    return Identity(dump(config), {"rows": "a"}, config.model_dump(exclude_defaults=True))


OLD: dict[str, Any] = {
    "config": {"rate": 0.1, "terms": [{"weight": 2.0}], "section": {"weight": 1.0}},
    "inputs": {"rows": "a"},
}
"""Of a version that did not know ``later`` and ``added``."""


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({}, []),
        ({"later": "else"}, ['config.later: null -> "else"']),
        ({"section": {"added": 6}}, ["config.section.added: null -> 6"]),
        ({"rate": 0.2}, ["config.rate: 0.1 -> 0.2"]),
    ],
)
def test_settings_that_a_checkpoint_does_not_know_count_if_they_are_chosen(
    values: dict[str, Any], changed: list[str]
) -> None:
    assert identity(**{"terms": [{"weight": 2}], **values}).changed_from(OLD) == changed


def test_within_one_version_everything_counts() -> None:
    one = identity(later=None, terms=[{"added": 7}])
    assert one.changed_from(json.loads(json.dumps(one.saved))) == []
    assert identity(terms=[{"added": 7}]).changed_from(one.saved) == ['config.later: null -> "new"']
    assert identity(later=None, terms=[{}]).changed_from(one.saved) == [
        'config.terms: [{"weight": 1.0, "added": 7}] -> [{"weight": 1.0, "added": 5}]'
    ]
    assert Identity({"a": 1, "b": 2}).changed_from({"config": {"a": 1}, "inputs": {}}) == [
        "config.b: null -> 2"
    ]
