"""Released scorers of questions with choices: MMSU, OmniBench, HumanVBench, MTMEUR, and lmms-eval's
reading of the first.

Rows have ``raw``, ``choices`` and, in ``truth``, the right letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from mmemo.answers.parsing import answer_text

Rows = Sequence[Mapping[str, Any]]
Numbers = Mapping[str, float]
_FOUR = "ABCD"
_AS_SPELT = "spelt as its choice"
SPELT = "answer"
"""Field of ``group`` that says whether a release's answer is written just as its choice."""


def spelt(exact: bool) -> str:
    """The value of :data:`SPELT`."""
    return _AS_SPELT if exact else "spelt otherwise"


def mmsu(rows: Rows) -> Numbers:
    """MMSU's ``mmsu_evaluation.py``: an answer's first character is its letter if it is one of A to
    D, or else its last but one ("The answer is A."), and with neither the answer is dropped. An
    empty answer, or "None", takes the letter of the answer before it; before the first one the
    script fails, and here it is dropped. An ``answer_gt`` that is spelt otherwise than its choice
    is never right."""
    right = counted = 0
    letter: str | None = None
    reused = 0
    for row in rows:
        text = _text(row).strip().replace("\n", "")
        if text and text != "None":
            found = next((one for one in (text[0], text[-2:-1]) if one in _FOUR and one), None)
            if found is None:
                continue
            letter = found
        else:
            reused += letter is not None
        if letter is None:
            continue
        counted += 1
        exact = (row.get("group") or {}).get(SPELT, _AS_SPELT) == _AS_SPELT
        right += exact and _choice(row, letter) == _choice(row, str(row["truth"]))
    return {**_share(right, counted, rows), "reused": float(reused)}


def mmsu_lmms_eval(rows: Rows) -> Numbers:
    """lmms-eval's task ``mmsu``: MMMU's parser over four choices, missing ones being empty texts,
    which any answer of more than five words contains. Where it finds no letter it draws one at
    random; here the expected value is given, and ``random`` counts these answers."""
    right = 0.0
    drawn = 0
    for row in rows:
        choices = [*map(str, row["choices"]), "", "", ""][:4]
        text = _text(row)
        for mark in ",.!?;:'":
            text = text.strip(mark)
        letter = mmmu_letter(text, choices)
        drawn += letter is None
        right += 1 / len(_FOUR) if letter is None else letter == row["truth"]
    share = right / len(rows) if rows else float("nan")
    return {"lmms_eval_accuracy": share, "lmms_eval_random": float(drawn)}


def omnibench(rows: Rows) -> Numbers:
    """OmniBench's ``calculate_metrics.py``: MMMU's parser, which takes the last of several letters;
    without one the answer is wrong. A letter that ends any word counts, as in "PLAN B "."""
    read = [mmmu_letter(_text(row), [str(one) for one in row["choices"]]) for row in rows]
    right = sum(letter == row["truth"] for letter, row in zip(read, rows, strict=True))
    return {**_share(right, len(rows), rows), "unreadable": float(read.count(None))}


def mmmu_letter(text: str, choices: Sequence[str]) -> str | None:
    """MMMU's ``parse_multi_choice_response``: the letter in brackets, or before a space, or before
    a full stop, or whose choice occurs in an answer of more than five words."""
    text = f" {text} "
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    bracketed = [one for one in letters if f"({one})" in text]
    found = bracketed or [one for one in letters if f"{one} " in text]
    found = found or [one for one in letters if f"{one}." in text]

    def place(letter: str) -> int:
        # The release looks for a letter between spaces even where it found one before a full stop.
        return text.rfind(f"({letter})" if bracketed else f" {letter} ")

    if not found and len(text.split()) > 5:
        lower = text.lower()
        contents = dict(zip(letters, (one.lower() for one in choices), strict=True))
        found = [one for one in letters if contents[one] in lower]
        place = lambda letter: lower.rfind(contents[letter])  # noqa: E731
    # max() returns the first of equal places, as numpy's argmax does.
    return max(found, key=place) if found else None


def humanvbench(rows: Rows) -> Numbers:
    """HumanVBench's ``Evaluation.py``: the letter after "best answer is Option"; or else the first
    choice whose text occurs in the answer (of long ones all but two characters are enough); or else
    the first character that is a letter of a choice, so that "Because ..." is B. ``random`` is the
    accuracy of guessing."""
    right = 0
    for row in rows:
        choices = {chr(65 + place): str(one) for place, one in enumerate(row["choices"])}
        right += _humanvbench_letter(_text(row), choices) == row["truth"]
    options = sum(len(row["choices"]) for row in rows)
    return {**_share(right, len(rows), rows), "random": len(rows) / options if options else 0.0}


def _humanvbench_letter(text: str, choices: Mapping[str, str]) -> str | None:
    text = text.replace("Answer", "")
    named = re.search(r"best answer is [Oo]ption (.)", text, re.DOTALL)
    if named is not None:
        return named.group(1)
    swapped = str.maketrans({",": "-", "-": ","})
    for letter, choice in choices.items():
        if choice in text:
            return letter
        if len(choice) > 20:
            matcher = SequenceMatcher(None, choice, text, autojunk=False)
            if len(choice) - matcher.find_longest_match().size <= 2:
                return letter
        elif choice.translate(swapped) in text:
            return letter
    if text.split(" ")[0] == "Based":
        text = text[5:]
    return next((character for character in text if character in choices), None)


def mtmeur(rows: Rows) -> Numbers:
    """MTMEUR's ``evaluation.py``: the first of A, B, C, D that occurs anywhere in the answer in
    capitals, so that an answer with any "a" in it is A."""
    right = 0
    for row in rows:
        text = _text(row).upper()
        right += next((one for one in _FOUR if one in text), None) == row["truth"]
    return _share(right, len(rows), rows)


def in_order(*readings: Callable[[Rows], Numbers]) -> Callable[[Rows], Numbers]:
    """Several official readings of the same answers, side by side."""
    return lambda rows: {name: one for read in readings for name, one in read(rows).items()}


def _text(row: Mapping[str, Any]) -> str:
    return answer_text(str(row.get("raw") or ""))


def _choice(row: Mapping[str, Any], letter: str) -> str | None:
    place = ord(letter) - ord("A")
    return str(row["choices"][place]) if place < len(row["choices"]) else None


def _share(right: int, counted: int, rows: Rows) -> Numbers:
    if not counted:
        return {"dropped": float(len(rows))}
    return {"accuracy": right / counted, "dropped": float(len(rows) - counted)}
