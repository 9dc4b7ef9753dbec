"""``integrations/lmms_eval`` in lmms-eval's own loader and evaluator, with a model that knows some
answers: its numbers are ours. It needs an environment with lmms-eval (launch/lmms_eval_env.sh)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmemo import content
from mmemo.evaluation.elsewhere.score import Asked, Predictions, score_file
from mmemo.evaluation.results import EvalResult
from tests.content.test_ca_mer import write_subsets
from tests.content.test_crema_d import write_release
from tests.content.test_emorealm import row_of

lmms_eval = pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; run launch/lmms_eval_env.sh and use its Python"
)
pytestmark = pytest.mark.lmms_eval

WORDS = ["happy", "sad", "I am not sure.", "angry", "neutral", "The answer is B.", "", "fear"]
FOLDER = content.find("integrations/lmms_eval")


def wrong_now_and_then(number: int, doc: dict[str, Any]) -> str:
    """The target, or on every third question something else."""
    return WORDS[number % len(WORDS)] if number % 3 == 2 else str(doc["target"])


def run(
    tasks: list[str], out: Path, say: Callable[[int, dict[str, Any]], str] = wrong_now_and_then
) -> dict[str, Any]:
    """lmms-eval's results; ``out`` gets one log of samples for each task."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    class Model(lmms):  # type: ignore[misc]
        """Answers from the documents alone, after it has asked for the text and the clips."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            said: list[str] = []
            for number, request in enumerate(requests):
                text, _, visual, place, task, split = request.args
                doc = self.task_dict[task][split][place]
                assert text == doc["question"]
                assert "<video>" not in text
                for shown in visual(doc):
                    assert os.path.isabs(shown["url"] if isinstance(shown, dict) else shown)
                said.append(say(number, doc))
            return said

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: Any) -> Any:
            raise NotImplementedError

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    found = simple_evaluate(
        model=Model(), tasks=tasks, task_manager=manager, bootstrap_iters=0, batch_size=1
    )
    assert found is not None
    for task, samples in found["samples"].items():
        lines = [json.dumps(sample, default=str) + "\n" for sample in samples]
        (out / f"{task}_samples.jsonl").write_text("".join(lines))
    return found["results"]


def number(results: dict[str, Any], task: str, metric: str) -> float:
    return float(results[f"mmemo_{task}"][f"{metric},none"])


def ours(out: Path, task: str, **asked: Any) -> EvalResult:
    """``mmemo score`` of lmms-eval's own log."""
    file = out / f"mmemo_{task}_samples.jsonl"
    return score_file(Predictions(file), Asked(**asked), out / f"scored_{task}")


def same(results: dict[str, Any], task: str, block: Any) -> None:
    assert number(results, task, "average") == pytest.approx(block["average"]["value"], abs=1e-6)
    for metric in ("war", "uar", "weighted_f1"):
        value = block["metrics"][metric]["value"]
        assert number(results, task, metric) == pytest.approx(value, abs=1e-6)
    unread = block["statuses"]["refused"] + block["statuses"]["malformed"]
    assert number(results, task, "invalid") == pytest.approx(unread / block["n"])


def test_every_task_is_valid_for_the_loader_and_names_a_benchmark() -> None:
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_groups) == {"mmemo_crema_d", "mmemo_emorealm", "mmemo_mer_unibench"}
    assert len(manager.all_subtasks) == 19
    for name in manager.all_subtasks:
        config = load_yaml_config(manager.task_index[name]["yaml_path"])
        docs = config["process_docs"]
        file, task = (cell.cell_contents for cell in docs.__closure__)
        assert task in content.load_module(file).TASKS
        assert Path(config["dataset_kwargs"]["data_files"]["test"]).is_file()
        known = {"average", "war", "uar", "weighted_f1", "official", "invalid"}
        assert {one["metric"] for one in config["metric_list"]} <= known


def test_crema_d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_release(tmp_path / "CREMA-D", clips=True)
    for name in ("1011_TIE_SAD_MD", "1012_TIE_SAD_MD"):  # what this copy lacks
        (root / f"VideoFlash/{name}.flv").touch()
    monkeypatch.setenv("MMEMO_DATA_CREMA_D", str(root))
    found = run(["mmemo_crema_d"], tmp_path)
    result = {
        task: ours(tmp_path, f"crema_d_{task}", benchmark="eval/crema_d.py", data=[str(root)])
        for task in ("emotion", "voice", "face")
    }
    for task, one in result.items():
        scored = one.made["elsewhere"]
        assert set(scored["matched"]) == {"id"}
        rows = [row for row in one.rows(task) if not row.get("unanswered")]
        assert len(rows) == len(one.rows(task))  # every question of this task was asked
        same(found, f"crema_d_{task}", one.tasks[task])


def test_ca_mer_and_emorealm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emotions = ["happy", "sad", "angry", "neutral"]
    listed = [
        {"file_name": f"a{place}", "emotion": emotion} for place, emotion in enumerate(emotions)
    ]
    files = write_subsets(tmp_path, listed)
    for name in ("video-aligned", "audio-aligned", "consistent"):
        (tmp_path / name).mkdir()
        for row in listed:
            (tmp_path / name / f"{row['file_name']}.mp4").touch()
    monkeypatch.setenv("MMEMO_DATA_CA_MER", ":".join(files))
    monkeypatch.setenv("MMEMO_MEDIA_CA_MER", str(tmp_path))
    found = run(["mmemo_ca_mer"], tmp_path)
    asked = {"data": files, "media_root": str(tmp_path)}
    result = ours(tmp_path, "ca_mer", benchmark="eval/ca_mer.py", **asked)
    assert set(result.main["subsets"]) == {"video_aligned", "audio_aligned", "consistent"}
    same(found, "ca_mer", result.main)

    questions = tmp_path / "emorealm_v1.json"
    questions.write_text(json.dumps([row_of(place) for place in range(40)]))
    monkeypatch.setenv("MMEMO_DATA_EMOREALM", str(questions))
    found = run(["mmemo_emorealm"], tmp_path)
    for task in ("reasoning_basic_audio", "reasoning_stress_video"):
        result = ours(
            tmp_path, f"emorealm_{task}", benchmark="eval/emorealm.py", data=[str(questions)]
        )
        same(found, f"emorealm_{task}", result.tasks[task])


def write_meld(root: Path, items: list[dict[str, str]]) -> Path:
    """MERBench's processed folder of MELD, with empty files for its clips."""
    folder = root / "meld-process"
    (folder / "subvideo").mkdir(parents=True)
    for one in items:
        (folder / f"subvideo/{one['id']}.mp4").touch()
    corpus = {one["id"]: {"emo": one["gt"], "val": -10} for one in items}
    empty = np.array({}, dtype=object)
    np.savez_compressed(
        folder / "label.npz",
        train_corpus=empty,
        val_corpus=empty,
        test_corpus=np.array(corpus, dtype=object),
    )
    with (folder / "transcription-engchi-polish.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["name", "chinese", "english"])
        writer.writerows([[one["id"], "", "Hello."] for one in items])
    return root


def test_the_official_score_of_real_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = os.environ.get("MMEMO_TEST_DATA")
    if given is None:
        pytest.skip("MMEMO_TEST_DATA is not set; it names the folder with mer_unibench/")
    data = Path(given) / "mer_unibench"
    recorded = json.loads((data / "meld.json").read_text())
    root = write_meld(tmp_path / "uni", recorded["items"])
    monkeypatch.setenv("MMEMO_EMOTION_WHEEL", str(data / "emotion_wheel"))
    monkeypatch.setenv("MMEMO_DATA_MER_UNIBENCH", str(root))
    monkeypatch.setenv("MMEMO_OPTIONS_MER_UNIBENCH", "set=meld")
    texts = {one["id"]: one["pred_openset"] for one in recorded["items"]}
    found = run(
        ["mmemo_mer_unibench_meld"],
        tmp_path,
        lambda place, doc: texts[doc["sample_id"].removeprefix("meld/")],
    )
    official = number(found, "mer_unibench_meld", "official")
    assert official == pytest.approx(recorded["official"]["hitrate"], abs=1e-6)
    result = ours(
        tmp_path,
        "mer_unibench_meld",
        benchmark="eval/mer_unibench.py",
        data=[str(root)],
        options=["set=meld"],
    )
    assert result.main["official"]["hitrate"] == pytest.approx(official, abs=1e-12)


def test_the_environment_must_name_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMEMO_DATA_CA_MER", raising=False)
    with pytest.raises(Exception, match="ConfigError") as found:  # lmms-eval wraps it
        run(["mmemo_ca_mer"], Path())
    assert "set MMEMO_DATA_CA_MER to the folder" in str(found.value.__cause__)
