"""What reads as language: hand-made answers and token tables, in several scripts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmemo.generation.readable import (
    FEWEST_ANSWERS,
    RARE,
    read_answer,
    shares,
    token_name,
    vocabulary,
    words,
)
from mmemo.models.composed.scratch import train_tokenizer

ANSWERS = [
    f"<think>Face: {one}, brows lowered. Voice: {two}.</think><answer>{one}</answer>"
    for one in ("angry", "happy", "sad")
    for two in ("loud", "calm")
] * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Face: AU12, brows-lowered 3.5!", ["face", "au", "brows", "lowered"]),
        ("They don’t; 'so what'", ["they", "don't", "so", "what"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("cafe\u0301 café", ["café", "café"]),
        ("高兴，因为笑", ["高", "兴", "因", "为", "笑"]),
        ("ＡＩ听到happy笑声", ["ai", "听", "到", "happy", "笑", "声"]),
        ("ดีใจ", ["ดี", "ใ", "จ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("Радость, радость", ["радость", "радость"]),
        ("123 ,.;: \x01\t", []),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_each_sign_is_seen_and_an_answer_of_the_data_shows_none() -> None:
    known = vocabulary(ANSWERS, ["What does the person feel?"])
    assert known.is_closed
    assert known.new_share == 0
    for text in ANSWERS:
        assert read_answer(text, known, tails=[0.5] * 9).flags == []
    garbled = read_answer("<think>Face: angry, inner brows raised.ise: sad</think>", known)
    assert garbled.unknown == ("inner", "raised", "ise")
    assert read_answer("Face: \ufffd\ufffd angry", known).flags == ["invalid_utf8"]
    assert read_answer("the person", known).flags == []  # a question's words may be cited
    tails = [0.9, RARE / 4, 0.2, 0.3]
    assert read_answer("Face: sad", known, tails=tails).flags == []
    tails[1] = 0.99 * RARE / 4
    assert read_answer("Face: sad", known, tails=tails).flags == ["outside_nucleus"]


def test_tags_that_a_template_or_a_reward_asks_for_are_no_words() -> None:
    known = vocabulary([text.partition("</think>")[2] or text for text in ANSWERS], ["Face Voice"])
    for text in (
        "<think>Face: sad</think><answer>sad</answer>",
        "<think>\n</THINK>\n\nsad",
        "< reasoning >sad</ reasoning ><answer>sad",
    ):
        assert not read_answer(text, known).unknown
    assert read_answer("<thing>sad</thing>", known).unknown == ("thing",)
    assert read_answer("I think: sad", known).unknown == ("i", "think")


def test_a_cut_answer_may_end_within_a_word_or_a_character() -> None:
    known = vocabulary(ANSWERS)
    assert read_answer("Face: ang\ufffd", known, ended=False).flags == []
    assert read_answer("Face: ang\ufffd", known).flags == ["invalid_utf8", "unknown_words"]
    assert read_answer("Fa\ufffdce: angry", known, ended=False).invalid
    chinese = vocabulary(["她很高兴。"] * 40)
    assert read_answer("她很高", chinese, ended=False).flags == []
    assert read_answer("她很高饕", chinese, ended=False).unknown == ("饕",)


def test_chinese_answers_are_read_by_characters() -> None:
    known = vocabulary(["表情：眉毛压低。声音：低沉。", "表情：嘴角上扬。声音：响亮。"] * 20)
    assert known.is_closed
    assert read_answer("声音：响亮。表情：眉毛压低。", known).flags == []
    assert read_answer("声音：饕餮。", known).unknown == ("饕", "餮")


def test_words_are_checked_only_where_the_data_repeat_theirs() -> None:
    prose = [f"The person said word{chr(97 + n % 26)}{chr(97 + n // 26)}." for n in range(100)]
    open_data = vocabulary(prose)
    assert open_data.new_share == 1.0
    assert read_answer("Something else entirely.", open_data).unknown is None
    few = vocabulary(ANSWERS[: FEWEST_ANSWERS - 1])
    assert not few.is_closed
    assert not vocabulary([]).is_closed
    # One answer in a hundred may be the only one with a word of its own; two may not.
    assert vocabulary(["one two"] * 99 + ["one three"]).is_closed
    assert not vocabulary(["one two"] * 98 + ["one three", "one four"]).is_closed


def test_shares_leave_out_what_was_not_looked_for() -> None:
    known = vocabulary(ANSWERS)
    read = [read_answer("Face: sad", known), read_answer("Face: \ufffd zzz", known)]
    assert shares(read) == {"readable": 0.5, "invalid_utf8": 0.5, "unknown_words": 0.5}
    assert shares([read_answer("a")]) == {"readable": 1.0, "invalid_utf8": 0.0}
    assert shares([]) == {}


def tails_of(logits: Tensor, tokens: Tensor) -> Tensor:
    chosen = logits.gather(-1, tokens[..., None])
    return (logits.softmax(-1) * (logits <= chosen)).sum(-1)


@pytest.mark.parametrize("flatness", [0.0, 1.0, 6.0])
def test_an_honest_model_is_flagged_at_most_as_often_as_promised(flatness: float) -> None:
    """Flat, ordinary and peaked distributions, over 300 tokens, in answers of 50 tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = flatness * torch.randn(800, 50, 300, generator=generator, dtype=torch.float64)
    uniform = torch.rand(800, 50, 1, generator=generator, dtype=torch.float64)
    cut = (logits.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=299)
    tails = tails_of(logits, cut).tolist()
    flagged = sum(bool(read_answer("", tails=row).outside) for row in tails) / len(tails)
    assert flagged <= 0.02  # 1% and three standard deviations
    if flatness == 6.0:  # at five times the temperature, it is no longer the model that speaks
        hot = ((logits / 5).softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=299)
        rows = tails_of(logits, hot).tolist()
        assert all(read_answer("", tails=row).outside for row in rows)


def test_tokens_are_named_as_a_config_takes_them() -> None:
    tokenizer = train_tokenizer(["The voice is loud and the voice is calm."] * 9, 340)
    for name in (" voice", "The", "<answer>"):
        (token,) = tokenizer.encode(name, add_special_tokens=False)
        assert token_name(tokenizer, token) == name
    byte = tokenizer.convert_tokens_to_ids("ç")  # the byte 0xE7, which is no character alone
    assert token_name(tokenizer, byte) == "ç"
