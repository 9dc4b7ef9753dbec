"""Answers of an evaluation by a vLLM server in place of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemo.config import parse
from mmemo.data.sample import Sample, Turn
from mmemo.errors import ConfigError
from mmemo.evaluation.benchmark import Question
from mmemo.evaluation.config import AnswerGenerationConfig, EvalRunConfig
from mmemo.evaluation.generate import AnswerGenerator, serve
from mmemo.media.config import DecodeConfig
from mmemo.models.build import Loaded, ModelConfig, load_model
from tests.generation.vllm.fake import Fake, fake_vllm
from tests.models.native_files import FED, save_omni


def questions() -> list[Question]:
    turns = [(Turn("user", f"Which emotion ({number})?"),) for number in range(3)]
    samples = [Sample(sample_id=f"row-{at}", turns=own, media={}) for at, own in enumerate(turns)]
    return [Question(one, one.turns, "emotion", None, "sad") for one in samples]


def served(loaded: Loaded, fake: Fake, folder: Path, **generation: Any) -> AnswerGenerator:
    samples, limits = [one.sample for one in questions()], parse(DecodeConfig, {"workers": 1})
    asked = parse(AnswerGenerationConfig, {"max_new_tokens": 6, **generation})
    server = {"url": fake.url, "patience_s": 2.0}
    run = parse(EvalRunConfig, {"engine": "vllm", "vllm": server})
    where: dict[str, Any] = {"media_root": folder, "decode": limits, "max_length": None}
    made = serve(loaded, samples, folder / "vllm-0", generation=asked, run=run, **where)
    return AnswerGenerator(
        *(loaded, samples, None, folder, limits),
        generation=asked,
        seed=0,
        max_length=None,
        run=run,
        served=made,
    )


def test_a_server_answers_as_the_config_asks(tmp_path: Path) -> None:
    lora = {"r": 2, "lora_dropout": 0.0}
    values = {"path": str(save_omni(tmp_path / "omni")), "lora": lora, "native": FED}
    loaded = load_model(parse(ModelConfig, values))
    # No log-probabilities are needed, so their mode does not matter.
    with fake_vllm(mode="processed_logprobs") as fake:
        with served(loaded, fake, tmp_path) as generator:
            found = generator.answer(questions(), "first")
            (name,) = fake.adapters
        assert not fake.adapters
        assert len(found) == 3
        for _, tokens, ended in found:
            assert tokens == 6 or (tokens < 6 and ended)
        asked = fake.asked()
        assert {body["model"] for body in asked} == {name}
        assert {body["sampling_params"]["top_k"] for body in asked} == {1}  # greedy
        assert {body["sampling_params"]["n"] for body in asked} == {1}
        warm = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
        with served(loaded, fake, tmp_path, **warm) as generator:
            generator.answer(questions(), "first")
        last = fake.asked()[-1]["sampling_params"]
        assert (last["temperature"], last["top_p"], last["top_k"]) == (0.7, 0.9, 0)
        for changes, told in (
            ({"repetition_penalty": 1.2}, "repetition_penalty: 1"),
            ({"contrast": {}}, "changes no attention"),
        ):
            with pytest.raises(ConfigError, match=told):
                served(loaded, fake, tmp_path, **changes)
    with pytest.raises(ConfigError, match="need each other"):
        parse(EvalRunConfig, {"engine": "vllm"})
