"""EmoNet-Voice on a miniature: labels as they are released, and metrics computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmemo import content
from mmemo.errors import DataError
from mmemo.evaluation.copy_check import check_copy
from tests.content.miniature import ask
from tests.media_files import write_wav

FILE = "eval/graded/emonet_voice.py"
ADAPTER = "data/graded/emonet_voice.py"
LABELS = {
    "0a1b2c3d_1.wav": "[{'human-1': {'Shame': 2}}, {'human-4': {'Shame': 1}}]",
    "0a1b2c3d_2.wav": "[{'human-1': {'Jealousy%20%26%20Envy': 0}}, {'human-2': "
    "{'Jealousy%20%26%20Envy': 1}}]",
    "11112222_1.wav": "[{'human-1': {'Hope': 2}}, {'human-2': {'Hope': 2}}]",
    "33334444_1.wav": "[{'human-1': {'Fear': 0}}, {'human-2': {'Fear': 0}}]",
}
BAD = {
    "bad1.wav": "[{'human-1': {'Shame': 1}}, {'human-2': {'Fear': 1}}]",
    "bad2.wav": "[{'human-1': {'Shame': 3}}]",
    "bad3.wav": "__import__('os').listdir()",
    "bad4.wav": "[{'human-1': {'Joviality': 1}}]",
    "bad5.wav": "[]",
    "bad6.wav": "[{'human-1': {'Shame': True}}]",
}


def release(root: Path, *, sounds: bool = True) -> Path:
    """The release exported as JSONL, with rows that cannot be read, and a clip that is missing."""
    root.mkdir(parents=True)
    rows = [{"audio": f"audio/{name}", "label": label} for name, label in (LABELS | BAD).items()]
    rows.append(rows[0])  # listed twice
    rows.append({"audio": "audio/99990000_1.wav", "label": LABELS["33334444_1.wav"]})
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (root / "emonet.jsonl").write_text(text, encoding="utf-8-sig")
    for name in LABELS if sounds else ():
        write_wav(root / "audio" / name, 0.1)
    return root


def test_labels_are_read_as_they_are_released(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "emonet"))
    by_id = {name.removeprefix("emonet-voice-"): one for name, one in asked.by_id().items()}
    assert {name: one.truth for name, one in by_id.items()} == {
        "0a1b2c3d_1": 7.5,
        "0a1b2c3d_2": 2.5,
        "11112222_1": 10,
        "33334444_1": 0,
    }
    assert by_id["11112222_1"].sample.group == {
        "emotion": "Hope/Enthusiasm/Optimism",
        "heard": "all",
        "generation": "11112222",
    }
    assert [by_id[name].sample.group["heard"] for name in ("0a1b2c3d_2", "33334444_1")] == [
        *("some", "none"),
    ]
    assert "jealousy & envy" in by_id["0a1b2c3d_2"].turns[-1].text
    assert {name: one.reason for name, one in asked.excluded.items()} == {
        "bad1.wav": "several emotions",
        "bad2.wav": "rating outside 0 to 2",
        "bad3.wav": "label cannot be read",
        "bad4.wav": "label outside the set",
        "bad5.wav": "no ratings",
        "bad6.wav": "rating outside 0 to 2",
        "emonet-voice-0a1b2c3d_1": "listed twice",
    }
    assert asked.made.missing == ("audio/99990000_1.wav",)
    assert asked.made.unlike_published() == ["4 rows here, 12600 published"]


def test_metrics_by_hand(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "emonet"))
    texts = {"0a1b2c3d_1": "8", "0a1b2c3d_2": "I cannot tell.", "11112222_1": "9/10"}
    texts["33334444_1"] = "1"
    rows = asked.rows({f"emonet-voice-{name}": text for name, text in texts.items()})
    block = asked.scores(rows)["intensity"]
    # Truths 7.5, 2.5, 10, 0; a refusal is at the far end, 10.
    errors = [0.5, 7.5, 1.0, 1.0]
    assert block["scored"]["mae"]["value"] == pytest.approx(sum(errors) / 4)
    assert block["scored"]["rmse"]["value"] == pytest.approx(
        math.sqrt(sum(e * e for e in errors) / 4), abs=1e-6
    )
    assert block["official"] == pytest.approx(
        {
            "answered": 0.75,
            "mae": 2.5 / 3,
            "rmse": math.sqrt(2.25 / 3),
            "pearson": _pearson([7.5, 10, 0], [8, 9, 1]),
            "spearman": 1.0,
        }
    )
    heard = block["slices"]["heard"]
    assert {name: one["n"] for name, one in heard.items()} == {"all": 2, "none": 1, "some": 1}
    assert heard["all"]["scored"]["mae"]["value"] == 0.75
    assert heard["some"]["statuses"] == {"refused": 1}


def _pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return cov / math.sqrt(spread)


def test_three_best_of_forty(tmp_path: Path) -> None:
    asked = ask(FILE, release(tmp_path / "emonet"), ask="both")
    which = [one for one in asked.questions if one.task == "emotion"]
    assert [one.truth for one in which] == ["Shame", "Hope/Enthusiasm/Optimism"]
    texts = {one.sample.sample_id: "5" for one in asked.questions}
    texts[which[0].sample.sample_id] = "1. Embarrassment 2. Shame 3. Doubt"
    texts[which[1].sample.sample_id] = "hope, pride, joy"
    scored = asked.scores(asked.rows(texts))["emotion"]["scored"]
    assert [scored[f"accuracy_at_{k}"]["value"] for k in (1, 2, 3)] == [0.5, 1, 1]
    assert scored["mrr"]["value"] == 0.75


def test_parquet_files_give_their_sounds(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = write_wav(tmp_path / "a.wav", 0.1).read_bytes()
    rows = [
        {"audio": {"bytes": source, "path": f"some/where/{name}"}, "label": label}
        for name, label in LABELS.items()
    ]
    root = tmp_path / "emonet"
    (root / "data").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), root / "data/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="none of the 4 files"):
        ask(FILE, root)
    assert not (root / "audio").exists()
    asked = ask(FILE, root, extract="yes")
    assert len(asked.questions) == 4
    assert (root / "audio/11112222_1.wav").read_bytes() == source
    (root / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        ask(FILE, root)


def test_a_dry_run(tmp_path: Path) -> None:
    report = check_copy(FILE, [str(release(tmp_path / "emonet"))], {})
    assert (report.questions, len(report.excluded), len(report.missing)) == (4, 7, 1)
    assert not report.broken


CELLS = st.recursive(
    st.one_of(st.integers(-1, 3), st.text(max_size=5), st.none(), st.just("Shame")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@given(st.one_of(CELLS.map(repr), st.text(max_size=60), st.integers(1, 300).map(lambda n: "[" * n)))
def test_any_cell_is_read_or_named(cell: str) -> None:
    read: Any = content.load(f"{ADAPTER}:read_label")(cell)
    assert isinstance(read, str) or (min(read[1]) >= 0 and max(read[1]) <= 2)
