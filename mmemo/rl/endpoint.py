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
import os
import random
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2
from pydantic import Field, field_validator

from mmemo.config import Config
from mmemo.errors import ConfigError
from mmemo.rl.judge import (
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

_RETRIED = frozenset({408, 409, 425, 429})
_MOST_BYTES = 1 << 20
_LONGEST_PAUSE = 30.0  # seconds, also for what a server asks for in Retry-After


class JudgeConfig(Config):
    """Which model judges, and how patiently it is asked. Names are those of OpenAI's API."""

    base_url: str
    """Up to and with the version: ``http://localhost:8000/v1``."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key. The key itself never stands in a config."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, ge=16)
    seed: int | None = 0
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the server is made to answer in JSON; the verdict is checked all the same."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds of one request, from connecting to the last byte."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """Further requests after one that failed or whose reply was no verdict."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Pause before the first retry; it doubles with each, up to 30 s."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests under way at once."""
    cache_dir: str | None = None
    """Folder of grades; may be shared by runs and ranks. None: no cache."""

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http or https address such as http://localhost:8000/v1")
        return value.rstrip("/")

    def sampling(self) -> dict[str, Any]:
        """What decides the reply beside model and prompt."""
        sampling: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        if self.seed is not None:
            sampling["seed"] = self.seed
        if self.response_format == "json_object":
            sampling["response_format"] = {"type": "json_object"}
        elif self.response_format == "json_schema":
            schema = {"name": "grades", "strict": True, "schema": SCHEMA}
            sampling["response_format"] = {"type": "json_schema", "json_schema": schema}
        return sampling


class EndpointJudge:
    """A :class:`~mmemo.rl.judge.Judge`. ``counts`` says what happened: ``items``, ``cached``,
    ``flagged`` (graded lowest unseen), ``requests``, and failed requests by kind.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._cache = None if config.cache_dir is None else GradeCache(Path(config.cache_dir))
        self._headers: dict[str, str] = {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ConfigError(f"the judge needs its key in ${config.api_key_env}; set it")
            self._headers["Authorization"] = f"Bearer {key}"

    async def score(self, items: Sequence[JudgeItem]) -> list[Grades | None]:
        """One result per item, in order; equal items are asked about once."""
        self.counts["items"] += len(items)
        once = list(dict.fromkeys(items))
        slots = asyncio.Semaphore(self.config.concurrency)
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        async with httpx2.AsyncClient(
            headers=self._headers, limits=limits, timeout=self.config.timeout_s
        ) as client:
            found = await asyncio.gather(*(self._grade(client, slots, item) for item in once))
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

    async def _grade(
        self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, item: JudgeItem
    ) -> Grades | None:
        if speaks_of_grades(item.completion):
            self.counts["flagged"] += 1
            return WORST
        known = None if self._cache is None else self._cache.get(self.key(item))
        if known is not None:
            self.counts["cached"] += 1
            return known
        for attempt in range(self.config.max_retries + 1):
            async with slots:
                grades, problem, wanted = await self._ask(client, item)
            if grades is not None:
                if self._cache is not None:
                    self._cache.put(self.key(item), grades)
                return grades
            self.counts[problem] += 1
            if problem == "refused" or attempt == self.config.max_retries:
                return None
            pause = max(wanted, self.config.backoff_s * 2**attempt)
            await asyncio.sleep(min(_LONGEST_PAUSE, pause) * random.uniform(0.75, 1.0))
        return None

    async def _ask(
        self, client: httpx2.AsyncClient, item: JudgeItem
    ) -> tuple[Grades | None, str, float]:
        """One request: grades, or what went wrong, and the seconds the server asks to wait."""
        self.counts["requests"] += 1
        body = {
            "model": self.config.model,
            "messages": messages(item, secrets.token_hex(16)),
            "stream": False,
            **self.config.sampling(),
        }
        try:
            # The client's own limit is per read: a server that drips would pass it for ever.
            async with asyncio.timeout(self.config.timeout_s):
                url = f"{self.config.base_url}/chat/completions"
                async with client.stream("POST", url, json=body) as response:
                    wait = _retry_after(response.headers.get("retry-after"))
                    if response.status_code != 200:
                        return None, _status(response.status_code), wait
                    reply = await _read(response)
        except TimeoutError:
            return None, "timeout", 0.0
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            timed_out = isinstance(error, httpx2.TimeoutException)
            return None, "timeout" if timed_out else "connection", 0.0
        content = _content(reply)
        grades = None if content is None else read_verdict(content, item.completion)
        return grades, "malformed", 0.0


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
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(dict(zip(DIMENSIONS, grades, strict=True))), "utf-8")
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


async def _read(response: httpx2.Response) -> bytes:
    """The body, up to the largest that a verdict can need; a longer one reads as malformed."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MOST_BYTES:
            return b""
    return bytes(body)


def _content(reply: bytes) -> str | None:
    """The text of the first choice of a chat completion."""
    try:
        value: Any = json.loads(reply)
        content: Any = value["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def _status(code: int) -> str:
    """``refused`` will not change by asking again: a wrong key, model or address."""
    if code in _RETRIED:
        return "busy"
    return "server_error" if code >= 500 else "refused"


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header; 0 for none or a date."""
    try:
        return max(0.0, float(value)) if value is not None else 0.0
    except ValueError:
        return 0.0
