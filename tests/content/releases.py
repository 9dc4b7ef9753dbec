"""Miniatures of released folders in their exact layout, with their traps, written by code; and what
becomes of texts as answers to the benchmarks on them.

Clips are no real clips unless a test needs to open them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import parse
from mmemo.data.adapter import write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Question, load_benchmark, validate
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.scoring import score_rows
from mmemo.evaluation.script import adapter_of, columns_of_adapter, options_of
from mmemo.statistics import BootstrapConfig

BOM = "\ufeff"


def put(path: Path, text: str = "x", encoding: str = "utf-8") -> Path:
    """Write a small file, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def dfew(root: Path) -> Path:
    """Numbers with and without zeros, frames beside clips, a label outside the set, no clip."""
    split = root / "EmoLabel_DataSplit"
    put(split / "train(single-labeled)/set_1.csv", f"{BOM}video_name,label\n1,1\n2,7\n")
    put(
        split / "test(single-labeled)/set_1.csv",
        "Video_Name,Label\n3,4\n00004,3\n5,8\n6,2\n7,5.0\n7,5\n",
    )
    for name in (
        "part_1/1.mp4",
        "part_1/2.mp4",
        "part_1/00003.mp4",
        "part_2/4.MP4",
        "part_2/7.mp4",
    ):
        put(root / "Clip/original" / name)
    put(root / "Clip/original/part_1/._2.mp4")
    put(root / "Clip/jpg_256/00006/00001.jpg")
    return root


def mafw(root: Path) -> Path:
    """Space-separated lists, a label in another case, one outside the set."""
    folder = root / "Train & Test Set/single/no_caption/set_1"
    put(folder / "train.txt", "00001.mp4 anger\n")
    put(
        folder / "test.txt",
        f"{BOM}00002.mp4 Helplessness\r\n00003.mp4  disappointment\n\n00004.mp4 boredom\n",
    )
    for number in (1, 2, 3):
        put(root / f"data/clips/0000{number}.mp4")
    return root


def ravdess(root: Path) -> Path:
    """Songs, pictures without sound, sound alone, and a file that is none of the set."""
    for name in (
        "01-01-01-01-01-01-01.mp4",  # neutral
        "01-01-06-02-02-01-02.mp4",  # fearful, strong, "dogs", a woman
        "02-01-06-02-02-01-02.mp4",  # no sound
        "01-02-03-01-01-01-02.mp4",  # a song
        "01-01-09-01-01-01-05.mp4",  # no such emotion
        "01-01-08-01-01-02-24.mp4",  # surprised
    ):
        put(root / f"Actor_{name[-6:-4]}" / name)
    put(root / "Actor_05/03-01-02-01-01-01-05.wav")
    put(root / "Actor_05/notes.mp4")
    return root


_MELD = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode\n"


def meld(root: Path) -> Path:
    """The same clip names in all parts, C1 quotes, a label in another case, known bad clips."""
    put(
        root / "train_sent_emo.csv",
        _MELD
        + '1,"Oh, wow.",Joey,joy,positive,0,0,1,1\n2,What?,Ross,surprise,negative,125,3,1,1\n',
    )
    put(root / "dev_sent_emo.csv", _MELD + "1,No.,Ross,sadness,negative,0,0,1,1\n")
    put(
        root / "test_sent_emo.csv",
        BOM
        + _MELD
        + "1,It\u0092s fine.,Monica,Neutral,neutral,0,0,1,1\n"
        + "2,Yes!,Joey,joy,positive,0,1,1,1\n"
        + "3,Come on.,Joey,neutral,neutral,279,15,1,1\n"
        + "4,Hm.,Joey,bored,neutral,0,2,1,1\n"
        + "5,Gone.,Joey,fear,negative,9,9,1,1\n",
    )
    for part, names in {
        "train_splits": ("dia0_utt0", "dia125_utt3"),
        "dev_splits_complete": ("dia0_utt0",),
        "output_repeated_splits_test": ("dia0_utt0", "dia0_utt1", "dia279_utt15", "dia0_utt2"),
    }.items():
        for name in names:
            put(root / part / f"{name}.mp4")
    put(root / "output_repeated_splits_test/._dia0_utt0.mp4")
    put(root / "output_repeated_splits_test/final_videos_testdia0_utt0.mp4")
    return root


def iemocap(root: Path) -> Path:
    """Five sessions; annotations that are no class, remarks in transcripts, a stray file."""
    for number in range(1, 6):
        folder = root / f"Session{number}/dialog"
        name = f"Ses0{number}F_impro01"
        put(folder / f"avi/DivX/{name}.avi")
        lines = [
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]",
            "",
            f"[6.2901 - 8.2357]\t{name}_F000\tneu\t[2.5000, 2.5000, 2.5000]",
            "C-E2:\tNeutral;\t()",
            f"[10.0 - 11.5]\t{name}_M000\texc\t[4.0, 3.0, 3.0]",
            f"[12.0 - 13.5]\t{name}_M001\tfru\t[2.0, 3.0, 3.0]",
            f"[14.0 - 15.5]\t{name}_F001\txxx\t[2.0, 3.0, 3.0]",
            f"[16.0 - 16.0]\t{name}_F002\tsad\t[2.0, 3.0, 3.0]",
            f"[17.0 - 18.0]\t{name}_F003\tzzz\t[2.0, 3.0, 3.0]",
        ]
        put(folder / f"EmoEvaluation/{name}.txt", "\n".join(lines))
        put(folder / f"EmoEvaluation/._{name}.txt", "\x00\x05")
        said = f"{name}_F000 [006.2901-008.2357]: Excuse me.\nM: [breathing]\n"
        said += f"{name}_M000 [010.0-011.5]: Yeah!\n"
        put(folder / f"transcriptions/{name}.txt", said)
    return root


def mer2023(root: Path) -> Path:
    """Two containers, test3 without valence, a table in another folder, subtitles with gaps."""
    put(
        root / "train-label.csv",
        f"{BOM}name,discrete,valence\na1,happy,2.5\na2,Sad,-1\na3,fear,0\n",
    )
    put(root / "test1-label.csv", ",name,discrete,valence\n0,b1,worried,-2.25\n1,b2,neutral,0\n")
    put(root / "test2/test2-label.csv", "name,discrete,valence\nc1,surprise,1\n")
    put(root / "test-labels/test3-label.csv", "name,discrete\nd1,angry\n")
    put(root / "transcription.csv", "name,chinese\na1,太好了\nb1,\nb2,nan\n")
    clips = ("train/a1.mp4", "train/a2.avi", "train/a3.mp4", "test1/b1.avi", "test1/b2.mp4")
    for name in (*clips, "test2/c1.mp4", "test3/d1.mp4"):
        put(root / name)
    return root


def mer2024(root: Path) -> Path:
    """The labelled part, both test parts in the noisy folder, and the old table of both."""
    put(root / "label-disdim.csv", "name,discrete,valence\nsample1,happy,1\n")
    put(root / "semi-label.csv", "name,discrete\nold1,sad\n")
    put(root / "test1_name_convert_label.csv", "name,discrete\nsamplenew1,worried\nnone,sad\n")
    put(root / "label-transcription.csv", "name,english,chinese\nsample1,Great.,太好了\n")
    for name in ("video-labeled/sample1.mp4", "video-unlabeled/old1.mp4"):
        put(root / name)
    put(root / "video-unlabeled-with-test2noise/samplenew1.mp4")
    return root


_MMSA = "video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode\n"


def mosi(root: Path) -> Path:
    """MMSA's table: ids that begin with a dash, empty channel labels, wrong and missing scores."""
    put(
        root / "label.csv",
        BOM
        + _MMSA
        + '-3g5yACwYnA,3,"Anyhow, it WAS good",1.4,,,,Positive,train\n'
        + "-3g5yACwYnA,10,IT WAS BAD,-2.4,,,,Negative,test\n"
        + "aBc_1,1,SO SO,0.0,,,,Neutral,test\n"
        + "aBc_1,2,HUGE,4.0,,,,Positive,test\n"
        + "aBc_1,3,NOTHING,,,,,,test\n"
        + "aBc_1,4,GONE,1.0,,,,Positive,test\n"
        + "aBc_1,5,VALID,0.6,,,,Positive,valid\n"
        + "aBc_1,6,NO SPLIT,0.6,,,,Positive,\n",
    )
    for name in ("-3g5yACwYnA/3", "-3g5yACwYnA/10", "aBc_1/1", "aBc_1/2", "aBc_1/3", "aBc_1/5"):
        put(root / f"Raw/{name}.mp4")
    return root


def mosei(root: Path) -> Path:
    """Clips in one folder, named by video and number."""
    put(root / "label.csv", _MMSA + "aa_b,0,HELLO,0.66666669,,,,Positive,test\n")
    put(root / "Video/Segmented/aa_b_0.mp4")
    return root


def sims(root: Path) -> Path:
    """SIMS v1 without MMSA's table: labels, indices and words apart; clip numbers with zeros."""
    for name, values in {
        "M": (0.2, -0.8, 0.0),
        "T": (-0.4, -1.0, 0.0),
        "A": (0.6, 0.2, 0.0),
    }.items():
        rows = zip(("video_0001",) * 3, (1, 2, 3), values, strict=True)
        lines = "".join(f"{video},{clip},{value}\n" for video, clip, value in rows)
        put(root / f"metadata/sentiment/label_{name}.csv", f"{BOM}video_id,clip_id,label\n{lines}")
    for part, index in {"train": 0, "val": 1, "test": 2}.items():
        put(root / f"metadata/{part}_index.csv", f"index\n{index}\n")
    words = (
        "video_id,clip_id,Chinese,English\nvideo_0001,1,我很高兴,I am glad\nvideo_0001,3,好,OK\n"
    )
    put(root / "metadata/Translation.csv", words, "gb18030")
    for clip in ("0001", "0002", "0003"):
        put(root / f"Raw/video_0001/{clip}.mp4")
    return root


def sims_v2(root: Path) -> Path:
    """One table with words and modes."""
    put(
        root / "meta.csv",
        f"{BOM}video_id,clip_id,text,label,mode\naqgy3_0001,00000,行吧,-0.4,test\n"
        "aqgy3_0001,00001,好的,1.0,train\n",
    )
    for clip in ("00000", "00001"):
        put(root / f"Raw/aqgy3_0001/{clip}.mp4")
    return root


def mer2026(root: Path) -> Path:
    """All tracks: ties in both spellings, line ends in descriptions, labels outside the sets."""
    for name in ("s1", "s2", "s3"):
        put(root / f"video/{name}.mp4")
        put(root / f"audio/{name}.wav")
    put(root / "subtitle_chieng.csv", f"{BOM}name,chinese,english\ns1,太好了,Great\ns2,,\ns3,,No\n")
    put(root / "track1_train.csv", "name,discrete\ns1,happy\ns2,Worried\ns3,bored\n")
    openset = "name,openset\ns1,\"[happy, 'very excited']\"\ns2,[]\n"
    put(root / "track2_train_human.csv", openset)
    put(
        root / "track3_emoprefer.csv",
        "name,a1,a2,preference\n"
        's1,"She smiles,\nand laughs.",She cries.,a1\n'
        "s1,He is sad.,He is glad.,A2\n"
        "s2,Calm.,Quiet.,same\n"
        "s2,Calm.,Quiet.,tie\n"
        "s3,Calm.,,a1\n"
        "s3,Calm.,Angry.,both\n"
        "s3,Calm <video>.,Calm.,a1\n"
        "s3,Calm <audio>.,Calm   .,a2\n",
    )
    put(root / "track1_track2_candidate.csv", "name\ns2\ns1\n")
    put(root / "track3_candidate.csv", "name,a1,a2\ns1,Glad.,Sad.\ns1,Sad.,Glad.\n")
    return root


def asked(benchmark: str, root: Path, options: dict[str, str] | None = None) -> list[Question]:
    """The questions of a benchmark about a release, as ``mmemo eval`` makes them."""
    manifest = root.parent / f"{root.name}.jsonl"
    made = options_of(benchmark, options or {})
    write_manifest(adapter_of(benchmark), root, manifest, made)
    columns = columns_of_adapter(adapter_of(benchmark))
    data = DataConfig(manifests=[str(manifest)], media_root=str(root), columns=columns)
    questions = load_benchmark(benchmark).questions(data)
    validate(load_benchmark(benchmark), questions)
    return questions


def answered(questions: Sequence[Question], text_of: Callable[[Question], str]) -> list[Row]:
    """The rows of a model that answers each question with a text."""
    rows: list[Row] = []
    for question in questions:
        raw = text_of(question)
        if question.kind is not None:
            read = question.kind.read(raw)
            own = {"status": read.status, "answer": read.answer, "score": None}
        else:
            parsed = parse(raw, question.labels or ())
            right = float(parsed.label == question.truth)
            own = {"status": parsed.status, "answer": parsed.label, "score": right}
        rows.append({**question.row(), "raw": raw, **own})
    return rows


def scored(benchmark: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The blocks of the tasks, with the official numbers."""
    loaded = load_benchmark(benchmark)
    blocks = score_rows(rows, BootstrapConfig(resamples=100), loaded.specs())
    for name, task in loaded.tasks.items():
        if task.official is not None and name in blocks:
            blocks[name]["official"] = task.official([row for row in rows if row["task"] == name])
    return blocks
