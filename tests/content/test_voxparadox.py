"""``eval/voxparadox.py``: the voice against the words, on rows in the release's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.adapter import write_manifest
from mmemo.errors import DataError
from mmemo.evaluation.script import run_zero_shot
from tests.content.asked import questions_of, scored
from tests.media_files import write_wav

FILE = "eval/voxparadox.py"


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"v{number}",
        "task_name": ("emotion", "age")[number % 2],
        "audio_path": f"audio/{number % 3}.wav",
        "question": "How does the speaker sound?",
        "choice_a": "Happy",
        "choice_b": "Sad",
        "choice_c": "Angry",
        "choice_d": "Neutral",
        "answer_gt": "Sad",
        "adversarial_labels": ["Happy"],
    }
    return {**row, **changes}


ROWS = [
    row_of(0),
    row_of(1, answer_gt=" sad. ", adversarial_labels="Happy"),  # in another spelling
    row_of(2, answer_gt="B", adversarial_labels='["A", "Angry"]'),  # letters; JSON in a cell
    row_of(3, choice_c=None, choice_d="", adversarial_labels=["happy"]),  # two choices
    row_of(4, choice_a=1, choice_b=2, choice_c=3, choice_d=4, answer_gt=2, adversarial_labels=3),
    row_of(5, answer_gt="Bored"),
    row_of(6, adversarial_labels=["Sad"]),
    row_of(7, adversarial_labels=None),
    row_of(8, audio_path=""),
    row_of(9, choice_b="happy"),  # two choices read alike
    row_of(10, choice_b=None),
    row_of(11, audio_path="audio/gone.wav"),
]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vox") / "VoxParadox"
    for number in range(3):
        write_wav(root / f"audio/{number}.wav", seconds=0.3)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (root / "test.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (root / "dataset_infos.json").write_text('{"default": {}}')
    return root


def test_questions_have_the_voice_s_answer_and_the_words(release: Path) -> None:
    questions = {one.sample.sample_id[-2:]: one for one in questions_of(FILE, release)}
    assert list(questions) == ["v0", "v1", "v2", "v3", "v4"]
    assert {one.truth for one in questions.values()} == {"B"}
    implied = [one.modality_labels["text"] for one in questions.values()]
    assert implied == ["A", "A", "A,C", "A", "C"]
    first = questions["v0"].turns[-1].text
    assert first == "<audio>How does the speaker sound?\nA. Happy\nB. Sad\nC. Angry\nD. Neutral"
    assert questions["v3"].turns[-1].text.endswith("\nB. Sad")


def test_accuracy_and_the_share_of_the_words_by_hand(release: Path) -> None:
    said = {"v0": "B", "v1": "A. Happy", "v2": "C", "v3": "I cannot tell.", "v4": "D"}
    questions = questions_of(FILE, release)
    block = scored(FILE, questions, lambda one: said[one.sample.sample_id[-2:]])["choice"]
    values = {name: one["value"] for name, one in block["scored"].items()}
    assert values == {"voice_share": 0.2, "words_share": 0.4, "signed": pytest.approx(-0.2)}
    assert block["metrics"]["war"]["value"] == 0.2
    assert block["statuses"]["refused"] + block["statuses"]["malformed"] == 1
    assert set(block["groups"]["task"]["values"]) == {"emotion", "age"}


def test_a_dry_run_names_the_rows_that_cannot_be_asked(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_zero_shot(FILE, ["--data", str(release), "--dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "3 rows left out (answer is none of the choices): voxparadox-v5: Bored" in told
    assert "2 rows left out (words do not contradict): voxparadox-v6: ['Sad']" in told
    assert "1 row left out (no audio_path): voxparadox-v8" in told
    assert "1 files named by the data set but not in its folder" in told
    assert "5 rows here, 2000 published" in told


def test_files_that_are_none_are_errors(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"test\.jsonl: is missing"):
        write_manifest(FILE, tmp_path / "empty", out)
    with pytest.raises(DataError, match=r"finds nothing in .* \(voxparadox-v0: no sound\)"):
        write_manifest(FILE, release, out, {"audio": "sound"})
    rows = [row_of(0, adversarial_labels="[Shy"), row_of(1, adversarial_labels={"a": 1})]
    (tmp_path / "empty/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="words do not contradict"):
        write_manifest(FILE, tmp_path / "empty", out)
