"""MER-UniBench's official scores: by hand, by the released loop, and on recorded predictions."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from mmemo.answers.emotion_wheels import load_wheels, split_official
from mmemo.data.merbench import SETS, set_named
from mmemo.errors import ConfigError, EvaluationError
from mmemo.evaluation.mer_unibench import (
    PRIMARY,
    aligned,
    official_of_rows,
    official_score,
    read_recorded,
    summary,
    tasks,
)
from mmemo.evaluation.scoring import score_rows
from mmemo.statistics import BootstrapConfig
from tests.answers.test_emotion_wheels import write_wheels

RECORDED = Path(os.environ.get("MMEMO_TEST_DATA", "")) / "mer_unibench"
FILES = sorted(RECORDED.glob("*.json")) if "MMEMO_TEST_DATA" in os.environ else []
needs_data = pytest.mark.skipif(
    not FILES, reason="needs MER-UniBench's recorded predictions, in MMEMO_TEST_DATA/mer_unibench"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up wheels. All five map happy to joyful/content, and know no "neutral". Fear is scared,
    through "anxious", on the second level too; on wheel 1 through "anxious" as well."""
    return write_wheels(tmp_path_factory.mktemp("wheels") / "emotion_wheel")


@needs_data
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_scores_come_out(path: Path) -> None:
    recorded = read_recorded(path)
    found = official_score(
        recorded.set_name, recorded.gold, recorded.predicted, RECORDED / "emotion_wheel"
    )
    alias = {"f1": "fscore", "acc": "accuracy", "f": "fscore", "wf1": "waf", "n_kept": "kept"}
    if "waf" in found:
        alias |= {"fscore": "waf", "f1": "waf"}
    compared = 0
    for name, value in recorded.official.items():
        key = alias.get(name, name)
        if isinstance(value, int | float) and key in found:
            assert found[key] == pytest.approx(value, abs=1e-6), name
            compared += 1
    for wheel in recorded.official.get("per_wheel", ()):
        for name, value in wheel.items():
            key = f"wheel{wheel['wheel']}_{alias.get(name, name)}"
            if name != "wheel" and key in found:
                assert found[key] == pytest.approx(value, abs=1e-6), key
    assert compared > 0


def test_hit_rate_by_hand(folder: Path) -> None:
    gold = ["happy", "fear", "neutral", "happy", "Happy"]
    said = ["[happy, relaxed, fear]", "[fearless]", "[happy]", "", "['happy']"]
    found = official_score("meld", gold, said, folder)
    # Kept are all but "neutral". Hits: 1, 0 (fearless is joyful), 0 (empty), 1.
    assert [found[f"wheel{n}_kept"] for n in range(1, 6)] == [4] * 5
    assert found["hitrate"] == pytest.approx(2 / 4)
    # Classes of all labels: joyful (happy), scared (fear). The first answer names both: 1/2. The
    # second names joyful only, 0/1. Then 0, and 1/1.
    assert found["mscore"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert next(iter(found)) == "hitrate"
    # IEMOCAP's label file has numbers: 0 is happy, 2 neutral.
    as_numbers = official_score("iemocap", [np.int64(0), 2], ["[happy]", "[happy]"], folder)
    assert as_numbers == official_score(
        "iemocap", ["happy", "neutral"], ["[happy]", "[happy]"], folder
    )


def test_mscore_ignores_what_is_no_label_of_the_set(folder: Path) -> None:
    found = official_score("mer2023", ["happy"], ["[happy, fear]"], folder)
    assert found["mscore"] == 1.0  # no label of the set is scared
    # The released scorer maps the labels as they are written, and knows none in upper case.
    found = official_score("mer2023", ["Happy"], ["[happy]"], folder)
    assert (found["hitrate"], found["mscore"]) == (1.0, 0.0)


def test_sets_by_hand(folder: Path) -> None:
    gold = ["[happy, fear]", "relaxed", ["neutral"], "happy"]
    said = ["[happy]", "[relaxed, fear, unheard of]", "[happy]", ""]
    found = official_score("OV-MERD+", gold, said, folder)
    # P: 1, 1/2 (unknown words cost nothing), left out, 0. R: 1/2, 1, left out, 0.
    p, r = 1.5 / 3, 1.5 / 3
    assert found["precision"] == pytest.approx(p)
    assert found["recall"] == pytest.approx(r)
    assert found["fscore"] == pytest.approx(2 * p * r / (p + r))
    assert found["track2"] == pytest.approx((found["fscore"] + found["level2_fscore"]) / 2)
    assert official_score("set", gold, said, folder) == found  # a set that is none of the nine


def test_wheels_are_averaged_after_f(tmp_path: Path) -> None:
    folder = write_wheels(tmp_path / "w")
    # On wheel 2 nothing of "brave" is joyful any more: it stands under mad.
    table = (
        (folder / "wheel2.csv")
        .read_text()
        .replace(",proud,brave", ",proud,")
        .replace("mad,bitter,proud", "mad,bitter,brave")
    )
    (folder / "wheel2.csv").write_text(table)
    gold, said = ["[happy]", "[happy, fear]"], ["[happy, fearless]", "[fearless]"]
    found = official_score("ovmerdplus", gold, said, folder)
    # Wheel 1, 3 to 5: P = (1 + 1)/2, R = (1 + 1/2)/2 = 3/4, F = 6/7.
    # Wheel 2: P = (1/2 + 0)/2 = 1/4, R = (1 + 0)/2 = 1/2, F = 1/3.
    assert found["wheel1_fscore"] == pytest.approx(6 / 7)
    assert found["wheel2_fscore"] == pytest.approx(1 / 3)
    assert found["fscore"] == pytest.approx((4 * 6 / 7 + 1 / 3) / 5)
    mean_p, mean_r = found["precision"], found["recall"]
    assert found["fscore"] != pytest.approx(2 * mean_p * mean_r / (mean_p + mean_r))


def test_level_2_maps_an_inner_word_to_the_first_one_below_it(folder: Path) -> None:
    wheels = load_wheels(folder)
    assert wheels.wheels[1].second["joyful"] == "content"  # of content, proud
    assert wheels.wheels[1].second["scared"] == "anxious"  # of anxious, weak
    assert wheels.wheels[1].second["timid"] == "weak"
    assert wheels.wheels[0].second["proud"] == "bitter"  # where it stands last
    assert wheels.official("happy", 1, 2) == "content"
    assert wheels.corrected("joyful", 1, 2) == "joyful"  # an inner word names none below it
    assert wheels.corrected("timid", 1, 2) == "weak"
    assert wheels.corrected("neutral", 1, 2) == "neutral?"
    found = official_score("ovmerdplus", ["happy", "fear"], ["[relaxed]", "[relaxed]"], folder)
    # Level 2 on every wheel: happy and relaxed are content; fear is anxious.
    assert found["level2_fscore"] == pytest.approx(0.5)


def test_an_answer_is_split_to_the_letter() -> None:
    assert split_official("[a, 'b', \"c d\"]") == ["a", "b", "c d"]
    assert split_official("[[a], B ]") == ["[a]", "b"]  # one bracket off either end
    assert split_official("[a]\n") == ["a]"]
    assert split_official("a; b and c") == ["a; b and c"]
    assert split_official("[don't know]") == ["don", "t know"]
    assert split_official(["A ", "b"]) == ["a", "b"]
    assert split_official(None) == split_official(math.nan) == split_official("[") == []
    assert split_official("[]") == split_official("','") == []


def test_sentiment_by_hand_and_as_sklearn_has_it() -> None:
    gold = [1.2, -0.4, 0.0, 2.0, -3.0, 0.6]
    said = ["positive", "neutral", "positive", "mixed", "positive", "Positive"]
    found = official_score("mosi", gold, said)
    # Without the 0: true + - + - +, said + - - + -. "Positive" is not "positive".
    # F1 of + is 2·1/(3 + 2) = 2/5, of - 2·1/(2 + 3) = 2/5.
    assert found == {"waf": pytest.approx(0.4), "accuracy": pytest.approx(0.4), "kept": 5}
    assert official_score("SIMSv2", [1.0, -1.0], [1, -1])["waf"] == 1.0
    assert official_score("mosei", [1.0], [None])["waf"] == 0.0
    assert official_score("sims", [0.0], ["positive"]) == {"kept": 0}


@given(
    st.lists(
        st.tuples(
            st.sampled_from([-1.0, -0.2, 0.0, 0.4, 3.0]),
            st.sampled_from(["positive", "negative", "neutral", "mixed", ""]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_sentiment_equals_the_released_loop(pairs: list[tuple[float, str]]) -> None:
    kept = [(true > 0, said == "positive") for true, said in pairs if true != 0]
    gold, said = [true for true, _ in pairs], [said for _, said in pairs]
    if any(said) and not {"positive", "negative", "neutral"} & set(said):
        with pytest.raises(EvaluationError, match="openset-sentiment"):
            official_score("mosi", gold, said)
        return
    found = official_score("mosi", gold, said)
    if kept:
        true, positive = zip(*kept, strict=True)
        assert found["waf"] == pytest.approx(f1_score(true, positive, average="weighted"))
        assert found["accuracy"] == pytest.approx(accuracy_score(true, positive))


KNOWN = ["happy", "fear", "fearless", "relaxed", "neutral", "fearful", "no words", "Happy", "x"]
LISTS = st.lists(st.sampled_from(KNOWN), max_size=4)


@given(st.lists(st.tuples(LISTS, LISTS), min_size=1, max_size=6))
def test_words_equal_the_released_loop(
    folder: Path, items: list[tuple[list[str], list[str]]]
) -> None:
    # The scorer's loop, written down from its description.
    wheels = load_wheels(folder)
    scores: list[tuple[float, float, float, float]] = []
    for number in range(5):
        p: list[float] = []
        r: list[float] = []
        hits: list[int] = []
        for true, said in items:
            y = {c for w in true if (c := wheels.official(w, number))}
            y_hat = {c for w in said if (c := wheels.official(w, number))}
            if not y:
                continue
            p.append(len(y & y_hat) / len(y_hat) if y_hat else 0)
            r.append(len(y & y_hat) / len(y))
            hits.append(len(y & y_hat))
        if p:
            mean_p, mean_r = float(np.mean(p)), float(np.mean(r))
            f = 2 * mean_p * mean_r / (mean_p + mean_r) if mean_p + mean_r else 0.0
            scores.append((f, mean_p, mean_r, float(np.mean(hits))))
    gold = [f"[{', '.join(true)}]" for true, _ in items]
    answers = [f"[{', '.join(said)}]" for _, said in items]
    found = official_score("ovmerd", gold, answers, folder)
    hit = official_score("mer2024", gold, answers, folder)
    if not scores:
        assert "fscore" not in found
        assert hit["wheel1_kept"] == 0
        return
    means = np.mean(scores, axis=0)
    assert [found[n] for n in ("fscore", "precision", "recall")] == pytest.approx(
        means[:3].tolist()
    )
    assert hit["hitrate"] == pytest.approx(means[3])


def test_answers_are_aligned_by_name_or_as_mer2024() -> None:
    assert aligned(["a", "b"], {"b": "2", "a": "1", "c": "3"}) == ["1", "2"]
    assert aligned(["a", "b"], {"x_1": "1", "x_2": "2"}) == ["1", "2"]
    for answers in ({"a": "1"}, {"a": "1", "c": "2"}, {"x": "1"}, {}):
        with pytest.raises(EvaluationError, match="clips have no answer, such as"):
            aligned(["a", "b"], answers)
    with pytest.raises(EvaluationError, match="2 labels and 1 answers"):
        official_score("mosi", [1.0, 2.0], ["positive"])


def test_sets_are_known_by_any_usual_name() -> None:
    names = ("MELD", "IEMOCAPFour", "CMU-MOSI", "cmumosei", "CH-SIMSv2", "OVMERDPlus", "OV-MERD+")
    assert [set_named(name).name for name in names] == [
        *("meld", "iemocap", "mosi", "mosei", "simsv2", "ovmerdplus", "ovmerdplus"),
    ]
    sizes = [one.size for one in SETS.values()]
    assert sizes == [411, 1169, 2610, 1241, 686, 4659, 457, 1034, 532]
    with pytest.raises(ConfigError, match="no set 'mled'; did you mean 'meld'"):
        set_named("mled")


def rows(task: str, truths: list[Any], raws: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "key": str(place),
            "sample_id": str(place),
            "task": task,
            "labels": [],
            "truth": truth,
            "raw": raw,
            "answer": raw,
            "status": "ok" if raw else "malformed",
            "group": {},
        }
        for place, (truth, raw) in enumerate(zip(truths, raws, strict=True))
    ]


def test_both_modes_stand_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEMO_EMOTION_WHEEL", str(folder))
    given_rows = [
        *rows("meld", ["happy", "neutral", "fear"], ["[happy]", "[neutral]", "[fearless]"]),
        *rows("mosi", [1.0, -1.0, -2.0, 0.0], ["positive", "neutral", "negative", "negative"]),
        *rows("ovmerdplus", [["happy"], ["neutral"]], ["[happy, x]", "[calm]"]),
    ]
    declared = tasks()
    specs = {name: task.scorers for name, task in declared.items()}
    blocks = score_rows(given_rows, BootstrapConfig(resamples=100), specs)
    for block in blocks.values():
        for metric in block["scored"].values():
            assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
    hit = blocks["meld"]["scored"]
    assert blocks["meld"]["headline"] == "official_hitrate"
    # Officially "neutral" is left out. Corrected keeps it, and it is right.
    assert (hit["official_hitrate"]["value"], hit["official_hitrate"]["n"]) == (0.5, 2)
    assert hit["corrected_hitrate"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert hit["corrected_hitrate"]["n"] == 3
    # Officially neutral counts as negative: all right. Corrected it is wrong: F1 of + is 1, of -
    # 2·1/(2 + 1) = 2/3, weighted (1 + 2·2/3)/3.
    assert blocks["mosi"]["scored"]["official_waf"]["value"] == 1
    waf = blocks["mosi"]["scored"]["corrected_waf"]
    assert waf["value"] == pytest.approx((1 + 4 / 3) / 3, abs=1e-6)
    assert (waf["n"], waf["unscored"]) == (3, 1)
    # Officially P = R = 1 on the one kept; corrected P = (1/2 + 0)/2, R = 1/2, F = 1/3.
    words = blocks["ovmerdplus"]["scored"]
    assert words["official_fscore"]["value"] == 1
    assert words["corrected_fscore"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    for name, task in declared.items():
        own = [row for row in given_rows if row["task"] == name]
        if own:
            assert task.official is not None
            numbers = task.official(own)
            primary = PRIMARY[SETS[name].metric]
            first = blocks[name]["scored"][f"official_{primary}"]["value"]
            assert "by_rule" not in numbers
            assert numbers[primary] == pytest.approx(first, abs=1e-6)
            json.dumps(numbers, allow_nan=False)
    table = summary(blocks)
    assert table["official"]["mean of 3"] == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-6)
    assert table["official"]["mean"] is None  # six sets are missing
    whole = summary(
        {
            name: {"scored": {f"official_{PRIMARY[one.metric]}": {"value": 0.1 * place}}}
            for place, (name, one) in enumerate(SETS.items())
        }
    )
    assert whole["official"]["mean"] == pytest.approx(0.4)  # of 0 to 0.8
    assert whole["corrected"]["mean"] is None


def test_free_texts_are_searched_and_lists_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEMO_EMOTION_WHEEL", str(folder))
    told = ["She smiles and seems happy.", "<think>happy</think><answer>fear</answer>"]
    found = official_of_rows("meld", rows("meld", ["happy", "fear"], told))
    assert (found["hitrate"], found["by_rule"]) == (1.0, 1.0)
    assert "by_rule" not in official_of_rows("meld", rows("meld", ["happy"], ["[fear]"]))
    # A file of lists is read to the letter, its one sentence too.
    mixed = ["[happy]", "[happy]", "She is happy."]
    assert official_of_rows("meld", rows("meld", ["happy"] * 3, mixed))["hitrate"] == (
        pytest.approx(2 / 3)
    )
    sentiment = official_of_rows("mosi", rows("mosi", [1.0, -1.0], ["[happy]", "He is sad."]))
    assert sentiment["waf"] == 1.0


def test_without_wheels_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMEMO_EMOTION_WHEEL", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="MMEMO_EMOTION_WHEEL"):
        official_score("meld", ["happy"], ["happy"])
    (tmp_path / "a.json").write_text('{"dataset": "meld", "items": []}')
    with pytest.raises(EvaluationError, match=r"a\.json: holds no predictions"):
        read_recorded(tmp_path / "a.json")
