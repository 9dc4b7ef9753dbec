"""WASSA and KPoEM on folders in the layout of their releases, with their traps."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.results import read_results
from tests.content.texts.asking import Asked
from tests.evaluation.world import save_model

FEATURES = "message_id\tessay\tgender\teducation\tspeaker_id\n"


@pytest.fixture
def wassa(tmp_path: Path) -> Path:
    root = tmp_path / "wassa"
    root.mkdir()
    essays = ("It is sad.", 'They said "no" to us.', "", "I do not care.", "How awful!")
    lines = [f"m{i}\t{essay}\t{1 + i % 2}\t4\t{i}\n" for i, essay in enumerate(essays)]
    path = root / "messages_dev_features_ready_for_WS_2022.tsv"
    path.write_text("\ufeff" + FEATURES + "".join(lines), encoding="utf-8")
    rest = "\t".join(["3.5"] * 9)
    golds = ("6\t5.5\tsadness", "1\t2\tneutral", "3\t3\tfear", "2\tnan\tJoy", "7\t6\tbored")
    gold = "".join(f"{one}\t{rest}\r\n" for one in golds)
    (root / "goldstandard_dev_2022.tsv").write_text(gold, encoding="utf-8", newline="")
    train = (
        "essay\tempathy\tdistress\temotion\nGood people.\t4\t2\tHope/Sadness\nBad.\t9\t1\tAnger\n"
    )
    (root / "WASSA23_essay_level_with_labels_train.tsv").write_text(train, encoding="utf-8")
    return root


def test_wassas_labels_without_a_header(wassa: Path) -> None:
    asked = Asked("wassa", wassa)
    assert [one.truth for one in asked.of("empathy")] == [
        {"empathy": 6, "distress": 5.5},
        {"empathy": 1, "distress": 2},
        {"empathy": 7, "distress": 6},
    ]
    assert [one.truth for one in asked.of("emotion")] == [["sadness"], ["neutral"], ["joy"]]
    assert asked.left_out == [
        ("no essay", ""),
        ("no number from 1 to 7", "empathy '2', distress 'nan'"),
        ("label outside the set", "bored"),
    ]
    assert 'They said "no" to us.' in asked.of("empathy")[1].turns[-1].text
    assert "hope" not in asked.of("emotion")[0].turns[-1].text
    assert asked.questions[0].sample.group == {"speaker": "0", "gender": "1"}
    assert asked.made.samples[0].answer == "<answer>empathy: 6, distress: 5.5</answer>"
    newer = Asked("wassa", wassa, year="2023", split="train")
    assert [one.truth for one in newer.of("emotion")] == [["sadness", "hope"], ["anger"]]
    assert newer.left_out == [("no number from 1 to 7", "empathy '9', distress '1'")]


def test_wassas_metrics_by_hand(wassa: Path) -> None:
    asked = Asked("wassa", wassa)
    answers = ("empathy: 5, distress: 6", "empathy 2, distress 1", "I cannot say")
    block = asked.score("empathy", answers)
    # The last one counts as 1 where 7 and 6 are right: x is 6 1 7 and 5.5 2 6, y 5 2 1 and 6 1 1.
    empathy, distress = (
        block["scored"][f"{one}_pearson"]["value"] for one in ("empathy", "distress")
    )
    assert empathy == pytest.approx(_pearson((6, 1, 7), (5, 2, 1)), abs=1e-6)
    assert distress == pytest.approx(_pearson((5.5, 2, 6), (6, 1, 1)), abs=1e-6)
    assert block["headline"] == "mean_pearson"
    assert block["average"]["value"] == pytest.approx((empathy + distress) / 2, abs=1e-6)
    # Two points lie on a line.
    assert asked.official("empathy", answers) == {"empathy": 1, "distress": 1, "mean": 1}
    emotion = asked.score("emotion", ("sadness", "joy and neutral", "?"))
    # Labels with F1: sadness 1, neutral 1, joy 0, of eight.
    assert emotion["scored"]["macro_f1"]["value"] == pytest.approx(2 / 8)
    assert emotion["scored"]["exact_match"]["value"] == pytest.approx(1 / 3, abs=1e-6)


def _pearson(x: tuple[float, ...], y: tuple[float, ...]) -> float:
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / n
    vx, vy = (sum((a - m) ** 2 for a in v) / n for v, m in ((x, mx), (y, my)))
    return cov / (vx * vy) ** 0.5


def test_a_folder_that_does_not_fit_is_refused(wassa: Path) -> None:
    with pytest.raises(ConfigError, match="split is 'test'; use one of train, dev"):
        Asked("wassa", wassa, split="test")
    with pytest.raises(DataError, match=r"no file messages_train_ready_for_WS\.tsv"):
        Asked("wassa", wassa, split="train")
    gold = wassa / "goldstandard_dev_2022.tsv"
    gold.write_text(gold.read_text("utf-8").split("\n", 1)[1], encoding="utf-8")
    with pytest.raises(DataError, match="has 4 rows, but"):
        Asked("wassa", wassa)


ANNOTATORS = "\t".join(f"annotator_0{i}" for i in range(1, 6))


@pytest.fixture
def kpoem(tmp_path: Path) -> Path:
    root = tmp_path / "kpoem"
    root.mkdir()
    votes = (
        ("슬픔", "슬픔, 절망", "슬픔,슬픔", "슬픔, 흐뭇함(귀여움/예쁨)", "슬픔,절망"),
        ("행복", "불평/불만", "", "", ""),
        ("모름", "모름", "", "", ""),
        ("없음", "없음, 오타", "없음", "기쁨", "기쁨"),
    )
    lines = [f"line_id\tpoem_id\ttext\tsub_title\ttitle\tpoet\t{ANNOTATORS}\n"]
    for number, one in enumerate(votes, start=1):
        cells = "\t".join(one)
        lines.append(
            f'{number}\t{1 + number // 3}\t"나 보기가 역겨워\t\t진달래꽃\t김소월\t{cells}\n'
        )
    lines.append("9\t2\t짧은 줄\n")
    (root / "KPoEM_line_dataset_v4.tsv").write_text("".join(lines), encoding="utf-8")
    head = f"seg_id\tpoem_id\ttext\tsub_title\ttitle\tpoetry_book\tpoet\t{ANNOTATORS}\n"
    row = "1\t1\t죽는 날까지\t\t서시\t하늘과 바람과 별과 시\t윤동주\t" + "\t".join(["부끄러움"] * 5)
    (root / "KPoEM_poem_dataset_v4.tsv").write_text(head + row, encoding="utf-8")
    return root


def test_kpoems_votes(kpoem: Path) -> None:
    asked = Asked("kpoem", kpoem)
    # One of five votes is not above 0.2 of the most, two are; a vote counts once per annotator.
    assert [one.truth for one in asked.questions] == [
        ["슬픔", "절망"],
        ["불평/불만", "행복"],
        ["없음", "기쁨"],
        ["부끄러움"],
    ]
    first = asked.questions[0]
    assert first.extra["votes"] == {"슬픔": 5, "절망": 2, "흐뭇함(귀여움/예쁨)": 1}
    assert '"나 보기가 역겨워' in first.turns[-1].text
    assert first.sample.group["speaker"] == "poem 1"
    assert asked.questions[2].sample.group["unknown_label"] == "yes"
    assert asked.left_out == [
        ("no label of the 44", "모름"),
        ("wrong number of cells", "3 cells under 11 columns"),
    ]
    assert asked.made.unlike_published() == ["4 rows here, 7622 published"]
    by_five = Asked("kpoem", kpoem, level="line", scale="votes")
    assert [one.truth for one in by_five.questions] == [["슬픔", "절망"], [], ["없음", "기쁨"]]
    parts = [Asked("kpoem", kpoem, level="line", split=one, cut="0") for one in ("train", "test")]
    assert len(parts[0].questions) + len(parts[1].questions) <= 3


def test_kpoems_metrics_by_hand(kpoem: Path) -> None:
    asked = Asked("kpoem", kpoem)
    answers = ("슬픔, 절망", "<answer>불평 / 불만</answer>", "기쁨, 슬픔", "모르겠습니다")
    scored = asked.score("emotions", answers)["scored"]
    # 4 of 7 true labels are named, and 1 other.
    assert scored["micro_f1"]["value"] == pytest.approx(8 / 12, abs=1e-6)
    # F1: 슬픔 2/3, 절망 1, 불평/불만 1, 기쁨 1.
    assert scored["macro_f1"]["value"] == pytest.approx((2 / 3 + 3) / 44, abs=1e-6)
    assert scored["micro_f1"]["n"] == 4
    right = asked.score("emotions", lambda one: ", ".join(one.truth))["scored"]
    assert right["exact_match"]["value"] == 1
    with pytest.raises(ConfigError, match="cut is 'low'"):
        Asked("kpoem", kpoem, cut="low")


def test_a_model_that_writes_nothing_readable_has_results(wassa: Path, tmp_path: Path) -> None:
    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    arguments = [
        *("eval/texts/wassa.py", "--data", str(wassa), "--model", str(model)),
        *("--output-dir", str(out), "--generation.max_new_tokens=4"),
        *("--bootstrap.resamples=100", "--decode.workers=1"),
    ]
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == 0, done.output
    tasks = read_results(out).tasks
    assert list(tasks) == ["empathy", "emotion"]
    # No answer has a number, so each counts as the farthest end, and r is below 0.
    assert tasks["empathy"]["average"]["value"] < 0
    assert tasks["empathy"]["official"]["mean"] is None
