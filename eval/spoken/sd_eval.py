"""SD-Eval: spoken replies that should suit a speaker's emotion, accent, age or surroundings.

7,303 utterances (Ao et al., arXiv 2406.13340), CC BY-NC 4.0; get
https://github.com/amphionspace/SD-Eval, and the sounds from RAVDESS, JL Corpus, MEAD, VCTK, Common
Voice and MyST as its README says. Layout of the folder::

    data/test-emo.json      [{utt_id, wav_path, transcript, info, dataset_name, target: [{reply}]}]
    audio_data/RAVDESS-Speech/Actor_01/....wav        or wav_path itself; info: the emotion

BLEU-4, ROUGE-L and METEOR take the best of the five replies. With ``--benchmark.judge.*`` a judge
rates each reply, 1 to 10, knowing the words and ``info``; a reply without a readable rating is the
worst (the released mean ends with an error there) and is counted. The emotion part has 34
transcripts: always taking the commonest emotion of a transcript is right for 74.5 % of it without
hearing anything. So read its numbers beside a text-only baseline.

    mmemo eval eval/spoken/sd_eval.py --data SD-Eval --model MODEL --option subset=emo
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.answers.kinds import Text
from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases import once, read_jsonl
from mmemo.evaluation.scorer import use
from mmemo.evaluation.task import Task

SUBSETS = {"emo": "emotion", "acc": "accent", "age": "age", "env": "background sound"}
COLUMNS = ("task", "gold", "facts")
PUBLISHED = {
    f"subset={name}": {"": count}
    for name, count in zip(("all", *SUBSETS), (7303, 1289, 4310, 1014, 690), strict=True)
}
QUESTION = "<audio>Reply to the speaker in one or two sentences, as suits what you hear."
CRITERION = (
    "how well the reply suits the speaker's {} and words, and how natural and coherent it is."
)
TASKS = {
    name: Task(
        answers=Text(),
        question=QUESTION.removeprefix("<audio>"),
        scorers=(
            use("text", metrics=["bleu", "rouge_l", "meteor"]),
            use("judge", criterion=CRITERION.format(what), low=1, high=10),
        ),
        slices=("info",),
    )
    for name, what in SUBSETS.items()
}


def rows(root: Path, *, subset: str = "all") -> Iterator[dict[str, Any] | Excluded]:
    """One row per utterance. ``subset``: all that are there, emo, acc, age or env."""
    need_option("subset", subset, ("all", *SUBSETS))
    for name in SUBSETS if subset == "all" else (subset,):
        file = root / f"data/test-{name}.json"
        if subset == name or file.is_file():
            yield from once(_row(root, name, line) for line in read_jsonl(file))


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


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
