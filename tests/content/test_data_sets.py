"""The shipped data set adapters, on tiny folders in the layout of each release."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmemo.data.adapter import AdaptedManifest, write_manifest
from mmemo.errors import ConfigError, DataError, EvaluationError


def make(root: Path, adapter: str, **options: str) -> AdaptedManifest:
    return write_manifest(f"data/{adapter}.py", root, root.parent / "out.jsonl", options)


@pytest.fixture
def emodb(tmp_path: Path) -> Path:
    root = tmp_path / "emodb"
    (root / "wav").mkdir(parents=True)
    for name in ("03a01Wa", "08a01La", "12b02Ec", "14a04Ad", "15a05Fa", "16b10Tb", "03a02Nc"):
        (root / f"wav/{name}.wav").write_bytes(b"x")
    (root / "wav/noise.wav").write_bytes(b"x")
    table = "Nr.\tSatz\terkannt\tnatürlich\n1  \t03a01Wa.wav\t97,50     \t90,00     \n\n"
    (root / "erkennung.txt").write_bytes(table.encode("latin-1"))
    return root


def test_emodb_reads_speaker_sentence_and_emotion_from_the_name(emodb: Path) -> None:
    made = make(emodb, "emodb")
    by_id = {sample.sample_id.removeprefix("emodb-"): sample for sample in made.samples}
    assert {name: sample.truth.label for name, sample in by_id.items()} == {
        "03a01Wa": "anger",
        "08a01La": "boredom",
        "12b02Ec": "disgust",
        "14a04Ad": "fear",
        "15a05Fa": "happiness",
        "16b10Tb": "sadness",
        "03a02Nc": "neutral",
    }
    first = by_id["03a01Wa"]
    assert first.group == {"speaker": "03", "sentence": "a01", "gender": "male"}
    assert (first.media["audio"].path, list(first.media)) == ("wav/03a01Wa.wav", ["audio"])
    assert first.answer == "<answer>anger</answer>"
    assert first.difficulty == pytest.approx(0.025)
    assert by_id["03a02Nc"].difficulty is None  # not in the table
    assert made.unused == ("wav/noise.wav",)


def test_emodb_s_splits_share_no_speaker(emodb: Path) -> None:
    splits = {name: make(emodb, "emodb", split=name) for name in ("train", "validation", "test")}
    people = {name: set(made.speakers) for name, made in splits.items()}
    assert people == {"train": {"03", "08"}, "validation": {"12", "14"}, "test": {"15", "16"}}
    assert all(made.unused == ("wav/noise.wav",) for made in splits.values())
    with pytest.raises(ConfigError, match="split is 'dev'; use one of all, train"):
        make(emodb, "emodb", split="dev")


def test_a_folder_that_is_not_emodb_is_refused(tmp_path: Path, emodb: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data/emodb\.py finds nothing in"):
        make(tmp_path / "empty", "emodb")
    (emodb / "erkennung.txt").write_text("Nr.\tSatz\terkannt\n1\t03a01Wa.wav\tmost\n")
    with pytest.raises(DataError, match="is not EMO-DB's table"):
        make(emodb, "emodb")


def test_labels_of_another_set_are_mapped_and_never_merged(emodb: Path, crema_d: Path) -> None:
    made = make(emodb, "emodb", labels="mer2023")
    # Boredom, disgust and fear have no counterpart: fear is not "worried".
    assert {sample.sample_id: sample.truth.label for sample in made.samples} == {
        "emodb-03a01Wa": "angry",
        "emodb-15a05Fa": "happy",
        "emodb-16b10Tb": "sad",
        "emodb-03a02Nc": "neutral",
    }
    assert made.samples[0].answer == "<answer>angry</answer>"
    assert "neutral, angry, happy, sad, worried, surprise." in made.samples[0].turns[0].text
    assert made.unused == ("wav/noise.wav",)
    assert made.labelled is not None
    assert made.labelled.dropped == ("boredom", "disgust", "fear")
    clips = make(crema_d, "crema_d", labels="ravdess")
    assert {s.truth.label for s in clips.samples} == {"neutral", "happy", "sad", "fearful"}
    with pytest.raises(EvaluationError, match="no label set 'mer2o23'; did you mean 'mer2023'"):
        make(emodb, "emodb", labels="mer2o23")


VOTES = (  # name, voice, face, both
    ("1001_IEO_NEU_XX", "N", "N", "N"),
    ("1002_IEO_HAP_LO", "N", "H", "H"),
    ("1003_TIE_SAD_HI", "S", "N", "S"),
    ("1005_TIE_ANG_MD", "A", "D", "F"),
    ("1006_TIE_FEA_MD", "A:F", "F", "F"),
    ("1007_TIE_DIS_MD", "D", "D", "D:N"),
    ("1008_TIE_DIS_MD", "D", "D", "D"),
)


@pytest.fixture
def crema_d(tmp_path: Path) -> Path:
    root = tmp_path / "crema_d"
    (root / "VideoFlash").mkdir(parents=True)
    table = ['"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote"']
    for number, (name, voice, face, both) in enumerate(VOTES):
        table.append(f'"{number}","{name}","{voice}","50","{face}","50","{both}"')
        if not name.startswith("1008"):
            (root / f"VideoFlash/{name}.flv").write_bytes(b"x")
    (root / "summaryTable.csv").write_text("\n".join(table) + "\n")
    people = '"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","Asian","Not Hispanic"\n'
    (root / "VideoDemographics.csv").write_text(people)
    return root


def test_crema_d_s_label_is_what_raters_perceived(crema_d: Path) -> None:
    made = make(crema_d, "crema_d")
    read = {s.sample_id[8:12]: (s.truth.label, s.truth.conflict) for s in made.samples}
    assert read == {
        "1001": ("neutral", "consistent"),
        "1002": ("happiness", "video_aligned"),
        "1003": ("sadness", "audio_aligned"),
        "1005": ("fear", None),  # three labels
        "1006": ("fear", None),  # the voice has no label
    }
    assert made.missing == ("VideoFlash/1008_TIE_DIS_MD.flv",)
    assert made.unused == ("VideoFlash/1007_TIE_DIS_MD.flv",)  # a tie
    first, tied = made.samples[0], made.samples[-1]
    assert {ref.path for ref in first.media.values()} == {"VideoFlash/1001_IEO_NEU_XX.flv"}
    assert set(first.media) == {"video", "audio", "face"}
    assert first.group["gender"] == "Male"
    assert tied.truth.modality_labels == {"video": "fear"}
    assert "gender" not in tied.group


def test_crema_d_s_options(crema_d: Path) -> None:
    displayed = make(crema_d, "crema_d", label="displayed")
    read = {sample.sample_id[8:12]: sample.truth.label for sample in displayed.samples}
    assert read == {
        "1001": "neutral",
        "1002": "happiness",
        "1003": "sadness",
        "1005": "anger",
        "1006": "fear",
        "1007": "disgust",
    }
    assert set(make(crema_d, "crema_d", split="test").speakers) == {"1005"}
    assert set(make(crema_d, "crema_d", split="validation").speakers) == {"1001", "1006"}
    with pytest.raises(ConfigError, match="label is 'seen'; use one of perceived, displayed"):
        make(crema_d, "crema_d", label="seen")
    (crema_d / "summaryTable.csv").unlink()
    with pytest.raises(DataError, match=r"summaryTable\.csv: is missing; --root must be CREMA-D's"):
        make(crema_d, "crema_d")
