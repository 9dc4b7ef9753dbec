"""``eval/ca_mer.py``: CA-MER's files as its users have them, other tables, and both metrics."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mmemo import content
from mmemo.check.run import read_samples
from mmemo.config import read_yaml
from mmemo.data.manifest import DataConfig
from mmemo.errors import ConfigError, DataError, EvaluationError
from mmemo.evaluation.benchmark import Question, Selected, load_benchmark, validate
from mmemo.evaluation.config import EvalConfig
from mmemo.evaluation.results import EvalResult, compare, read_results
from mmemo.evaluation.runner import run_eval
from mmemo.evaluation.script import run_zero_shot, zero_shot_config
from mmemo.evaluation.tables import open_table, open_tasks
from mmemo.report.collect import read_run
from mmemo.report.page import build_report
from mmemo.report.tables import compare_runs
from tests.evaluation.world import config_of, save_model
from tests.media_files import write_clip

FILE = "eval/ca_mer.py"
SUBSETS = ("video-aligned", "audio-aligned", "consistent")
Rows = list[dict[str, Any]]


def write_subsets(root: Path, rows: Rows, **others: Rows) -> list[str]:
    """The three files with the same rows, or with their own, as CA-MER's users have them."""
    for name in SUBSETS:
        (root / f"{name}.json").write_text(json.dumps(others.get(name.replace("-", "_"), rows)))
    return [str(root / f"{name}.json") for name in SUBSETS]


def select(
    root: Path, files: list[str], params: dict[str, Any] | None = None, **data: Any
) -> tuple[Selected, list[Question]]:
    benchmark = load_benchmark(FILE, params)
    config = DataConfig(manifests=files, media_root=str(root), **data)
    selected = benchmark.select(config)
    questions = benchmark.ask(selected, config)
    validate(benchmark, questions)
    return selected, questions


def table(root: Path, text: str) -> list[str]:
    (root / "table.csv").write_text(text)
    return [str(root / "table.csv")]


def test_each_subset_s_rows_are_of_its_slice_and_lie_in_its_folder(tmp_path: Path) -> None:
    files = write_subsets(tmp_path, [{"file_name": "a1", "emotion": "angry"}])
    for name, ending in zip(SUBSETS, (".avi", ".mp4", ""), strict=True):
        (tmp_path / name).mkdir()
        if ending:
            (tmp_path / name / f"a1{ending}").touch()
    _, questions = select(tmp_path, files)
    assert [question.sample.truth.conflict for question in questions] == [
        *("video_aligned", "audio_aligned", "consistent")
    ]
    assert [question.sample.media["video"].path for question in questions] == [
        "video-aligned/a1.avi",
        "audio-aligned/a1.mp4",
        "consistent/a1.avi",  # is missing, and will be reported
    ]
    assert {question.truth for question in questions} == {"angry"}
    assert questions[0].turns[-1].text.startswith("<video><audio>Which emotion")
    assert questions[0].turns[-1].text.endswith("neutral, doubt, contempt.")


def test_the_open_question_is_a_task_of_its_own_behind_the_first(tmp_path: Path) -> None:
    rows = [{"file_name": "a", "label": ["happy", "moved"]}, {"file_name": "b", "label": "sadness"}]
    files = write_subsets(tmp_path, rows)
    selected, questions = select(tmp_path, files, {"open_vocabulary": True})
    assert [question.task for question in questions] == ["emotion"] * 6 + ["open_vocabulary"] * 6
    assert [question.truth for question in questions[:2]] == ["happy", "sad"]
    assert [question.truth for question in questions[6:8]] == ["happy, moved", "sadness"]
    assert questions[6].labels is None
    assert "commas" in questions[6].turns[-1].text
    assert selected.excluded == []


def test_a_clip_without_a_single_class_is_asked_the_open_question_only(tmp_path: Path) -> None:
    words = {"a": "sad", "b": "moved", "c": "sad, angry"}
    rows = [{"file_name": name, "label": label} for name, label in words.items()]
    files = write_subsets(tmp_path, rows)
    selected, questions = select(tmp_path, files, {"open_vocabulary": True})
    assert Counter(question.task for question in questions) == {"emotion": 3, "open_vocabulary": 9}
    assert selected.reasons == {"no single class, only the open question is asked": 6}
    assert {row.detail for row in selected.excluded} == {"moved", "sad, angry"}


def test_an_unknown_label_key_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    files = write_subsets(tmp_path, [{"file_name": "a", "feeling": "sad", "who": {"name": "x"}}])
    with pytest.raises(
        EvaluationError,
        match=r"no row has label or .*its rows have file_name, feeling, who: .*params\.label_key",
    ):
        select(tmp_path, files)
    _, questions = select(tmp_path, files, {"label_key": "feeling", "speaker_key": "who.name"})
    assert questions[0].truth == "sad"
    assert questions[0].sample.group == {"speaker": "x"}
    with pytest.raises(EvaluationError, match="no row has nothing"):
        select(tmp_path, files, {"label_key": "feeling", "audio_key": "nothing"})
    with pytest.raises(ConfigError, match=r"no parameter 'lable_key'; did you mean 'label_key'\?"):
        load_benchmark(FILE, {"lable_key": "feeling"})


def test_a_row_whose_own_labels_contradict_its_file_is_left_out(tmp_path: Path) -> None:
    good = {"file_name": "a", "label": "sad", "audio_label": "sad", "video_label": "happy"}
    files = write_subsets(tmp_path, [good])
    selected, questions = select(tmp_path, files)
    assert [question.sample.truth.conflict for question in questions] == ["audio_aligned"]
    assert questions[0].sample.truth.modality_labels == {"audio": "sad", "video": "happy"}
    assert selected.reasons == {"in the file of another subset": 2}
    assert selected.excluded[0].row == "a (video-aligned.json:1)"
    assert selected.excluded[0].detail == "voice sad, picture happy, clip sad"


def test_any_table_is_sliced_by_the_rule_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = """video_id,clip_id,label_A,label_V,label
        v,1,Sadness,happy,joy
        v,2,sad,happy,sad
        v,3,anger,angry,angry
        v,4,sad,happy,angry
        v,5,sad,sad,angry
        v,6,,sad,sad
        v,7,sad,,sad
        v,8,sad,sad,
        v,9,bored,happy,bored"""
    files = table(tmp_path, "\n".join(line.strip() for line in rows.splitlines()) + "\n")
    selected, questions = select(tmp_path, files, {"media": "Raw/{video_id}/{clip_id}.mp4"})
    assert {question.sample.media["audio"].path: question.truth for question in questions} == {
        "Raw/v/1.mp4": "happy",
        "Raw/v/2.mp4": "sad",
        "Raw/v/3.mp4": "angry",
    }
    assert [question.sample.truth.conflict for question in questions] == [
        *("video_aligned", "audio_aligned", "consistent")
    ]
    assert questions[0].sample.truth.modality_labels == {"audio": "sad", "video": "happy"}
    assert selected.reasons == {
        "all different": 1,
        "joint differs": 1,
        "no audio label": 1,
        "no label": 1,
        "no single class": 1,
        "no video label": 1,
    }
    with pytest.raises(
        EvaluationError, match=r"does not fit .*table\.csv:2, whose keys are video_"
    ):
        select(tmp_path, files, {"media": "{clip}.mp4"})


def test_annotators_vote_and_a_tie_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"name": "a.mp4", "audio_label": ["sad", "sadness", "happy"], "video_label": ["angry"]},
        {"name": "b.mp4", "audio_label": ["sad", "happy"], "video_label": ["angry"]},
    ]
    for row in rows:
        row["label"] = "angry"
    (tmp_path / "all.json").write_text(json.dumps(rows))
    selected, questions = select(tmp_path, [str(tmp_path / "all.json")])
    assert [question.sample.truth.conflict for question in questions] == ["video_aligned"]
    assert questions[0].sample.media["video"].path == "a.mp4"
    assert selected.reasons == {"annotators split on the audio label": 1}
    assert selected.excluded[0].detail == "sad, happy"


def test_labels_in_numbers_need_a_map(tmp_path: Path) -> None:
    rows = [{"name": "1", "label": 4, "audio_label": 1, "video_label": 4}]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    files = [str(tmp_path / "all.json")]
    benchmark = load_benchmark(FILE)
    selected = benchmark.select(DataConfig(manifests=files))
    assert selected.reasons == {"audio label is no word": 1}
    with pytest.raises(EvaluationError, match=r"no questions in .*1 audio label is no word"):
        benchmark.ask(selected, DataConfig(manifests=files))
    _, questions = select(tmp_path, files, {"label_map": {1: "happy", 4: "angry"}})
    assert (questions[0].truth, questions[0].sample.truth.conflict) == ("angry", "video_aligned")


def test_labels_with_commas_between_them_are_votes_and_are_mapped_as_written(
    tmp_path: Path,
) -> None:
    text = 'name,audio_label,video_label,label\na,"-1.0, -1.0, 1.0","1.0, 1.0",1.0\n'
    text += 'b,"-1.0, 1.0",1.0,1.0\nc,Glad,"Low, Glad, Low","Glad; Glad"\n'
    label_map = {"-1.0": "sad", "1.0": "happy", "Glad": "happy", "Low": "sad"}
    selected, questions = select(tmp_path, table(tmp_path, text), {"label_map": label_map})
    found = {
        one.sample.sample_id: (one.sample.truth.conflict, one.truth, one.modality_labels)
        for one in questions
    }
    assert found == {
        "table/a": ("video_aligned", "happy", {"audio": "sad", "video": "happy"}),
        "table/c": ("audio_aligned", "happy", {"audio": "happy", "video": "sad"}),
    }
    assert selected.reasons == {"annotators split on the audio label": 1}


def test_classes_are_the_nine_unless_given(tmp_path: Path) -> None:
    files = table(tmp_path, "name,audio_label,video_label,label\na,bored,keen,keen\n")
    with pytest.raises(
        EvaluationError, match=r"no clip's label is one of the classes .* keen: give"
    ):
        select(tmp_path, files)
    _, questions = select(tmp_path, files, {"classes": ["keen", "bored"]})
    labels = questions[0].labels
    assert labels is not None
    assert (questions[0].truth, labels.labels) == ("keen", ("keen", "bored"))
    files = table(tmp_path, "name,audio_label,video_label,label\na,bored,boredom,bored\n")
    _, questions = select(tmp_path, files, {"classes": "emodb"})
    assert (questions[0].truth, questions[0].labels.labels[1]) == ("boredom", "boredom")


def test_mmemo_s_own_manifests_are_tables_too(tmp_path: Path) -> None:
    row = {"prompt": "<video>?", "videos": ["c.mp4"], "label": "sad", "group": {"speaker": "s"}}
    row["modality_labels"] = {"audio": "sad", "video": "happy"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    _, questions = select(tmp_path, [str(tmp_path / "rows.jsonl")], modalities=["video", "face"])
    sample = questions[0].sample
    assert (sample.truth.conflict, sample.group) == ("audio_aligned", {"speaker": "s"})
    assert {modality: ref.path for modality, ref in sample.media.items()} == {
        "video": "c.mp4",
        "face": "c.mp4",
    }
    assert questions[0].turns[0].text.startswith("<video><face>")


def test_bad_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        select(tmp_path, [str(tmp_path / "consistent.json")])
    (tmp_path / "consistent.json").write_text("[]")
    with pytest.raises(DataError, match="has no rows"):
        select(tmp_path, [str(tmp_path / "consistent.json")])
    (tmp_path / "consistent.json").write_text('[{"file_name": "a", "label": "sad"}, 3]')
    with pytest.raises(DataError, match=r"consistent\.json:1: must be a JSON object"):
        select(tmp_path, [str(tmp_path / "consistent.json")])
    with pytest.raises(EvaluationError, match=r"data\.tiers and data\.groups have no effect"):
        select(tmp_path, [str(tmp_path / "consistent.json")], tiers=["emotion"])


@pytest.mark.parametrize(
    ("said", "value", "expected"),
    [
        ("<think>sad</think><answer>joyful, moved, sad</answer>", "precision", 2 / 3),
        ("happy and moved", "recall", 1),
        ("happy", "average", 3 / 4),
        ("I cannot tell.", "precision", 0),
        ("", "recall", 0),
    ],
)
def test_words_scores_open_answers_and_no_others(said: str, value: str, expected: float) -> None:
    words = content.load(f"{FILE}:words")
    true = [["happiness", "moved"]] * 2
    tasks = ["open_vocabulary", "emotion"]
    found = words(["?"] * 2, [said] * 2, labels=true, task=tasks, value=value)
    assert found == [pytest.approx(expected), None]


SCORES = [
    {"path": f"{FILE}:words", "name": value, "params": {"value": value}}
    for value in ("precision", "recall", "average", "f1")
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvalConfig, EvalResult]:
    """A tiny model on CA-MER's files: two real clips a subset, one that is missing in the first."""
    root = tmp_path_factory.mktemp("ca_mer")
    words = {"a": "happy", "b": "sad, moved"}
    rows = [{"file_name": name, "emotion": label} for name, label in words.items()]
    files = write_subsets(root, rows, video_aligned=[*rows, {"file_name": "c", "emotion": "sad"}])
    for tone, subset in enumerate(SUBSETS):
        for name in words:
            path = root / subset / f"{name}.avi"
            write_clip(path, seconds=1, fps=4, tone=200 + 90 * tone, codec="mpeg4")
    config = config_of(
        root,
        save_model(root / "model"),
        root / "out/first",
        benchmark={"path": FILE, "params": {"open_vocabulary": True}},
        data={"manifests": files, "media_root": str(root)},
        scores=SCORES,
        decode={"workers": 1, "max_bad_share": 0.5},
    )
    return root, config, run_eval(config)


def test_a_run_has_both_metrics_and_never_in_one_block(
    evaluated: tuple[Path, EvalConfig, EvalResult],
) -> None:
    _, _, result = evaluated
    closed, opened = result.tasks["emotion"], result.tasks["open_vocabulary"]
    assert list(result.tasks) == ["emotion", "open_vocabulary"]
    assert closed["n"] == opened["n"] == 6
    assert closed["scores"] == {}
    assert {"metrics", "average", "subsets"} <= set(closed)
    assert set(opened) == {"labels", "n", "clusters", "statuses", "scores"}
    official = ["f1_official", "f1_official_precision", "f1_official_recall"]
    assert list(opened["scores"]) == ["precision", "recall", "average", "f1", *official]
    for found in opened["scores"].values():
        assert (found["n"], found["unscored"]) == (6, 0)
        assert set(found["subsets"]) == {"video_aligned", "audio_aligned", "consistent"}
    assert result.made["benchmark"]["params"] == {"open_vocabulary": True}
    for row in result.rows("open_vocabulary"):
        assert (row["labels"], row["answer"], row["score"]) == ([], None, None)


def test_what_is_left_out_is_counted_and_named(
    evaluated: tuple[Path, EvalConfig, EvalResult],
) -> None:
    root, config, result = evaluated
    assert result.values["excluded"] == {
        "questions": 2,  # of the missing clip
        "clips": 1,
        "kinds": {"missing": 1},
        "rows": {},
    }
    (bad,) = (root / "out/first/bad_clips.jsonl").read_text().splitlines()
    assert json.loads(bad)["path"] == "video-aligned/c.avi"
    assert not (root / "out/first/excluded_rows.jsonl").exists()
    files = table(
        root, "name,audio_label,video_label,label\nconsistent/a.avi,sad,sad,sad\nb,,sad,sad\n"
    )
    data = config.data.model_copy(update={"manifests": files})
    changes = {"data": data, "output_dir": str(root / "table"), "benchmark": {"path": FILE}}
    other = EvalConfig.model_validate({**dict(config), **changes, "scores": []})
    assert run_eval(other).values["excluded"]["rows"] == {"no audio label": 1}
    assert json.loads((root / "table/excluded_rows.jsonl").read_text()) == {
        "row": "b (table.csv:3)",
        "reason": "no audio label",
        "detail": "",
    }


def test_tables_comparison_and_report_keep_the_open_task_apart(
    evaluated: tuple[Path, EvalConfig, EvalResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, config, first = evaluated
    model = {"path": str(save_model(root / "other", seed=1))}
    changes = {"model": model, "output_dir": str(root / "out/second"), "name": "other"}
    second = run_eval(EvalConfig.model_validate({**dict(config), **changes}))
    blocks = compare(first, second)[0].tasks
    assert set(blocks["emotion"]["scores"]) == set()
    assert "differences" not in blocks["open_vocabulary"]
    ours = {"precision", "recall", "average", "f1"}
    assert set(blocks["open_vocabulary"]["scores"]) == ours | {"f1_official"}
    capsys.readouterr()
    compare_runs(first.folder, second.folder)
    assert "Open questions: open_vocabulary" in capsys.readouterr().out
    runs = read_run(root / "out").runs
    assert open_tasks(runs) == ["open_vocabulary"]
    console = Console(file=io.StringIO(), width=120)
    console.print(open_table(runs, "open_vocabulary"))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert len(re.findall(r"(?m)^ +precision +\d", shown)) == 2
    assert len(re.findall(r"(?m)^ +f1_official +\d", shown)) == 2
    assert "Video-" in shown
    page = build_report(root / "out", tmp_path / "report.html").read_text()
    assert "<h3>open_vocabulary</h3>" in page
    assert ">Probes<" not in page


def test_open_questions_need_scores(evaluated: tuple[Path, EvalConfig, EvalResult]) -> None:
    _, config, _ = evaluated
    assert len(read_samples(config)) == 14
    with pytest.raises(ConfigError, match="open questions, whose answers only scores can rate"):
        read_samples(config.model_copy(update={"scores": []}))


def test_the_script_does_what_the_shipped_config_does(tmp_path: Path) -> None:
    files = write_subsets(tmp_path, [{"file_name": "a", "label": "sad"}])
    module = content.load_module(FILE)
    arguments = ["--model", "m", "--data", str(tmp_path)]
    config = zero_shot_config(FILE, arguments, module.DEFAULTS, module.find_data)
    assert sorted(config.data.manifests) == sorted(files)
    assert config.data.media_root == str(tmp_path)
    shipped = EvalConfig.model_validate(read_yaml(Path("train_configs/benchmarks/ca_mer.yaml")))
    for name in ("benchmark", "scores", "generation", "per_device_eval_batch_size"):
        assert getattr(config, name) == getattr(shipped, name)
    assert config.data.modalities == shipped.data.modalities
    (tmp_path / "consistent.json").unlink()
    with pytest.raises(EvaluationError, match=r"has no consistent\.json; give the"):
        module.find_data([str(tmp_path)])


def test_the_command_line_gives_the_same_numbers_as_a_config(
    evaluated: tuple[Path, EvalConfig, EvalResult],
) -> None:
    root, _, first = evaluated
    arguments = ["--model", str(root / "model"), "--data", str(root), "--name", "tiny"]
    arguments += ["--output-dir", str(root / "script"), f"--store.path={root / 'features'}"]
    arguments += ["--generation.max_new_tokens=8", "--per_device_eval_batch_size=3"]
    arguments += ["--bootstrap.resamples=100", "--decode.max_bad_share=0.5", "--decode.workers=1"]
    module = content.load_module(FILE)
    run_zero_shot(FILE, arguments, module.DEFAULTS, module.find_data)
    assert read_results(root / "script").tasks == first.tasks


def test_as_a_script_it_says_what_is_wrong_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, FILE, "--model", "m", "--data", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"error: {tmp_path} has no video-aligned.json; give the folder of CA-MER"


def test_questions_can_be_worded_by_parameters(tmp_path: Path) -> None:
    files = write_subsets(tmp_path, [{"file_name": "a", "label": "sad"}])
    own = {"question": "Pick: {classes}", "open_question": "Say.", "open_vocabulary": True}
    _, questions = select(tmp_path, files, {**own, "classes": ["sad", "happy"]})
    assert questions[0].turns[-1].text == "<video><audio>Pick: sad, happy"
    assert questions[-1].turns[-1].text == "<video><audio>Say."


def test_a_dry_run_tells_what_a_copy_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with parameters given as options, and without a model."""
    write_subsets(tmp_path, [{"file_name": "a", "label": "sad"}, {"file_name": "b"}])
    write_clip(tmp_path / "consistent/a.avi", seconds=0.5, fps=4, codec="mpeg4", audio=False)
    (tmp_path / "audio-aligned").mkdir()
    (tmp_path / "audio-aligned/a.avi").write_bytes(b"no clip")
    arguments = ["--data", str(tmp_path), "--dry-run", "--option", "open_vocabulary=true"]
    run_zero_shot(FILE, arguments)
    told = " ".join(capsys.readouterr().out.split())
    assert "3 rows left out (no label): b (video-aligned.json:1)" in told
    assert "1 clip missing: video-aligned/a.avi" in told
    assert "emotion: 3 questions open_vocabulary: 3 questions" in told
    assert "1 clip without sound: consistent/a.avi" in told
    assert "1 clip that cannot be opened: audio-aligned/a.avi" in told
    assert "This copy is not whole" in told
    with pytest.raises(SystemExit, match="no parameter 'clases'; did you mean 'classes'"):
        run_zero_shot(FILE, ["--data", str(tmp_path), "--dry-run", "--option", "clases=x"])
