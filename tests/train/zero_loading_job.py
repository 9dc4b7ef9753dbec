"""What each rank of the tests of sharded loading runs: ``python -m tests.train.zero_loading_job
FOLDER``

Each rank writes what it found to ``FOLDER/<rank>.json``; the runs are ``FOLDER/<stage>-<flag>``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mmemo import content
from mmemo.config import parse
from mmemo.errors import ConfigError
from mmemo.models.adapters.lora import unwrap
from mmemo.models.build import load_model
from mmemo.models.config import ModelConfig
from mmemo.stages import config_class, stage
from mmemo.train.config import RunConfig, TrainConfig
from mmemo.train.distributed import Ranks, leave
from mmemo.train.dpo.reference_store import reference_fingerprint
from mmemo.train.zero.compat import whole
from mmemo.train.zero.loading import gather_encoders, sharded_loading
from tests.train.native_ranks_job import cases, values_of


def write_configs(folder: Path) -> None:
    """Before the ranks start, since one would read what another is writing."""
    values = json.loads(content.find("ds_configs/zero3.json").read_text(encoding="utf-8"))
    for flag in ("auto", True, False):
        text = json.dumps({**values, "zero3_init_flag": flag})
        Path(config_file(folder, flag)).write_text(text, encoding="utf-8")


def config_file(folder: Path, flag: object) -> str:
    return str(folder / f"zero3-{flag}.json")


def compare(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A model that was loaded in shares beside the same one that was loaded whole."""
    config = ModelConfig(path=str(folder / "omni"), lora={"r": 4})  # type: ignore[arg-type]
    plain = load_model(config).model
    run = RunConfig(deepspeed=config_file(folder, "auto"))
    with sharded_loading(config, TrainConfig(), run, ranks, draws=False) as sharded:
        model = load_model(config).model
    gather_encoders(model)
    mine, theirs = (dict(one.named_parameters()) for one in (model, plain))
    lm = {id(p) for p in unwrap(model).language_model.parameters()}
    held = sum(p.ds_tensor.numel() for p in mine.values() if hasattr(p, "ds_id"))  # type: ignore
    return {
        "sharded": sharded,
        "names": set(mine) == set(theirs),
        "equal": all(torch.equal(whole(p), theirs[name]) for name, p in mine.items()),
        "shared": [name for name, p in mine.items() if hasattr(p, "ds_id")],
        "whole": [n for n, p in mine.items() if id(p) not in lm and not hasattr(p, "ds_id")],
        "share": held / sum(p.numel() for n, p in theirs.items() if hasattr(mine[n], "ds_id")),
        "learns": [p.requires_grad for p in mine.values()]
        == [p.requires_grad for p in theirs.values()],
        "features": [unwrap(one).feature_fingerprint("audio") for one in (model, plain)],
        "reference": [reference_fingerprint(one, adapter=True) for one in (model, plain)],
    }


def refusals(folder: Path, ranks: Ranks) -> list[str]:
    found: list[str] = []
    run = RunConfig(deepspeed=config_file(folder, True))
    config = ModelConfig(path=str(folder / "omni"), quantization="nf4")
    for model, draws in ((config, False), (ModelConfig(path=str(folder / "omni")), True)):
        try:
            with sharded_loading(model, TrainConfig(), run, ranks, draws=draws):
                found.append("")
        except ConfigError as error:
            found.append(str(error))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = Ranks(cpu=True)
    found = {**compare(folder, ranks), "refused": refusals(folder, ranks)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    for name, kind, changes, _ in cases(folder):
        for flag in (True, False) if name in ("sft", "dpo") else ():
            values = values_of(folder, folder / f"{name}-{flag}", ranks.size, **changes)
            values["model"] = {**values["model"], "dtype": "bfloat16"}
            values["train"] |= {"bf16": True}
            values["run"]["deepspeed"] = config_file(folder, flag)
            torch.manual_seed(0)
            stage(kind).runner(parse(config_class(kind), values))
    leave()


if __name__ == "__main__":
    main()
