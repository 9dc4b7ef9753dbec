"""EMO-DB, the Berlin Database of Emotional Speech: acted German speech, sound only.

535 utterances of 10 actors, 10 sentences and 7 emotions (Burkhardt et al., Interspeech 2005), free
for research; get it from http://emodb.bilderbar.info. Every sentence is spoken in every emotion,
so the words alone say nothing. Layout of the release::

    wav/03a01Wa.wav     speaker 03, sentence a01, emotion W, version a
    erkennung.txt       optional (latin-1): % of 20 listeners who recognised the emotion

A row's difficulty is the share of listeners who did not recognise it.

    mmemo manifest data/emodb.py --root EMODB --output emodb_train.jsonl --split train
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.answers.label_sets import emotion_set, mapping
from mmemo.data.adapter import need_option
from mmemo.errors import DataError

LABELS = "emodb"
MEN = ("03", "10", "11", "12", "15")
WOMEN = ("08", "09", "13", "14", "16")
PUBLISHED = {
    "split=all": {
        "anger": 127,
        "boredom": 81,
        "neutral": 79,
        "happiness": 71,
        "fear": 69,
        "sadness": 62,
        "disgust": 46,
    }
}
FOLDS = (("03", "08"), ("10", "09"), ("11", "13"), ("12", "14"), ("15", "16"))
"""Five folds of one man and one woman each, ours too."""
QUESTION = "<audio>Which emotion does the speaker express? Answer with one of these words: {}."

_NAME = re.compile(r"(\d\d)([ab]\d\d)([WLEAFTN])[a-z]")


def rows(
    root: Path, *, split: str = "all", labels: str = LABELS, fold: str = "5"
) -> Iterator[dict[str, Any]]:
    """One row per utterance; ``split``: all, train, validation or test, apart by speaker.
    ``fold``: 1 to 5, whose speakers are test; those of the fold before it are validation.
    ``labels``: the label set of the rows; utterances without a label in it are left out."""
    need_option("split", split, ("all", "train", "validation", "test"))
    need_option("fold", fold, tuple("12345"))
    held_out = {"test": FOLDS[int(fold) - 1], "validation": FOLDS[int(fold) - 2]}
    recognised = _recognised(root / "erkennung.txt")
    # By the German word's first letter: Wut, Langeweile, Ekel, Angst, Freude, Trauer.
    emotions = mapping(LABELS, labels).by_code
    question = QUESTION.format(", ".join(emotion_set(labels).names))
    for file in sorted((root / "wav").glob("*.wav")):
        name = _NAME.fullmatch(file.stem)
        if name is None:
            continue
        speaker, sentence, letter = name.groups()
        own = next((part for part, people in held_out.items() if speaker in people), "train")
        if split not in ("all", own) or letter not in emotions:
            continue
        row: dict[str, Any] = {
            "sample_id": f"emodb-{file.stem}",
            "prompt": question,
            "completion": f"<answer>{emotions[letter]}</answer>",
            "audio": f"wav/{file.name}",
            "label": emotions[letter],
            "group": {"speaker": speaker, "sentence": sentence},
        }
        if speaker in MEN or speaker in WOMEN:
            row["group"]["gender"] = "male" if speaker in MEN else "female"
        if file.name in recognised:
            row["difficulty"] = round(1 - recognised[file.name] / 100, 4)
        yield row


def _recognised(table: Path) -> dict[str, float]:
    """File name -> percent of listeners, written as in ``97,50``."""
    if not table.exists():
        return {}
    lines = [line.split("\t") for line in table.read_text("latin-1").splitlines()[1:]]
    try:
        return {cells[1].strip(): float(cells[2].replace(",", ".")) for cells in lines if cells[1:]}
    except (IndexError, ValueError) as error:
        raise DataError(f"is not EMO-DB's table ({error})", file=str(table)) from error
