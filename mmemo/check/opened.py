"""What ``mmemo check`` says about reasoning that the chat template's generation prompt opens."""

from __future__ import annotations

from collections.abc import Sequence

from mmemo.answers.prefill import opened_tag
from mmemo.console import console
from mmemo.data.sample import Sample


def show_opened(opened: str, samples: Sequence[Sample], *, answered: bool) -> None:
    """Print what the generation prompt opens, and which answers do not go with it.

    Args:
        opened: as :attr:`~mmemo.models.chat.ChatRenderer.opened`.
        answered: the rows' answers are trained on.
    """
    tag = opened_tag(opened)
    if tag is None:
        return
    console.print(
        f"The generation prompt opens {tag}: completions are read with it, and it is not "
        "among the tokens that are trained on."
    )
    close = f"</{tag[1:]}"
    without = [one.sample_id for one in samples if answered and not _holds(one, close)]
    if without:
        console.print(
            f"  {len(without)} of {len(samples)} answers hold no {close}, such as "
            f"that of '{without[0]}': the model will learn to close {tag} at once. "
            "Add reasoning, or set model.chat_template_path to a template that opens none.",
            style="yellow",
        )


def _holds(sample: Sample, close: str) -> bool:
    answers = [sample.chosen, sample.rejected, *(turn.text for turn in sample.turns[-1:])]
    given = [text.lower() for text in answers if text is not None]
    return any(close.lower() in text for text in given)
