"""vLLM on the CPU, in the environment that ``launch/vllm_env.sh`` makes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parents[1] / ".venv-vllm"
SERVE = "vllm.entrypoints.openai.api_server"
LIMIT = 300
"""Seconds until every server has to answer."""
SMALL = (
    *("--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager"),
    *("--generation-config", "vllm", "--disable-log-stats", "--no-enable-log-requests"),
)


def program() -> Path:
    """Python of that environment."""
    found = ENVIRONMENT / "bin/python"
    if not found.exists():
        pytest.fail("there is no .venv-vllm; run launch/vllm_env.sh")
    return found


class Server:
    """``vllm serve`` in a process group of its own, started as a module: the program asks for the
    version of a package "vllm", and that of the build for CPUs has another name."""

    def __init__(
        self, program: Path, folder: Path, log: Path, *options: str, port: int = 0
    ) -> None:
        with socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("127.0.0.1", port))
            self.port = found.getsockname()[1]
        self.log = log
        own = {
            name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
        }
        threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        offline["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        path = f"{program.parent}:{own['PATH']}"
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [
                    program,
                    "-m",
                    SERVE,
                    "--model",
                    folder,
                    "--port",
                    str(self.port),
                    *SMALL,
                    *options,
                ],
                env={**own, **threads, **offline, "VLLM_CPU_KVCACHE_SPACE": "1", "PATH": path},
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                start_new_session=True,
            )

    def wait(self, until: float) -> None:
        url = f"http://127.0.0.1:{self.port}/health"
        while time.monotonic() < until:
            assert self._process.poll() is None, self.log.read_text()[-6000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            time.sleep(0.5)
        pytest.fail(f"vLLM did not answer within {LIMIT} s\n{self.log.read_text()[-6000:]}")

    def kill(self) -> None:
        """Ends it all at once, as a lost machine does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def stop(self) -> None:
        """Ends vLLM and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
