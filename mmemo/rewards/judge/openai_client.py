"""Chat requests of judges and captioners to an OpenAI-compatible endpoint, such as vLLM.

``openai.AsyncOpenAI`` builds, sends and classifies the requests. Five promises are kept here,
because the library (3.57, each measured against a local server) does not make them:

- **Total time limit.** Its ``timeout`` bounds each read: with 0.3 s, a server that drips one byte
  every 0.05 s held a request for 9 s. Ours bounds a request from connecting to the last byte.
- **Bounded response.** It reads a reply, and the body of an error, whole (64 MiB in our probe).
- **Retries that see the reply.** It never repeats a request whose reply is malformed, and its own
  retries are not counted. Its retries are therefore off.
- **No redirects.** It follows them by default, and sends the prompt along to the other host.
- **No ambient credentials.** It adds ``OPENAI_API_KEY``, ``OPENAI_ORG_ID``, ``OPENAI_PROJECT_ID``
  and ``OPENAI_CUSTOM_HEADERS`` from the environment to requests to any endpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from mmemo.config import Config
from mmemo.errors import ConfigError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
FailureKind = Literal["timeout", "connection", "busy", "server_error", "refused", "malformed"]

# Client errors that pass by themselves, and are therefore retried like server errors.
_BUSY_STATUSES = frozenset({408, 409, 425, 429})
_MAX_RESPONSE_BYTES = 1 << 20
_MAX_PAUSE = 30.0  # seconds; also caps what a server asks for in Retry-After
# An allowlist, so that no header of a later version of the library slips through.
_SENT_HEADERS = frozenset(
    {"host", "accept", "accept-encoding", "connection", "user-agent"}
    | {"content-type", "content-length"}
)
_LIBRARY_HEADERS = "x-stainless-"  # the library reads its own back from the request


class EndpointConfig(Config):
    """A model behind an endpoint, its sampling, and how failed requests are retried. Fields have
    the names of OpenAI's API."""

    base_url: str
    """Address of the endpoint including the version: ``http://localhost:8000/v1``."""
    model: str
    """Name of the model at the endpoint."""
    api_key_env: str | None = None
    """Environment variable that holds the API key. The key itself never stands in a config. None
    sends no key."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold."""
    max_tokens: int = Field(default=512, ge=16)
    """Maximum length of a reply, in tokens."""
    seed: int | None = 0
    """Sampling seed; None sends none."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """How the server is asked to answer in JSON. Replies are validated in every case."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Time limit of one request in seconds, from connecting to the last byte."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """Retries after a request that failed or whose reply could not be parsed."""
    backoff_s: float = Field(default=0.5, ge=0)
    """Pause before the first retry in seconds; it doubles with each retry, up to 30 s."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Maximum number of concurrent requests."""

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http or https address such as http://localhost:8000/v1")
        return value.rstrip("/")

    def request(self, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The request's fields besides model and messages.

        Args:
            name: name of the reply's schema.
            schema: JSON schema of the reply, used with ``response_format: json_schema``.
        """
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
    """Sends chat requests to one endpoint, with bounded time, size, concurrency and retries.

    Args:
        counts: counts ``requests``, and failed ones by :data:`FailureKind`.
        who: what the endpoint is to the user, for the error about its key.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: EndpointConfig, counts: Counter[str], who: str) -> None:
        self.config, self.counts = config, counts
        self._key: str | None = None
        self._client: AsyncOpenAI | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        if config.api_key_env is not None:
            self._key = os.environ.get(config.api_key_env)
            if not self._key:
                raise ConfigError(f"{who} needs its key in ${config.api_key_env}; set it")

    @asynccontextmanager
    async def connected(self) -> AsyncGenerator[None]:
        """Open the connection pool that :meth:`ask` needs; close it on exit."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # 0.7 s, only where it is used

        # A semaphore belongs to the event loop in which it first waits; each pool gets its own.
        self._slots = asyncio.Semaphore(self.config.concurrency)
        transport = DefaultAsyncHttpxClient(
            follow_redirects=False,
            event_hooks={"request": [self._set_headers], "response": [_check_status]},
        )
        async with AsyncOpenAI(
            base_url=self.config.base_url,
            # Without a key the library takes that of the environment, or raises.
            api_key="set by _set_headers",
            timeout=None,  # ours is for the whole request
            max_retries=0,
            http_client=transport,
        ) as client:
            self._client = client
            yield

    async def ask(
        self,
        messages: Callable[[], Messages],
        sampling: Mapping[str, Any],
        read: Callable[[str], T | None],
    ) -> T | None:
        """Send a chat and parse the reply; None after the last retry.

        Args:
            messages: makes the messages; called anew for each request.
            sampling: the request's other fields (:meth:`EndpointConfig.request`).
            read: parses a reply; None for one that is malformed, which is then retried.
        """
        for attempt in range(self.config.max_retries + 1):
            # The slot is free during the pause, so that a failing request does not hold up the
            # others.
            async with self._slots:
                try:
                    parsed = read(await self._request(messages(), sampling))
                    failure = _RequestError("malformed")
                except _RequestError as error:
                    parsed, failure = None, error
            if parsed is not None:
                return parsed
            self.counts[failure.kind] += 1
            if failure.kind == "refused" or attempt == self.config.max_retries:
                return None
            pause = max(failure.retry_after, self.config.backoff_s * 2**attempt)
            # The jitter spreads the retries of requests that failed at the same moment.
            await asyncio.sleep(min(_MAX_PAUSE, pause) * random.uniform(0.75, 1.0))
        return None

    async def _request(self, messages: Messages, sampling: Mapping[str, Any]) -> str:
        """The text of one reply.

        Raises:
            _RequestError: there is none.
        """
        from openai import APIConnectionError, APITimeoutError

        assert self._client is not None, "ask within connected()"
        self.counts["requests"] += 1
        # The streaming form hands over the body unread, so that its size can be bounded.
        create: Any = self._client.chat.completions.with_streaming_response.create
        fields = {"model": self.config.model, "messages": list(messages), **sampling}
        try:
            async with (
                asyncio.timeout(self.config.timeout_s),
                create(stream=False, **fields) as response,
            ):
                return _content(await _body(response))
        except (TimeoutError, APITimeoutError) as error:
            raise _RequestError("timeout") from error
        except APIConnectionError as error:
            raise _RequestError("connection") from error

    async def _set_headers(self, request: Any) -> None:
        """Remove what the library takes from the environment; add our own key."""
        for name in list(request.headers):
            if name not in _SENT_HEADERS and not name.startswith(_LIBRARY_HEADERS):
                del request.headers[name]
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"


class _RequestError(Exception):
    """A request failed. ``retry_after``: seconds that the server asks to wait, 0 for none."""

    def __init__(self, kind: FailureKind, retry_after: float = 0.0) -> None:
        super().__init__(kind)
        self.kind: FailureKind = kind
        self.retry_after = retry_after


async def _check_status(response: Any) -> None:
    """Refuse any status but 200 before the body, which nobody needs, is read.

    A ``refused`` request cannot succeed when repeated: the key, the model or the address is wrong.
    """
    code = int(response.status_code)
    if code == 200:
        return
    kind: FailureKind = "server_error" if code >= 500 else "refused"
    raise _RequestError(
        "busy" if code in _BUSY_STATUSES else kind,
        _seconds(response.headers.get("retry-after")),
    )


async def _body(response: Any) -> bytes:
    """The decoded body of a response.

    Raises:
        _RequestError: the connection broke, or the body is larger than any reply can need.
    """
    body = bytearray()
    try:
        async for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_RESPONSE_BYTES:
                break
    except Exception as error:  # the transport's own, which the library does not translate here
        raise _RequestError("connection") from error
    # Not raised inside the try, which would take it for a broken connection.
    if len(body) > _MAX_RESPONSE_BYTES:
        raise _RequestError("malformed")
    return bytes(body)


def _content(body: bytes) -> str:
    """The text of the first choice. Parsed here, because the library's models accept any JSON.

    Raises:
        _RequestError: the body is no chat completion.
    """
    try:
        value: Any = json.loads(body)
        content: Any = value["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _RequestError("malformed") from error
    if not isinstance(content, str):
        raise _RequestError("malformed")
    return content


def _seconds(retry_after: str | None) -> float:
    """Seconds of a Retry-After header; 0 for none or a date."""
    try:
        return max(0.0, float(retry_after)) if retry_after is not None else 0.0
    except ValueError:
        return 0.0
