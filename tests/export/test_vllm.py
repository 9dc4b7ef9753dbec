"""vLLM answers with exported models as transformers does, and not as their base.

The tests run in mmemo's environment and start vLLM from the one that ``launch/vllm_env.sh`` makes.
"""

from __future__ import annotations

import ast
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from mmemo.export.stage import export_to
from mmemo.models.layouts import LAYOUTS
from tests.export.native import PROMPTS, greedy, release_omni, release_vl, trained
from tests.export.test_layouts import MAPPERS
from tests.vllm_server import ENVIRONMENT, LIMIT, SMALL, Server, program

COUNT = 12

pytestmark = pytest.mark.vllm
Answers = list[list[int]]


@pytest.fixture(scope="module", autouse=True)
def vllm() -> Path:
    return program()


def answers(server: Server, model: str) -> Answers:
    """The greedy tokens after each prompt."""
    asked = {"model": model, "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    found: Answers = []
    for prompt in PROMPTS:
        body = json.dumps({**asked, "prompt": prompt, "return_token_ids": True}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/completions",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            found.append(json.load(reply)["choices"][0]["token_ids"])
    return found


def no_media(*names: str) -> tuple[str, str]:
    """Text only: the tiny models have no processors for media."""
    return "--limit-mm-per-prompt", json.dumps(dict.fromkeys(names, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``omni`` and ``vl`` as released, and a folder of exports of each."""
    found = tmp_path_factory.mktemp("served")
    release_omni(found / "omni")
    release_vl(found / "vl")
    for kind in ("omni", "vl"):
        trained(found / f"{kind}-run", found / kind)
        out = found / f"{kind}-exports"
        export_to(
            found / f"{kind}-run",
            {"peft": out / "peft", "vllm": out / "vllm", "merged": out / "merged"},
        )
    return found


@pytest.fixture(scope="module")
def served(folder: Path, vllm: Path) -> dict[str, Answers]:
    """vLLM's answers by the name of what it serves. The servers start at the same time."""
    omni, vl = no_media("image", "video", "audio"), no_media("image", "video")

    def adapters(kind: str, *names: str) -> list[str]:
        found = [f"{name}={folder}/{kind}-exports/{name}" for name in names]
        return ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", *found]

    servers: dict[str, Server] = {}
    try:
        for name, path, options in (
            ("omni", folder / "omni", (*omni, *adapters("omni", "vllm", "peft"))),
            ("merged", folder / "omni-exports/merged", omni),
            ("vl", folder / "vl", (*vl, *adapters("vl", "vllm"))),
        ):
            servers[name] = Server(vllm, path, folder / f"{name}.log", *SMALL, *options)
        until = time.monotonic() + LIMIT
        for server in servers.values():
            server.wait(until)
        found = {
            "omni base": answers(servers["omni"], str(folder / "omni")),
            "omni adapter": answers(servers["omni"], "vllm"),
            "omni adapter with PEFT's names": answers(servers["omni"], "peft"),
            "omni merged": answers(servers["merged"], str(folder / "omni-exports/merged")),
            "vl base": answers(servers["vl"], str(folder / "vl")),
            "vl adapter": answers(servers["vl"], "vllm"),
        }
    finally:
        for server in servers.values():
            server.stop()
    return found


@pytest.mark.timeout(500)
def test_vllm_answers_as_transformers_does(folder: Path, served: dict[str, Answers]) -> None:
    classes: dict[str, Any] = {
        "omni": Qwen2_5OmniThinkerForConditionalGeneration,
        "vl": Qwen2_5_VLForConditionalGeneration,
    }
    for kind, made in classes.items():
        base = made.from_pretrained(folder / kind)
        plain = [greedy(base, prompt, COUNT) for prompt in PROMPTS]
        assert served[f"{kind} base"] == plain
        model = PeftModel.from_pretrained(base, str(folder / f"{kind}-exports/peft"))
        own = [greedy(model, prompt, COUNT) for prompt in PROMPTS]
        assert all(one != other for one, other in zip(own, plain, strict=True))
        assert served[f"{kind} adapter"] == own
        if kind == "omni":
            assert served["omni merged"] == own
            # What the table is for: vLLM takes other names without a word, and does nothing.
            assert served["omni adapter with PEFT's names"] == plain


def test_the_table_of_names_is_vllms() -> None:
    """Read from vLLM's files, which are not run."""
    (models,) = ENVIRONMENT.glob("lib/python*/site-packages/vllm/model_executor/models")
    files = {
        "qwen2_5_omni_thinker": ("qwen2_5_omni_thinker", "Qwen2_5OmniThinkerFor"),
        "qwen3_omni_moe_thinker": ("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerFor"),
        "qwen2_vl": ("qwen2_vl", "Qwen2VLFor"),
        "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLFor"),
        "qwen3_vl": ("qwen3_vl", "Qwen3VLFor"),
        "qwen2_audio": ("qwen2_audio", "Qwen2AudioFor"),
    }
    assert set(files) == set(LAYOUTS)
    for kind, (file, begin) in files.items():
        tree = ast.parse((models / f"{file}.py").read_text())
        (found,) = (
            one
            for one in tree.body
            if isinstance(one, ast.ClassDef) and one.name == f"{begin}ConditionalGeneration"
        )
        bases = [ast.unparse(base) for base in found.bases]
        assert ("SupportsLoRA" in bases) is (LAYOUTS[kind].lora is not None), kind
        given = [
            ast.literal_eval(keyword.value)
            for node in found.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hf_to_vllm_mapper"
            for keyword in getattr(node.value, "keywords", [])
            if keyword.arg == "orig_to_new_prefix"
        ]
        if LAYOUTS[kind].lora is not None:
            assert MAPPERS[kind].items() <= given[0].items(), kind
