"""The rollout engine of a config whose completions vLLM draws."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmemo.data.sample import Sample
from mmemo.errors import ConfigError
from mmemo.generation.rollout import RolloutConfig
from mmemo.generation.vllm import adapter as adapters
from mmemo.generation.vllm.client import VllmClient
from mmemo.generation.vllm.engine import VllmRollouts
from mmemo.generation.vllm.modes import mode_for
from mmemo.generation.vllm.prompts import Clips
from mmemo.generation.vllm.server import Started, command, devices, environment
from mmemo.media.config import DecodeConfig
from mmemo.models.adapters.lora import unwrap
from mmemo.models.layouts import max_rank
from mmemo.models.saved import Loaded


def connect(
    config: RolloutConfig,
    loaded: Loaded,
    folder: Path,
    *,
    samples: Sequence[Sample] = (),
    media_root: Path = Path(),
    decode: DecodeConfig | None = None,
    max_length: int | None = None,
    rank: int = 0,
    scored: bool = True,
) -> VllmRollouts:
    """An engine whose server is started if the config says so; its answers are not waited for.

    Args:
        loaded: the model that is drawn from, with its adapter.
        folder: of the run.
        samples: the rows whose clips are sent.
        max_length: most tokens of a prompt, if that is bounded.
        rank: of this process among those of the run.
        scored: whether the log-probabilities are needed, and are therefore checked.

    Raises:
        ConfigError: vLLM cannot draw with this model, or cannot be started.
    """
    section, backbone = config.vllm, unwrap(loaded.model)
    own: Any = getattr(backbone, "backbone", None)
    starts = not section.urls
    # Only a server that is started here is known to read its weights from that folder.
    adapters.check_served(loaded.model, loaded.base if starts else None)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    port = section.port + (local if section.colocate else 0)
    url = section.urls[rank % len(section.urls)] if section.urls else f"http://127.0.0.1:{port}"
    client = VllmClient(url, section.timeout_s, section.api_key_env)
    server = None
    if starts and (section.colocate or local == 0):
        server = _start(config, loaded, folder, port, local, rank, max_length)
    home = folder / "rollout_adapters" if section.adapter_dir is None else Path(section.adapter_dir)
    return VllmRollouts(
        loaded.processor.tokenizer,
        backbone,
        config,
        client,
        home,
        adapters.run_name(folder),
        opened=loaded.processor.opened,
        rank=rank,
        media=None if own is None else Clips(samples, own, media_root, decode or DecodeConfig()),
        server=server,
        scored=scored,
    )


def _start(
    config: RolloutConfig,
    loaded: Loaded,
    folder: Path,
    port: int,
    local: int,
    rank: int,
    max_length: int | None,
) -> Started:
    if loaded.base is None:
        raise ConfigError(
            "there is no model on disk that vLLM could be started with; set model.path to the "
            "released model, and model.lora"
        )
    peft = adapters.adapted(loaded.model)
    active: Any = None if peft is None else peft.active_adapter
    wide: Any = None if peft is None else peft.peft_config[active]
    longest = 0 if max_length is None else max_length + config.max_completion_length
    gpus = devices(config.vllm, os.environ, local)
    arguments = command(
        config.vllm,
        str(loaded.base),
        port,
        gpus,
        mode=mode_for(config),
        rank=max_rank(8 if wide is None else wide.r),
        max_length=longest,
    )
    return Started(arguments, environment(os.environ, gpus), folder / f"vllm-{rank}.log")
