"""Pairs without a negative, and pairs that no term can learn from: counted, named, never a step of
nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemo.check.run import run_check
from mmemo.config import parse
from mmemo.data.manifest import DataConfig
from mmemo.data.preference import Preference, with_noise
from mmemo.data.sample import MediaRef, Sample, Turn
from mmemo.errors import ConfigError, DataError
from mmemo.run_log import RunRecord
from mmemo.train.dpo.dataset import check_pair_counts, measure_pairs
from mmemo.train.dpo.selection import Selection, negative_counts
from mmemo.train.dpo.train import run_dpo
from tests.losses.pairs import loss_of
from tests.models import chat_templates
from tests.models.parts import shake
from tests.train.dpo.test_objective import PAIRS, STREAMS, Bench, clips_of, learn, same
from tests.train.dpo.tiny import dpo_config, write_pairs

TRIMMED = chat_templates.PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}")


@pytest.fixture(scope="module", autouse=True)
def pairs(rows: Path) -> Path:
    return write_pairs(rows)


def without(pair: Preference, **changes: Any) -> Preference:
    return replace(pair, negative=None, **changes)


def margins(bench: Bench, row: int, answer: Any = None) -> dict[Any, float]:
    """beta times rho of each (branch, answer), by hand from the token log-probabilities."""
    logps = bench.objective.logps(bench.model, bench.batch([row]))
    return {
        key: 0.1
        * float((logps.policy[key] - logps.reference[key]).detach()[0][logps.mask[key[1]][0]].sum())
        for key in logps.reference
        if bool(logps.present[key][0])
    }


# --- missing negatives ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["avem_dpo", "mdpo"])
def test_a_pair_without_a_negative_has_the_response_s_loss_by_hand(kind: str) -> None:
    """Through the model: its loss, and that no negative moves the weights."""
    options = {"gamma": 0} if kind == "avem_dpo" else {"lambda_anchor": 0}
    term = {"kind": kind, "rejected": "hallucinated", **options}
    bench = Bench([term], [without(PAIRS[2]), PAIRS[2]])
    shake(bench.model, 0.05)
    bare, whole = margins(bench, 0), margins(bench, 1)
    response = loss_of(bare["input", "chosen"] - bare["input", "hallucinated"])
    part = loss_of(whole["input", "chosen"] - whole["negative", "chosen"])
    out, both = learn(bench.objective, bench.model, bench.batch([0, 1]))
    assert out.rows.tolist() == pytest.approx([response, response + part], rel=1e-5)
    share, pairs = out.metrics[f"{kind}/modality/counted"]
    assert (float(share), int(pairs)) == (1.0, 2)
    # Alone, it moves the weights as if there were no modality preference.
    _, found = learn(bench.objective, bench.model, bench.batch([0]))
    off = {"avem_dpo": {"lambda_av": 0}, "mdpo": {"lambda_conditional": 0}}[kind]
    plain = Bench([{**term, **off}], [PAIRS[2]])
    shake(plain.model, 0.05)
    _, wanted = learn(plain.objective, plain.model, plain.batch([0]))
    same(found, wanted)
    assert max(float((both[n] - wanted[n] * 2).abs().max()) for n in wanted) > 1e-4


def test_noise_stands_in_for_a_missing_negative_by_hand() -> None:
    """The loss is that of the noise after the same prompt; only queried streams are noise."""
    noised = with_noise(without(PAIRS[1]), "negative")
    bench = Bench([{"kind": "avem_dpo", "gamma": 0, "rejected": "first"}], [noised])
    shake(bench.model, 0.05)
    one = margins(bench, 0)
    wanted = loss_of(one["input", "chosen"] - one["input", "spurious"])
    wanted += loss_of(one["input", "chosen"] - one["negative", "chosen"])
    out, _ = learn(bench.objective, bench.model, bench.batch([0]))
    assert out.rows.tolist() == pytest.approx([wanted], rel=1e-5)
    assert one["negative", "chosen"] != pytest.approx(one["input", "chosen"], abs=1e-5)
    shown = features(bench, 0)
    for stream in STREAMS:
        assert torch.equal(shown["input"][stream], shown["negative"][stream]) == (stream != "audio")


def test_noise_stands_in_for_the_stream_that_a_joint_negative_leaves() -> None:
    half = replace(PAIRS[0], negative=clips_of("2.mp4", "video", "face"))
    bench = Bench(["avem_dpo"], [half, with_noise(half, "negative")])
    plain, filled = features(bench, 0), features(bench, 1)
    for stream in ("video", "face"):
        assert torch.equal(plain["negative"][stream], filled["negative"][stream])
    assert torch.equal(plain["negative"]["audio"], plain["input"]["audio"])
    assert not torch.equal(filled["negative"]["audio"], filled["input"]["audio"])
    # The stored reference knows one from the other.
    digests = [bench.batcher.branch_digest(one, "negative") for one in bench.pairs]
    assert digests[0] != digests[1]
    addresses = [bench.batch([0, 1], live=False)["passes"][0].prompts["clip_index"].unique()]
    assert len(addresses[0]) == 3  # the clip, and two negatives of it


def features(bench: Bench, row: int) -> dict[str, dict[str, torch.Tensor]]:
    """The features that each branch of a pair shows."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for one in bench.batch([row], live=False)["passes"]:
        for key, prompt in zip(one.keys, one.prompt_index.tolist(), strict=True):
            at = int(one.prompts["clip_index"][prompt])
            if at >= 0:
                found[key[0]] = {m: one.prompts[f"{m}_features"][at] for m in STREAMS}
    return found


def test_how_negatives_are_made_is_counted() -> None:
    half = replace(PAIRS[0], negative=clips_of("2.mp4", "video", "face"))
    given = [*PAIRS, without(PAIRS[1]), half, with_noise(half, "negative")]
    requests = Bench(["mod_dpo"]).requests
    assert negative_counts(given, requests) == {
        "negative": {"whole": 3, "missing": 1, "partly": 1, "noise": 1},
        "irrelevant": {"whole": 3},  # joint questions have nothing to replace
    }
    assert negative_counts(given, Bench(["dpo"]).requests) == {}


@pytest.mark.parametrize("kind", ["avem_dpo", "mdpo"])
def test_a_modality_preference_without_any_negative_is_refused(kind: str) -> None:
    bare = [without(one) for one in PAIRS]
    bench = Bench([kind], bare)
    with pytest.raises(ConfigError, match=rf"'{kind}' has a part .*'negative'.* none of the 3"):
        check_pair_counts(bare, bench.terms, bench.requests)
    assert check_pair_counts([*bare, PAIRS[0]], bench.terms, bench.requests) == {kind: 4}
    filled = [with_noise(one, "negative") for one in bare]
    assert check_pair_counts(filled, bench.terms, bench.requests) == {kind: 3}


def test_the_rows_own_smoothing_reaches_the_loss() -> None:
    term = {"kind": "dpo", "rejected": "first", "label_smoothing": "judge_agreement"}
    judged = [replace(PAIRS[0], judge_agreement=0.75), PAIRS[1], PAIRS[2]]
    bench = Bench([term], judged)
    shake(bench.model, 0.05)
    one = margins(bench, 0)
    margin = one["input", "chosen"] - one["input", "spurious"]
    out = bench.objective(bench.model, bench.batch())
    wanted = 0.75 * loss_of(margin) + 0.25 * loss_of(-margin)
    assert float(out.rows[0].detach()) == pytest.approx(wanted, rel=1e-5)
    check_pair_counts(judged, bench.terms, bench.requests)
    with pytest.raises(ConfigError, match="judge_agreement, which none of the 3 pairs has"):
        check_pair_counts(PAIRS, bench.terms, bench.requests)


def manifest(rows: Path, folder: Path, change: Any) -> str:
    """The rows' pairs, each changed in place by its number."""
    lines = [json.loads(line) for line in (rows / "pairs.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        change(number, line)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def drop_negative(line: dict[str, Any]) -> None:
    for key in [name for name in line if "_negative" in name or name == "negative_kind"]:
        del line[key]


def test_a_run_counts_the_pairs_without_a_negative(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number < 6:
            drop_negative(line)

    data = {"manifests": [manifest(rows, tmp_path / "data", change)]}
    train = {"max_steps": 4}
    for missing, made in (
        ("leave_out", {"whole": 10, "missing": 6}),
        ("noise", {"whole": 10, "noise": 6}),
    ):
        config = dpo_config(
            *(rows, tmp_path / missing, "avem_dpo"),
            data=data,
            train=train,
            dpo={"missing_negative": missing},
        )
        run_dpo(config)
        (event,) = RunRecord(tmp_path / missing).events("pairs")
        assert event["counted"] == {"avem_dpo": 16}
        assert event["negatives"] == {"negative": made}
        assert event["left_out"] == {}
        logged = (tmp_path / missing / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, logged) if "loss" in line]
        # An epoch of four steps of four pairs.
        counted = sum(line["avem_dpo/modality/counted"] for line in steps) / 4
        assert counted == pytest.approx(10 / 16 if missing == "leave_out" else 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "negative of the pairs: 6 missing, 10 whole" in said


# --- pairs that no term can learn from --------------------------------------------------------


def select(bench: Bench, pairs: Sequence[Preference]) -> Selection:
    found = Selection.of(pairs)
    found.drop_unlearnable(bench.terms, bench.requests)
    return found


def test_joint_questions_are_left_out_of_mod_dpo_alone() -> None:
    found = select(Bench(["mod_dpo"]), PAIRS)
    assert (found.pairs, found.rows) == (PAIRS[1:], [1, 2])
    assert found.left_out == {"no_term": ["p0"]}
    assert found.unlearnable == {"joint": 1}
    # Where another term learns from them, they stay; one that only looks on does not.
    assert select(Bench(["mod_dpo", "sft"]), PAIRS).pairs == PAIRS
    observed = Bench(["mod_dpo", {"kind": "sft", "weight": 0}])
    assert select(observed, PAIRS).left_out == {"no_term": ["p0"]}
    assert select(Bench([{"kind": "mod_dpo", "beta_inv": 0}]), PAIRS).pairs == PAIRS
    assert select(Bench(["avem_dpo"]), [without(one) for one in PAIRS]).left_out == {}
    only = Bench([{"kind": "dpo", "rejected": "spurious"}])
    assert select(only, PAIRS).left_out == {"no_term": ["p2"]}


def test_no_step_of_a_mod_dpo_run_has_a_gradient_of_zero(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the pairs are joint; with batches of one channel they filled steps of their own."""
    changes = {
        "dpo": {"alternate_queries": True},
        "train": {"per_device_train_batch_size": 2, "max_steps": 4},
    }
    config = dpo_config(rows, tmp_path / "run", "mod_dpo", **changes)
    run_check(config)
    assert "8 pairs (8 joint) are left out" in " ".join(capsys.readouterr().out.split())
    run_dpo(config)
    (event,) = RunRecord(tmp_path / "run").events("pairs")
    assert (event["pairs"], event["counted"]) == (8, {"mod_dpo": 8})
    assert event["left_out"] == {"no_term": [f"pair-{n:03d}" for n in range(16) if n % 4 in (0, 3)]}
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, logged) if "loss" in line]
    assert len(steps) == 4
    assert all(line["grad_norm"] > 0 and line["mod_dpo/counted"] == 1 for line in steps)


def asked(number: int, **answers: str) -> Preference:
    sample = Sample(
        sample_id=f"t{number}",
        turns=(Turn("user", "<video>Which emotion?"),),
        media={"video": MediaRef("0.mp4")},
        source=("pairs.jsonl", number + 1),
    )
    return Preference(sample, "video", answers, None, None)  # pyright: ignore[reportArgumentType]


TRIMMED_PAIRS = [
    asked(0, chosen="it is sad", spurious="it is happy"),
    asked(1, chosen="it is sad", spurious=" it is sad\n"),
    asked(2, chosen="it is sad ", spurious="it is sad", hallucinated="loud: sad"),
    asked(3, chosen="it is sad", spurious="it is  sad"),  # a difference that is left
]


def trimmed(bench: Bench, pairs: Sequence[Preference]) -> Selection:
    data = parse(DataConfig, {"manifests": ["x"]})
    found = Selection.of(pairs)
    measured = measure_pairs(found.pairs, bench.loaded, bench.terms, bench.requests, data)
    found.drop_same_tokens(measured)
    return found


def test_answers_that_the_chat_template_makes_the_same_are_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(["dpo", "sft"])
    plain = trimmed(bench, TRIMMED_PAIRS)
    assert (plain.pairs, plain.left_out) == (TRIMMED_PAIRS, {})
    monkeypatch.setattr(bench.loaded.processor, "chat_template", TRIMMED)
    found = trimmed(bench, TRIMMED_PAIRS)
    assert found.left_out == {"same_tokens": ["t1", "t2"]}
    assert found.rows == [0, 2, 3]  # t1 has no other rejected answer, so that it is no pair
    assert [list(one.answers) for one in found.pairs] == [
        ["chosen", "spurious"],
        ["chosen", "hallucinated"],
        ["chosen", "spurious"],
    ]
    with pytest.raises(DataError, match=r"every pair \(t1\) has rejected answers with the tokens"):
        trimmed(bench, TRIMMED_PAIRS[1:2])


def test_why_such_a_pair_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its margin is 0 whatever the weights, and so is its gradient."""
    bench = Bench(["dpo"], TRIMMED_PAIRS)
    shake(bench.model, 0.05)
    monkeypatch.setattr(bench.loaded.processor, "chat_template", TRIMMED)
    out, found = learn(bench.objective, bench.model, bench.batch([1]))
    assert out.rows.tolist() == pytest.approx([loss_of(0)])
    assert max(float(x.abs().max()) for x in found.values()) < 1e-6
    _, other = learn(bench.objective, bench.model, bench.batch([0]))
    assert max(float(x.abs().max()) for x in other.values()) > 1e-3


def test_a_run_and_its_check_name_the_trimmed_pairs(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if number in (3, 4):
            line.pop("rejected_hallucinated", None)
            line["rejected_spurious"] = f"{line['chosen']}\n"

    template = tmp_path / "trimmed.jinja"
    template.write_text(TRIMMED)
    values = dpo_config(rows, tmp_path / "run", "dpo").model.model_dump(mode="json")
    config = dpo_config(
        *(rows, tmp_path / "run", "dpo"),
        model={**values, "chat_template_path": str(template)},
        data={"manifests": [manifest(rows, tmp_path / "data", change)]},
        train={"max_steps": 1},
    )
    run_check(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 pairs have a rejected answer with the tokens of the chosen one" in said
    assert ": pair-003, pair-004" in said
    run_dpo(config)
    (event,) = RunRecord(tmp_path / "run").events("pairs")
    assert event["pairs"] == 14
    assert event["left_out"] == {"same_tokens": ["pair-003", "pair-004"]}


def test_a_run_without_a_pair_that_is_left_says_why(rows: Path, tmp_path: Path) -> None:
    """Trimming leaves each pair an answer, but none that the term reads."""

    def change(number: int, line: dict[str, Any]) -> None:
        line["rejected_spurious"] = f"{line['chosen']}\n"
        line["rejected_hallucinated"] = "<think>loud</think>"

    template = tmp_path / "trimmed.jinja"
    template.write_text(TRIMMED)
    values = dpo_config(rows, tmp_path / "run", "dpo").model.model_dump(mode="json")
    config = dpo_config(
        *(rows, tmp_path / "run", {"kind": "dpo", "rejected": "spurious"}),
        model={**values, "chat_template_path": str(template)},
        data={"manifests": [manifest(rows, tmp_path / "data", change)]},
    )
    for attempt in (run_check, run_dpo):
        with pytest.raises(DataError, match=r"no pair is left to learn from: pair-000, .* tokens"):
            attempt(config)


def test_negatives_that_no_term_reads_need_no_file(rows: Path, tmp_path: Path) -> None:
    def change(number: int, line: dict[str, Any]) -> None:
        if "video_negative" in line:
            line["video_negative"] = "clips/none.mp4"

    data = {"manifests": [manifest(rows, tmp_path / "data", change)]}
    run_dpo(dpo_config(rows, tmp_path / "run", "dpo", data=data, train={"max_steps": 1}))
    (event,) = RunRecord(tmp_path / "run").events("pairs")
    assert (event["pairs"], event["left_out"]) == (16, {})


def test_a_negative_that_is_a_copy_of_the_clip_is_left_out(rows: Path, tmp_path: Path) -> None:
    """Under another name, so that the manifest cannot show it."""
    folder = tmp_path / "data"
    (folder / "clips").mkdir(parents=True)
    for file in (rows / "clips").iterdir():
        (folder / "clips" / file.name).write_bytes(file.read_bytes())
    (folder / "clips" / "copy.mp4").write_bytes((folder / "clips" / "0.mp4").read_bytes())

    def change(number: int, line: dict[str, Any]) -> None:
        if number == 0:
            line["video_negative"] = line["audio_negative"] = "clips/copy.mp4"

    manifest(rows, folder, change)
    run_dpo(dpo_config(folder, tmp_path / "run", "avem_dpo", train={"max_steps": 1}))
    (event,) = RunRecord(tmp_path / "run").events("pairs")
    assert event["left_out"] == {"same_clip": ["pair-000"]}
    assert event["negatives"] == {"negative": {"whole": 15, "missing": 1}}
    assert event["counted"] == {"avem_dpo": 16}
