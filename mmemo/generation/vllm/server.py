"""A vLLM server that this process starts, in the environment that vLLM is installed in."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.vllm.config import VllmConfig

MODULE = "vllm.entrypoints.openai.api_server"
"""As a module, because the program ``vllm`` asks for the version of a package of that name, which
builds for the CPU do not have."""
SHARE = 0.3
"""Share of the GPU's memory that a server beside a rank takes (``--gpu-memory-utilization``)."""

_GRACE = 20.0
"""Seconds that a server gets to end by itself."""
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl."""
_LIBC = ctypes.CDLL(None)

_NOT_ITS_OWN = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    | {"GROUP_RANK", "ROLE_RANK", "NODE_RANK", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
)
"""Variables of a rank, by which vLLM would think that it is one."""


def command(
    config: VllmConfig,
    model: str,
    port: int,
    gpus: Sequence[str],
    *,
    mode: str,
    rank: int,
    max_length: int,
) -> list[str]:
    """The command line of a server.

    Args:
        model: folder or hub id of the model under the adapter.
        gpus: the GPUs that it gets; none for the CPU.
        mode: which log-probabilities it gives (``--logprobs-mode``).
        rank: the most that an adapter may have (``--max-lora-rank``).
        max_length: most tokens of a prompt and its completion; 0 leaves that to vLLM.
    """
    made = [config.python, "-m", MODULE, "--model", model, "--host", "127.0.0.1"]
    made += ["--port", str(port), "--enable-scale-out", "--generation-config", "vllm"]
    made += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    made += ["--logprobs-mode", mode, "--enable-mm-embeds"]
    if len(gpus) > 1:
        made += ["--tensor-parallel-size", str(len(gpus))]
    if max_length:
        made += ["--max-model-len", str(max_length)]
    if config.colocate:
        made += ["--enable-sleep-mode", "--gpu-memory-utilization", str(SHARE)]
    return [*made, *config.arguments]  # last, because the last of two counts


def environment(variables: Mapping[str, str], gpus: Sequence[str]) -> dict[str, str]:
    """The variables of a server, made from those of this process."""
    kept = {name: x for name, x in variables.items() if name not in _NOT_ITS_OWN}
    return {
        **{name: x for name, x in kept.items() if not name.startswith("TORCHELASTIC_")},
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for sleep and wake
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def devices(config: VllmConfig, variables: Mapping[str, str], local_rank: int) -> list[str]:
    """The GPUs of a server, as ``CUDA_VISIBLE_DEVICES`` names them."""
    seen = [one for one in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    wanted = [local_rank] if config.colocate else config.gpus or []
    if not config.colocate:
        return [str(one) for one in wanted]
    return [seen[one] if one < len(seen) else str(one) for one in wanted]


class Started:
    """A server in a process group of its own, which ends with this process.

    Args:
        arguments: its command line.
        variables: its environment.
        log: file for what it prints.

    Raises:
        ConfigError: the program is not there.
    """

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGTERM)
            if os.getppid() != parent:  # it has ended already
                os._exit(1)

        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._process = self._start(arguments, variables, out, die_with_parent)

    @staticmethod
    def _start(
        arguments: Sequence[str],
        variables: Mapping[str, str],
        out: IO[bytes],
        before: Callable[[], None],
    ) -> subprocess.Popen[bytes]:
        program = Path(arguments[0])
        path = f"{program.parent.resolve()}:{variables.get('PATH', '')}"
        try:
            return subprocess.Popen(
                arguments,
                env={**variables, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before,
            )
        except OSError as error:
            raise ConfigError(
                f"vLLM cannot be started with '{arguments[0]}' ({error}); make the environment "
                "with launch/vllm_env.sh, or set rollout.vllm.python to one that has vLLM"
            ) from error

    def check_alive(self) -> None:
        """Check that the server has not ended.

        Raises:
            RolloutError: it has.
        """
        code = self._process.poll()
        if code is not None:
            raise RolloutError(
                f"the vLLM server that was started here ended with exit code {code}; "
                f"{self.log} says why"
            )

    def stop(self) -> None:
        """End the server and the processes that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
