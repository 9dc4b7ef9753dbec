"""SD-Eval: spoken turns whose reply should suit the emotion, accent, age or surroundings heard.

7,303 utterances (Ao et al., arXiv 2406.13340), CC BY-NC 4.0; get
https://github.com/amphionspace/SD-Eval, and the sounds from RAVDESS, JL Corpus, MEAD, VCTK, Common
Voice and MyST as its README says. Layout of the folder::

    data/test-emo.json      [{utt_id, wav_path, transcript, info, dataset_name, target: [{reply}]}]
    audio_data/RAVDESS-Speech/Actor_01/....wav        or wav_path itself; info: the emotion

``gold`` lists the five reference replies, and ``facts`` tell a judge the words and ``info``, which
the model must hear itself.

    mmemo manifest data/spoken/sd_eval.py --root SD-Eval --output sd_eval.jsonl --option subset=emo
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import once
from mmemo.data.releases.tables import read_table

SUBSETS = {"emo": "emotion", "acc": "accent", "age": "age", "env": "background sound"}
COLUMNS = ("task", "gold", "facts")
PUBLISHED = {
    f"subset={name}": {"": count}
    for name, count in zip(("all", *SUBSETS), (7303, 1289, 4310, 1014, 690), strict=True)
}
QUESTION = "<audio>Reply to the speaker in one or two sentences, as suits what you hear."


def rows(root: Path, *, subset: str = "all") -> Iterator[dict[str, Any] | Excluded]:
    """One row per utterance. ``subset``: all that are there, emo, acc, age or env."""
    need_option("subset", subset, ("all", *SUBSETS))
    for name in SUBSETS if subset == "all" else (subset,):
        file = root / f"data/test-{name}.json"
        if subset == name or file.is_file():
            yield from once(
                line if isinstance(line, Excluded) else _row(root, name, line)
                for line in read_table(file)
            )


def _row(root: Path, name: str, line: dict[str, Any]) -> dict[str, Any] | Excluded:
    row = f"sd-eval-{name}-{line.get('utt_id')}"
    replies = [str(one.get("reply") or "").strip() for one in line.get("target") or ()]
    if not all(line.get(key) for key in ("utt_id", "wav_path", "info")) or not any(replies):
        return Excluded(row, "incomplete", ", ".join(key for key, value in line.items() if value))
    path = str(line["wav_path"]).lstrip("/")
    here = next(
        (p for p in (path, f"audio_data/{path}") if (root / p).is_file()), f"audio_data/{path}"
    )
    words, info = str(line.get("transcript") or ""), str(line["info"]).strip()
    return {
        "sample_id": row,
        "prompt": QUESTION,
        "audio": here,
        "task": name,
        "gold": [reply for reply in replies if reply],
        "facts": f"The speaker says: {words}\nThe speaker's {SUBSETS[name]}: {info}",
        "transcript": words or None,
        "group": {"info": info.lower(), "source": str(line.get("dataset_name") or "unknown")},
    }
