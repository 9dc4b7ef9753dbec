"""MER-UniBench: which emotions a person feels, in any words, on nine test sets.

AffectGPT's benchmark (ICML 2025, arXiv 2501.16566): hit rate on MER2023, MER2024, MELD and IEMOCAP,
F1 of word sets on OV-MERD+, weighted F1 of sentiment on MOSI, MOSEI, SIMS and SIMSv2. The headline
is the mean of the nine. Each set has its own licence, most for research only; ask its owners, then
process it as MERBench does (github.com/zeroQiaoba/MERTools). Layout, any of the nine::

    meld-process/subvideo/NAME.mp4   subaudio/NAME.wav (or the clip's own sound)
                 label.npz           test_corpus: NAME -> {emo, val}
                 transcription-engchi-polish.csv    name, chinese, english
    mer2023-dataset-process/   mer2024-dataset-process/   iemocap-process/   cmumosi-process/
    cmumosei-process/   sims-process/   simsv2-process/   ovmerdplus-process/ (ovlabel.csv)

and AffectGPT's ``emotion_wheel`` folder, which ``MMEMO_EMOTION_WHEEL`` names. ``official`` is the
released scorer with its defects, ``corrected`` ours (mmemo/evaluation/scorers/words.py).

    mmemo eval eval/mer_unibench.py --data DIR --model MODEL --option set=meld
    mmemo score checkpoint-openset.npz --benchmark eval/mer_unibench.py --data DIR --option set=meld

Leave ``set`` out for all nine. To score, a file ``meld.json`` (items of id and gt) does for the
folder of a set. Of sets of sentiment, score ``*-openset-sentiment.npz``. MER2024's published
answers need ``--by-position``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.merbench import SETS, is_there, read_set, set_named
from mmemo.errors import DataError
from mmemo.evaluation.mer_unibench import QUESTION, summary, tasks

COLUMNS = ("task", "gold")
PUBLISHED = {f"set={name}": {"": one.size} for name, one in SETS.items()}
TASKS = tasks()
SUMMARY = summary


def rows(
    root: Path, *, set: str = "all", subtitle: str = "yes"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per clip. ``set``: one of the nine sets, or all that are there; ``subtitle``: whether
    the words of the clip are part of the question, as in the release."""
    need_option("subtitle", subtitle, ("yes", "no"))
    chosen = [set_named(set)] if set != "all" else list(SETS.values())
    if set == "all":
        chosen = [one for one in chosen if is_there(root, one)]
    if not chosen:
        raise DataError("holds none of the nine sets; see eval/mer_unibench.py", file=str(root))
    for one in chosen:
        for item in read_set(root, one):
            if isinstance(item, Excluded):
                yield item
                continue
            said = f'The person says: "{item.subtitle}"\n' if item.subtitle else ""
            row = {
                "sample_id": f"{one.name}/{item.name}",
                "prompt": f"<video><audio>{said if subtitle == 'yes' else ''}{QUESTION}",
                "videos": [item.video],
                "audios": [item.audio],
                "task": one.name,
                "gold": item.gold,
            }
            yield row | ({"group": {"speaker": item.speaker}} if item.speaker else {})


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
