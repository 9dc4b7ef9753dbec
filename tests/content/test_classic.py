"""The classic sets: what adapters make of a release, and how the benchmarks score answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.data.adapter import AdaptedManifest, write_manifest
from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.script import run_zero_shot
from tests.content import releases
from tests.content.releases import answered, asked, put, scored
from tests.media_files import write_clip


def make(root: Path, adapter: str, **options: str) -> AdaptedManifest:
    return write_manifest(f"data/{adapter}.py", root, root.parent / "out.jsonl", options)


def labels_of(made: AdaptedManifest) -> dict[str, str | None]:
    return {sample.sample_id.partition("-")[2]: sample.truth.label for sample in made.samples}


def left_out(made: AdaptedManifest) -> dict[str, tuple[str, bool]]:
    return {one.row.rpartition("-")[2]: (one.reason, one.expected) for one in made.excluded}


def test_dfew_finds_clips_by_number(tmp_path: Path) -> None:
    root = releases.dfew(tmp_path / "dfew")
    made = make(root, "dfew", split="test", fold="1")
    assert labels_of(made) == {"3": "angry", "4": "neutral", "7": "surprise"}
    assert [sample.media["video"].path for sample in made.samples] == [
        "Clip/original/part_1/00003.mp4",
        "Clip/original/part_2/4.MP4",
        "Clip/original/part_2/7.mp4",
    ]
    assert made.missing == ("Clip/original/6.mp4",)  # it has frames only
    assert left_out(made) == {"5": ("label outside the set", False), "7": ("listed twice", False)}
    assert sum((made.published or {}).values()) == 2341
    assert "neutral: 1 rows here, 534 published" in made.unlike_published()
    # Folds are options of their own; the published counts are those of fold 1.
    assert make(root, "dfew", split="test").published is not None
    put(root / "EmoLabel_DataSplit/test(single-labeled)/set_2.csv", "video_name,label\n1,1\n")
    # A copy without the train part has its test part, but cannot know which files are unused.
    assert make(root, "dfew", split="test", fold="1").unused == ("Clip/original/part_1/._2.mp4",)
    part = make(root, "dfew", split="test", fold="2")
    assert (part.published, part.unused) == (None, ())
    with pytest.raises(ConfigError, match="fold is '6'"):
        make(root, "dfew", fold="6")
    with pytest.raises(DataError, match=r"set_3\.csv: is missing"):
        make(root, "dfew", fold="3")


def test_all_folds_are_the_whole_set(tmp_path: Path) -> None:
    root = releases.dfew(tmp_path / "dfew")
    lists = root / "EmoLabel_DataSplit/test(single-labeled)"
    for fold, text in {1: "1,1\n2,7", 2: "3,4\n4,3", 3: "7,5", 4: "1,1", 5: ""}.items():
        put(lists / f"set_{fold}.csv", f"video_name,label\n{text}\n")
    made = make(root, "dfew", split="test", fold="all")
    assert [sample.group["fold"] for sample in made.samples] == ["1", "1", "2", "2", "3"]
    assert left_out(made) == {"1": ("listed twice", False)}
    assert made.published == {"": 11697}
    assert "fold" not in make(root, "dfew", split="train").samples[0].group
    with pytest.raises(ConfigError, match="fold=all has no training part; choose one of 1, 2"):
        make(root, "dfew", split="train", fold="all")
    questions = asked("eval/dfew.py", root, {"fold": "all"})
    rows = answered(questions, lambda question: "happy" if question.truth == "happy" else "angry")
    official = scored("eval/dfew.py", rows)["emotion"]["official"]
    # Right are 1 of 2, 1 of 2 and 0 of 1 in the three folds.
    assert (official["war"], official["war_of_folds"]) == (2 / 5, pytest.approx(1 / 3))
    assert official["uar_of_folds"] == pytest.approx(1 / 3)


def test_a_copy_of_frames_alone_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "dfew"
    put(root / "EmoLabel_DataSplit/train(single-labeled)/set_1.csv", "video_name,label\n1,1\n")
    put(root / "Clip/jpg_256/00001/00001.jpg")
    with pytest.raises(DataError, match=r"none of the 1 files that data/dfew\.py names"):
        make(root, "dfew", split="train")
    put(root / "EmoLabel_DataSplit/train(single-labeled)/set_1.csv", "name,emotion\n1,1\n")
    put(root / "Clip/1.mp4")
    with pytest.raises(DataError, match=r"has no column 'video_name' \(it has name, emotion\)"):
        make(root, "dfew", split="train")


def test_mafw_asks_silent_clips_by_their_picture(tmp_path: Path) -> None:
    root = releases.mafw(tmp_path / "mafw")
    write_clip(root / "data/clips/00002.mp4", 0.5, size=(32, 32), audio=False)
    write_clip(root / "data/clips/00003.mp4", 0.5, size=(32, 32))
    made = make(root, "mafw", split="test")
    assert labels_of(made) == {"00002": "helplessness", "00003": "disappointment"}
    assert [list(sample.media) for sample in made.samples] == [
        ["video", "face"],
        ["video", "audio", "face"],
    ]
    assert left_out(made) == {"00004": ("label outside the set", False)}
    assert make(root, "mafw", split="test", sound="trust").samples[0].media["audio"].path
    (root / "Train & Test Set").rename(root / "split")  # an older copy
    assert labels_of(make(root, "mafw", split="train")) == {"00001": "anger"}
    questions = asked("eval/mafw.py", root)
    assert questions[0].turns[-1].text.startswith("<video><face>Which emotion")
    rows = answered(questions, lambda question: f"<answer>{question.truth}</answer>")
    assert scored("eval/mafw.py", rows)["emotion"]["official"] == {"war": 1.0, "uar": 1.0}


def test_a_dry_run_of_mafw_is_whole_with_silent_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = releases.mafw(tmp_path / "mafw")
    lists = root / "Train & Test Set/single/no_caption/set_1"
    put(lists / "test.txt", "00002.mp4 fear\n00003.mp4 fear\n")
    write_clip(root / "data/clips/00001.mp4", 0.5, size=(32, 32))
    write_clip(root / "data/clips/00002.mp4", 0.5, size=(32, 32), audio=False)
    write_clip(root / "data/clips/00003.mp4", 0.5, size=(32, 32))
    run_zero_shot("eval/mafw.py", ["--data", str(root), "--dry-run"])
    told = " ".join(capsys.readouterr().out.split())
    assert "emotion: 2 questions" in told
    assert "2 rows here, 1839 published" in told
    assert "without sound" not in told
    put(lists / "test.txt", "00002.mp4 fear\n00003.mp4 fear\n00004.mp4 fear\n00003.mp4 joyless\n")
    run_zero_shot("eval/mafw.py", ["--data", str(root), "--dry-run", "--option", "sound=trust"])
    told = " ".join(capsys.readouterr().out.split())
    assert "1 clip without sound: data/clips/00002.mp4" in told
    assert "1 files named by the data set but not in its folder" in told
    assert "1 row left out (label outside the set): mafw-00003: joyless" in told
    assert "This copy is not whole" in told


def test_ravdess_holds_out_four_actors(tmp_path: Path) -> None:
    root = releases.ravdess(tmp_path / "ravdess")
    made = make(root, "ravdess")
    assert labels_of(made) == {
        "01-01-01-01-01-01-01": "neutral",
        "01-01-06-02-02-01-02": "fearful",
        "01-01-08-01-01-02-24": "surprised",
    }
    assert made.samples[1].group == {"speaker": "02", "gender": "female", "intensity": "strong"}
    assert made.samples[1].transcript == "Dogs are sitting by the door."
    assert left_out(made) == {"05": ("label outside the set", False)}
    assert sum((made.published or {}).values()) == 1440
    assert set(make(root, "ravdess", split="test", fold="1").speakers) == {"01", "02"}
    assert set(make(root, "ravdess", split="train", fold="1").speakers) == {"24"}
    whole = make(root, "ravdess", split="test", fold="all")
    assert [sample.group["fold"] for sample in whole.samples] == ["1", "1", "6"]
    assert sum((whole.published or {}).values()) == 1440
    heard = make(root, "ravdess", media="audio")
    assert [list(sample.media) for sample in heard.samples] == [["audio"]]
    assert labels_of(heard) == {"03-01-02-01-01-01-05": "calm"}


def test_r1_omni_s_scorer_wants_the_label_to_the_letter(tmp_path: Path) -> None:
    questions = asked("eval/ravdess.py", releases.ravdess(tmp_path / "ravdess"))
    said = {"neutral": "Neutral.", "fearful": "<think>x</think><answer>fear</answer>"}
    rows = answered(questions, lambda question: said.get(question.truth, "  surprise"))
    block = scored("eval/ravdess.py", rows)["emotion"]
    # We read all three; the released scorer neither another case nor a dot.
    assert block["metrics"]["war"]["value"] == 1
    assert block["official"] == {"war": pytest.approx(2 / 3), "uar": pytest.approx(2 / 3)}
    assert block["groups"]["gender"]["values"]["female"]["value"] == 1


def test_meld_keeps_the_parts_apart_and_leaves_bad_clips_out(tmp_path: Path) -> None:
    root = releases.meld(tmp_path / "meld")
    made = make(root, "meld", split="test")
    assert labels_of(made) == {"test-dia0_utt0": "neutral", "test-dia0_utt1": "joy"}
    first = made.samples[0]
    assert first.media["video"].path == "output_repeated_splits_test/dia0_utt0.mp4"
    assert first.transcript == "It\u2019s fine."
    assert first.group["sentiment"] == "neutral"
    assert left_out(made) == {
        "dia279_utt15": ("known bad clip", True),
        "dia0_utt2": ("label outside the set", False),
    }
    assert made.missing == ("output_repeated_splits_test/dia9_utt9.mp4",)
    assert sum((made.published or {}).values()) == 2609
    kept = make(root, "meld", split="test", bad="keep")
    assert "test-dia279_utt15" in labels_of(kept)
    assert sum((kept.published or {}).values()) == 2610
    paths = {sample.media["video"].path for sample in make(root, "meld").samples}
    assert {"train_splits/dia0_utt0.mp4", "dev_splits_complete/dia0_utt0.mp4"} <= paths


def test_meld_is_scored_by_weighted_f1(tmp_path: Path) -> None:
    questions = asked("eval/meld.py", releases.meld(tmp_path / "meld"))
    assert [one.truth for one in questions] == ["neutral", "joy"]
    assert questions[0].turns[-1].text == (
        '<video><audio><face>The person says: "It\u2019s fine."\nWhich emotion does the speaker '
        "express? One of anger, disgust, sadness, joy, neutral, surprise, fear."
    )
    rows = answered(questions, lambda question: "neutral")
    block = scored("eval/meld.py", rows)["emotion"]
    assert block["official"] == {"waf": pytest.approx(0.5 * 2 / 3), "acc": 0.5}
    assert block["metrics"]["weighted_f1"]["value"] == pytest.approx(1 / 3)
    rows = answered(questions, lambda question: "no idea" if question.truth == "joy" else "neutral")
    assert scored("eval/meld.py", rows)["emotion"]["official"] == {"waf": 0.5, "acc": 0.5}


def test_iemocap_is_cut_out_of_dialogues(tmp_path: Path) -> None:
    root = releases.iemocap(tmp_path / "iemocap")
    made = make(root, "iemocap", split="test", labels="iemocap4")
    assert labels_of(made) == {"Ses05F_impro01_F000": "neutral", "Ses05F_impro01_M000": "happy"}
    first, second = made.samples
    assert first.media["video"].path == "Session5/dialog/avi/DivX/Ses05F_impro01.avi"
    assert (first.media["video"].start, first.media["video"].end) == (6.2901, 8.2357)
    assert (first.transcript, second.transcript) == ("Excuse me.", "Yeah!")
    assert first.group["speaker"] == "Ses05F"
    assert second.group == {
        "speaker": "Ses05M",
        "gender": "male",
        "session": "5",
        "dialogue": "Ses05F_impro01",
    }
    assert left_out(made) == {
        "Ses05F_impro01_M001": ("no such label in iemocap4", True),
        "Ses05F_impro01_F001": ("not one of the classes", True),
        "Ses05F_impro01_F002": ("empty span", False),
        "Ses05F_impro01_F003": ("label outside the set", False),
    }
    six = make(root, "iemocap", split="test")
    assert set(labels_of(six).values()) == {"neutral", "excited", "frustrated"}
    assert make(root, "iemocap", labels="iemocap4").published == {
        "happy": 1636,
        "sad": 1084,
        "neutral": 1708,
        "angry": 1103,
    }
    assert len(make(root, "iemocap", split="train").samples) == 12
    assert set(make(root, "iemocap", split="test", session="2").speakers) == {"Ses02F", "Ses02M"}
    assert len(asked("eval/iemocap4.py", root)) == 2
    assert len(asked("eval/iemocap6.py", root)) == 3


def test_mer2023_asks_for_emotion_and_valence(tmp_path: Path) -> None:
    root = releases.mer2023(tmp_path / "mer2023")
    made = make(root, "mer2023")
    assert labels_of(made) == {
        "train-a1": "happy",
        "train-a2": "sad",
        "test1-b1": "worried",
        "test1-b2": "neutral",
        "test2-c1": "surprise",
        "test3-d1": "angry",
    }
    assert made.samples[1].media["video"].path == "train/a2.avi"
    assert [sample.transcript for sample in made.samples[:4]] == ["太好了", None, None, None]
    assert sum((make(root, "mer2023", split="test1").published or {}).values()) == 411
    questions = asked("eval/mer2023.py", root)
    assert [(one.task, one.truth) for one in questions] == [
        ("emotion", "worried"),
        ("emotion", "neutral"),
        ("valence", -2.25),
        ("valence", 0.0),
    ]
    text = {"emotion": "worried", "valence": "-1.25"}
    rows = answered(questions, lambda question: text[question.task])
    blocks = scored("eval/mer2023.py", rows)
    assert blocks["valence"]["scored"]["mae"]["value"] == pytest.approx((1 + 1.25) / 2)
    from mmemo.evaluation.scorers.released import mer_multi

    found = mer_multi(rows)
    assert found["mse"] == pytest.approx((1 + 1.25**2) / 2)
    assert found["combined"] == pytest.approx(found["waf"] - 0.25 * found["mse"])
    assert len(asked("eval/mer2023.py", root, {"split": "test3"})) == 1


def test_mer2024_reads_the_tables_of_both_releases(tmp_path: Path) -> None:
    root = releases.mer2024(tmp_path / "mer2024")
    made = make(root, "mer2024", split="test1")
    assert labels_of(made) == {"samplenew1": "worried"}
    assert made.missing == ("video-unlabeled-with-test2noise/none.mp4",)
    assert labels_of(make(root, "mer2024", split="semi")) == {"old1": "sad"}
    train = make(root, "mer2024")
    assert train.samples[0].transcript == "太好了"
    assert [one.truth for one in asked("eval/mer2024.py", root)] == ["worried"]
    with pytest.raises(DataError, match=r"test2_name_convert_label\.csv: is missing"):
        make(root, "mer2024", split="test2")


def test_emodb_is_asked_by_its_sound(tmp_path: Path) -> None:
    put(tmp_path / "emodb/wav/03a01Wa.wav")
    put(tmp_path / "emodb/wav/14b02Lb.wav")
    questions = asked("eval/emodb.py", tmp_path / "emodb")
    assert questions[0].turns[-1].text.startswith("<audio>Which emotion does the speaker")
    rows = answered(questions, lambda question: "Wut")
    block = scored("eval/emodb.py", rows)["emotion"]
    assert (block["metrics"]["uar"]["value"], block["official"]["acc"]) == (0.5, 0.5)


def test_sentiment_sets_are_read_in_every_layout(tmp_path: Path) -> None:
    made = make(releases.mosi(tmp_path / "mosi"), "sentiment", set="mosi", split="test")
    golds: dict[str, Any] = {sample.sample_id: sample.columns["gold"] for sample in made.samples}
    assert golds == {"mosi--3g5yACwYnA_10": -2.4, "mosi-aBc_1_1": 0.0}
    assert [sample.answer for sample in made.samples] == [
        "<answer>-2.4</answer>",
        "<answer>0</answer>",
    ]
    assert [sample.truth.label for sample in made.samples] == ["negative", "neutral"]
    assert {one.row: (one.reason, one.expected) for one in made.excluded} == {
        "mosi-aBc_1_2": ("label outside the scale", False),
        "mosi-aBc_1_3": ("label outside the scale", False),
        "mosi-aBc_1_6": ("in no split", True),
    }
    assert made.missing == ("Raw/aBc_1/4.mp4",)
    made = make(releases.mosei(tmp_path / "mosei"), "sentiment", set="mosei")
    assert made.samples[0].media["video"].path == "Video/Segmented/aa_b_0.mp4"
    made = make(releases.sims(tmp_path / "sims"), "sentiment", set="sims")
    first = made.samples[0]
    assert first.media["video"].path == "Raw/video_0001/0001.mp4"
    assert first.truth.modality_labels == {"text": "negative", "audio": "positive"}
    assert [sample.transcript for sample in made.samples] == ["我很高兴", None, "好"]
    made = make(releases.sims_v2(tmp_path / "sims_v2"), "sentiment", set="sims_v2", split="test")
    assert made.samples[0].media["audio"].path == "Raw/aqgy3_0001/00000.mp4"
    assert made.published == {"": 1034}


def test_sentiment_is_scored_as_mmsa_does(tmp_path: Path) -> None:
    questions = asked("eval/sentiment/mosi.py", releases.mosi(tmp_path / "mosi"))
    assert [one.truth for one in questions] == [-2.4, 0.0]
    assert 'The person says: "IT WAS BAD"' in questions[0].turns[-1].text
    rows = answered(questions, lambda one: "-1.5" if one.truth else "I cannot tell")
    block = scored("eval/sentiment/mosi.py", rows)["sentiment"]
    assert block["headline"] == "acc2_has0"
    assert block["scored"]["acc2_has0"]["value"] == 0.5  # no number is wrong
    assert block["scored"]["mae"]["value"] == pytest.approx((0.9 + 3) / 2)
    official = block["official"]
    assert (official["Has0_acc_2"], official["MAE"], official["left_out"]) == (1.0, 0.9, 1.0)
    json.dumps(block, allow_nan=True)
    for name in ("mosei", "sims", "sims_v2"):
        root = getattr(releases, name)(tmp_path / name)
        rows = answered(asked(f"eval/sentiment/{name}.py", root), lambda one: str(one.truth))
        block = scored(f"eval/sentiment/{name}.py", rows)["sentiment"]
        assert block["scored"]["acc5"]["value"] == 1
        assert block["official"]["MAE"] == 0


@pytest.mark.parametrize(
    ("adapter", "options"),
    [("dfew", {}), ("mafw", {}), ("meld", {}), ("iemocap", {}), ("mer2023", {}), ("mer2024", {})]
    + [("sentiment", {"set": name}) for name in ("mosi", "mosei", "sims", "sims_v2")],
)
def test_an_empty_folder_is_refused_in_a_sentence(
    tmp_path: Path, adapter: str, options: dict[str, str]
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is missing|has no|finds nothing"):
        make(tmp_path / "empty", adapter, **options)
