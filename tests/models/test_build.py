from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models.adapters import lora
from mmemo.models.build import ModelConfig, load_model, set_trainable
from mmemo.models.composed.scratch import TAGS, train_tokenizer
from tests.models.parts import TEXTS, clip, features, shake, tiny, turns, values

TOKENIZER = train_tokenizer(TEXTS, 400)


def saved(folder: Path, lm: Any, tokenizer: Any = None) -> str:
    lm.save_pretrained(folder)
    (tokenizer or train_tokenizer(TEXTS, 400)).save_pretrained(folder)
    return str(folder)


def bare(folder: Path) -> Any:
    """A tokenizer that knows no media tokens, as pretrained ones do not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain.train_from_iterator(TEXTS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>")
    wrapped.chat_template = TOKENIZER.chat_template
    wrapped.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def small(kind: type[Any], **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        **changes,
    }


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_scratch_tokenizer_loses_nothing(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_scratch_tokenizer_keeps_tags_and_drops_specials() -> None:
    text = "<think>low brows</think><answer>angry</answer>"
    ids = TOKENIZER(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    for tag in TAGS:
        assert len(TOKENIZER(tag, add_special_tokens=False)["input_ids"]) == 1
    again = train_tokenizer(TEXTS, 400)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_scratch_needs_texts() -> None:
    with pytest.raises(ConfigError, match="no texts"):
        load_model(parse(ModelConfig, values()), [" "])


def test_the_seed_decides_new_weights() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (tiny(seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    for part in ("connectors.video.proj.0.weight", "vision_tower", "language_model"):
        name = next(key for key in one if part in key and key.endswith("weight"))
        assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_lm_keeps_its_answers_and_grows_by_the_media_tokens(
    tmp_path: Path, tied: bool
) -> None:
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(**small(Qwen2Config, tie_word_embeddings=tied))).eval()
    tokenizer = bare(tmp_path)
    loaded = tiny(text=saved(tmp_path, lm, tokenizer))
    model: Any = loaded.model
    ids = torch.tensor([tokenizer("Which emotion?")["input_ids"]])
    with torch.no_grad():
        expected = lm(input_ids=ids).logits
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found[..., :280], expected)
    assert found.shape[-1] == len(loaded.processor.tokenizer) > 280
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    # New rows are ordinary: none of them can win by chance.
    assert found[..., 280:].abs().max() < expected.abs().max()
    row = loaded.processor.render(turns("Which?", "sad"), generation=False, modalities=())
    assert row.labels[-2] == tokenizer.eos_token_id
    assert loaded.processor.tokenizer.pad_token_id is not None
    full = tmp_path / "full"
    lora.save_full(model, loaded.processor, full)
    again: Any = load_model(ModelConfig(path=str(full))).model
    torch.testing.assert_close(again(input_ids=ids).logits, found)


def test_spare_embedding_rows_are_used_first(tmp_path: Path) -> None:
    lm = Qwen2ForCausalLM(Qwen2Config(**small(Qwen2Config, vocab_size=300)))
    model: Any = tiny(text=saved(tmp_path, lm, bare(tmp_path))).model
    assert model.get_input_embeddings().weight.shape[0] == 300


def other_lm(name: str) -> Any:
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2))
    return PhiForCausalLM(PhiConfig(**small(PhiConfig, vocab_size=400)))


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_other_causal_lms(tmp_path: Path, name: str) -> None:
    """Other names of the embedding, a head with a bias, Conv1D in place of linear layers."""
    torch.manual_seed(0)
    lm = other_lm(name).eval()
    if name == "phi":
        torch.nn.init.normal_(lm.lm_head.bias)
    loaded = tiny(text=saved(tmp_path, lm), dtype="float32")
    model: Any = loaded.model
    ids = torch.tensor([[50, 60, 70]])
    expected = lm(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    lora.save_full(model, loaded.processor, tmp_path / "full")
    config = parse(ModelConfig, {"path": str(tmp_path / "full"), "lora": {"r": 2}})
    again: Any = load_model(config, base_dir=tmp_path / "base").model
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
    hit = {n.split(".lora_")[0] for n, _ in again.named_parameters() if "lora_A" in n}
    assert len(hit) == {"gpt2": 8, "phi": 12}[name]
    inner = lora.unwrap(again)
    tied = inner.lm_head.weight is inner.get_input_embeddings().weight
    assert tied is (name == "gpt2")


def test_what_some_lms_do_to_their_logits(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    common = small(GraniteConfig, vocab_size=400)
    lms = [
        GraniteForCausalLM(GraniteConfig(**common, logits_scaling=4.0)),
        Gemma2ForCausalLM(Gemma2Config(**common, head_dim=16, final_logit_softcapping=0.05)),
    ]
    for lm in lms:
        ids = torch.tensor([[50, 60, 70]])
        folder = saved(tmp_path / lm.config.model_type, lm.eval())
        model: Any = tiny(text=folder).model
        torch.testing.assert_close(model(input_ids=ids).logits, lm(input_ids=ids).logits)


def test_the_shipped_recipe_of_real_parts_is_a_config() -> None:
    from mmemo import content
    from mmemo.config import load_config
    from mmemo.train.sft import SftConfig

    config = load_config(SftConfig, content.find("train_configs/small_real/sft.yaml"))
    model = config.model
    assert (model.dtype, config.train.bf16) == ("bfloat16", True)
    assert model.lora is not None
    for branch in (model.video, model.audio, model.face):
        assert branch is not None
        assert branch.encoder is not None
        assert branch.encoder.count("/") == 1  # a hub id


def test_parts_or_path_but_not_both() -> None:
    with pytest.raises(ConfigError, match="either path or parts"):
        parse(ModelConfig, values(path="somewhere"))
    with pytest.raises(ConfigError, match="at least text"):
        parse(ModelConfig, {})
    with pytest.raises(ConfigError, match="exactly one of encoder"):
        tiny(video={"tokens": 2})
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        tiny(video={"encoder": "x", "token": 2})
    with pytest.raises(ConfigError, match="fusion needs"):
        tiny(audio=None)


def test_wrong_names_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a model nor an adapter folder"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="causal LM"):
        tiny(text=str(tmp_path))
    lm = Qwen2ForCausalLM(Qwen2Config(**small(Qwen2Config)))
    with pytest.raises(ConfigError, match="not a saved mmemo model"):
        load_model(ModelConfig(path=saved(tmp_path / "lm", lm)))


def test_saved_model_loads_with_its_sampling(tmp_path: Path) -> None:
    loaded = tiny()
    lora.save_full(loaded.model, loaded.processor, tmp_path)  # type: ignore[arg-type]
    config: dict[str, Any] = {"path": str(tmp_path)}
    again: Any = load_model(parse(ModelConfig, config)).model
    assert again.sampling == loaded.processor.sampling
    same = {**config, "sampling": values()["sampling"]}
    load_model(parse(ModelConfig, same))
    with pytest.raises(ConfigError, match="sampling differs"):
        load_model(parse(ModelConfig, {**config, "sampling": {"frames": 9}}))
    file = tmp_path / "processor_config.json"
    changed = json.loads(file.read_text())
    changed["sampling"]["frames"] = 5
    file.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="disagree"):
        load_model(parse(ModelConfig, config))


@pytest.mark.parametrize(
    ("parts", "learns", "rests"),
    [
        (["connectors"], [".video.", ".audio."], ["language_model", "fusion"]),
        (["audio"], [".audio."], [".video.", "language_model"]),
        (["fusion"], ["fusion"], ["connectors", "language_model"]),
        (["lm"], ["language_model"], ["connectors", "fusion"]),
    ],
)
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_set_trainable(
    parts: list[str], learns: list[str], rests: list[str], lora: dict[str, Any] | None
) -> None:
    model: Any = tiny(lora=lora).model
    names = set_trainable(model, parts)
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for part in learns:
        assert any(part in name for name in names)
    for part in [*rests, "tower", "original_module"]:
        assert not any(part in name for name in names)
    if lora and "lm" in parts:
        assert all("lora_" in name for name in names)


@pytest.mark.parametrize("kind", ["attention", "qformer"])
def test_every_weight_of_the_fusion_learns(kind: str) -> None:
    """Its picture side is called `visual`, as the frozen encoder of Qwen2.5-VL is."""
    model: Any = tiny(fusion={"kind": kind}).model
    names = set_trainable(model, ["fusion"])
    assert sorted(names) == sorted(n for n, _ in model.named_parameters() if ".fusion." in n)
    assert any(".visual." in name for name in names)


def test_set_trainable_refuses_unknown_parts() -> None:
    model = tiny(face=None, fusion=None).model
    for part in ("face", "fusion", "encoders"):
        with pytest.raises(ConfigError, match=f"'{part}' is unknown"):
            set_trainable(model, [part])
    with pytest.raises(ConfigError, match="select no parameters"):
        set_trainable(model, [])


def test_a_few_steps_lower_the_loss() -> None:
    loaded = tiny()
    model: Any = loaded.model
    shake(model, 0.02)
    params = [
        p
        for n, p in model.named_parameters()
        if n in set(set_trainable(model, ["lm", "connectors", "fusion"]))
    ]
    found = [features(loaded, clip(seed)) for seed in range(2)]
    batch = loaded.processor(["<video><audio>A", "<video><audio>B"], found)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = torch.tensor([100, 200])
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    losses: list[float] = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_text_only_model(tmp_path: Path) -> None:
    loaded = tiny(video=None, audio=None, face=None, fusion=None)
    model: Any = loaded.model
    batch = loaded.processor(["Which emotion?", "Why?"])
    logits = model(**batch).logits
    lora.save_full(model, loaded.processor, tmp_path)
    again: Any = load_model(ModelConfig(path=str(tmp_path))).model
    assert torch.equal(again(**batch).logits, logits)
    assert model.generate(**batch, max_new_tokens=2).shape[0] == 2
