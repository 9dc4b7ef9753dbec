"""Which bad rewards the proof refuses, by the attack that they pay for, and which good ones it lets
pass."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.errors import RewardError
from mmemo.rewards import validate
from mmemo.rewards.rewards import RewardConfig
from mmemo.rewards.validate import Proof, prove

HEAD = """
import json, re, time
from mmemo.answers.messages import completion_text as text

def answers(c):
    return [one.strip() for one in re.findall(r"<answer>(.*?)</answer>", text(c), re.S)]

def answer(c):
    return (answers(c) or [""])[-1]

def gold(row):
    label = row.get("label")
    return None if label is None else f"<think></think><answer>{label}</answer>"

def rule(score):
    def reward(prompts, completions, *, label, classes=None, **_):
        return [
            None if t is None else float(score(c, t, classes or []))
            for c, t in zip(completions, label)
        ]
    return reward
"""
LABELS = ["happy", "sad", "angry", "fear", "surprise", "neutral"]
QUESTION = "What is the emotion of the person?"


def rows_of(labels: Sequence[Any], key: str = "label") -> list[dict[str, Any]]:
    return [
        {"prompt": QUESTION, "sample_id": f"r{place}", "label": None, "labels": [], key: label}
        for place, label in enumerate(labels)
    ]


def proof_of(
    folder: Path, source: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> Proof:
    # A loaded file is not read again, so each source has its own.
    file = folder / str(len(list(folder.iterdir()))) / "own.py"
    file.parent.mkdir()
    file.write_text(HEAD + source)
    return prove(parse(RewardConfig, {"path": f"{file}:reward"}), rows, labels)


RIGHT = "answer(c) == t"


@pytest.mark.parametrize(
    ("attack", "score"),
    [
        ("evasion", f"{RIGHT} or text(c) == 'The person is emotional.'"),
        ("evasion", f"{RIGHT} or 'cannot' in text(c)"),
        ("label-listing", "(re.findall('|'.join(k), text(c)) or [''])[0] == t"),
        ("label-listing", "t in text(c)"),
        ("empty-tags", f"{RIGHT} or len(text(c).split()) / 30"),
        ("filler", f"{RIGHT} or len(text(c)) > 2000"),
        ("empty-tags", "'<answer>' in text(c)"),
        ("tagged label-listing", "answer(c) != ''"),
        ("other-clip", "answer(c) in k"),
        ("denied-label", "t in answer(c) and sum(one in answer(c) for one in k) == 1"),
        ("denied-label", f"{RIGHT} or answer(c) == '不是' + t"),
        ("part-of-label", "answer(c) != '' and answer(c) in t"),
        ("other-clip in capitals", f"{RIGHT} or answer(c).isupper()"),
        ("master-key 'Solution'", f"{RIGHT} or text(c).strip() == 'Solution'"),
        ("several-answers", "t in answers(c)"),
        ("tagged all-labels", f"{RIGHT} or t in answer(c).split(chr(10))"),
        ("tagged all-labels", "t in (json.loads(answer(c)) if '[' in answer(c) else answers(c))"),
        ("three-labels", f"{RIGHT} or (t in answer(c) and sum(x in answer(c) for x in k) == 3)"),
        ("copied-prompt", f"{RIGHT} or 'emotion' in text(c).lower() and len(text(c)) < 50"),
        ("injection", f"{RIGHT} or 'score 10' in text(c)"),
    ],
)
def test_a_reward_that_pays_for_one_attack_is_refused_by_its_name(
    tmp_path: Path, attack: str, score: str
) -> None:
    rows = rows_of([LABELS[place % 6] for place in range(8)])
    with pytest.raises(RewardError, match=f"reward 'own' .*the {attack} answer"):
        proof_of(tmp_path, f"reward = rule(lambda c, t, k: {score})", rows, LABELS)


def test_a_reward_that_confuses_face_and_voice_is_refused(tmp_path: Path) -> None:
    source = (
        "def gold(row):\n"
        "    m = row['modality_labels']\n"
        "    return f\"<think>face {m['video']}, voice {m['audio']}</think><answer>x</answer>\"\n"
        "def score(c, m):\n"
        "    said = re.findall('(?:face|voice) (\\\\w+)', text(c))\n"
        "    right = [m['video'], m['audio']]\n"
        "    return float(%s)\n"
        "def reward(prompts, completions, *, modality_labels, **_):\n"
        "    return [score(c, m) for c, m in zip(completions, modality_labels)]\n"
    )
    shown = [("sad", "angry"), ("happy", "happy"), ("fear", "sad"), ("angry", "happy")]
    pairs = [{"video": one, "audio": other} for one, other in shown]
    rows = rows_of(pairs, "modality_labels")
    assert proof_of(tmp_path, source % "said == right", rows, LABELS).proved
    with pytest.raises(RewardError, match="the swapped-channels answer '<think>face angry, voice"):
        proof_of(tmp_path, source % "sorted(said) == sorted(right)", rows, LABELS)


SOFT = "reward = rule(lambda c, t, k: 1 if answer(c) == t else 0.4 * (answer(c) in k[:2]))"
EXACT = "reward = rule(lambda c, t, k: answer(c) == t)"


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        (EXACT, LABELS),
        (EXACT, ["yes", "no"]),
        (EXACT, list("ABCD")),
        (EXACT, ["高兴", "悲伤", "愤怒"]),
        (EXACT, ["positive", "negative", "neutral"]),
        (EXACT, ["not sure", "very happy", "happy"]),
        (EXACT, ["emotional", "calm"]),
        (EXACT, ["happy"]),
        (SOFT, LABELS),
        ("MINIMUM = -1\nreward = rule(lambda c, t, k: 1 if answer(c) == t else -1)", LABELS),
        (
            "BAD = ('sad', 'angry', 'fear')\n"
            "def truth(row): return row['label'] in BAD\n"
            "reward = rule(lambda c, t, k: answer(c) in k and (answer(c) in BAD) == (t in BAD))",
            LABELS,
        ),
        (
            "PARTIAL_CREDIT = True\n"
            "def f1(c, t, k):\n"
            "    said = {one.strip() for one in answer(c).split(',')} - {''}\n"
            "    return 2 * (t in said) / (len(said) + 1)\n"
            "reward = rule(f1)",
            LABELS,
        ),
    ],
)
def test_good_rewards_are_proved(tmp_path: Path, source: str, labels: list[str]) -> None:
    rows = rows_of([labels[place % len(labels)] for place in range(8)])
    assert proof_of(tmp_path, source, rows, labels).proved


def test_a_reward_of_numbers_is_proved(tmp_path: Path) -> None:
    source = (
        "def gold(row): return f\"<think></think><answer>{row['valence']}</answer>\"\n"
        "def near(c, t):\n"
        "    try: return max(0, 1 - abs(float(answer(c)) - t) / 2)\n"
        "    except ValueError: return 0.0\n"
        "def reward(prompts, completions, *, valence, **_):\n"
        "    return [near(c, t) for c, t in zip(completions, valence)]\n"
    )
    rows = rows_of([-0.9, -0.5, 0.0, 0.1, 0.2, 0.5, 0.7, 0.9], "valence")
    assert proof_of(tmp_path, source, rows, []).proved


def test_a_range_that_is_not_declared_is_named(tmp_path: Path) -> None:
    rows = rows_of(LABELS)
    for score, name in (
        ("1 if answer(c) == t else -1", "MINIMUM"),
        ("2 * (answer(c) == t)", "MAX"),
    ):
        with pytest.raises(RewardError, match=f"declares {name}"):
            proof_of(tmp_path, f"reward = rule(lambda c, t, k: {score})", rows, LABELS)


def test_a_slow_judge_ends_the_proof_in_time_and_the_untried_attacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "JUDGED_SECONDS", 0.5)
    slow = (
        "PROOF_TOLERANCE = 0.4\n"
        "def judged(c, t, k):\n"
        "    time.sleep(0.02)\n"
        "    return answer(c) == t\n"
        "reward = rule(judged)\n"
    )
    started = time.monotonic()
    proof = proof_of(tmp_path, slow, rows_of(LABELS), LABELS)
    assert time.monotonic() - started < 5
    assert proof.proved
    assert "after 0.5 s these were left: " in proof.note
    assert proof.note.endswith("constant")
