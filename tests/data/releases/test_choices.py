"""Questions with choices in the forms that releases have, and the tables that they are in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.adapter import Excluded
from mmemo.data.releases.choices import Choice, choice_rows, media_path, read_choice, split_choices

FOUR = ("happy", "sad", "angry", "calm")


def read(answer: Any = "B", choices: Any = FOUR, means: Any = "auto", **more: Any) -> Any:
    row = {"question": "How?", "choices": choices, "answer": answer, **more}
    found = read_choice(row, "x", answer=means)
    return found.reason if isinstance(found, Excluded) else (found.choices, found.answer)


@pytest.mark.parametrize(
    "choices",
    [
        list(FOUR),
        dict(zip("ABCD", FOUR, strict=True)),
        dict(zip("dcba", reversed(FOUR), strict=True)),
        {"option_a": "happy", "option_b": "sad", "option_c": "angry", "option_d": "calm"},
        json.dumps(FOUR),
        str(list(FOUR)),
        "A. happy B. sad C. angry D. calm",
        "A) happy\nB) sad\nC) angry\nD) calm",
        "(A) happy (B) sad (C) angry (D) calm",
        "Option A: {happy}\n\nOption B: {sad}\n\nOption C: {angry}\n\nOption D: {calm}\n\n",
        ["A. happy", "B. sad", "C. angry", "D. calm"],
        ["<image> happy ", "sad", "angry", "calm", None, "", float("nan")],
    ],
)
def test_forms_of_choices(choices: Any) -> None:
    assert read("B", choices) == (FOUR, "B")
    assert read(" SAD. ", choices) == (FOUR, "B")


def test_choices_in_columns_and_in_the_question() -> None:
    columns = {"question": "How?", "choice_a": "yes", "choice_b": 2, "answer_gt": "yes"}
    assert read_choice(columns, "x") == Choice("How?", ("yes", "2"), "A")
    assert read_choice({**columns, "Choice C": "nan", "choice_d": None}, "x") == read_choice(
        columns, "x"
    )
    inside = {"Question": "<video>\nHow?\nA. yes\nB. no, Mr. A. Smith", "Answer": "(b)"}
    assert read_choice(inside, "x") == Choice("How?", ("yes", "no, Mr. A. Smith"), "B")
    letters = {"question": "How?", "A": "yes", "B": "no", "answer": "B"}
    assert read_choice(letters, "x") == Choice("How?", ("yes", "no"), "B")


def test_a_missing_choice_keeps_the_letters_of_the_others() -> None:
    gap = {"A": "happy", "B": None, "C": "angry"}
    assert read("C", gap) == (("happy", "angry"), "B")
    assert read("C", ["happy", "", "angry"]) == (("happy", "angry"), "B")
    assert read("B", gap) == "answer is none of the choices"


@pytest.mark.parametrize(
    ("answer", "choices", "means", "found"),
    [
        ("(C)", FOUR, "auto", "C"),
        ("c", FOUR, "letter", "C"),
        ("Option C", FOUR, "auto", "C"),
        ("C. angry", FOUR, "auto", "C"),
        (["C"], FOUR, "auto", "C"),
        (2, FOUR, "index", "C"),
        ("2", FOUR, "index", "C"),
        (3, [1, 2, 3, 4], "auto", "C"),
        (3.0, ["1", "2", "3"], "auto", "C"),
        ("two  Words", ["two words", "three words"], "text", "A"),
        ("B", ["B", "A"], "text", "A"),
        ("B", ["B", "A"], "letter", "B"),
        (True, ["True", "False"], "auto", "A"),
    ],
)
def test_forms_of_answers(answer: Any, choices: Any, means: str, found: str) -> None:
    assert read(answer, choices, means)[1] == found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "bored"}, "answer is none of the choices"),
        ({"answer": "E"}, "answer is none of the choices"),
        ({"answer": "C. happy"}, "answer is none of the choices"),
        ({"answer": 2}, "answer is none of the choices"),
        ({"answer": ""}, "no answer"),
        ({"answer": None}, "no answer"),
        ({"answer": float("nan")}, "no answer"),
        ({"answer": "A,C"}, "several right answers"),
        ({"answer": ["A", "C"]}, "several right answers"),
        ({"answer": "B", "choices": ["B", "A"]}, "answer fits several choices"),
        ({"answer": "happy", "choices": ["happy", "Happy ", "sad"]}, "right choice is repeated"),
        ({"answer": "A", "choices": ["happy", "happy", "sad"]}, "right choice is repeated"),
        ({"choices": ["happy"]}, "too few choices"),
        ({"choices": "none here"}, "too few choices"),
        ({"choices": {"A": "x", "a": "y"}}, "too few choices"),
        ({"choices": [str(number) for number in range(27)]}, "too many choices"),
        ({"question": " "}, "no question"),
    ],
)
def test_what_cannot_be_told_is_left_out(row: dict[str, Any], reason: str) -> None:
    assert read(**{"answer": "B", **row}) == reason


def test_wrong_choices_may_repeat() -> None:
    assert read("C", ["sad", "sad", "happy"]) == (("sad", "sad", "happy"), "C")


def test_text_without_choices_stays() -> None:
    for text in ("How does A. Smith feel?", "A. only one", "", "I. Newton B. Franklin"):
        assert split_choices(text) == (text, [])


def test_repeated_ids(tmp_path: Path) -> None:
    table = [
        {"id": "7", "question": "How?", "choices": list(FOUR), "answer": "A"},
        {"id": "7", "question": "How?", "choices": list(FOUR), "answer": "A"},
        {"id": 7, "question": "Why?", "choices": list(FOUR), "answer": "B"},
        {"id": "7-2", "question": "Who?", "choices": list(FOUR), "answer": "B"},
        {"id": "8", "question": "Who?", "choices": list(FOUR)},
        Excluded("t:6", "no JSON"),
        {"question": "Where?", "choices": list(FOUR), "answer": "B"},
    ]
    rows = list(choice_rows(table, lambda values, choice: {"video": "a.mp4"}, prefix="b"))
    left = [row.reason for row in rows if isinstance(row, Excluded)]
    assert left == ["repeated row", "no answer", "no JSON"]
    kept = [row for row in rows if not isinstance(row, Excluded)]
    assert [row["sample_id"] for row in kept] == ["b-7", "b-7-2", "b-7-2-2", "b-6"]
    assert kept[0] == {
        "sample_id": "b-7",
        "prompt": "<video>How?",
        "video": "a.mp4",
        "choices": list(FOUR),
        "gold": "A",
    }


def test_paths_of_other_machines(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").touch()
    for path in (
        "a.mp4",
        "./a.mp4",
        "clips/a.mp4",
        "/data/x/a.mp4",
        "../a.mp4",
        "C:\\x\\a.mp4",
        ["a.mp4"],
    ):
        assert media_path(tmp_path, path, "", "clips") == "clips/a.mp4"
    assert media_path(tmp_path, "b.mp4", "clips", "") == "clips/b.mp4"
    assert media_path(tmp_path, "/x/b.mp4") == "b.mp4"
    assert media_path(tmp_path, "x" * 5000, "clips") == "clips/" + "x" * 5000
    for nothing in (None, "", "..", "a\0b", [], {}):
        assert media_path(tmp_path, nothing) is None


def test_no_row_breaks_the_reader() -> None:
    rng = random.Random(0)
    scalars: list[Any] = [None, "", "A", "b", "A. x", "B. y", "Option A: {x}", "[1, 2]", "nan"]
    scalars += [float("nan"), float("inf"), 3, 1.5, True, "\ud800", "(", "<video>", "9" * 5000]
    scalars += ["{'A': 1}", "A,B", "x B. y", "ﬁ", "²", "[(1, 2, 3)]", 10**400, "{" * 3000]

    def value(depth: int = 0) -> Any:
        kind = rng.randrange(6 if depth < 2 else 3)
        if kind < 3:
            return rng.choice(scalars)
        if kind == 3:
            return [value(depth + 1) for _ in range(rng.randrange(5))]
        return {str(rng.choice("ABCDab1_")): value(depth + 1) for _ in range(rng.randrange(5))}

    keys = ["choices", "options", "choice_a", "choice_b", "choice_c", "A", "B", "answer", "gt"]
    kept = 0
    for number in range(20_000):
        row = {rng.choice(keys): value() for _ in range(rng.randrange(12))}
        row["question"] = value() if number % 9 == 0 else "How?"
        found = read_choice(row, "x", answer=rng.choice(["auto", "letter", "text", "index"]))  # pyright: ignore
        if isinstance(found, Choice):
            kept += 1
            assert found.answer in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found.choices)]
            assert all(found.choices)
            json.dumps([found.question, found.choices]).encode()
        else:
            found.detail.encode()
        media_path(Path("/nowhere"), value())
    assert kept > 20
