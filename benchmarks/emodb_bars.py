"""What an LLM has to beat on EmoDB: the majority, a ridge probe on its features, and listeners.

    python benchmarks/emodb_bars.py --root EMODB --encoder openai/whisper-tiny.en --layers 2 3

For each of the five folds of ``data/emodb.py`` a ridge classifier learns from the six training
speakers, its strength chosen by cross-validation over them, and answers about the two test
speakers. The features are those that the recipe's connector gets: the mean over time of the
encoder's layers; with ``--prosody CACHE``, the four measured values too. UAR is over all ten
speakers, with the interval of ``mmemo eval``. The text of EmoDB says nothing, so a model without
sound is at chance, 1 in 7. The clips of one public copy are cut or padded to 2.0 s, so that no
number here compares with those of papers.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoFeatureExtractor, AutoModel

from mmemo import content
from mmemo.answers.label_sets import emotion_set
from mmemo.console import console, progress
from mmemo.evaluation.scoring import score_rows
from mmemo.media.clip import DecodeJob
from mmemo.media.config import DecodeConfig, SamplingConfig
from mmemo.media.decode import decode
from mmemo.statistics import BootstrapConfig

EMODB = content.load_module("data/emodb.py")
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of EmoDB")
    parser.add_argument("--encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--prosody", type=Path, help="CSV file of values that data/prosody.py kept")
    given = parser.parse_args()
    everything = list(EMODB.rows(given.root))
    files = [row["audio"] for row in everything]
    sets = {"ridge probe": features(given.root, files, given.encoder, given.layers)}
    if given.prosody is not None:
        with given.prosody.open(encoding="utf-8", newline="") as handle:
            known = {row["file"]: row for row in csv.DictReader(handle)}
        names = ("pitch", "range", "loudness", "rate")
        values = np.array([[float(known[file][n] or "nan") for n in names] for file in files])
        values = np.where(np.isnan(values), np.nanmedian(values, 0), values)
        sets["ridge probe on prosody"] = values
        sets["ridge probe on both"] = np.concatenate([sets["ridge probe"], values], 1)
    labels = np.array([row["label"] for row in everything])
    speakers = np.array([row["group"]["speaker"] for row in everything])
    lines: list[str] = []
    for name, inputs in sets.items():
        answers = np.empty(len(everything), dtype=object)
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
        lines.append(told(name, answer_rows(everything, answers.tolist())))
    common = Counter(labels.tolist()).most_common(1)[0][0]
    lines.append(told(f"majority ({common})", answer_rows(everything, [common] * len(labels))))
    heard = [1 - row["difficulty"] for row in everything if "difficulty" in row]
    for line in ("| | UAR, % | WAR, % | clips |", "| --- | --- | --- | --- |", *lines):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if heard:
        console.print(f"Listeners recognised {100 * float(np.mean(heard)):.1f}% of {len(heard)}.")
    console.print(json.dumps({"encoder": given.encoder, "layers": given.layers}))


if __name__ == "__main__":
    main()
