"""``eval/crema_d.py``: what raters perceived in voice, face and both, and their votes."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmemo import content
from mmemo.cli import app
from mmemo.data.adapter import write_manifest
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.script import run_zero_shot
from tests.content.asked import questions_of, scored
from tests.media_files import write_clip, write_wav

FILE, ADAPTER = "eval/crema_d.py", "data/crema_d.py"
LETTERS = "ADFHNS"
# Clip: raters of the voice, the face and both; 1011 has no .flv, and 1012 no clip at all.
VOTES = {
    "1001_IEO_NEU_XX": ("NNN", "NNN", "NNNH"),
    "1002_IEO_HAP_LO": ("NNN", "HHN", "HHHN"),
    "1003_TIE_SAD_HI": ("SSS", "NNN", "SSSN"),
    "1005_TIE_ANG_MD": ("AAD", "DDD", "FFAD"),
    "1006_TIE_FEA_MD": ("AF", "FFF", "FFF"),
    "1007_TIE_DIS_MD": ("DDD", "DDD", "DDNN"),
    "1008_TIE_DIS_MD": ("DDD", "DDD", "NND"),
    "1011_TIE_SAD_MD": ("SS", "SS", "SS"),
    "1012_TIE_SAD_MD": ("SS", "SS", "SS"),
}
SUBSETS = {
    "consistent": 3,
    "video_aligned": 1,
    "audio_aligned": 1,
    "all_different": 1,
    "joint_differs": 1,
    "tie": 2,
}


def write_release(root: Path, *, clips: bool = True, bom: bool = True) -> Path:
    """CREMA-D's tables, as Excel saves them, and tiny clips."""
    root.mkdir()
    start = "\ufeff" if bom else ""
    summary = [start + '"","FileName","VoiceVote","VoiceLevel","FaceVote","MultiModalVote"']
    tables: list[list[str]] = [[], [], []]
    for number, (name, raters) in enumerate(VOTES.items(), 1):
        tops: list[str] = []
        for kind, letters in enumerate(raters):
            counts = Counter(letters)
            most = max(counts.values())
            tops.append(":".join(one for one in LETTERS if counts[one] == most))
            cells = ",".join(str(counts[one]) for one in LETTERS)
            tables[kind].append(f'"{kind + 1}{number:05}",{cells},"{name}",{len(letters)}')
        summary.append(f'"{number}","{name}","{tops[0]}","50","{tops[1]}","{tops[2]}"')
    (root / "summaryTable.csv").write_text("\n".join(summary) + "\n", encoding="utf-8")
    head = start + '"","A","D","F","H","N","S","fileName","numResponses"'
    lines = [head, *(line for table in tables for line in table)]
    (root / "tabulatedVotes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in list(VOTES)[:-1] if clips else ():
        if name.startswith("1011"):
            write_wav(root / f"AudioWAV/{name}.wav", seconds=0.5)
        else:
            write_clip(root / f"VideoFlash/{name}.flv", seconds=0.5, fps=4)
    return root


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("crema_d") / "CREMA-D")


def test_voice_face_and_both_are_asked_about_what_raters_were_shown(release: Path) -> None:
    questions = questions_of(FILE, release, ask="emotion,voice,face,votes")
    found: dict[str, dict[str, Any]] = {}
    for one in questions:
        found.setdefault(one.task, {})[one.sample.sample_id[:4]] = one
    assert list(found) == ["emotion", "voice", "face", "votes"]
    assert set(found["emotion"]) == {"1001", "1002", "1003", "1005", "1006", "1008"}
    # The tie on the voice, and what has no picture.
    assert set(found["voice"]) == {*VOTES_OF_ALL, "1011"} - {"1006"}
    assert set(found["face"]) == VOTES_OF_ALL
    assert set(found["votes"]) == VOTES_OF_ALL  # with the tie on both
    streams = {task: set(ones["1001"].sample.media) for task, ones in found.items()}
    assert streams == {
        "emotion": {"video", "audio", "face"},
        "voice": {"audio"},
        "face": {"video", "face"},
        "votes": {"video", "audio", "face"},
    }
    assert found["voice"]["1011"].sample.media["audio"].path == "AudioWAV/1011_TIE_SAD_MD.wav"
    truths = {task: ones["1002"].truth for task, ones in found.items() if task != "votes"}
    assert truths == {"emotion": "happiness", "voice": "neutral", "face": "happiness"}
    assert found["face"]["1002"].extra["votes"] == {"happiness": 2, "neutral": 1}
    text = found["voice"]["1001"].turns[-1].text
    assert text.startswith("<audio>Which emotion does the voice express?")
    assert found["emotion"]["1002"].sample.truth.conflict == "video_aligned"
    assert found["emotion"]["1002"].modality_labels == {"audio": "neutral", "video": "happiness"}
    assert found["voice"]["1002"].sample.truth.conflict is None


VOTES_OF_ALL = {name[:4] for name in VOTES} - {"1011", "1012"}


def test_the_numbers_of_answers_by_hand(release: Path) -> None:
    questions = questions_of(FILE, release, ask="emotion,votes")

    def voice(one: Any) -> str:
        """A model that only listens; to the votes it says what the raters say."""
        if one.task == "votes":
            total = sum(one.truth.values())
            return ", ".join(f"{name} {100 * n / total}%" for name, n in one.truth.items())
        return one.modality_labels.get("audio", "I cannot tell.")

    blocks = scored(FILE, questions, voice)
    emotion, votes = blocks["emotion"], blocks["votes"]
    accuracy = {name: one["war"]["value"] for name, one in emotion["subsets"].items()}
    assert accuracy == {
        "video_aligned": 0,
        "audio_aligned": 1,
        "consistent": 1,
        "none": 0,
    }
    assert emotion["reliance"]["all"]["signed"]["value"] == 1
    # NNNH with neutral alone, SSSN with sadness: the share of 1/4 is above 1/6 and is missed.
    assert emotion["scored"]["macro_f1"]["value"] < 1
    assert emotion["scored"]["majority_kept"]["value"] == pytest.approx(5 / 6, abs=1e-6)
    assert votes["headline"] == "kl"
    assert votes["scored"]["macro_f1"]["value"] == 1
    assert 0 < votes["scored"]["kl"]["value"] < 0.05  # the smoothing


def test_a_dry_run_counts_the_subsets_and_names_what_is_missing(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_zero_shot(FILE, ["--data", str(release), "--dry-run"])
    told = capsys.readouterr().out
    for name, number in {"clips": len(VOTES), **SUBSETS}.items():
        assert f"  {name}: {number}\n" in told
    words = " ".join(told.split())
    assert "1 row left out (tie on the emotion): 1007_TIE_DIS_MD/emotion: D:N" in words
    assert "1 row left out (tie on the voice): 1006_TIE_FEA_MD/voice: A:F" in words
    assert "VideoFlash/1012_TIE_SAD_MD.flv" in words
    assert "This copy is not whole" in words
    # Without clips the counts come first, and then why nothing can be asked.
    tables = write_release(tmp_path / "tables", clips=False, bom=False)
    done = CliRunner().invoke(app, ["eval", FILE, "--data", str(tables), "--dry-run"])
    assert "clips: 9" in done.output
    assert "none of the 9 files" in str(done.exception)


def test_options_that_do_not_exist_are_refused(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="ask is 'vocie'; did you mean 'voice'"):
        write_manifest(FILE, release, out, {"ask": "emotion,vocie"})
    with pytest.raises(ConfigError, match="split is 'dev'"):
        write_manifest(FILE, release, out, {"split": "dev"})
    with pytest.raises(DataError, match=r"summaryTable\.csv: is missing"):
        write_manifest(FILE, tmp_path, out)
    bad = write_release(tmp_path / "bad", clips=False)
    table = bad / "tabulatedVotes.csv"
    table.write_text(table.read_text().replace('"100001"', '"900001"'))
    with pytest.raises(DataError, match="'900001' must begin with 1, 2 or 3"):
        write_manifest(FILE, bad, out)


def test_training_rows_have_the_label_of_what_they_show(release: Path, tmp_path: Path) -> None:
    def labels(**options: str) -> dict[str, Any]:
        made = write_manifest(ADAPTER, release, tmp_path / "rows.jsonl", options)
        return {s.sample_id[8:12]: (s.truth.label, set(s.media)) for s in made.samples}

    assert labels(label="voice")["1002"] == ("neutral", {"audio"})
    assert labels(label="voice")["1011"] == ("sadness", {"audio"})
    assert labels(label="face")["1002"] == ("happiness", {"video", "face"})
    assert labels(label="displayed")["1011"] == ("sadness", {"audio"})
    assert "1011" not in labels()  # what was perceived in both needs both


def real() -> Path:
    folder = os.environ.get("MMEMO_TEST_DATA")
    if not folder or not (Path(folder) / "crema_d/summaryTable.csv").exists():
        pytest.skip("MMEMO_TEST_DATA names no folder with CREMA-D's tables (crema_d/)")
    return Path(folder) / "crema_d"


def test_the_release_s_own_tables_give_the_counts_of_the_docs() -> None:
    root = real()
    assert content.load(f"{ADAPTER}:counts")(root) == {
        "clips": 7442,
        "tie": 1400,
        "consistent": 3034,
        "video_aligned": 1887,
        "audio_aligned": 548,
        "joint_differs": 214,
        "all_different": 359,
    }
    clips = list(content.load(f"{ADAPTER}:clips")(root))
    with (root / "tabulatedVotes.csv").open(encoding="utf-8-sig", newline="") as handle:
        assert sum(sum(sum(v.values()) for v in c.counts.values()) for c in clips) == sum(
            int(row["numResponses"]) for row in csv.DictReader(handle)
        )
    for clip in clips:  # the winners of both tables are the same
        for shown, raters in clip.counts.items():
            most = max(raters.values())
            tops = {code for code, number in raters.items() if number == most}
            assert tops == set(clip.votes[shown].split(":")), (clip.name, shown)
    assert len({clip.actor for clip in clips}) == 91
