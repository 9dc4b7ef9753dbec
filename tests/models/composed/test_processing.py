from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from mmemo.data.sample import Turn
from mmemo.errors import ConfigError, DataError
from mmemo.models import MmemoProcessor
from mmemo.models.backbone import AUDIO, FACE, FUSION, TEXT, VIDEO
from mmemo.models.build import Loaded
from tests.models.parts import clip, features, tiny, turns

ALL = ("video", "audio", "face")
ANSWER = "<think>The brows are low.</think><answer>angry</answer>"


@pytest.fixture(scope="module")
def processor(loaded: Loaded) -> MmemoProcessor:
    return loaded.processor


def test_placeholders_become_as_many_tokens_as_the_branch_makes(processor: MmemoProcessor) -> None:
    row = processor.render(turns("<video>\n<audio><face>Which?"), generation=True, modalities=ALL)
    counts = [row.modality_ids.count(kind) for kind in (VIDEO, AUDIO, FACE, FUSION)]
    assert counts == [2, 3, 1, 1]
    # The fusion token stands directly before the first placeholder.
    assert row.modality_ids.index(FUSION) + 1 == row.modality_ids.index(VIDEO)
    assert row.labels == [-100] * len(row.input_ids)
    assert len(row.input_ids) == len(row.modality_ids)
    assert row.text.count("<|audio|>") == 3


def test_fusion_needs_both_streams(processor: MmemoProcessor) -> None:
    for text in ("<audio>Which?", "<video>Which?", "<face><audio>Which?", "Which?"):
        row = processor.render(turns(text), generation=True, modalities=ALL)
        assert FUSION not in row.modality_ids, text


def test_labels_are_the_answer_and_its_end(processor: MmemoProcessor) -> None:
    row = processor.render(turns("<audio>Which?", ANSWER), generation=False, modalities=("audio",))
    learnt = [token for token in row.labels if token != -100]
    assert processor.tokenizer.decode(learnt) == ANSWER + "<|im_end|>"
    assert learnt[-1] == processor.tokenizer.eos_token_id
    prompt = processor.render(turns("<audio>Which?"), generation=True, modalities=("audio",))
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert row.labels[: len(prompt.labels)] == [-100] * len(prompt.labels)
    first = next(i for i, label in enumerate(row.labels) if label != -100)
    assert row.labels[first : first + len(learnt)] == row.input_ids[first : first + len(learnt)]
    # ChatML's line break after the end of the turn is not learnt.
    assert row.labels[-1] == -100


def test_generation_leaves_the_answer_out(processor: MmemoProcessor) -> None:
    asked = processor.render(turns("Which?"), generation=True, modalities=())
    answered = processor.render(turns("Which?", "happy"), generation=True, modalities=())
    assert asked == answered


def test_only_the_last_answer_is_learnt(processor: MmemoProcessor) -> None:
    talk = [
        Turn("system", "You watch faces."),
        Turn("user", "<audio>How loud?"),
        Turn("assistant", "quiet"),
        Turn("user", "Which emotion?"),
        Turn("assistant", "sad"),
    ]
    row = processor.render(talk, generation=False, modalities=("audio",))
    learnt = [token for token in row.labels if token != -100]
    assert processor.tokenizer.decode(learnt) == "sad<|im_end|>"
    assert row.modality_ids.count(AUDIO) == 3


@pytest.mark.parametrize(
    ("text", "modalities", "says"),
    [
        ("<audio><audio>Which?", ALL, "keep one"),
        ("<audio>Which?", ("video",), "no audio file"),
        ("<|audio|>Which?", ALL, "reserved token"),
        ("zero\x00byte", ALL, "zero byte"),
    ],
)
def test_wrong_text_is_refused(
    processor: MmemoProcessor, text: str, modalities: tuple[str, ...], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        processor.render(turns(text, "sad"), generation=False, modalities=modalities)  # type: ignore[arg-type]


def test_rows_without_something_to_learn_are_refused(processor: MmemoProcessor) -> None:
    with pytest.raises(DataError, match="last turn"):
        processor.render(turns("Which?"), generation=False, modalities=())
    with pytest.raises(DataError, match="empty"):
        processor.render(turns("Which?", " "), generation=False, modalities=())
    with pytest.raises(DataError, match="question"):
        processor.render([Turn("assistant", "sad")], generation=False, modalities=())


@pytest.mark.parametrize("token", ["<|video|>", "<|im_end|>", "<|im_start|>", "<|pad|>"])
@pytest.mark.parametrize("place", ["system", "user", "assistant"])
def test_no_turn_may_hold_a_control_token(
    processor: MmemoProcessor, token: str, place: str
) -> None:
    """Else a transcript could end its own turn, or speak as somebody else."""
    said = {"system": "Watch.", "user": "Which?", "assistant": "sad"}
    said[place] += f" {token} more"
    talk = [Turn(role, text) for role, text in said.items()]  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"the {place}'s text holds the reserved token '<\|"):
        processor.render(talk, generation=False, modalities=())


def test_tags_are_no_control_tokens(processor: MmemoProcessor) -> None:
    row = processor.render(turns("Which <b>?", ANSWER), generation=False, modalities=())
    assert "<b>" in row.text


def test_a_branch_that_is_not_there_is_named() -> None:
    processor = tiny(face=None).processor
    with pytest.raises(DataError, match="no face branch"):
        processor.render(turns("<face>Which?"), generation=True, modalities=("face",))


def with_template(template: str) -> MmemoProcessor:
    processor = tiny(video=None, audio=None, face=None, fusion=None).processor
    return MmemoProcessor(processor.tokenizer, chat_template=template)


LOOP = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + END }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(content: str = "m['content']", end: str = "'<|im_end|>'") -> str:
    return LOOP.replace("CONTENT", content).replace("END", end) + PROMPT


def test_template_without_a_line_break() -> None:
    row = with_template(template()).render(turns("Which?", "sad"), generation=False, modalities=())
    assert row.labels[-1] == row.input_ids[-1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (template(end="'\n'"), r"learn to stop; set model\.eos_token"),
        (template(content="'...'"), r"changes the assistant's text; set model\.chat_template_path"),
        (template().replace("assistant\n", "model\n"), r"prompt; set model\.chat_template_path"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_template(given).render(turns("Which?", "sad"), generation=False, modalities=())


def test_round_trip(processor: MmemoProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = MmemoProcessor.from_pretrained(tmp_path)
    assert again.sampling == processor.sampling
    assert again.sampling.frames == 4
    assert again.token_counts == processor.token_counts
    assert again.fusion_visual == "video"
    question = turns("<video><audio>Which?", ANSWER)
    rows = [p.render(question, generation=False, modalities=ALL) for p in (processor, again)]
    assert rows[0] == rows[1]
    assert isinstance(again, MmemoProcessor)
    assert "sampling" in (tmp_path / "processor_config.json").read_text()


def test_auto_processor(loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MmemoProcessor)
    assert again.sampling == loaded.processor.sampling


def test_call_makes_a_batch(loaded: Loaded) -> None:
    processor = loaded.processor
    one, two = features(loaded, clip(1, 0.5)), features(loaded, clip(2, 1.0))
    batch = processor(
        ["<video><audio>Which?", "How loud is the <audio> voice?"], [one, {"audio": two["audio"]}]
    )
    assert set(batch) <= {*processor.model_input_names}
    assert batch["input_ids"].shape == batch["modality_ids"].shape
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["input_ids"].shape[1]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]  # padded on the left
    assert batch["video_features_mask"].sum(1).tolist() == [4, 0]
    assert (batch["modality_ids"] == TEXT).any()
    assert loaded.model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_call_refuses_what_does_not_fit(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="no audio file"):
        loaded.processor("<audio>Which?", {})
    with pytest.raises(DataError, match="as many features"):
        loaded.processor(["a", "b"], [{}])
    with pytest.raises(TypeError, match="unknown argument"):
        loaded.processor("a", image=torch.ones(1))


PARTS = [
    {"role": "system", "content": "You watch faces."},
    {
        "role": "user",
        "content": [
            {"type": "video", "path": "never/opened.mp4"},
            {"type": "audio"},
            {"type": "face"},
            {"type": "text", "text": "Which emotion?"},
        ],
    },
]


def test_a_chat_of_content_parts_is_one_of_placeholders(loaded: Loaded) -> None:
    processor, found = loaded.processor, features(loaded, clip(1))
    talk = [
        Turn("system", "You watch faces."),
        Turn("user", "<video><audio><face>Which emotion?"),
    ]
    row = processor.render(talk, generation=True, modalities=ALL)
    plain = [{"role": turn.role, "content": turn.text} for turn in talk]
    before = [dict(message) for message in PARTS]
    for chat in (PARTS, plain):
        ids = processor.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, features=found
        )
        assert ids.tolist() == [row.input_ids]
    assert before == PARTS
    short = [{"role": "user", "content": "Which?"}]
    batch = processor.apply_chat_template(
        [PARTS, short],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"features": [found, {}], "padding": True},
    )
    assert batch["input_ids"][0].tolist() == row.input_ids
    assert batch["modality_ids"][0].tolist() == row.modality_ids
    model: Any = loaded.model
    words = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert words.shape[0] == 2
    text = processor.apply_chat_template(short, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.apply_chat_template(short, tokenize=True)
    assert processor.tokenizer.decode(ids[0]) == "<|im_start|>user\nWhich?<|im_end|>\n"
    with pytest.raises(DataError, match="part is a 'image'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(TypeError, match="pass its features"):
        processor("<video>Which?", videos=["a.mp4"])


def test_the_media_tokens_have_their_usual_names(loaded: Loaded, tmp_path: Path) -> None:
    processor = loaded.processor
    config: Any = loaded.model.config
    for name in ("video", "audio", "face", "fusion"):
        assert getattr(processor, f"{name}_token") == f"<|{name}|>"
        assert getattr(processor, f"{name}_token_id") == getattr(config, f"{name}_token_id")
    assert processor.video_token_ids == [processor.video_token_id]
    assert set(processor.all_special_multimodal_tokens) == {"<|video|>", "<|audio|>"}
    text = tiny(video=None, audio=None, face=None, fusion=None).processor
    assert text.video_token is None
    assert text.video_token_id is None
    processor.save_pretrained(tmp_path)
    assert "video_token" not in (tmp_path / "processor_config.json").read_text()


def test_chat_then_call(loaded: Loaded) -> None:
    chat = [{"role": "user", "content": "<audio>Which?"}]
    text = loaded.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = loaded.processor(text, features(loaded, clip(1)))
    row = loaded.processor.render(turns("<audio>Which?"), generation=True, modalities=ALL)
    assert batch["input_ids"][0].tolist() == row.input_ids
    assert loaded.processor.batch_decode(batch["input_ids"])[0] == row.text
