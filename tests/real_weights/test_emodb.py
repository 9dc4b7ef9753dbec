"""A small piece of the EmoDB recipe, from the release's folder to an evaluation.

The voices are synthetic, in EmoDB's layout, whose clips are not shipped. With ``MMEMO_TEST_DATA``
set, the folder ``emodb`` in it is read instead.
"""

from __future__ import annotations

import json
import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemo import content
from mmemo.config import load_config
from mmemo.stages import stage
from tests.real_weights.voice import Prosody, Speaker

pytestmark = [pytest.mark.real_weights, pytest.mark.timeout(1800)]

SPEAKERS = {"03": "en-us+m1", "08": "en-us+f1", "10": "en-us+m3", "09": "en-us+f2"}
SPOKEN = {
    "W": Prosody(190, 70, 95, 140),
    "T": Prosody(100, 20, 20, 80),
    "N": Prosody(130, 40, 50, 105),
}
SENTENCES = {"a01": "The cloth lies on the fridge.", "a02": "She will hand it in on Wednesday."}


def make(espeak: Path, root: Path) -> None:
    """Four speakers, three emotions and two sentences, as ``wav/03a01Wa.wav``."""
    speaker = Speaker(espeak)
    (root / "wav").mkdir(parents=True)
    for number, voice in SPEAKERS.items():
        for letter, prosody in SPOKEN.items():
            for code, sentence in SENTENCES.items():
                sound = speaker.say(sentence, voice, prosody)[: 2 * speaker.rate]
                with wave.open(str(root / f"wav/{number}{code}{letter}a.wav"), "wb") as file:
                    file.setnchannels(1)
                    file.setsampwidth(2)
                    file.setframerate(speaker.rate)
                    file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emodb")


@pytest.fixture(scope="module")
def root(weights: Path, work: Path) -> Path:
    """The folder of the release."""
    data = os.environ.get("MMEMO_TEST_DATA")
    if data and (Path(data) / "emodb/wav").is_dir():
        return Path(data) / "emodb"
    make(weights / "espeak", work / "EMODB")
    return work / "EMODB"


def run(name: str, file: str, work: Path, **overrides: Any) -> Any:
    """Run a stage of the recipe on fold 1, in a few steps."""
    kind = stage(name)
    common = {"output_dir": work / "run" / Path(file).stem}
    if name != "manifests":
        common |= {"store.path": work / "store"}
    if name in ("sft", "grpo", "dpo"):
        common |= {"train.max_steps": 2, "run.logging_steps": 1}
    values = {**common, **{key.replace("__", "."): one for key, one in overrides.items()}}
    config = load_config(
        kind.config_class,
        content.find(f"train_configs/emodb/{file}"),
        [f"{key}={value}" for key, value in values.items()],
        {"run": str(work / "run"), "seed": "1"},
    )
    return kind.runner(config)


def test_the_recipe_runs_from_the_release_to_an_evaluation(
    weights: Path, work: Path, root: Path
) -> None:
    cache = work / "prosody.csv"
    measured = ("levels", "emotion", "emotion_test")
    prosody = {f"manifests__{name}__options__cache": cache for name in measured}
    run("manifests", "manifests.yaml", work, root=root, output_dir=work / "run/data", **prosody)
    first = json.loads((work / "run/data/emotion.jsonl").read_text().splitlines()[0])
    assert first["prompt"].endswith("Say first what you hear.")
    # Angry voices are made higher than sad ones, whoever speaks.
    lines = (work / "run/data/levels.jsonl").read_text().splitlines()
    said = {row["sample_id"]: row["completion"] for row in map(json.loads, lines)}
    assert sum("high" in said[n] for n in said if "Wa-pitch" in n) > sum(
        "high" in said[n] for n in said if "Ta-pitch" in n
    )
    media = {"data__media_root": root}
    parts = {
        "model__text": weights / "smollm2-135m-instruct",
        "model__audio__encoder": weights / "whisper-tiny.en",
    }
    small = {"train__per_device_train_batch_size": 2}
    run("sft", "levels.yaml", work, **media, **parts, **small)
    run("sft", "emotion.yaml", work, **media, **small)
    run("grpo", "grpo.yaml", work, **media, **small, rollout__num_generations=2)
    run("pairs", "pairs.yaml", work, **media)
    run("dpo", "dpo.yaml", work, **media, **small)
    result = run(
        "eval", "eval.yaml", work, output_dir=work / "run/evaluation", **media,
        data__limit=4, majority_from__media_root=root, generation__max_new_tokens=24,
    )  # fmt: skip
    assert result.main["n"] == 4
    assert result.main["labels"] == [
        *("anger", "boredom", "disgust", "fear", "happiness", "sadness", "neutral"),
    ]
    assert set(result.main["scores"]) == {"grounding", "hallucinated"}
