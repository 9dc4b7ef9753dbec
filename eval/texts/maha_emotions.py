"""L3Cube-MahaEmotions: the emotion of Marathi tweets, in 10 or 11 classes.

Licence, source and layout of the folder: ``data/texts/maha_emotions.py``. Metrics: accuracy and F1
(macro, weighted). Accuracy is also given for tweets that are word for word in train, and for the
others; only the others say something of a model that was trained on train.

    mmemo eval eval/texts/maha_emotions.py --data MahaEmotions --model MODEL --option classes=11
"""

from __future__ import annotations

import sys

from mmemo import content
from mmemo.answers.parsing import LabelSet
from mmemo.evaluation.task import Task

ADAPTER = "data/texts/maha_emotions.py"
MARATHI = {
    "Anger": ("राग", "क्रोध", "angry"),
    "Disgust": ("तिरस्कार", "किळस", "disgusted"),
    "Excitement": ("उत्साह", "excited"),
    "Fear": ("भीती", "fearful"),
    "Happiness": ("आनंद", "happy", "joy"),
    "Neutral": ("तटस्थ",),
    "Pride": ("अभिमान", "proud"),
    "Respect": ("आदर", "respectful"),
    "Sadness": ("दुःख", "sad"),
    "Sarcasm": ("उपरोध", "sarcastic"),
    "Surprise": ("आश्चर्य", "surprised"),
}
"""What an answer may say for a label beside its name."""
TEN: tuple[str, ...] = content.load(f"{ADAPTER}:TEN")


def _forms(label: str) -> list[str]:
    parts = label.split("/")
    return [*(parts if len(parts) > 1 else ()), *(form for part in parts for form in MARATHI[part])]


TASKS = {
    "emotion10": Task(
        labels=LabelSet(TEN, {label: _forms(label) for label in TEN}), slices=("in_train",)
    ),
    "emotion11": Task(
        labels=LabelSet(tuple(MARATHI), {label: _forms(label) for label in MARATHI}),
        slices=("in_train",),
    ),
}


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
