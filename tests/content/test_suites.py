"""Suites of questions: what is asked of their releases, and what official and strict scores say."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemo import content
from mmemo.data.adapter import Excluded
from mmemo.data.tables import read_table
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.copy_check import check_copy
from mmemo.evaluation.scoring import score_rows
from mmemo.statistics import BootstrapConfig
from tests.content import suite_releases as releases
from tests.content.suite_releases import answered, asked
from tests.media_files import write_clip, write_wav

QUICK = BootstrapConfig(resamples=100)


def by_name(**said: str) -> Callable[[Question], str]:
    """Answers by the end of the question's id."""
    return lambda question: said.get(question.sample.sample_id.rsplit("-", 1)[-1], "")


def test_emobench_m(tmp_path: Path) -> None:
    releases.emobench_m(tmp_path / "data")
    benchmark, questions, excluded, missing = asked(
        "eval/suites/emobench_m.py", tmp_path / "data", tmp_path
    )
    assert excluded == {
        "repeated row": 1,
        "label outside the set": 2,
        "no question, answer or clip": 1,
        "unknown set": 1,
    }
    assert missing == ("datasets/MELD/e.mp4",)
    meld = [one for one in questions if one.task == "MELD"]
    assert [one.truth for one in meld] == ["joy", "anger", "neutral"]
    assert meld[0].turns[-1].text == "<video><audio>Which emotion?"
    assert [one.task for one in questions] == [
        *("ch-simsv2s", "SIMS", "MELD", "MELD", "MELD", "MC-EIU", "MC-EIU", "SMILE")
    ]
    rows = answered(meld, by_name(**{"0": "Joy", "1": "joy", "3": "It is neutral."}))
    block = score_rows(rows, QUICK)["MELD"]
    assert block["metrics"]["war"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    # The release drops the sentence. Of joy and anger, joy is said twice.
    assert benchmark.tasks["MELD"].official is not None
    assert benchmark.tasks["MELD"].official(rows) == {
        "accuracy": 0.5,
        "precision": 0.25,
        "recall": 0.5,
        "f1": pytest.approx(1 / 3),
        "dropped": 1,
    }
    both = [one for one in questions if one.task == "MC-EIU"]
    assert both[1].truth == {"emotion": "sad", "intent": "neutral"}
    rows = answered(
        both, by_name(**{"0": "happy and agreeing", "1": "Intent: neutral. Emotion: sad"})
    )
    found = score_rows(rows, QUICK, {"MC-EIU": benchmark.tasks["MC-EIU"].scorers})["MC-EIU"]
    assert {name: one["value"] for name, one in found["scored"].items()} == {
        "joint": 1,
        "emotion": 1,
        "intent": 1,
    }
    # The release takes the first emotion of its own list, and "neutral" for both.
    rows = answered(both, by_name(**{"0": "sad, though happy at first; agreeing", "1": "neutral"}))
    official = benchmark.tasks["MC-EIU"].official
    assert official is not None
    told = official(rows)
    assert (told["emotion_accuracy"], told["intent_accuracy"]) == (0.5, 1)
    assert (told["joint_accuracy"], told["dropped"]) == (0.5, 0)
    found = score_rows(rows, QUICK, {"MC-EIU": benchmark.tasks["MC-EIU"].scorers})["MC-EIU"]
    assert found["scored"]["joint"]["value"] == 0


def test_emobench_texts(tmp_path: Path) -> None:
    pytest.importorskip("nltk")
    pytest.importorskip("rouge_score")
    releases.emobench_m(tmp_path / "data")
    benchmark, questions, _, _ = asked(
        "eval/suites/emobench_m.py", tmp_path / "data", tmp_path, sets="SMILE"
    )
    rows = answered(questions, lambda question: "He fell over his own feet.")
    official = benchmark.tasks["SMILE"].official
    assert official is not None
    assert official(rows) == {"bleu": 1, "rouge_l": 1, "dropped": 0}
    assert official(answered(questions, lambda question: "")) == {"dropped": 1}
    found = score_rows(rows, QUICK, {"SMILE": benchmark.tasks["SMILE"].scorers})["SMILE"]
    assert found["scored"]["rouge_l"]["value"] == 1


def test_humanvbench(tmp_path: Path) -> None:
    releases.humanvbench(tmp_path / "data")
    file = "eval/suites/humanvbench.py"
    benchmark, questions, excluded, missing = asked(file, tmp_path / "data", tmp_path)
    assert excluded == {
        "answer is none of the choices": 1,
        "no clip": 1,
        "no JSON": 1,
        "unknown task": 1,
    }
    assert missing == ("Human_Count/9.mp4",)
    assert questions[0].turns[-1].text == (
        "<video><audio>How does she feel?\nA. She is calm\nB. She is happy\nC. Neither"
    )
    _, emotion, _, _ = asked(file, tmp_path / "data", tmp_path, group="emotion")
    assert [(one.task, one.truth) for one in emotion] == [
        ("Emotion_Recognition", "B"),
        ("Emotion_Recognition", "A"),
    ]
    official = benchmark.tasks["Emotion_Recognition"].official
    assert official is not None
    # "Because" begins with a B, and "Answer" is taken out before letters are looked for.
    rows = answered(emotion, by_name(**{"1": "Because she smiles", "2": "Answer: A"}))
    assert official(rows) == {"accuracy": 1, "dropped": 0, "random": pytest.approx(1 / 3)}
    assert score_rows(rows, QUICK)["Emotion_Recognition"]["metrics"]["war"]["value"] == 0.5
    rows = answered(emotion, by_name(**{"1": "The best answer is Option B.", "2": "She is calm."}))
    assert official(rows)["accuracy"] == 1


def test_mmsu(tmp_path: Path) -> None:
    releases.mmsu(tmp_path / "data")
    file = "eval/suites/mmsu.py"
    benchmark, questions, excluded, missing = asked(file, tmp_path / "data", tmp_path)
    assert excluded == {"answer is none of the choices": 1, "no sound": 1}
    assert missing == ("audio/none.wav",)
    names = [one.sample.sample_id for one in questions]
    assert names == ["mmsu-m1", "mmsu-m2", "mmsu-m3", "mmsu-m1-2"]
    assert [one.truth for one in questions] == ["B", "D", "B", "A"]
    assert questions[2].turns[-1].text == "<audio>Which emotion?\nA. 1\nB. 2"
    assert questions[0].sample.group["sub_category"] == "Paralinguistics"
    _, some, _, _ = asked(file, tmp_path / "data", tmp_path, slice="emotion")
    assert [one.sample.sample_id for one in some] == ["mmsu-m1", "mmsu-m2", "mmsu-m1-2"]
    rows = answered(questions, by_name(m1="The answer is B.", m2="D", m3="", **{"2": "happy"}))
    official = benchmark.tasks["mmsu"].official
    assert official is not None
    # m1 is right, by its last but one character. m2's answer is spelt otherwise than its choice,
    # so no letter is right. The empty answer repeats D, which m3 does not have. "happy" is dropped.
    told = official(rows)
    assert told["accuracy"] == pytest.approx(1 / 3)
    assert (told["dropped"], told["reused"]) == (1, 1)
    # lmms-eval reads B from "B." and D, and draws letters for the others.
    assert told["lmms_eval_accuracy"] == pytest.approx((1 + 1 + 1 / 4 + 1 / 4) / 4)
    assert told["lmms_eval_random"] == 2
    # The strict reading takes the whole text of a choice for its letter.
    strict = score_rows(rows, QUICK)["mmsu"]
    assert strict["metrics"]["war"]["value"] == 0.75
    assert strict["groups"]["category"]


def test_omnibench(tmp_path: Path) -> None:
    releases.omnibench(tmp_path / "data")
    file = "eval/suites/omnibench.py"
    benchmark, questions, excluded, missing = asked(
        file, tmp_path / "data", tmp_path, picture="content"
    )
    assert excluded == {"answer is none of the choices": 1, "no sound or picture": 1}
    assert missing == ()
    assert questions[0].turns[-1].text.startswith("<audio>What the picture shows: A kitchen.\nWhat")
    assert questions[0].sample.group == {
        "task_type": "action and activity",
        "audio_type": "speech",
    }
    official = benchmark.tasks["omnibench"].official
    assert official is not None
    # The release reads the A of "PLAN A " as a letter.
    rows = answered(questions, by_name(**{"0": "(C)", "2": "PLAN A it is"}))
    assert official(rows) == {"accuracy": 1, "dropped": 0, "unreadable": 0}
    _, shown, _, missing = asked(file, tmp_path / "data", tmp_path)
    assert [one.sample.media["video"].path for one in shown] == ["mm_data/clips/a.mp4"]
    assert missing == ("mm_data/clips/c.mp4",)


def test_mtmeur(tmp_path: Path) -> None:
    releases.mtmeur(tmp_path / "data")
    file = "eval/suites/mtmeur.py"
    benchmark, questions, excluded, _ = asked(file, tmp_path / "data", tmp_path)
    assert excluded == {
        "several right answers": 1,
        "repeated video": 1,
        "no clip or questions": 1,
    }
    assert [(turn.role, turn.text) for turn in questions[1].turns] == [
        ("user", "<video><audio>First?"),
        ("assistant", "A. supportive"),
        ("user", "Second?\nA. supportive\nB. stressed\nC. bored\nD. angry"),
    ]
    assert questions[1].truth == "D"
    _, alone, _, _ = asked(file, tmp_path / "data", tmp_path, history="none")
    assert [len(one.turns) for one in alone] == [1, 1, 1, 1]
    assert alone[1].turns[0].text.startswith("<video><audio>Second?")
    official = benchmark.tasks["mtmeur"].official
    assert official is not None
    # The "a" of "maybe" is A; the strict reading has no letter in it.
    rows = answered(questions, lambda question: "maybe D")
    assert official(rows) == {"accuracy": 1 / 4, "dropped": 0}
    assert [row["answer"] for row in rows] == ["D", "D", "D", "D"]


def test_emotrans(tmp_path: Path) -> None:
    releases.emotrans(tmp_path / "data")
    _, questions, excluded, _ = asked("eval/suites/emotrans.py", tmp_path / "data", tmp_path)
    assert excluded == {"too few choices": 1, "unknown task": 1, "no clip": 1}
    assert [(one.task, one.truth, one.sample.media["video"].path) for one in questions] == [
        ("ECD", "A", "videos/1.mp4"),
        ("ETR", "B", "videos/1.mp4"),
        ("NEP", "B", "videos/2.mp4"),
    ]
    assert questions[0].turns[-1].text.endswith("A. yes\nB. no")
    assert questions[0].sample.group == {"scenario": "family"}


def test_hitemotion(tmp_path: Path) -> None:
    releases.hitemotion(tmp_path / "data")
    file = "eval/suites/hitemotion.py"
    benchmark, questions, excluded, _ = asked(file, tmp_path / "data", tmp_path)
    assert excluded == {
        "no answer": 1,
        "no clip": 1,
        "tuples are not asked": 1,
        "no question or answer": 1,
        "unknown task": 1,
    }
    found = [(one.task, one.truth, one.sample.group["level"]) for one in questions]
    assert found == [
        *(("MER", "B", "1"), ("MER", "A", "1"), ("MER", "A", "1")),
        *(("SPER", "A", "1"), ("LR", "He fell.", "3")),
    ]
    # The choices of a table of labels are its labels, whatever their case.
    assert questions[0].turns[-1].text == "<video><audio>?\nA. Angry\nB. happy\nC. sad"
    assert list(questions[3].sample.media) == ["audio"]
    rows = answered(questions[:3], lambda question: "A")
    assert score_rows(rows, QUICK)["MER"]["metrics"]["weighted_f1"]["value"] == pytest.approx(
        2 / 3 * 0.8, abs=1e-6
    )
    assert benchmark.tasks["LR"].scorers[0].name == "judge"
    _, third, _, _ = asked(file, tmp_path / "data", tmp_path, level="3")
    assert [one.task for one in third] == ["LR"]


@pytest.mark.parametrize(
    ("name", "clips"),
    [("mtmeur", ("videos/1.mp4", "2.mp4")), ("mmsu", ("audio/1.wav", "audio/2.wav"))],
)
def test_dry_run(
    tmp_path: Path, name: str, clips: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    getattr(releases, name)(root)
    first = root / clips[0]
    first.unlink()
    made = (
        write_clip(first, 0.5, size=(32, 32)) if first.suffix == ".mp4" else write_wav(first, 0.5)
    )
    shutil.copy(made, root / clips[1])
    report = check_copy(f"eval/suites/{name}.py", [str(root)], {})
    assert not report.ok
    assert report.excluded
    assert not report.broken
    assert "published" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["emobench_m", "humanvbench", "mmsu", "omnibench", "mtmeur"])
def test_no_answer_breaks_a_reading(tmp_path: Path, name: str) -> None:
    getattr(releases, name)(tmp_path / "data")
    options = {"picture": "content"} if name == "omnibench" else {}
    file = f"eval/suites/{name}.py"
    benchmark, questions, _, _ = asked(file, tmp_path / "data", tmp_path, **options)
    questions = [one for one in questions if one.task != "SMILE"]
    rng = random.Random(0)
    pieces = ["A", "b", "(C)", "D.", " ", "happy", "joy", "neutral, agreeing", "Emotion: sad;"]
    pieces += ["<answer>", "</answer>", "<think>", "</think>", "\n", "\0", "\ud800", "None", "not"]
    pieces += ["best answer is Option ", "I cannot tell", "ｂ", "intent", ":", "{", "9" * 50, "啊"]
    for _ in range(600):
        rows = answered(questions, lambda _: "".join(rng.choices(pieces, k=rng.randrange(9))))
        assert {row["status"] for row in rows} <= {"ok", "refused", "malformed"}
        for task in {row["task"] for row in rows}:
            own = [row for row in rows if row["task"] == task]
            official = benchmark.tasks[task].official
            assert official is not None
            told = official(own)
            assert 0 <= told["dropped"] <= len(own)
            assert all(0 <= told[key] <= 1 for key in told if key.endswith("accuracy"))


ALL = [
    *("emobench_m", "humanvbench", "mmsu", "omnibench", "mtmeur", "emotrans", "hitemotion"),
    *("mme_emotion", "emer"),
]


@pytest.mark.parametrize("name", ALL)
def test_no_row_breaks_an_adapter(tmp_path: Path, name: str) -> None:
    """Whatever stands in a row, it is asked or left out, and both can be written."""
    getattr(releases, name)(tmp_path)
    folder = "judged" if name in ("mme_emotion", "emer") else "suites"
    rows = content.load(f"eval/{folder}/{name}.py:rows")
    rng = random.Random(0)
    junk: list[Any] = [None, "", " ", 0, -1.5, True, [], {}, [None], {"A": 1}, "\ud800", "\0"]
    junk += ["A" * 300, "<image>", [[1]], {"from": "gpt"}, "/a/b.mp4", "../x", "A,B", "1" * 400]
    junk += [float("nan"), float("inf")]

    def spoilt(value: Any) -> Any:
        if rng.random() < 0.1:
            return rng.choice(junk)
        if isinstance(value, dict):
            return {key: spoilt(one) for key, one in value.items() if rng.random() > 0.05}
        return [spoilt(one) for one in value] if isinstance(value, list) else value

    files = sorted(file for file in tmp_path.rglob("*.json*"))
    before = {file: [row for row in read_table(file) if isinstance(row, dict)] for file in files}
    if name == "emer":
        table = [row for row in read_table(tmp_path / "EMER.csv") if isinstance(row, dict)]
        before = {tmp_path / "EMER.csv": table}
    for _ in range(60):
        for file, table in before.items():
            spoiled = [spoilt(row) for row in table * 2]
            lines = [json.dumps(row) for row in spoiled]
            text = json.dumps(spoiled) if file.suffix == ".json" else "\n".join(lines)
            if file.suffix == ".csv":
                text = "names,reasons\n" + text.replace('"', "'").replace(":", ",")
            file.write_text(text + "\n", encoding="utf-8")
        for row in rows(tmp_path):
            if isinstance(row, Excluded):
                assert row.reason
                f"{row.row} {row.detail}".encode()
            else:
                json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
                assert row["sample_id"]
                assert "<image>" not in str(row["prompt"])
