"""EmoReAlM: are a model's emotion answers grounded in cues of the clip, or does it imagine them?

EmoReAlM (AVERE, arXiv 2602.07054) has five tasks: ``reasoning_basic_audio`` and ``_video`` (which
of four cues is present), ``modality_agreement``, and ``reasoning_stress_audio`` and ``_video`` (yes
or no). The headline is the unweighted mean of the five accuracies. The data has one of two forms:

- the released questions, a JSON list of ``{id, video, task, question, choices, answer}``. They are
  about clips of DFEW, of which you need your own copy under the media root;
- the probes that ``mmemo world`` writes (``test_probes.jsonl``), which become the same five tasks.

Run it as

    python eval/emorealm.py --model MODEL --data emorealm_v1.json --media-root DFEW

or with the config ``train_configs/benchmarks/emorealm.yaml``.

Every answer is read three times, and the results are kept apart: ``verdict`` and ``strict`` are the
two readings of this suite (:mod:`mmemo.answers.parsing`), and ``official`` does what the released
scripts do, so that its numbers can be compared with published ones. Their regular expression takes
an answer for right if the right letter occurs in it as a word, even as the article "a" or as one of
several letters, and takes "Yes" without its letter for wrong. An answer to a yes-or-no question
that is not right counts as the opposite answer, whatever it says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from mmemo.answers.parsing import YES_NO, LabelSet, Parsed, parse
from mmemo.data.manifest import DataConfig, load_samples
from mmemo.data.row_models import PLACEHOLDERS, Row, did_you_mean, read_text, read_texts
from mmemo.data.sample import Sample
from mmemo.errors import EvaluationError
from mmemo.evaluation.benchmark import Question, Reading

WORLD: Mapping[str, str] = {
    "basic_audio": "reasoning_basic_audio",
    "basic_video": "reasoning_basic_video",
    "modality_agreement": "modality_agreement",
    "stress_audio": "reasoning_stress_audio",
    "stress_video": "reasoning_stress_video",
}
"""Name of each task in the synthetic world to its name in the release."""
TASKS = tuple(WORLD.values())
COLUMNS = ("task", "gold", "probe_kind", "choices", "key")
LETTERS = "ABCDEFGHIJ"

_CHOICE = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)", re.DOTALL)
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def samples(
    data: DataConfig, *, video_dir: str = "", audio_dir: str | None = None, instruction: str = ""
) -> list[Sample]:
    """The questions by task, in the order of ``TASKS``.

    Args:
        video_dir: folder under the media root that contains the release's ``part_1/1.mp4``.
        audio_dir: the same for ``part_1/1.wav``; None uses the sound of the videos.
        instruction: text after the choices, such as "Answer with the letter only."; the release
            has none.
    """
    columns = [*data.columns, *(name for name in COLUMNS if name not in data.columns)]

    def prepare(row: Row) -> Row:
        if row.problems:
            return row
        # The world writes rows of a manifest; the release lists the choices apart from its
        # question.
        if row.has("messages") and not row.has("choices"):
            return _of_world(row)
        return _of_release(row, data, video_dir, audio_dir, instruction)

    rows = load_samples(data.model_copy(update={"columns": columns}), prepare)
    found = [
        # These questions are not split into conflict subsets, even where the world's rows are.
        replace(row, truth=replace(row.truth, conflict=None, modality_labels={}))
        for row in rows
    ]
    return sorted(found, key=lambda row: TASKS.index(task(row)))  # a stable sort


def task(sample: Sample) -> str:
    """One of ``TASKS``."""
    return str(sample.columns["task"])


def labels(sample: Sample) -> LabelSet:
    """The letters of the choices, or yes and no. An answer may also quote the text of a choice."""
    return _labels(task(sample), sample.columns["choices"])


def truth(sample: Sample) -> str:
    """The letter of the right choice, or yes or no."""
    return str(sample.columns["gold"])


def official(raw: str, question: Question) -> Parsed:
    """Reads an answer as the released scripts do: it is right if ``key`` occurs in it as a word.
    They do not read wrong answers any further, so these have a label only if there is just one
    other."""
    key = re.escape(str(question.sample.columns["key"]))
    if re.search(rf"\b{key}\b", raw, re.IGNORECASE):
        return Parsed("ok", question.truth, raw)
    if question.truth in YES_NO:
        return Parsed("ok", "no" if question.truth == "yes" else "yes", raw)
    return Parsed("malformed", None, raw)


def strictly(raw: str, question: Question) -> Parsed:
    """Reads an answer as rewards do."""
    return parse(raw, question.labels or (), "strict")


readings = (
    Reading("verdict", "the one choice that a person takes from the answer", missing="wrong"),
    Reading("strict", "the answer is one choice and nothing else", missing="wrong", read=strictly),
    Reading(
        "official",
        "the released regular expression: right where the letter of the right choice is a word of "
        "the answer",
        missing="skipped",
        read=official,
    ),
)


def _labels(name: str, choices: Sequence[str]) -> LabelSet:
    """``choices`` are as the question lists them, in the order of their letters. The world's rows
    have none, since they are part of the question's text."""
    if name.startswith("reasoning_basic"):
        if not choices:
            return LabelSet(tuple(LETTERS[:4]))
        letters = tuple(LETTERS[: len(choices)])
        pairs = zip(letters, choices, strict=True)
        return LabelSet(letters, {letter: [text, _words(text)] for letter, text in pairs})
    forms = {label: list(forms) for label, forms in YES_NO.items()}
    for letter, text in zip(LETTERS, choices, strict=False):
        # The release gives yes and no a letter, which an answer may name in their place.
        forms[_yes_or_no(text)] += [letter, text, _words(text)]
    return LabelSet(tuple(YES_NO), forms)


def _words(choice: str) -> str:
    """A choice without its letter."""
    found = _CHOICE.fullmatch(choice.strip())
    return found.group(2) if found else choice


def _yes_or_no(choice: str) -> str:
    """``yes`` or ``no``, whichever a choice says.

    Raises:
        EvaluationError: it says neither.
    """
    found = _YES_NO.match(_words(choice))
    if found is None:
        raise EvaluationError(f"'{choice}' is neither yes nor no")
    return found.group(1).lower()


def _of_world(row: Row) -> Row:
    """A probe of the world, with the release's name of its task."""
    name, gold = read_text(row, "task"), read_text(row, "gold")
    if name is None or name not in WORLD:
        what = "is missing" if name is None else f"is '{name}'; {did_you_mean(name, tuple(WORLD))}"
        row.bad("task", f"{what} (give probes that `mmemo world` wrote, such as test_probes.jsonl)")
        return row
    known = _labels(WORLD[name], ()).labels
    if gold not in known:
        row.bad("gold", f"is {gold!r}; it must be one of {', '.join(known)}")
    own = {"task": WORLD[name], "gold": gold, "choices": [], "key": gold}
    return Row({**row.values, **own}, row.file, row.line, row.problems)


def _of_release(
    row: Row, data: DataConfig, video_dir: str, audio_dir: str | None, instruction: str
) -> Row:
    """A row of the release as a row of a manifest."""
    names = ("video", "task", "question", "answer")
    video, name, question, answer = (read_text(row, key) for key in names)
    choices = read_texts(row, "choices", row.get("choices"))
    for key in (*names, "choices", "id"):
        if not row.has(key):
            row.bad(key, f"is missing; EmoReAlM's rows have id, choices, {', '.join(names)}")
    if row.has("id") and not isinstance(row.get("id"), str | int):
        row.bad("id", "must be a string or a number")
    if name is not None and name not in TASKS:
        row.bad("task", f"is '{name}'; {did_you_mean(name, TASKS)}")
    if row.problems:
        return row
    gold = _gold(row, str(name), choices, str(answer))
    path = PurePosixPath(str(video))
    streams = ("video", "audio") if data.modalities is None else data.modalities
    paths = {stream: str(PurePosixPath(video_dir) / path) for stream in streams}
    if audio_dir is not None and "audio" in paths:
        paths["audio"] = str(PurePosixPath(audio_dir) / path.with_suffix(".wav"))
    placeholders = "".join(text for stream, text in PLACEHOLDERS.items() if stream in paths)
    text = " ".join(part for part in (str(question), *choices, instruction) if part)
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


def _gold(row: Row, name: str, choices: Sequence[str], answer: str) -> str | None:
    """The label of the right choice, after checking that choices and answer fit the task."""
    letters = LETTERS[: len(choices)]
    found = [_CHOICE.fullmatch(text.strip()) for text in choices]
    if "".join(one.group(1) if one else "?" for one in found) != letters or len(letters) < 2:
        row.bad("choices", 'must be two or more, written as ["(A) ...", "(B) ...", ...]')
        return None
    if len(answer) != 1 or answer.upper() not in letters:
        row.bad("answer", f"is '{answer}'; it must be one of {', '.join(letters)}")
        return None
    try:
        known = _labels(name, choices)
        if name.startswith("reasoning_basic"):
            return answer.upper()
        sides = [_yes_or_no(text) for text in choices]
    except EvaluationError as error:
        row.bad("choices", f"do not fit the task: {error}")
        return None
    if sorted(sides) != sorted(known.labels):
        row.bad("choices", "must be one Yes and one No for this task")
        return None
    return sides[letters.index(answer.upper())]


if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
