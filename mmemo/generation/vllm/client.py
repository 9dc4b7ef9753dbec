"""HTTP requests to one vLLM server.

Only the standard library is used: a request that fails must be told apart by how (the server is
gone, is busy, refuses, does not know the adapter), its time must be bounded as a whole, and no
redirect or proxy may take a prompt elsewhere.

Source: the routes of vLLM 0.32: ``entrypoints/scale_out/token_in_token_out``,
``entrypoints/serve/lora`` and ``entrypoints/serve/dev/sleep``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from mmemo.errors import ConfigError

GENERATE = "/inference/v1/generate"
"""Takes token ids with features of media, and answers with token ids."""

_BUSY = frozenset({408, 409, 425, 429})
_CHUNK = 1 << 16
_MOST_BYTES = 1 << 28


class Unavailable(Exception):
    """The server cannot be reached, is busy or fails; a later request may succeed."""


class Refused(Exception):
    """The server refuses the request, and would again."""


class UnknownName(Refused):
    """The server knows no such model, adapter or route."""


class VllmClient:
    """Requests to the server at ``url``; safe to use from several threads.

    Args:
        api_key_env: environment variable that holds the server's key.

    Raises:
        ConfigError: that variable is not set.
    """

    def __init__(self, url: str, timeout_s: float, api_key_env: str | None = None) -> None:
        self.url, self.timeout_s = url, timeout_s
        parts = urlsplit(url)
        self._secure, self._host = parts.scheme == "https", parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key_env is not None:
            key = os.environ.get(api_key_env)
            if not key:
                raise ConfigError(f"the vLLM server needs its key in ${api_key_env}; set it")
            self._headers["Authorization"] = f"Bearer {key}"

    def generate(self, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The reply to a request for a completion.

        Raises:
            Unavailable, UnknownName, Refused: there is none.
        """
        return self._json("POST", GENERATE, body, timeout_s)

    def models(self) -> list[dict[str, Any]]:
        """What is served: ``id`` and ``parent``, which is None for the model itself.

        Raises:
            Unavailable, Refused: it does not say.
        """
        found = self._json("GET", "/v1/models", None, None).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise Unavailable("it lists no models")
        return found

    def load(self, name: str, folder: str) -> None:
        """Load the adapter in ``folder``, which the server sees under the same path.

        Raises:
            Unavailable, UnknownName, Refused: it is not loaded.
        """
        body = {"lora_name": name, "lora_path": folder}
        try:
            self._send("POST", "/v1/load_lora_adapter", body, None)
        except Refused as error:
            # Another rank of the run was first; a name stands for its weights.
            if "already been loaded" not in str(error):
                raise

    def unload(self, name: str, timeout_s: float | None = None) -> None:
        """Forget an adapter; nothing happens where it is not known.

        Raises:
            Unavailable, Refused: the server fails.
        """
        try:
            self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout_s)
        except UnknownName:
            return

    def sleep(self) -> None:
        """Free the GPU: weights go to the memory of the machine, the cache is dropped.

        Raises:
            Unavailable, Refused: the server fails.
        """
        self._send("POST", "/sleep?level=1", {}, None)

    def wake(self) -> None:
        """Undo :meth:`sleep`.

        Raises:
            Unavailable, Refused: the server fails.
        """
        self._send("POST", "/wake_up", {}, None)

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> dict[str, Any]:
        raw = self._send(method, path, body, timeout_s)
        try:
            found: Any = json.loads(raw)
        except ValueError as error:
            raise Unavailable("it answered with no JSON") from error
        if not isinstance(found, dict):
            raise Unavailable("it answered with no JSON object")
        return found

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> bytes:
        limit = self.timeout_s if timeout_s is None else min(timeout_s, self.timeout_s)
        kind = HTTPSConnection if self._secure else HTTPConnection
        until = time.monotonic() + limit
        connection = kind(self._host, self._port, timeout=limit)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, self._headers)
            reply = connection.getresponse()
            raw = _read(reply, connection, until)
        except TimeoutError as error:
            raise Unavailable(f"it did not answer within {limit:g} s") from error
        except (OSError, HTTPException) as error:
            raise Unavailable(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if reply.status == 200:
            return raw
        told = f"it answered {reply.status}: {_message(raw)}"
        if reply.status >= 500 or reply.status in _BUSY:
            raise Unavailable(told)
        raise UnknownName(told) if reply.status == 404 else Refused(told)


def _read(reply: HTTPResponse, connection: HTTPConnection, until: float) -> bytes:
    """The body. The time is bounded as a whole: a socket's own limit is for each read, and a server
    that sends a byte now and then would hold it for ever."""
    body = bytearray()
    while chunk := reply.read1(_CHUNK):
        body += chunk
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if len(body) > _MOST_BYTES:
            raise HTTPException("its answer is too long")
        if connection.sock is not None:
            connection.sock.settimeout(left)
    if reply.length:  # what it had announced and did not send
        raise HTTPException("its answer broke off")
    return bytes(body)


def _message(raw: bytes) -> str:
    """What an error's body says, on one line."""
    try:
        found: Any = json.loads(raw)
        told = found.get("error", found)
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError):
        text = raw.decode(errors="replace")
    return " ".join(text.split())[:300]
