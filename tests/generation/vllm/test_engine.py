"""What the engine asks of a server, what it takes from it, and what it does when that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.config import parse
from mmemo.errors import ConfigError, RolloutError
from mmemo.generation.rollout import RolloutConfig, Rollouts
from mmemo.generation.vllm import engine as engines
from mmemo.generation.vllm.connect import connect
from mmemo.generation.vllm.engine import VllmRollouts
from mmemo.models.build import Loaded, ModelConfig, load_model
from mmemo.models.layouts import vllm_name
from tests.generation.vllm.fake import BASE, Fake, fake_vllm
from tests.models.native_files import FED, save_omni, save_vl
from tests.models.parts import shake, tiny

GENERATE, LOAD, UNLOAD = (
    "/inference/v1/generate",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
GROUP = 3
SEEDS = [7, 8, 9, (1 << 63) - 1, 5, 6]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = save_omni(tmp_path_factory.mktemp("omni"))
    lora = {"r": 4, "lora_dropout": 0.0}
    found = load_model(parse(ModelConfig, {"path": str(folder), "lora": lora, "native": FED}))
    found.model.eval()
    return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(engines, "_PAUSE", 0.01)
    with fake_vllm() as found:
        yield found


def engine(loaded: Loaded, fake: Fake, folder: Path, rank: int = 0, **changes: Any) -> VllmRollouts:
    server = {"url": fake.url, "patience_s": 5.0, "timeout_s": 2.0, **changes.pop("vllm", {})}
    values = {"num_generations": GROUP, "max_completion_length": 6, **changes}
    config = parse(RolloutConfig, {**values, "engine": "vllm", "vllm": server})
    return connect(config, loaded, folder, rank=rank)


def prompts(*lengths: int) -> dict[str, Any]:
    """Prompts of text, padded on the left."""
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = torch.arange(100, 100 + mask.numel()).view_as(mask) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "modality_ids": torch.zeros_like(mask),
        "clip_index": torch.full((len(lengths),), -1),
        "sample_ids": [f"row-{n}" for n in lengths],
    }


def drawn(loaded: Loaded, fake: Fake, folder: Path, **changes: Any) -> Rollouts:
    made = engine(loaded, fake, folder, **changes)
    return made.generate(loaded.model, prompts(3, 5), SEEDS)


def test_a_prompt_is_asked_for_as_the_trainer_has_it(
    loaded: Loaded, fake: Fake, tmp_path: Path
) -> None:
    given = prompts(3, 5)
    made = engine(loaded, fake, tmp_path, top_k=40)
    found = made.generate(loaded.model, given, SEEDS)
    asked = {len(body["token_ids"]): body for body in fake.asked()}
    assert sorted(asked) == [3, 5]
    assert asked[3]["token_ids"] == given["input_ids"][0, 2:].tolist()
    assert asked[5]["token_ids"] == given["input_ids"][1].tolist()
    assert asked[3]["model"] == asked[5]["model"] == found.version
    sampling = asked[3]["sampling_params"]
    never = loaded.model.generation_config.suppress_tokens
    assert len(never) == 3
    assert sampling == {
        "n": GROUP,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 40,
        "min_p": 0.0,
        "seed": 7,
        "max_tokens": 6,
        "ignore_eos": True,
        "stop_token_ids": made.stops,
        "logprobs": 0,
        "detokenize": False,
        "logit_bias": {str(token): -100.0 for token in never},
    }
    # vLLM counts on from it, and its seeds are signed 64-bit numbers.
    assert asked[5]["sampling_params"]["seed"] + GROUP < 1 << 63
    assert "features" not in asked[3]
    assert not made.exact


def test_what_the_server_drew_is_taken_prompt_by_prompt(
    loaded: Loaded, fake: Fake, tmp_path: Path
) -> None:
    def backwards(path: str, body: dict[str, Any], reply: dict[str, Any], number: int) -> None:
        reply.get("choices", []).reverse()

    fake.fault = backwards
    made = engine(loaded, fake, tmp_path)
    given = [(prompts(3), SEEDS[:3]), (prompts(5, 4), SEEDS)]
    found = made.generate_all(loaded.model, given)
    assert [len(one.texts) for one in found] == [3, 6]
    for one, (batch, seeds) in zip(found, given, strict=True):
        for row in range(len(one.texts)):
            first = seeds[row - row % GROUP] & ((1 << 62) - 1)
            sampling = {"seed": first, "max_tokens": 6, "stop_token_ids": made.stops}
            wanted = fake._choice({**sampling, "temperature": 1.0}, row % GROUP)["token_ids"]
            size = int(one.mask[row].sum())
            assert one.ids[row, :size].tolist() == wanted
            assert bool(one.ended[row]) is (wanted[-1] in made.stops)
            assert one.logps[row].tolist() == [-1.5] * size + [0.0] * (len(one.ids[row]) - size)
        assert one.version.startswith("mmemo-")
        assert len(batch["input_ids"]) * GROUP == len(one.ids)
    with pytest.raises(ValueError, match="whole groups"):
        made.generate(loaded.model, prompts(3, 5), SEEDS[:3])


def test_the_adapter_is_handed_over_when_it_has_changed(
    loaded: Loaded, fake: Fake, tmp_path: Path
) -> None:
    made = engine(loaded, fake, tmp_path)
    first = made.generate(loaded.model, prompts(3), SEEDS[:3]).version
    again = made.generate(loaded.model, prompts(4), SEEDS[:3]).version
    assert again == first
    assert fake.paths().count(LOAD) == 1
    held = {n: p.detach().clone() for n, p in loaded.model.named_parameters() if "lora_" in n}
    shake(loaded.model, 0.1)
    try:
        second = made.generate(loaded.model, prompts(3), SEEDS[:3]).version
        assert made.generate_all(loaded.model, []) == []
        weights = {n: p for n, p in loaded.model.named_parameters() if "lora_" in n}
        sent = fake.loaded[second]
        assert sent["config"]["r"] == 4
        assert set(sent["config"]["target_modules"]) >= {"q_proj", "down_proj"}
        assert len(sent["weights"]) == len(weights)
        for name, value in weights.items():
            told = vllm_name("qwen2_5_omni_thinker", name.replace(".default", ""))
            assert torch.equal(sent["weights"][told], value)
        assert second != first
        assert {body["model"] for body in fake.asked()} == {first, second}
        # The server and the disk hold the newest alone.
        assert list(fake.adapters) == [second]
        assert [x.name for x in (tmp_path / "rollout_adapters").iterdir()] == [second]
    finally:
        parameters = dict(loaded.model.named_parameters())
        for name, value in held.items():
            parameters[name].data.copy_(value)
    # The same weights have the same name again.
    assert made.generate(loaded.model, prompts(3), SEEDS[:3]).version == first
    made.close()
    assert not fake.adapters
    assert not (tmp_path / "rollout_adapters").exists()


def test_runs_on_one_server_do_not_meet(loaded: Loaded, fake: Fake, tmp_path: Path) -> None:
    one, other = (engine(loaded, fake, tmp_path / name) for name in ("one", "other"))
    first = one.generate(loaded.model, prompts(3), SEEDS[:3]).version
    second = other.generate(loaded.model, prompts(3), SEEDS[:3]).version
    assert first != second
    assert sorted(fake.adapters) == sorted([first, second])


def test_ranks_wait_for_the_first_to_write(loaded: Loaded, fake: Fake, tmp_path: Path) -> None:
    first, second = (engine(loaded, fake, tmp_path, rank=rank) for rank in (0, 1))
    found: list[str] = []
    waiting = threading.Thread(
        target=lambda: found.append(second.generate(loaded.model, prompts(3), SEEDS[:3]).version)
    )
    waiting.start()
    time.sleep(0.2)
    assert not found
    assert LOAD not in fake.paths()
    assert first.generate_all(loaded.model, []) == []  # a rank without prompts
    waiting.join(10)
    assert found == list(fake.adapters)
    second.close()
    assert not fake.adapters
    assert (tmp_path / "rollout_adapters" / found[0]).exists()  # the first rank's to remove
    late = engine(loaded, fake, tmp_path / "other", rank=1, vllm={"patience_s": 0.3})
    with pytest.raises(RolloutError, match=r"rank 1 found no .* in time"):
        late.generate(loaded.model, prompts(3), SEEDS[:3])


def test_a_model_without_an_adapter_is_asked_for_by_its_own_name(
    fake: Fake, tmp_path: Path
) -> None:
    plain = load_model(parse(ModelConfig, {"path": str(save_omni(tmp_path / "omni"))}))
    found = engine(plain, fake, tmp_path).generate(plain.model, prompts(3), SEEDS[:3])
    assert found.version == BASE
    assert LOAD not in fake.paths()


Change = Callable[[dict[str, Any]], None]


def change(key: str, value: Any) -> Change:
    return lambda reply: reply["choices"][1].update({key: value})


WRONG: dict[str, tuple[Change, str]] = {
    "other weights": (lambda reply: reply.update(model=BASE), f"'{BASE}' answered in place of"),
    "other prompt": (lambda reply: reply.update(prompt_token_ids=[1]), "another prompt"),
    "fewer choices": (lambda reply: reply["choices"].pop(), "2 completions in place of 3"),
    "no choices": (lambda reply: reply.pop("choices"), "gave no completions"),
    "twice the same": (change("index", 0), "3 completions in place of 3"),
    "no tokens": (change("token_ids", []), "has no tokens"),
    "words": (change("token_ids", ["a"]), "has no tokens"),
    "no logprobs": (change("logprobs", None), "log-probabilities are missing"),
    "other ids": (
        lambda reply: reply["choices"][1]["logprobs"]["content"][0].update(token_id=19),
        "those of other tokens",
    ),
    "short logprobs": (lambda reply: reply["choices"][0]["logprobs"]["content"].pop(), "missing"),
    "null": (
        lambda reply: reply["choices"][1]["logprobs"]["content"][0].update(logprob=None),
        "a log-probability is None",
    ),
    "floor": (
        lambda reply: reply["choices"][1]["logprobs"]["content"][0].update(logprob=-9999.0),
        "a log-probability is -9999",
    ),
    "aborted": (change("finish_reason", "abort"), "ended for the reason 'abort'"),
}


def cut(reply: dict[str, Any]) -> None:
    """Ended early and without an end token."""
    for one in reply["choices"]:
        one["token_ids"], one["logprobs"] = [30], {"content": [{"token_id": 30, "logprob": -1.0}]}


def placeholder(reply: dict[str, Any]) -> None:
    for one in reply["choices"]:
        one["token_ids"][0] = one["logprobs"]["content"][0]["token_id"] = PLACEHOLDER


WRONG["cut"] = (cut, "completion of 1 tokens ended for the reason")
WRONG["placeholder"] = (placeholder, "must not be sampled")
PLACEHOLDER = 3  # <|AUDIO|> of the tiny tokenizer


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_asked_for_again_and_never_taken(
    loaded: Loaded, fake: Fake, tmp_path: Path, name: str
) -> None:
    spoil, told = WRONG[name]
    most = 2

    def fault(path: str, body: dict[str, Any], reply: dict[str, Any], number: int) -> None:
        if path == GENERATE and body["model"] != BASE and len(fake.asked()) <= most:
            spoil(reply)

    fake.fault = fault
    made = engine(loaded, fake, tmp_path, vllm={"max_retries": 2})
    found = made.generate(loaded.model, prompts(3), SEEDS[:3])
    assert len(fake.asked()) == 3
    again = made.generate(loaded.model, prompts(3), SEEDS[:3])
    assert torch.equal(found.ids, again.ids)
    most = 1000
    with pytest.raises(RolloutError, match=rf"answered wrongly 3 times.*{told}"):
        made.generate(loaded.model, prompts(3), SEEDS[:3])


@pytest.mark.parametrize("how", [500, 503, 429, 0, 0.6])
def test_a_server_that_fails_for_a_while_is_waited_for(
    loaded: Loaded, fake: Fake, tmp_path: Path, how: float
) -> None:
    def fault(path: str, body: dict[str, Any], reply: dict[str, Any], number: int) -> Any:
        return how if path == GENERATE and number in (2, 3, 4) else None

    fake.fault = fault
    found = drawn(loaded, fake, tmp_path, vllm={"timeout_s": 0.3})
    fake.fault = None
    wanted = drawn(loaded, fake, tmp_path)
    assert torch.equal(found.ids, wanted.ids)
    fake.fault = lambda path, body, reply, number: how if path == GENERATE else None
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"gave no completions within 0\.5 s"):
        drawn(loaded, fake, tmp_path, vllm={"patience_s": 0.5, "timeout_s": 0.3})
    assert time.monotonic() - began < 3


def test_a_server_that_is_gone_or_refuses_is_said(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_PAUSE", 0.01)
    with fake_vllm() as fake:
        made = engine(loaded, fake, tmp_path, vllm={"patience_s": 0.4})
        made.generate(loaded.model, prompts(3), SEEDS[:3])
        fake.fault = lambda path, body, reply, number: 400 if path == GENERATE else None
        with pytest.raises(RolloutError, match="refuses a prompt: it answered 400: it was told"):
            made.generate(loaded.model, prompts(3), SEEDS[:3])
    with pytest.raises(RolloutError, match=r"gave no completions .*refused.*; start it again"):
        made.generate(loaded.model, prompts(3), SEEDS[:3])


def test_a_restarted_server_gets_its_adapter_again(
    loaded: Loaded, fake: Fake, tmp_path: Path
) -> None:
    made = engine(loaded, fake, tmp_path)
    first = made.generate(loaded.model, prompts(3, 5), SEEDS)
    fake.restart()
    second = made.generate(loaded.model, prompts(3, 5), SEEDS)
    assert torch.equal(first.ids, second.ids)
    assert fake.paths().count(LOAD) == 2
    # One that forgets it again and again is given up.
    forgets = True

    def fault(path: str, body: dict[str, Any], reply: dict[str, Any], number: int) -> None:
        if forgets and path == LOAD:
            fake.restart()

    fake.fault = fault
    fake.restart()
    with pytest.raises(RolloutError, match=r"answered wrongly 4 times.*does not exist"):
        made.generate(loaded.model, prompts(3, 5), SEEDS)
    forgets = False
    # It is looked at as a new one: it may have been started with other settings.
    fake.restart()
    fake.mode = "raw_logits"
    with pytest.raises(ConfigError, match="gives logits"):
        made.generate(loaded.model, prompts(3, 5), SEEDS)


@pytest.mark.parametrize(
    ("mode", "changes", "refused"),
    [
        ("raw_logprobs", {}, None),
        ("processed_logprobs", {}, None),
        ("processed_logprobs", {"temperature": 0.7}, None),
        ("raw_logprobs", {"top_p": 0.9}, None),
        ("raw_logprobs", {"temperature": 0.7}, "--logprobs-mode processed_logprobs"),
        ("processed_logprobs", {"top_k": 5}, "--logprobs-mode raw_logprobs"),
        ("processed_logprobs", {"min_p": 0.1}, "--logprobs-mode raw_logprobs"),
        ("processed_logprobs", {"temperature": 0.7, "top_p": 0.9}, "rollout.temperature: 1"),
        ("raw_logits", {}, "gives logits"),
        ("processed_logits", {}, "gives logits"),
    ],
)
def test_the_servers_log_probabilities_must_be_those_of_the_loss(
    loaded: Loaded, fake: Fake, tmp_path: Path, mode: str, changes: dict[str, Any], refused: str
) -> None:
    fake.mode = mode
    made = engine(loaded, fake, tmp_path, **changes)
    if refused is None:
        made.check()
        return
    with pytest.raises(ConfigError, match=refused):
        made.check()
    assert not fake.asked()


def test_a_server_without_what_is_needed_is_told_how_to_start(
    loaded: Loaded, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.lora = False
    with pytest.raises(ConfigError, match=r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"):
        drawn(loaded, fake, tmp_path)
    fake.lora, fake.scale_out = True, False
    with pytest.raises(ConfigError, match="--enable-scale-out"):
        engine(loaded, fake, tmp_path).check()
    fake.scale_out, fake.key = True, "secret"
    with pytest.raises(ConfigError, match="401: Unauthorized"):
        engine(loaded, fake, tmp_path).check()
    with pytest.raises(ConfigError, match=r"its key in \$VLLM_TEST_KEY; set it"):
        engine(loaded, fake, tmp_path, vllm={"api_key_env": "VLLM_TEST_KEY"})
    monkeypatch.setenv("VLLM_TEST_KEY", "secret")
    engine(loaded, fake, tmp_path, vllm={"api_key_env": "VLLM_TEST_KEY"}).check()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"lora": {"r": 4, "use_dora": True}}, "it is a DoRA adapter"),
        ({"lora": {"r": 4, "experts": {}}}, "it has experts per modality"),
        ({"lora": {"r": 4, "modules_to_save": ["embed_tokens"]}}, "it trains tokens or modules"),
    ],
)
def test_models_that_vllm_cannot_serve_are_refused(
    fake: Fake, tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    values = {"path": str(save_omni(tmp_path / "omni")), "native": FED, **model}
    with pytest.raises(ConfigError, match=rf"cannot draw .*{told}.*; set rollout.engine: hf"):
        engine(load_model(parse(ModelConfig, values)), fake, tmp_path)


def test_a_model_built_from_parts_is_refused(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"built from parts.*; set rollout.engine: hf"):
        engine(tiny(), fake, tmp_path)
    assert not fake.seen


def test_a_server_beside_the_rank_sleeps_between_draws(
    loaded: Loaded, fake: Fake, tmp_path: Path
) -> None:
    made = engine(loaded, fake, tmp_path)
    vllm = made.config.vllm.model_copy(update={"url": None, "colocate": True})
    made.config = made.config.model_copy(update={"vllm": vllm})
    fake.asleep = True
    made.check()
    assert fake.asleep
    made.generate(loaded.model, prompts(3), SEEDS[:3])
    assert fake.asleep
    paths = [path for path in fake.paths() if path in ("/wake_up", "/sleep?level=1", LOAD)]
    assert paths == ["/wake_up", "/sleep?level=1", "/wake_up", LOAD, "/sleep?level=1"]


def test_other_native_models_hand_their_adapters_over(fake: Fake, tmp_path: Path) -> None:
    values = {"path": str(save_vl(tmp_path / "vl")), "lora": {"r": 2}, "native": FED}
    loaded = load_model(parse(ModelConfig, values))
    found = engine(loaded, fake, tmp_path).generate(loaded.model, prompts(3), SEEDS[:3])
    assert all(".language_model." in name for name in fake.loaded[found.version]["weights"])
