"""Clips with blanked and swapped streams."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmemo.answers.parsing import emotion_labels
from mmemo.data.sample import MediaRef, Modality, Sample, Truth, Turn
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.reliance.perturb import (
    BlankedSource,
    Perturbation,
    blanked,
    perturb,
    perturbations_of,
)

LABELS = emotion_labels(["happy", "sad", "angry", "fear"])
GROUPS: list[list[Modality]] = [["audio"], ["video", "face"], ["video"], ["face"]]


def question(
    name: str, voice: str, face: str, truth: str, speaker: str = "s", media: str = "vaf"
) -> Question:
    streams: dict[str, Modality] = {"v": "video", "a": "audio", "f": "face"}
    refs = {streams[letter]: MediaRef(f"{name}.mp4") for letter in media}
    labels = {"audio": voice, "video": face}
    sample = Sample(name, (Turn("user", "?"),), refs, Truth(truth, modality_labels=labels),
                    group={"speaker": speaker})  # fmt: skip
    return Question(sample, sample.turns, "emotion", LABELS, truth)


def test_groups_lose_the_streams_that_no_clip_has() -> None:
    whole = [question("a", "sad", "sad", "sad")]
    assert [one.name for one in perturbations_of(GROUPS, whole)] == [
        *("blanked_audio", "swapped_audio", "blanked_video_face", "swapped_video_face"),
        *("blanked_video", "swapped_video", "blanked_face", "swapped_face"),
    ]
    faceless = [question("a", "sad", "sad", "sad", media="va")]
    names = [one.name for one in perturbations_of(GROUPS, faceless)]
    assert names == ["blanked_audio", "swapped_audio", "blanked_video", "swapped_video"]
    assert not perturbations_of(GROUPS, [question("a", "sad", "sad", "sad", media="")])


def test_only_the_named_streams_are_emptied() -> None:
    features = {
        "audio": {"x": torch.ones(3, 4), "mel_frames": torch.tensor(6)},
        "face": {"x": torch.ones(2, 4), "found": torch.ones(2, dtype=torch.bool)},
    }
    found = blanked(features, ["audio", "video"])
    assert not found["audio"]["x"].any()
    assert found["audio"]["mel_frames"] == 6
    assert found["face"] is features["face"]
    assert features["audio"]["x"].all()  # what may be shared is left as it is

    class Source:
        def get(self, sample: Sample) -> object:
            return features

    seen = BlankedSource(Source(), ["face"]).get(question("a", "sad", "sad", "sad").sample)  # type: ignore[arg-type]
    assert not seen["face"]["x"].any()
    assert not seen["face"]["found"].any()
    assert seen["audio"]["x"].all()


def test_a_swap_takes_one_other_clip_that_shows_neither_the_truth_nor_the_same() -> None:
    labels = ["happy", "sad", "angry", "fear"]
    pool = [
        question(f"{voice}-{face}-{n}", voice, face, face, speaker=f"s{n}")
        for voice in labels
        for face in labels
        for n in range(2)
    ]
    by_name = {one.sample.sample_id: one for one in pool}
    for streams in (("audio",), ("video", "face"), ("face",)):
        made = perturb(Perturbation("swapped", streams), pool, pool, 0)
        assert made.left_out == 0
        for one, note in zip(made.questions, made.noted, strict=True):
            own, donor = by_name[one.sample.sample_id], by_name[note["donor"]]
            channel = "audio" if streams == ("audio",) else "video"
            shown = donor.modality_labels[channel]
            assert note["shown"] == [shown]
            assert shown not in (own.truth, own.modality_labels[channel])
            assert one.truth == own.truth
            assert one.turns == own.turns
            for name, ref in one.sample.media.items():
                source = donor if name in streams else own
                assert ref == source.sample.media[name]
            speaker = own.sample.group["speaker"]
            assert donor.sample.group["speaker"] == speaker  # there is one of the same person


def test_a_swap_depends_on_the_seed_and_not_on_the_order() -> None:
    pool = [question(f"{n:02d}", LABELS.labels[n % 4], "sad", "sad") for n in range(24)]
    asked = [one for one in pool if one.modality_labels["audio"] == "sad"]

    def lent(pool: list[Question], seed: int) -> dict[str, str]:
        made = perturb(Perturbation("swapped", ("audio",)), asked, pool, seed)
        return {
            one.sample.sample_id: note["donor"]
            for one, note in zip(made.questions, made.noted, strict=True)
        }

    assert lent(pool, 0) == lent(pool[::-1], 0)
    assert lent(pool, 0) != lent(pool, 1)
    assert len(set(lent(pool, 0).values())) > 1


def test_questions_without_the_stream_or_a_clip_to_swap_with_are_left_out_and_counted() -> None:
    pool = [
        question("a", "sad", "happy", "happy"),
        question("b", "happy", "happy", "happy"),
        question("c", "sad", "sad", "sad", media="v"),
    ]
    made = perturb(Perturbation("swapped", ("audio",)), pool, pool, 0)
    assert [one.sample.sample_id for one in made.questions] == ["b"]
    assert made.left_out == 2
    made = perturb(Perturbation("blanked", ("audio",)), pool, pool, 0)
    assert [one.sample.sample_id for one in made.questions] == ["a", "b"]
    assert made.left_out == 1
    assert made.questions[0] is pool[0]


def test_the_clips_label_stands_in_where_channels_have_none_of_their_own() -> None:
    def bare(name: str, label: str) -> Question:
        one = question(name, label, label, label)
        return replace(one, sample=replace(one.sample, truth=Truth(label)))

    made = perturb(
        Perturbation("swapped", ("audio",)),
        [bare("a", "sad")],
        [bare("a", "sad"), bare("b", "sad"), bare("c", "fear")],
        0,
    )
    assert made.noted[0]["donor"] == "c"
