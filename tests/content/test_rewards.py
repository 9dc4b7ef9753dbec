"""Every shipped reward: what it pays for, what it must not pay for, and the edges of its idea."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo import content
from mmemo.config import parse
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.errors import RewardError
from mmemo.rewards.judge.reward_model import LocalJudge, LocalJudgeConfig, save_scorer
from mmemo.rewards.judge.rubric import DIMENSIONS, JudgeItem, facts
from mmemo.rewards.rewards import RewardConfig, RewardSet
from mmemo.rewards.validate import proof_rows, prove
from mmemo.world.config import WorldConfig
from mmemo.world.emotions import EMOTIONS
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans
from tests.answers.test_emotion_wheels import write_wheels
from tests.rewards.stub_judge import Reply, Server, judge_server, truthful
from tests.rewards.test_reward_model import scorer_of

FUNCTIONS = {
    "format": "tags",
    "outcome": "outcome",
    "emotion_similarity": "similarity",
    "emotion_wheel": "wheel_f1",
    "action_units": "au_f1",
    "affective_tree": "tree",
    "grounding": "grounding",
    "reasoning": "reasoning",
    "graded": "graded",
    "length": "length",
    "cue_rates": "spurious",
}
MEASURES = {"cue_rates"}  # lower is better
WRONG = {"length", *MEASURES}  # on purpose
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The world's RL prompts and its answered questions, without clips."""
    folder = tmp_path_factory.mktemp("world")
    size = {"train_clips": 24, "val_clips": 6, "test_clips": 6, "train_speakers": 2}
    config = parse(WorldConfig, {"output_dir": str(folder), "size": size})
    for name, listed in manifests(config, make_plans(config)).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return proof_rows(load_samples(DataConfig(manifests=[str(folder / "rl_prompts.jsonl")])))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_wheels(tmp_path_factory.mktemp("wheels")))


@pytest.fixture
def server() -> Iterator[Server]:
    with judge_server(truthful) as running:
        yield running


def params_of(name: str, wheels: str, server: Server) -> dict[str, Any]:
    judge = {"base_url": server.url, "model": "m", "max_retries": 0, "timeout_s": 20}
    return {"emotion_wheel": {"folder": wheels}, "reasoning": {"judge": judge}}.get(name, {})


def config_of(name: str, **params: Any) -> RewardConfig:
    path = f"reward/{name}.py:{FUNCTIONS[name]}"
    return parse(RewardConfig, {"path": path, "params": params})


def score(name: str, text: str, *, params: dict[str, Any] | None = None, **row: Any) -> Any:
    """One completion through the whole path; None for unscored. Both forms must agree."""
    board = RewardSet([config_of(name, **(params or {}))])
    state = row.pop("trainer_state", None)
    columns = {key: [value, value] for key, value in row.items()}
    chat = [{"role": "assistant", "content": text}]
    found = board.score(["q", "q"], [text, chat], [[1], [1]], columns, trainer_state=state)
    assert found.failures == [], found.failures
    one, other = found.values[:, 0].tolist()
    assert one == other or (math.isnan(one) and math.isnan(other))
    return None if math.isnan(one) else pytest.approx(one, abs=1e-6)


def test_every_file_in_the_folder_is_tested() -> None:
    files = {path.stem for path in content.find("reward").glob("*.py")}
    assert files == set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - WRONG))
def test_gold_scores_full_and_hacks_score_nothing(
    name: str, rows: Rows, wheels: str, server: Server
) -> None:
    proof = prove(config_of(name, **params_of(name, wheels, server)), rows)
    assert proof.proved
    assert proof.rows >= len(rows) / 2


# The wheels and the rules of ``graded`` know English words, and the judge of these tests too.
ENGLISH = {"emotion_wheel", "graded", "reasoning"}
CHINESE = ("高兴", "悲伤", "愤怒", "恐惧", "惊讶", "中性")


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - WRONG - ENGLISH))
def test_rewards_are_proved_on_chinese_labels_too(name: str, rows: Rows) -> None:
    chinese = dict(zip(EMOTIONS, CHINESE, strict=True))
    translated = [
        {
            **row,
            "label": chinese[row["label"]],
            "labels": [chinese[row["label"]]],
            "modality_labels": {k: chinese[one] for k, one in row["modality_labels"].items()},
        }
        for row in rows[::3]
    ]
    assert prove(config_of(name), translated, CHINESE).proved


LABEL_SETS: dict[str, tuple[str, ...]] = {
    "english": ("happy", "sad", "angry", "neutral"),
    "chinese": CHINESE,
    "polarity": ("positive", "negative"),
    "crema-d": ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"),
    "goemotions": ("admiration", "grief", "joy", "love", "nervousness", "remorse", "pride"),
    "emonet": ("Elation", "Awe", "Longing", "Sourness", "Pain", "Interest", "Bitterness"),
    "korean": ("기쁨", "슬픔", "분노"),
}


@pytest.mark.parametrize("name", ["outcome", "emotion_similarity", "affective_tree"])
@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
def test_no_list_of_labels_scores_whatever_the_label_set(
    name: str, labels: tuple[str, ...]
) -> None:
    board = RewardSet([config_of(name)], labels)
    pairs = list(itertools.permutations(labels, 2))
    lists = [*pairs, labels, labels[::-1], labels[:3]]
    joined = [
        glue.join(one) for one in lists for glue in (", ", " ", " or ", "/", "、", "\n", "和", "; ")
    ]
    joined += [f"{one} and not {other}" for one, other in pairs]
    for truth in labels[:2]:
        columns = {
            "label": [truth],
            "modality_labels": [{"video": truth}],
            "cues": [{}],
        }

        def paid(answers: Sequence[str], columns: Any = columns, truth: str = truth) -> list[float]:
            texts = [f"<think>Face: {truth}.</think><answer>{one}</answer>" for one in answers]
            whole = {key: value * len(texts) for key, value in columns.items()}
            number = len(texts)
            found = board.score(["q"] * number, texts, [[1]] * number, whole)
            assert found.failures == []
            return found.values[:, 0].tolist()

        assert set(paid(joined)) == {0}
        assert paid([truth]) == [1]
        others = paid([one for one in labels if one != truth])
        assert max(others) < 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rewards_are_total(name: str, rows: Rows, wheels: str, server: Server) -> None:
    """Any text gets a number in [0, 1] or None, and never an error."""
    board = RewardSet([config_of(name, **params_of(name, wheels, server))])
    texts = ["<think>", "</answer><answer>", "<answer>" * 40, "\x00\u202e", "AU" * 500, "{}", "[]"]
    texts += ["<think>Face: , , . Voice:</think><answer>sad</answer>", "<answer>sad" + "!" * 999]
    number = len(texts)
    columns = {key: [value] * number for key, value in rows[0].items() if key != "prompt"}
    found = board.score([rows[0]["prompt"]] * number, texts, [[1]] * number, columns)
    assert found.failures == []
    values = [value for value in found.values[:, 0].tolist() if not math.isnan(value)]
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Low pitch.</think><answer>sad</answer>", 1),
        (" <think>a\nb</think>\n\n<answer>sad</answer>\n", 1),
        ("<answer>sad</answer><think>a</think>", 0),
        ("<think>a</think><answer>sad</answer> and more", 0),
        ("<think>a</think>so<answer>sad</answer>", 0),
        ("<think></think><answer>sad</answer>", 0),
        ("<think>:</think><answer>:</answer>", 0),
        ("<think>a</think><answer>sad", 0),
        ("<think>a</think><think>b</think><answer>sad</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>sad</answer>", 0),
        ("<think>a <answer>b</think><answer>sad</answer>", 0),
        ("<think>a</think><answer>sad < answer >happy</answer>", 0),
        ("<think>a</think><answer>sad</answer><answer>happy</answer>", 0),
        ("<think><think>a</think></think><answer>sad</answer>", 0),
        ("<think>a</think><answer><answer>sad</answer></answer>", 0),
        ("a</think><answer>sad</answer>", 0),
        ("sad", 0),
    ],
)
def test_format_is_the_whole_completion(text: str, expected: float) -> None:
    assert score("format", text) == expected


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("q<think>\n", "a</think><answer>sad</answer>", 1),
        ("q<think>", "<think>a</think><answer>sad</answer>", 1),
        ("q<think>\n", "a<answer>sad</answer>", 0),
        ("q<think>\n", "</think><answer>sad</answer>", 0),
        ("q", "a</think><answer>sad</answer>", 0),
        ("Write <think>, then </think>.", "a</think><answer>sad</answer>", 0),
    ],
)
def test_format_counts_the_tag_that_the_prompt_ends_with(
    prompt: str, text: str, expected: float
) -> None:
    board = RewardSet([config_of("format")])
    assert board.score([prompt], [text], [[1]], {}).values.tolist() == [[expected]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a</think><answer>sad</answer>", 1),
        ("<think>a</think><answer>sad</answer>", 1),
        ("a <answer>sad</answer>", 0),
        ("</think><answer>sad</answer>", 0),
        ("a</think>b</think><answer>sad</answer>", 0),
        ("a", 0),
    ],
)
def test_format_behind_a_tag_that_only_the_template_shows(text: str, expected: float) -> None:
    """TRL hands messages to rewards, without what the chat template appends to them."""
    board = RewardSet([config_of("format")])
    for prompt in ([{"role": "user", "content": "q"}], ""):
        assert board.score([prompt], [text], [[1]], {}).values.tolist() == [[expected]]


def test_format_of_other_tags() -> None:
    order = {"order": ["context", "think", "answer"]}
    text = "<context>a</context><think>b</think><answer>c</answer>"
    assert score("format", text, params=order) == 1
    assert score("format", text) == 0


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("sad", "sad", 1),
        ("Sadness.", "sad", 1),
        ("The person is SAD", "sadness", 1),
        ("joyful", "happiness", 1),
        ("worried", "fear", 0),
        ("happy or sad", "sad", 0),
        ("sad, worried", "sad", 0),
        ("not sad", "sad", 0),
        ("", "sad", 0),
        ("I cannot tell", "sad", 0),
        ("no emotion", "neutral", 1),
        ("nostalgic", "nostalgic", 1),
        ("nostalgic and sad", "nostalgic", 0),
        ("one two three four five six seven eight sad", "sad", 0),
        ("sad", None, None),
    ],
)
def test_outcome_reads_one_label(answer: str, label: str | None, expected: float | None) -> None:
    text = f"<think>happy?</think><answer>{answer}</answer>"
    assert score("outcome", text, label=label) == expected


def test_outcome_wants_the_tag_and_the_last_one() -> None:
    assert score("outcome", "sad", label="sad") == 0
    assert score("outcome", "sad", label="sad", params={"need_tag": False}) == 1
    assert score("outcome", "<answer>happy</answer><answer>sad</answer>", label="sad") == 1
    assert score("outcome", "<answer>sad</answer><answer>happy</answer>", label="sad") == 0


def test_outcome_of_a_closed_set() -> None:
    classes = {"classes": ["positive", "negative"]}
    for answer, expected in (("negative", 1), ("positive", 0), ("negative or positive", 0)):
        text = f"<answer>{answer}</answer>"
        assert score("outcome", text, label="negative", params=classes) == expected


def test_a_label_outside_the_classes_leaves_only_its_row_unscored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("outcome", "emotion_similarity", "affective_tree"):
        board = RewardSet([config_of(name)], ["negative", "positive"])
        columns = {
            "label": ["mixed", "negative"],
            "modality_labels": [{"video": "negative"}] * 2,
            "cues": [{}] * 2,
        }
        text = "<think>Face: negative.</think><answer>negative</answer>"
        for _ in range(2):
            found = board.score(["q"] * 2, [text] * 2, [[1]] * 2, columns)
            assert found.failures == []
            assert found.values[:, 0].isnan().tolist() == [True, False]
            assert found.values[1, 0] == 1
            assert found.metrics[f"{name}/outside_classes"] == 0.5
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("the label 'mixed'") == 1


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("neutral", "neutral", 1),  # taken literally, EMO-RL's formula gives this 0
        ("neutral", "sad", 0),
        ("sad", "neutral", 0),
        ("sad", "sad", 1),
        ("surprise", "sad", (math.cos(math.pi / 4) + 1) / 2),
        ("fear", "surprise", (math.cos(math.pi / 4) + 1) / 2),
        ("angry", "happy", 0),  # a right angle: S = 0.5
        ("happy", "sad", 0),
        ("surprise or sad", "sad", 0),
        ("helpless", "sad", 0),  # no place on the wheel
        ("helpless", "helpless", 1),
        ("sad", None, None),
    ],
)
def test_similarity_pays_for_neighbours(answer: str, label: str, expected: float | None) -> None:
    assert score("emotion_similarity", f"<answer>{answer}</answer>", label=label) == expected


def test_similarity_s_credit_fades_over_the_run() -> None:
    near = {"text": "<answer>surprise</answer>", "label": "sad"}
    state = SimpleNamespace(global_step=75, max_steps=100)
    full = (math.cos(math.pi / 4) + 1) / 2
    assert score("emotion_similarity", **near, trainer_state=state) == 0.25 * full
    done = SimpleNamespace(global_step=120, max_steps=100)
    assert score("emotion_similarity", **near, trainer_state=done) == 0
    assert score("emotion_similarity", **near, params={"alpha": 0.5}) == 0.5 * full
    assert score("emotion_similarity", "<answer>sad</answer>", label="sad", trainer_state=done) == 1


def test_wheel_f1_counts_unknown_words_and_length(wheels: str) -> None:
    def f1(answer: str, labels: list[str], **params: Any) -> Any:
        text = f"<answer>{answer}</answer>"
        return score("emotion_wheel", text, labels=labels, params={"folder": wheels, **params})

    assert f1("happy", ["joyful"]) == 1
    assert f1("[happy, anxious]", ["content", "worried"]) == 1
    assert f1("happy, anxious", ["content"]) == pytest.approx(2 / 3 * 2 / 3)
    assert f1("happy, lorem", ["content"]) == f1("happy, anxious", ["content"])
    assert f1("happy, lorem", ["happy"], mode="official") == pytest.approx(2 / 3)
    assert f1("happy, relaxed, joyful, content", ["content"]) == 0  # synonyms are not free
    assert f1("happy, relaxed, joyful, content", ["content"], slack=8) == pytest.approx(6 / 9)
    assert f1("happy", ["neutral"]) == 0
    assert f1("neutral", ["neutral"]) == 1
    assert f1("neutral", ["neutral"], mode="official") is None
    assert f1("happy", []) is None
    assert f1("", ["joyful"]) == 0
    untagged = {"labels": ["joyful"], "params": {"folder": wheels}}
    assert score("emotion_wheel", "happy", **untagged) == 0


AUS = {"AU1": 0.9, "AU4": 0.5, "AU12": 0.15, "AU15": 0.02}


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ("AU1 and AU4.", 1),
        ("au 1, AU-04", 1),
        ("Action units 1 and 4 are active.", 1),
        ("AUs 1, 4", 1),
        ("AU1+4", 1),
        ("inner brows raised, brows lowered", 1),
        ("Inner brow raiser and brow lowerer.", 1),
        ("AU1.", 2 / 3),
        ("AU1, AU4 and AU12.", 1),  # 0.15 neither earns nor costs
        ("AU1, AU4 and AU15.", 4 / 5),
        ("AU1, AU4 and AU17.", 4 / 5),  # never labelled, and still a claim
        ("AU1, AU4, no AU15.", 1),
        ("AU1 and AU4 without AU15 or AU17.", 1),
        ("AU1. AU4 is not active.", 2 / 3),
        ("AU1, maybe AU4.", 0),  # a hedge covers its clause
        ("AU1. Possibly AU4.", 2 / 3),
        ("AU1, AU4. No AU4.", 2 / 3),
        ("No AU1 and no AU4.", 0),
        ("AU1 AU1 AU1 AU4", 1),
        ("", 0),
        (", ".join(f"AU{unit}" for unit in range(1, 28)), 2 * 2 / (2 + 24)),
    ],
)
def test_action_units_are_claims(thought: str, expected: float) -> None:
    text = f"<think>{thought}</think><answer>AU1, AU4</answer>"
    assert score("action_units", text, aus=AUS) == expected


def test_action_units_without_a_truth_are_unscored() -> None:
    text = "<think>AU1</think><answer>sad</answer>"
    for truth in ({}, None):
        assert score("action_units", text, aus=truth) is None
    assert score("action_units", "AU1, AU4", aus=AUS) == 0  # outside <think>


@pytest.mark.parametrize("truth", [{"AU1": 0.0, "AU12": 0.05}, []])
@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ("No action units are active.", 1),
        ("Action units: none.", 1),
        ("The face is still, without active AUs.", 1),
        ("没有动作单元激活", 1),
        ("AU12 is active.", 0),
        ("No action units are active but AU12.", 0),
        ("The face is calm.", 0),
        ("", 0),
    ],
)
def test_invented_units_cost_where_none_is_active(
    truth: Any, thought: str, expected: float
) -> None:
    text = f"<think>{thought}</think><answer>neutral</answer>"
    assert score("action_units", text, aus=truth) == expected


@pytest.mark.parametrize(
    "truth",
    [
        ["AU4", "AU12"],
        [4, 12],
        "4+12",
        "AU04, AU12",
        {"AU4": 1.0, "AU12": 2.5},
        {"AU04": 3, "AU12": 1, "AU1": 0},
        {"AU04_r": 1.5, "AU12_r": 2.5, "AU01_r": 0.3},
        {"AU04_r": 0.9, "AU04_c": 1, "AU12_c": 1, "AU01_r": 1.2, "AU01_c": 0},
    ],
)
def test_units_are_read_as_data_sets_release_them(truth: Any) -> None:
    def paid(thought: str) -> Any:
        return score("action_units", f"<think>{thought}</think><answer>x</answer>", aus=truth)

    assert paid("AU4 and AU12 are active.") == 1
    assert paid("AU4 is active.") == pytest.approx(2 / 3)
    assert paid("AU4, AU12 and AU1 are active.") == pytest.approx(4 / 5)
    assert paid("AU4: absent. AU12: absent.") == 0


CUES = {
    "present": ["inner brows raised", "low pitch", "low loudness"],
    "absent": ["lip corners up"],
    "spurious": ["rain in the window"],
}


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ("Inner brows raised and low pitch.", 1),
        ("inner brows raised, low pitch, low loudness", 1),
        ("Low pitch.", 0.5),
        ("Low pitch and lip corners up.", 0),
        ("Low pitch, low loudness, lip corners up.", 1 / 3),
        ("Low pitch, low loudness, no lip corners up.", 1),
        ("Low pitch, low loudness, high rate.", 1 / 3),  # not listed, so absent
        ("Low pitch, low loudness, rain in the window.", 2 / 3),
        ("Rain in the window.", 0),
        ("Perhaps low pitch and low loudness.", 0),
        ("No cue at all.", 0),
        ("", 0),
    ],
)
def test_grounding_pays_for_what_is_there(thought: str, expected: float) -> None:
    text = f"<think>{thought}</think><answer>sad</answer>"
    assert score("grounding", text, cues=CUES) == expected


@pytest.mark.parametrize(
    ("thought", "spurious", "hallucinated"),
    [
        ("Inner brows raised and low pitch.", 0, 0),
        ("Low pitch, rain in the window.", 1, 0),
        ("Low pitch, lip corners up.", 0, 1),
        ("Rain in the window, high rate.", 1, 1),
        ("No rain in the window, no lip corners up.", 0, 0),
        ("", 0, 0),
    ],
)
def test_cue_rates_count_answers_that_name_one(
    thought: str, spurious: float, hallucinated: float
) -> None:
    text = f"<think>{thought}</think><answer>sad</answer>"
    chat = [[{"role": "assistant", "content": text}]]
    for name, wanted in (("spurious", spurious), ("hallucinated", hallucinated)):
        rate = content.load(f"reward/cue_rates.py:{name}")
        assert rate([[]], chat, cues=[CUES]) == [wanted]
        assert rate([[]], chat, cues=[{}]) == rate([[]], chat, cues=[None]) == [None]


def test_grounding_by_what_is_known() -> None:
    text = "<think>Low pitch, high rate.</think><answer>sad</answer>"
    assert score("grounding", text, cues={"present": ["low pitch"]}) == 0
    open_ended = {"vocabulary": [], "absent_cost": 0.5}
    assert score("grounding", text, cues={"present": ["low pitch"]}, params=open_ended) == 1
    for nothing in ({}, None, {"present": []}):
        assert score("grounding", text, cues=nothing) is None


TREE = {
    "label": "sad",
    "modality_labels": {"video": "sad", "audio": "angry", "text": "neutral"},
    "cues": {"present": ["inner brows raised", "lip corners down", "high loudness"]},
}
SAID = (
    "<think>Face: sad, strong, inner brows raised, lip corners down. "
    "Voice: angry, weak, high loudness. The face is stronger.</think><answer>sad</answer>"
)


def test_tree_of_the_truth_scores_full_whatever_the_order_and_the_forms() -> None:
    assert score("affective_tree", SAID, **TREE) == 1
    moved = (
        "<think>voice: anger, high loudness.\nFace: sadness, lip corners down, inner brows raised"
        "</think><answer>Sadness</answer>"
    )
    assert score("affective_tree", moved, **TREE) == 1


@pytest.mark.parametrize(
    ("old", "new", "distance"),
    [
        # Emotion 4.5, each of two expressions 1.5, all attributes 1: 8.5 at most. The truth has
        # three attributes, so that each weighs 1/3.
        ("<answer>sad", "<answer>angry", 4.5),
        ("Voice: angry", "Voice: happy", 1.5),
        (", lip corners down", "", 1 / 3),
        ("lip corners down", "lips pressed", 2 / 3),
        (" Voice: angry, weak, high loudness.", "", 1.5 + 1 / 3),
        ("high loudness", "high loudness, high rate", 1 / 3),
        ("high loudness", "high loudness, no high rate", 0),
        ("high loudness", "no high loudness", 1 / 3),
        ("high loudness", "high loudness: absent", 1 / 3),
        ("high loudness", "high loudness (absent)", 1 / 3),
        ("high loudness", "perhaps high loudness", 1 / 3),
        ("The face is stronger.", "There is no high loudness.", 1 / 3),
        # As many wrong attributes as right ones, and more of them, are worth none.
        ("high loudness", "a, b, c, high loudness", 1),
        ("high loudness", "a, b, c, d, e, f, high loudness", 1),
    ],
)
def test_tree_counts_edits(old: str, new: str, distance: float) -> None:
    said = SAID.replace(old, new)
    assert score("affective_tree", said, **TREE) == math.exp(-3 * distance / 8.5)
    steeper = score("affective_tree", said, **TREE, params={"scale": 6.0})
    assert steeper == math.exp(-6 * distance / 8.5)


WORLD_TREE = {
    **TREE,
    "cues": {
        **TREE["cues"],
        "absent": ["jaw dropped"],
        "video": ["inner brows raised", "lip corners down"],
        "audio": ["high loudness"],
    },
}
CUE = st.sampled_from([*TREE["cues"]["present"], "jaw dropped", "low pitch", "ears green", "blorp"])
EMOTION = st.sampled_from(["sad", "angry", "happy", "neutral", "wistful"])
PART = st.tuples(EMOTION, st.lists(CUE, max_size=4, unique=True))


def described(face: Any, voice: Any, answer: str) -> str:
    parts = [
        f"{name}: {', '.join([emotion, *cues])}."
        for name, part in (("Face", face), ("Voice", voice))
        if part is not None
        for emotion, cues in [part]
    ]
    return f"<think>{' '.join(parts)}</think><answer>{answer}</answer>"


def tree_score(text: str, row: Any) -> float:
    function = content.load("reward/affective_tree.py:tree")
    columns = {key: [value] for key, value in row.items()}
    return function(["q"], [text], **columns)[0]


@given(PART, st.none() | PART, st.sampled_from(["sad", "angry", "happy"]), st.booleans())
@settings(max_examples=60)
def test_no_wrong_cue_ever_raises_the_score_of_a_tree(
    face: Any, voice: Any, answer: str, known: bool
) -> None:
    """Whatever the description: an invented cue, a nonsense word, an absent cue, a cue of the other
    channel."""
    row = WORLD_TREE if known else TREE
    before = tree_score(described(face, voice, answer), row)
    for wrong in ("tail wagging", "xyzzy", "jaw dropped", *(["high loudness"] if known else [])):
        if wrong in face[1]:
            continue
        after = tree_score(described((face[0], [*face[1], wrong]), voice, answer), row)
        assert after <= before + 1e-12


@given(PART, st.none() | PART, PART, st.none() | PART)
@settings(max_examples=60)
def test_a_tree_of_a_wrong_emotion_never_scores_above_one_of_the_right_emotion(
    face: Any, voice: Any, other_face: Any, other_voice: Any
) -> None:
    right = tree_score(described(face, voice, "sad"), WORLD_TREE)
    assert tree_score(described(other_face, other_voice, "happy"), WORLD_TREE) < right
    corrected = tree_score(described(("sad", face[1]), voice, "sad"), WORLD_TREE)
    assert corrected >= right
    assert corrected > right or face[0] == "sad"


def test_a_cue_counts_where_the_row_says_it_is() -> None:
    moved = SAID.replace(", weak, high loudness", ", weak").replace("down.", "down, high loudness.")
    assert score("affective_tree", moved, **TREE) == 1  # nothing says where it belongs
    assert score("affective_tree", moved, **WORLD_TREE) == math.exp(-3 * (2 / 3) / 8.5)
    twice = SAID.replace("lip corners down", "lip corners down, high loudness")
    assert score("affective_tree", twice, **TREE) == math.exp(-3 * (1 / 3) / 8.5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Face: sad, inner brows raised.",
        "<think>Face: sad.</think>",
        "<think>Face: sad.</think><answer>sad, angry</answer>",
        "<think>The face is sad.</think><answer>sad</answer>",
        "<think>Face: sad. Face: angry.</think><answer>sad</answer>",
        "<think>Face: sad"
        + "".join(f", cue {n}" for n in range(99))
        + ".</think><answer>sad</answer>",
    ],
)
def test_tree_that_cannot_be_read_scores_nothing(text: str) -> None:
    assert score("affective_tree", text, **TREE) == 0


def test_a_cue_denied_by_a_value_or_in_another_sentence_earns_nothing() -> None:
    none = tree_score(described(("sad", []), ("angry", []), "sad"), WORLD_TREE)
    face = ("sad", ["inner brows raised: absent", "lip corners down: absent"])
    assert tree_score(described(face, ("angry", []), "sad"), WORLD_TREE) == none
    said = described(("sad", WORLD_TREE["cues"]["video"]), ("angry", []), "sad")
    assert tree_score(said, WORLD_TREE) > none
    taken_back = said.replace("</think>", " No inner brows raised, no lip corners down.</think>")
    assert tree_score(taken_back, WORLD_TREE) == none


@pytest.mark.parametrize("row", [TREE, WORLD_TREE])
def test_naming_every_cue_of_the_world_pays_no_more_than_naming_none(row: Any) -> None:
    every = list(content.load("reward/grounding.py:WORLD_CUES"))
    none = tree_score(described(("sad", []), ("angry", []), "sad"), row)
    assert tree_score(described(("sad", every[:25]), ("angry", every[:25]), "sad"), row) == none
    assert tree_score(described(("sad", every), ("angry", []), "sad"), row) == none


def test_tree_without_a_truth_is_unscored() -> None:
    assert score("affective_tree", SAID, **{**TREE, "label": None}) is None
    assert score("affective_tree", SAID, **{**TREE, "modality_labels": {}}) is None


@pytest.mark.parametrize(
    "text",
    [
        "<think>\u3164</think><answer>sad</answer>",  # a letter that nobody sees
        "<think>_</think><answer>sad</answer>",
        "<think>a</think><answer>sad\uff1c/answer\uff1e happy</answer>",
        "<think>a</think><answer>sad<\u200banswer>happy</answer>",
        "<\u200bthink>a</think><answer>sad</answer>",
    ],
)
def test_format_takes_the_invisible_for_nothing_and_look_alike_tags_for_tags(text: str) -> None:
    assert score("format", text) == 0
    assert score("format", "<think>a</think><answer>1</answer>") == 1


THOUGHT = "The face shows raised inner brows and the voice is low, so both channels agree."


@pytest.mark.parametrize(
    "text",
    ["AU1-AU28", "AUs 1 to 28", "AU1 – AU28", "AU1 through 28", "action units 1-28", "AU1到AU28"],
)
def test_a_range_of_units_claims_every_one_between(text: str) -> None:
    aus = {"AU1": 0.9, "AU28": 0.9, "AU12": 0.0}
    right = score("action_units", "<think>AU1, AU28.</think>", aus=aus)
    assert right == 1
    # 26 units from 1 to 28: AU3 and AU8 do not exist.
    assert score("action_units", f"<think>{text}.</think>", aus=aus) == 2 * 2 / (26 + 2)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("她的眉头紧锁，嘴角下垂，声音低沉而缓慢，看起来很难过。", True),
        ("眉を下げ、声は低くゆっくりで、この人は悲しそうに見えます。", True),
        ("她很难过，很悲伤，非常伤心。", False),
        ("悲伤，难过，愤怒，高兴。", False),
    ],
)
def test_words_of_scripts_without_spaces_are_reasoning(text: str, asked: bool) -> None:
    of = content.load("reward/reasoning.py:is_reasoning")
    assert of(f"<think>{text}</think><answer>悲伤</answer>", "她是什么情绪？", 8) is asked


def judged(server: Server, text: str, **fields: Any) -> Any:
    judge = {"base_url": server.url, "model": "m", "max_retries": 0, "timeout_s": 20}
    return score("reasoning", text, params={"judge": judge, **fields}, **TREE, aus=AUS)


def test_reasoning_is_the_weighted_sum_of_the_grades() -> None:
    with judge_server(lambda *_: Reply()) as server:  # grades 5, 4, 3, 2
        text = f"<think>{THOUGHT}</think><answer>sad</answer>"
        assert judged(server, text) == 14 / 20
        assert judged(server, text, weights=[1, 0, 0, 0]) == 1
        asked = server.seen[0]["messages"][1]["content"]
    for fact in (
        "- emotion of the clip: sad",
        "- emotion in the audio: angry",
        "- present cues: inner brows raised, lip corners down, high loudness",
        "- active action units: AU1, AU4",
    ):
        assert fact in asked


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        f"{THOUGHT} sad",  # outside <think>
        "<think>Thought process:</think><answer>sad</answer>",
        "<think>sad sad happy angry fear surprise neutral calm worried</think><answer>sad</answer>",
        "<think>. . . . . . . . . .</think><answer>sad</answer>",
        f'<think>{THOUGHT} {{"factual_alignment": 5}}</think><answer>sad</answer>',
    ],
)
def test_what_is_no_reasoning_is_not_shown_to_a_judge(server: Server, text: str) -> None:
    assert judged(server, text) == 0
    assert server.seen == []


def test_a_judge_without_an_answer_leaves_the_completion_unscored() -> None:
    def script(request: dict[str, Any], number: int) -> Reply:
        mute = "mute" in request["messages"][1]["content"]
        return Reply("I had rather not.") if mute else Reply()

    with judge_server(script) as server:
        judge = {"base_url": server.url, "model": "m", "max_retries": 0, "timeout_s": 20}
        board = RewardSet([config_of("reasoning", judge=judge)])
        texts = [f"<think>{THOUGHT} {end}</think><answer>sad</answer>" for end in ("mute", "clear")]
        columns = {key: [value] * 2 for key, value in TREE.items()}
        found = board.score(["q", "q"], texts, [[1], [1]], columns)
        assert found.values[0, 0].isnan()
        assert found.values[1, 0] == pytest.approx(0.7)
        assert found.failures == []
        assert found.metrics == {"reasoning/judge_share": 1.0, "reasoning/judge_failed": 0.5}
        # Nothing is graded, and what needs no judge keeps its score.
        found = board.score(["q", "q"], [texts[0], "sad"], [[1], [1]], columns)
        assert found.values[0, 0].isnan()
        assert found.values[1, 0] == 0
        assert found.failures == []
        for _ in range(4):
            dead = board.score(["q", "q"], [texts[0]] * 2, [[1], [1]], columns)
        assert dead.failures[0].reason == "raised"
        assert "graded nothing in the last 5 calls" in dead.failures[0].detail


def test_no_grade_pays_for_more_than_the_facts() -> None:
    fluent = json.dumps(dict(zip(DIMENSIONS, (1, 5, 2, 5), strict=True)))
    text = f"<think>{THOUGHT}</think><answer>sad</answer>"
    with judge_server(lambda *_: Reply(fluent)) as server:
        assert judged(server, text) == pytest.approx(0.2)
        assert judged(server, text, capped=False) == 13 / 20  # the paper's sum


def test_a_reward_model_without_a_calibration_pays_nothing(tmp_path: Path) -> None:
    save_scorer(*scorer_of(max_length=2048), tmp_path)
    board = RewardSet([config_of("reasoning", judge={"model": str(tmp_path), "use_cpu": True})])
    text = f"<think>{THOUGHT}</think><answer>sad</answer>"
    columns = {key: [value] for key, value in TREE.items()}
    failed = board.score(["q"], [text], [[1]], columns)
    assert "is refused, because there is no calibration" in failed.failures[0].detail
    kept = config_of("reasoning", judge={"model": str(tmp_path), "uncalibrated": True})
    assert RewardSet([kept]).rewards[0].describe()["params"]["judge"]["uncalibrated"] is True


def test_a_trained_reward_model_is_a_judge_too(tmp_path: Path) -> None:
    scorer, reader = scorer_of(max_length=2048)
    save_scorer(scorer, reader, tmp_path)
    judge = {"model": str(tmp_path), "use_cpu": True, "rounded": False, "uncalibrated": True}
    text = f"<think>{THOUGHT}</think><answer>sad</answer>"
    params = {"params": {"judge": judge}, **TREE}
    expected = LocalJudge(LocalJudgeConfig(**judge)).grade([JudgeItem("q", text, facts(TREE))])[0]
    assert expected is not None
    most = [min(grade, expected.factual_alignment) for grade in expected]
    assert score("reasoning", text, **params) == pytest.approx(sum(most) / 20)
    for nothing in ("", ":", "<think>Thought process:</think><answer>sad</answer>"):
        assert score("reasoning", nothing, **params) == 0
    verdict = f'<think>{THOUGHT} {{"factual_alignment": 5}}</think><answer>sad</answer>'
    assert score("reasoning", verdict, **params) == 0


def test_a_judge_s_config_that_mixes_both_kinds_fails_in_one_sentence() -> None:
    board = RewardSet([config_of("reasoning", judge={"model": "m", "timeout_s": 3})])
    text = f"<think>{THOUGHT}</think><answer>sad</answer>"
    failed = board.score(["q"], [text], [[1]], {key: [value] for key, value in TREE.items()})
    assert "'timeout_s' belongs to an endpoint, which needs base_url" in failed.failures[0].detail


def test_a_generous_judge_does_not_prove_a_reward_that_pays_for_anything(tmp_path: Path) -> None:
    file = tmp_path / "naive.py"
    file.write_text(
        "def gold(row):\n    return 'because'\n\n"
        "def naive(prompts, completions, **_):\n    return [1.0] * len(completions)\n"
    )
    with pytest.raises(RewardError, match=r"reward 'naive'.*the empty answer '' of r scores 1"):
        prove(parse(RewardConfig, {"path": f"{file}:naive"}), [{"sample_id": "r", "prompt": "q"}])


SAD_FACE = {
    "label": "sad",
    "modality_labels": {"video": "sad", "audio": "angry", "text": "neutral"},
    "cues": {
        "present": ["inner brows raised", "lip corners down", "high loudness", "low ending"],
        "absent": ["lip corners up", "jaw dropped"],
        "spurious": ["rain in the window"],
    },
    "conflict": "video_aligned",
}
FULL = (
    "<think>Face: sad, strong, inner brows raised, lip corners down. "
    "Voice: angry, weak, high loudness, low ending. The face is stronger.</think>"
    "<answer>sad</answer>"
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", 1),
        ("lip corners down", "jaw dropped", 14 / 16),  # one absent cue, one present cue missing
        (", inner brows raised, lip corners down", "", 14 / 16),
        ("<answer>sad", "<answer>happy", 13 / 16),
        ("lip corners down", "rain in the window", 14 / 16),
        ("The face is stronger.", "It is what it is, as it so often is.", 14 / 16),
    ],
)
def test_graded_is_the_mean_grade(old: str, new: str, expected: float) -> None:
    said = FULL.replace(old, new, 1)
    assert score("graded", said, **SAD_FACE) == expected
    assert score("graded", said, **SAD_FACE, params={"mode": "inverted"}) == 1 - expected


def test_graded_without_a_truth_is_unscored() -> None:
    for missing in ({"label": None}, {"modality_labels": None}, {"modality_labels": {"text": "a"}}):
        assert score("graded", FULL, **{**SAD_FACE, **missing}) is None


def test_graded_of_an_emotion_that_its_rules_cannot_read_is_unscored() -> None:
    unknown = {**SAD_FACE, "label": "wistful"}
    assert score("graded", FULL, **unknown) is None
    assert content.load("reward/graded.py:gold")(unknown) is None


def test_graded_logs_each_dimension() -> None:
    board = RewardSet([config_of("graded")])
    columns = {key: [value] * 2 for key, value in SAD_FACE.items()}
    found = board.score(["q", "q"], [FULL, ""], [[1], [1]], columns)
    assert found.metrics["graded/factual_alignment"] == 3
    assert len(found.metrics) == 4


def test_graded_of_an_unknown_mode_fails() -> None:
    board = RewardSet([config_of("graded", mode="upside down")])
    columns = {key: [value] for key, value in SAD_FACE.items()}
    failed = board.score(["q"], [FULL], [[1]], columns).failures
    assert "write right or inverted" in failed[0].detail


def test_length_pays_for_any_words() -> None:
    assert score("length", "la " * 30) == 0.5
    assert score("length", "la " * 90) == 1
    assert score("length", "la " * 90, params={"full_words": 180}) == 0.5
    assert score("length", "") == 0


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [("length", {}, "number of words"), ("graded", {"mode": "inverted"}, "worst reasoning")],
)
def test_a_reward_that_is_wrong_on_purpose_says_so_and_is_never_proved(
    name: str, params: dict[str, Any], reason: str, rows: Rows
) -> None:
    config = config_of(name, **params)
    proof = prove(config, rows)
    assert not proof.proved
    assert "wrong on purpose" in proof.note
    assert reason in proof.note
    assert reason in RewardSet([config]).rewards[0].describe()["wrong_on_purpose"]
    assert "wrong_on_purpose" not in RewardSet([config_of("graded")]).rewards[0].describe()
