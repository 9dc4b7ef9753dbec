"""A chat endpoint that answers as a test tells it to, on a port of this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mmemo.rewards.judge.rubric import DIMENSIONS

VERDICT = (
    '{"factual_alignment": 5, "interpretative_quality": 4, "caption_completeness": 3, '
    '"fluency_and_structural_clarity": 2}'
)


@dataclass
class Reply:
    """What the server sends. ``drip``: seconds between the bytes. ``cut``: drop the connection."""

    content: Any = VERDICT
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0
    cut: bool = False

    def data(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"content": self.content}}]}).encode()


@dataclass
class Server:
    """``seen``: the requests, parsed. ``headers``: theirs, by lower-case name.
    ``most_at_once``: the largest number of concurrent requests."""

    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 refuses connections that come together


def truthful(request: dict[str, Any], number: int) -> Reply:
    """A judge that reads the facts: excellent for all present cues, no absent one and the right
    emotion, very poor for anything else."""
    text = request["messages"][1]["content"]
    candidate = json.loads(text.split("\nBEGIN ")[1].split("\n")[1])
    facts = dict(line[2:].split(": ", 1) for line in text.splitlines() if line[:2] == "- ")
    present, absent = (
        [cue for cue in facts.get(f"{kind} cues", "").split(", ") if cue]
        for kind in ("present", "absent")
    )
    right = (
        all(cue in candidate["reasoning"] for cue in present)
        and not any(cue in candidate["reasoning"] for cue in absent)
        and candidate["answer"] == facts.get("emotion of the clip")
    )
    return Reply(json.dumps(dict.fromkeys(DIMENSIONS, 5 if right else 1)))


@contextmanager
def judge_server(script: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """``script(request, number)`` says what the request gets; numbers count from 0."""
    server, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.seen)
                server.seen.append({"path": self.path, **request})
                server.headers.append({name.lower(): text for name, text in self.headers.items()})
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.answer(script(request, number))
            except OSError:
                pass  # the client has gone
            finally:
                with lock:
                    server.at_once -= 1

        def answer(self, reply: Reply) -> None:
            time.sleep(reply.delay)
            if reply.cut:
                self.connection.close()
                return
            data = reply.data()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(data), 1 if reply.drip else len(data) or 1):
                self.wfile.write(data[start : start + (1 if reply.drip else len(data))])
                self.wfile.flush()
                time.sleep(reply.drip)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = _Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{running.server_port}/v1"
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        running.shutdown()
        running.server_close()
