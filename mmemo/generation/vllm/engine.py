"""Rollouts from a vLLM server, to which the adapter is handed over whenever it has changed.

N completions of B prompts, C tokens of the longest.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.rollout import Endings, RolloutConfig, Rollouts
from mmemo.generation.vllm import adapter as adapters
from mmemo.generation.vllm.client import GENERATE, Refused, Unavailable, UnknownName, VllmClient
from mmemo.generation.vllm.modes import check_mode, first_tokens
from mmemo.generation.vllm.prompts import Clips, Prompt, read_prompts
from mmemo.generation.vllm.server import Started
from mmemo.models.adapters.lora import unwrap

_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
"""Seconds before a request is repeated; they double."""
_FAREWELL = 5.0
"""Seconds that a server has to forget an adapter when the run ends."""
_WATCH = 0.5
"""Seconds between two looks for the folder of another rank."""
_NEVER = -100.0
"""What is added to the logits of a token that is not to be sampled; vLLM takes no less."""
_SEEDS = (1 << 62) - 1
"""Seeds are signed 64-bit numbers in vLLM, also those of a prompt's last completion."""
_LEAST = -500.0
"""A log-probability below this stands for a token that cannot be sampled."""


_Drawn = tuple[list[int], list[float]]
"""The tokens of a completion, and their log-probabilities."""


class _Wrong(Exception):
    """The answer is incomplete, or is not what was asked for."""


class _Clock:
    """How long a server that gives nothing is still waited for."""

    def __init__(self, patience_s: float) -> None:
        self._patience = patience_s
        self.touch()

    def touch(self) -> None:
        """It has given something."""
        self._until = time.monotonic() + self._patience

    def left(self) -> float:
        """Seconds."""
        return self._until - time.monotonic()


@dataclass(slots=True)
class _Job:
    """The completions of one prompt. vLLM draws the first with ``seed`` and each next one with one
    more."""

    prompt: Prompt
    seed: int
    count: int


@dataclass(slots=True)
class _State:
    """What is known of the server, which may forget everything when it is restarted."""

    base: str | None = None
    """Name of the model itself; None before the server has been looked at."""
    loaded: str | None = None
    """Name of the adapter that the server knows."""
    guard: threading.Lock = field(default_factory=threading.Lock)


class VllmRollouts(Endings):
    """Draws from a vLLM server; a :class:`~mmemo.generation.rollout.JoiningEngine`.

    Args:
        client: of the server that this rank uses.
        folder: where adapters are handed over; the server sees it under the same path.
        name: of the run, with which the names of its adapters begin.
        rank: only rank 0 writes adapters; the others wait for them.
        media: inputs of the encoders, for native models.
        server: the server, where this process started it.
        scored: whether the log-probabilities must be those that training needs.
    """

    exact = False
    """The log-probabilities are the server's, whose kernels round otherwise."""

    def __init__(
        self,
        tokenizer: Any,
        backbone: nn.Module,
        config: RolloutConfig,
        client: VllmClient,
        folder: Path,
        name: str,
        *,
        opened: str = "",
        rank: int = 0,
        media: Clips | None = None,
        server: Started | None = None,
        scored: bool = True,
    ) -> None:
        super().__init__(tokenizer, backbone, opened=opened)
        self.config, self.client, self.name = config, client, name
        self.folder, self.rank, self.media = folder.resolve(), rank, media
        self.server, self.scored, self._server = server, scored, _State()

    def generate(
        self, model: nn.Module, prompts: Mapping[str, Any], seeds: Sequence[int]
    ) -> Rollouts:
        """See :class:`~mmemo.generation.rollout.RolloutEngine`.

        Raises:
            ConfigError: the model, its media or the server's settings do not fit.
            RolloutError: the server gives no right answer in the time that it has.
        """
        return self.generate_all(model, [(prompts, seeds)])[0]

    @torch.no_grad()
    def generate_all(
        self, model: nn.Module, batches: Sequence[tuple[Mapping[str, Any], Sequence[int]]]
    ) -> list[Rollouts]:
        """:meth:`generate` for several batches. Hands the adapter over even if there are none,
        because other ranks may have some."""
        clock = _Clock(self.config.vllm.patience_s)
        backbone: Any = getattr(unwrap(model), "backbone", None)
        jobs = [
            _Job(prompt, own[0] & _SEEDS, len(own))
            for prompts, seeds in batches
            for prompt, own in _grouped(read_prompts(prompts, backbone, self.media), seeds)
        ]
        with self._awake(clock):
            version = self._hand_over(model, clock)
            drawn = self._draw(jobs, version, clock) if jobs else []
        found: list[Rollouts] = []
        for prompts, seeds in batches:
            mine, drawn = drawn[: len(seeds)], drawn[len(seeds) :]
            found.append(self._rollouts(mine, version, prompts["input_ids"].device))
        return found

    def check(self) -> None:
        """Wait for the server, and look at how it gives log-probabilities.

        Raises:
            ConfigError: it gives others than training needs, or takes no adapters.
            RolloutError: it does not answer.
        """
        clock = _Clock(self.config.vllm.patience_s)
        with self._awake(clock), self._server.guard:
            self._look(clock)

    def close(self) -> None:
        """End the server, if this process started it; else have it forget this run's adapter."""
        name = self._server.loaded
        if self.server is not None:
            self.server.stop()
        elif name is not None:
            with suppress(Unavailable, Refused):
                self.client.unload(name, _FAREWELL)
        if self.rank == 0 and name is not None:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            with suppress(OSError):  # what others have there stays
                self.folder.rmdir()

    # Handing over

    def _hand_over(self, model: nn.Module, clock: _Clock) -> str:
        """The name under which the server knows the weights of now."""
        found = adapters.current(model)
        with self._server.guard:
            if found is None:
                self._look(clock)
                assert self._server.base is not None
                return self._server.base
            name = f"{self.name}-{found.version}"
            if self.rank == 0 and not (self.folder / name).exists():
                self._write(found, name)
            if self._server.loaded != name:
                self._load(name, clock)
        return name

    def _write(self, found: adapters.Adapter, name: str) -> None:
        """Write the adapter, and remove those that this run has written before."""
        try:
            found.write(self.folder / name)
        except OSError as error:
            raise RolloutError(
                f"{self.folder}: the adapter cannot be written for vLLM ({error}); free the disk, "
                "or set rollout.vllm.adapter_dir"
            ) from error
        for old in self.folder.glob(f"*{self.name}-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def _load(self, name: str, clock: _Clock) -> None:
        """Have the server load an adapter, and forget those of earlier steps."""
        self._look(clock)
        folder = self.folder / name
        while not folder.exists():  # that of rank 0
            if clock.left() <= 0:
                raise RolloutError(
                    f"rank {self.rank} found no {folder} in time; rollout.vllm.adapter_dir must be "
                    "a folder that all ranks and servers see, and the ranks' weights must agree"
                )
            time.sleep(_WATCH)
        try:
            self._patiently(clock, lambda: self.client.load(name, str(folder)))
        except UnknownName as error:
            raise ConfigError(
                f"{self.client.url} does not load the adapter {folder} ({error}); start vLLM with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, where it sees that folder"
            ) from error
        except Refused as error:
            raise ConfigError(
                f"{self.client.url} refuses the adapter ({error}); start vLLM with --enable-lora "
                "and a --max-lora-rank of at least model.lora.r"
            ) from error
        self._server.loaded = name
        with suppress(Refused):  # it only takes memory there
            self._patiently(clock, lambda: self._forget(name))

    def _forget(self, name: str) -> None:
        for one in self.client.models():
            own = str(one.get("id"))
            # Whoever draws with new weights knows that no rank draws with older ones any more.
            if own.startswith(f"{self.name}-") and own != name:
                self.client.unload(own)

    def _look(self, clock: _Clock) -> None:
        """Wait for the server and check it, unless that is done."""
        if self._server.base is not None:
            return
        try:
            served = self._patiently(clock, self.client.models)
            names = [str(one.get("id")) for one in served if one.get("parent") is None]
            if not names:
                raise ConfigError(f"{self.client.url} serves no model; start vLLM with one")
            self._patiently(clock, lambda: self._check_mode(names[0]))
        except UnknownName as error:
            raise ConfigError(
                f"{self.client.url} has no {GENERATE} ({error}); start vLLM 0.32 or newer with "
                "--enable-scale-out"
            ) from error
        except Refused as error:
            raise ConfigError(
                f"{self.client.url} refuses a first request ({error}); check its address and "
                "rollout.vllm.api_key_env"
            ) from error
        self._server.base = names[0]

    def _check_mode(self, model: str) -> None:
        if self.scored:
            check_mode(self.client, model, self.config)
        else:
            first_tokens(self.client, model, 1.0)

    def _patiently(self, clock: _Clock, call: Callable[[], Any]) -> Any:
        """What the call gives, repeated while the server is not available.

        Raises:
            RolloutError: it was not until the time was over.
            Refused: the server refuses.
        """
        pause = _PAUSE
        while True:
            try:
                found = call()
                clock.touch()
                return found
            except Unavailable as error:
                self._check_alive()
                if clock.left() < pause:
                    raise self._lost(str(error)) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _check_alive(self) -> None:
        if self.server is not None:
            self.server.check_alive()

    def _lost(self, why: str) -> RolloutError:
        return RolloutError(
            f"the vLLM server at {self.client.url} gave no completions within "
            f"{self.config.vllm.patience_s:g} s ({why}); start it again and run the same command, "
            "or raise rollout.vllm.patience_s"
        )

    @contextmanager
    def _awake(self, clock: _Clock) -> Generator[None]:
        """The server's weights are on the GPU while this lasts; only with ``colocate`` do they
        leave it in between."""
        if not self.config.vllm.colocate:
            yield
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the server needs what training has freed
        self._switch(clock, self.client.wake)
        yield
        # Not after an error, of which this would only hide the reason.
        self._switch(clock, self.client.sleep)

    def _switch(self, clock: _Clock, call: Callable[[], None]) -> None:
        try:
            self._patiently(clock, call)
        except Refused as error:
            raise ConfigError(
                f"{self.client.url} neither sleeps nor wakes ({error}); leave what vLLM is started "
                "with to mmemo, or set rollout.vllm.colocate: false"
            ) from error

    # Drawing

    def _draw(self, jobs: Sequence[_Job], name: str, clock: _Clock) -> list[_Drawn]:
        """The completions of all jobs, one behind the other."""
        stop = threading.Event()

        def one(job: _Job) -> list[_Drawn]:
            try:
                return self._one(job, name, clock, stop)
            except BaseException:
                stop.set()  # the others need not go on
                raise

        workers = min(self.config.vllm.concurrency, len(jobs))
        with ThreadPoolExecutor(workers, thread_name_prefix="mmemo-vllm") as pool:
            futures = [pool.submit(one, job) for job in jobs]
            try:
                return [drawn for future in futures for drawn in future.result()]
            except BaseException as error:
                stop.set()
                pool.shutdown(cancel_futures=True)
                # The first to fail says why; those that were told to stop do not.
                for future in futures:
                    cause = None if future.cancelled() else future.exception()
                    if cause is not None and not isinstance(cause, _Stopped):
                        raise cause from error
                raise

    def _one(self, job: _Job, name: str, clock: _Clock, stop: threading.Event) -> list[_Drawn]:
        """The completions of a job, with all the retries that they may need."""
        wrong, pause = 0, _PAUSE
        while True:
            left = clock.left()
            if stop.is_set() or left <= 0:
                raise _Stopped if stop.is_set() else self._lost("its time is over")
            try:
                reply = self.client.generate(self._body(job, name), left)
                found = self._read(reply, job, name)
                clock.touch()
                return found
            except Unavailable as error:
                self._check_alive()
                why: Exception = error
            except UnknownName as error:
                # It was restarted and has forgotten the adapter.
                why, wrong = error, wrong + 1
                self._again(name, clock)
            except Refused as error:
                raise RolloutError(
                    f"the vLLM server at {self.client.url} refuses a prompt: {error}"
                ) from error
            except _Wrong as error:
                why, wrong = error, wrong + 1
            if wrong > self.config.vllm.max_retries:
                raise RolloutError(
                    f"the vLLM server at {self.client.url} answered wrongly {wrong} times, most "
                    f"recently because {why}; nothing was trained on it: check the server and "
                    "start again"
                ) from why
            if clock.left() < pause:
                raise self._lost(str(why)) from why
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _again(self, name: str, clock: _Clock) -> None:
        """Look at the server anew, and load the adapter again if it does not know it."""
        with self._server.guard:
            try:
                known = self._patiently(clock, self.client.models)
            except Refused as error:
                raise self._lost(str(error)) from error
            if any(one.get("id") == name for one in known):
                return  # another thread was faster
            self._server.base = self._server.loaded = None
            if name.startswith(f"{self.name}-"):
                self._load(name, clock)
            else:
                self._look(clock)

    def _body(self, job: _Job, name: str) -> dict[str, Any]:
        config = self.config
        sampling: dict[str, Any] = {
            "n": job.count,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": config.min_p or 0.0,
            "seed": job.seed,
            "max_tokens": config.max_completion_length,
            # The trainer's own end tokens, and not what the server takes for such.
            "ignore_eos": True,
            "stop_token_ids": self.stops,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        if self.never:
            sampling["logit_bias"] = {str(token): _NEVER for token in self.never}
        body: dict[str, Any] = {
            "model": name,
            "token_ids": job.prompt.ids,
            "sampling_params": sampling,
            "return_token_ids": True,
        }
        features = job.prompt.features
        return body if features is None else {**body, "features": features}

    def _read(self, reply: Mapping[str, Any], job: _Job, name: str) -> list[_Drawn]:
        """The completions of a reply, after every check that it can be held to.

        Raises:
            _Wrong: it is incomplete, or by other weights, or to another prompt.
        """
        if reply.get("model") != name:
            raise _Wrong(f"'{reply.get('model')}' answered in place of '{name}'")
        if reply.get("prompt_token_ids") != job.prompt.ids:
            raise _Wrong("it answered to another prompt")
        choices: Any = reply.get("choices")
        if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
            raise _Wrong("it gave no completions")
        by_index = {one.get("index"): one for one in choices}
        if len(choices) != job.count or set(by_index) != set(range(job.count)):
            raise _Wrong(f"it gave {len(choices)} completions in place of {job.count}")
        return [self._completion(by_index[at]) for at in range(job.count)]

    def _completion(self, choice: Mapping[str, Any]) -> _Drawn:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
            raise _Wrong("a completion has no tokens")
        content: Any = (choice.get("logprobs") or {}).get("content")
        if not isinstance(content, list) or len(content) != len(ids):
            raise _Wrong("log-probabilities are missing")
        logps: list[float] = []
        for token, one in zip(ids, content, strict=True):
            value = one.get("logprob")
            if one.get("token_id") != token:
                raise _Wrong("log-probabilities are those of other tokens")
            if not isinstance(value, int | float) or not _LEAST < value < 1e-3:
                raise _Wrong(f"a log-probability is {value}")
            logps.append(min(float(value), 0.0))
        self._check_end(ids, choice.get("finish_reason"))
        return ids, logps

    def _check_end(self, ids: Sequence[int], reason: object) -> None:
        longest = self.config.max_completion_length
        if set(ids[:-1]) & set(self.stops):
            raise _Wrong("a completion goes on after its end token")
        if set(ids) & set(self.never):
            raise _Wrong("a completion has a token that must not be sampled")
        ended, full = ids[-1] in self.stops, len(ids) == longest
        if len(ids) > longest or not (ended or full) or reason not in ("stop", "length"):
            raise _Wrong(f"a completion of {len(ids)} tokens ended for the reason '{reason}'")

    def _rollouts(self, drawn: Sequence[_Drawn], version: str, device: torch.device) -> Rollouts:
        width = max(len(ids) for ids, _ in drawn)
        # Only rows that have ended are shorter than the longest, and what follows is hidden.
        ids = torch.full((len(drawn), width), self.stops[0], dtype=torch.long)
        logps = torch.zeros(ids.shape)
        for row, (tokens, values) in enumerate(drawn):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            logps[row, : len(tokens)] = torch.tensor(values)
        stops = torch.tensor(self.stops, dtype=torch.long, device=device)
        return self.finish(ids.to(device), logps.to(device), stops, version)


class _Stopped(Exception):
    """Another completion has failed, and this one is not drawn."""


def _grouped(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Prompt, Sequence[int]]]:
    """Each prompt with its seeds."""
    if not seeds or len(seeds) % len(prompts):
        raise ValueError(f"{len(seeds)} seeds do not make whole groups for {len(prompts)} prompts")
    group = len(seeds) // len(prompts)
    return [(prompt, seeds[at * group : (at + 1) * group]) for at, prompt in enumerate(prompts)]
