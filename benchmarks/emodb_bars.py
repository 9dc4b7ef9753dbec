"""What an LLM has to beat on EmoDB: the majority, a ridge probe on its features, and listeners.

    python benchmarks/emodb_bars.py --root EMODB --encoder openai/whisper-tiny.en --layers 2 3
    python benchmarks/emodb_bars.py --root EMODB --study runs/studies/emodb --output bars.md

For each of the five folds of ``data/emodb.py`` a ridge classifier learns from the six training
speakers, its strength chosen by cross-validation over them, and answers about the two test
speakers. The features are those that the recipe's connector gets: the mean over time of the
encoder's layers; with ``--prosody CACHE``, the four measured values too. UAR is over all ten
speakers, with the interval of ``mmemo eval``. With ``--study`` the answers of that study's arms,
pooled over its folds, stand beside them, each with its paired difference to the probe on the
encoder's features (permutations of speakers, Holm over the arms).

The text of EmoDB says nothing, so a model without sound is at chance, 1 in 7. The clips of one
public copy are cut or padded to 2.0 s, so that no number here compares with those of papers.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoFeatureExtractor, AutoModel

from mmemo import content, files
from mmemo.answers.label_sets import emotion_set
from mmemo.console import console, progress
from mmemo.errors import DataError
from mmemo.evaluation.comparison import compare_rows, correct
from mmemo.evaluation.scoring import score_rows
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode
from mmemo.statistics import BootstrapConfig

EMODB = content.load_module("data/emodb.py")
PROBE = "ridge probe"
STRENGTHS = [10.0**power for power in range(-1, 6)]


def features(root: Path, files: list[str], encoder: str, layers: list[int]) -> np.ndarray:
    """(n, D) mean over time, up to the end of the sound, of the mean of the layers."""
    extract: Any = AutoFeatureExtractor.from_pretrained(encoder)
    model: Any = AutoModel.from_pretrained(encoder).get_encoder().eval()
    found: list[np.ndarray] = []
    with progress("features", len(files), unit="clips") as bar, torch.inference_mode():
        for file in files:
            job = DecodeJob(
                root / file, file, frozenset({"audio"}), SamplingConfig(), DecodeConfig()
            )
            wave = decode(job).waveform
            assert wave is not None
            inputs = extract(wave, sampling_rate=16_000, return_tensors="pt").input_features
            states = model(inputs, output_hidden_states=True).hidden_states
            frames = min(1500, max(1, len(wave) // 320))  # 50 frames a second
            mean = torch.stack([states[layer][0, :frames] for layer in layers]).mean((0, 1))
            found.append(mean.numpy())
            bar.advance(1)
    return np.stack(found)


def answer_rows(rows: list[dict[str, Any]], answers: list[str]) -> list[dict[str, Any]]:
    """Answers as rows of an evaluation."""
    labels = list(emotion_set("emodb").names)
    return [
        {
            "sample_id": row["sample_id"],
            "task": "emotion",
            "labels": labels,
            "truth": row["label"],
            "answer": answer,
            "status": "ok",
            "score": float(answer == row["label"]),
            "group": row["group"],
        }
        for row, answer in zip(rows, answers, strict=True)
    ]


def told(name: str, rows: list[dict[str, Any]]) -> str:
    """UAR and WAR with their intervals over speakers, in percent."""
    found = score_rows(rows, BootstrapConfig())["emotion"]["metrics"]
    cells = [
        f"{100 * found[key]['value']:.1f} ({100 * found[key]['low']:.1f} to "
        f"{100 * found[key]['high']:.1f})"
        if found[key]["low"] is not None
        else f"{100 * found[key]['value']:.1f}"
        for key in ("uar", "war")
    ]
    return f"| {name} | {cells[0]} | {cells[1]} | {len(rows)} |"


def probe_answers(inputs: np.ndarray, labels: np.ndarray, speakers: np.ndarray) -> list[str]:
    """The probe's answer about each clip, from six speakers of the clip's fold."""
    answers = np.empty(len(labels), dtype=object)
    for people in EMODB.FOLDS:
        test = np.isin(speakers, people)
        # The validation speakers of the recipe are not trained on here either.
        before = EMODB.FOLDS[EMODB.FOLDS.index(people) - 1]
        train = ~test & ~np.isin(speakers, before)
        probe = GridSearchCV(
            make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced")),
            {"ridgeclassifier__alpha": STRENGTHS},
            cv=LeaveOneGroupOut(),
            scoring="balanced_accuracy",
        )
        probe.fit(inputs[train], labels[train], groups=speakers[train])
        answers[test] = probe.predict(inputs[test])
    return answers.tolist()


def prosody(file: Path, names: Sequence[str]) -> np.ndarray:
    """(n, 4) the measured values of each file; the median for a clip without a voice."""
    with file.open(encoding="utf-8", newline="") as handle:
        known = {row["file"]: row for row in csv.DictReader(handle)}
    measures = ("pitch", "range", "loudness", "rate")
    values = np.array([[float(known[name][m] or "nan") for m in measures] for name in names])
    return np.where(np.isnan(values), np.nanmedian(values, 0), values)


def arms_of(study: Path, everything: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The answers of each arm that has all folds, in the order of ``everything``.

    Raises:
        DataError: an arm's folds together do not ask each clip once.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    wanted = [row["sample_id"] for row in everything]
    for arm in sorted({path.name for path in study.glob("seeds/*/*") if path.name != "start"}):
        parts = sorted(study.glob(f"seeds/*/{arm}/evaluation/predictions.jsonl"))
        if len(parts) < len(EMODB.FOLDS):
            console.print(f"{arm}: {len(parts)} of {len(EMODB.FOLDS)} folds are done; left out")
            continue
        rows = [row for part in parts for row in files.read_rows(part)]
        if sorted(row["sample_id"] for row in rows) != sorted(wanted):
            raise DataError(f"the folds of '{arm}' do not ask each clip once", file=str(study))
        by_id = {row["sample_id"]: row for row in rows}
        found[arm] = [by_id[name] for name in wanted]
    return found


def differences(arms: dict[str, list[dict[str, Any]]], probe: list[dict[str, Any]]) -> list[str]:
    """Rows of a table: each arm's UAR less the probe's, with interval and corrected p."""
    blocks = {name: compare_rows(rows, probe, BootstrapConfig()) for name, rows in arms.items()}
    for block in blocks.values():
        block["differences"] = {"uar": block["differences"]["uar"]}
    correct(list(blocks.values()))
    lines: list[str] = []
    for name, block in blocks.items():
        one = block["differences"]["uar"]
        low, high = (f"{100 * one[side]:+.1f}" for side in ("low", "high"))
        lines.append(
            f"| {name} − {PROBE} | {100 * (one['a'] - one['b']):+.1f} ({low} to {high}) "
            f"| {one['p_holm']:.3f} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of EmoDB")
    parser.add_argument("--encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--prosody", type=Path, help="CSV file of values that data/prosody.py kept")
    parser.add_argument(
        "--study", type=Path, help="folder of a run of train_configs/studies/emodb/study.yaml"
    )
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    everything = list(EMODB.rows(given.root))
    clips = [row["audio"] for row in everything]
    labels = np.array([row["label"] for row in everything])
    speakers = np.array([row["group"]["speaker"] for row in everything])
    sets = {PROBE: features(given.root, clips, given.encoder, given.layers)}
    if given.prosody is not None:
        sets[f"{PROBE} on prosody"] = values = prosody(given.prosody, clips)
        sets[f"{PROBE} on both"] = np.concatenate([sets[PROBE], values], 1)
    common = Counter(labels.tolist()).most_common(1)[0][0]
    named = {f"majority ({common})": [common] * len(labels)}
    named |= {name: probe_answers(inputs, labels, speakers) for name, inputs in sets.items()}
    bars = {name: answer_rows(everything, answers) for name, answers in named.items()}
    arms = {} if given.study is None else arms_of(given.study, everything)
    lines = ["| | UAR, % | WAR, % | clips |", "| --- | --- | --- | --- |"]
    lines += [told(name, rows) for name, rows in {**bars, **arms}.items()]
    heard = [1 - row["difficulty"] for row in everything if "difficulty" in row]
    if heard:
        lines.append(f"| listeners | – | {100 * float(np.mean(heard)):.1f} | {len(heard)} |")
    if arms:
        lines += ["", "| | difference of UAR, points | p (Holm) |", "| --- | --- | --- |"]
        lines += differences(arms, bars[PROBE])
    layers = ", ".join(map(str, given.layers))
    lines += ["", f"Features: layers {layers} of {given.encoder}, mean over time."]
    text = "\n".join(lines)
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    if given.output is not None:
        files.write_whole(given.output, f"{text}\n")


if __name__ == "__main__":
    main()
