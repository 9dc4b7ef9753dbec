"""Answers questions in batches, and reuses the unchanged answers of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo.answers.parsing import PARSER_VERSION
from mmemo.console import console, progress
from mmemo.evaluation.benchmark import Benchmark, Question
from mmemo.evaluation.generate import AnswerGenerator
from mmemo.evaluation.predictions import Parts, PredictionsFile, Row, key_of
from mmemo.formats import counted
from mmemo.run_log import RunRecord, versions

MADE_BY = ("torch", "transformers")
"""Libraries whose versions are part of an answer's identity: another version may round otherwise,
and so answer otherwise."""


class CachedEvaluator:
    """Asks the questions of a benchmark and keeps the answers in files that later runs reuse.

    Args:
        identity: everything but the questions that affects the answers, as JSON values.
        batch_size: the number of questions answered together.
        share: rank and number of the processes that answer; None: this one answers all and writes
            the files. With several, each answers every so many batches, so that batches are the
            same for any number of processes.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        generator: AnswerGenerator,
        *,
        identity: Mapping[str, Any],
        batch_size: int,
        record: RunRecord,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.benchmark, self.generator, self.batch_size = benchmark, generator, batch_size
        self._identity, self._share = dict(identity), share
        installed = versions()
        self._versions = {name: installed[name] for name in MADE_BY}
        self._record = record

    def ask(
        self,
        title: str,
        path: Path,
        questions: Sequence[Question],
        *,
        generator: AnswerGenerator | None = None,
        noted: Sequence[Mapping[str, Any]] = (),
        kind: str = "answers",
    ) -> list[Row]:
        """The rows of all questions, with their answers; see :meth:`each`.

        Args:
            generator: used in place of the usual one, for example one that sees perturbed clips.
        """
        chosen = generator or self.generator

        def answer(batch: Sequence[Question], draw: str) -> list[Row]:
            found = chosen.answer(batch, draw)
            return [
                {"raw": raw, "tokens": tokens, "ended": ended, **self.benchmark.read(question, raw)}
                for question, (raw, tokens, ended) in zip(batch, found, strict=True)
            ]

        return self.each(
            title, path, questions, answer, noted=noted, kind=kind, read=self.benchmark.read
        )

    def each(
        self,
        title: str,
        path: Path,
        questions: Sequence[Question],
        make: Callable[[Sequence[Question], str], Sequence[Row]],
        *,
        noted: Sequence[Mapping[str, Any]] = (),
        kind: str,
        batch_size: int | None = None,
        read: Callable[[Question, str], Row] | None = None,
    ) -> list[Row]:
        """One row per question, kept in ``path``. Rows of an earlier run are reused up to the first
        batch that changed.

        Args:
            title: title of the progress bar.
            make: maps a batch and its name to the results of its questions.
            noted: further values for each row that are known beforehand and affect the result.
            kind: kind of the event in the run record.
            batch_size: the evaluator's unless given.
            read: maps a question and the text of its answer to the part of its row that a parser
                makes. The kept rows of an earlier run are then read again with this parser;
                without it, another parser makes them useless.
        """
        size = batch_size or self.batch_size
        constants = [question.row() for question in questions]
        if noted:
            constants = [{**row, **more} for row, more in zip(constants, noted, strict=True)]
        # A text does not depend on how it is read: its key names the first parser for good.
        parser = PARSER_VERSION if read is None else "1"
        draws = self._draws(questions, constants, size, parser)
        keys = [key_of([self._versions, draw]) for draw in draws]
        file = PredictionsFile(path, keys, size)
        done, parts, ready = len(file.kept), Parts(path), Parts(path).read()
        if read is not None and self._share is None:
            file.replace(_read_again(questions, file.kept, read))
        self._record.event(kind, kept=done, dropped=file.dropped, to_do=len(questions) - done)
        if file.dropped and self._share is None:
            self._tell_dropped(path, file.dropped)
        with progress(title, len(questions), done=done, unit="questions") as bar:
            for start in range(done, len(questions), size):
                part = slice(start, start + size)
                batch = questions[part]
                rows = [ready[key] for key in keys[part] if key in ready]
                made = len(rows) < len(batch)
                if not made:
                    rows = _read_again(batch, rows, read)
                elif self._is_mine(start // size):
                    # The first draw depends on the whole batch, so it names the batch for its
                    # random numbers. Versions are not in it: the same seed, the same numbers.
                    found = zip(keys[part], constants[part], make(batch, draws[start]), strict=True)
                    rows = [{"key": key, **row, **more} for key, row, more in found]
                else:
                    continue
                self._keep(file, parts, rows, made)
                bar.advance(len(rows))
        if self._share is None:
            parts.remove()
        return file.kept

    def _keep(self, file: PredictionsFile, parts: Parts, rows: Sequence[Row], made: bool) -> None:
        if self._share is None:
            file.append(rows)
        elif made:
            parts.append(self._share[0], rows)

    def _is_mine(self, number: int) -> bool:
        """Whether this process answers that batch."""
        return self._share is None or number % self._share[1] == self._share[0]

    def _tell_dropped(self, path: Path, dropped: int) -> None:
        made_by = " and ".join(f"{name} {version}" for name, version in self._versions.items())
        console.print(
            f"{path}: {counted(dropped, 'earlier answer')} will be replaced, as they were made by "
            f"other versions than {made_by}, by another version of mmemo, or with other settings",
            soft_wrap=True,
        )

    def _draws(
        self,
        questions: Sequence[Question],
        constants: Sequence[Row],
        size: int,
        parser: str,
    ) -> list[str]:
        """The identity of each answer but for the versions of libraries. It depends on its
        question, the model, the settings and, through padding, on the other questions in its
        batch."""
        own = [
            {
                **row,
                "prompt": key_of(self.generator.prompt_text(question)),
                "streams": self.generator.stream_keys(question),
            }
            for question, row in zip(questions, constants, strict=True)
        ]
        identity = {**self._identity, "parser": parser}
        draws: list[str] = []
        for start in range(0, len(own), size):
            batch = own[start : start + size]
            mates = key_of(batch)
            draws += [key_of([identity, mates, parts]) for parts in batch]
        return draws


def _read_again(
    questions: Sequence[Question], rows: Sequence[Row], read: Callable[[Question, str], Row] | None
) -> list[Row]:
    """The rows of the first questions with what this version's parser reads in their texts."""
    if read is None:
        return list(rows)
    pairs = zip(questions, rows, strict=False)
    return [{**row, **read(question, row["raw"])} for question, row in pairs]
