"""The two readings against what a person reads, and against attempts to be read wrongly.

``answers.json`` and ``more_answers.json`` hold answers in many forms with the label that a careful
person takes from each; ``attacks.json`` holds forms chosen to mislead a parser.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mmemo.answers import parse
from mmemo.answers.label_set import EMOTION_FORMS, YES_NO
from mmemo.answers.parsing import READINGS, LabelSet, ReadingName, read_label
from mmemo.answers.words import languages
from mmemo.errors import EvaluationError

FOLDER = Path(__file__).parent
FILES = ("answers", "more_answers", "attacks", "held_out", "last_look")
PAGE = FOLDER.parents[1] / "docs/concepts/what-is-read.md"
DECLINED = ("refused", "malformed")
E6 = ("neutral", "angry", "happy", "sad", "worried", "surprise")


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def read(text: str, labels: Any = E6, reading: ReadingName = "verdict") -> str:
    """The label, or the status where there is none."""
    parsed = parse(text, labels, reading)
    return parsed.label or parsed.status


def test_the_files_hold_what_the_page_says() -> None:
    assert len(rows_of("answers")) == 126
    assert len(rows_of("more_answers")) == 239
    assert len(rows_of("attacks")) == 372
    assert len(rows_of("held_out")) == 346
    assert len(rows_of("last_look")) == 160


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reading", READINGS)
def test_no_label_where_a_person_reads_none_and_no_wrong_one(
    name: str, reading: ReadingName
) -> None:
    for row in rows_of(name):
        label = parse(row["answer"], row["labels"], reading).label
        assert label in (None, row["reading"]), (row["answer"], label)


@pytest.mark.parametrize("name", FILES)
def test_the_verdict_is_what_a_person_reads(name: str) -> None:
    rows = rows_of(name)
    unlike = [row for row in rows if read(row["answer"], row["labels"]) != row["reading"]]
    assert len(unlike) <= 0.05 * len(rows), unlike


def test_the_page_has_the_figures() -> None:
    """The rows of its table: kind, answers, and how many each reading reads as a person does."""
    rows = rows_of("answers")
    page = PAGE.read_text(encoding="utf-8")
    total = Counter(row["kind"] for row in rows)
    same = {
        reading: Counter(
            row["kind"]
            for row in rows
            if read(row["answer"], row["labels"], reading) == row["reading"]
        )
        for reading in READINGS
    }
    for kind, n in total.items():
        assert f"| {kind} | {n} | {same['verdict'][kind]} | {same['strict'][kind]} |" in page
    sums = (sum(found.values()) for found in same.values())
    assert "| all | 126 | {} | {} |".format(*sums) in page


NEGATED = (
    "not {}",
    "She is not {}.",
    "The person isn't {} at all.",
    "He does not look {}.",
    "She is never {}.",
    "anything but {}",
    "far from {}",
    "hardly {}",
    "The emotion is not {}.",
    "Answer: not {}",
    "<answer>not {}</answer>",
    "I don't think the person is {}.",
    "There is no sign that she is {}.",
    "non-{}",
    "It would be wrong to say {}.",
    "\\boxed{{not {}}}",
    '{{"emotion": "not {}"}}',
    "他不{}",
    "她并不{}",
    "没有表现出{}",
    "一点也不{}",
    "这不是{}",
    "非{}",
    "看不出{}",
    "情绪不是{}。",
    "nicht {}",
    "Die Person ist überhaupt nicht {}.",
    "Sie wirkt keineswegs {}.",
    "ohne {} zu sein",
    "elle n'est pas {}",
    "Elle ne semble jamais {}.",
    "sans être {}",
    "no está {}",
    "La persona nunca parece {}.",
    "sin estar {}",
    "{}ではない",
    "彼女は{}ではありません",
    "{}とは言えない",
    "{} 하지 않다",
    "그녀는 {} 보이지 않습니다",
    "{}이 아닙니다",
)
SETS = (
    *(tuple(form for form in forms if len(form) > 1) for forms in EMOTION_FORMS[:8]),
    ("高兴", "悲伤", "愤怒", "恐惧", "惊讶", "中性", "开心", "难过", "害怕"),
    ("fröhlich", "traurig", "wütend"),
    ("heureuse", "triste"),
    ("feliz", "enojado"),
    ("嬉しい", "悲しい"),
    ("행복", "슬픔"),
    ("admiration", "grief", "pride", "relief", "remorse", "nervousness"),
    ("positive", "negative"),
    ("ANG", "HAP", "FEA"),
    ("不安", "焦虑"),
)


@pytest.mark.parametrize("template", NEGATED)
def test_a_denied_label_is_never_read(template: str) -> None:
    for labels in SETS:
        for label in labels:
            for reading in READINGS:
                text = template.format(label)
                parsed = parse(text, LabelSet(labels), reading)
                # "no emotion", 不安 and the like are labels of their own behind another negation.
                assert parsed.label is None, (text, reading)


GLUE = [
    *(", ", " ", "/", " or ", " and ", "; ", "\n", "、"),
    *("或", "和", " | ", " > ", "，", " & ", "-"),
]
LISTED = (
    E6,
    ("高兴", "悲伤", "愤怒", "恐惧", "惊讶", "中性"),
    ("positive", "negative", "neutral"),
    ("ANG", "HAP", "FEA"),
    ("pride", "relief", "gratitude", "grief"),
    ("A", "B", "C", "D"),
    ("a", "b", "c", "d"),
    ("0", "1", "2", "3"),
    ("yes", "no"),
    ("嬉しい", "悲しい"),
    ("행복", "슬픔"),
)


@pytest.mark.parametrize("glue", GLUE)
def test_a_list_of_labels_is_never_one(glue: str) -> None:
    for labels in LISTED:
        for size in (2, len(labels)):
            for some in combinations(labels, size):
                for text in (glue.join(some), f"The emotion is {glue.join(some)}."):
                    assert read(text, labels, "strict") in DECLINED, text
                    if glue not in ("-", " > "):  # an arrow or a dash may explain
                        assert read(text, labels) in DECLINED, text


def test_a_label_of_no_known_set_makes_a_list_too() -> None:
    """A reward that knows one label of a set must not take a list for it."""
    for text in ("ANG HAP FEA", "pride, relief, gratitude", "高兴、悲伤", "positive or negative"):
        first = text.replace("、", " ").replace(",", " ").split()[0]
        assert read(f"<answer>{text}</answer>", [first, "happy"], "strict") == "malformed"


@pytest.mark.parametrize(
    ("text", "verdict", "strict"),
    [
        ("happy", "happy", "happy"),
        ("**Happy**", "happy", "happy"),
        ("The emotion is happy.", "happy", "happy"),
        ("她很开心", "happy", "happy"),
        ("情绪是悲伤", "sad", "sad"),
        ("She smiles, so she is happy.", "happy", "malformed"),
        ("happy, joyful", "happy", "malformed"),
        ("I cannot tell.", "refused", "refused"),
        ("", "malformed", "malformed"),
    ],
)
def test_what_the_readings_share_and_where_they_part(text: str, verdict: str, strict: str) -> None:
    assert (read(text), read(text, reading="strict")) == (verdict, strict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The brows are low, so angry or sad?</think> sad", "sad"),
        ("angry?</think><answer>sad</answer>", "sad"),
        ("<think>The brows are low, so angry", "malformed"),
        ("<think>maybe <answer>angry</answer>, but the mouth", "malformed"),
        ("<think>low brows <answer>angry</answer>", "angry"),
        ("<thinking>angry</thinking>sad", "sad"),
        ("<thought>angry</thought>sad", "sad"),
        ("[THINK]angry[/THINK]sad", "sad"),
        ("◁think▷angry◁/think▷sad", "sad"),
        ("<|channel|>analysis<|message|>angry<|channel|>final<|message|>sad", "sad"),
        ("<|channel|>analysis<|message|>angry", "malformed"),
        ("<think>a</think>angry<think>b", "angry"),
        ("＜THINK＞angry＜／think＞sad", "sad"),
    ],
)
def test_reasoning_is_no_answer(text: str, expected: str) -> None:
    assert read(text) == expected


def test_a_caller_may_know_that_the_prompt_opened_the_reasoning() -> None:
    cut = "The brows are low, so angry"
    assert parse(cut, E6).label == "angry"
    assert parse(cut, E6, reasoning_opened=True).status == "malformed"
    assert parse(f"{cut}</think>sad", E6, reasoning_opened=True).label == "sad"


def test_labels_may_be_any_sequence_or_a_set() -> None:
    assert read("No.", ["no", "yes"]) == "no"
    assert read("True", ["Yes", "No"]) == "Yes"
    assert read("高兴", ["happy", "sad"]) == "happy"
    assert read("joy", LabelSet(("happy", "sad"))) == "malformed"
    with pytest.raises(EvaluationError, match="use verdict or strict"):
        parse("happy", E6, "loose")  # pyright: ignore[reportArgumentType]


def test_rewards_read_strictly() -> None:
    long = "<answer>She smiles, so she is happy.</answer>"
    assert read_label(long, E6) is None
    assert read_label(long, E6, reading="verdict") == "happy"
    assert read_label("<answer>happy</answer>", E6) == "happy"
    assert read_label("happy", E6) is None
    assert read_label("<answer>她不高兴</answer>", ("高兴", "悲伤")) is None


def test_every_language_has_what_reading_needs() -> None:
    assert set(languages()) >= {"en", "zh", "de", "fr", "es", "ja", "ko"}
    for code, language in languages().items():
        denies = {"negation.before", "negation.anywhere"} & set(language.patterns)
        assert denies, code
        assert {"refusal.patterns", "verdict.answer", "negation.none"} <= set(language.patterns)
        assert language.carriers, code
        assert not {"yes", "no", *YES_NO} & set(language.carriers)


GARBAGE = (
    *("a", " ", "{", "[", "<", "*", "_", '"', ",", "\n", "\\boxed{", "<answer>", "<think>"),
    *("</think>", "not ", "happy ", "not happy, or ", 'says "', "不高兴", "因为", "less happy "),
    *("A ", "answer: "),
    *("seems happy but ", "reason:\n", "1. ", "more ", "no sign ", "happy-", '{"answer": ', "n't"),
    *("1. ", "|---|\n", "sad 0.1, ", "-1 ", "~~a", "wait, ", "?no", "not so "),
    *("the overall emotion ", "happy, sad, ", "```json", "$", "|", "没有", "ない", "않"),
)


@pytest.mark.parametrize(
    "text", ["un-happy", "un happy", "anti-happy", "[ ] happy", "☐ happy", "🚫 happy", "~~happy~~"]
)
def test_what_turns_a_label_round_carries_none(text: str) -> None:
    assert read(text, reading="strict") == "malformed"


def test_labels_may_be_signed_numbers() -> None:
    labels = ("-1", "0", "1")
    for reading in READINGS:
        assert [read(text, labels, reading) for text in ("-1", "1", "−1")] == ["-1", "1", "-1"]
        assert read("-1, 0", labels, reading) == "malformed"
    assert read("The polarity is -1.", labels) == "-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"happy": 0.1, "sad": 0.9}', "sad"),
        ("happy: 20%, sad: 80%", "sad"),
        ("happy: 50%, sad: 50%", "malformed"),
        ("happy: 1, sad: 2, angry: 3", "malformed"),  # may be ranks
        ("Happy. Actually, no: sad.", "sad"),
        ("Despite the happy music, he trembles.", "malformed"),
        ("The speaker sounds less happy than sad.", "sad"),
        ("If he had smiled, I would have said happy.", "malformed"),
    ],
)
def test_probabilities_corrections_and_concessions(text: str, expected: str) -> None:
    assert read(text) == expected


def test_no_text_takes_long() -> None:
    """A pattern that backtracks takes minutes over 100 kB; the bound only has to tell it apart."""
    parse("warm up, not happy; nicht, n'est pas, no está, 不, ない, 않", E6)
    start = time.process_time()
    for piece in GARBAGE:
        text = piece * (100_000 // len(piece))
        for labels in (E6, ("A", "B"), ("yes", "no")):
            for reading in READINGS:
                parse(text, labels, reading)
    assert time.process_time() - start < 60


def test_thousands_of_long_answers_take_seconds() -> None:
    filler = "The person speaks with a trembling voice and looks at the floor for a while. " * 12
    start = time.process_time()
    for row in rows_of("answers") * 4:
        parse(filler + row["answer"], row["labels"])
    assert time.process_time() - start < 504 * 0.01  # ten milliseconds each on a busy machine
