"""A judge behind an OpenAI-compatible chat endpoint, such as vLLM or SGLang.

Every request is bounded in time, failures are retried with growing pauses and then leave the item
without a grade, and each grade is on disk before the next is asked for: after a kill, nothing is
asked (and paid) twice, and a resumed run meets the same grades.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmemo import files
from mmemo.rewards.judge.openai_client import ChatClient, EndpointConfig
from mmemo.rewards.judge.rubric import (
    DIMENSIONS,
    RUBRIC_HASH,
    SCHEMA,
    WORST,
    Grades,
    JudgeItem,
    messages,
    read_verdict,
    speaks_of_grades,
)


class JudgeConfig(EndpointConfig):
    """Which model judges, and how patiently it is asked. Names are those of OpenAI's API."""

    max_tokens: int = Field(default=256, ge=16)
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds of one request, from connecting to the last byte."""
    cache_dir: str | None = None
    """Folder of grades; may be shared by runs and ranks. None: no cache."""

    def sampling(self) -> dict[str, Any]:
        """What decides the reply beside model and prompt."""
        return self.request("grades", SCHEMA)


class EndpointJudge:
    """A :class:`~mmemo.rewards.judge.rubric.Judge`. ``counts`` says what happened: ``items``,
    ``cached``, ``flagged`` (graded lowest unseen), ``requests``, and failed requests by kind.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._cache = None if config.cache_dir is None else GradeCache(Path(config.cache_dir))
        self._chat = ChatClient(config, self.counts, "the judge")

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        """One result per item, in order; equal items are asked about once."""
        self.counts["items"] += len(items)
        once = list(dict.fromkeys(items))
        async with self._chat.connected():
            found = await asyncio.gather(*(self._grade(item) for item in once))
        graded = dict(zip(once, found, strict=True))
        return [graded[item] for item in items]

    def key(self, item: JudgeItem) -> str:
        """What the item's grade is stored under: model, prompt, sampling and rubric, hashed."""
        parts = {
            "model": self.config.model,
            "sampling": self.config.sampling(),
            "rubric": RUBRIC_HASH,
            "prompt": item.prompt,
            "completion": item.completion,
            "facts": item.facts,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    async def _grade(self, item: JudgeItem) -> Grades | None:
        if speaks_of_grades(item.completion):
            self.counts["flagged"] += 1
            return WORST
        known = None if self._cache is None else self._cache.get(self.key(item))
        if known is not None:
            self.counts["cached"] += 1
            return known
        grades = await self._chat.ask(
            lambda: messages(item, secrets.token_hex(16)),
            self.config.sampling(),
            lambda reply: read_verdict(reply, item.completion),
        )
        if grades is not None and self._cache is not None:
            self._cache.put(self.key(item), grades)
        return grades


class GradeCache:
    """Grades on disk, one small file each, written whole: safe under concurrent processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Grades | None:
        """The grades under ``key``; None where there are none or the file is damaged."""
        try:
            text = self._path(key).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        return read_verdict(text, "")

    def put(self, key: str, grades: Grades) -> None:
        """Store grades. A full disk costs the entry, not the run."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dict(zip(DIMENSIONS, grades, strict=True)))
            files.write_whole(path, text, durable=False)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
