"""A causal LM that needs no download: a small Llama, and a tokenizer trained on given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmemo.errors import ConfigError
from mmemo.models.composed.configuration import SPECIAL_TOKEN
from mmemo.models.config import ScratchConfig

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Tags that are one token each. They are not special tokens, so decoded answers keep them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, so that replacing the LM by an instruct model later does not change the prompts."""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer with the media tokens. It is deterministic.

    Raises:
        ConfigError: there are no texts.
    """
    if not any(text.strip() for text in texts):
        raise ConfigError("text.scratch trains a tokenizer, but there are no texts to train it on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *SPECIAL_TOKEN.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        # All 256 bytes make it lossless. They are sorted, because token ids follow their order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    # Tags are cut out first, because merges across them would never be used.
    chunks = [chunk for text in [*roles, *texts] for chunk in _without_tags(text)]
    tokenizer.train_from_iterator(chunks, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=START
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.clean_up_tokenization_spaces = False
    return wrapped


def _without_tags(text: str) -> list[str]:
    # Placeholders never reach the tokenizer either: the processor replaces them first.
    for tag in (*TAGS, "<video>", "<audio>", "<face>"):
        text = text.replace(tag, "\x00")
    return [chunk for chunk in text.split("\x00") if chunk]


def build_llama(config: ScratchConfig, tokenizer: Any) -> LlamaForCausalLM:
    """Build a Llama with random weights and tied input and output embeddings."""
    values = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(values)
