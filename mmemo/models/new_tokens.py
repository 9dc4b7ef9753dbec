"""Tokens that a user adds to a pretrained model: tags, action units, names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken

from mmemo.errors import ConfigError


def missing_tokens(tokenizer: Any, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are not one token yet, each once.

    Raises:
        ConfigError: a name is empty.
    """
    if not all(name.strip() for name in names):
        raise ConfigError("new_tokens holds an empty text; leave it out")
    known: dict[str, int] = tokenizer.get_vocab()
    return [name for name in dict.fromkeys(names) if name not in known]


def add_tokens(model: Any, tokenizer: Any, names: Sequence[str]) -> bool:
    """Make each of ``names`` one token, in place; returns whether there was anything to do.

    The rows of the embedding and the head of a new token are the mean of those of the tokens that
    its text was before, so that the model knows something of it. The tables grow only if they have
    no spare rows.

    Raises:
        ConfigError: a name is empty.
    """
    new = missing_tokens(tokenizer, names)
    if not new:
        return False
    old = [tokenizer.encode(name, add_special_tokens=False) for name in new]
    # Not special: decoded answers keep them.
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in new])
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # transformers' own resizing to the mean draws rows at random around it.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = {id(w): w for w in (_weight(model, kind) for kind in ("input", "output"))}
    with torch.no_grad():
        for table in tables.values():
            for name, ids in zip(new, old, strict=True):
                # A sum of many rows loses digits in half precision.
                mean = table[ids].float().mean(0)
                table[tokenizer.convert_tokens_to_ids(name)] = mean.to(table.dtype)
    return True


def _weight(model: Any, kind: str) -> torch.Tensor:
    return getattr(model, f"get_{kind}_embeddings")().weight
