"""WASSA: empathy, distress and emotion of essays that people wrote about news of harm to others.

The shared tasks of 2022 and 2023 (Barriere et al., WASSA 2022 and 2023); register at their CodaLab
pages, 834 and 11167, for the files and their terms of use. Layout of the folder::

    messages_train_ready_for_WS.tsv               2022: essay, empathy, distress, emotion, ...
    messages_dev_features_ready_for_WS_2022.tsv   2022: without labels
    goldstandard_dev_2022.tsv                     2022: their labels, without a header
    WASSA23_essay_level_with_labels_train.tsv     2023: emotion may be several, as Anger/Sadness
    WASSA23_essay_level_dev.tsv, goldstandard_dev.tsv

The test labels were not released. Empathy and distress are numbers from 1 to 7. Each essay gives
two rows: its two numbers, and its emotions. Names of speakers and articles are used where a file
has them. Participants read the files with pandas, so quotation marks may enclose a cell; they are
text with ``quoting=off``. That 2023's columns have the names of 2022's is an assumption.

    mmemo manifest data/texts/wassa.py --root WASSA --output wassa.jsonl --split train
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import find_file, read_table
from mmemo.errors import DataError

COLUMNS = ("task", "gold")
EMOTIONS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise", "hope")
"""Those of 2022, and 2023's hope."""
GOLD = (
    *("empathy", "distress", "emotion", "personality_conscientiousness", "personality_openess"),
    *("personality_extraversion", "personality_agreeableness", "personality_stability"),
    *("iri_perspective_taking", "iri_personal_distress", "iri_fantasy"),
    "iri_empathatic_concern",
)
"""The columns of a file of labels. Two names are misspelt in the release."""
FILES = {
    ("2022", "train"): ("messages_train_ready_for_WS.tsv", None),
    ("2022", "dev"): (
        "messages_dev_features_ready_for_WS_2022.tsv",
        "goldstandard_dev_2022.tsv",
    ),
    ("2023", "train"): ("WASSA23_essay_level_with_labels_train.tsv", None),
    ("2023", "dev"): ("WASSA23_essay_level_dev.tsv", "goldstandard_dev.tsv"),
}
NUMBERS = (
    "Someone read a news article about people who came to harm, and wrote:\n\n{}\n\nHow much "
    "empathy and how much personal distress does the writer feel, each as a number from 1 (not at "
    "all) to 7 (extremely)? Answer with: empathy: NUMBER, distress: NUMBER."
)
EMOTION = (
    "Someone read a news article about people who came to harm, and wrote:\n\n{}\n\nWhich emotions "
    "does the writer express? Answer with one or more of these words, separated by commas: {}."
)


def rows(
    root: Path, *, split: str = "dev", year: str = "2022", quoting: str = "on"
) -> Iterator[dict[str, Any] | Excluded]:
    """Two rows per essay, for the tasks ``empathy`` and ``emotion``. ``split``: train or dev."""
    need_option("quoting", quoting, ("on", "off"))
    need_option("year", year, ("2022", "2023"))
    need_option("split", split, ("train", "dev"))
    essays, labels = FILES[year, split]
    path, quoted = find_file(root, essays), quoting == "on"
    found = list(read_table(path, ("essay",), quoted=quoted))
    golds = found
    if labels is not None:
        gold_path = find_file(root, labels)
        golds = list(read_table(gold_path, GOLD[:3], quoted=quoted, columns=GOLD))
        if len(golds) != len(found):
            raise DataError(
                f"has {len(golds)} rows, but {essays} has {len(found)}; fetch both again",
                file=str(gold_path),
            )
    known = EMOTIONS if year == "2023" else EMOTIONS[:-1]
    for place, (essay, gold) in enumerate(zip(found, golds, strict=True)):
        if isinstance(essay, Excluded) or isinstance(gold, Excluded):
            yield essay if isinstance(essay, Excluded) else gold
        else:
            yield from _both(essay, gold, f"wassa{year}-{split}-{place}", known)


def _both(
    essay: dict[str, str], gold: dict[str, str], name: str, known: tuple[str, ...]
) -> Iterator[dict[str, Any] | Excluded]:
    if not essay["essay"]:
        yield Excluded(name, "no essay")
        return
    fields = {"speaker": "speaker_id", "gender": "gender", "article": "article_id"}
    base: dict[str, Any] = {
        "group": {key: essay[column] for key, column in fields.items() if essay.get(column)}
    }
    numbers = {key: _number(gold.get(key, "")) for key in ("empathy", "distress")}
    if any(value is None for value in numbers.values()):
        told = ", ".join(f"{key} '{gold.get(key, '')}'" for key in numbers)
        yield Excluded(f"{name}-empathy", "no number from 1 to 7", told)
    else:
        yield {
            **base,
            "sample_id": f"{name}-empathy",
            "task": "empathy",
            "prompt": NUMBERS.format(essay["essay"]),
            "completion": f"<answer>empathy: {numbers['empathy']:g}, "
            f"distress: {numbers['distress']:g}</answer>",
            "gold": numbers,
        }
    emotions = [one.strip().casefold() for one in gold.get("emotion", "").split("/") if one.strip()]
    if not emotions or set(emotions) - set(known):
        yield Excluded(f"{name}-emotion", "label outside the set", gold.get("emotion", ""))
        return
    yield {
        **base,
        "sample_id": f"{name}-emotion",
        "task": "emotion",
        "prompt": EMOTION.format(essay["essay"], ", ".join(known)),
        "completion": f"<answer>{', '.join(emotions)}</answer>",
        "gold": [one for one in known if one in emotions],
    }


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 1 <= value <= 7 else None
