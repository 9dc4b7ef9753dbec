"""``mmemo check``: everything a run would stumble over is refused before it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from mmemo.check.memory import MemoryEstimate
from mmemo.check.run import CheckReport, read_samples, run_check
from mmemo.check.view import shorten, size
from mmemo.config import Config, dump, parse
from mmemo.data.manifest import load_samples
from mmemo.errors import ConfigError, DataError, EvaluationError, MediaError, TrainingError
from mmemo.evaluation.config import EvalConfig
from mmemo.features.encode import EncodeConfig, ensure_features
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import load_model
from mmemo.run_log import RunRecord
from mmemo.train.grpo.config import GrpoConfig
from mmemo.train.sft import SftConfig
from tests.data.rows import row, write
from tests.media_files import write_clip
from tests.models.parts import values


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, tone in (("a", 220.0), ("b", 330.0)):
        write_clip(folder / f"{name}.mp4", seconds=1.0, size=(64, 64), tone=tone)
    return folder


def question(name: str, clip: str, answer: str, tier: str = "emotion") -> dict[str, Any]:
    text = "<video><audio>Which emotion does the person show?"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    path = f"{clip}.mp4"
    return row(sample_id=name, messages=messages, videos=[path], audios=[path], tier=tier)


def sft(clips: Path, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> SftConfig:
    manifest = write(folder / "rows.jsonl", rows)
    data = {"manifests": [str(manifest)], "media_root": str(clips), **changes.pop("data", {})}
    settings = {"output_dir": str(folder / "run"), "model": values(face=None), "data": data}
    return parse(SftConfig, {**settings, "run": {"use_cpu": True}, **changes})


ROWS = [
    question("short", "a", "sad"),
    question("long", "b", "<think>" + "The brows are low. " * 20 + "</think>sad"),
    question("early", "a", "AU4", tier="attribute"),
]


def test_a_sound_config_is_reported(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_check(sft(clips, tmp_path, ROWS), probe=True)
    assert (report.rows, report.clips, report.bad) == (3, 2, [])
    assert len(report.lengths) == 3
    assert {preview.sample_id for preview in report.previews} == {"short", "long", "early"}
    for preview in report.previews:
        assert preview.tokens["video"] == 2
        assert preview.tokens["audio"] == 3
        assert preview.tokens["fusion"] == 1
        assert 0 < preview.learnt < preview.tokens["text"]
    assert report.limit == 1024
    assert report.memory is not None
    assert report.memory.total > report.memory.weights > 0
    assert report.checkpoint_bytes == 2 * 12 * report.memory.trainable
    assert report.store_bytes is not None
    # Video: 4 frames x 1 token x 16 numbers; audio: 3 layers x 10 steps x 24; float32.
    expected = 2 * 4 * (4 * 16 + 3 * 10 * 24)
    assert 0.8 * expected < report.store_bytes < 1.5 * expected
    printed = capsys.readouterr().out
    assert "<|video|> x 2" in printed
    assert "Tokens per row" in printed
    assert "3 rows, 2 clips, 2 of 2 files read through" in printed
    assert not (tmp_path / "run").exists()


def test_a_stage_is_checked_with_its_own_tiers_and_replay(clips: Path, tmp_path: Path) -> None:
    def rows(**curriculum: Any) -> list[str]:
        config = sft(clips, tmp_path, ROWS, curriculum=curriculum)
        return [sample.sample_id for sample in read_samples(config)]

    assert rows(tiers=["emotion"]) == ["short", "long"]
    assert rows(tiers=["emotion"], replay_share=0.2) == ["short", "long", "early"]
    with pytest.raises(DataError, match="no row has the tier 'expression'"):
        rows(tiers=["expression"])


def test_prompts_that_do_not_fit_are_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 3 rows do not fit; .*'long'.*at most 60 fit"):
        run_check(sft(clips, tmp_path, ROWS, data={"max_length": 60}))
    tight = {"hidden_size": 32, "layers": 2, "heads": 2, "vocab_size": 400, "max_length": 64}
    model = values(face=None, text={"scratch": tight})
    with pytest.raises(DataError, match="at most 64 fit"):
        run_check(sft(clips, tmp_path, ROWS, model=model))


def test_missing_and_broken_files_are_named(clips: Path, tmp_path: Path) -> None:
    rows = [*ROWS, question("gone", "c", "sad")]
    with pytest.raises(MediaError, match=r"c.mp4: missing: .*1 of 3 clips"):
        run_check(sft(clips, tmp_path, rows))
    report = run_check(sft(clips, tmp_path, rows, decode={"max_bad_share": 0.5}))
    assert [(clip.path, clip.kind, clip.sample_ids) for clip in report.bad] == [
        ("c.mp4", "missing", ("gone",))
    ]
    (tmp_path / "c.mp4").write_text("<html>")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((clips / name).read_bytes())
    broken = sft(tmp_path, tmp_path, rows)
    with pytest.raises(MediaError, match=r"c.mp4: not_media"):
        run_check(broken, probe=True)


def unusable(config: Config, **more: Any) -> str:
    with pytest.raises(MediaError) as caught:
        run_check(config, **more)
    return str(caught.value)


@pytest.mark.parametrize("probe", [False, True])
def test_clips_that_do_not_hold_what_rows_ask_of_them_are_refused(
    clips: Path, tmp_path: Path, probe: bool
) -> None:
    mute = tmp_path / "mute"
    for name in ("a", "b"):
        write_clip(mute / f"{name}.mp4", seconds=1.0, size=(64, 64), audio=False)
    message = unusable(sft(mute, tmp_path, ROWS), probe=probe)
    assert "no_audio: has no audio stream" in message
    assert ("2 of 2 clips" if probe else "clips that were tried cannot be used") in message
    # Rows that ask for the picture alone are not concerned.
    pictures = sft(mute, tmp_path, ROWS, data={"modalities": ["video"]})
    assert run_check(pictures, probe=probe).bad == []
    outside = [{**given, "start": 5.0, "end": 6.0} for given in ROWS]
    assert "bad_span: 5 s to 6 s" in unusable(sft(clips, tmp_path, outside), probe=probe)
    long = sft(clips, tmp_path, ROWS, decode={"max_seconds": 0.5})
    assert "too_long" in unusable(long, probe=probe)
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("<html>quota exceeded</html>")
    assert "not_media" in unusable(sft(tmp_path, tmp_path, ROWS), probe=probe)
    without = sft(tmp_path, tmp_path, ROWS, store={"enabled": False})
    assert "not_media" in unusable(without, probe=probe)


@pytest.mark.parametrize("probe", [False, True])
def test_a_few_bad_clips_are_named_and_their_rows_left_out(
    clips: Path, tmp_path: Path, probe: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((clips / name).read_bytes())
    (tmp_path / "page.mp4").write_text("<html>")
    rows = [*ROWS, question("bad", "page", "sad")]
    report = run_check(sft(tmp_path, tmp_path, rows, decode={"max_bad_share": 0.4}), probe=probe)
    assert [(c.path, c.kind, c.sample_ids) for c in report.bad] == [
        ("page.mp4", "not_media", ("bad",))
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "page.mp4: not_media" in printed
    assert ("1 of 3 clips that were tried cannot be used; --probe" in printed) is not probe
    # Whatever share is allowed, a run needs a row.
    alone = sft(tmp_path, tmp_path, rows[3:], decode={"max_bad_share": 1.0})
    assert "page.mp4: not_media" in unusable(alone, probe=probe)


def test_the_share_of_bad_clips_is_counted_as_a_run_counts_it(clips: Path, tmp_path: Path) -> None:
    """By spans, not by files: one of two files, but one of four clips."""
    spans = [
        {**question(f"s{n}", "a", "sad"), "start": 0.2 * n, "end": 0.2 * n + 0.3} for n in range(3)
    ]
    rows = [*spans, question("gone", "c", "sad")]
    backbone = unwrap(load_model(sft(clips, tmp_path, rows).model, ["a"]).model)
    for share, passes in ((0.3, True), (0.2, False)):
        config = sft(clips, tmp_path, rows, decode={"max_bad_share": share, "workers": 1})
        with contextlib.nullcontext() if passes else pytest.raises(MediaError, match="1 of 4"):
            assert run_check(config, probe=True).clips == 4
        with contextlib.nullcontext() if passes else pytest.raises(TrainingError, match="1 of 4"):
            ensure_features(
                load_samples(config.data),
                backbone,
                None,
                media_root=clips,
                limits=config.decode,
                record=RunRecord(tmp_path / "out"),
                out_dir=tmp_path / "out",
            )


def test_an_epoch_is_planned(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'difficulty': is missing, but curriculum\.order"):
        run_check(sft(clips, tmp_path, ROWS, curriculum={"order": "difficulty"}))
    replay = {"tiers": ["emotion"], "replay_share": 0.3}
    with pytest.raises(DataError, match="no row of the earlier tiers attribute, expression"):
        run_check(sft(clips, tmp_path, ROWS[:2], curriculum=replay))
    assert run_check(sft(clips, tmp_path, ROWS, curriculum=replay)).rows == 3


def test_evaluation_rows_are_checked_too(clips: Path, tmp_path: Path) -> None:
    def check(*rows: dict[str, Any], **data: Any) -> CheckReport:
        manifest = write(tmp_path / "eval.jsonl", list(rows))
        given = {"manifests": [str(manifest)], "media_root": str(clips), **data}
        return run_check(sft(clips, tmp_path, ROWS, eval_data=given))

    assert check(ROWS[0]).rows == 3
    with pytest.raises(DataError, match=r"eval.jsonl:1: field 'lable'"):
        check(row(lable="x"))
    with pytest.raises(DataError, match=r"eval.jsonl:2: the row has no answer"):
        check(ROWS[0], row(messages=ROWS[0]["messages"][:1]))
    with pytest.raises(DataError, match="1 of 2 rows do not fit"):
        check(*ROWS[:2], max_length=80)
    with pytest.raises(MediaError, match=r"gone.mp4: missing"):
        check(ROWS[0], question("gone", "gone", "sad"))
    with pytest.raises(DataError, match=r"no.jsonl: cannot be read"):
        check(ROWS[0], manifests=[str(tmp_path / "no.jsonl")])


def test_every_face_needs_its_boxes_when_they_place_it(clips: Path, tmp_path: Path) -> None:
    """Also a row that is not among the few whose clips are tried."""
    boxes = [{"time": 0.5, "box": [2, 2, 60, 60]}]
    messages = [{"role": "user", "content": "<face>?"}, {"role": "assistant", "content": "sad"}]
    face = {"videos": None, "audios": None, "faces": ["a.mp4"], "messages": messages}
    rows = [
        row(
            sample_id=f"s{n}", face_boxes=boxes if n != 70 else None, start=n / 100, end=1.0, **face
        )
        for n in range(90)
    ]
    model = values(sampling={"frames": 2, "face": {"detector": "boxes", "size": 32}})
    with pytest.raises(DataError, match=r"rows.jsonl:71: field 'face_boxes': .*row 's70'"):
        run_check(sft(clips, tmp_path, rows, model=model))


BENCHMARK = """
from mmemo.data.manifest import load_samples as samples
from mmemo.answers.parsing import LabelSet
def labels(sample): return LabelSet(("sad", "happy"))
def truth(sample): return sample.truth.label
"""


def test_an_evaluation_is_checked_with_its_benchmark(clips: Path, tmp_path: Path) -> None:
    config = sft(clips, tmp_path, ROWS)
    benchmark = tmp_path / "bench_check.py"
    benchmark.write_text(BENCHMARK)
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "eval"),
        "benchmark": str(benchmark),
        "model": values(face=None),
        "data": config.data.model_dump(),
        "generation": {"max_new_tokens": 1010},
    }
    with pytest.raises(DataError, match="3 of 3 rows do not fit"):
        run_check(parse(EvalConfig, settings))
    settings["generation"] = {"max_new_tokens": 900}
    report = run_check(parse(EvalConfig, settings))
    assert report.limit == 124
    far = {"generation": {"max_new_tokens": 900, "reallocation": {"layers": [9]}}}
    with pytest.raises(ConfigError, match=r"layers \[9\] do not fit"):
        run_check(parse(EvalConfig, settings | far))
    assert report.memory is not None
    assert report.memory.of("cache") > 0
    assert report.memory.optimizer == 0
    assert all(preview.learnt == 0 for preview in report.previews)
    majority = {**settings["data"], "manifests": [str(tmp_path / "none.jsonl")]}
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        run_check(parse(EvalConfig, settings | {"majority_from": majority}))
    broken = tmp_path / "bench_wrong.py"
    broken.write_text(BENCHMARK + "def score(sample, parsed): return 1.0\n")
    with pytest.raises(EvaluationError, match="fix the benchmark"):
        run_check(parse(EvalConfig, settings | {"benchmark": str(broken)}))


def test_encode_and_other_configs_are_checked(clips: Path, tmp_path: Path) -> None:
    config = sft(clips, tmp_path, ROWS)
    settings = {key: getattr(config, key).model_dump() for key in ("model", "data")}
    report = run_check(parse(EncodeConfig, {"output_dir": str(tmp_path / "e"), **settings}))
    assert report.memory is not None
    assert report.memory.of("gradients") == 0
    assert report.store_bytes

    class Other(Config):
        seed: int = 0

    assert run_check(Other()).rows == 0


def test_zero_shares_what_it_says(clips: Path, tmp_path: Path) -> None:
    """Equality with the shares by hand; DeepSpeed keeps a master copy beside AdamW's numbers."""
    file = tmp_path / "zero.json"

    def found(stage: int, **section: Any) -> MemoryEstimate:
        file.write_text(json.dumps({"zero_optimization": {"stage": stage, **section}}))
        run = {"processes": 4, "deepspeed": str(file), "use_cpu": True}
        estimate = run_check(sft(clips, tmp_path, ROWS, run=run)).memory
        assert estimate is not None
        return estimate

    small = {"reduce_bucket_size": 0, "stage3_max_live_parameters": 0}
    plain = run_check(sft(clips, tmp_path, ROWS)).memory
    assert plain is not None
    numbers = plain.trainable
    assert plain.optimizer == 8 * numbers
    one, two, three = (found(stage, **small) for stage in (1, 2, 3))
    for estimate in (one, two, three):
        assert estimate.optimizer == 12 * numbers // 4
    assert one.of("gradients") == 4 * numbers
    assert two.of("gradients") == three.of("gradients") == numbers
    assert (one.weights, one.adapter) == (two.weights, two.adapter) == (plain.weights, 4 * numbers)
    assert three.adapter == numbers
    assert three.weights + three.adapter < two.weights + two.adapter
    away = found(2, **small, offload_optimizer={"device": "cpu"})
    assert (away.optimizer, away.of("gradients")) == (0, 0)
    gone = found(3, **small, offload_param={"device": "cpu"})
    assert gone.adapter == 0
    bucket = found(2, reduce_bucket_size=1000)
    assert bucket.of("gradients") == numbers + 4 * 1000
    file.write_text("[]")
    run = {"processes": 4, "deepspeed": str(file), "use_cpu": True}
    with pytest.raises(ConfigError, match="is not a DeepSpeed JSON config"):
        run_check(sft(clips, tmp_path, ROWS, run=run))


def test_a_copy_as_the_reference_is_counted(clips: Path, tmp_path: Path) -> None:
    """All weights that learn once more; one in the CPU's memory not beside activations."""

    def found(memory: int | None = None, **grpo: Any) -> MemoryEstimate:
        config = {
            **dump(sft(clips, tmp_path, ROWS)),
            "grpo": grpo,
            "rewards": [{"path": "reward/outcome.py:outcome", "name": "outcome"}],
            "trainable": ["lm"],
        }
        config.pop("eval_data")
        config.pop("packing")
        report = run_check(parse(GrpoConfig, config), memory=memory)
        assert report.memory is not None
        return report.memory

    none, copy = found(), found(beta=0.04)
    assert none.reference == 0
    assert copy.reference == 4 * copy.trainable
    assert copy.total == none.total + copy.reference
    # On a machine without a GPU there is only one memory.
    assert found(beta=0.04, reference="copy_cpu").total == copy.total
    away = found(4 * 10**9, beta=0.04, reference="copy_cpu")
    assert (away.reference, away.of("reference")) == (0, copy.reference)
    assert away.total == max(none.total, away.kept + away.phases[1].total)


def test_runs_of_tokens_are_shortened() -> None:
    text = "a<|video|><|video|><|video|><|audio|> b<|im_start|>"
    assert shorten(text) == "a<|video|> x 3 <|audio|> b<|im_start|>"
    assert [size(999), size(1500), size(2.5e9), size(3e15)] == [
        "999 B",
        "1.5 kB",
        "2.5 GB",
        "3000.0 TB",
    ]
