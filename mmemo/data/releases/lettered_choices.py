"""Questions about clips whose choices are written with their letters, ``["(A) ...", "(B) ..."]``.

A row of such a release is ``{id, video, task, question, choices, answer}``, as in EmoReAlM (AVERE,
arXiv 2602.07054). The synthetic world's probes, which are rows of a manifest, are taken as well.
The answer to a yes-or-no question is yes or no, whichever letter it has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from mmemo.answers.label_set import YES_NO, LabelSet
from mmemo.answers.parsing import Parsed
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.row_models import PLACEHOLDERS, Row, did_you_mean, read_text, read_texts
from mmemo.data.sample import Sample
from mmemo.errors import EvaluationError

COLUMNS = ("task", "gold", "probe_kind", "choices", "key")
LETTERS = "ABCDEFGHIJ"

_CHOICE = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.DOTALL)
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Release:
    """The tasks of a release, and where its clips lie.

    Attributes:
        title: the name of the release.
        tasks: its tasks.
        yes_no: those of them that are yes-or-no questions.
        world: the name of each task in the synthetic world to its name here.
        video_dir: folder under the media root that the paths of ``video`` are relative to.
        audio_dir: the same for WAV files of the same names; None uses the sound of the videos.
        instruction: text after the choices.
    """

    title: str
    tasks: Sequence[str]
    yes_no: Collection[str]
    world: Mapping[str, str]
    video_dir: str = ""
    audio_dir: str | None = None
    instruction: str = ""


def read_questions(data: DataConfig, release: Release) -> list[Sample]:
    """The questions in file order, with the columns ``task``, ``gold``, ``choices`` and ``key``,
    the letter of the right choice.

    Raises:
        DataError: names file, line and field of each bad row.
    """
    columns = [*data.columns, *(name for name in COLUMNS if name not in data.columns)]

    def prepare(row: Row) -> Row:
        if row.problems:
            return row
        # The world writes rows of a manifest; a release lists the choices apart from its question.
        if row.has("messages") and not row.has("choices"):
            return _of_world(row, release)
        return _of_release(row, data, release)

    rows = load_samples(data.model_copy(update={"columns": columns}), prepare)
    # These questions are not split into conflict subsets, even where the world's rows are.
    return [replace(r, truth=replace(r.truth, conflict=None, modality_labels={})) for r in rows]


def letters(sample: Sample) -> LabelSet:
    """The letters of the choices. An answer may also quote the text of a choice."""
    return _letters(sample.columns["choices"])


def yes_or_no(sample: Sample) -> LabelSet:
    """Yes and no. An answer may name the letter of either."""
    return _yes_or_no(sample.columns["choices"])


def released_reading(raw: str, key: str, truth: str) -> Parsed:
    """Reads an answer as released scripts do: it is right if its letter ``key`` (of the world's
    yes-or-no questions, the word) occurs in it as a word, even as the article "a" or as one of
    several letters. They do not read wrong answers any further, so these have a label only if
    there is just one other."""
    if re.search(rf"\b{re.escape(key)}\b", raw, re.IGNORECASE):
        return Parsed("ok", truth, raw)
    if truth in YES_NO:
        return Parsed("ok", "no" if truth == "yes" else "yes", raw)
    return Parsed("malformed", None, raw)


def _letters(choices: Sequence[str]) -> LabelSet:
    """``choices`` are as the question lists them, in the order of their letters. The world's rows
    have none, since they are part of the question's text."""
    if not choices:
        return LabelSet(tuple(LETTERS[:4]))
    names = tuple(LETTERS[: len(choices)])
    pairs = zip(names, choices, strict=True)
    return LabelSet(names, {letter: [text, _words(text)] for letter, text in pairs})


def _yes_or_no(choices: Sequence[str]) -> LabelSet:
    forms = {label: list(forms) for label, forms in YES_NO.items()}
    for letter, text in zip(LETTERS, choices, strict=False):
        # The release gives yes and no a letter, which an answer may name in their place.
        forms[_side(text)] += [letter, text, _words(text)]
    return LabelSet(tuple(YES_NO), forms)


def _words(choice: str) -> str:
    """A choice without its letter."""
    found = _CHOICE.fullmatch(choice.strip())
    return found.group(2) if found else choice


def _side(choice: str) -> str:
    """``yes`` or ``no``, whichever a choice says.

    Raises:
        EvaluationError: it says neither.
    """
    found = _YES_NO.match(_words(choice))
    if found is None:
        raise EvaluationError(f"'{choice}' is neither yes nor no")
    return found.group(1).lower()


def _of_world(row: Row, release: Release) -> Row:
    """A probe of the world, with the release's name of its task."""
    name, gold = read_text(row, "task"), read_text(row, "gold")
    world = release.world
    if name is None or name not in world:
        what = "is missing" if name is None else f"is '{name}'; {did_you_mean(name, tuple(world))}"
        row.bad("task", f"{what} (give probes that `mmemo world` wrote, such as test_probes.jsonl)")
        return row
    closed = world[name] in release.yes_no
    known = (_yes_or_no(()) if closed else _letters(())).labels
    if gold not in known:
        row.bad("gold", f"is {gold!r}; it must be one of {', '.join(known)}")
    own = {"task": world[name], "gold": gold, "choices": [], "key": gold}
    return Row({**row.values, **own}, row.file, row.line, row.problems)


def _of_release(row: Row, data: DataConfig, release: Release) -> Row:
    """A row of the release as a row of a manifest."""
    names = ("video", "task", "question", "answer")
    video, name, question, answer = (read_text(row, key) for key in names)
    choices = read_texts(row, "choices", row.get("choices"))
    for key in (*names, "choices", "id"):
        if not row.has(key):
            known = f"{release.title}'s rows have id, choices, {', '.join(names)}"
            row.bad(key, f"is missing; {known}")
    if row.has("id") and not isinstance(row.get("id"), str | int):
        row.bad("id", "must be a string or a number")
    if name is not None and name not in release.tasks:
        row.bad("task", f"is '{name}'; {did_you_mean(name, tuple(release.tasks))}")
    if row.problems:
        return row
    gold = _gold(row, name in release.yes_no, choices, str(answer))
    path = PurePosixPath(str(video))
    streams = ("video", "audio") if data.modalities is None else data.modalities
    paths = {stream: str(PurePosixPath(release.video_dir) / path) for stream in streams}
    if release.audio_dir is not None and "audio" in paths:
        paths["audio"] = str(PurePosixPath(release.audio_dir) / path.with_suffix(".wav"))
    placeholders = "".join(text for stream, text in PLACEHOLDERS.items() if stream in paths)
    text = " ".join(part for part in (str(question), *choices, release.instruction) if part)
    values = {
        **{key: row.values[key] for key in data.columns if key in row.values},
        "sample_id": str(row.get("id")),
        "messages": [{"role": "user", "content": placeholders + text}],
        **{f"{stream}s": [where] for stream, where in paths.items()},
        "task": name,
        "gold": gold,
        "choices": list(choices),
        "key": str(answer).upper(),
    }
    return Row(values, row.file, row.line, row.problems)


def _gold(row: Row, closed: bool, choices: Sequence[str], answer: str) -> str | None:
    """The label of the right choice, after checking that choices and answer fit the task."""
    known = LETTERS[: len(choices)]
    found = [_CHOICE.fullmatch(text.strip()) for text in choices]
    if "".join(one.group(1) if one else "?" for one in found) != known or len(known) < 2:
        row.bad("choices", 'must be two or more, written as ["(A) ...", "(B) ...", ...]')
        return None
    if len(answer) != 1 or answer.upper() not in known:
        row.bad("answer", f"is '{answer}'; it must be one of {', '.join(known)}")
        return None
    try:
        if not closed:
            _letters(choices)
            return answer.upper()
        sides = [_side(text) for text in choices]
    except EvaluationError as error:
        row.bad("choices", f"do not fit the task: {error}")
        return None
    if sorted(sides) != sorted(YES_NO):
        row.bad("choices", "must be one Yes and one No for this task")
        return None
    return sides[known.index(answer.upper())]
