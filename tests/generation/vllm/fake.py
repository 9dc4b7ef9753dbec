"""A server that answers as vLLM does, without a model, and fails as a test tells it to.

Its routes, fields and status codes are those that vLLM 0.32 was seen to have
(``test_vllm_rollouts.py`` runs the same client against it).
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

BASE = "the-model"
TOKENS = range(20, 60)
"""What it says, all with the same probability, apart from end tokens."""
END = 0.05
"""Probability of an end token."""

Fault = Callable[[str, dict[str, Any], dict[str, Any], int], "int | float | None"]
"""Path, request, reply (to be changed), number of the request on this path -> a status, seconds to
hang, 0 to drop the connection, or None."""


@dataclass
class Fake:
    """``seen``: path and body of each request. ``adapters``: what is loaded, by name.
    ``loaded``: the weights of everything that was ever loaded."""

    url: str = ""
    mode: str = "raw_logprobs"
    lora: bool = True
    scale_out: bool = True
    fault: Fault | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)
    asleep: bool = False
    key: str | None = None

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def asked(self, *, named: bool = True) -> list[dict[str, Any]]:
        """The requests for completions; ``named``: of an adapter."""
        return [
            body
            for path, body in self.seen
            if path == "/inference/v1/generate" and (body["model"] != BASE or not named)
        ]

    def restart(self) -> None:
        """What a new process has forgotten."""
        self.adapters.clear()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            served = [{"id": BASE, "parent": None}]
            return 200, {"data": [*served, *({"id": x, "parent": BASE} for x in self.adapters)]}
        if path in ("/sleep?level=1", "/wake_up"):
            self.asleep = path.startswith("/sleep")
            return 200, {}
        if path == "/v1/load_lora_adapter" and self.lora:
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter" and self.lora:
            known = self.adapters.pop(body["lora_name"], None)
            return (200, "done") if known else _error(404, "no such adapter")
        if path == "/inference/v1/generate" and self.scale_out:
            if body["model"] not in (BASE, *self.adapters):
                return _error(404, f"The model `{body['model']}` does not exist.")
            return (500, {}) if self.asleep else (200, self._complete(body))
        return _error(404, "Not Found")

    def _load(self, name: str, folder: Path) -> tuple[int, Any]:
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not folder.exists():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        self.adapters[name] = str(folder)
        weights = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        self.loaded[name] = {"weights": weights, "config": config}
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        choices = [self._choice(sampling, at) for at in range(sampling.get("n", 1))]
        reply: dict[str, Any] = {"model": body["model"], "choices": choices}
        if body.get("return_token_ids"):
            reply["prompt_token_ids"] = body["token_ids"]
        return reply

    def _choice(self, sampling: dict[str, Any], at: int) -> dict[str, Any]:
        random_ = random.Random(sampling["seed"] + at)
        stops = sampling.get("stop_token_ids") or []
        ids: list[int] = []
        while len(ids) < sampling["max_tokens"] and not (ids and ids[-1] in stops):
            ended = stops and random_.random() < END
            ids.append(stops[-1] if ended else random_.choice(TOKENS))
        content = [
            {"token_id": x, "logprob": -1.5, "top_logprobs": self._top(sampling)} for x in ids
        ]
        ended = ids[-1] in stops
        return {
            "index": at,
            "token_ids": ids,
            "finish_reason": "stop" if ended else "length",
            "stop_reason": ids[-1] if ended else None,
            "logprobs": {"content": content},
        }

    def _top(self, sampling: dict[str, Any]) -> list[dict[str, Any]]:
        """Those of logits that fall by 1 from token to token."""
        warmth = sampling["temperature"] if self.mode == "processed_logprobs" else 1.0
        norm = (
            0.0
            if "logits" in self.mode
            else math.log(sum(math.exp(-x / warmth) for x in range(50)))
        )
        return [
            {"token_id": 20 + x, "logprob": -x / warmth - norm, "rank": x + 1}
            for x in range(sampling.get("logprobs") or 1)
        ]


def _error(code: int, message: str) -> tuple[int, Any]:
    return code, {"error": {"message": message, "code": code}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def fake_vllm(port: int = 0, **values: Any) -> Iterator[Fake]:
    """A server on a port of this machine."""
    fake, guard = Fake(**values), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any]) -> None:
            with guard:
                number = fake.paths().count(self.path)
                fake.seen.append((self.path, body))
                key = self.headers.get("Authorization")
                if fake.key is not None and key != f"Bearer {fake.key}":
                    status, found = _error(401, "Unauthorized")
                else:
                    status, found = fake.answer(self.path, body)
                told = None
                if fake.fault is not None and status == 200:
                    reply = found if isinstance(found, dict) else {}
                    told = fake.fault(self.path, body, reply, number)
            if told == 0:
                self.close_connection = True
                return
            if isinstance(told, float):
                time.sleep(told)
            elif told is not None:
                status, found = _error(told, "it was told to fail")
            raw = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = _Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
