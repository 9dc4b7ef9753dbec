"""Where the vLLM server is, and how long it is waited for."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mmemo.config import Config


class VllmConfig(Config):
    """A vLLM server: one that runs at ``url``, or one that is started on ``gpus`` or beside each
    rank (``colocate``). One of the three is needed with ``rollout.engine: vllm``."""

    url: str | list[str] | None = None
    """Address of a running server, such as ``http://localhost:8000``. With several, rank r uses
    number r modulo their number."""
    gpus: list[int] | None = Field(default=None)
    """GPUs of each node on which its first rank starts a server, apart from those that train; an
    empty list starts one on the CPU."""
    colocate: bool = False
    """Start a server on the GPU of each rank. It sleeps while the rank trains."""
    port: int = Field(default=8000, ge=1, le=65000)
    """Port of a server that is started; with ``colocate`` the rank's number on its node is
    added."""
    python: str = ".venv-vllm/bin/python"
    """Python of the environment that vLLM is installed in, for a server that is started."""
    arguments: list[str] = []
    """Further arguments of ``vllm serve``, for a server that is started."""
    adapter_dir: str | None = None
    """Folder that this process and the server both see, in which the adapter is handed over. None
    is ``rollout_adapters`` in ``output_dir``; ``/dev/shm`` is faster on one machine."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Time limit of one request in seconds, from connecting to the last byte."""
    patience_s: float = Field(default=900.0, gt=0)
    """Seconds without any answer after which a server that fails, hangs or is starting is given up;
    the run then stops with a checkpoint. Keep it below ``run.ddp_timeout``, for which other ranks
    wait."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """How often a request is repeated whose answer is incomplete or is not by the adapter asked
    for."""
    concurrency: int = Field(default=128, ge=1, le=4096)
    """Most requests of a rank at the same time; each draws all completions of a prompt."""
    api_key_env: str | None = None
    """Environment variable that holds the key of the server (``--api-key``). None sends none."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str | list[str] | None) -> str | list[str] | None:
        for one in [value] if isinstance(value, str) else value or []:
            parts = urlsplit(one)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an http or https address such as http://localhost:8000")
            if parts.path.strip("/") or parts.query:
                raise ValueError("must be the server's address without a path (no /v1)")
        if value == []:
            raise ValueError("must name at least one server")
        return value

    @model_validator(mode="after")
    def _one_server(self) -> VllmConfig:
        if sum([self.url is not None, self.gpus is not None, self.colocate]) > 1:
            raise ValueError("set one of url, gpus and colocate")
        return self

    @property
    def urls(self) -> list[str]:
        """The addresses of running servers, without a slash at the end."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return [one.rstrip("/") for one in given]

    @property
    def is_set(self) -> bool:
        """Whether it says which server is meant."""
        return bool(self.urls) or self.gpus is not None or self.colocate
