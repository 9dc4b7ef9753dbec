"""The steps for a GPU run where there is none, and their operations are those of the model."""

from __future__ import annotations

from pathlib import Path

import gpu_steps


def test_operations_of_a_supervised_step(tmp_path: Path) -> None:
    gpu_steps.write_rows(tmp_path)
    model = gpu_steps.save_model("tiny", tmp_path / "model", "cpu")

    def config_of(run: str, steps: int) -> object:
        return gpu_steps.values_of("sft", tmp_path, model, tmp_path / run, steps, cpu=True)

    lines = gpu_steps.run_stage("sft", config_of("timed", 2))
    assert len(lines) == 2
    tokens = lines[-1]["tokens_per_second"] * lines[-1]["seconds_per_step"]
    text = gpu_steps.TINY
    width, inner = text["hidden_size"], text["intermediate_size"]
    # q, o; k, v at half the width; gate, up, down. The adapters of rank 64 double it at this width.
    layer = 2 * width**2 + 2 * width * (width // 2) + 3 * width * inner
    least = 3 * 2 * tokens * text["num_hidden_layers"] * layer
    # Forward, forward again and the gradients of the inputs; and adapters, attention, the head.
    assert least < gpu_steps.operations("sft", config_of) < 5 * least


def test_the_table_has_a_line_for_each_stage() -> None:
    line = {"shape": "7B", "stage": "sft", "seconds": 0.5, "tokens_per_second": 100.0}
    text = gpu_steps.table([{**line, "share": 0.4, "peak_gib": 20.0}])
    assert text.splitlines()[2] == "| 7B | sft | 0.50 | 100 | 40.0% | 20.0 GiB |"
