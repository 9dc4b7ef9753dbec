"""Which tokens end an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmemo.models.generation import listed_stop_ids, stop_token_ids


@pytest.mark.parametrize(
    ("named", "listed", "all_of_them"),
    [(None, [], [7]), (7, [7], [7]), (3, [3], [3, 7]), ([9, 3], [9, 3], [3, 7, 9])],
)
def test_stop_tokens_are_the_configs_and_the_tokenizers(
    named: Any, listed: list[int], all_of_them: list[int]
) -> None:
    config, tokenizer = SimpleNamespace(eos_token_id=named), SimpleNamespace(eos_token_id=7)
    assert listed_stop_ids(config) == listed
    assert stop_token_ids(config, tokenizer) == all_of_them


def test_a_model_without_a_generation_config_ends_where_its_tokenizer_does() -> None:
    assert stop_token_ids(None, SimpleNamespace(eos_token_id=7)) == [7]
