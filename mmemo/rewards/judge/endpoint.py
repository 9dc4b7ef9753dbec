"""A judge behind an OpenAI-compatible chat endpoint, such as vLLM or SGLang.

Every request has a time limit. Failed requests are retried with growing pauses, after which the
item is left without a grade; no item costs another one its grade. A judge that grades nothing in
several calls in a row is dead, which is an error. Each grade is written to disk when it arrives, so
a killed run does not request (and pay for) it again, and the resumed run gets the same grades.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from mmemo import files
from mmemo.rewards.judge.media import JudgeMediaConfig, MediaEncoder, SentMedia
from mmemo.rewards.judge.openai_client import ChatClient, EndpointConfig
from mmemo.rewards.judge.rubric import (
    DIMENSIONS,
    RUBRIC_HASH,
    SCHEMA,
    WORST,
    Grades,
    JudgeItem,
    mentions_rubric,
    messages,
    read_verdict,
)


class JudgeConfig(EndpointConfig):
    """The judge's model, its sampling, retries and cache. Fields have the names of OpenAI's API."""

    max_tokens: int = Field(default=256, ge=16)
    """Maximum length of a reply, in tokens."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Time limit of one request in seconds, from connecting to the last byte."""
    cache_dir: str | None = None
    """Folder in which grades are cached; runs and ranks may share it. None disables the cache."""
    media: JudgeMediaConfig | None = None
    """What the judge sees and hears of the clip. None sends text only."""
    deadline_s: float = Field(default=50.0, gt=0)
    """Time for all items of a call, in seconds; those without a grade by then are left without one.
    Keep it below the reward's ``timeout_s``, at which the whole call would be lost."""
    max_dead_calls: int = Field(default=5, ge=1)
    """The judge is dead if it graded nothing in this number of calls in a row."""

    def sampling(self) -> dict[str, Any]:
        """The fields of a request besides model and messages."""
        return self.request("grades", SCHEMA)


class EndpointJudge:
    """A :class:`~mmemo.rewards.judge.rubric.Judge` behind an endpoint.

    ``counts``: ``items``, ``cached``, ``flagged`` (mention the rubric, so they get the lowest
    grades without a request), ``requests``, failed requests by kind, ``bad_clip``,
    ``clip_too_large``, ``no_clip`` (the row names none), ``deadline``, ``failed`` (any other
    error), and ``ungraded``, all items that are left without a grade.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._cache = None if config.cache_dir is None else GradeCache(Path(config.cache_dir))
        self._chat = ChatClient(config, self.counts, "the judge")
        self._media = None if config.media is None else MediaEncoder(config.media, self.counts)
        self._dead_calls = 0

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        """The grades of each item, in order; equal items are graded once.

        Raises:
            RuntimeError: nothing was graded in ``max_dead_calls`` calls in a row.
        """
        if not items:
            return []
        self.counts["items"] += len(items)
        distinct = list(dict.fromkeys(items))
        async with self._chat.connected():
            tasks = [asyncio.create_task(self._grade(item)) for item in distinct]
            try:
                _, late = await asyncio.wait(tasks, timeout=self.config.deadline_s)
            finally:
                for task in tasks:
                    task.cancel()
        self.counts["deadline"] += len(late)
        by_item = {item: self._result(task) for item, task in zip(distinct, tasks, strict=True)}
        grades = [by_item[item] for item in items]
        self.counts["ungraded"] += grades.count(None)
        self._dead_calls = 0 if any(grades) else self._dead_calls + 1
        if self._dead_calls >= self.config.max_dead_calls:
            raise RuntimeError(
                f"the judge at {self.config.base_url} graded nothing in the last "
                f"{self._dead_calls} calls ({dict(self.counts)}); check it"
            )
        return grades

    def _result(self, task: asyncio.Task[Grades | None]) -> Grades | None:
        if not task.done() or task.cancelled():
            return None
        if task.exception() is not None:
            # One item that nobody foresaw must not cost the others their grades.
            self.counts["failed"] += 1
            return None
        return task.result()

    def key(self, item: JudgeItem, media: SentMedia | None = None) -> str:
        """The item's cache key: a hash of model, sampling, rubric, prompt and clip. Time limits and
        retries are no part of it, because they do not change a grade."""
        parts: dict[str, Any] = {
            "model": self.config.model,
            "sampling": self.config.sampling(),
            "rubric": RUBRIC_HASH,
            "prompt": item.prompt,
            "completion": item.completion,
            "facts": item.facts,
        }
        if self.config.media is not None and media is not None:
            shown = self.config.media.model_dump(exclude={"max_mb", "decode"})
            parts["media"] = [shown, media.digests, item.clip and asdict(item.clip)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    async def _grade(self, item: JudgeItem) -> Grades | None:
        if mentions_rubric(item.completion):
            self.counts["flagged"] += 1
            return WORST
        sent: SentMedia | None = None
        if self._media is not None:
            if item.clip is None:
                self.counts["no_clip"] += 1
                return None
            sent = await self._media.encode(item.clip)
            if sent is None:
                return None
        key = self.key(item, sent)
        cached = None if self._cache is None else self._cache.get(key)
        if cached is not None:
            self.counts["cached"] += 1
            return cached
        shown = (sent.parts, sent.described) if sent is not None else ((), "")
        grades = await self._chat.ask(
            lambda: messages(item, secrets.token_hex(16), *shown),
            self.config.sampling(),
            lambda reply: read_verdict(reply, item.completion),
        )
        if grades is not None and self._cache is not None:
            self._cache.put(key, grades)
        return grades


class GradeCache:
    """A cache of grades on disk: one small file each, replaced atomically, so that concurrent
    processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Grades | None:
        """The grades under ``key``; None if there are none or the file is damaged."""
        try:
            text = self._path(key).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        return read_verdict(text, "")

    def put(self, key: str, grades: Grades) -> None:
        """Store grades. A failed write, such as to a full disk, loses the entry and is no error."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dict(zip(DIMENSIONS, grades, strict=True)))
            # A lost entry costs one request, which is less than waiting for the disk each time.
            files.write_whole(path, text, durable=False)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
