"""Tokens that LoRA trains beside its matrices: rows of the embedding and of the head.

LoRA leaves both frozen, so that a token which the pretrained model never learnt, such as a new tag
or the name of an action unit, stays nearly impossible to say. PEFT trains single rows
(``trainable_token_indices``) or whole modules (``modules_to_save``), keeps tied weights tied, and
saves both in the adapter's own file.

Sources: PEFT's ``TrainableTokens``; ``LoraConfig.ensure_weight_tying``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmemo.errors import ConfigError
from mmemo.models.config import AdapterConfig

_TIEABLE = ("embed_tokens", "lm_head")
"""Names of modules that PEFT can keep tied when it saves them whole."""


def token_id(tokenizer: Any, name: str) -> int:
    """The id of a token, named by its text or by its entry in the vocabulary.

    Raises:
        ConfigError: the name is several tokens, or none.
    """
    # The text comes first: a space before a word is written differently in every vocabulary.
    ids: list[int] = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    known: dict[str, int] = tokenizer.get_vocab()
    if name in known:
        return known[name]
    raise ConfigError(
        f"lora.trainable_tokens: '{name}' is {len(ids)} tokens of this tokenizer, not one; name "
        "one token, with the space before it if it has one, or add it with model.new_tokens"
    )


def peft_fields(
    model: Any, section: AdapterConfig, tokenizer: Any | None, new_tokens: Sequence[str]
) -> dict[str, Any]:
    """``trainable_token_indices``, ``modules_to_save`` and ``ensure_weight_tying`` of a section, as
    PEFT's config takes them; the first two are None and empty where nothing is asked for.

    Args:
        model: the model without an adapter.
        new_tokens: what ``trainable_tokens: new`` stands for.

    Raises:
        ConfigError: a token is unknown, or PEFT cannot train it in this model.
    """
    fields: dict[str, Any] = {"trainable_token_indices": None, "modules_to_save": []}
    fields["ensure_weight_tying"] = False
    if section.trainable_tokens is None and not section.modules_to_save:
        return fields
    table, head = model.language_model.get_input_embeddings(), model.lm_head
    places = {
        "embed_tokens": next(name for name, one in model.named_modules() if one is table),
        "lm_head": next(name for name, one in model.named_modules() if one is head),
    }
    tied = table.weight is head.weight
    if section.modules_to_save:
        wanted = [places[name] for name in section.modules_to_save]
        if tied and any(name.rpartition(".")[2] not in _TIEABLE for name in places.values()):
            raise ConfigError(
                f"lora.modules_to_save: the embedding '{places['embed_tokens']}' is tied to the "
                "head, which PEFT keeps so only under the name embed_tokens; use "
                "lora.trainable_tokens=all"
            )
        # Of tied modules, one is trained and the other one follows.
        fields["modules_to_save"] = [places["embed_tokens"]] if tied else wanted
        fields["ensure_weight_tying"] = tied
        return fields
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            "lora.trainable_tokens: this model's head has a bias, which PEFT would drop; use "
            "lora.modules_to_save=[embed_tokens, lm_head]"
        )
    ids = _ids(section, tokenizer, new_tokens, table)
    fields["trainable_token_indices"] = {
        place: ids for name, place in places.items() if name == "embed_tokens" or not tied
    }
    return fields


def _ids(
    section: AdapterConfig, tokenizer: Any | None, new_tokens: Sequence[str], table: nn.Module
) -> list[int]:
    given, embedding = section.trainable_tokens, table
    if given == "all":
        weight: Any = embedding.weight
        return list(range(weight.shape[0]))
    names = list(new_tokens) if given == "new" else list(given or [])
    if not names:
        raise ConfigError(
            "lora.trainable_tokens is 'new', but model.new_tokens names none; name the tokens"
        )
    if tokenizer is None:
        raise ConfigError("lora.trainable_tokens needs the model's tokenizer")
    return sorted({token_id(tokenizer, name) for name in names})
