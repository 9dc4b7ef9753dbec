"""Miniatures of released suites, in their exact layout and with their traps; clips are empty files.

``asked`` reads one as ``mmemo eval`` does, and ``answered`` feeds answers to its questions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import parse
from mmemo.data.adapter import write_manifest
from mmemo.data.manifest import DataConfig
from mmemo.evaluation.benchmark import Benchmark, Question, load_benchmark, validate
from mmemo.evaluation.predictions import Row
from mmemo.evaluation.task import write_excluded


def write_json(path: Path, value: Any, *, mark: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8")


def write_lines(path: Path, rows: Sequence[Any], *, mark: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows)
    path.write_text(text, encoding="utf-8-sig" if mark else "utf-8")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def asked(
    file: str, root: Path, folder: Path, **options: str
) -> tuple[Benchmark, list[Question], Counter[str], tuple[str, ...]]:
    """The benchmark, its questions, the reasons of rows left out, and the missing files."""
    manifest = folder / "manifest.jsonl"
    made = write_manifest(file, root, manifest, options)
    write_excluded(manifest, made.excluded)
    benchmark = load_benchmark(file)
    config = DataConfig(manifests=[str(manifest)], media_root=str(root))
    questions = benchmark.questions(config)
    validate(benchmark, questions)
    return benchmark, questions, Counter(one.reason for one in made.excluded), made.missing


def answered(questions: Sequence[Question], say: Callable[[Question], str]) -> list[Row]:
    """The rows of ``predictions.jsonl`` if the model says this."""
    rows: list[Row] = []
    for question in questions:
        raw = say(question)
        row: Row = {**question.row(), "raw": raw}
        if question.kind is not None:
            read = question.kind.read(raw)
            row |= {"status": read.status, "answer": read.answer, "score": None}
        elif question.labels is not None:
            parsed = parse(raw, question.labels)
            right = float(parsed.label == question.truth)
            row |= {"status": parsed.status, "answer": parsed.label, "score": right}
        rows.append(row)
    return rows


def emobench_m(root: Path) -> None:
    def row(ident: str, clip: str, question: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"<video>\n{question}"}]
        return {
            "id": ident,
            "video": clip,
            "conversations": [*turns, {"from": "gpt", "value": answer}],
        }

    meld = [
        row("0", "MELD/a.mp4", "Which emotion?", "joy"),
        row("1", "MELD/b.mp4", "Which emotion?", "Anger "),
        row("1", "MELD/b.mp4", "Which emotion?", "Anger "),
        row("2", "MELD/c.mp4", "Which emotion?", "boredom"),
        row("3", "MELD/d.mp4", "Which emotion?", "neutral"),
        row("4", "MELD/e.mp4", "Which emotion?", "sadness"),
        {"id": "5", "video": "MELD/a.mp4", "conversations": None},
    ]
    write_json(root / "benchmark_json/MELD_test.json", meld, mark=True)
    sims = [row("0", "SIMS/a.mp4", "Sentiment?", "Positive")]
    write_json(root / "benchmark_json/SIMS_test.json", sims)
    write_json(root / "benchmark_json/ch-simsv2s_test.json", sims)
    laugh = [row("0", "SMILE/a.mp4", "Why do they laugh?", "He fell over his own feet.")]
    write_json(root / "benchmark_json/smile_test_data.json", laugh)
    both = [
        row("0", "MC-EIU/a.mp4", "Emotion and intent?", "happy, agreeing"),
        row("1", "MC-EIU/b.mp4", "Emotion and intent?", "The emotion is sad, the intent neutral."),
        row("2", "MC-EIU/c.mp4", "Emotion and intent?", "happy"),
    ]
    write_json(root / "benchmark_json/MC-EIU-test_500.json", both)
    write_json(root / "benchmark_json/other.json", both)
    clips = ("MELD/a", "MELD/b", "MELD/c", "MELD/d", "SIMS/a", "SMILE/a")
    clips += ("MC-EIU/a", "MC-EIU/b", "MC-EIU/c")
    touch(root / "datasets", *(f"{clip}.mp4" for clip in clips))


def humanvbench(root: Path) -> None:
    def row(ident: int, answer: str, **more: Any) -> dict[str, Any]:
        choices = "Option A: {She is calm}\n\nOption B: {She is happy}\n\nOption C: {Neither}\n\n"
        base = {"Question_id": ident, "Video": f"{ident}.mp4", "Question": "How does she feel?"}
        return {**base, "choices": choices, "Answer": answer, **more}

    emotion = [row(1, "B"), row(2, "A"), row(3, "D"), row(4, "C", Video=None), "{torn"]
    write_lines(root / "for_Eval/Emotion_Recognition.jsonl", emotion, mark=True)
    write_lines(root / "for_Eval/Human_Count.jsonl", [row(1, "B"), row(9, "B")])
    write_lines(root / "for_Eval/New_Task.jsonl", [row(1, "B")])
    touch(root, "Emotion_Recognition/1.mp4", "videos/Emotion_Recognition/2.mp4", "videos/3.mp4")
    touch(root, "Human_Count/1.mp4")


def mmsu(root: Path) -> None:
    base = {
        "task_name": "emotion_recognition",
        "question": "Which emotion?",
        "category": "Perception",
        "sub-category": "Paralinguistics",
        "sub-sub-category": "Speaking style",
        "linguistics_sub_discipline": "Paralinguistics",
    }
    four = {"choice_a": "happy", "choice_b": "sad", "choice_c": "angry", "choice_d": "calm"}
    two = {"choice_a": 1, "choice_b": 2, "choice_c": None}
    other = {"category": "Reasoning", "sub-category": "Linguistics", "task_name": "counting"}
    rows = [
        {"id": "m1", "audio_path": "audio/1.wav", **base, **four, "answer_gt": "sad"},
        {"id": "m2", "audio_path": "/home/x/audio/2.wav", **base, **four, "answer_gt": "Calm "},
        {"id": "m3", "audio_path": "audio/1.wav", **base, **other, **two, "answer_gt": 2},
        {"id": "m4", "audio_path": "audio/1.wav", **base, **four, "answer_gt": "bored"},
        {"id": "m5", "audio_path": "audio/none.wav", **base, **four, "answer_gt": "sad"},
        {"id": "m6", **base, **four, "answer_gt": "sad"},
        {"id": "m1", "audio_path": "audio/2.wav", **base, **four, "answer_gt": "happy"},
    ]
    write_lines(root / "question/mmsu.jsonl", rows, mark=True)
    touch(root, "audio/1.wav", "audio/2.wav")


def omnibench(root: Path) -> None:
    options = ["A man is cooking.", "A man sleeps.", "Two men talk.", "Nobody is there."]
    base = {"task type": "Action and Activity", "audio type": " Speech", "options": options}
    base |= {"question": "What happens?", "audio content": "A: Hi!", "image content": "A kitchen."}
    rows = [
        {**base, "audio_path": "a.mp3", "image_path": "a.png", "index": 0, "answer": options[2]},
        {**base, "audio_path": "b.mp4.mp3", "image_path": "b.jpg", "index": 1, "answer": "none"},
        {**base, "audio_path": "a.mp3", "image_path": "c.png", "index": 2, "answer": options[0]},
        {
            **base,
            "audio_path": "a.mp3",
            "image_path": None,
            "index": 3,
            "answer": options[1],
        },
    ]
    write_lines(root / "dataset/batch-5_1142_20240817.jsonl", rows)
    touch(root, "mm_data/audio/a.mp3", "mm_data/audio/b.mp4.mp3", "mm_data/image/a.png")
    touch(root, "mm_data/clips/a.mp4")


def mtmeur(root: Path) -> None:
    def question(text: str, answer: str) -> dict[str, Any]:
        options = {"A": "supportive", "B": "stressed", "C": "bored", "D": "angry"}
        return {"question": text, "options": options, "correct_answer": answer}

    videos = [
        {
            "video_path": "1.mp4",
            "questions": [
                question("First?", "A"),
                question("Several?", "A,C"),
                question("Second?", "d"),
            ],
        },
        {"video_path": "2.mp4", "questions": [question("Alone?", "B")]},
        {"video_path": "2.mp4", "questions": [question("Alone?", "B")]},
        {"video_path": "1.mp4", "questions": [question("Later?", "C")]},
        {"video_path": "3.mp4", "questions": "none"},
    ]
    write_json(root / "data/example.json", videos)
    touch(root, "videos/1.mp4", "2.mp4")


def emotrans(root: Path) -> None:
    options = ["calm to angry", "angry to calm"]
    change = {"question": "Does the emotion change?", "scenario": "family"}
    rows: list[dict[str, Any]] = [
        {"id": 1, "video": "1.mp4", "task": "ECD", **change, "answer": "Yes."},
        {"id": 2, "video": "2.mp4", "task": "ECD", **change, "answer": "perhaps"},
        {
            "id": 3,
            "video_id": "1",
            "task_type": "Emotion Transition Reasoning",
            "question": "How?",
            "options": options,
            "answer": "B",
        },
        {"id": 4, "video": "1.mp4", "task": "new", **change, "options": options, "answer": "A"},
        {"id": 5, "task": "NEP", **change, "options": options, "answer": "A"},
    ]
    write_json(root / "annotations/qa.json", rows)
    (root / "annotations/NEP.csv").write_text(
        "\ufeffid,video,question,A,B,answer\n1,videos/2.mp4,Next?,happy,sad,B\n", encoding="utf-8"
    )
    touch(root, "videos/1.mp4", "videos/2.mp4")


def hitemotion(root: Path) -> None:
    def row(number: int, answer: str, **more: Any) -> dict[str, Any]:
        return {"id": number, "video": f"{number}.mp4", "question": "?", "answer": answer, **more}

    write_json(
        root / "L1/MER_test.json",
        [row(1, "happy"), row(2, "Angry"), row(3, "angry"), row(4, ""), row(5, "sad", video=None)],
    )
    write_lines(
        root / "L1/SPER.jsonl", [row(1, "A", video=None, audio="1.wav", options=["x", "y"])]
    )
    write_json(root / "L2/MQE.json", [row(1, "(a, b)")])
    write_json(root / "L3/LR.json", [row(1, "He fell."), row(2, "")])
    write_json(root / "L3/notes.json", [row(1, "x")])
    touch(root, "videos/1.mp4", "videos/2.mp4", "videos/3.mp4", "audios/1.wav")


def mme_emotion(root: Path) -> None:
    folder = root / "MME-Emotion-Dataset"
    labels = ["Neutral", "Anger", "Surprise"]
    clip = "IEMOCAP/video/{}.mp4"
    question = [
        {"video_id": clip.format("a"), "label": "Anger", "label_set": labels},
        {"video_id": clip.format("b"), "label": "boredom", "label_set": labels},
        {"video_id": clip.format("c"), "label": "anger", "label_set": labels},
        {"label": "anger", "label_set": labels},
    ]
    write_json(folder / "ER-Lab/question/ER_Lab.json", question)
    clues = [{"video_id": clip.format("a"), "ground_truth": "Anger", "audio_clue": "She shouts."}]
    write_json(folder / "ER-Lab/audio_clue/ER_Lab_qwen2_audio_clues.json", clues)
    several = {"video_id": clip.format("a"), "label": "anger,surprise", "label_set": labels}
    write_json(folder / "ML-ER/question/ML_ER.json", [several])
    touch(root, clip.format("a"), clip.format("b"))


def emer(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "EMER.csv").write_text(
        "\ufeffnames,emotions,subtitles,reasons\r\n"
        'sample_1,"[\'angry\']","Go, now!","She frowns, and shouts.\nShe is angry."\r\n'
        "sample_2,[],Hi,He smiles.\r\n"
        "sample_3,[],Hi,\r\n"
        "sample_4,[],Hi,He sighs.\r\n",
        encoding="utf-8",
        newline="",
    )
    (root / "EMER-v2.csv").write_text("name,chinese,english\nsample_1,她生气。,She is angry.\n")
    touch(root, "video/sample_1.mp4", "video/sample_2.avi")
