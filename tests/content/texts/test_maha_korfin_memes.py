"""MahaEmotions, KorFinASC and Beyond Hate on folders in the layout of their releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmemo.errors import ConfigError, DataError
from mmemo.evaluation.script import run_zero_shot
from tests.content.texts.asking import Asked
from tests.media_files import write_clip


@pytest.fixture
def maha(tmp_path: Path) -> Path:
    root = tmp_path / "maha"
    (root / "anger-disgust-separate").mkdir(parents=True)
    train = 'Tweet,Label\n"आज खूप आनंद, झाला",Happiness\nमला राग आला,Anger/Disgust\n'
    test = (
        "\ufeffTweet,Label,\n"
        '"आज  खूप आनंद, झाला","Happiness ",\n'
        "आम्ही दु:खी आहोत,sadness,\n"
        "काय हे,Anger/Disgust,\n"
        "तू महान,respect\n"
        "काहीच नाही,Boredom,\n"
        ",Fear,\n"
        "एक,दोन,तीन,चार\n"
    )
    (root / "train.csv").write_text(train, encoding="utf-8")
    (root / "test.csv").write_text(test, encoding="utf-8")
    apart = "Tweet,Label\nकाय हे,Disgust\nनको,anger\n"
    (root / "anger-disgust-separate/test.csv").write_text(apart, encoding="utf-8")
    return root


def test_tweets_that_are_also_in_train_are_told(maha: Path) -> None:
    asked = Asked("maha_emotions", maha)
    assert [one.truth for one in asked.questions] == [
        *("Happiness", "Sadness", "Anger/Disgust", "Respect")
    ]
    groups = [one.sample.group for one in asked.questions]
    assert groups == [{"in_train": "yes"}, *[{"in_train": "no"}] * 3]
    assert asked.left_out == [
        ("label outside the set", "Boredom"),
        ("no tweet", "Fear"),
        ("wrong number of cells", "4 cells under 3 columns"),
    ]
    block = asked.score("emotion10", ("आनंद", "दुःख", "disgust", "Pride"))
    assert block["metrics"]["war"]["value"] == 3 / 4
    values = block["groups"]["in_train"]["values"]
    assert values["yes"]["value"] == 1
    assert values["no"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    dropped = Asked("maha_emotions", maha, overlap="drop")
    assert dropped.left_out[0] == ("also in train", "आज  खूप आनंद, झाला")
    assert len(dropped.questions) == 3
    train = Asked("maha_emotions", maha, split="train")
    assert train.made.unlike_published() == ["2 rows here, 11998 published"]
    assert all("in_train" not in one.sample.group for one in train.questions)


def test_eleven_classes_keep_anger_and_disgust_apart(maha: Path) -> None:
    asked = Asked("maha_emotions", maha, classes="11")
    assert [one.truth for one in asked.of("emotion11")] == ["Disgust", "Anger"]
    rows = asked.rows("emotion11", ("Anger/Disgust", "राग"))
    assert [(row["status"], row["answer"]) for row in rows] == [
        ("malformed", None),
        ("ok", "Anger"),
    ]
    with pytest.raises(ConfigError, match="classes is '12'"):
        Asked("maha_emotions", maha, classes="12")


@pytest.fixture
def korfin(tmp_path: Path) -> Path:
    root = tmp_path / "korfin"
    root.mkdir()
    text = (
        "\ufeffSID,TYPE,SRC,ASPECT,SENTIMENT\n"
        '1,multiple,"삼성전자는 웃고, LG전자는 울었다. 삼성전자 만세",삼성전자,POSITIVE\n'
        '1,multiple,"삼성전자는 웃고, LG전자는 울었다. 삼성전자 만세",LG전자,NEGATIVE\n'
        "2,single,LGU＋ 주가가 그대로다,LG U+,neutral\n"
        "3,single,카카오가 올랐다,카카오,GOOD\n"
        "4,single,네이버가 올랐다,,POSITIVE\n"
        "5,single,네이버가 올랐다\n"
    )
    (root / "korfin_asc.csv").write_text(text, encoding="utf-8")
    return root


def test_aspects_and_their_masks(korfin: Path) -> None:
    asked = Asked("korfinasc", korfin)
    assert [one.truth for one in asked.questions] == ["positive", "negative", "neutral"]
    assert [dict(one.sample.group) for one in asked.questions] == [
        {"speaker": "text 1", "entities": "multi", "verbatim": "yes"},
        {"speaker": "text 1", "entities": "multi", "verbatim": "yes"},
        {"speaker": "text 2", "entities": "single", "verbatim": "no"},
    ]
    assert [reason for reason, _ in asked.left_out] == [
        *("label outside the set", "no text or no aspect", "wrong number of cells")
    ]
    masked = Asked("korfinasc", korfin, mask="target")
    text = masked.questions[0].turns[-1].text
    assert "[TGT]는 웃고, LG전자는 울었다. [TGT] 만세" in text
    assert "[TGT]에 대한" in text
    assert "삼성전자" not in text
    assert ("aspect not in the text", "LG U+") in masked.left_out
    other = Asked("korfinasc", korfin, mask="other").questions[0].turns[-1].text
    assert "삼성전자" not in other
    assert any(f"{name}는 웃고" in other for name in ("LG U+", "카카오"))


def test_sentiment_is_scored_over_all_answers(korfin: Path) -> None:
    asked = Asked("korfinasc", korfin)
    block = asked.score("sentiment", ("긍정", "positive", "중립적입니다"))
    assert block["metrics"]["war"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    # F1: positive 2/3, negative 0, neutral 1.
    assert block["metrics"]["macro_f1"]["value"] == pytest.approx(5 / 9, abs=1e-6)
    assert block["groups"]["entities"]["values"]["multi"]["value"] == 1 / 2
    (korfin / "other.csv").write_text("SID,SRC\n", encoding="utf-8")
    with pytest.raises(DataError, match="has several files"):
        Asked("korfinasc", korfin)
    with pytest.raises(DataError, match="has no column 'TYPE'"):
        Asked("korfinasc", korfin, file="other.csv")


@pytest.fixture
def memes(tmp_path: Path) -> Path:
    root = tmp_path / "memes"
    write_clip(root / "clips/01235.mp4", seconds=1.0, fps=4)
    write_clip(root / "clips/2.mp4", seconds=1.0, fps=4)
    lines = [
        {
            "id": 1235,
            "img": "img/01235.png",
            "label": 1,
            "text": "go away",
            "incivility": 1,
            "intolerance": "1",
        },
        {
            "id": "2",
            "img": "img/2.png",
            "label": 0,
            "text": "hi",
            "incivility": 0,
            "intolerance": 0,
        },
        {
            "id": "3",
            "img": "img/3.png",
            "label": 1,
            "text": "you idiot",
            "incivility": True,
            "intolerance": 0,
        },
        {"id": "3", "img": "img/3.png", "label": 0, "text": "again"},
        {"id": "4", "img": "img/4.png", "text": "no label", "incivility": 1},
        {"id": "5", "img": "img/5.png", "label": 0, "text": "only the old label"},
    ]
    text = "\ufeff" + "\n".join(map(json.dumps, lines)) + "\n\n{broken\n"
    (root / "all.jsonl").write_text(text, encoding="utf-8")
    return root


def test_memes_with_and_without_sub_labels(memes: Path) -> None:
    asked = Asked("beyond_hate", memes, picture="none")
    assert [one.truth for one in asked.of("hateful")] == ["yes", "no", "yes", "no"]
    assert [one.truth for one in asked.of("kinds")] == [
        *(["uncivil", "intolerant"], [], ["uncivil"])
    ]
    assert [reason for reason, _ in asked.left_out] == [
        *("listed twice", "no label", "no label", "no JSON")
    ]
    shown = Asked("beyond_hate", memes)
    assert shown.made.missing == ("clips/3.mp4", "clips/5.mp4")
    assert [one.sample.media["video"].path for one in shown.of("hateful")] == [
        *("clips/01235.mp4", "clips/2.mp4")
    ]
    assert shown.questions[0].turns[-1].text.startswith("<video>This meme says: go away")


def test_what_a_moderator_misses(memes: Path) -> None:
    asked = Asked("beyond_hate", memes, picture="none")
    block = asked.score("hateful", ("no", "yes", "I'm not able to help", "no"))
    # Both hateful memes are missed, one of two others is called hateful.
    assert block["metrics"]["war"]["value"] == 1 / 4
    scored = block["scored"]
    assert (scored["fnr"]["value"], scored["fpr"]["value"]) == (1, 1 / 2)
    assert scored["fnr_minus_fpr"]["value"] == 1 / 2
    kinds = asked.score("kinds", ("uncivil", "none", "uncivil, intolerance"))["scored"]
    assert kinds["fnr_minus_fpr[uncivil]"]["value"] == 0
    assert kinds["fnr_minus_fpr[intolerant]"]["value"] == 1 - 1 / 2
    assert kinds["micro_f1"]["value"] == pytest.approx(4 / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("maha_emotions", (), "1 row left out (label outside the set)"),
        ("korfinasc", ("mask=target",), "1 row left out (aspect not in the text)"),
        ("beyond_hate", (), "2 files named by the data set but not in its folder"),
    ],
)
def test_a_dry_run_needs_no_model(
    name: str,
    options: tuple[str, ...],
    told: str,
    maha: Path,
    korfin: Path,
    memes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    roots = {"maha_emotions": maha, "korfinasc": korfin, "beyond_hate": memes}
    given = [word for one in options for word in ("--option", one)]
    run_zero_shot(f"eval/texts/{name}.py", ["--data", str(roots[name]), "--dry-run", *given])
    shown = " ".join(capsys.readouterr().out.split())
    assert told in shown
    assert "This copy is not whole" in shown
