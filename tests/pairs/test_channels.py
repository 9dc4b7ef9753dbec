"""A cue has a channel: manifests of other people, and what pairs of them cite."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, get_args

import pytest

from mmemo.config import parse
from mmemo.data.preference import QUERIES, Query
from mmemo.data.row_models import Row
from mmemo.data.rows import read_row
from mmemo.data.sample import Sample
from mmemo.pairs.config import TruthSource
from mmemo.pairs.leaks import accuracy_from_words, clip_of
from mmemo.pairs.rows import PairDraft, SkippedRows
from mmemo.pairs.truth import from_truth
from mmemo.world.config import WorldConfig
from mmemo.world.manifest import manifests
from mmemo.world.plan import make_plans

HEARD = {
    "sad": ["sobbing", "shaky breath", "slow speech", "long pauses"],
    "angry": ["shouting", "growling", "clipped consonants in a raised voice", "loud exhale"],
    "happy": ["laughter", "giggling", "sing-song intonation", "whistling"],
}
SEEN = {
    "sad": ["tears", "lowered gaze", "quivering chin"],
    "angry": ["clenched jaw", "furrowed brow", "flared nostrils"],
    "happy": ["wide smile", "raised cheeks", "bouncing on her feet"],
}
HEARD_ZH = {
    "悲伤": ["抽泣", "声音颤抖", "语速缓慢"],
    "愤怒": ["大声喊叫", "咆哮", "语气强硬"],
    "高兴": ["笑声", "哼唱", "语调上扬"],
}
SEEN_ZH = {
    "悲伤": ["流泪", "低头"],
    "愤怒": ["咬牙", "皱眉"],
    "高兴": ["嘴角上扬", "眼睛眯起"],
}


def read(values: dict[str, Any]) -> Sample:
    """A row of a clip with picture and sound, both in the file ``clip``."""
    rest = {key: value for key, value in values.items() if key != "clip"}
    row = Row({**rest, "videos": [values["clip"]], "audios": [values["clip"]]}, "m.jsonl", 1)
    sample = read_row(row)
    assert sample is not None, row.problems
    return sample


def rows(number: int = 40, chinese: bool = False, **cues: Any) -> list[Sample]:
    """Voice questions, whose answers cite two audible cues, in plain lists without channels."""
    heard, seen = (HEARD_ZH, SEEN_ZH) if chinese else (HEARD, SEEN)
    found: list[Sample] = []
    for place in range(number):
        drawn = random.Random(place)
        emotion, other = drawn.sample(sorted(heard), 2)
        here = drawn.sample(heard[emotion], 2)
        ask, said = "What does the voice carry?", f"Voice: {emotion}, {', '.join(here)}."
        if chinese:
            ask, said = "这段声音里有什么情绪？", f"声音：{emotion}，{'，'.join(here)}。"
        listed = {"present": [*here, *drawn.sample(seen[other], 2)], **cues}
        answer = f"<think>{said}</think><answer>{emotion}</answer>"
        found.append(
            read(
                {
                    "sample_id": f"v{place}",
                    "messages": [
                        {"role": "user", "content": f"<video><audio>{ask}"},
                        {"role": "assistant", "content": answer},
                    ],
                    "clip": f"{place}.mp4",
                    "label": emotion,
                    "modality_labels": {"audio": emotion, "video": other},
                    "cues": listed,
                }
            )
        )
    return found


def pairs(samples: list[Sample], **source: Any) -> tuple[list[PairDraft], SkippedRows]:
    config = parse(TruthSource, {"kind": "truth", "closed_vocabulary": True, **source})
    skipped = SkippedRows()
    return from_truth(samples, config, QUERIES, 0, skipped), skipped


@pytest.mark.parametrize("chinese", [False, True])
def test_no_voice_question_of_a_strangers_manifest_is_dropped(chinese: bool) -> None:
    samples = rows(chinese=chinese)
    found, skipped = pairs(samples)
    assert len(found) == 40
    assert not skipped.counts
    heard = {cue for cues in (HEARD_ZH if chinese else HEARD).values() for cue in cues}
    for draft in found:
        assert draft.query == "audio"
        assert set(draft.cited) <= heard
        said = draft.answers["hallucinated"]
        body, _, verdict = said.partition("<answer>")
        assert sum(cue in said for cue in heard) == 2
        # The sentence names the emotion that the answer concludes.
        assert verdict.removesuffix("</answer>") in body
    guessed = skipped.channels["guessed"]
    assert {*guessed["audio"]} <= heard
    assert not skipped.channels["unknown"]
    assert skipped.channels["stated"] == {}
    assert skipped.missing == {"spurious: audio": 40}


def test_spurious_answers_cite_only_the_channel_asked_about() -> None:
    beside = ["background music", "a red wall", "traffic noise", "bright light"]
    found, skipped = pairs(rows(spurious=beside))
    assert len(found) == 40
    for draft in found:
        said = draft.answers["spurious"]
        assert "background music" in said or "traffic noise" in said
        assert "a red wall" not in said
        assert "bright light" not in said
    assert not skipped.missing


def test_a_clip_without_an_audible_irrelevant_cue_has_no_spurious_answer() -> None:
    found, skipped = pairs(rows(spurious=["a red wall"]))
    assert all({*draft.answers} == {"chosen", "hallucinated"} for draft in found)
    assert skipped.missing == {"spurious: audio": 40}


def test_what_the_row_says_counts_more_than_any_word() -> None:
    plain = rows(12, spurious=["tapping"])
    said = rows(12, spurious={"audio": ["a red wall"], "video": ["traffic noise"]})
    assert not cited("tapping", plain)
    assert cited("a red wall", said)
    assert not cited("traffic noise", said)
    # Another row's word counts where a row says nothing, and a config's before the lexicon.
    assert cited("tapping", [*plain, *rows(1, spurious={"audio": ["Tapping"]})])
    assert cited("tapping", plain, heard=["tapping"])
    assert not cited("traffic noise", rows(12, spurious=["traffic noise"]), seen=["traffic"])


def cited(cue: str, samples: list[Sample], **source: Any) -> bool:
    """Whether a spurious answer of the samples cites the cue."""
    return any(cue in one.answers.get("spurious", "") for one in pairs(samples, **source)[0])


def answered(name: str, emotion: str, said: str, cues: dict[str, Any], **values: Any) -> Sample:
    answer = f"<think>{said}</think><answer>{emotion}</answer>"
    ask = values.pop("ask", "What does the voice carry?")
    return read(
        {
            "sample_id": name,
            "messages": [
                {"role": "user", "content": f"<video><audio>{ask}"},
                {"role": "assistant", "content": answer},
            ],
            "clip": f"{name}.mp4",
            "label": emotion,
            "modality_labels": {"audio": emotion, "video": emotion},
            "cues": cues,
            **values,
        }
    )


def test_a_cue_is_the_same_cue_in_capitals_and_within_a_longer_one() -> None:
    """Whatever is present is never cited as absent, nor as beside the point."""
    told = [
        ("angry", "Shouting"),
        ("angry", "shouting"),
        ("sad", "loud sobbing"),
        ("sad", "sobbing"),
    ]
    samples = [
        answered(
            *(f"r{place}", emotion, f"The voice is {emotion}: {cue}."),
            {"present": [cue], "spurious": [cue.upper(), "music"]},
        )
        for place, (emotion, cue) in enumerate(told)
    ]
    found, _ = pairs(samples, wrong_label_share=0.0)
    assert len(found) == 4
    said = {d.sample.sample_id: {k: v.lower() for k, v in d.answers.items()} for d in found}
    for answers in said.values():
        assert "music" in answers["spurious"]
    for name in ("r0-pair", "r1-pair"):
        assert "shouting" not in said[name]["hallucinated"]
    assert "sobbing" not in said["r2-pair"]["hallucinated"]


def test_an_answer_that_the_row_contradicts_is_not_chosen() -> None:
    cues = {"present": ["laughter"], "absent": ["sobbing"], "spurious": ["music"]}
    samples = [
        answered("right", "happy", "The voice has laughter and no sobbing.", cues),
        answered("spurious", "happy", "The voice has laughter over music.", cues),
        answered("absent", "happy", "The voice has laughter and sobbing.", cues),
        answered(
            *("label", "sad", "The voice has laughter.", cues),
            label="happy",
            modality_labels={"audio": "happy"},
        ),
        answered("other", "sad", "The voice has sobbing.", {"present": ["sobbing"]}),
    ]
    found, skipped = pairs(samples)
    assert skipped.examples["wrong_answer"] == ["spurious", "absent", "label"]
    assert {draft.sample.sample_id for draft in found} >= {"right-pair"}


def test_no_rejected_answer_names_an_emotion_that_the_row_accepts() -> None:
    samples = [
        answered(
            *(f"{emotion}{place}", emotion, f"There is {cue} in the voice.", {"present": [cue]}),
            labels=["angry", "sad"] if emotion == "angry" else [emotion],
        )
        for place in range(8)
        for emotion, cue in (("angry", "shouting"), ("sad", "sobbing"), ("happy", "laughter"))
    ]
    found, _ = pairs(samples, wrong_label_share=1.0)
    named = [d.answers["hallucinated"] for d in found if d.sample.sample_id.startswith("angry")]
    assert len(named) == 8
    assert all("<answer>happy</answer>" in one for one in named)


def test_what_is_swapped_keeps_its_article_and_cited_cues_their_words() -> None:
    cues = {
        "present": {"audio": ["shaky voice"], "video": ["angry glare"]},
        "absent": {"video": ["wide grin"]},
        "spurious": {"audio": ["an echo"], "video": ["a poster"]},
    }
    told = "An angry glare and a shaky voice speak for an angry person."
    samples = [
        answered(f"r{n}", "angry", told, cues, ask="How do they feel?", modality_labels={})
        for n in range(8)
    ]
    grin = {"present": {"audio": ["laughter"], "video": ["wide grin"]}}
    samples += [
        answered(
            *(f"h{n}", "happy", "A wide grin and laughter.", grin),
            ask="How do they feel?",
            modality_labels={},
        )
        for n in range(8)
    ]
    found, _ = pairs(samples, closed_vocabulary=False, wrong_label_share=1.0)
    said = {text.partition("</think>")[0] for d in found for text in d.answers.values()}
    said = {one for one in said if "person" in one}
    assert said - {f"<think>{told}"} == {
        "<think>A poster and a shaky voice speak for a happy person.",
        "<think>An angry glare and an echo speak for a happy person.",
        "<think>A wide grin and a shaky voice speak for a happy person.",
    }


def test_a_cue_in_no_known_channel_is_named_and_its_row_is_used() -> None:
    """It stays in both answers; rows that cite nothing else are counted."""
    samples = rows(12, spurious=["energy"])
    values = {"present": ["crying", "sobbing", "long pauses"], "absent": [], "spurious": []}
    text = "<think>Voice: sad, crying, sobbing, long pauses.</think><answer>sad</answer>"
    mixed: dict[str, Any] = {
        "sample_id": "mixed",
        "messages": [
            {"role": "user", "content": "<video><audio>What does the voice carry?"},
            {"role": "assistant", "content": text},
        ],
        "label": "sad",
        "modality_labels": {"audio": "sad"},
    }
    alone = text.replace(", sobbing, long pauses", "")
    only = {
        **mixed,
        "sample_id": "only",
        "messages": [mixed["messages"][0], {"role": "assistant", "content": alone}],
    }
    for number, (row, cues) in enumerate(((mixed, values), (only, {"present": ["crying"]}))):
        samples.append(read({**row, "cues": cues, "clip": f"x{number}.mp4"}))
    found, skipped = pairs(samples)
    assert skipped.counts == {"unknown_channel": 1}
    assert skipped.channels["unknown"] == {"energy": 12, "crying": 2}
    drafts = {draft.sample.sample_id: draft for draft in found}
    assert "crying" in drafts["mixed-pair"].answers["hallucinated"]
    assert "sobbing" not in drafts["mixed-pair"].answers["hallucinated"]


@pytest.fixture(scope="module")
def world() -> list[Sample]:
    """The rows that the quickstart makes its pairs of; no clip is drawn."""
    config = parse(
        WorldConfig,
        {"output_dir": "unused", "size": {"train_clips": 400}, "bias": {"train_consistent": 0.333}},
    )
    found = manifests(config, make_plans(config))
    samples: list[Sample] = []
    for values in (*found["train_emotion"], *found["train_expression"]):
        row = Row(values, "m.jsonl", 1)
        sample = read_row(row)
        assert sample is not None, row.problems
        samples.append(sample)
    return samples


@pytest.mark.parametrize("spurious", ["listed", "outweighed", "both"])
def test_rejected_answers_cite_the_channel_asked_about(world: list[Sample], spurious: str) -> None:
    found, skipped = pairs(world, spurious=spurious)
    seen: Counter[str] = Counter()
    for draft in found:
        truth = draft.sample.truth
        own = {"video": "Face", "audio": "Voice"}.get(draft.query)
        for name, text in draft.answers.items():
            seen[f"{draft.query} {name}"] += 1
            body = text.partition("<answer>")[0]
            if own is not None:
                assert f"{own}: " in body
            for channel, head in (("video", "Face: "), ("audio", "Voice: ")):
                part = body.partition(head)[2].partition(".")[0]
                cited = [cue for cue in truth.cue_channels if f", {cue}" in part]
                assert all(truth.cue_channels[cue] == channel for cue in cited)
                if name == "spurious" and spurious == "outweighed":
                    assert {*cited} <= {*truth.cues["present"]}
    assert not skipped.channels["guessed"]
    assert not skipped.channels["unknown"]
    assert seen["joint spurious"] > 150
    assert (seen["audio spurious"] > 100) == (spurious != "outweighed")


def test_no_text_tells_the_quickstarts_chosen_answers(world: list[Sample]) -> None:
    """By kind of rejected answer and by what the question is about."""
    found, _ = pairs(world, spurious="outweighed")
    for query in get_args(Query):
        for name in ("spurious", "hallucinated"):
            own = [one for one in found if one.query == query and name in one.answers]
            if not own:
                assert (query, name) in (("audio", "spurious"), ("video", "spurious"))
                continue
            told = accuracy_from_words(
                [one.sample.turns[-1].text for one in own],
                [one.answers["chosen"] for one in own],
                [one.answers[name] for one in own],
                [clip_of(one.sample) for one in own],
            )
            assert told.accuracy is not None
            assert not told.above(0.65), (query, name, told)


def test_outweighed_wordings_are_rejected_at_most_as_often_as_chosen(world: list[Sample]) -> None:
    found, _ = pairs(world, spurious="outweighed")

    def form(text: str) -> str:
        heads = [one.split(", ")[:2] for one in text.partition("<answer>")[0].split(". ")]
        return f"{heads}{text.rpartition('<answer>')[2]}"

    chosen = Counter(form(one.answers["chosen"]) for one in found if one.query == "joint")
    rejected = Counter(form(one.answers["spurious"]) for one in found if "spurious" in one.answers)
    assert sum(rejected.values()) > 150
    assert all(chosen[text] >= count for text, count in rejected.items())
    for one in found:
        if "spurious" in one.answers:
            labels = one.sample.truth.modality_labels
            assert labels["video"] != labels["audio"]
            verdict = one.answers["spurious"].rpartition("<answer>")[2].removesuffix("</answer>")
            assert verdict in (labels["video"], labels["audio"])
            assert verdict != one.sample.truth.label


def test_one_imagined_cue_keeps_the_emotion_and_the_other_cues() -> None:
    samples = rows(60)
    found, _ = pairs(samples, hallucinated="one_cue", wrong_label_share=0.0, closed_vocabulary=True)
    truth = {f"{one.sample_id}-pair": one.truth for one in samples}
    used: Counter[tuple[str, str]] = Counter()
    cited: Counter[tuple[str, str]] = Counter()

    def cues_of(text: str) -> set[str]:
        return set(text.removeprefix("<think>").partition(".")[0].split(", ")[1:])

    for draft in found:
        emotion = draft.answers["chosen"].partition("<answer>")[2]
        cited.update((emotion, cue) for cue in cues_of(draft.answers["chosen"]))
    for draft in found:
        answer = draft.answers["hallucinated"]
        emotion = draft.answers["chosen"].partition("<answer>")[2]
        if answer.endswith(emotion):
            new = cues_of(answer) - cues_of(draft.answers["chosen"])
            assert len(new) == 1
            assert not new & set(truth[draft.sample.sample_id].cues["present"])
            used.update((emotion, cue) for cue in new)
    assert sum(used.values()) > 30
    assert all(count <= cited[key] for key, count in used.items())
