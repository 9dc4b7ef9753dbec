"""Questions answered in batches, into a file that a later run goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.console import progress
from mmemo.evaluation.answering import Answerer
from mmemo.evaluation.benchmark import Benchmark, Question
from mmemo.evaluation.parsing import PARSER_VERSION, parse, parse_open
from mmemo.evaluation.predictions import PredictionsFile, Row, key_of
from mmemo.record import RunRecord


class Asker:
    """Asks questions of one benchmark and model, and keeps the answers.

    Args:
        identity: what shapes every answer, apart from the questions: JSON values.
        batch_size: questions answered together.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        answerer: Answerer,
        *,
        identity: Mapping[str, Any],
        batch_size: int,
        record: RunRecord,
    ) -> None:
        self.benchmark, self.answerer, self.batch_size = benchmark, answerer, batch_size
        self._identity = {**identity, "parser": PARSER_VERSION}
        self._record = record

    def ask(
        self,
        title: str,
        path: Path,
        questions: Sequence[Question],
        *,
        answerer: Answerer | None = None,
        noted: Sequence[Mapping[str, Any]] = (),
        kind: str = "answers",
    ) -> list[Row]:
        """The rows of all questions; those that ``path`` has of an earlier run are kept as far as
        nothing changed.

        Args:
            title: of the progress bar.
            answerer: to ask in place of the usual one, such as one that sees changed clips.
            noted: more for the row of each question; part of what its answer depends on.
            kind: of the record's event.
        """
        answerer = answerer or self.answerer
        constants = [question.row() for question in questions]
        for row, more in zip(constants, noted, strict=False):
            row.update(more)
        keys = self._keys(answerer, questions, constants)
        file = PredictionsFile(path, keys, self.batch_size)
        done = len(file.kept)
        self._record.event(kind, kept=done, dropped=file.dropped, to_do=len(questions) - done)
        with progress(title, len(questions), done=done, unit="questions") as bar:
            for start in range(done, len(questions), self.batch_size):
                batch = questions[start : start + self.batch_size]
                answers = answerer.answer(batch, keys[start])
                rows = [
                    self._row(question, constants[place], keys[place], answer)
                    for place, (question, answer) in enumerate(
                        zip(batch, answers, strict=True), start
                    )
                ]
                file.append(rows)
                bar.advance(len(rows))
        return file.kept

    def _keys(
        self, answerer: Answerer, questions: Sequence[Question], constants: Sequence[Row]
    ) -> list[str]:
        """An answer depends on its own question, on the model and settings, and, through padding,
        on the questions in its batch."""
        own = [
            {
                **row,
                "prompt": key_of(answerer.prompt_text(question)),
                "streams": answerer.stream_keys(question),
            }
            for question, row in zip(questions, constants, strict=True)
        ]
        keys: list[str] = []
        for start in range(0, len(own), self.batch_size):
            batch = own[start : start + self.batch_size]
            mates = key_of(batch)
            keys += [key_of([self._identity, mates, parts]) for parts in batch]
        return keys

    def _row(
        self, question: Question, constant: Row, key: str, answer: tuple[str, int, bool]
    ) -> Row:
        raw, tokens, ended = answer
        labels = question.labels
        parsed = parse_open(raw) if labels is None else parse(raw, labels)
        return {
            "key": key,
            **constant,
            "raw": raw,
            "tokens": tokens,
            "ended": ended,
            "status": parsed.status,
            "answer": parsed.label,
            "score": None if labels is None else self.benchmark.mark(question, parsed),
        }
