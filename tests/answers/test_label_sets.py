"""The registry of label sets: every form means one label, and no mapping merges silently."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo.answers.label_sets import (
    circumplex,
    emotion_set,
    label_set,
    mapping,
    set_names,
)
from mmemo.answers.parsing import EMOTIONS, emotion_labels, normalise, parse
from mmemo.answers.words import emotion_forms, labelled_languages
from mmemo.errors import EvaluationError

SIZES = {
    "emodb": 7,
    "ravdess": 8,
    "crema_d": 6,
    "meld": 7,
    "iemocap4": 4,
    "iemocap6": 6,
    "mer2023": 6,
    "ca_mer": 9,
    "dfew": 7,
    "mafw": 11,
    "emotiontalk": 7,
    "berst": 7,
    "emos": 7,
    "emovoice": 7,
    "naturalvoices": 4,
    "polarity": 3,
    "sims5": 5,
    "goemotions": 28,
    "emonet": 40,
}
FORMS = [
    (code, emotion, form)
    for code, language in labelled_languages().items()
    for emotion, forms in language.labels.items()
    for form in forms
]
NAMES = st.sampled_from(set_names())


def test_every_set_is_there_with_all_its_labels() -> None:
    assert {name: len(emotion_set(name).labels) for name in set_names()} == SIZES


def test_a_form_means_one_emotion_whatever_the_language() -> None:
    owner: dict[str, str] = {}
    for code, emotion, form in FORMS:
        assert normalise(form) == form, form
        assert owner.setdefault(form, emotion) == emotion, (code, form)


def test_languages_have_the_same_emotions_and_english_names_them() -> None:
    english = labelled_languages()["en"].labels
    for language in labelled_languages().values():
        assert set(language.labels) == set(english), language.code
        assert all(language.labels.values()), language.code
    assert [forms[0] for forms in english.values()] == list(english)
    assert set(EMOTIONS) <= set(english)


@pytest.mark.parametrize("name", set_names())
def test_every_label_and_name_is_read_as_itself_only(name: str) -> None:
    found = emotion_set(name)
    for language in labelled_languages():
        labels = found.label_set(language)
        for label in found.labels:
            for word in {label.name, label.called("zh"), *label.words}:
                assert labels.exact(normalise(word)) == label.called(language), word
        assert len(labels.labels) == SIZES[name]


@pytest.mark.parametrize("name", set_names())
def test_guessed_aliases_are_the_registry_s(name: str) -> None:
    # What emotion_labels finds for bare names agrees with the set: no label steals another's form.
    found = emotion_set(name)
    guessed = emotion_labels(found.names)
    assert guessed.labels == found.label_set().labels
    for label in found.labels:
        for form in guessed.aliases.get(label.name, ()):
            if name != "sims5":  # there, "positive" is the strong one of two
                assert found.find(form) == label


def test_codes_agree_with_the_abbreviations_of_labels() -> None:
    short = {
        code: emotion
        for lang in labelled_languages().values()
        for emotion, code in lang.abbreviations.items()
    }
    for name in set_names():
        for label in emotion_set(name).labels:
            for code in label.codes:
                known = short.get(code.casefold())
                assert known is None or known in label.emotions, (name, code)


@pytest.mark.parametrize(
    ("name", "written", "label"),
    [
        ("emodb", "A", "fear"),
        ("emodb", "Freude", "happiness"),
        ("ravdess", "06", "fearful"),
        ("dfew", "1", "happy"),
        ("dfew", "7", "fear"),
        ("crema_d", "ANG", "anger"),
        ("crema_d", "hap", "happiness"),
        ("meld", "joy", "joy"),
        ("meld", "happy", "joy"),
        ("iemocap4", "exc", "happy"),
        ("iemocap6", "exc", "excited"),
        ("iemocap6", "fru", "frustrated"),
        ("mer2024", "worried", "worried"),
        ("mer2023", "担心", "worried"),
        ("mafw", "焦虑", "anxiety"),
        ("mosei", "weakly negative", "negative"),
        ("sims5", "weakly negative", "weakly negative"),
        ("SIMS", "消极", "negative"),
        ("goemotions", "17", "joy"),
        ("emonet40", "enthusiasm", "Hope/Enthusiasm/Optimism"),
        ("emonet", "envy", "Jealousy & Envy"),
        ("EmotionTalk", "fear", "fearful"),
    ],
)
def test_files_and_answers_write_labels_in_many_ways(name: str, written: str, label: str) -> None:
    assert emotion_set(name).find(written).name == label


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("mer2023", "fear"),
        ("mafw", "worried"),
        ("emonet", "anxiety"),
        ("dfew", "8"),
        ("meld", "xxx"),
    ],
)
def test_an_unknown_label_is_an_error(name: str, written: str) -> None:
    with pytest.raises(EvaluationError, match=f"'{written}' is no label of {name}; its labels are"):
        emotion_set(name).find(written)
    with pytest.raises(EvaluationError, match="is no label of"):
        mapping(name, "dfew")[written]


def test_unknown_sets_and_languages_are_errors() -> None:
    with pytest.raises(EvaluationError, match="'mer203'; did you mean 'mer2023'"):
        label_set("mer203")
    with pytest.raises(EvaluationError, match="the sets are emodb, "):
        mapping("dfew", "@@@@@@")
    with pytest.raises(EvaluationError, match="language 'xx'; use en or zh"):
        label_set("dfew", "xx")


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("dfew", "<answer>高兴</answer>", "happy"),
        ("dfew", "<answer>Happiness</answer>", "happy"),
        ("crema_d", "<answer>ANG</answer>", "anger"),
        ("emodb", "<answer>A</answer>", None),  # a code of one letter may be a choice's letter
        ("ravdess", "<answer>05</answer>", None),
        ("mer2023", "<answer>anxious</answer>", None),
        ("iemocap4", "<answer>excited</answer>", "happy"),
        ("iemocap6", "<answer>excited</answer>", "excited"),
        ("emonet", "<answer>Distress</answer>", "Distress"),
        ("emonet", "<answer>Fear</answer>", "Fear"),
        ("emonet", "<answer>thankfulness/gratitude</answer>", "Thankfulness/Gratitude"),
        ("sims5", "<answer>weakly positive</answer>", "weakly positive"),
        ("sims5", "<answer>弱消极</answer>", "weakly negative"),
        ("mosi", "<answer>正面</answer>", "positive"),
    ],
)
def test_answers_are_read_with_the_set_s_forms(name: str, text: str, label: str | None) -> None:
    assert parse(text, label_set(name)).label == label


def test_a_set_is_read_with_by_its_name() -> None:
    assert parse("开心", "dfew").label == "happy"
    assert parse("The emotion is worried.", "MER2024").label == "worried"
    with pytest.raises(EvaluationError, match="there is no label set 'happy'"):
        parse("happy", "happy")


def test_chinese_label_sets_read_english_answers() -> None:
    assert parse("<answer>joy</answer>", label_set("meld", "zh")).label == "高兴"
    assert parse("<answer>Happiness</answer>", emotion_labels(["高兴", "悲伤"])).label == "高兴"
    assert parse("<answer>anger</answer>", emotion_labels(["ANG", "HAP", "FEA"])).label == "ANG"
    # Two names of one emotion in a set have no aliases: nobody can tell which is meant.
    assert emotion_labels(["happy", "高兴", "sad"]).aliases.keys() == {"sad"}


@given(NAMES, NAMES)
def test_mappings_are_complete_and_keep_the_emotion(source: str, target: str) -> None:
    found = mapping(source, target)
    assert [row.label for row in found.rows] == list(emotion_set(source).names)
    for row in found.rows:
        assert row.reason
        if row.target is not None:
            there = emotion_set(target).find(row.target)
            assert emotion_set(source).find(row.label).emotion in there.emotions
    # Two labels join only where the target's own convention says so.
    for joined, labels in found.merged.items():
        own = emotion_set(target).find(joined)
        assert {emotion_set(source).find(label).emotion for label in labels} <= {*own.emotions}
        assert own.covers
    assert set(found.dropped) == {row.label for row in found.rows if row.target is None}


@given(NAMES)
def test_a_set_maps_to_itself(name: str) -> None:
    assert all(row.label == row.target for row in mapping(name, name).rows)


def test_mappings_of_the_field() -> None:
    to_mer = {row.label: row.target for row in mapping("iemocap6", "mer2023").rows}
    assert to_mer == {
        "happy": "happy",
        "sad": "sad",
        "neutral": "neutral",
        "angry": "angry",
        "excited": None,
        "frustrated": None,
    }
    four = mapping("iemocap6", "iemocap4")
    assert four["exc"].target == "happy"
    assert four["exc"].reason == "iemocap4 counts excited as happy"
    assert four.merged == {"happy": ("happy", "excited")}
    assert four.dropped == ("frustrated",)
    assert "happy and excited become happy; iemocap4 has no label for frustrated" in four.describe()
    back = mapping("iemocap4", "iemocap6")["hap"]
    assert (back.target, "counts apart: happy and excited" in back.reason) == (None, True)
    assert "may also be excited, which dfew lacks" in mapping("iemocap4", "dfew")["hap"].reason
    assert mapping("mafw", "mer2023")["anxiety"].target is None
    assert mapping("mer2023", "dfew")["worried"].target is None
    assert mapping("mer2023", "ca_mer")["worried"].target == "worry"
    assert mapping("meld", "ravdess").describe().endswith("one label for each")
    polar = {row.label: row.target for row in mapping("sims5", "mosi").rows}
    assert polar["weakly negative"] == polar["negative"] == "negative"
    assert mapping("mosi", "sims5")["positive"].target is None
    assert mapping("emonet", "goemotions")["hope"].target is None
    assert mapping("goemotions", "emonet")["optimism"].target == "Hope/Enthusiasm/Optimism"


def test_similar_emotions_of_a_set_stay_apart() -> None:
    pairs = [
        ("mafw", "anxiety", "fear"),
        ("ca_mer", "worry", "fear"),
        ("emonet", "Fear", "Distress"),
        ("emonet", "Shame", "Embarrassment"),
        ("goemotions", "nervousness", "fear"),
        ("goemotions", "grief", "sadness"),
        ("goemotions", "remorse", "disappointment"),
        ("iemocap6", "happy", "excited"),
    ]
    for name, one, other in pairs:
        found = emotion_set(name)
        assert not {*found.find(one).words} & {*found.find(other).words}


def test_the_circumplex_places_every_emotion() -> None:
    for emotion in emotion_forms():
        place = circumplex(emotion)
        assert -1 <= place.valence <= 1
        assert -1 <= place.arousal <= 1
        assert math.hypot(place.valence, place.arousal) == pytest.approx(place.distance)
        if place.degrees is not None:
            angle = math.degrees(math.atan2(place.arousal, place.valence)) % 360
            assert angle == pytest.approx(place.degrees)
    neutral = circumplex("neutral")
    assert (neutral.degrees, neutral.valence, neutral.arousal) == (None, 0, 0)


def test_the_circumplex_is_russell_s() -> None:
    # The quadrants of the paper: excitement 45, distress 135, depression 225, relaxation 315.
    quadrants = {
        "excited": 0,
        "angry": 1,
        "fear": 1,
        "distress": 1,
        "sad": 2,
        "boredom": 2,
        "calm": 3,
    }
    for emotion, quadrant in quadrants.items():
        place = circumplex(emotion)
        assert place.source == "russell"
        assert place.degrees is not None
        assert place.degrees // 90 == quadrant, emotion
    assert circumplex("高兴").degrees == circumplex("joy").degrees == 8
    assert circumplex("calm").arousal == pytest.approx(-0.69, abs=0.01)
    with pytest.raises(EvaluationError, match="no place on the circumplex is known for 'xyz'"):
        circumplex("xyz")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("CREMA-D", "crema_d"),
        ("EMO-DB", "emodb"),
        ("IEMOCAP-4", "iemocap4"),
        ("MER2024", "mer2023"),
        ("CMU-MOSEI", "polarity"),
        ("SIMS v2", "polarity"),
        ("GoEmotions-28", "goemotions"),
        ("EmoNet-40", "emonet"),
    ],
)
def test_sets_have_the_names_that_people_write(written: str, name: str) -> None:
    assert emotion_set(written).name == name


def test_no_two_sets_share_a_name() -> None:
    names = [(found.name, *found.also) for found in map(emotion_set, set_names())]
    for one, other in itertools.combinations(names, 2):
        assert not {*one} & {*other}
