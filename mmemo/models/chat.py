"""Chat turns to token ids, labels and modality ids, through a tokenizer's chat template.

Shapes: L tokens of a row.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from mmemo.answers import prefill
from mmemo.data.collate import IGNORE_INDEX
from mmemo.data.sample import Modality, Turn
from mmemo.errors import ConfigError, DataError

PLACEHOLDER = re.compile(r"<(video|audio|face)>")
_MARK = "mmemo"
"""Stands for a turn's text where only what the template writes around it is looked at."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One tokenized row: three lists of length L, and the text they were made from.

    ``labels`` is -100 except for the final answer and the token that ends it.
    """

    input_ids: list[int]
    labels: list[int]
    modality_ids: list[int]
    text: str


def control_tokens(
    tokenizer: PreTrainedTokenizerBase, others: Sequence[str] = ()
) -> re.Pattern[str]:
    """Pattern of text that no turn may contain: the tokenizer's special tokens, and ``others``.

    Tags of reasoning are none of them, though some tokenizers list them among their special ones.
    """
    known: Any = tokenizer
    control = {str(t) for t in known.added_tokens_decoder.values() if t.special}
    control.update(known.all_special_tokens)
    control = {token for token in control if not prefill.has_reasoning(token)} | {*others}
    # An alternation takes the first that matches, so the longest token comes first.
    return re.compile("|".join(map(re.escape, sorted(control, key=len)[::-1])))


def check_placeholders(
    text: str, known: Sequence[str], given: Container[Modality] | None
) -> list[str]:
    """The modalities of the placeholders in a row's text, in order.

    Args:
        known: modalities that the model takes.
        given: streams that the row has; None trusts the text.

    Raises:
        DataError: a placeholder is repeated, or has no branch or no stream.
    """
    names: list[Any] = PLACEHOLDER.findall(text)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"there are {names.count(name)} <{name}> in one row; keep one")
        if name not in known:
            has = ", ".join(known) or "text only"
            raise DataError(
                f"the model has no {name} branch for <{name}> (it has: {has}); set "
                "data.modalities to leave it out"
            )
        if given is not None and name not in given:
            raise DataError(f"<{name}> stands for no {name} file; add it or drop <{name}>")
    return names


class ChatRenderer(ABC):
    """Renders chat rows. Subclasses define how a model's placeholders are written."""

    tokenizer: Any
    chat_template: Any
    _control: re.Pattern[str]

    @property
    def opened(self) -> str:
        """What the generation prompt opens and leaves open, such as ``<think>\\n``; else empty.

        It precedes the text of every completion: the model writes only what comes after it.
        """
        chat = [{"role": "user", "content": _MARK}]
        try:
            asked = self._template(chat, generation=True)
        except ConfigError:  # some templates ask for a system turn
            chat = [{"role": "system", "content": _MARK}, *chat]
            asked = self._template(chat, generation=True)
        plain = self._template(chat, generation=False)
        if asked.startswith(plain) and asked != plain:
            return prefill.opened_part(asked[len(plain) :])
        # A template that takes no notice of add_generation_prompt.
        return prefill.opened_part(asked.rpartition(_MARK)[2])

    @abstractmethod
    def expand(self, text: str, modalities: Any = None) -> str:
        """Replace the placeholders of a row's text by special tokens."""

    @abstractmethod
    def modality_ids(self, input_ids: Sequence[int]) -> list[int]:
        """Which branch each token belongs to, as :data:`~mmemo.models.backbone.MODALITY_ID`."""

    def render(
        self,
        turns: Sequence[Turn],
        *,
        generation: bool,
        modalities: Container[Modality],
    ) -> Rendered:
        """Render chat turns through the chat template.

        With ``generation``, a final assistant turn is dropped and the text ends with the template's
        generation prompt. Otherwise the last turn must be the assistant's; its text and the token
        that ends it are the labels. ``modalities`` are the streams that the row has.

        Raises:
            DataError: placeholders are wrong, or there is no answer to train on.
            ConfigError: the chat template is not suitable for training.
        """
        messages = self._messages(turns, modalities)
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        if not answered and not generation:
            raise DataError("the last turn must be the assistant's answer to train on")
        asked = messages[:-1] if answered else messages
        if not asked:
            raise DataError("a row needs a question before the answer")
        prompt = self._template(asked, generation=True)
        ids = self._ids(prompt)
        if generation:
            return Rendered(ids, [IGNORE_INDEX] * len(ids), self.modality_ids(ids), prompt)
        answer = self._answer(prompt, messages)
        # The answer is tokenized apart, so that the prompt has the same tokens as in generation.
        answer_ids = self._ids(answer)
        labels = [IGNORE_INDEX] * len(ids) + self._answer_labels(answer_ids)
        ids = ids + answer_ids
        return Rendered(ids, labels, self.modality_ids(ids), prompt + answer)

    def _messages(
        self, turns: Sequence[Turn], modalities: Container[Modality]
    ) -> list[dict[str, str]]:
        """Turns with placeholders written out; fusion tokens precede the first of the row."""
        mark = "\x00"
        for turn in turns:
            if mark in turn.text:
                raise DataError("the text holds a zero byte; remove it")
            # The tokenizer would read it as a control token, such as the end of a turn.
            found = self._control.search(turn.text)
            if found:
                raise DataError(
                    f"the {turn.role}'s text holds the reserved token '{found.group()}'; remove it"
                )
        spoken = [turn for turn in turns if turn.role != "assistant"]
        # All turns are expanded as one text, in which a placeholder may stand only once.
        texts = iter(self.expand(mark.join(t.text for t in spoken), modalities).split(mark))
        return [
            {"role": t.role, "content": t.text if t.role == "assistant" else next(texts)}
            for t in turns
        ]

    def _template(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        if not self.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template; use an instruct model, or set "
                "model.chat_template_path"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except TemplateError as error:
            raise ConfigError(_refusal(error, messages)) from error
        # A template is a program: a missing key or a wrong type ends it as in Python.
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ConfigError(
                f"the chat template cannot render the row ({type(error).__name__}: {error}); set "
                "model.chat_template_path to one that can"
            ) from error

    def _answer(self, prompt: str, messages: list[dict[str, str]]) -> str:
        """What follows the prompt: the answer and the end of the turn."""
        content = messages[-1]["content"]
        if not content.strip():
            raise DataError("the assistant's answer is empty")
        full = self._template(messages, generation=False)
        opened = self.opened if prefill.opened_tag(prompt) else ""
        answer = full[len(prompt) :]
        begins = full.startswith(prompt)
        whole = opened + answer
        # Templates may trim an answer and move its tags to lines of their own, which loses nothing.
        closed = not opened or prefill.opened_tag(whole) is None
        if begins and closed and prefill.says_all(whole, content):
            return answer
        if opened or prefill.has_reasoning(content):
            written = self._written_out(prompt, messages, opened)
            if written is not None:
                return written
        if not begins:
            raise ConfigError(
                "the chat template does not begin a full chat with its own generation prompt, so "
                "the answer cannot be told from the prompt; set model.chat_template_path to one "
                "that does"
            )
        raise ConfigError(
            "the chat template changes the assistant's text; set model.chat_template_path to "
            "one that does not"
        )

    def _written_out(self, prompt: str, messages: list[dict[str, str]], opened: str) -> str | None:
        """The answer behind the prompt where the template removes reasoning or opens it twice.

        R1's template, for example, keeps only what comes after ``</think>``. None if the template
        does not write the turn's text after the prompt.
        """
        plain = self._template(
            [*messages[:-1], {**messages[-1], "content": _MARK}], generation=False
        )
        head, found, end = plain.rpartition(_MARK)
        if not found or not head.startswith(prompt.removesuffix(opened)):
            return None
        return prefill.continuation(messages[-1]["content"], opened) + end

    def _answer_labels(self, ids: list[int]) -> list[int]:
        """Labels up to the end-of-turn token; text that the template adds after it is ignored."""
        end = self.tokenizer.eos_token_id
        if end not in ids:
            raise ConfigError(
                f"the chat template does not end an answer with '{self.tokenizer.eos_token}', so "
                "the model would not learn to stop; set model.eos_token to the token that does"
            )
        last = len(ids) - 1 - ids[::-1].index(end)
        return ids[: last + 1] + [IGNORE_INDEX] * (len(ids) - last - 1)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _refusal(error: TemplateError, messages: Sequence[Mapping[str, str]]) -> str:
    """What a template's error means for the user, in a sentence."""
    if isinstance(error, TemplateSyntaxError):
        return (
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); correct "
            "the file of model.chat_template_path, or the template of the tokenizer"
        )
    hint = "set model.chat_template_path to a template that takes the row"
    if any(message["role"] == "system" for message in messages):
        hint = f"remove the system turn, or {hint}"
    return f"the chat template refuses a row with the turns {_roles(messages)} ({error}); {hint}"


def _roles(messages: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(message["role"] for message in messages)
