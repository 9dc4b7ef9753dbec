"""EmoVoice-DB: speech by GPT-4o-audio in seven emotions, each described in words.

22,100 clips, 40 hours, five voices (Yang et al., arXiv 2504.12867), MIT; get
https://huggingface.co/datasets/yhaha/EmoVoice-DB. Layout of the folder::

    test.jsonl, train.jsonl      key, source_text, target_text, emotion, emotion_text_prompt,
                                 target_wav, answer_cosyvoice_speech_token, ...
    audio/angry/gpt4o_388_angry_ash.wav      found by the name of target_wav
    generated/SYSTEM/KEY.wav                 speech of a system that read the lines: your own

``generated=generated/SYSTEM`` makes rows of a system's speech; ``target``, the default, of the
release's own. ``ask=description`` asks for the emotion in words, for captioning. ``gold`` is the
emotion's bucket (angry, happy, neutral, sad, other), ``target`` the release's file of the line, and
``other`` that of the next line with another emotion. Lines that a system has no file for are
counted as missing: its numbers are of the lines that it could read.

    mmemo manifest data/spoken/emovoice.py --root EmoVoice-DB --output emovoice.jsonl --split train
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmemo.data.adapter import Excluded, need_option
from mmemo.data.releases.folders import SOUNDS, ClipIndex, LabelReader, labelled_row, once
from mmemo.data.releases.tables import whole_table
from mmemo.errors import ConfigError, DataError

LABELS = "emovoice"
COLUMNS = ("gold", "target", "other")
BUCKETS = ("angry", "happy", "neutral", "sad", "other")
QUESTION = "Which emotion does the speaker express? Answer with one of these words: {}."
DESCRIBE = "<audio>Describe the emotion in the speaker's voice in one sentence."


def rows(
    root: Path,
    *,
    split: str = "all",
    generated: str = "target",
    ask: str = "emotion",
    labels: str = LABELS,
) -> Iterator[dict[str, Any] | Excluded]:
    """One row per line. ``split``: all, train or test. ``generated``: the folder of a system's
    speech, or target. ``ask``: emotion or description. ``labels``: the label set of the rows."""
    need_option("split", split, ("all", "train", "test"))
    need_option("ask", ask, ("emotion", "description"))
    folder = PurePosixPath(generated)
    if folder.is_absolute() or ".." in folder.parts:
        raise ConfigError(f"generated is '{generated}'; name a folder inside the data's, or target")
    if generated != "target" and not (root / generated).is_dir():
        raise DataError("is missing; put the generated speech there", file=str(root / generated))
    read = LabelReader(LABELS, labels)
    parts = [one for one in ("train", "test") if split in ("all", one)]
    files = [root / f"{part}.jsonl" for part in parts]
    found = [file for file in files if file.is_file()]
    if not found:
        raise DataError("is missing; check --data", file=str(files[-1]))
    # A system's files have the names of the release's, which are not searched for among them.
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir()]
    own = [one for one in folders if one not in ("generated", folder.parts[0])]
    targets = ClipIndex(root, own, SOUNDS)
    speech = targets if generated == "target" else ClipIndex(root, [generated], SOUNDS)
    for file in found:
        yield from once(_rows(file, read, targets, speech, generated, ask))


def _rows(
    file: Path, read: LabelReader, targets: ClipIndex, speech: ClipIndex, generated: str, ask: str
) -> Iterator[dict[str, Any] | Excluded]:
    lines = whole_table(file)
    for place, line in enumerate(lines):
        key = str(line.get("key") or "").strip()
        row = f"emovoice-{key}"
        emotion = str(line.get("emotion") or "").strip()
        label = read(emotion, row) if key else Excluded(f"line {place + 1}", "no key")
        if isinstance(label, Excluded):
            yield label
            continue
        target = _target(line, targets)
        path = target if generated == "target" else speech.find(key, f"{generated}/{key}.wav")
        made = labelled_row(
            row,
            QUESTION.format(read.names),
            label,
            {"audio": path},
            transcript=str(line.get("source_text") or ""),
            group={"emotion": label, "voice": key.rpartition("_")[2]},
            gold=bucket(emotion.lower()),
            target=target,
            other=_other(lines, place, targets),
        )
        words = str(line.get("emotion_text_prompt") or "").strip()
        if ask == "description" and not words:
            yield Excluded(row, "no description")
            continue
        yield made if ask == "emotion" else {**made, "prompt": DESCRIBE, "completion": words}


def bucket(emotion: str) -> str:
    """The bucket of one of the seven emotions."""
    return emotion if emotion in BUCKETS else "other"


def _target(line: Mapping[str, Any], targets: ClipIndex) -> str:
    name = PurePosixPath(str(line.get("target_wav") or f"{line.get('key')}.wav").replace("\\", "/"))
    return targets.find(name.stem, f"audio/{name.name}")


def _other(lines: Sequence[Mapping[str, Any]], place: int, targets: ClipIndex) -> str | None:
    """The target of the next line with another emotion, the first ones being next to the last."""
    emotion = lines[place].get("emotion")
    after = [*lines[place + 1 :], *lines[:place]]
    return next((_target(line, targets) for line in after if line.get("emotion") != emotion), None)
