"""KPoEM: emotions of modern Korean poems, line by line and poem by poem, by five annotators.

7,007 lines and 615 parts of poems with 44 labels of KOTE (KPoEM, arXiv 2509.03932; the abstract
counts 7,662, the files 7,622). Get the files from https://huggingface.co/datasets/AKS-DHLAB/KPoEM,
whose card says the licence. Layout of the folder::

    KPoEM_line_dataset_v4.tsv   line_id poem_id text sub_title title poet annotator_01 ... 05
    KPoEM_poem_dataset_v4.tsv   seg_id poem_id text sub_title title poetry_book poet annotator_...

An annotator's cell names labels, separated by commas. Quotation marks in both files are text. A
label's votes, 0 to 5, are scaled to 0 to 1 within the row (least to most votes), and it is true
above ``cut``; so the release trains and scores. ``scale=votes`` divides by 5 instead, as its
notebook for retrieval does. Labels that are none of the 44 are ignored, as there; their rows have
``group.unknown_label``.

``split`` draws the release's parts (seed 42, lines and poems apart). They share poems: a line of
the test part may stand beside lines that were trained on. ``split=all`` is for models that saw
none of them.

    mmemo manifest data/texts/kpoem.py --root KPoEM --output kpoem.jsonl --split train
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.tables import find_file, read_table
from mmemo.errors import ConfigError

COLUMNS = ("gold", "votes")
LABELS_44 = (
    *("불평/불만", "환영/호의", "감동/감탄", "지긋지긋", "고마움", "슬픔", "화남/분노", "존경"),
    *("기대감", "우쭐댐/무시함", "안타까움/실망", "비장함", "의심/불신", "뿌듯함", "편안/쾌적"),
    *("신기함/관심", "아껴주는", "부끄러움", "공포/무서움", "절망", "한심함", "역겨움/징그러움"),
    *("짜증", "어이없음", "없음", "패배/자기혐오", "귀찮음", "힘듦/지침", "즐거움/신남", "깨달음"),
    *("죄책감", "증오/혐오", "흐뭇함(귀여움/예쁨)", "당황/난처", "경악", "부담/안_내킴", "서러움"),
    *("재미없음", "불쌍함/연민", "놀람", "행복", "불안/걱정", "기쁨", "안심/신뢰"),
)
"""In the order of KOTE's ids."""
ANNOTATORS = tuple(f"annotator_0{number}" for number in range(1, 6))
FILES = {
    "line": ("KPoEM_line_dataset_v4.tsv", "line_id"),
    "poem": ("KPoEM_poem_dataset_v4.tsv", "seg_id"),
}
PUBLISHED = {
    "": {"": 7622},
    "level=line": {"": 7007},
    "level=poem": {"": 615},
    "split=train": {"": 6096},
    "split=validation": {"": 763},
    "split=test": {"": 763},
}
QUESTION = (
    "다음은 한국 현대시의 한 부분입니다.\n\n{}\n\n"
    "독자가 느끼는 감정을 다음에서 모두 고르세요: {}.\n감정의 이름만 쉼표로 구분하여 답하세요."
)


def rows(
    root: Path, *, split: str = "all", level: str = "both", cut: str = "0.2", scale: str = "minmax"
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per line and per poem (``level``: line, poem or both) of one ``split``: all, train,
    validation or test. ``cut`` and ``scale`` (minmax or votes) say which labels are true."""
    need_option("split", split, ("all", "train", "validation", "test"))
    need_option("level", level, ("both", *FILES))
    need_option("scale", scale, ("minmax", "votes"))
    try:
        least = float(cut)
    except ValueError:
        raise ConfigError(f"cut is '{cut}'; give a number from 0 to 1") from None
    for name, (file, key) in FILES.items():
        if level not in ("both", name):
            continue
        needs = (key, "poem_id", "text", "poet", *ANNOTATORS[:1])
        found = list(read_table(find_file(root, file), needs, quoted=False))
        kept = _part(len(found), split)
        for place, cells in enumerate(found):
            if place in kept:
                yield cells if isinstance(cells, Excluded) else _row(cells, key, least, scale)


def _part(count: int, split: str) -> set[int]:
    """Places of the rows of a split, drawn as the release draws them."""
    if split == "all":
        return set(range(count))
    rest, test = train_test_split(list(range(count)), test_size=0.1, random_state=42)
    train, validation = train_test_split(rest, test_size=1 / 9, random_state=42)
    return set({"train": train, "validation": validation, "test": test}[split])


def _row(cells: dict[str, str], key: str, cut: float, scale: str) -> dict[str, Any] | Excluded:
    name = f"kpoem-{key.removesuffix('_id')}-{cells[key]}"
    if not cells["text"]:
        return Excluded(name, "no text")
    named = [
        label
        for annotator in ANNOTATORS
        # One annotator has one vote for a label.
        for label in {one.strip() for one in cells.get(annotator, "").split(",")} - {""}
    ]
    votes = {label: count for label in LABELS_44 if (count := Counter(named)[label])}
    if not votes:
        return Excluded(name, "no label of the 44", ", ".join(sorted(set(named))))
    least, most = min(votes.get(one, 0) for one in LABELS_44), max(votes.values())
    if scale == "votes":
        least, most = 0, len(ANNOTATORS)
    span = most - least
    gold = [one for one, count in votes.items() if span and (count - least) / span > cut]
    return {
        "sample_id": name,
        "prompt": QUESTION.format(cells["text"], ", ".join(LABELS_44)),
        "completion": f"<answer>{', '.join(gold) or 'none'}</answer>",
        "gold": gold,
        "votes": votes,
        "group": {
            "speaker": f"poem {cells['poem_id']}",
            "poet": cells["poet"],
            "level": key.removesuffix("_id").replace("seg", "poem"),
            "unknown_label": "yes" if set(named) - set(LABELS_44) else "no",
        },
    }
