"""Tokens of clips: where they stand, which rows have them, and that no row touches another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mmemo.config import parse
from mmemo.data.sample import Modality
from mmemo.models.backbone import MODALITY_ID, Features
from mmemo.models.composed.configuration import SavedBranchConfig
from mmemo.models.composed.connectors import collate_features
from mmemo.models.composed.scratch import build_llama, train_tokenizer
from mmemo.models.config import ScratchConfig
from mmemo.rewards.judge.clip_features import ClipFeatures, ClipTokens
from mmemo.rewards.judge.reader import Reader
from mmemo.rewards.judge.reward_model import Scorer, clip_token_counts, score_items
from mmemo.rewards.judge.rubric import ClipMedia, ClipSpan, JudgeItem

BRANCHES: dict[Modality, SavedBranchConfig] = {
    "video": parse(SavedBranchConfig, {"feature_size": 6, "tokens": 2}),
    "audio": parse(SavedBranchConfig, {"feature_size": 4, "feature_layers": 3, "layer": "mix"}),
}
SPAN = ClipSpan("one.mp4")
BOTH, SEEN, HEARD = (
    ClipMedia("root", SPAN, SPAN),
    ClipMedia("root", video=SPAN),
    ClipMedia("root", audio=SPAN),
)
FACTS = "- emotion of the clip: sad\n- present cues: low pitch, slow speech"
TEXT = "The voice is low and slow, so the person is sad."


class Made:
    """Features of clips, as they would be found in a store; none of a clip that is bad."""

    def __init__(self, seed: int = 3) -> None:
        self.seed = seed

    def get(self, clip: ClipMedia | None) -> dict[Modality, Features] | None:
        if clip is None or clip.root == "bad":
            return None
        torch.manual_seed(self.seed)
        made: dict[Modality, Features] = {}
        if clip.video:
            made["video"] = {"x": torch.randn(5, 6)}
        if clip.audio:
            made["audio"] = {"x": torch.randn(3, 7, 4)}
        return made


def scorer_of(kind: str, with_facts: bool = True) -> tuple[Scorer, Reader]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT, FACTS, "QUESTION FACTS CANDIDATE"], 400)
    if kind == "llama":
        config = ScratchConfig(hidden_size=16, layers=1, heads=2, max_length=256)
        backbone: nn.Module = build_llama(config, tokenizer).model
    else:  # an encoder that reads in both directions
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        backbone = BertModel(BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes))
    scorer = Scorer(backbone, BRANCHES)
    nn.init.normal_(scorer.direction.weight)
    return scorer.eval(), Reader(tokenizer, 256, clip_token_counts(BRANCHES), with_facts)


def grades(
    scorer: Scorer, reader: Reader, clips: list[ClipMedia | None], size: int, seed: int = 3
) -> list[Any]:
    items = [JudgeItem("How?", TEXT, FACTS, clip) for clip in clips]
    return score_items(scorer, reader, items, size, cast("ClipFeatures", Made(seed)))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_rows_with_other_streams_do_not_touch_each_other(kind: str) -> None:
    scorer, reader = scorer_of(kind)
    clips = [BOTH, SEEN, HEARD, ClipMedia("bad", SPAN), None, BOTH]
    together, alone = grades(scorer, reader, clips, 6), grades(scorer, reader, clips, 1)
    assert together[3] is together[4] is None
    for one, other in zip(together, alone, strict=True):
        assert one == (None if other is None else pytest.approx(other, abs=1e-5))
    assert together[0] == together[5] != together[1] != together[2]
    # Each of the streams is read.
    moved = grades(scorer, reader, clips, 6, seed=4)
    for place in (1, 2):
        assert moved[place] != pytest.approx(together[place], abs=1e-5)


def test_the_tokens_stand_before_the_facts_and_equal_no_word() -> None:
    _, reader = scorer_of("llama")
    with_clip, without = (
        reader.read(JudgeItem("How?", TEXT, FACTS, clip)) for clip in (BOTH, None)
    )
    assert with_clip is not None
    assert without is not None
    assert with_clip.clip == [MODALITY_ID["video"]] * 2 + [MODALITY_ID["audio"]]
    assert len(with_clip.ids) == len(without.ids) + 3
    assert with_clip.facts == without.facts + 3
    batch = reader.batch([with_clip, without])
    (rows, places) = batch["clip"].nonzero(as_tuple=True)
    assert rows.tolist() == [0, 0, 0]
    start = len(with_clip.ids) - with_clip.candidate - with_clip.facts
    assert places.tolist() == [start, start + 1, start + 2]
    assert batch["words"][0, places].tolist() == [-1] * 3
    assert batch["facts"][0, places].all()
    # Behind the clip's tokens, the lines of facts are those of the row without a clip.
    length = len(without.ids)
    for name in ("lines", "heading", "input_ids"):
        behind, whole = batch[name][0, places[-1] + 1 :], batch[name][1, start:length]
        assert torch.equal(behind[: len(whole)], whole)


def test_without_facts_nothing_of_them_is_read() -> None:
    _, reader = scorer_of("llama", with_facts=False)
    one, other = (
        reader.read(JudgeItem("How?", TEXT, said, BOTH)) for said in (FACTS, "- none known")
    )
    assert one == other


def test_long_facts_and_the_clip_leave_room_for_the_candidate_or_no_grade() -> None:
    scorer, reader = scorer_of("llama")
    found = grades(scorer, reader, [BOTH], 1)
    assert found[0] is not None
    full = reader.read(JudgeItem("How?", TEXT, FACTS, None))
    assert full is not None
    reader.max_length = len(full.ids) - full.candidate + 9  # room for 8 tokens and the end
    assert reader.read(JudgeItem("How?", TEXT, FACTS, None)) is not None
    assert reader.read(JudgeItem("How?", TEXT, FACTS, BOTH)) is None


def test_every_connector_has_a_gradient_whatever_the_rows_have() -> None:
    """As ranks need it: one that skipped a weight would keep the others waiting."""
    tokens = ClipTokens(BRANCHES, 8)
    clip = torch.zeros(2, 5, dtype=torch.long)
    clip[0, 1:3] = MODALITY_ID["video"]
    given: Mapping[str, Tensor] = collate_features([Made().get(SEEN) or {}, {}])
    out: Tensor = tokens(torch.zeros(2, 5, 8), clip, given)
    assert out[0, 1:3].abs().sum() > 0
    assert out[1].abs().sum() == out[0, [0, 3, 4]].abs().sum() == 0
    out.sum().backward()
    assert all(p.grad is not None for p in tokens.parameters())
    assert all(
        not p.grad.any() for p in tokens.connectors["audio"].parameters() if p.grad is not None
    )
