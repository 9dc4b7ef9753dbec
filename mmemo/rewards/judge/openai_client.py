"""A chat endpoint in OpenAI's form, such as vLLM or SGLang, asked patiently.

Every request is bounded in time; what fails is asked again with growing pauses, and in the end
there is no answer, which is for the caller to record.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import Field, field_validator

from mmemo.config import Config
from mmemo.errors import ConfigError

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]

_RETRIED = frozenset({408, 409, 425, 429})
_MOST_BYTES = 1 << 20
_LONGEST_PAUSE = 30.0  # seconds, also for what a server asks for in Retry-After


class EndpointConfig(Config):
    """Which model is asked, and how patiently. Names are those of OpenAI's API."""

    base_url: str
    """Up to and with the version: ``http://localhost:8000/v1``."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key. The key itself never stands in a config."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=512, ge=16)
    seed: int | None = 0
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the server is made to answer in JSON; the reply is checked all the same."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds of one request, from connecting to the last byte."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """Further requests after one that failed or whose reply could not be read."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Pause before the first retry; it doubles with each, up to 30 s."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests under way at once."""

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http or https address such as http://localhost:8000/v1")
        return value.rstrip("/")

    def request(self, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the reply beside model and prompt; ``schema`` is that of the reply."""
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
            form = {"name": name, "strict": True, "schema": dict(schema)}
            sampling["response_format"] = {"type": "json_schema", "json_schema": form}
        return sampling


class ChatClient:
    """Asks one endpoint. ``counts``: ``requests``, and failed ones by kind: ``timeout``,
    ``connection``, ``busy``, ``server_error``, ``refused``, ``malformed``.

    Args:
        who: what the endpoint is to the user, for the error about its key.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: EndpointConfig, counts: Counter[str], who: str) -> None:
        self.config, self.counts = config, counts
        self._headers: dict[str, str] = {}
        self._client: httpx2.AsyncClient | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ConfigError(f"{who} needs its key in ${config.api_key_env}; set it")
            self._headers["Authorization"] = f"Bearer {key}"

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        """Within it the client can be asked; connections are shared."""
        self._slots = asyncio.Semaphore(self.config.concurrency)
        limits = httpx2.Limits(max_connections=self.config.concurrency)
        async with httpx2.AsyncClient(
            headers=self._headers, limits=limits, timeout=self.config.timeout_s
        ) as client:
            self._client = client
            yield

    async def ask(
        self,
        messages: Callable[[], Messages],
        sampling: Mapping[str, Any],
        read: Callable[[str], T | None],
    ) -> T | None:
        """What ``read`` makes of the reply, or None after the last try.

        Args:
            messages: called for each request.
            read: None for a reply that cannot be used, which is then asked for again.
        """
        for attempt in range(self.config.max_retries + 1):
            async with self._slots:
                content, problem, wanted = await self._once(messages(), sampling)
            found = None if content is None else read(content)
            if found is not None:
                return found
            self.counts[problem] += 1
            if problem == "refused" or attempt == self.config.max_retries:
                return None
            pause = max(wanted, self.config.backoff_s * 2**attempt)
            await asyncio.sleep(min(_LONGEST_PAUSE, pause) * random.uniform(0.75, 1.0))
        return None

    async def _once(
        self, messages: Messages, sampling: Mapping[str, Any]
    ) -> tuple[str | None, str, float]:
        """One request: the reply's text, or what went wrong, and the seconds to wait."""
        self.counts["requests"] += 1
        assert self._client is not None, "ask within connected()"
        body = {
            "model": self.config.model,
            "messages": list(messages),
            "stream": False,
            **sampling,
        }
        try:
            # The client's own limit is per read: a server that drips would pass it for ever.
            async with asyncio.timeout(self.config.timeout_s):
                url = f"{self.config.base_url}/chat/completions"
                async with self._client.stream("POST", url, json=body) as response:
                    wait = _retry_after(response.headers.get("retry-after"))
                    if response.status_code != 200:
                        return None, _status(response.status_code), wait
                    reply = await _read(response)
        except TimeoutError:
            return None, "timeout", 0.0
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            timed_out = isinstance(error, httpx2.TimeoutException)
            return None, "timeout" if timed_out else "connection", 0.0
        return _content(reply), "malformed", 0.0


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
